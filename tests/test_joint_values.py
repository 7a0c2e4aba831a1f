"""Sites of several elements, whose joint values are listed: exact objectives, a reference, what is too much."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from programs import FLOAT
from vma_pyro.infer import DistinctELBO, ExactELBO, SumAndSampleELBO, UnorderedSetELBO, WakeWake, compare, make
from vma_pyro.infer.engine.distributions import too_many, whole_support

X = torch.tensor([0.3, -0.8], **FLOAT)
WEIGHTS = torch.tensor([[0.7, -1.1, 0.4], [-0.5, 0.2, 0.9]], **FLOAT)


def bits(number=3):
    """Two datapoints, a vector of bits with a logit of its own for each."""
    logits = torch.linspace(-1, 1, 2 * number, **FLOAT).reshape(2, number).requires_grad_()

    def model(x):
        with pyro.plate("data", 2):
            b = pyro.sample("b", dist.Bernoulli(torch.full((number,), 0.3, **FLOAT)).to_event(1))
            pyro.sample("x", dist.Normal((b[..., :3] * WEIGHTS[0]).sum(-1) ** 2, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 2):
            pyro.sample("b", dist.Bernoulli(logits=logits).to_event(1))

    return model, guide, logits, [torch.tensor(v, **FLOAT) for v in itertools.product([0.0, 1.0], repeat=number)]


def matrix_of_values():
    """Four elements of three values, in two dimensions of one event."""
    logits = torch.linspace(-1, 1, 24, **FLOAT).reshape(2, 2, 2, 3).requires_grad_()

    def model(x):
        with pyro.plate("data", 2):
            b = pyro.sample("b", dist.Categorical(torch.ones(2, 2, 3, **FLOAT)).to_event(2))
            pyro.sample("x", dist.Normal(WEIGHTS[0][b].prod(-1).sum(-1), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 2):
            pyro.sample("b", dist.Categorical(logits=logits).to_event(2))

    outcomes = [torch.tensor(v).reshape(2, 2) for v in itertools.product(range(3), repeat=4)]
    return model, guide, logits, outcomes


def enumerated(program):
    """Evidence and ELBO of both datapoints [2], each with every value written into the programs."""
    model, guide, logits, outcomes = program
    log_q, log_w = [], []
    for value in outcomes:
        data = {"b": value.expand(2, *value.shape)}
        traces = [pyro.poutine.trace(pyro.poutine.condition(p, data=data)).get_trace(X) for p in (guide, model)]
        for trace in traces:
            trace.compute_log_prob()
        log_q.append(traces[0].nodes["b"]["log_prob"])
        log_w.append(sum(traces[1].nodes[n]["log_prob"] for n in ("b", "x")) - log_q[-1])
    log_q, log_w = torch.stack(log_q), torch.stack(log_w)
    elbo = (log_q.exp() * log_w).sum(0)
    (gradient,) = torch.autograd.grad(elbo.sum(), logits)
    return (log_q + log_w).logsumexp(0).detach(), elbo.detach(), gradient


@pytest.mark.parametrize("program", [bits, matrix_of_values])
def test_with_all_values_there_is_no_noise(program):
    program = program()
    model, guide, logits, outcomes = program
    evidence, elbo, gradient = enumerated(program)
    exact = ExactELBO(1, site="b")
    assert -exact.loss(model, guide, X) == pytest.approx(evidence.sum().item(), abs=1e-10)
    distinct = DistinctELBO(len(outcomes), site="b")
    assert -distinct.loss(model, guide, X) == pytest.approx(evidence.sum().item(), abs=1e-10)
    every = SumAndSampleELBO(len(outcomes), site="b")
    loss = every.differentiable_loss(model, guide, X)
    assert -loss.item() == pytest.approx(elbo.sum().item(), abs=1e-10)
    (got,) = torch.autograd.grad(-loss, logits)
    torch.testing.assert_close(got, gradient, rtol=0, atol=1e-10)


def test_sets_of_three_joint_values():
    """Two thousand copies of the datapoints: the mean of their gradients is the enumerated one."""
    model, guide, logits, _ = program = bits()
    _, elbo, gradient = enumerated(program)
    times = 2000
    rows = logits.detach().repeat(times, 1).requires_grad_()

    def many_model(x):
        with pyro.plate("data", 2 * times):
            b = pyro.sample("b", dist.Bernoulli(torch.full((3,), 0.3, **FLOAT)).to_event(1))
            pyro.sample("x", dist.Normal((b * WEIGHTS[0]).sum(-1) ** 2, 1.0), obs=x)

    def many_guide(x):
        with pyro.plate("data", 2 * times):
            pyro.sample("b", dist.Bernoulli(logits=rows).to_event(1))

    torch.manual_seed(0)
    loss = UnorderedSetELBO(3, site="b").differentiable_loss(many_model, many_guide, X.repeat(times))
    of_rows = torch.autograd.grad(-loss, rows)[0].reshape(times, 2, 3)
    assert ((of_rows.mean(0) - gradient).abs() / (of_rows.std(0) / math.sqrt(times))).max() < 4
    assert -loss.item() / times == pytest.approx(elbo.sum().item(), abs=0.1)


def test_compare_has_an_exact_reference_for_a_vector_of_bits():
    model, _, logits, _ = bits()

    class Guide(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = torch.nn.Parameter(logits.detach().clone())

        def forward(self, x):
            with pyro.plate("data", 2):
                pyro.sample("b", dist.Bernoulli(logits=self.logits).to_event(1))

    found = compare(model, Guide(), (X,), estimators={"rloo": make("rloo", 2, site="b")}, draws=200)
    (row,) = [row for row in found.rows if row.group == "discrete guide"]
    assert row.reference_error == 0
    assert row.bias_z < 5


def test_the_last_element_changes_first():
    support = whole_support(dist.Categorical(torch.ones(7, 2, 3)).to_event(1))
    assert support.shape == (9, 1, 2)
    assert support[:, 0].tolist() == [list(pair) for pair in itertools.product(range(3), repeat=2)]
    one_hot = whole_support(dist.OneHotCategorical(torch.ones(7, 2, 3)).to_event(1))
    assert torch.equal(one_hot.argmax(-1), support)
    assert whole_support(dist.Bernoulli(torch.ones(7, 0)).to_event(1)).shape == (1, 1, 0)
    probabilities = dist.Bernoulli(torch.tensor([0.2, 0.7])).to_event(1)
    assert math.isclose(probabilities.log_prob(whole_support(probabilities)).exp().sum(), 1, abs_tol=1e-6)


def test_too_many_joint_values_are_refused_and_one_element_may_have_any_number():
    assert not too_many(dist.Bernoulli(torch.zeros(12)).to_event(1))
    assert too_many(dist.Bernoulli(torch.zeros(13)).to_event(1)) == "2^13"
    assert not too_many(dist.Categorical(torch.ones(1, 1_000_000)).to_event(1))
    model, guide, _, _ = bits(13)
    expected = r"site 'b': expected at most 4096 joint values of its elements.*, got 2\^13$"
    for name in ("exact", "distinct", "priority", "unordered-set", "sum-and-sample", "wake-wake-defensive"):
        with pytest.raises(ValueError, match=expected) as error:
            make(name, 2, site="b").loss_and_grads(model, guide, X)
        assert "\n" not in str(error.value)


def test_a_mask_inside_the_event_is_refused():
    model, _, logits, _ = bits()

    def guide(x):
        with pyro.plate("data", 2):
            pyro.sample("b", dist.Bernoulli(logits=logits).mask(torch.tensor([True, False, True])).to_event(1))

    for name in ("exact", "sum-and-sample"):
        with pytest.raises(ValueError, match="site 'b': expected its mask from poutine.mask"):
            make(name, 2, site="b").loss_and_grads(model, guide, X)


def test_a_mask_outside_the_event_is_refused_as_one():
    model, _, logits, _ = bits()

    def guide(x):
        with pyro.plate("data", 2):
            pyro.sample("b", dist.Bernoulli(logits=logits).to_event(1).mask(torch.tensor([True, False])))

    with pytest.raises(ValueError, match="site 'b': expected its mask from poutine.mask"):
        make("exact", 1, site="b").loss_and_grads(model, guide, X)


@pytest.mark.parametrize(
    "fn", [lambda q: dist.Bernoulli(logits=q[0]).to_event(1), lambda q: dist.Categorical(logits=q[0])]
)
def test_a_defensive_proposal_without_plates_particle_by_particle(fn):
    q = torch.zeros(2, 3, **FLOAT, requires_grad=True)

    def program(guide=False):
        b = pyro.sample("b", fn(q if guide else torch.zeros_like(q)))
        if not guide:
            pyro.sample("x", dist.Normal(b.to(q.dtype).sum(), 1.0), obs=X[0])

    elbo = WakeWake(4, defensive=0.1, vectorize_particles=False, max_plate_nesting=0, batch_plates=())
    elbo.loss_and_grads(program, lambda: program(guide=True))
    assert q.grad.isfinite().all()
