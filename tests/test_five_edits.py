"""The same program edited five ways, each in a few lines: trained, reported, saved, loaded, shown on the page."""

import inspect

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from torch import nn

from vma_pyro import ContinuousBernoulli, ConvNetworks, Guide, Memory, Model, Part, models
from vma_pyro.data import EpisodeSampler, glyphs
from vma_pyro.demo.app import create_app
from vma_pyro.demo.engine import Engine
from vma_pyro.demo.messages import Generate, Interpolate, Look
from vma_pyro.evaluation import classify, kl_report, log_likelihood
from vma_pyro.infer import make
from vma_pyro.networks import loc_and_scale
from vma_pyro.training import TrainConfig, fit


class MixturePrior(ConvNetworks):
    """p(z | m) is a mixture of two Gaussians of equal weight, on both sides of the one of before."""

    def prior(self, m):
        loc, scale = loc_and_scale(m.prior)
        locs = torch.stack([loc - scale, loc + scale], -2)
        components = dist.Normal(locs, scale.unsqueeze(-2).expand_as(locs)).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(logits=torch.zeros(locs.shape[:-1])), components)


class Flow(Part):
    """A planar flow, as a part that files can name."""

    def __init__(self, latent_dim):
        super().__init__()
        self.planar = T.planar(latent_dim)


class FlowPosterior(ConvNetworks):
    """q(z | x, m) is bent by a flow."""

    def __init__(self, latent_dim, **options):
        super().__init__(latent_dim, **options)
        self.flow = Flow(latent_dim)

    def posterior(self, query, m):
        return dist.TransformedDistribution(super().posterior(query, m), [self.flow.planar])


class TwoPens(Model):
    """A second discrete site: a thick or a thin pen, which adds to all logits or takes from them."""

    def forward(self, memory, x=None, *, num_images=1):
        memory, x, data = self.opened(memory, x, num_images)
        with data:
            m = memory.read(pyro.sample("address", dist.Categorical(logits=self.address_prior(memory))))
            pen = pyro.sample("pen", dist.Bernoulli(torch.tensor(0.5)))
            z = pyro.sample("z", self.networks.prior(m))
            decoded = self.networks.decode(z, m) + (pen - 0.5)[..., None, None, None]
            return pyro.sample("x", self.likelihood(decoded), obs=x)


class TwoPensGuide(Guide):
    """q(pen | x) from the share of ink."""

    def forward(self, memory, x):
        memory, x, data = self.opened(memory, x)
        query = self.networks.query(x)
        with data:
            logits = self.similarity(query.key, memory.features.key)
            m = memory.read(pyro.sample("address", dist.Categorical(logits=logits)))
            pyro.sample("pen", dist.Bernoulli(logits=20 * x.mean((1, 2, 3)) - 3))
            pyro.sample("z", self.networks.posterior(query, m))


class Grey(Model):
    """Values between black and white."""

    def likelihood(self, decoded):
        return ContinuousBernoulli()(decoded)

    def check_values(self, memory, x):
        """Those of a continuous Bernoulli."""


class TwoEntries(Model):
    """Two entries are read, and the mean of what they say is used."""

    def forward(self, memory, x=None, *, num_images=1):
        memory, x, data = self.opened(memory, x, num_images)
        with data:
            prior = dist.Categorical(logits=self.address_prior(memory))
            one, other = (memory.read(pyro.sample(site, prior)) for site in ("address", "second"))
            z = pyro.sample("z", self.networks.prior(one))
            decoded = (self.networks.decode(z, one) + self.networks.decode(z, other)) / 2
            return pyro.sample("x", self.likelihood(decoded), obs=x)


class TwoEntriesGuide(Guide):
    """Both addresses by the same similarity."""

    def forward(self, memory, x):
        memory, x, data = self.opened(memory, x)
        query = self.networks.query(x)
        with data:
            posterior = dist.Categorical(logits=self.similarity(query.key, memory.features.key))
            one, _ = (memory.read(pyro.sample(site, posterior)) for site in ("address", "second"))
            pyro.sample("z", self.networks.posterior(query, one))


EDITS = {
    "mixture prior": (MixturePrior, Model, Guide),
    "flow posterior": (FlowPosterior, Model, Guide),
    "second discrete site": (ConvNetworks, TwoPens, TwoPensGuide),
    "continuous Bernoulli": (ConvNetworks, Grey, Guide),
    "two entries read": (ConvNetworks, TwoEntries, TwoEntriesGuide),
}
OWN = [MixturePrior, Flow, FlowPosterior, TwoPens, TwoPensGuide, Grey, TwoEntries, TwoEntriesGuide]


@pytest.mark.parametrize("kind", OWN)
def test_an_edit_is_short(kind):
    assert len(inspect.getsource(kind).splitlines()) <= 15


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_program_has_everything(name, tmp_path):
    networks_of, model_of, guide_of = EDITS[name]
    torch.manual_seed(0)
    networks = networks_of(3, width=0.1, key_dim=4, hidden_dim=8)
    pair = model_of(networks), guide_of(networks)
    episodes = EpisodeSampler(glyphs.load(classes=6, examples=5), classes=3, shots=2, queries=6, seed=0)
    config = TrainConfig(updates=3, warmup_updates=1, validate_every=3, validation_samples=1)
    before = {n: p.clone() for n, p in models.as_one(pair).named_parameters()}
    elbo = make("vimco", 3)
    assert fit(*pair, elbo, episodes, config=config, folder=tmp_path, show_progress=False).updates == 3
    moved = [n for n, p in models.as_one(pair).named_parameters() if not torch.equal(p, before[n])]
    assert len(moved) > len(before) / 2

    e = episodes.sample()
    report = kl_report(*pair, e.memory, e.x, labels=e.labels, num_samples=4)
    latents = {"address", "z"} | {"second discrete site": {"pen"}, "two entries read": {"second"}}.get(name, set())
    assert set(report.kl) == latents
    assert log_likelihood(*pair, e.memory, e.x, num_samples=3).isfinite().all()
    assert classify(pair[1], e.memory, e.x).shape == (6, 3)

    models.save(tmp_path / "model.pt", pair, data="glyphs", training={})
    again = models.load(tmp_path / "model.pt", program="memory", classes=OWN)
    for mine, theirs in zip(pair, again, strict=True):
        assert type(mine) is type(theirs)
        for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b)

    engine = Engine(*again)
    assert engine.format.bits == (8 if name == "continuous Bernoulli" else 1)
    entries = engine.format.write(e.memory.entries)
    image = engine.format.write(e.x[:1])[0]
    assert sum(engine.look(Look(image=image, entries=entries)).probabilities) == pytest.approx(1.0, abs=1e-4)
    made = engine.generate(Generate(entries=entries, seed=1, count=3))
    assert len(made.images) == len(made.drawn) == len(made.addresses) == 3
    assert len(engine.interpolate(Interpolate(entry=entries[0], steps=4)).images) == 4
    create_app(engine, [], about=name)


def test_reading_twice_the_same_is_reading_once():
    """Of the two programs the same value: what is edited is what is meant."""
    torch.manual_seed(0)
    networks = ConvNetworks(3, width=0.1, key_dim=4, hidden_dim=8)
    memory, x = Memory((torch.rand(4, 1, 28, 28) > 0.8).float()), (torch.rand(2, 1, 28, 28) > 0.8).float()
    held = {"address": torch.tensor([1, 2]), "second": torch.tensor([1, 2]), "z": torch.randn(2, 3)}
    scores = []
    for kind in (Model, TwoEntries):
        model = pyro.poutine.condition(kind(networks), data=held)
        trace = pyro.poutine.trace(model).get_trace(memory, x)
        trace.compute_log_prob()
        scores.append(trace.nodes["x"]["log_prob"])
    torch.testing.assert_close(*scores)
    assert isinstance(networks.stem, nn.Linear)
