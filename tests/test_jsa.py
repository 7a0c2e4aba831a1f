"""Joint stochastic approximation: exact at the posterior, kept by position, in checkpoints; what is refused."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from programs import FLOAT, Binary, Discrete, Mixed, rows
from vma_pyro.infer import JSA
from vma_pyro.infer.engine import handlers
from vma_pyro.infer.engine.programs import Programs
from vma_pyro.infer.estimators.jsa import walk


def drawn_values(program, outcome):
    """Values of the sites of `Discrete` [...], or of `Binary`, at positions in its tables."""
    if isinstance(program, Discrete):
        return {"a": outcome // 2, "b": outcome % 2} if program.two_sites else {"a": outcome}
    return {"b": program.bits[outcome // 2], "c": (outcome % 2).to(program.bits)}


@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize("make", [lambda: Discrete(two_sites=False, plain=True), lambda: Binary(second=True)])
def test_a_chain_at_the_posterior_has_no_bias(make, K, monkeypatch):
    """Over the state, all proposals and both outcomes of each step: exact gradients, and the same law after."""
    program = make()
    single = rows(program.values, 1)
    extra = (torch.zeros(1, dtype=torch.long),) if isinstance(program, Discrete) else ()
    log_w, log_q = (t[0] for t in program.tables(single, *extra))
    log_p = (log_w + log_q).detach()
    posterior, number = log_p.softmax(0), len(log_p)
    path = torch.tensor(list(itertools.product(range(number), *[range(number), range(2)] * K)))
    states = torch.cat([path[:, :1], path[:, 1::2]], 1).T  # [K + 1, N]
    accepted = path[:, 2::2].T == 1  # [K, N]
    weight = posterior[states[0]] * log_q.detach().exp()[states[1:]].prod(0)
    at = states[0]
    for k in range(K):
        step = (log_w[states[k + 1]] - log_w[at]).detach().clamp(max=0).exp()
        weight = weight * torch.where(accepted[k], step, 1 - step)
        at = torch.where(accepted[k], states[k + 1], at)
    live = weight > 0
    states, accepted, weight, at = states[:, live], accepted[:, live], weight[live], at[live]
    assert weight.sum().item() == pytest.approx(1)

    elbo, N = JSA(K, max_plate_nesting=1), len(weight)
    p = rows(program.values, N)
    values = drawn_values(program, states)
    full = 2 * N  # the programs' plates hold the first half of the data
    elbo.chains.write(torch.arange(N), full, {name: value[0] for name, value in values.items()})
    monkeypatch.setattr(JSA, "uniform", staticmethod(lambda like: torch.where(accepted, -1.0, 2.0).to(like)))
    monkeypatch.setattr(handlers, "draw", lambda msg: values[msg["name"]].to(msg["fn"]().dtype))
    args = (p, torch.zeros(N, dtype=torch.long)) if extra else (p,)
    estimate = elbo._estimate(Programs(program.model, program.guide, args))
    torch.testing.assert_close(estimate.value, log_w.detach()[states[1:]].logsumexp(0) - math.log(K))

    plain = rows(program.values, 1)
    log_w, log_q = (t[0] for t in program.tables(plain, *extra))
    log_joint = log_w + log_q
    want = torch.autograd.grad(
        log_joint.logsumexp(0) + (posterior * log_q).sum(), list(plain.values()), allow_unused=True
    )
    got = torch.autograd.grad(estimate.surrogate, list(p.values()), allow_unused=True)
    for a, b in zip(got, want, strict=True):
        if b is not None and b.any():
            torch.testing.assert_close(torch.einsum("o,o...->...", weight, a), b[0], rtol=1e-9, atol=1e-10)
    kept = {name: value[:N] for name, value in elbo.chains.values.items()}
    for name, value in drawn_values(program, at).items():
        torch.testing.assert_close(kept[name], value)
    law = torch.zeros(number, **FLOAT).index_add(0, at, weight)
    torch.testing.assert_close(law, posterior, rtol=1e-10, atol=1e-12)


def mixture(positions, x, size, *, logits, subsample=True):
    """Datapoints of a mixture of four, each with a table of its own; some of all, by their positions."""

    def model():
        plate = pyro.plate("data", size, subsample=positions) if subsample else pyro.plate("data", len(x))
        with plate:
            a = pyro.sample("a", dist.Categorical(logits=torch.zeros(4, **FLOAT)))
            z = pyro.sample("z", dist.Normal(torch.arange(4.0, **FLOAT)[a], 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide():
        plate = pyro.plate("data", size, subsample=positions) if subsample else pyro.plate("data", len(x))
        with plate:
            a = pyro.sample("a", dist.Categorical(logits=logits[positions]))
            pyro.sample("z", dist.Normal(torch.arange(4.0, **FLOAT)[a] / 2, 1.0))

    return model, guide


def test_values_are_kept_by_position_and_in_the_state():
    """Two batches of six datapoints: each has its own; those of one stay while the other moves."""
    torch.manual_seed(0)
    size, x = 6, torch.linspace(0, 4, 6, **FLOAT)
    logits = torch.zeros(size, 4, **FLOAT, requires_grad=True)
    elbo = JSA(2)
    batches = (torch.tensor([4, 0, 2]), torch.tensor([1, 5, 3]))
    for _ in range(5):
        before = None
        for rows_ in batches:
            if before is not None:
                torch.testing.assert_close(elbo.chains.values["z"][batches[0]], before)
            elbo.loss_and_grads(*mixture(rows_, x[rows_], size, logits=logits))
            before = elbo.chains.values["z"][batches[0]].clone()
    assert all(met.all() for met in elbo.chains.met.values())
    assert set(elbo.chains.values) == {"a", "z"}

    net = torch.nn.ModuleDict()
    module = elbo(net, net)
    again = JSA(2)
    other = again(net, net)
    other.load_state_dict(module.state_dict())
    for name, value in elbo.chains.values.items():
        torch.testing.assert_close(again.chains.values[name], value)
        assert again.chains.values[name] is not value
    torch.manual_seed(1)
    one = elbo.differentiable_loss(*mixture(batches[0], x[batches[0]], size, logits=logits))
    torch.manual_seed(1)
    two = again.differentiable_loss(*mixture(batches[0], x[batches[0]], size, logits=logits))
    assert one == two

    kept = {name: value.clone() for name, value in elbo.chains.values.items()}
    elbo.loss(*mixture(batches[1], -x[batches[1]], size, logits=logits))
    elbo.chains.eval()
    elbo.loss_and_grads(*mixture(batches[1], x[batches[1]], size, logits=logits))
    for name, value in elbo.chains.values.items():
        torch.testing.assert_close(value, kept[name])


def test_it_comes_to_the_posterior():
    """A guide that knows nothing: after 300 steps its gradient, over 3,000 datapoints alike, is that of the KL."""
    torch.manual_seed(0)
    size = 3000
    x, positions = torch.full((size,), 2.3, **FLOAT), torch.arange(size)
    logits = torch.zeros(size, 4, **FLOAT, requires_grad=True)
    elbo = JSA(3)
    for _ in range(100):
        loss = elbo.differentiable_loss(*mixture(positions, x, size, logits=logits))
    (got,) = torch.autograd.grad(-loss, logits)
    likelihood = -0.25 * (2.3 - torch.arange(4.0, **FLOAT)) ** 2  # z integrated: variance 2
    want = likelihood.softmax(0) - 0.25
    error = got.std(0) / math.sqrt(size)
    assert ((got.mean(0) - want).abs() < 4.5 * error).all()
    assert want.abs().max() > 0.1


def test_two_batch_plates_and_a_vector():
    """Positions in two plates; a vector and its plate inside the datapoint are kept with it."""
    elbo = JSA(2, batch_plates=("outer", "inner"))
    outer, inner = torch.tensor([3, 1]), torch.tensor([0, 4, 2])

    def program(x):
        with pyro.plate("inner", 5, subsample=inner, dim=-1), pyro.plate("outer", 4, subsample=outer, dim=-2):
            with pyro.plate("words", 2, dim=-3):
                b = pyro.sample("b", dist.Bernoulli(torch.full((3,), 0.4)).to_event(1))
            if x is not None:
                pyro.sample("x", dist.Normal(b.sum((-1, -4), keepdim=True)[..., 0], 1.0), obs=x)

    for _ in range(3):
        elbo.loss_and_grads(lambda: program(torch.zeros(2, 3)), lambda: program(None))
    assert elbo.chains.values["b"].shape == (20, 2, 3)
    met = elbo.chains.met["b"].nonzero().flatten().tolist()
    assert met == sorted(5 * o + i for o in outer.tolist() for i in inner.tolist())


def test_programs_without_plates_are_one_datapoint():
    elbo = JSA(2, max_plate_nesting=0)

    def program(observe):
        a = pyro.sample("a", dist.Categorical(logits=torch.zeros(3)))
        if observe:
            pyro.sample("x", dist.Normal(1.0 * a, 1.0), obs=torch.tensor(1.0))

    for _ in range(3):
        elbo.loss_and_grads(lambda: program(True), lambda: program(False))
    assert elbo.chains.values["a"].shape == (1,)


def test_what_is_refused():
    logits = torch.zeros(6, 4, **FLOAT, requires_grad=True)
    x = torch.linspace(0, 4, 6, **FLOAT)
    first = torch.arange(3)

    elbo = JSA(2)  # minibatches in a plate that calls itself all data
    elbo.loss_and_grads(*mixture(first, x[:3], 3, logits=logits, subsample=False))
    elbo.loss_and_grads(*mixture(first, x[:3].clone(), 3, logits=logits, subsample=False))
    message = "^site 'x': expected the same data in every draw, or their positions in the whole data set, as"
    with pytest.raises(ValueError, match=message) as error:
        elbo.loss_and_grads(*mixture(first, x[3:], 3, logits=logits, subsample=False))
    assert "\n" not in str(error.value)

    elbo = JSA(2)
    elbo.loss_and_grads(*mixture(first, x[:3], 6, logits=logits))
    message = "^batch_plates: expected plates of 6 datapoints in all, as the values that are kept .*, got 7$"
    with pytest.raises(ValueError, match=message):
        elbo.loss_and_grads(*mixture(first, x[:3], 7, logits=logits))

    made_before = pyro.plate("data", 3)

    def early(observe):
        with made_before:
            a = pyro.sample("a", dist.Categorical(logits=torch.zeros(4)))
            if observe:
                pyro.sample("x", dist.Normal(1.0 * a, 1.0), obs=torch.zeros(3))

    with pytest.raises(
        ValueError, match="^plate 'data': expected made where the guide runs, got one made before$"
    ):
        JSA(2).loss_and_grads(lambda: early(True), lambda: early(False))

    program = Mixed()
    p, data = rows(program.values, 3), torch.zeros(3, **FLOAT)
    elbo = JSA(1)
    elbo.loss_and_grads(program.model, program.guide, p, data)

    elbo.chains.values["a"] = torch.zeros(6, 3, **FLOAT)  # as of a one-hot site
    with pytest.raises(ValueError, match="^site 'a': expected values .* for a datapoint, as those that are kept"):
        elbo.loss_and_grads(program.model, program.guide, p, data)
    with pytest.raises(ValueError, match="^vectorize_particles: expected True for JSA, got False$"):
        JSA(2, vectorize_particles=False)


def test_the_steps():
    """By hand: two proposals, of which the first is always taken and the second with probability 1/4."""
    log_w = torch.tensor([[0.0], [math.log(2.0)], [math.log(0.5)]], **FLOAT)
    for u, last in ((0.2, 2), (0.3, 1)):
        share, at = walk(log_w, torch.tensor([[0.9], [u]], **FLOAT))
        torch.testing.assert_close(share[:, 0], torch.tensor([0.0, 0.5 + 0.375, 0.125], **FLOAT))
        assert at.item() == last
    nothing = torch.tensor([[-math.inf], [-math.inf], [0.0]], **FLOAT)
    share, at = walk(nothing, torch.full((2, 1), 0.5, **FLOAT))
    assert share[:, 0].tolist() == [0.0, 0.5, 0.5]
    assert at.item() == 2


def test_it_is_not_recorded():
    """A recorded update would keep the values of the first one."""
    x, positions = torch.linspace(0, 4, 3, **FLOAT), torch.arange(3)
    logits = torch.zeros(3, 4, **FLOAT, requires_grad=True)
    elbo = JSA(2, max_plate_nesting=1)

    def update(x):
        return elbo.differentiable_loss(*mixture(positions, x, 3, logits=logits))

    with pytest.raises(RuntimeError, match="^JSA: expected an update that is run"):
        make_fx(update)(x)
    assert elbo.chains.met == {}


def three(positions, *, mask=None, factor=False, x=None, size=4):
    """One of three values, whose posterior is the last one for x = 6."""
    x = torch.full((len(positions),), 6.0) if x is None else x
    logits = torch.zeros(3, requires_grad=True)

    def program(observe):
        with pyro.plate("data", size, subsample=positions), pyro.poutine.mask(mask=True if mask is None else mask):
            z = pyro.sample("z", dist.Categorical(logits=logits.expand(len(positions), 3)))
            if observe and factor:
                pyro.factor("x", dist.Normal(3.0 * z, 0.5).log_prob(x))
            elif observe:
                pyro.sample("x", dist.Normal(3.0 * z, 0.5), obs=x)

    return (lambda *_: program(True)), (lambda *_: program(False))


def test_padding_leaves_the_chain_of_its_position_alone():
    """A row that is masked entirely names a datapoint: in the same batch, and in the next."""
    torch.manual_seed(0)
    elbo = JSA(1)
    for _ in range(40):
        elbo.loss_and_grads(*three(torch.tensor([0, 1])))
    for batch in ([0, 0], [2, 0], [0, 3]):
        mask = torch.tensor([batch[0] == 0 and batch[1] != 3, False])
        for _ in range(20):
            elbo.loss_and_grads(*three(torch.tensor(batch), mask=mask))
            assert elbo.chains.values["z"][0] == 2
    assert not elbo.chains.met["z"][2:].any()


@pytest.mark.parametrize("factor", [False, True])
def test_other_data_are_seen_in_arguments_as_well(factor):
    """A likelihood by `pyro.factor` observes nothing; and after a checkpoint, too."""
    positions = torch.arange(4)

    def without_positions(x):
        def program(observe):
            with pyro.plate("data", 4):
                z = pyro.sample("z", dist.Categorical(logits=torch.zeros(3, requires_grad=True)))
                if observe:
                    fn = dist.Normal(3.0 * z, 0.5)
                    pyro.factor("f", fn.log_prob(x)) if factor else pyro.sample("x", fn, obs=x)

        return (lambda x: program(True)), (lambda x: program(False))

    zeros, sixes = torch.zeros(4), torch.full((4,), 6.0)
    elbo = JSA(2)
    elbo.loss_and_grads(*without_positions(zeros), zeros)
    elbo.loss_and_grads(*without_positions(zeros), zeros)
    again = JSA(2)
    again.chains.load_state_dict(elbo.chains.state_dict())
    for one in (elbo, again):
        with pytest.raises(ValueError, match="expected the same data in every draw"):
            one.loss_and_grads(*without_positions(sixes), sixes)
    again.chains.load_state_dict(elbo.chains.state_dict())
    again.loss_and_grads(*without_positions(zeros), zeros)
    elbo.loss_and_grads(*three(positions, x=zeros, factor=factor))  # positions say which is which
    elbo.loss_and_grads(*three(positions, x=sixes, factor=factor))


def test_a_deterministic_value_is_no_data():
    elbo = JSA(2)

    def program(observe):
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Categorical(logits=torch.zeros(3, requires_grad=True)))
            pyro.deterministic("twice", 2 * z)
            if observe:
                pyro.sample("x", dist.Normal(3.0 * z, 0.5), obs=torch.zeros(4))

    for _ in range(5):
        elbo.loss_and_grads(lambda: program(True), lambda: program(False))


def test_a_site_that_a_datapoint_has_not_met_is_drawn():
    """Sequences of two steps, then of four, of latents that cannot be zero."""
    pyro.enable_validation(True)
    elbo = JSA(2)

    def program(positions, steps, observe):
        with pyro.plate("data", 4, subsample=positions):
            for t in range(steps):
                rate = torch.ones(len(positions), requires_grad=True)
                h = pyro.sample(f"h_{t}", dist.Gamma(2.0 * rate, 1.0))
                if observe:
                    pyro.sample(f"x_{t}", dist.Normal(h, 1.0), obs=torch.ones(len(positions)))

    for positions, steps in (([0, 1], 2), ([2, 3], 4), ([0, 3], 4)):
        index = torch.tensor(positions)
        loss = elbo.loss_and_grads(
            lambda i=index, s=steps: program(i, s, True), lambda i=index, s=steps: program(i, s, False)
        )
        assert math.isfinite(loss)
    assert elbo.chains.met["h_3"].tolist() == [True, False, True, True]


def test_positions_that_cannot_be():
    with pytest.raises(ValueError, match="^plate 'data': expected positions below its size 4, got 7$"):
        JSA(2).loss_and_grads(*three(torch.tensor([0, 7])))
    elbo = JSA(2, batch_plates=())
    elbo.loss_and_grads(*three(torch.arange(4)))
    with pytest.raises(ValueError, match="^plate 'data': expected its elements in order"):
        elbo.loss_and_grads(*three(torch.tensor([3, 2, 1, 0])))


def test_parameters_and_missing_values_among_the_arguments():
    """Trained parameters, an annealed number, and data of which some are missing are no other data."""
    x = torch.tensor([0.0, math.nan, 3.0])
    logits = torch.zeros(3, 3, requires_grad=True)
    live = ~x.isnan()

    def model(logits, x, beta):
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Categorical(logits=torch.zeros(3)))
            fn = dist.Normal(3.0 * z, 1.0 / beta).mask(live)
            pyro.sample("x", fn, obs=torch.where(live, x, 0.0))

    def guide(logits, x, beta):
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Categorical(logits=logits))

    elbo = JSA(2)
    for step in range(1, 4):
        elbo.loss_and_grads(model, guide, logits, x, torch.tensor(step / 4))
        with torch.no_grad():
            logits += 0.1
    with pytest.raises(ValueError, match="^(arguments 0 1|site 'x'): expected the same data"):
        elbo.loss_and_grads(model, guide, logits, x + 1, torch.tensor(1.0))
