"""The base of model and guide: a PyroModule that asks for its networks at no cost."""

from __future__ import annotations

from typing import Any

import pyro
from pyro.nn import PyroModule
from torch import nn


class Program(PyroModule):
    """A PyroModule whose plain torch modules make no param statements while parameters live in modules.

    Pyro makes one for every parameter of a module whenever a running program asks for it. The store of parameters
    needs them; with `module_local_params` nothing does, and for our networks they cost a tenth of an update.
    Effect handlers of `pyro.param` (`poutine.lift`) see them without that setting only. So does `loss_and_grads`
    of Pyro's own objectives, which leaves out the backward pass where it sees none: use `elbo(model, guide)`.
    """

    def __getattr__(self, name: str) -> Any:
        """As `PyroModule`, but for plain modules."""
        module = self.__dict__.get("_modules", {}).get(name)
        plain = isinstance(module, nn.Module) and not isinstance(module, PyroModule)
        if plain and pyro.settings.get("module_local_params"):
            return module
        return super().__getattr__(name)
