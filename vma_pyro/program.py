"""The base of model and guide: a PyroModule that asks for its networks at no cost."""

from __future__ import annotations

from typing import Any

import pyro
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from vma_pyro._system.parts import Part
from vma_pyro.memory import Memory
from vma_pyro.memory.checks import looks_at


class Program(Part, PyroModule):
    """A PyroModule whose plain torch modules make no param statements while parameters live in modules.

    Pyro makes one for every parameter of a module whenever a running program asks for it. The store of parameters
    needs them; with `module_local_params` nothing does, and for our networks they cost a tenth of an update.
    Effect handlers of `pyro.param` (`poutine.lift`) see them without that setting only. So does `loss_and_grads`
    of Pyro's own objectives, which leaves out the backward pass where it sees none: use `elbo(model, guide)`.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As `PyroModule`, but under a memory with padding an address that might be padding is refused."""
        memory = args[0] if args else kwargs.get("memory")
        if not isinstance(memory, Memory) or memory.mask is None:
            return super().__call__(*args, **kwargs)
        with _NoPadding(memory.mask):
            return super().__call__(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """As `PyroModule`, but for plain modules."""
        module = self.__dict__.get("_modules", {}).get(name)
        plain = isinstance(module, nn.Module) and not isinstance(module, PyroModule)
        if plain and pyro.settings.get("module_local_params"):
            return module
        return super().__getattr__(name)


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
