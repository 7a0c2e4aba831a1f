"""An Apple GPU knows no float64: no operation of training or evaluation may make one there.

Modelled on the CPU, where every tensor counts as on the device but for the results of `.cpu()`, float64 made
without a `device`, and what is computed of those alone. What this cannot see: operations that such a device lacks
for another reason, and tensors of two devices in one operation.
"""

import weakref

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vma_pyro import Guide, LearnedAddress, Memory, MLPNetworks, Model
from vma_pyro.data import EpisodeSampler, glyphs
from vma_pyro.evaluation import (
    Mean,
    address_posterior,
    classify,
    classify_by_likelihood,
    kl_report,
    log_likelihood,
)
from vma_pyro.infer import MultiSampleELBO, make
from vma_pyro.training import TrainConfig, fit
from vma_pyro.training.config import device_of_name


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Host:
    """The tensors that are on the CPU of the modelled machine: all of float64, and others by name."""

    def __init__(self):
        self.ids = set()

    def add(self, tree):
        for tensor in tensors(tree):
            self.ids.add(id(tensor))
            weakref.finalize(tensor, self.ids.discard, id(tensor))

    def has(self, tensor):
        return tensor.dtype == torch.float64 or id(tensor) in self.ids


class Calls(TorchFunctionMode):
    """`.cpu()` leads to the host; `device=` with float64 is a mistake."""

    def __init__(self, host):
        super().__init__()
        self.host = host

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if kwargs.get("dtype") == torch.float64 and kwargs.get("device") is not None:
            raise TypeError("float64 on a device that has none")
        if func is torch.Tensor.cpu:
            copy = args[0].clone()
            self.host.add(copy)
            return copy
        return func(*args, **kwargs)


class Operations(TorchDispatchMode):
    """Float64 out of anything on the device is a mistake."""

    def __init__(self, host):
        super().__init__()
        self.host = host

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = tensors((args, kwargs))
        here = [t for t in given if not self.host.has(t)]
        if given and not here:
            self.host.add(result)
        # Indices and masks were moved, which cannot be seen where both devices are the CPU.
        wrong = any(t.is_floating_point() for t in here) or len(here) == len(given) > 0
        if wrong and any(t.dtype == torch.float64 for t in tensors(result)):
            raise TypeError(f"float64 on a device that has none: {func}")
        return result


@pytest.fixture
def apple(monkeypatch):
    """The CPU as a device without float64."""
    monkeypatch.setattr("vma_pyro._system.double.WITHOUT_FLOAT64", {"cpu"})
    host = Host()
    with Calls(host), Operations(host):
        yield


@pytest.fixture
def setting():
    episodes = EpisodeSampler(glyphs.load(classes=6, examples=4), classes=3, shots=1, queries=4, seed=0)
    networks = MLPNetworks(2, hidden_dims=(8, 7), key_dim=5)
    return episodes, Model(networks, address_prior=LearnedAddress(networks)), Guide(networks)


def test_the_model_of_a_device_sees_float64(apple):
    on_device = torch.ones(3)
    for mistake in (
        lambda: on_device.double(),
        lambda: on_device.to(torch.float64),
        lambda: torch.zeros(3, dtype=torch.float64, device=on_device.device),
        lambda: on_device.sum(dtype=torch.float64),
    ):
        with pytest.raises(TypeError, match="float64 on a device that has none"):
            mistake()
    assert (on_device.cpu().double() * torch.tensor(2.0, dtype=torch.float64)).dtype == torch.float64


def test_training(apple, setting, tmp_path):
    episodes, model, guide = setting
    config = TrainConfig(updates=3, log_every=2, validate_every=2, accelerator="cpu", capture=False)
    result = fit(
        model,
        guide,
        MultiSampleELBO(2),
        episodes,
        config=config,
        folder=tmp_path,
        validation=[episodes.sample()],
        show_progress=False,
    )
    assert result.updates == 3


@pytest.mark.parametrize("own", [False, True])
def test_evaluation(apple, setting, own):
    episodes, model, guide = setting
    memory, x, labels = episodes.sample()
    if own:
        memory = Memory(memory.entries.expand(4, -1, -1, -1, -1), memory.labels.expand(4, -1))
    bounds = [log_likelihood(model, guide, memory, x, num_samples=3, address=a) for a in ("sampled", "exact")]
    assert all(bound.dtype == torch.float64 for bound in bounds)  # on the host
    Mean.of(bounds[0])
    kl_report(model, guide, memory, x, labels=labels, num_samples=3).gained_over(torch.ones(4))
    for probabilities in (
        classify(guide, memory, x),
        address_posterior(guide, memory, x),
        classify_by_likelihood(model, guide, memory, x, num_samples=2),
    ):
        assert (probabilities.sum(1) - 1).abs().max() < 1e-5
    assert model(memory, num_images=2).shape[1:] == (1, 28, 28)


@pytest.mark.parametrize("name", ["unordered-set", "distinct", "wake-wake-defensive", "gumbel-softmax"])
def test_estimators(apple, setting, name):
    episodes, model, guide = setting
    memory, x, _ = episodes.sample()
    make(name, 2)(model, guide)(memory, x).backward()


@pytest.mark.parametrize(
    ("cuda", "mps", "auto"),
    [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu"), (True, False, "cuda")],
)
def test_the_accelerator(monkeypatch, cuda, mps, auto):
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: mps)
    assert device_of_name("auto").type == auto
    assert device_of_name("cpu").type == "cpu"
    for name, here in (("cuda", cuda), ("mps", mps)):
        assert TrainConfig(accelerator=name).accelerator == name
        if here:
            assert device_of_name(name).type == name
        else:
            with pytest.raises(ValueError, match=f"^accelerator: expected a GPU for {name}, found none$"):
                device_of_name(name)
    with pytest.raises(ValueError, match="^accelerator: expected one of auto, cpu, cuda, mps, got 'tpu'$"):
        device_of_name("tpu")
