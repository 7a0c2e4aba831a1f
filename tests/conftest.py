"""Shared set-up: one thread per worker, parameters local to modules, small networks, shapes checked."""

import os

import matplotlib
import pyro
import pytest
import torch
from jaxtyping import install_import_hook

# Before the package is imported: the shapes in these signatures are checked at every call in the tests.
install_import_hook(
    [f"vma_pyro.{name}" for name in ("infer", "evaluation.kl", "networks", "guide", "model")],
    "beartype.beartype",
)

matplotlib.use("Agg")


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    # Two workers with two threads each slow each other tenfold; subprocesses inherit the variable.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def _fresh_pyro():
    pyro.clear_param_store()
    torch.manual_seed(0)
    with pyro.settings.context(module_local_params=True), pyro.validation_enabled(True):
        yield


@pytest.fixture
def random_images():
    """Binary images [..., 1, 28, 28] from a fixed stream."""
    generator = torch.Generator().manual_seed(1)

    def make(*lead, side=28):
        return (torch.rand(*lead, 1, side, side, generator=generator) < 0.2).float()

    return make
