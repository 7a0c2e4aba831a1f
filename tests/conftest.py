"""Shared set-up: one thread per worker, parameters local to modules, small networks, shapes checked."""

import ast
import functools
import gc
import os
import sys

import jaxtyping
import jaxtyping._import_hook as hook
import matplotlib
import numpy as np
import pyro
import pytest
import torch


def only_shapes(*, typechecker):
    """jaxtyping's own decorator for what says a shape, and nothing for the rest: binding arguments takes longer
    than most functions, and plain types are mypy's to check. A function that is given again what it was given
    before, by shapes and types, is not checked again."""
    checked = jaxtyping.jaxtyped(typechecker=typechecker)

    def decorate(thing):
        said = getattr(thing, "__annotations__", {}).values()
        if not any("[Tensor, " in str(annotation) for annotation in said):
            return thing
        return checked(thing) if isinstance(thing, type) else first_of_a_kind(checked(thing), thing)

    return decorate


def first_of_a_kind(checked, plain):
    """The checked function for arguments of new shapes, the plain one for those that have passed."""
    passed = set()

    @functools.wraps(plain)
    def function(*args, **kwargs):
        if torch.compiler.is_compiling():  # which would translate the checks as well
            return plain(*args, **kwargs)
        given = kind_of(args), kind_of(tuple(kwargs.items()))
        if given in passed:
            return plain(*args, **kwargs)
        result = checked(*args, **kwargs)
        passed.add(given)
        return result

    return function


def kind_of(value):
    """A tensor's shape and type, a number, or which object it is."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype
    if isinstance(value, tuple | list):
        return type(value), *map(kind_of, value)
    return value if isinstance(value, int | float | str | None) else (type(value), id(value))


def install_shape_checks(modules):
    """Check the shapes in the signatures of these modules at every call; before the package is imported."""
    hook._jaxtyping_for_tests = only_shapes
    tree_of = hook.Typechecker.get_ast

    def get_ast(checker):
        decorator = tree_of(checker)
        decorator.func = ast.parse("jaxtyping._import_hook._jaxtyping_for_tests", mode="eval").body
        return decorator

    hook.Typechecker.get_ast = get_ast
    jaxtyping.install_import_hook(modules, "beartype.beartype")


install_shape_checks(
    [
        f"vma_pyro.{name}"
        for name in (
            "infer",
            "evaluation.address",
            "evaluation.divergence",
            "evaluation.kl",
            "evaluation.split",
            "networks",
            "guide",
            "model",
        )
    ]
)

matplotlib.use("Agg")

# Collecting garbage goes through all that libraries hold: rarely is enough.
gc.freeze()
gc.set_threshold(100_000, 50, 100)


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


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    """A small Omniglot and MNIST of random images in prepared files, as `--data-dir` takes them."""
    from vma_pyro.data import omniglot
    from vma_pyro.data.prepared import write_npz

    root = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    halves = {
        "background": (*omniglot.VALIDATION_ALPHABETS, "Latin", "Korean"),
        "evaluation": (*omniglot.TEST_5, "Angelic"),
    }
    for half, names in halves.items():
        alphabets = np.repeat(names, 3)
        write_npz(
            root / "omniglot" / f"{half}.npz",
            images=(generator.random((len(alphabets), 20, 28, 28)) < 0.2).astype(np.uint8),
            alphabet=alphabets,
            character=np.array([f"character{n}" for n in range(len(alphabets))]),
        )
    for split, number in (("train", 5300), ("test", 40)):
        images = (generator.random((number, 28, 28)) < 0.2).astype(np.uint8)
        labels = (np.arange(number) % 10).astype(np.uint8)
        write_npz(root / "mnist" / f"{split}.npz", images=images, labels=labels)
    return root


OWN = """
import pyro.distributions as dist
from vma_pyro import Model


class Soft(Model):
    def likelihood(self, logits):
        return dist.Bernoulli(logits=0.5 * logits).to_event(3)
"""


@pytest.fixture
def own_model(tmp_path, monkeypatch):
    """A user's `own_model.py` and a small untrained model of its class, `own.pt`, in the folder of the test."""
    from vma_pyro import ConvNetworks, Guide, models

    (tmp_path / "own_model.py").write_text(OWN)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (kind,) = models.classes_in(tmp_path / "own_model.py")
    with torch.random.fork_rng(), pyro.settings.context(module_local_params=True):
        torch.manual_seed(0)
        networks = ConvNetworks(4, width=0.1)
        models.save(tmp_path / "own.pt", (kind(networks), Guide(networks)), data="glyphs")
    yield tmp_path / "own.pt"
    sys.modules.pop("own_model", None)


@pytest.fixture(scope="session")
def untrained(tmp_path_factory):
    """Folder with a small untrained model of each program, as checkpoints of Omniglot."""
    from vma_pyro import models

    folder = tmp_path_factory.mktemp("untrained")
    for program in models.PROGRAMS:
        architecture = {"networks": "conv", "width": 0.1, "latent_dim": 4, "program": program}
        with torch.random.fork_rng(), pyro.settings.context(module_local_params=True):
            torch.manual_seed(0)
            models.save(folder / f"{program}.pt", models.build(architecture), data="omniglot")
    return folder


@pytest.fixture(scope="module")
def live_pair():
    """Model and guide of the live page that answer in milliseconds."""
    import live

    with pyro.settings.context(module_local_params=True):
        return live.small_pair()


@pytest.fixture(scope="module")
def live_server(live_pair):
    """A client of the live page's running server."""
    import httpx
    import live

    with live.serve(live.application(live_pair)) as address, httpx.Client(base_url=address) as client:
        yield client


@pytest.fixture
def live_entries(random_images):
    """Seven entries of a memory as the live page sends them."""
    from vma_pyro.demo.format import Format

    return Format().write(random_images(7))
