"""Likelihoods whose pixels see their neighbours: sums to one, looks back only, draws what it scores."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from torch import nn

from vma_pyro import (
    BernoulliPixels,
    CausalBernoulli,
    ContinuousBernoulli,
    ConvNetworks,
    DiscretizedLogistics,
    Guide,
    Memory,
    MLPNetworks,
    Model,
    models,
)
from vma_pyro.comparisons import MemorylessGuide, MemorylessModel, SoftAttentionGuide, SoftAttentionModel
from vma_pyro.evaluation import kl_report, log_likelihood
from vma_pyro.infer import MultiSampleELBO, make
from vma_pyro.likelihoods import Causal, CausalLogistics, bits_per_dim
from vma_pyro.likelihoods.causal import once
from vma_pyro.likelihoods.logistics import PACE, START
from vma_pyro.training.captured import Captured
from vma_pyro.training.start import start_from

KINDS = {
    "causal": lambda: CausalBernoulli(radius=1, hidden=5, layers=1),
    "wide": lambda: CausalBernoulli(radius=3, hidden=4, layers=2),
    "two levels": lambda: DiscretizedLogistics(2, levels=2),
    "passes": lambda: CausalBernoulli(radius=1, hidden=4, layers=1, steps=(1, 2)),
    "causal, two levels": lambda: CausalLogistics(2, levels=2, radius=2, hidden=4, layers=0),
    "three levels": lambda: DiscretizedLogistics(3, levels=3),
    "colours": lambda: DiscretizedLogistics(2, levels=2),
    "causal colours": lambda: CausalLogistics(2, levels=2, colours=3, radius=1, hidden=4, layers=1),
    "passes, causal colours": lambda: CausalLogistics(1, levels=2, colours=3, radius=1, hidden=3, steps=[1]),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def colours_of(kind):
    return 3 if "colours" in kind else 1


def levels_of(kind):
    return 3 if kind == "three levels" else 2


def stirred(module, seed=0):
    """All its parameters are random: what starts at zero would hide a fault."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def distribution(kind, height, width, batch=(2,)):
    likelihood, colours = stirred(KINDS[kind]()), colours_of(kind)
    generator = torch.Generator().manual_seed(1)
    shape = (*batch, likelihood.channels * colours + likelihood.maps(colours), height, width)
    return likelihood(torch.randn(shape, generator=generator, dtype=torch.float64))


def all_images(kind, height, width):
    """Every image there is, [number, 1, C, height, width]."""
    size = colours_of(kind) * height * width
    levels = torch.arange(levels_of(kind), dtype=torch.float64) / (levels_of(kind) - 1)
    return torch.tensor(list(itertools.product(levels.tolist(), repeat=size)), dtype=torch.float64).reshape(
        -1, 1, colours_of(kind), height, width
    )


@every_kind
def test_the_probabilities_of_all_images_sum_to_one(kind):
    """512 images of 3x3; three levels and colours have fewer pixels."""
    height, width = (
        (2, 2) if "causal colours" in kind else {"three levels": (2, 3), "colours": (1, 3)}.get(kind, (3, 3))
    )
    total = distribution(kind, height, width).log_prob(all_images(kind, height, width)).exp().sum(0)
    torch.testing.assert_close(total, torch.ones(2, dtype=torch.float64))


@every_kind
def test_draws_are_as_frequent_as_they_are_probable(kind):
    """20,000 draws of 2x3 images (of two pixels in colour); |z| < 5 for each of at most 729 images."""
    height, width = (1, 2) if "colours" in kind else (2, 3)
    fn, images = distribution(kind, height, width, batch=(1,)), all_images(kind, height, width)
    torch.manual_seed(0)
    draws = fn.sample((20_000,)).flatten(1)
    same = (draws[:, None] - images.flatten(1)).abs().amax(-1) < 1e-6
    assert bool((same.sum(1) == 1).all())
    share, expected = same.double().mean(0), fn.log_prob(images).exp()[:, 0]
    z = (share - expected) / (expected * (1 - expected) / 20_000).sqrt().clamp_min(1e-3)
    assert z.abs().max() < 5
    torch.testing.assert_close(
        fn.mean[0].flatten(), (expected[:, None] * images.flatten(1)).sum(0), atol=0.3, rtol=0
    )


@pytest.mark.parametrize("kind", ["causal", "wide", "causal, two levels", "causal colours"])
def test_a_pixel_sees_what_is_drawn_before_it_within_its_radius_and_nothing_else(kind):
    likelihood, colours = stirred(KINDS[kind]()), colours_of(kind)
    near, height, width = likelihood.neighbourhood, 6, 7
    x = torch.rand(1, colours, height, width, dtype=torch.float64, requires_grad=True)
    maps = torch.randn(1, near.hidden, height, width, dtype=torch.float64) + 3.0  # no unit is silent
    numbers = near(x, maps)
    for i, j in itertools.product(range(height), range(width)):
        (slope,) = torch.autograd.grad(numbers[0, :, i, j].sum(), x, retain_graph=True)
        seen = {(r, c) for r, c in torch.nonzero(slope[0].abs().sum(0)).tolist()}
        r = near.radius
        allowed = {
            (a, b)
            for a, b in itertools.product(range(height), range(width))
            if (a < i or (a == i and b < j)) and i - a <= r and abs(j - b) <= r
        }
        assert seen <= allowed
        if kind in ("causal", "causal colours"):
            assert seen == allowed


def test_the_neighbourhood_of_one_pixel_is_that_of_all_at_once():
    likelihood = stirred(CausalBernoulli(radius=2, hidden=4))
    near, x = likelihood.neighbourhood, (torch.rand(3, 1, 4, 5) > 0.5).double()
    maps = torch.randn(3, 4, 4, 5, dtype=torch.float64)
    drawing, one = near.drawing(3, (1, 4, 5), maps), []
    for i, j in itertools.product(range(4), range(5)):
        one.append(drawing.numbers(i, j, maps[:, :, i, j]))
        drawing.draw(i, j, x[:, :, i, j])
    torch.testing.assert_close(torch.stack(one, -1).reshape(3, 1, 4, 5), near(x, maps))
    assert torch.equal(drawing.images, x)


def test_steps_pass_on_what_pixels_know_and_nothing_of_what_is_drawn_later():
    """Row by row: each pair passes on what is known at most `step` rows above and columns beside it."""
    likelihood = stirred(CausalBernoulli(radius=1, hidden=4, steps=(1, 3)))
    near, height, width = likelihood.neighbourhood, 6, 11
    x = torch.rand(1, 1, height, width, dtype=torch.float64, requires_grad=True)
    maps = torch.randn(1, near.hidden, height, width, dtype=torch.float64) + 3.0
    numbers, furthest = near(x, maps), 0
    for i, j in itertools.product(range(height), range(width)):
        (slope,) = torch.autograd.grad(numbers[0, :, i, j].sum(), x, retain_graph=True)
        seen = {(r, c) for r, c in torch.nonzero(slope[0, 0]).tolist()}
        assert all(r < i or (r == i and c < j) for r, c in seen)
        assert all(i - r <= 5 and abs(j - c) <= 5 for r, c in seen)
        furthest = max([furthest, *(i - r for r, _ in seen)])
    assert furthest == 5


@every_kind
def test_shapes_broadcast_as_one_by_one(kind):
    """Three particles of two images, with x for all particles or for each; also expanded."""
    fn, colours = distribution(kind, 2, 3, batch=(3, 2)), colours_of(kind)
    for lead in ((2,), (3, 2), (4, 3, 2)):
        x = torch.rand(*lead, colours, 2, 3, dtype=torch.float64).round()
        found = fn.log_prob(x)
        whole = x.expand(*found.shape, *x.shape[-3:])
        for index in itertools.product(*map(range, found.shape)):
            single = KINDS[kind]
            likelihood = stirred(single())
            alone = likelihood(fn.decoded[index[-2:]]).log_prob(whole[index])
            torch.testing.assert_close(found[index], alone)
    wide = fn.expand((5, 3, 2))
    assert wide.batch_shape == (5, 3, 2)
    assert wide.sample().shape == (5, 3, 2, colours, 2, 3)
    torch.testing.assert_close(wide.log_prob(x[0]), fn.log_prob(x[0]).expand(5, 3, 2))
    with pytest.raises(ValueError, match=r"^x: expected images \[., 2, 3\], got values of shape"):
        fn.log_prob(torch.zeros(2, colours, 3, 3))


def test_copies_of_an_image_are_looked_at_once():
    x = torch.zeros(2, 1, 3, 3)
    assert once(x.expand(5, 4, 2, 1, 3, 3)).shape == (1, 1, 2, 1, 3, 3)
    assert once(x) is x


PROGRAMS = {
    "memory": (Model, Guide),
    "memoryless": (MemorylessModel, MemorylessGuide),
    "soft": (SoftAttentionModel, SoftAttentionGuide),
}


def pair(program="memory", likelihood=None, networks=None):
    torch.manual_seed(0)
    networks = networks or ConvNetworks(3, width=0.1, key_dim=4, hidden_dim=8, image_shape=(1, 8, 9))
    model, guide = PROGRAMS[program]
    model = model(networks, likelihood=likelihood or CausalBernoulli(radius=2, hidden=6))
    with torch.no_grad():
        model.likelihood.neighbourhood.to_outputs.weight.normal_()
    return model, guide(networks)


def binary(*lead):
    return (torch.rand(*lead, 1, 8, 9) > 0.7).float()


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_trains_and_every_parameter_has_a_gradient(program):
    model, guide = pair(program)
    MultiSampleELBO(3)(model, guide)(Memory(binary(4)), binary(5)).backward()
    missing = [name for name, p in models.as_one((model, guide)).named_parameters() if p.grad is None]
    unused = {"memory": (), "memoryless": ("to_key",), "soft": ("to_prior",)}[program]
    assert all(any(part in name for part in unused) for name in missing)


def test_the_exact_address_is_the_sum_over_all():
    """Of a model whose z has no say: log p(x | M) = log mean_a p(x | m_a)."""
    model, guide = pair()
    nn.init.zeros_(model.networks.stem.weight)
    memory, x = Memory(binary(4)), binary(3)
    found = log_likelihood(model, guide, memory, x, num_samples=400, address="exact")
    with torch.no_grad():
        each = []
        for a in range(4):
            trace = poutine.trace(poutine.condition(model, data={"address": torch.full((3,), a)})).get_trace(
                memory, x
            )
            trace.compute_log_prob()
            each.append(trace.nodes["x"]["log_prob"])
    expected = torch.stack(each).logsumexp(0) - math.log(4)
    torch.testing.assert_close(found.float(), expected, atol=0.5, rtol=0)


def test_predictive_replay_and_records():
    model, guide = pair()
    memory, x = Memory(binary(4)), binary(3)
    made = Predictive(model, guide=guide, num_samples=3)(memory, x)
    assert made["z"].shape[0] == 3
    assert Predictive(model, num_samples=2, parallel=True)(memory, num_images=3)["x"].shape == (2, 3, 1, 8, 9)
    trace = poutine.trace(guide).get_trace(memory, x)
    assert poutine.trace(poutine.replay(model, trace=trace)).get_trace(memory, x).log_prob_sum().isfinite()
    report = kl_report(model, guide, memory, x, num_samples=4)
    assert report.nll.mean == pytest.approx(
        report.reconstruction.mean + report.kl_address.mean + report.kl_z.mean, abs=5 * report.nll.se + 5
    )
    for alone in (0.0, 0.5):
        model.likelihood.alone = alone
        torch.manual_seed(0)
        loss_fn = MultiSampleELBO(2, max_plate_nesting=1)(model, guide)
        captured = Captured(loss_fn, wait=0)
        for _ in range(3):
            captured.gradient(memory, x)
        assert captured.replays == 3


def test_saved_and_made_again(tmp_path):
    model, guide = pair(likelihood=CausalBernoulli(radius=2, hidden=6, layers=1, steps=(1, 2), alone=0.25))
    models.save(tmp_path / "model.pt", (model, guide))
    again, _ = models.load(tmp_path / "model.pt")
    assert (again.likelihood.alone, again.likelihood.neighbourhood.radius) == (0.25, 2)
    memory, x, z = Memory(binary(2)), binary(3), torch.randn(3, 3)
    scored = []
    for m in (model, again):
        held = poutine.condition(m.eval(), data={"address": torch.zeros(3).long(), "z": z})
        scored.append(poutine.trace(held).get_trace(memory, x).log_prob_sum())
    assert scored[0] == scored[1]
    assert models.likelihood_of(again) == "causal"
    facts = models.facts_of(tmp_path / "model.pt")
    assert (facts["likelihood"], tuple(facts["context_steps"])) == ("causal", (1, 2))


def test_trained_weights_go_on_with_a_neighbourhood_as_they_were(tmp_path):
    networks = ConvNetworks(3, width=0.1, key_dim=4, hidden_dim=8)
    models.save(tmp_path / "model.pt", (Model(networks), Guide(networks)))
    more = models.build(
        {"networks": "conv", "latent_dim": 3, "width": 0.1, "key_dim": 4, "hidden_dim": 8, "program": "memory"}
        | {"likelihood": "causal", "context_alone": 0.1, "context_steps": (1,)}
    )
    start_from(tmp_path / "model.pt", more)
    memory, x = Memory((torch.rand(4, 1, 28, 28) > 0.8).float()), (torch.rand(3, 1, 28, 28) > 0.8).float()
    bounds = []
    for programs in (models.load(tmp_path / "model.pt"), more):
        bounds.append(log_likelihood(*programs, memory, x, num_samples=3))
    torch.testing.assert_close(*bounds)


def test_a_weight_of_the_pixels_alone_counts_in_training_only():
    likelihood = stirred(CausalBernoulli(radius=2, hidden=6, alone=0.3))
    decoded = torch.randn(2, 5, 7, 3, 3, dtype=torch.float64)
    x = torch.rand(5, 1, 3, 3, dtype=torch.float64).round()
    seen, alone = likelihood(decoded).log_prob(x), BernoulliPixels()(decoded[:, :, :1]).log_prob(x)
    assert (seen - alone).abs().min() > 1e-3
    torch.testing.assert_close(likelihood.train()(decoded).log_prob(x), 0.7 * seen + 0.3 * alone)
    torch.testing.assert_close(likelihood.eval()(decoded).log_prob(x), seen)


@pytest.mark.parametrize("name", ["vimco+chunks", "vimco+resampled"])
def test_estimators_that_run_the_model_twice_see_one_objective(name):
    """The same loss as the plain estimator's for the same draws, whatever weight the pixels alone have."""
    torch.manual_seed(0)
    model, guide = pair(likelihood=CausalBernoulli(radius=2, hidden=6, alone=0.5))
    memory, x = Memory(binary(4)), binary(3)
    found = {}
    for kind in ("vimco", name):
        losses = []
        for seed in range(60):
            torch.manual_seed(seed)
            losses.append(make(kind, 4)(model, guide)(memory, x).item())
        losses = torch.tensor(losses)
        found[kind] = losses.mean(), losses.std() / 60**0.5
    (one, se), (other, other_se) = found.values()
    assert abs(one - other) < 5 * (se**2 + other_se**2) ** 0.5


def test_a_guide_that_was_made_before_the_model_is_saved_and_loaded(tmp_path):
    """The model completes networks that the guide has had for a while."""
    networks = ConvNetworks(3, width=0.1, key_dim=4, hidden_dim=8, image_shape=(1, 8, 8))
    guide = Guide(networks)
    model = Model(networks, likelihood=CausalBernoulli(hidden=4))
    models.save(tmp_path / "model.pt", (model, guide))
    again, other = models.load(tmp_path / "model.pt")
    assert again.networks is other.networks
    assert again.networks.maps == 4


def test_the_decoder_gives_what_the_likelihood_wants():
    for build in (
        lambda **o: ConvNetworks(3, width=0.1, **o),
        lambda **o: MLPNetworks(3, hidden_dims=(8, 7), **o),
    ):
        networks = build()
        Model(networks, likelihood=CausalBernoulli(hidden=6))
        assert (networks.channels, networks.maps, networks.output_shape) == (1, 6, (7, 28, 28))
        with pytest.raises(
            ValueError, match=r"^networks: expected a decoder with maps=0, .* BernoulliPixels wants, got 6"
        ):
            Model(networks)
        with pytest.raises(
            ValueError, match="^networks: expected a decoder with maps=6, as many as CausalBernoulli"
        ):
            Model(build(channels=1), likelihood=CausalBernoulli(hidden=6))
    assert (
        Model(ConvNetworks(3, width=0.1, image_shape=(3, 9, 8)), likelihood=DiscretizedLogistics(2)).networks.maps
        == 20
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CausalBernoulli(radius=0), "radius: expected at least 1, got 0"),
        (lambda: CausalBernoulli(steps=(1, 0)), "steps: expected at least 1, got 0"),
        (lambda: CausalBernoulli(layers=-1), "layers: expected at least 0, got -1"),
        (lambda: CausalBernoulli(alone=1.0), "alone: expected a weight from 0 to below 1, got 1.0"),
        (lambda: DiscretizedLogistics(0), "mixtures: expected at least 1, got 0"),
        (lambda: DiscretizedLogistics(2.0), "mixtures: expected .*, got .*"),
        (lambda: Causal(CausalBernoulli()), "pixels: expected a Likelihood of pixels that are independent .*"),
        (lambda: Causal(BernoulliPixels), "pixels: expected a Likelihood .*, got BernoulliPixels"),
        (lambda: CausalBernoulli(radius=2.5), "radius: expected .*, got .*"),
        (
            lambda: Model(ConvNetworks(3, image_shape=(3, 8, 8)), likelihood=CausalLogistics(2)),
            r"likelihood: expected CausalLogistics\(colours=3\) for images of 3 colours, got colours=1",
        ),
        (
            lambda: CausalBernoulli(hidden=6)(torch.zeros(1, 1, 4, 4)),  # of networks with a decoder of one's own
            "decoded: expected 7 channels for CausalBernoulli, 6 maps among them, got 1",
        ),
        (
            lambda: DiscretizedLogistics(2)(torch.zeros(1, 8, 4, 4)),
            "decoded: expected 7 channels for grey or 23 .*",
        ),
    ],
)
def test_sizes_that_mean_nothing_are_refused(make, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        make()


def test_images_that_are_no_levels_are_refused():
    model = Model(ConvNetworks(3, width=0.1, image_shape=(1, 8, 8)), likelihood=DiscretizedLogistics(2))
    with pytest.raises(
        ValueError, match="^memory.entries: expected 256 levels, multiples of 1 / 255, got values up to"
    ):
        model(Memory(torch.full((2, 1, 8, 8), 0.3)))
    bytes_ = torch.randint(256, (2, 1, 8, 8)).float() / 255
    assert model(Memory(bytes_), bytes_).shape == (2, 1, 8, 8)
    with pytest.raises(ValueError, match="^x: expected values from 0 to 1, got values from"):
        model(Memory(bytes_), 2 + bytes_)


def test_one_component_is_the_logistic_by_hand():
    """Also at the outermost levels, and far away from the mean, where a difference of sigmoids is 0."""
    decoded = torch.zeros(1, 4, 1, 1, dtype=torch.float64)
    decoded[0, 3] = (math.log(0.02) - START) / PACE
    levels = torch.arange(256, dtype=torch.float64)[:, None, None, None] / 255
    found = DiscretizedLogistics(1)(decoded).log_prob(levels[:, None])[:, 0]
    logistic = torch.distributions.TransformedDistribution(
        dist.Uniform(torch.zeros((), dtype=torch.float64), 1.0),
        [torch.distributions.SigmoidTransform().inv, torch.distributions.AffineTransform(0.0, 0.02)],
    )
    x = 2 * levels.flatten() - 1
    middle = (x.abs() < 0.6).nonzero()[:, 0]
    edges = logistic.cdf(x[middle] + 1 / 255) - logistic.cdf(x[middle] - 1 / 255)
    torch.testing.assert_close(found[middle], edges.log(), rtol=1e-3, atol=1e-3)
    assert found.exp().sum().item() == pytest.approx(1.0)
    assert bool((found.diff()[1:127] > 0).all())
    assert found[1] < -45


def test_bits_per_dim():
    """The uniform distribution over 256 levels costs 8 bits for every number."""
    assert bits_per_dim(3 * 32 * 32 * math.log(256), (3, 32, 32)) == pytest.approx(8.0)


def test_a_causal_likelihood_of_ones_own():
    model = Model(
        ConvNetworks(3, width=0.1, image_shape=(1, 8, 8)),
        likelihood=Causal(ContinuousBernoulli(), radius=1, hidden=4),
    )
    images = torch.rand(2, 1, 8, 8)
    assert poutine.trace(model).get_trace(Memory(images), images).log_prob_sum().isfinite()
    assert model(Memory(images), num_images=3).unique().numel() > 50


@pytest.mark.parametrize("validate", [True, False])
def test_pyros_validation_takes_them(validate):
    with pyro.validation_enabled(validate):
        model, guide = pair()
        assert MultiSampleELBO(2)(model, guide)(Memory(binary(4)), binary(3)).isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_images_are_drawn_in_any_type(dtype):
    networks = ConvNetworks(3, width=0.1, key_dim=4, hidden_dim=8, image_shape=(1, 8, 8))
    model = Model(networks, likelihood=CausalBernoulli(hidden=4, steps=(1, 2))).to(dtype)
    drawn = model(Memory(binary(2)[..., :8].to(dtype)), num_images=3)
    assert drawn.shape == (3, 1, 8, 8)
    assert set(drawn.unique().tolist()) <= {0.0, 1.0}
    likelihood = CausalBernoulli(hidden=4, steps=(1,))
    fn = likelihood(torch.randn(2, 5, 4, 4, dtype=torch.float64))  # networks in 64 bits, the likelihood in 32
    assert fn.log_prob(fn.sample()).isfinite().all()


def test_steps_that_are_no_list_are_refused():
    with pytest.raises(ValueError, match="^steps: expected numbers of pixels, one for each pass, got 3$"):
        CausalBernoulli(steps=3)
