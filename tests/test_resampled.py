"""One backward pass for K particles: averaged over the particle that is drawn, the gradient of all K."""

import pytest
import torch
from programs import Discrete, Mixed, rows

from vma_pyro import ConvNetworks, Guide, Memory, Model
from vma_pyro.infer import MultiSampleELBO, OVISMonteCarlo, ResampledELBO, dreg, evaluations_of, resampled, stl

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


def test_every_entry_is_encoded_once(monkeypatch):
    """On the memory model itself: the run without a graph leaves the encoding for the run with one."""
    torch.manual_seed(0)
    networks = ConvNetworks(3, width=0.05)
    calls = []
    encode = networks.encode
    monkeypatch.setattr(networks, "encode", lambda entries: (calls.append(len(entries)), encode(entries))[1])
    memory, x = Memory((torch.rand(5, 1, 28, 28) > 0.8).float()), (torch.rand(2, 1, 28, 28) > 0.8).float()
    ResampledELBO(4, max_plate_nesting=1)(Model(networks), Guide(networks))(memory, x).backward()
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
    with pytest.raises(
        ValueError, match="chunk_size: expected None, as one particle alone keeps its graph, got 2"
    ):
        ResampledELBO(4, chunk_size=2)
    assert ResampledELBO(4).unbiased
    assert not ResampledELBO(4, pathwise=stl).unbiased
    assert ResampledELBO(4).objective == "iwae"
