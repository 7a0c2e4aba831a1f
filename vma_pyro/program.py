"""The bases of model and guide: all of a program but its equations."""

from __future__ import annotations

import functools
import inspect
import math
from contextlib import nullcontext
from typing import Any, ClassVar

import pyro
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from vma_pyro._system.arguments import Arguments
from vma_pyro._system.parts import Part
from vma_pyro.likelihoods import BernoulliPixels, Likelihood
from vma_pyro.memory import Encoded, Memory
from vma_pyro.memory.checks import looks_at
from vma_pyro.networks import Networks


class Program(Part, PyroModule):
    """A Pyro program of (memory, x): checks, encoding and the plate of its datapoints.

    Its plain torch modules make no param statements while parameters live in modules. Pyro makes one for every
    parameter of a module whenever a running program asks for it. The store of parameters needs them; with
    `module_local_params` nothing does, and for our networks they cost a tenth of an update. Effect handlers of
    `pyro.param` (`poutine.lift`) see them without that setting only. So does `loss_and_grads` of Pyro's own
    objectives, which leaves out the backward pass where it sees none: use `elbo(model, guide)`.

    Attributes:
        networks: everything neural, by which memories are encoded.
    """

    networks: Networks

    def opened(
        self, memory: Memory | Tensor, x: Tensor | None = None, num_images: int = 1
    ) -> tuple[Encoded, Any, Any]:
        """Check and encode the arguments, and open the plate `data`.

        Args:
            memory: entries [S, *E] for all datapoints, or [B, S, *E], one memory for each.
            x: images [B, *E]; None to generate.
            num_images: B when generating from a shared memory.

        Returns:
            The encoded memory; x as the likelihood compares it, in 32 bits or more; the plate of the B datapoints,
            at dimension -1.

        Raises:
            ValueError: images that do not fit the memory or the likelihood, or none to generate.
        """
        memory = Memory.of(memory)
        self.check_arguments(memory, x)
        batch = memory.batch_size or check_number(num_images) if x is None else len(x)
        memory = self.encoded(memory, x)  # itself, where the guide has prepared it
        return memory, None if x is None else x.to(memory.dtype), pyro.plate("data", batch, dim=-1)

    def prepare(self, *args: Any, **kwargs: Any) -> Arguments:
        """Encode the memory once for all runs of a model and this guide in an estimate, see `vma_pyro.infer`.

        Args:
            args, kwargs: what `forward` takes: a memory first, or by name, and perhaps images `x`, which are
                looked at here. What is no memory is passed on as it is.
        """
        given = _signature(type(self).forward).bind_partial(self, *args, **kwargs).arguments
        if len(given) < 2:  # self alone
            return Arguments(args, kwargs)
        name, memory = list(given.items())[1]
        is_memory = isinstance(memory, Memory) or (isinstance(memory, Tensor) and name == "memory")
        if not is_memory or not hasattr(self, "networks"):
            return Arguments(args, kwargs)
        memory, x = Memory.of(memory), given.get("x")
        if isinstance(x, Tensor):
            memory.check(x)
        encoded = self.encoded(memory, x if isinstance(x, Tensor) else None)
        if name in kwargs:
            return Arguments(args, {**kwargs, name: encoded})
        return Arguments((encoded, *args[1:]), kwargs)

    def encoded(self, memory: Memory, x: Tensor | None) -> Encoded:
        """Have the networks encode the memory, all of it; a guide may encode what it looks for near images x."""
        return memory.encode(self.networks)

    def check_arguments(self, memory: Memory, x: Tensor | None) -> None:
        """Refuse images that do not fit the memory. Which values they may have is for the model to say."""
        if x is not None:
            memory.check(x)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As `PyroModule`, but an address that might be padding, or an entry that is left out, is refused."""
        memory = args[0] if args else kwargs.get("memory")
        if not isinstance(memory, Memory):
            return super().__call__(*args, **kwargs)
        left_out = getattr(memory, "left_out", None)
        guard: Any = nullcontext()
        if memory.mask is not None:
            guard = _NoPadding(memory.mask)
        elif left_out is not None:
            guard = _NotLeftOut(left_out)
        with guard:
            return super().__call__(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """As `PyroModule`, but for plain modules."""
        module = self.__dict__.get("_modules", {}).get(name)
        plain = isinstance(module, nn.Module) and not isinstance(module, PyroModule)
        if plain and pyro.settings.get("module_local_params"):
            return module
        return super().__getattr__(name)


class ImageModel(Program):
    """A program that ends in images: it has a likelihood.

    A subclass may say p(x | z, m) by a method `likelihood(decoded)` instead, which may call that of the base,
    `super().likelihood(decoded)`. The argument is then refused, the decoder may have any channels, and
    `check_values` decides which images it takes: binary ones unless it says otherwise.

    Args:
        networks: with a decoder.
        likelihood: a `Likelihood`, from what the decoder gives to p(x | z, m); `BernoulliPixels` by default.

    Raises:
        TypeError: another kind of likelihood.
        ValueError: networks whose decoder has not the channels that the likelihood wants; a likelihood where the
            class has a method of that name.

    Attributes:
        reads: whether it reads an entry, whose pixels the decoder may copy.
    """

    reads: ClassVar[bool] = True

    def __init__(self, networks: Networks, *, likelihood: nn.Module | None = None) -> None:
        super().__init__()
        chosen = BernoulliPixels() if likelihood is None else likelihood
        if not isinstance(chosen, Likelihood):
            raise TypeError(f"likelihood: expected a Likelihood, got {type(chosen).__name__}")
        by_method = type(self).likelihood is not ImageModel.likelihood
        if isinstance(type(self).likelihood, nn.Module):
            raise TypeError(
                f"likelihood: expected a method of {type(self).__name__} or an argument, got a class attribute, "
                "whose parameters no model would have"
            )
        if by_method and likelihood is not None:
            raise ValueError(
                f"likelihood: expected none, as {type(self).__name__} has a method of that name, got "
                f"{type(chosen).__name__}"
            )
        if not by_method:
            check_decoder(networks, chosen, copies=chosen.copies and self.reads)
        self.networks = networks
        self.likelihood = chosen  # type: ignore[misc]  # torch keeps modules apart from attributes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As `Program`, but a p(x | z, m) of another shape than the images is refused: it would broadcast."""
        with _OneImage(self.networks):
            return super().__call__(*args, **kwargs)

    @property
    def likelihood(self) -> Any:
        """p(x | z, m), a distribution of images, of what the decoder gives, [..., B, channels * C, 28, 28]."""
        return self.__getattr__("likelihood")

    def check_arguments(self, memory: Memory, x: Tensor | None) -> None:
        """Refuse images that do not fit the memory, or the likelihood."""
        super().check_arguments(memory, x)
        if looks_at("values", memory.values):
            self.check_values(memory, x)

    def check_values(self, memory: Memory, x: Tensor | None) -> None:
        """Refuse entries and images that the likelihood cannot score; called on a CPU only."""
        likelihood: Any = self._modules["likelihood"]
        memory.check_values(likelihood)
        if x is not None:
            likelihood.check("x", x)
            likelihood.warn("x", x)


def check_decoder(networks: Networks, likelihood: Likelihood, *, copies: bool) -> None:
    """Give the likelihood what it wants of the decoder where that is not decided yet, else look whether it has it.

    Raises:
        ValueError: networks whose decoder gives something else.
    """
    image_shape = getattr(networks, "image_shape", (1,))
    wanted = {"channels": likelihood.channels, "maps": likelihood.maps(image_shape[0])}
    decide = getattr(networks, "decide", None)
    if decide is not None:
        decide(**wanted, copies=copies)
    for name, least in (("channels", 1), ("maps", 0)):
        found = getattr(networks, name, least)
        if found != wanted[name]:
            raise ValueError(
                f"networks: expected a decoder with {name}={wanted[name]}, as many as {type(likelihood).__name__} "
                f"wants, got {found}"
            )


_signature = functools.cache(inspect.signature)  # which takes longer than all else in `prepare`


def check_number(num_images: int) -> int:
    """Refuse to generate nothing."""
    if num_images < 1:
        raise ValueError(f"num_images: expected at least 1, got {num_images}")
    return num_images


class _OneImage(Messenger):
    """Refuse a distribution of the site `x` that is not of one image for each datapoint."""

    def __init__(self, networks: Any) -> None:
        super().__init__()
        self.expected = getattr(networks, "image_shape", None)

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] != "x":
            return
        actual, value = tuple(msg["fn"].event_shape), msg["value"]
        # Where the networks do not say: as many dimensions as the distribution has, of what is observed.
        observed = None if value is None else tuple(value.shape[value.dim() - len(actual) :])
        expected = observed if self.expected is None else tuple(self.expected)
        if expected is not None and actual != expected:
            raise ValueError(
                f"site 'x': expected a distribution of images {list(expected)}, got one of {list(actual)}; see "
                "`channels` of the networks and of the likelihood"
            )


class _NoPadding(Messenger):
    """Refuse a distribution of the address that gives probability to padding: a program that forgot the mask."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def _pyro_sample(self, msg: Any) -> None:
        logits = getattr(msg["fn"], "logits", None) if msg["name"] == "address" else None
        if not isinstance(logits, Tensor) or logits.shape[-1:] != self.mask.shape[-1:]:
            return
        if looks_at("padding", logits):
            most = logits.detach().softmax(-1).masked_fill(self.mask, 0.0).max().item()
            if most > 0:
                raise ValueError(
                    f"site 'address': expected no probability on padding (memory.mask), got up to {most:.2g}; "
                    "give its distribution memory.masked(logits)"
                )


class _NotLeftOut(Messenger):
    """Refuse a distribution of the address that gives probability to entries that are left out."""

    def __init__(self, left_out: Tensor) -> None:
        super().__init__()
        self.left_out = left_out

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] != "address" or not looks_at("left out", self.left_out):
            return
        most = msg["fn"].log_prob(self.left_out).detach().max().item()
        if most > -math.inf:
            raise ValueError(
                f"site 'address': expected no probability on the entries that are left out (memory.left_out), got "
                f"up to {math.exp(most):.2g}; give its distribution memory.masked(logits)"
            )
