"""One backward pass for K particles: averaged over the particle that is drawn, the gradient of all K."""

import contextlib
import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from programs import Discrete, Mixed, rows
from vma_pyro import ConvNetworks, Guide, Memory, Model
from vma_pyro.infer import (
    MultiSampleELBO,
    OVISMonteCarlo,
    ResampledELBO,
    dreg,
    evaluations_of,
    loo,
    reinforce,
    stl,
    vimco,
)
from vma_pyro.infer.estimators import resampled

K = 3


def gradients(elbo, program, args, seed=4):
    """The loss, and one gradient per datapoint for each parameter."""
    torch.manual_seed(seed)
    p = args[0]
    loss = elbo.differentiable_loss(program.model, program.guide, *args)
    found = torch.autograd.grad(loss, list(p.values()), allow_unused=True)
    return loss.item(), [torch.zeros_like(v) if g is None else g for v, g in zip(p.values(), found, strict=True)]


def check_mean_over_the_drawn_particle(program, args, monkeypatch, **options):
    """The same draws, every particle in turn, weighted with its probability: equal to 1e-12."""
    count = len(args[1])
    want_loss, want = gradients(MultiSampleELBO(K, max_plate_nesting=1, **options), program, args)
    total = [torch.zeros_like(g) for g in want]
    for k in range(K * options.get("draws_per_score", 1)):
        probability = []

        def this_one(weights, k=k, probability=probability):
            probability.append((weights / weights.sum(0))[k])
            return torch.full((count,), k)

        monkeypatch.setattr(resampled, "resample", this_one)
        loss, got = gradients(ResampledELBO(K, max_plate_nesting=1, **options), program, args)
        assert loss == pytest.approx(want_loss, abs=1e-10)
        for sum_, g in zip(total, got, strict=True):
            sum_ += probability[0].reshape(-1, *(1 for _ in g.shape[1:])) * g
    for got, expected in zip(total, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"vectorize_particles": False},
        {"draws_per_score": 2},
        {"noise": "common"},
        {"baseline": OVISMonteCarlo(1)},
        {"pathwise": dreg},
        {"pathwise": stl},
        {"pathwise": dreg, "vectorize_particles": False},
    ],
)
def test_the_mean_over_the_drawn_particle_is_the_full_gradient(options, monkeypatch):
    program, count = Mixed(), 7
    args = rows(program.values, count), program.x.expand(count).clone()
    check_mean_over_the_drawn_particle(program, args, monkeypatch, **options)


@pytest.mark.parametrize("options", [{}, {"vectorize_particles": False}])
def test_two_sites_masks_scales_and_subsampling(options, monkeypatch):
    program, kinds = Discrete(), torch.tensor([0, 1, 2, 0])
    check_mean_over_the_drawn_particle(program, (rows(program.values, 4), kinds), monkeypatch, **options)


class Plates:
    """Programs with shared parameters: plates inside or beside the batch plates, event dimensions, subsampling."""

    def __init__(self, kind):
        self.kind = kind
        names = {"m": (3,), "q": (2, 3), "loc": (3, 2), "s": ()}
        generator = torch.Generator().manual_seed(1)
        self.p = {
            n: torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
            for n, shape in names.items()
        }
        self.batch_plates = ("rows", "columns") if kind == "two batch plates" else ("data",)

    @contextlib.contextmanager
    def plates(self):
        if self.kind == "two batch plates":
            with pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 1, dim=-1):
                yield
        elif self.kind == "subsampled":
            with pyro.plate("data", 5, subsample_size=2, dim=-1):
                yield
        else:
            with pyro.plate("data", 2, dim=-2 if self.kind == "inner plate" else -1):
                yield

    def inner(self):
        return pyro.plate("pixels", 4, dim=-1) if self.kind == "inner plate" else contextlib.nullcontext()

    def model(self):
        p = self.p
        with self.plates():
            a = pyro.sample("a", dist.Categorical(logits=p["m"]))
            b = pyro.sample("b", dist.Bernoulli(0.3))
            with self.inner():
                z = pyro.sample("z", dist.Normal(p["loc"][a] * (1 + b[..., None]), 1.0).to_event(1))
                x = torch.tensor([0.3, -0.2], dtype=torch.float64)
                pyro.sample("x", dist.Normal(z * p["s"].exp(), 1.0).to_event(1), obs=x)

    def guide(self):
        p = self.p
        with self.plates():
            a = pyro.sample("a", dist.Categorical(logits=p["q"][0]), infer={"estimator": loo})
            pyro.sample("b", dist.Bernoulli(logits=p["q"][1, 0]))
            with self.inner():
                pyro.sample("z", dist.Normal(0.5 * p["loc"][a], (0.3 * p["s"]).exp()).to_event(1))


@pytest.mark.parametrize("num_particles", [1, 2])
@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("kind", ["plain", "inner plate", "two batch plates", "subsampled"])
def test_any_plates(kind, vectorize, num_particles, monkeypatch):
    """Over all pairs of particles that the two datapoints may draw; two sites, one with a baseline of its own."""
    baseline = reinforce if num_particles == 1 else vimco
    program = Plates(kind)
    if num_particles == 1:
        program.guide = poutine.infer_config(program.guide, lambda site: {"estimator": None})

    def gradient(build):
        torch.manual_seed(3)
        elbo = build(
            num_particles, baseline=baseline, batch_plates=program.batch_plates, vectorize_particles=vectorize
        )
        loss = elbo.differentiable_loss(program.model, program.guide)
        return torch.autograd.grad(loss, list(program.p.values()))

    want = gradient(MultiSampleELBO)
    total = [torch.zeros_like(g) for g in want]
    for pair in itertools.product(range(num_particles), repeat=2):
        seen = []

        def these(weights, pair=pair, seen=seen):
            seen.append((weights / weights.sum(0))[list(pair), [0, 1]].prod())
            return torch.tensor(pair)

        monkeypatch.setattr(resampled, "resample", these)
        for sum_, g in zip(total, gradient(ResampledELBO), strict=True):
            sum_ += seen[0] * g
    for got, expected in zip(total, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_a_value_that_a_handler_gave_to_all_particles():
    """[B] for K particles: its plates are those of the distribution."""
    program = Discrete(two_sites=False)
    kinds = torch.tensor([0, 0, 1])
    guide = program.replayed_guide(torch.tensor([1, 2, 3]))
    loss = ResampledELBO(K, max_plate_nesting=1).differentiable_loss(
        program.model, guide, rows(program.values, 3), kinds
    )
    loss.backward()
    assert loss.isfinite()


def test_datapoints_that_the_model_calls_impossible_learn_nothing():
    logits = torch.zeros(2, requires_grad=True)

    def model(x):
        with pyro.plate("data", 3):
            a = pyro.sample("a", dist.Bernoulli(0.5))
            pyro.factor("f", torch.where(x > 0, 0.0 * a, -math.inf))

    def guide(x):
        with pyro.plate("data", 3):
            pyro.sample("a", dist.Bernoulli(logits=logits[0]))

    loss = ResampledELBO(K, max_plate_nesting=1).differentiable_loss(model, guide, torch.tensor([1.0, -1.0, 1.0]))
    loss.backward()
    assert loss == math.inf
    assert logits.grad.isfinite().all()


def test_all_parameters_learn_under_autocast():
    """Autocast must not hand the weights that it cast without a graph to the run with one."""
    torch.manual_seed(0)
    networks = ConvNetworks(3, width=0.05)
    memory, x = Memory((torch.rand(5, 1, 28, 28) > 0.8).float()), (torch.rand(2, 1, 28, 28) > 0.8).float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = ResampledELBO(4, max_plate_nesting=1)(Model(networks), Guide(networks))(memory, x)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in networks.parameters())


def test_every_entry_is_encoded_once(monkeypatch):
    """On the memory model itself: the run without a graph leaves the encoding for the run with one."""
    torch.manual_seed(0)
    networks = ConvNetworks(3, width=0.05)
    calls = []
    encode = networks.encode
    monkeypatch.setattr(networks, "encode", lambda entries: (calls.append(len(entries)), encode(entries))[1])
    memory, x = Memory((torch.rand(5, 1, 28, 28) > 0.8).float()), (torch.rand(2, 1, 28, 28) > 0.8).float()
    loss_fn = ResampledELBO(4, max_plate_nesting=1)(Model(networks), Guide(networks))
    loss_fn(memory, x)  # the first call of two programs has a look at them
    calls.clear()
    loss_fn(Memory(memory.entries), x).backward()
    assert calls == [5]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in networks.parameters())


def test_particles_are_drawn_by_their_weight():
    torch.manual_seed(0)
    weights = torch.tensor([[0.1, 1.0], [0.2, 0.0], [0.7, 0.0]]).repeat_interleave(20_000, 1)
    k = resampled.resample(weights)
    share = torch.bincount(k[:20_000], minlength=3) / 20_000
    torch.testing.assert_close(share, torch.tensor([0.1, 0.2, 0.7]), atol=0.015, rtol=0)
    assert (k[20_000:] == 0).all()


def test_it_costs_a_third_of_a_run_per_particle_and_one_more():
    program, count = Mixed(), 4
    args = rows(program.values, count), program.x.expand(count).clone()
    elbo = ResampledELBO(6, max_plate_nesting=1)
    assert evaluations_of(elbo, program.model, program.guide, args) == pytest.approx(6 / 3 + 1)


def test_options():
    with pytest.raises(TypeError, match="chunk_size"):
        ResampledELBO(4, chunk_size=2)
    assert ResampledELBO(4).unbiased
    assert not ResampledELBO(4, pathwise=stl).unbiased
    assert ResampledELBO(4).objective == "iwae"
