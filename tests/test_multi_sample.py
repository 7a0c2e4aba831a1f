"""The rest of MultiSampleELBO's contract: value, interfaces, plates, and errors that name the culprit."""

import gc
import math
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, config_enumerate
from torch import nn

from programs import CATEGORICAL, Mixed, rows
from vma_pyro.infer import (
    ESTIMATORS,
    MultiSampleELBO,
    draw_particles,
    log_weights,
    loo,
    reinforce,
    vimco,
    vimco_geometric,
)

B, C = 5, 3


def two_plates(x):
    """Latents of each datapoint, one of them in an inner plate of C pixels."""
    with pyro.plate("data", B, dim=-2):
        a = pyro.sample("a", dist.Bernoulli(0.3))
        with pyro.plate("pixels", C, dim=-1):
            z = pyro.sample("z", dist.Normal(a, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def two_plates_guide(x):
    logit = pyro.param("logit", torch.zeros(B, 1))
    with pyro.plate("data", B, dim=-2):
        pyro.sample("a", dist.Bernoulli(logits=logit))
        with pyro.plate("pixels", C, dim=-1):
            pyro.sample("z", dist.Normal(x / 2, 1.0))


def test_inner_plates_are_summed_and_the_nesting_is_found():
    x = torch.randn(B, C)
    weights = log_weights(two_plates, two_plates_guide, (x,), num_particles=4, max_plate_nesting=2)
    assert weights.shape == (4, B)
    torch.manual_seed(3)
    found = MultiSampleELBO(4).differentiable_loss(two_plates, two_plates_guide, x)
    torch.manual_seed(3)
    told = MultiSampleELBO(4, max_plate_nesting=2).differentiable_loss(two_plates, two_plates_guide, x)
    assert found.item() == told.item()


def test_too_small_a_nesting_names_the_plate():
    elbo = MultiSampleELBO(1, baseline=reinforce, max_plate_nesting=1)
    with pytest.raises(ValueError, match=r"max_plate_nesting: expected at least 2, as plate 'data'"):
        elbo.loss(two_plates, two_plates_guide, torch.randn(B, C))


def test_several_batch_plates_make_the_datapoints():
    x = torch.randn(B, C)

    def model(x):
        with pyro.plate("rows", B, dim=-2), pyro.plate("columns", C, dim=-1):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    def guide(x):
        with pyro.plate("rows", B, dim=-2), pyro.plate("columns", C, dim=-1):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    # The guide is the posterior, so every weight is the marginal likelihood of its element.
    weights = log_weights(
        model, guide, (x,), num_particles=4, batch_plates=("rows", "columns"), max_plate_nesting=2
    )
    expected = dist.Normal(0.0, 2**0.5).log_prob(x).flatten()
    torch.testing.assert_close(weights, expected.expand(4, -1), rtol=1e-4, atol=1e-4)
    loss = MultiSampleELBO(3, batch_plates=("rows", "columns")).loss(model, guide, x)
    assert loss == pytest.approx(-expected.sum().item(), rel=1e-4)


def test_loss_agrees_with_differentiable_loss_and_loss_and_grads():
    x = torch.randn(B, C)
    elbo = MultiSampleELBO(4, baseline=loo, max_plate_nesting=2)
    values = []
    for evaluate in (elbo.loss, elbo.loss_and_grads, elbo.differentiable_loss):
        torch.manual_seed(0)
        values.append(float(torch.as_tensor(evaluate(two_plates, two_plates_guide, x)).detach()))
    assert values[0] == pytest.approx(values[1]) == pytest.approx(values[2])


@pytest.mark.parametrize("baseline", [reinforce, vimco, vimco_geometric, loo])
def test_a_single_particle_with_any_weight(baseline):
    """Addresses that cannot explain x weigh nothing; one that can keeps bound and gradient finite."""
    logits = torch.zeros(3, requires_grad=True)
    possible = torch.tensor([0.0, -math.inf, -math.inf])

    def model():
        with pyro.plate("data", 1):
            a = pyro.sample("a", dist.Categorical(logits=torch.zeros(3)))
            pyro.factor("x", possible[a])

    def guide():
        with pyro.plate("data", 1):
            pyro.sample("a", dist.Categorical(logits=logits))

    elbo = MultiSampleELBO(4, baseline=baseline, max_plate_nesting=1)
    seen = set()
    for seed in range(60):
        torch.manual_seed(seed)
        live = int((log_weights(model, guide, num_particles=4) > -math.inf).sum())
        torch.manual_seed(seed)
        loss = elbo.differentiable_loss(model, guide)
        if live == 0:
            assert loss == math.inf
            continue
        seen.add(live)
        # Uniform q and p: each live particle weighs p(x | a) = 1.
        assert loss.item() == pytest.approx(math.log(4 / live), abs=1e-6)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert gradient.isfinite().all()
        assert gradient.abs().sum() > 0
    assert {1, 2, 3} <= seen


@pytest.mark.parametrize("vectorize", [True, False])
def test_the_bound_does_not_depend_on_vectorisation(vectorize):
    x = torch.randn(B, C)
    elbo = MultiSampleELBO(
        3, baseline=loo, max_plate_nesting=2, vectorize_particles=vectorize, batch_plates=("data",)
    )
    losses = torch.tensor([elbo.loss(two_plates, two_plates_guide, x) for _ in range(120)])
    reference = MultiSampleELBO(3, max_plate_nesting=2)
    others = torch.tensor([reference.loss(two_plates, two_plates_guide, x) for _ in range(120)])
    z = (losses.mean() - others.mean()) / ((losses.var() + others.var()) / 120).sqrt()
    assert abs(z) < 4


@pytest.mark.parametrize("vectorize", [True, False])
def test_a_randomly_subsampled_plate_shows_all_particles_the_same_datapoints(vectorize):
    full, size = 40, 4
    x = 10 * torch.randn(full)

    def model(x):
        with pyro.plate("data", full, subsample_size=size) as rows:
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x[rows])

    def guide(x):
        with pyro.plate("data", full, subsample_size=size) as rows:
            pyro.sample("z", dist.Normal(x[rows] / 2, 0.5**0.5))

    # The guide is the posterior: every weight is the evidence of its datapoint, if it stays with its datapoint.
    evidence = dist.Normal(0.0, 2**0.5).log_prob(x).sum().item()
    elbo = MultiSampleELBO(3, max_plate_nesting=1, vectorize_particles=vectorize)
    losses = torch.tensor([elbo.loss(model, guide, x) for _ in range(400)])
    assert abs(losses.mean() + evidence) < 4 * losses.std() / 20


def test_a_factor_in_the_guide_counts():
    x = torch.randn(B)

    def model(x):
        with pyro.plate("data", B):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", B):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
            pyro.factor("entropy", torch.full((B,), 2.0), has_rsample=True)

    evidence = dist.Normal(0.0, 2**0.5).log_prob(x).sum().item()
    assert MultiSampleELBO(3).loss(model, guide, x) == pytest.approx(-evidence + 2 * B, rel=1e-5)


def test_svi_learns_the_discrete_posterior():
    """SVI with a param store: the guide of a Bernoulli reaches the exact posterior, unlike with RenyiELBO."""
    x = torch.tensor([-2.0, 0.0, 3.0])

    def model(x):
        with pyro.plate("data", 3):
            a = pyro.sample("a", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(a, 1.0), obs=x)

    def guide(x):
        logit = pyro.param("logit", torch.zeros(3))
        with pyro.plate("data", 3):
            pyro.sample("a", dist.Bernoulli(logits=logit))

    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), MultiSampleELBO(2, baseline=vimco))
    losses = [svi.step(x) for _ in range(400)]
    # p(a = 1 | x) has the logit x - 1/2.
    torch.testing.assert_close(pyro.param("logit").detach(), x - 0.5, rtol=0, atol=0.7)
    evidence = torch.logsumexp(dist.Normal(torch.tensor([[0.0], [1.0]]), 1.0).log_prob(x), 0) - math.log(2)
    assert sum(losses[-200:]) / 200 == pytest.approx(-evidence.sum().item(), abs=0.05)


def test_as_a_module_it_trains_with_a_torch_optimizer():
    class Guide(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.logit = nn.Parameter(torch.zeros(B, 1))

        def forward(self, x):
            with pyro.plate("data", B, dim=-2):
                pyro.sample("a", dist.Bernoulli(logits=self.logit))
                with pyro.plate("pixels", C, dim=-1):
                    pyro.sample("z", dist.Normal(x / 2, 1.0))

    class Model(pyro.nn.PyroModule):
        def forward(self, x):
            two_plates(x)

    loss_fn = MultiSampleELBO(4)(Model(), Guide())
    loss_fn(torch.randn(B, C)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in loss_fn.parameters())


def test_deterministic_sites_and_sequential_inner_plates_are_no_obstacle():
    def model(x):
        with pyro.plate("data", B):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.deterministic("twice", 2 * z)
            for c in pyro.plate("pixels", C):
                pyro.sample(f"x{c}", dist.Normal(z, 1.0), obs=x[:, c])
        pyro.deterministic("outside", torch.tensor(1.0))

    def guide(x):
        with pyro.plate("data", B):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    assert math.isfinite(MultiSampleELBO(2).loss(model, guide, torch.randn(B, C)))


class TestErrorsNameTheCulprit:
    def test_number_of_particles(self):
        with pytest.raises(ValueError, match=r"^num_particles: expected at least 1, got 0$"):
            MultiSampleELBO(0, baseline=reinforce)
        with pytest.raises(ValueError, match=r"^num_particles: expected at least 2 for baseline 'loo', got 1$"):
            MultiSampleELBO(1, baseline=loo)
        MultiSampleELBO(1, baseline=reinforce)

    def test_batch_plates_are_names(self):
        with pytest.raises(ValueError, match="batch_plates: expected a sequence of plate names, got 'data'"):
            MultiSampleELBO(2, batch_plates="data")

    def test_a_site_outside_the_batch_plates(self):
        def model(x):
            shared = pyro.sample("shared", dist.Normal(0.0, 1.0))
            with pyro.plate("data", B):
                pyro.sample("x", dist.Normal(shared, 1.0), obs=x)

        def guide(x):
            pyro.sample("shared", dist.Normal(0.0, 1.0))

        with pytest.raises(ValueError, match=r"^site 'shared': expected inside the batch plates \['data'\]"):
            MultiSampleELBO(2).loss(model, guide, torch.randn(B))

    def test_sites_that_only_one_program_has(self):
        def model(x):
            with pyro.plate("data", B):
                pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

        def other(x):
            with pyro.plate("data", B):
                pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("u", dist.Normal(0.0, 1.0))

        x = torch.randn(B)
        with pytest.raises(ValueError, match=r"^site 'z': expected in the guide as in the model"):
            MultiSampleELBO(2).loss(model, lambda x: None, x)
        with pytest.raises(ValueError, match=r"^site 'u': expected in the model as in the guide"):
            MultiSampleELBO(2).loss(model, other, x)

    def test_a_site_left_for_enumeration(self):
        elbo = MultiSampleELBO(2, max_plate_nesting=2)
        with pytest.raises(ValueError, match=r"^site 'a': expected a site to sample, but it is marked"):
            elbo.loss(two_plates, config_enumerate(two_plates_guide), torch.randn(B, C))

    @pytest.mark.filterwarnings("ignore:Encountered NaN")  # Pyro warns as well, before we refuse
    def test_nan_weights(self):
        # Distributions without argument checks let NaN through to the weights.
        class Unchecked(dist.Normal):
            def log_prob(self, value):
                return super().log_prob(value) * math.nan

        def model(x):
            with pyro.plate("data", B):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("broken", Unchecked(z, torch.ones(B)), obs=x)

        def guide(x):
            with pyro.plate("data", B):
                pyro.sample("z", dist.Normal(0.0, 1.0))

        with pytest.raises(ValueError, match=r"^site 'broken': expected a log probability, got NaN"):
            MultiSampleELBO(2).loss(model, guide, torch.randn(B))


def test_a_scale_around_the_program_stays_inside_the_bound():
    """poutine.scale is annealing: it belongs to the weights, unlike the scale of a subsampled plate."""
    x = torch.randn(B, C)
    elbo = MultiSampleELBO(2, max_plate_nesting=2)
    torch.manual_seed(0)
    scaled = elbo.loss(poutine.scale(two_plates, 0.5), poutine.scale(two_plates_guide, 0.5), x)
    torch.manual_seed(0)
    weights = log_weights(two_plates, two_plates_guide, (x,), num_particles=2, max_plate_nesting=2)
    expected = ((0.5 * weights).logsumexp(0) - math.log(2)).sum().item()
    assert scaled == pytest.approx(-expected, rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"vectorize": False}, {"batch_plates": ()}])
@pytest.mark.parametrize("nesting", [{}, {"max_plate_nesting": 1}])
def test_log_weights_are_those_of_a_draw(options, nesting):
    def model(x):
        with pyro.plate("data", B):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", B):
            pyro.sample("z", dist.Normal(0.5 * x, 1.0))

    found = []
    for draw in (log_weights, draw_particles):
        torch.manual_seed(0)
        found.append(draw(model, guide, (torch.arange(B) * 0.1,), num_particles=3, **options, **nesting))
    assert found[0].equal(found[1].log_weights)
    assert found[0].shape == (3, 1 if options.get("batch_plates") == () else B)


@pytest.mark.parametrize("name", CATEGORICAL)
def test_nothing_of_an_update_stays_in_memory(name):
    """A circle through autograd's graph is never collected: a leak of megabytes per update."""
    alive = []

    class Watched(Mixed):
        def model(self, p, x):
            trace = poutine.trace(super().model).get_trace(p, x)
            alive.append(weakref.ref(trace.nodes["z"]["value"]))

    program = Watched()
    p, x = rows(program.values, 4), program.x.expand(4).clone()
    ESTIMATORS[name](3, "a", 1).differentiable_loss(program.model, program.guide, p, x).backward()
    gc.collect()
    assert alive
    assert not [ref for ref in alive if ref() is not None]
