"""What is wrong with model or guide is said by the site's name, before it costs a training run."""

import math
from typing import ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroParam
from torch import nn

from vma_pyro import Guide, MLPNetworks, Model
from vma_pyro._system import checkpoint
from vma_pyro.data import EpisodeSampler, glyphs
from vma_pyro.infer import MultiSampleELBO
from vma_pyro.training import TrainConfig, fit


class Broken(dist.TorchDistribution):
    """A likelihood of grey images by hand, with one of the mistakes that this invites."""

    arg_constraints: ClassVar = {}
    support = dist.constraints.real

    def __init__(self, logits, mistake):
        self.logits, self.mistake = logits, mistake
        super().__init__(logits.shape[:-3], logits.shape[-3:])

    def log_prob(self, x):
        mean = self.logits.sigmoid()
        each = {
            "0 log 0": x * x.log() + mean,
            "log 0": x.log() + mean,
            "1 / 0": mean / x,
            "root of 0": (0 * mean).sqrt() + mean,
            "nothing": -(x - mean).square(),
        }[self.mistake]
        return each.sum((-3, -2, -1))

    def sample(self, sample_shape=()):
        return self.logits.sigmoid()

    def expand(self, batch_shape, _instance=None):
        return Broken(self.logits.expand(*batch_shape, *self.event_shape), self.mistake)


def train(folder, kind=Model, guide=Guide, *, validation=False, **options):
    torch.manual_seed(0)
    networks = MLPNetworks(3, hidden_dims=(8, 7), key_dim=5)
    pair = kind(networks), guide(networks)
    episodes = EpisodeSampler(glyphs.load(classes=12, examples=6), classes=3, shots=2, queries=4, seed=0)
    config = TrainConfig(updates=3, accelerator="cpu", validate_every=1, **options)
    held_out = [episodes.sample()] if validation else []
    with pyro.validation_enabled(False):  # as in the scripts
        elbo = MultiSampleELBO(3, max_plate_nesting=1)
        fit(*pair, elbo, episodes, config=config, folder=folder, validation=held_out, show_progress=False)
    return pair


class Grey(Model):
    mistake = "nothing"

    def likelihood(self, logits):
        return Broken(logits, self.mistake)


@pytest.mark.parametrize("validation", [False, True])
@pytest.mark.parametrize(
    ("mistake", "got"),
    [
        ("0 log 0", "expected a log probability, got NaN for 4 of 4 values"),
        ("log 0", "expected a log probability, got minus infinity for 4 of 4 values"),
        ("1 / 0", "expected a log probability, got infinity for 4 of 4 values"),
        ("root of 0", "expected a gradient of its log probability, got NaN or infinity"),
    ],
)
def test_the_site_is_named_and_not_the_learning_rate(mistake, got, validation, tmp_path, monkeypatch):
    monkeypatch.setattr(Grey, "mistake", mistake)
    with pytest.raises(FloatingPointError) as caught:
        train(tmp_path, Grey, validation=validation)
    assert str(caught.value).startswith(f"site 'x': {got}")
    assert "learning rate" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_guide_that_draws_from_nan(tmp_path):
    class Lost(Guide):
        def forward(self, memory, x):
            query = self.networks.query(x)
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("address", dist.Categorical(logits=torch.zeros(6)))
                scale = (0 * query.hidden[:, :3]).sqrt() / 0
                pyro.sample("z", dist.Normal(query.hidden[:, :3], scale).to_event(1))

    with pytest.raises(FloatingPointError, match="^site 'z': expected parameters of Normal, got NaN in scale"):
        train(tmp_path, guide=Lost)


def test_steps_that_are_too_large_are_still_blamed_on_their_size(tmp_path):
    with pytest.raises(FloatingPointError, match="^training: expected finite .* lower the learning rate"):
        train(tmp_path, learning_rate=1e30, warmup_updates=0, clip_norm=math.inf)


class InStore(Model):
    def likelihood(self, logits):
        return dist.Bernoulli(logits=pyro.param("temperature", torch.tensor(1.0)) * logits).to_event(3)


class GuideInStore(Guide):
    def forward(self, memory, x):
        pyro.param("scale", torch.ones(2), constraint=dist.constraints.positive)
        super().forward(memory, x)


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize(
    ("kind", "guide", "name"), [(InStore, Guide, "temperature"), (Model, GuideInStore, "scale")]
)
def test_a_parameter_of_no_module_is_refused_by_name(kind, guide, name, local, tmp_path):
    with pyro.settings.context(module_local_params=local):
        line = f"^pyro.param '{name}': expected parameters of the modules .* or a PyroParam of the module$"
        with pytest.raises(ValueError, match=line):
            train(tmp_path, kind, guide)


class OfModule(Model):
    def __init__(self, networks):
        super().__init__(networks)
        self.temperature = PyroParam(torch.tensor(1.0), dist.constraints.positive)
        self.shift = nn.Parameter(torch.zeros(()))

    def likelihood(self, logits):
        return dist.Bernoulli(logits=self.temperature * logits + self.shift).to_event(3)


@pytest.mark.parametrize("local", [True, False])
def test_parameters_of_a_module_are_trained_and_kept(local, tmp_path):
    with pyro.settings.context(module_local_params=local):
        model, _ = train(tmp_path, OfModule)
    assert model.temperature.item() != 1
    assert model.shift.item() != 0
    saved = checkpoint.load(tmp_path / "checkpoint.pt")["weights"]
    torch.testing.assert_close(saved["model.temperature_unconstrained"].exp(), model.temperature.detach())
    assert saved["model.shift"] == model.shift


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("final_rate", math.nan),
        ("final_rate", -0.1),
        ("final_rate", 1.5),
        ("warmup_updates", -1),
        ("warmup_updates", math.nan),
        ("checkpoint_seconds", math.nan),
        ("checkpoint_seconds", -1.0),
        ("minutes", math.inf),
        ("minutes", math.nan),
        ("session_minutes", math.nan),
        ("updates", 2.5),
        ("updates", math.inf),
        ("learning_rate", math.inf),
        ("learning_rate", math.nan),
        ("clip_norm", math.nan),
        ("ema_decay", math.nan),
        ("patience", math.nan),
        ("log_every", 1.5),
        ("seed", -1),
        ("seed", 10**30),
    ],
)
def test_steps_that_mean_nothing_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, got {value}$"):
        TrainConfig(**{name: value})
