"""An update recorded once and replayed: the tensor operations of guide, model, bound and gradient, without Python.

Pyro runs model and guide through effect handlers, which cost the same few milliseconds however small the networks
are; a tenth of an update of our small ones. Their tensor operations do not change from update to update, so
they are written down once, gradient included, and then only these are run: bit for bit what the program does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import GraphModule

from vma_pyro._system.outline import ITEMS, Outline, names_of_modules
from vma_pyro.memory import Memory
from vma_pyro.memory.checks import unchecked
from vma_pyro.memory.encoded import version_of
from vma_pyro.program import ImageModel
from vma_pyro.training.loss import Loss
from vma_pyro.training.recording import reason, record

TOLERANCE = 1e-6  # of loss and gradient, relative; they are expected to be equal
WAIT = 200  # updates before one is recorded, which takes seconds
CHECK_EVERY = 500  # replays, and at 1, 2, 4, 8, ...
MOST = 8  # recordings


class Gradient(NamedTuple):
    """Holds what an update needs.

    Attributes:
        loss: minus the bound, mean over images.
        of: its gradient by parameter; None where a parameter plays no part.
    """

    loss: Tensor
    of: Sequence[Tensor | None]


class Captured(Loss):
    """A loss whose program is recorded once and replayed where possible, and run as usual elsewhere.

    Possible on a CPU with one memory for all images (otherwise Python is a small part), for programs that do not
    look at the values of tensors and have no buffers. Modules may be exchanged, and attributes of modules (a
    temperature) may change: numbers, arrays and tensors, the first 64 items of containers and what plain objects
    hold, to a depth of 3. Each of their values is recorded, as is each shape of the data and each choice of
    trained parameters, up to 8 in all. What changes elsewhere would be replayed as it was: replays are therefore
    compared with the program itself, on the same noise, at calls 1, 2, 4, 8, ... and every 500; at the first
    difference they end for good, and that update is made as the program says. Where a parameter has a hook on the
    gradient that it gets, updates are made by a backward pass.

    Args:
        loss_fn: module of (memory, x), a scalar summed over images; `elbo(model, guide)`.
        note: told in one line why there are no replays, once.
        wait: calls before one is recorded; 200 by default.
        autocast: as of `Loss`.
    """

    def __init__(
        self,
        loss_fn: nn.Module,
        *,
        note: Callable[[str], object] = print,
        wait: int | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        super().__init__(loss_fn, note=note, autocast=autocast)
        self.wait = WAIT if wait is None else wait
        self.possible = True
        self.replays = 0
        self._modules: list[Any] = []
        self._exchanges = 0
        self._find_modules()
        self._graphs: dict[Any, GraphModule] = {}
        self._checks: set[str] = set()  # that the program makes of values
        self._is_full = False  # has been said

    def _find_modules(self) -> None:
        """Find the modules and their parameters; again, where one has been put in the place of another."""
        elbo = getattr(self.loss_fn, "elbo", None)
        found = [*self.loss_fn.modules(), *([] if elbo is None else [elbo])]
        if len(found) != len(self._modules) or any(a is not b for a, b in zip(found, self._modules, strict=True)):
            self._modules, self._exchanges = found, self._exchanges + 1
            self.parameters = dict(self.loss_fn.named_parameters())

    def gradient(self, memory: Memory, x: Tensor) -> Tensor:
        """As `Loss.gradient`."""
        self._find_modules()
        if any(getattr(p, "_post_accumulate_grad_hooks", None) for p in self.parameters.values()):
            return super().gradient(memory, x)  # hooks belong to a backward pass
        self.wait -= 1
        on_cpu = memory.device.type == x.device.type == "cpu"
        plain = type(memory) is Memory and memory.is_shared  # one of a bank chooses what it encodes by values
        replay = self.possible and self.wait < 0 and plain and on_cpu
        found = self._replayed(memory, x) if replay else self._run(memory, x)
        gradients = dict(zip(self._trained(), found.of, strict=True))
        for name, parameter in self.parameters.items():
            gradient = gradients.get(name)
            # As a backward pass leaves it: as the parameter lies, and in memory that no other gradient has.
            parameter.grad = None if gradient is None else torch.empty_like(parameter).copy_(gradient)
        return found.loss

    def _trained(self) -> dict[str, nn.Parameter]:
        """Parameters that require a gradient now."""
        return {name: p for name, p in self.parameters.items() if p.requires_grad}

    def _replayed(self, memory: Memory, x: Tensor) -> Gradient:
        inputs = [memory.entries, memory.labels, memory.mask, x]
        # What was there to be seen by the program, besides the values of tensors.
        seen = (*(None if t is None else (t.shape, t.stride(), t.dtype) for t in inputs), *self._attributes())
        if seen not in self._graphs:
            if len(self._graphs) == MOST:
                if not self._is_full:
                    self._is_full = True
                    self.note(
                        f"capture: {MOST} recordings are made, and no more, although shapes of the data or "
                        "attributes of a module have changed again; such updates are made without"
                    )
                return self._run(memory, x)
            try:
                self._graphs[seen] = self._record(memory, x)
            except Exception as error:  # whatever a program may raise; it is run as usual, and raises it there
                return self._give_up(self._run(memory, x), f"the program cannot be recorded: {reason(error)}")
        memory.check(x)  # recorded programs make no checks
        if "values" in self._checks:
            for program in self.loss_fn.modules():
                if isinstance(program, ImageModel):
                    program.check_values(memory, x)
        self.replays += 1
        before = torch.get_rng_state()
        with torch.no_grad():
            found = Gradient(*self._graphs[seen].forward(self._trained(), *inputs))
        if self.replays & (self.replays - 1) == 0 or self.replays % CHECK_EVERY == 0:
            torch.set_rng_state(before)
            expected = self._run(memory, x)
            if not _equal(found, expected):
                return self._give_up(expected, f"replay {self.replays} differs from the program")
        return found

    def _attributes(self) -> list[Any]:
        """Outline the attributes of the modules, and name the parameters that are trained."""
        theirs = names_of_modules()
        own = ((name, v) for part in self._modules for name, v in vars(part).items() if name not in theirs)
        return [self._exchanges, *((name, OUTLINE.of(value)) for name, value in own), *self._trained()]

    def _give_up(self, found: Gradient, why: str) -> Gradient:
        self.possible = False
        self._graphs.clear()
        self.note(f"capture: {why}; updates are made without it")
        return found

    def _record(self, memory: Memory, x: Tensor) -> GraphModule:
        """Record the operations of one call, with parameters and data as inputs; leaves the noise as it was."""
        if any(True for _ in self.loss_fn.buffers()):
            raise ValueError("it has buffers, which it may change")

        def gradient(
            parameters: dict[str, Tensor], entries: Tensor, labels: Tensor | None, mask: Tensor | None, x: Tensor
        ) -> Any:
            same = Memory(entries, labels, memory.event_dim, mask=mask, learned=memory.learned)
            with self.autocast():
                loss = functional_call(self.loss_fn, parameters, (same, x))
            loss = loss / len(x)
            return loss, torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)

        with unchecked() as left_out:
            graph = record(gradient, self._trained(), memory.entries, memory.labels, memory.mask, x)
        self._checks = left_out  # some programs make none
        return graph

    def _run(self, memory: Memory, x: Tensor) -> Gradient:
        """Run the program itself."""
        with self.autocast():
            loss = self.loss_fn(memory, x)
        loss = loss / len(x)
        gradient = torch.autograd.grad(loss, list(self._trained().values()), allow_unused=True)
        return Gradient(loss.detach(), gradient)


def _of_tensor(values: Tensor) -> Any:
    """A parameter is an input of what is recorded; of others the values, or which tensor it is and its version."""
    kind = values.shape, values.dtype, values.device.type
    if isinstance(values, nn.Parameter) or values.requires_grad:
        return *kind, id(values)
    if values.numel() <= ITEMS and values.device.type == "cpu":
        return *kind, repr(values.flatten().tolist())
    return *kind, id(values), version_of(values)


OUTLINE = Outline(of_tensor=_of_tensor, of_function=lambda function: function)


def _equal(found: Gradient, expected: Gradient) -> bool:
    if [g is None for g in found.of] != [g is None for g in expected.of]:
        return False
    pairs = [(found.loss, expected.loss)]
    pairs += [(f, e) for f, e in zip(found.of, expected.of, strict=True) if f is not None and e is not None]
    return all(torch.allclose(f, e, TOLERANCE, TOLERANCE * float(e.abs().max()), equal_nan=True) for f, e in pairs)
