"""AIR, the semi-supervised VAE and the topic model: their densities by hand, and their evidences another way."""

import itertools
import math

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites

from experiments.programs import air, air_evidence, canvas, semi_supervised, topics
from experiments.programs.quadrature import lattice
from vma_pyro.infer import log_weights, make
from vma_pyro.infer.engine.plates import sample_sites

PROGRAMS = (air, semi_supervised, topics)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def few_draws(monkeypatch):
    """Fewer canvases and a rough evidence, where AIR's evidence is not what is tested."""
    monkeypatch.setattr(air, "CANVASES", 12)
    monkeypatch.setattr(air_evidence, "DRAWS", 50)


def log_joint(field):
    """Draws of the guide, and log p of each datapoint with them, from Pyro's own sum over sites."""
    guide = poutine.trace(field.guide).get_trace(*field.args)
    model = poutine.trace(poutine.replay(field.model, trace=guide)).get_trace(*field.args)
    model = prune_subsample_sites(model)
    model.compute_log_prob()
    log_p = sum(s["log_prob"].reshape(len(field.args[0]), -1).sum(1) for s in sample_sites(model))
    return {name: guide.nodes[name]["value"].detach() for name in guide.stochastic_nodes}, log_p.detach()


def log_normal(value, loc, scale):
    return -0.5 * ((value - loc) / scale) ** 2 - math.log(scale) - 0.5 * math.log(2 * math.pi)


def hermite(points, dimensions):
    """Nodes and weights of Gauss and Hermite for a standard normal."""
    node, weight = np.polynomial.hermite_e.hermegauss(points)
    nodes = np.stack(np.meshgrid(*[node] * dimensions, indexing="ij"), -1).reshape(-1, dimensions)
    weights = np.stack(np.meshgrid(*[weight] * dimensions, indexing="ij"), -1).reshape(-1, dimensions)
    return nodes, weights.prod(1) / (2 * math.pi) ** (dimensions / 2)


# 1. What all have in common.


@pytest.mark.parametrize("name", ["rloo", "vimco"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_an_update_has_a_finite_gradient_for_each_parameter(program, name, few_draws):
    field = program.field()
    elbo = make(name, 3, site=field.site, max_plate_nesting=None, batch_plates=field.batch_plates)
    with pyro.validation_enabled():
        elbo.differentiable_loss(field.model, field.guide, *field.args).backward()
    for parameter, value in field.guide.named_parameters():
        assert value.grad is not None, parameter
        assert value.grad.isfinite().all(), parameter
        assert value.grad.abs().max() > 0, parameter
    assert not any(parameter.requires_grad for parameter in field.model.parameters())


@pytest.mark.parametrize("program", PROGRAMS)
def test_seeds_make_other_data_and_the_same_seed_the_same(program, few_draws):
    one, again, other = program.field(seed=1), program.field(seed=1), program.field(seed=2)
    for a, b in zip((*one.args, *one.guide.parameters()), (*again.args, *again.guide.parameters()), strict=True):
        assert torch.equal(a, b)
    assert one.evidence == again.evidence
    assert not torch.equal(one.args[0], other.args[0])


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_the_lattice_integrates_a_normal(dimensions):
    """E exp(a z) = exp(|a|^2 / 2), and E z_1^2 z_d = 0 or E z^3 = 0."""
    nodes, log_weights_ = lattice(dimensions, 31)
    a = torch.linspace(-0.7, 0.4, dimensions, dtype=torch.float64)
    assert (log_weights_ + nodes @ a).logsumexp(0).item() == pytest.approx(a.square().sum().item() / 2, abs=1e-7)
    assert (log_weights_.exp() * nodes[:, 0] ** 2 * nodes[:, -1]).sum().abs() < 1e-12


# 2. The topic model.


def test_density_of_the_topic_model():
    field = topics.field()
    words, present = field.args
    drawn, log_p = log_joint(field)
    beta = field.model.log_beta.double().exp().numpy()
    for d in range(0, len(words), 9):
        eta = drawn["eta"][d, 0].double().numpy()
        theta = np.exp([*eta, 0.0])
        theta /= theta.sum()
        want = sum(log_normal(e, 0.0, 1.0) for e in eta)
        for n in range(int(present[d].sum())):
            t = int(drawn["topic"][d, n].argmax())
            want += math.log(theta[t]) + math.log(beta[t, words[d, n]])
        assert log_p[d].item() == pytest.approx(want, rel=1e-5)


def test_evidence_of_the_topic_model_by_enumeration_of_all_topics():
    """The sum over all topics of all words of sum_t prod beta E prod theta, by Gauss and Hermite."""
    model = topics.Topics()
    words, present = topics.data(model)
    nodes, weights = hermite(20, topics.TOPICS - 1)
    theta = np.exp(np.concatenate([nodes, np.zeros((len(nodes), 1))], 1))
    theta /= theta.sum(1, keepdims=True)
    beta = model.log_beta.double().exp().numpy()
    shortest = present.sum(1).argsort()[:2]
    moment = {}
    for d in shortest.tolist():
        document, total = words[d, present[d]].tolist(), 0.0
        for chosen in itertools.product(range(topics.TOPICS), repeat=len(document)):
            number = tuple(np.bincount(chosen, minlength=topics.TOPICS))
            if number not in moment:
                moment[number] = weights @ (theta ** np.array(number)).prod(1)
            total += moment[number] * np.prod([beta[t, w] for t, w in zip(chosen, document, strict=True)])
        got = topics.log_evidence(model, words[d : d + 1], present[d : d + 1]).item()
        assert got == pytest.approx(math.log(total), abs=1e-7)


def test_words_beyond_the_end_say_nothing():
    field = topics.field()
    words, present = field.args
    others = torch.where(present, words, (words + 5) % topics.VOCABULARY)
    assert not torch.equal(words, others)
    for name in ("rloo", "vimco"):
        elbo = make(name, 3, max_plate_nesting=2)
        found = []
        for given in (words, others):
            torch.manual_seed(0)
            loss = elbo.differentiable_loss(field.model, field.guide, given, present)
            found.append((loss, *torch.autograd.grad(loss, list(field.guide.parameters()))))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)
    assert topics.log_evidence(field.model, others, present).sum().item() == pytest.approx(field.evidence)


# 3. The semi-supervised VAE.


def test_density_of_the_vae():
    """Where the class is given, nothing is drawn; where not, the drawn class counts."""
    field = semi_supervised.field()
    x, labels, given = field.args
    drawn, log_p = log_joint(field)
    ink, styles = field.model.ink.double().numpy(), field.model.styles.double().numpy()
    for i in range(0, len(x), 7):
        y = int((labels if given[i] else drawn["y_unobserved"])[i].argmax())
        z = drawn["z"][i].double().numpy()
        p = 1 / (1 + np.exp(-(ink[y] + z @ styles[y])))
        want = -math.log(semi_supervised.CLASSES) + sum(log_normal(v, 0.0, 1.0) for v in z)
        want += sum(math.log(q if bit else 1 - q) for q, bit in zip(p, x[i], strict=True))
        assert log_p[i].item() == pytest.approx(want, rel=1e-5)
    assert given.sum() == semi_supervised.LABELLED


def test_evidence_of_the_vae_by_another_rule():
    """Gauss and Hermite in the place of the lattice, pixel by pixel; 96 nodes in each dimension."""
    model = semi_supervised.Images()
    x, labels, given = semi_supervised.data(model)
    z, weights = hermite(96, semi_supervised.FACTORS)
    got = semi_supervised.log_evidence(model, x, labels, given)
    for i in (0, 11, 25, 61):
        total = 0.0
        for y in range(semi_supervised.CLASSES):
            likelihood = np.ones(len(z))
            for ink, styles, bit in zip(
                model.ink[y].double().numpy(), model.styles[y].double().numpy().T, x[i], strict=True
            ):
                on = 1 / (1 + np.exp(-(ink + z @ styles)))
                likelihood *= on if bit else 1 - on
            if not given[i] or labels[i, y] == 1:
                total += weights @ likelihood / semi_supervised.CLASSES
        assert got[i].item() == pytest.approx(math.log(total), abs=1e-6)


def test_evidence_of_the_vae_with_and_without_a_class():
    """p(x) is the sum of p(x, y) over y, and a class that is given teaches its network nothing."""
    model = semi_supervised.Images()
    x, labels, given = semi_supervised.data(model)
    everywhere = torch.ones_like(given)
    joint = [
        semi_supervised.log_evidence(model, x, torch.eye(semi_supervised.CLASSES)[y].expand_as(labels), everywhere)
        for y in range(semi_supervised.CLASSES)
    ]
    nowhere = semi_supervised.log_evidence(model, x, labels, ~everywhere)
    torch.testing.assert_close(torch.stack(joint).logsumexp(0), nowhere)
    guide = semi_supervised.Inference()
    classes = torch.nn.functional.one_hot(torch.arange(len(x)) % semi_supervised.CLASSES).float()
    loss = make("vimco", 3, max_plate_nesting=1).differentiable_loss(model, guide, x, classes, everywhere)
    loss.backward()
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in guide.classes.parameters())
    assert guide.style.weight.grad.abs().max() > 0


# 4. AIR.


def drawn_by_hand(patch, where):
    """One patch on an empty canvas, bilinear, pixel by pixel; patch [G, G] and place (x, y)."""
    drawn, side, size = np.zeros((canvas.SIDE, canvas.SIDE)), canvas.SIDE, canvas.PATCH
    padded = np.pad(patch, 1)
    for row, column in itertools.product(range(side), repeat=2):
        place = (
            np.array([(2 * row + 1) / side - 1 - where[1], (2 * column + 1) / side - 1 - where[0]]) / canvas.SIZE
        )
        position = (place + 1) * size / 2 - 0.5  # in pixels of the patch, whose first is at 0
        low = np.floor(position).astype(int)
        for i, j in itertools.product((0, 1), repeat=2):
            at = low + (i, j)
            if (at >= -1).all() and (at <= size).all():
                weight = np.prod(1 - np.abs(position - at))
                drawn[row, column] += weight * padded[tuple(at + 1)]
    return drawn


def test_density_of_air(few_draws):
    field = air.field()
    (x,) = field.args
    drawn, log_p = log_joint(field)
    parts, numbers = field.model.parts.double().numpy(), set()
    for i in range(len(x)):
        mean, before, want = np.zeros((canvas.SIDE, canvas.SIDE)), 1.0, 0.0
        for t in range(canvas.STEPS):
            s, u, v = (drawn[f"{name}_{t + 1}"][i].double().numpy() for name in ("present", "where", "what"))
            if before:
                want += math.log(canvas.PRESENT if s else 1 - canvas.PRESENT)
            assert before or not s
            want += sum(
                log_normal(a, m, sd)
                for a, m, sd in zip(u, canvas.CENTRES[t].tolist(), canvas.SPREAD.tolist(), strict=True)
            )
            want += sum(log_normal(a, 0.0, 1.0) for a in v)
            mean += s * drawn_by_hand(parts[0] + np.tensordot(v, parts[1:], 1), u)
            before = s
        numbers.add(sum(float(drawn[f"present_{t + 1}"][i]) for t in range(canvas.STEPS)))
        want += sum(
            log_normal(a, b, canvas.NOISE) for a, b in zip(x[i].flatten().tolist(), mean.flat, strict=True)
        )
        assert log_p[i].item() == pytest.approx(want, rel=1e-5)
    assert numbers == {0.0, 1.0, 2.0}


def test_a_glimpse_is_the_way_back():
    """A smooth patch, drawn and read again at the same place; read elsewhere it is another."""
    patch = air.Scene().parts[0]
    where = torch.tensor([0.13, -0.21])
    shown = canvas.draw(patch[None, None], where[None])
    seen = canvas.glimpse(shown, where[None])[0, 0]
    assert (seen - patch)[1:-1, 1:-1].abs().max() < 0.15 * patch.max()
    elsewhere = canvas.glimpse(shown, where[None] + 0.3)[0, 0]
    assert (elsewhere - patch)[1:-1, 1:-1].abs().max() > 0.5 * patch.max()


def test_an_absent_object_leaves_the_weight():
    """Without objects every draw weighs p(x, no object) / q(no object): log w has no other part."""
    model, guide = air.Scene(), air.Inference()
    x, _, _ = air.data(model)
    guide.canvas[-1].bias.data[::3] = -60.0
    drawn = log_weights(model, guide, (x,), num_particles=7)
    nothing = torch.distributions.Normal(0.0, canvas.NOISE).log_prob(x).sum((1, 2)) + math.log(1 - canvas.PRESENT)
    torch.testing.assert_close(drawn, nothing.expand(7, -1), rtol=1e-5, atol=1e-3)


def test_likelihood_of_a_canvas_without_its_looks():
    """Against a normal with the whole covariance, float64."""
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randn(4, 1 + 3, 30, generator=generator, dtype=torch.float64)
    x = torch.randn(30, generator=generator, dtype=torch.float64)
    for got, (mean, *factors) in zip(air_evidence.log_likelihood(drawn, x), drawn, strict=True):
        A = torch.stack(factors)
        covariance = canvas.NOISE**2 * torch.eye(30, dtype=torch.float64) + A.T @ A
        want = torch.distributions.MultivariateNormal(mean, covariance).log_prob(x)
        assert got.item() == pytest.approx(want.item(), abs=1e-10)


def test_evidence_of_one_object_by_quadrature():
    """Importance sampling against the lattice, on canvases with no object, one and two; |z| < 4.5."""
    model = air.Scene()
    x, present, where = air.data(model)
    parts, number = model.parts.double(), present.sum(1)
    nodes, log_weight = lattice(2, 121)
    drawn = canvas.draw(parts, canvas.CENTRES[0] + canvas.SPREAD * nodes).flatten(-2)
    for i in [int(torch.nonzero(number == n)[0]) for n in (0, 1, 2)]:
        row = x[i].double().flatten()
        want = (log_weight + air_evidence.log_likelihood(drawn, row)).logsumexp(0)
        w = (air_evidence.weigh(parts, row, where[i][present[i].bool()], 1) - want).exp()
        error = w.std() / len(w) ** 0.5
        assert error < 0.15
        assert abs(w.mean() - 1) < 4.5 * error + 0.03  # what the kinks of bilinear reading cost the lattice


def test_evidence_of_two_objects_by_plain_importance_sampling(monkeypatch):
    """Places from the prior, 48,000 of them, on a canvas that shows two objects; |z| < 4.5."""
    monkeypatch.setattr(air_evidence, "DRAWS", 4000)
    model = air.Scene()
    x, present, where = air.data(model)
    parts = model.parts.double()
    i = int(torch.nonzero(present.sum(1) == 2)[1])
    row = x[i].double().flatten()
    w = air_evidence.weigh(parts, row, where[i], 2)
    plain = []
    for _ in range(16):
        places = canvas.CENTRES.double() + canvas.SPREAD * torch.randn(3000, canvas.STEPS, 2, dtype=torch.float64)
        drawn = air_evidence.sum_of_objects(canvas.draw(parts, places).flatten(-2))
        plain.append(air_evidence.log_likelihood(drawn, row))
    log_plain = torch.cat(plain)
    shift = w.logsumexp(0) - math.log(len(w))
    v, u = (log_plain - shift).exp(), (w - shift).exp()
    error = (v.var() / len(v) + u.var() / len(u)).sqrt()
    assert error < 0.2
    assert abs(v.mean() - u.mean()) < 4.5 * error
