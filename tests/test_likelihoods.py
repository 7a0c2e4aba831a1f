"""Likelihoods are parts: what they score, what they refuse, how many channels they want, and who says so."""

import copy
import math

import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from torch import nn

from programs import FLOAT
from vma_pyro import (
    BernoulliPixels,
    CausalLogistics,
    ContinuousBernoulli,
    ConvNetworks,
    DiscretizedLogistics,
    Guide,
    Likelihood,
    Memory,
    MLPNetworks,
    Model,
)
from vma_pyro.comparisons import MemorylessGuide, MemorylessModel, SoftAttentionGuide, SoftAttentionModel
from vma_pyro.evaluation import kl_report, log_likelihood
from vma_pyro.infer import MultiSampleELBO
from vma_pyro.likelihoods import StableContinuousBernoulli
from vma_pyro.program import ImageModel
from vma_pyro.training.captured import Captured

B, S = 3, 5
PROGRAMS = {
    "memory": (Model, Guide),
    "memoryless": (MemorylessModel, MemorylessGuide),
    "soft": (SoftAttentionModel, SoftAttentionGuide),
}
every_program = pytest.mark.parametrize("program", PROGRAMS)


def mlp(**options):
    return MLPNetworks(3, hidden_dims=(8, 7), key_dim=5, **options)


def pair(program="memory", networks=None, **options):
    networks = networks or mlp()
    model, guide = PROGRAMS[program]
    return model(networks, **options), guide(networks)


def grey(*shape):
    return torch.rand(*shape, 1, 28, 28)


class MixedGaussian(Likelihood):
    """Two numbers per pixel: location and log scale; and a part that learns."""

    channels = 2

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, decoded):
        loc, log_scale = decoded.chunk(2, -3)
        return dist.Normal(loc.sigmoid(), (log_scale + self.shift).exp()).to_event(3)


def test_bernoulli_pixels_are_minus_the_cross_entropy(random_images):
    decoded, x = torch.randn(B, 1, 28, 28), random_images(B)
    expected = -F.binary_cross_entropy_with_logits(decoded, x, reduction="none").sum((1, 2, 3))
    torch.testing.assert_close(BernoulliPixels()(decoded).log_prob(x), expected)


def test_the_continuous_bernoulli_is_a_density():
    """log C = log(2 artanh(1 - 2 p) / (1 - 2 p)), and the integral over one pixel is 1."""
    decoded, x = torch.randn(B, 1, 28, 28), grey(B)
    p = decoded.sigmoid()
    log_constant = (2 * torch.atanh(1 - 2 * p) / (1 - 2 * p)).log()
    cross_entropy = F.binary_cross_entropy_with_logits(decoded, x, reduction="none")
    expected = (log_constant - cross_entropy).sum((1, 2, 3))
    torch.testing.assert_close(ContinuousBernoulli()(decoded).log_prob(x), expected, rtol=1e-4, atol=1e-3)
    steps = torch.linspace(0, 1, 1001, dtype=torch.float64).reshape(-1, 1, 1, 1)
    density = ContinuousBernoulli()(torch.full((1, 1, 1, 1), 1.7, dtype=torch.float64)).log_prob(steps).exp()
    assert torch.trapezoid(density, dx=1e-3).item() == pytest.approx(1.0, abs=1e-6)


@every_program
def test_grey_images_in_every_program(program):
    model, guide = pair(program, likelihood=ContinuousBernoulli())
    memory, x = Memory(grey(S)), grey(B)
    loss = MultiSampleELBO(2)(model, guide)(memory, x)
    loss.backward()
    assert math.isfinite(loss.item())
    made = model(memory, num_images=2)
    assert made.shape == (2, 1, 28, 28)
    assert 0 <= made.min() <= made.max() <= 1
    assert made.unique().numel() > 100


@pytest.mark.parametrize(
    ("likelihood", "change", "message"),
    [
        (BernoulliPixels, 0.5, "expected binary values 0 and 1, got values from 0 to 0.5"),
        (BernoulliPixels, 255, "expected binary values 0 and 1, got values from 0 to 255"),
        (ContinuousBernoulli, 2, "expected values from 0 to 1, got values from 0 to 2"),
        (ContinuousBernoulli, -1, "expected values from 0 to 1, got values from -1 to -?0"),
    ],
)
@every_program
def test_images_that_cannot_be_scored_are_refused(program, likelihood, change, message, random_images):
    model, _ = pair(program, likelihood=likelihood())
    entries, x = random_images(S), random_images(B)
    with pytest.raises(ValueError, match=f"^x: {message}$"):
        model(Memory(entries, learned=True) if change != 255 else Memory(255 * entries, learned=True), change * x)
    if program != "memoryless":
        with pytest.raises(ValueError, match=f"^memory.entries: {message}(;|$)"):
            model(Memory(change * entries), num_images=2)


def test_a_memory_is_looked_at_once_by_each_kind(random_images):
    seen = []

    class Up(Likelihood):
        def __init__(self, top):
            super().__init__()
            self.top = top

        def forward(self, decoded):
            return dist.Normal(decoded, 1.0).to_event(3)

        def check(self, name, images):
            seen.append((self.top, name))
            if images.max() > self.top:
                raise ValueError(f"{name}: expected at most {self.top}")

    memory, networks = Memory(random_images(S)), mlp()
    for top in (1.0, 2.0, 1.0):
        model = Model(networks, likelihood=Up(top))
        model(memory)
        copy.deepcopy(model)(memory)
    assert seen == [(1.0, "memory.entries"), (2.0, "memory.entries")]
    with pytest.raises(ValueError, match=r"^memory.entries: expected at most 0.5$"):
        Model(networks, likelihood=Up(0.5))(memory)


@pytest.mark.parametrize("networks", [ConvNetworks, MLPNetworks])
@every_program
def test_channels_of_the_decoder(networks, program):
    options = {"width": 0.1} if networks is ConvNetworks else {"copies": True}
    shared = networks(3, key_dim=5, channels=2, **options)
    model, guide = pair(program, shared, likelihood=MixedGaussian())
    memory, x = Memory(grey(S)), grey(B)
    trace = poutine.trace(model).get_trace(memory, x)
    assert trace.nodes["x"]["fn"].event_shape == (1, 28, 28)
    MultiSampleELBO(2)(model, guide)(memory, x).backward()
    assert model.likelihood.shift.grad != 0
    assert log_likelihood(model, guide, memory, x, num_samples=2).isfinite().all()


def test_colours(random_images):
    """Three colours, two numbers for each: the first three channels are the logits of the mean."""
    networks = mlp(image_shape=(3, 4, 4), channels=2, copies=True)
    m = networks.heads(networks.encode(torch.ones(1, 3, 4, 4)))
    with torch.no_grad():
        networks.log_copy.fill_(-math.inf)
        without = networks.decode(torch.zeros(2, 3), m)
        networks.log_copy.fill_(0.0)
        copied = networks.decode(torch.zeros(2, 3), m) - without
    assert copied.shape == (2, 6, 4, 4)
    torch.testing.assert_close(copied[:, :3], torch.ones(2, 3, 4, 4))
    assert copied[:, 3:].abs().max() == 0
    model = Model(networks, likelihood=MixedGaussian())
    assert model(Memory(torch.rand(S, 3, 4, 4)), num_images=2).shape == (2, 3, 4, 4)


def test_the_refinement_looks_at_the_mean():
    torch.manual_seed(0)
    networks = ConvNetworks(3, width=0.1, channels=2, refinement=2)
    seen = []
    networks.refinement.register_forward_hook(lambda module, args, out: seen.append(args[2]))
    query, m = networks.query(grey(B)), networks.heads(networks.encode(grey(B)))
    networks.posterior(query, m)
    assert seen[0].shape == (B, 1, 28, 28)


@pytest.mark.parametrize(
    ("networks", "likelihood", "message"),
    [
        (lambda: mlp(channels=1), MixedGaussian, "channels=2, as many as MixedGaussian wants, got 1"),
        (lambda: mlp(channels=2), BernoulliPixels, "channels=1, as many as BernoulliPixels wants, got 2"),
        (lambda: ConvNetworks(2, width=0.1, channels=3), MixedGaussian, "channels=2, .*, got 3"),
    ],
)
@every_program
def test_networks_of_other_channels_are_refused(program, networks, likelihood, message):
    with pytest.raises(ValueError, match=f"^networks: expected a decoder with {message}$"):
        PROGRAMS[program][0](networks(), likelihood=likelihood())


def test_what_is_no_likelihood_is_refused():
    with pytest.raises(TypeError, match=r"^likelihood: expected a Likelihood, got Identity$"):
        Model(mlp(), likelihood=nn.Identity())
    with pytest.raises(ValueError, match="^channels: expected at least 1 per pixel and colour, got 0$"):
        mlp(channels=0)


class ByMethod(Model):
    """As likelihoods were before there were parts for them."""

    def likelihood(self, logits):
        return dist.Normal(logits, 0.5).to_event(3)


class Tempered(SoftAttentionModel):
    def likelihood(self, logits):
        return super().likelihood(logits / 2)


class AnyValues(ByMethod):
    def check_values(self, memory, x):
        """Takes all of them."""


class TestAMethodOfASubclass:
    def test_wins_and_may_call_that_of_the_base(self, random_images):
        x, entries = random_images(B), random_images(S)
        fn = poutine.trace(ByMethod(mlp())).get_trace(entries, x).nodes["x"]["fn"]
        assert isinstance(fn.base_dist, dist.Normal)
        logits = []
        for model in (Tempered, SoftAttentionModel):
            torch.manual_seed(0)
            fn = poutine.trace(model(mlp())).get_trace(entries, x).nodes["x"]["fn"]
            logits.append(fn.base_dist.logits)
        torch.testing.assert_close(2 * logits[0], logits[1])

    @pytest.mark.parametrize("kind", [ByMethod, Tempered])
    def test_is_not_passed_over_for_another_one(self, kind):
        message = (
            f"^likelihood: expected none, as {kind.__name__} has a method of that name, got ContinuousBernoulli$"
        )
        with pytest.raises(ValueError, match=message):
            kind(mlp(), likelihood=ContinuousBernoulli())

    def test_says_how_many_channels_it_wants(self):
        class Wide(Model):
            def likelihood(self, decoded):
                loc, log_scale = decoded.chunk(2, -3)
                return dist.Normal(loc, log_scale.exp()).to_event(3)

        assert Wide(mlp(channels=2))(torch.zeros(S, 1, 28, 28), num_images=2).shape == (2, 1, 28, 28)

    def test_takes_binary_images_unless_it_says_otherwise(self):
        memory, x = Memory(grey(S)), grey(B)
        with pytest.raises(ValueError, match="^memory.entries: expected binary values"):
            ByMethod(mlp())(memory, x)
        model = AnyValues(mlp())
        assert poutine.trace(model).get_trace(memory, x).log_prob_sum().isfinite()
        assert kl_report(model, Guide(model.networks), memory, x, num_samples=2).nll.mean > 0


@pytest.mark.parametrize("local", [True, False])
def test_a_learned_likelihood_has_its_parameters_in_the_model(local):
    """Also for Pyro's store of parameters, which must see them when the program asks for the likelihood."""
    import pyro

    with pyro.settings.context(module_local_params=local):
        pyro.clear_param_store()
        model, _ = pair(networks=mlp(channels=2), likelihood=MixedGaussian())
        assert "likelihood.shift" in dict(model.named_parameters())
        trace = poutine.trace(model, param_only=True).get_trace(Memory(grey(S)), grey(B))
        assert ("likelihood.shift" in {name.replace("$$$", ".") for name in trace.nodes}) is not local
        assert isinstance(model.likelihood, MixedGaussian)
        assert isinstance(copy.deepcopy(model).likelihood, MixedGaussian)


def test_replays_make_the_checks_of_the_likelihood():
    model, guide = pair(likelihood=ContinuousBernoulli())
    captured = Captured(MultiSampleELBO(2, max_plate_nesting=1)(model, guide), wait=0)
    memory = Memory(grey(S))
    for _ in range(2):
        captured.gradient(memory, grey(B))
    assert captured.replays == 2
    with pytest.raises(ValueError, match="^x: expected values from 0 to 1, got values from "):
        captured.gradient(memory, 2 * grey(B))
    with pytest.raises(ValueError, match="^memory.entries: expected values from 0 to 1, got values from "):
        captured.gradient(Memory(3 * grey(S)), grey(B))


def test_the_base_says_what_is_missing():
    with pytest.raises(NotImplementedError, match="^Likelihood.forward: expected a distribution of images"):
        Model(mlp(), likelihood=Likelihood())(torch.zeros(S, 1, 28, 28))
    assert isinstance(ImageModel.likelihood, property)


class Second(Likelihood):
    """The second of two channels is the mean."""

    channels = 2

    def forward(self, decoded):
        return dist.Normal(decoded[..., 1:, :, :], 1.0).to_event(3)


@pytest.mark.parametrize("channels", [1, 2])
def test_a_likelihood_of_another_shape_does_not_broadcast(channels):
    """A sum of too many pixels, or of none, is no likelihood of an image."""
    likelihood, other = (Second, BernoulliPixels) if channels == 2 else (BernoulliPixels, Second)
    networks = mlp(channels=channels)
    model = Model(networks, likelihood=likelihood())
    memory, x = Memory((grey(S) > 0.5).float()), (grey(B) > 0.5).float()
    model(memory, x)
    model.likelihood = other()
    for arguments in ((memory, x), (memory,)):
        with pytest.raises(ValueError, match=r"^site 'x': expected a distribution of images \[1, 28, 28\], got"):
            model(*arguments)


def test_a_likelihood_of_the_class_is_refused():
    """It would be one for all models, and its parameters those of none."""

    class Shared(Model):
        likelihood = MixedGaussian()

    with pytest.raises(TypeError, match="^likelihood: expected a method of Shared or an argument, got a class"):
        Shared(mlp(channels=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_continuous_bernoulli_at_black_and_white_pixels(dtype):
    """log p(0) = log (l / tanh(l / 2)) - softplus(l), with a gradient, at every logit l; mean and draws agree."""
    logits = torch.tensor([-100.0, -30.0, -16.0, -3.0, -0.3, -1e-3, 0.0, 1e-4, 0.15, 0.25, 9.0, 40.0], dtype=dtype)
    logits.requires_grad_()
    fn = ContinuousBernoulli()(logits.reshape(-1, 1, 1, 1))
    found = fn.log_prob(torch.zeros(len(logits), 1, 1, 1, dtype=dtype))
    exact = logits.detach().double()
    safe = torch.where(exact.abs() < 1e-2, 1.0, exact)
    log_norm = torch.where(exact.abs() < 1e-2, math.log(2) + exact**2 / 12, (safe / (safe / 2).tanh()).log())
    torch.testing.assert_close(found.double(), log_norm - F.softplus(exact), rtol=1e-6, atol=1e-6)
    (slope,) = torch.autograd.grad(found.sum(), logits)
    by_hand = torch.where(exact.abs() < 1e-2, exact / 6, 1 / safe - 1 / torch.sinh(safe)) - exact.sigmoid()
    torch.testing.assert_close(slope.double(), by_hand, rtol=1e-4, atol=1e-5)
    torch.manual_seed(0)
    draws = ContinuousBernoulli()(logits.detach().reshape(1, 1, -1)).sample((20000,)).double()
    mean = ContinuousBernoulli()(logits.detach().reshape(1, 1, -1)).base_dist.mean.double()
    assert (draws.mean(0) - mean).abs().max() < 4 * 0.29 / math.sqrt(20000)
    assert 0 <= draws.min() <= draws.max() <= 1
    assert mean.flatten()[0] == pytest.approx(0.01, rel=1e-4)


LOGITS = [0.0, 1e-9, 1e-4, 0.0039, 0.01, 0.19, 0.21, 0.39, 0.41, 1.0, 5.0, 20.0]


@pytest.mark.parametrize("logit", [sign * logit for logit in LOGITS for sign in (1, -1)])
def test_what_else_a_continuous_bernoulli_says(logit):
    """Mean, variance, entropy and distribution function against integrals of its density; float32, too."""
    fn = StableContinuousBernoulli(logits=torch.tensor(logit, **FLOAT))
    x = torch.linspace(0, 1, 100_001, **FLOAT)
    log_p = fn.log_prob(x)
    p, third = log_p.exp(), torch.tensor(1 / 3, **FLOAT)

    def integral(values, upto=1.0):
        inside = x <= upto
        return torch.trapezoid(values[inside], x[inside])

    mean = integral(p * x)
    assert fn.mean.item() == pytest.approx(mean.item(), abs=1e-8)
    assert fn.variance.item() == pytest.approx(integral(p * (x - mean) ** 2).item(), rel=1e-7)
    assert fn.stddev.item() == pytest.approx(fn.variance.item() ** 0.5)
    assert fn.entropy().item() == pytest.approx(-integral(p * log_p).item(), abs=1e-7)
    assert fn.cdf(x[25_000]).item() == pytest.approx(integral(p, upto=0.25).item(), abs=1e-8)
    assert fn.cdf(fn.icdf(third)).item() == pytest.approx(1 / 3, rel=1e-9)
    single = StableContinuousBernoulli(logits=torch.tensor(logit))
    assert single.variance.item() == pytest.approx(fn.variance.item(), rel=1e-5)
    assert single.entropy().item() == pytest.approx(fn.entropy().item(), abs=1e-6)
    assert single.cdf(third.float()).item() == pytest.approx(fn.cdf(third).item(), abs=1e-6)


@pytest.mark.parametrize("logit", [0.0, 1e-6, -1e-6, 0.5, -0.5, 2e-3, -2e-3])
def test_draws_of_a_continuous_bernoulli_move_with_its_logit(logit):
    """By central differences of the same draws; at 0, where decoders start, as anywhere."""

    def draws(value):
        torch.manual_seed(0)
        return StableContinuousBernoulli(logits=torch.full((5,), value, **FLOAT)).rsample()

    at = torch.full((5,), logit, **FLOAT, requires_grad=True)
    torch.manual_seed(0)
    (got,) = torch.autograd.grad(StableContinuousBernoulli(logits=at).rsample().sum(), at)
    torch.manual_seed(0)
    u = torch.rand(5, **FLOAT)
    # Beside 0 the draws change from dark to light, and differences across it say nothing.
    want = u * (1 - u) / 2 if abs(logit) < 1e-5 else (draws(logit + 1e-5) - draws(logit - 1e-5)) / 2e-5
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("likelihood", [DiscretizedLogistics(2), CausalLogistics(2, hidden=4)])
@pytest.mark.parametrize("value", [0.5, 1.5, -1.0, math.nan])
def test_no_levels_are_refused_by_the_distribution_too(likelihood, value):
    fn = likelihood(torch.zeros(3, 1 + likelihood.maps(1), 4, 4))
    with pytest.raises(ValueError, match=r"^x: expected (256 levels|values from 0 to 1), ") as error:
        fn.log_prob(torch.full((3, 1, 4, 4), value))
    assert "\n" not in str(error.value)
