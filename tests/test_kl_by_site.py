"""The split of the bound, site by site, of all kinds of programs: closed forms, enumeration and quadrature."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from sites import (
    CLASSES,
    ENTRIES,
    KL_A,
    KL_COIN,
    KL_STYLE,
    KL_Z,
    LOGITS,
    NODES,
    NOISE,
    TABLES,
    WEIGHTS,
    B,
    K,
    S,
    X,
    by_the_entry,
    expected_log_normal,
    kl_of,
    no_address,
    observe,
    programs,
    sample_address,
    sample_z,
    style_after,
)
from torch.distributions import Bernoulli, Normal, kl_divergence

from vma_pyro import Guide, LearnedAddress, Memory, MLPNetworks, Model
from vma_pyro.evaluation import address_posterior, classify, kl_report, split_bound
from vma_pyro.infer import log_weights

# --- p(a) that differs between images


def test_a_learned_prior_of_memories_of_their_own(random_images):
    networks = MLPNetworks(4, hidden_dims=(8, 7), key_dim=6)
    model, guide = Model(networks, address_prior=LearnedAddress(networks)), Guide(networks)
    with torch.no_grad():
        model.address_prior.score[2].weight.mul_(20)
    memory, x = Memory(random_images(B, S)), random_images(B)
    with torch.no_grad():
        features = memory.encode(networks).features
        log_q = guide.similarity(networks.query(x).key, features.key)
        expected = kl_of(log_q, model.address_prior(memory.encode(networks)))
    assert expected.std() > 0.1
    for samples in (1, 3):
        split = split_bound(model, guide, memory, x, num_samples=samples)
        torch.testing.assert_close(split.kl_address, expected)
        assert split.how["address"] == "exact"
    report = kl_report(model, guide, memory, x, num_samples=5)
    assert report.kl_address.mean == pytest.approx(expected.mean().item(), rel=1e-5)


def by_covariate(which, x):
    sample_address(which, torch.stack([x, -x, 0 * x, 2 * x] if which == "p" else [x, 0 * x, x, 0 * x], -1))
    observe(which, "x", 0.0, x)


def test_a_prior_by_a_covariate():
    log_p = torch.stack([X, -X, 0 * X, 2 * X], -1)
    log_q = torch.stack([X, 0 * X, X, 0 * X], -1)
    for samples in (1, B, 7):
        split = split_bound(*programs(by_covariate), ENTRIES, X, num_samples=samples)
        torch.testing.assert_close(split.kl_address, kl_of(log_q, log_p))
        torch.testing.assert_close(split.address_probs, log_q.softmax(-1))


# --- what is random before the address


def z_first(which, x):
    z = sample_z(which)
    a = sample_address(which, z.unsqueeze(-1) * LOGITS[which] + x.unsqueeze(-1) * torch.arange(S))
    observe(which, "x", ENTRIES[a] + z, x)


def test_z_before_the_address_is_averaged_over():
    """q(a | z, x) and p(a | z, x): KL(a) and q(a | x) by quadrature over q(z)."""
    z = (0.3 + 0.7 * NODES)[:, None, None]
    log_q, log_p = (z * LOGITS[which] + X[:, None] * torch.arange(S) for which in "qp")
    kl, q = kl_of(log_q, log_p), log_q.softmax(-1)  # [nodes, B], [nodes, B, S]
    expected = torch.einsum("n,nb->b", WEIGHTS, kl), torch.einsum("n,nbs->bs", WEIGHTS, q)
    error = (WEIGHTS @ kl**2 - expected[0] ** 2).sqrt().max().item() / math.sqrt(4000)
    split = split_bound(*programs(z_first), ENTRIES, X, num_samples=4000)
    torch.testing.assert_close(split.kl_address, expected[0], atol=5 * error, rtol=0)
    torch.testing.assert_close(split.address_probs, expected[1], atol=0.03, rtol=0)
    assert split.how == {"z": "sampled", "address": "mean over draws"}
    assert split.kl_z.mean().item() == pytest.approx(KL_Z, abs=0.03)
    guide = programs(z_first)[1]
    found = address_posterior(guide, ENTRIES, X, num_samples=4000)
    torch.testing.assert_close(found, expected[1], atol=0.03, rtol=0)
    memory = Memory(ENTRIES[:, None], torch.tensor([0, 1, 0, 1]), event_dim=1)
    classes = classify(guide, memory, X, num_samples=4000)
    torch.testing.assert_close(
        classes, torch.stack([expected[1][:, i::2].sum(1) for i in (0, 1)], 1), atol=0.04, rtol=0
    )


def style_in_a_plate(which, x):
    with pyro.plate("parts", 2, dim=-2):
        s = pyro.sample("s", dist.Bernoulli(0.3 if which == "p" else 0.6))
    a = sample_address(which, s.sum(-2, keepdim=True).unsqueeze(-1) * LOGITS[which])
    observe(which, "x", ENTRIES[a], x)


def test_discrete_sites_of_a_further_plate_before_the_address_are_averaged_over():
    """Two styles: all four outcomes by hand."""
    count = torch.arange(3.0)
    weight = dist.Binomial(2, 0.6).log_prob(count).exp()
    kl = kl_of(count[:, None] * LOGITS["q"], count[:, None] * LOGITS["p"])
    split = split_bound(*programs(style_in_a_plate), ENTRIES, X, num_samples=4000)
    assert split.kl["address"].mean().item() == pytest.approx((weight @ kl).item(), abs=0.03)
    torch.testing.assert_close(split.kl["s"], (2 * kl_divergence(Bernoulli(0.6), Bernoulli(0.3))).expand(B))
    assert split.how == {"s": "exact", "address": "mean over draws"}
    expected = weight @ (count[:, None] * LOGITS["q"]).softmax(-1)
    found = address_posterior(programs(style_in_a_plate)[1], ENTRIES, X, num_samples=4000)
    torch.testing.assert_close(found, expected.expand(B, -1), atol=0.03, rtol=0)


def class_then_z(which, x):
    c = pyro.sample("class", dist.Categorical(logits=CLASSES[which]))
    z = pyro.sample("z", dist.Normal(0.5 * c, 1.0))
    a = sample_address(which, TABLES[which][c] + z.unsqueeze(-1) * LOGITS[which])
    observe(which, "x", ENTRIES[a], x)


def test_a_class_and_then_z_before_the_address():
    """The class is summed over, z is drawn: by the sum of the quadratures."""
    c, q_c = torch.arange(3.0), CLASSES["q"].softmax(0)
    z = 0.5 * c[:, None] + NODES  # [3, nodes]
    log_q, log_p = (TABLES[w][:, None] + z[..., None] * LOGITS[w] for w in "qp")
    of_address = torch.einsum("c,n,cn->", q_c, WEIGHTS, kl_of(log_q, log_p))
    of_class = kl_of(CLASSES["q"], CLASSES["p"])
    split = split_bound(*programs(class_then_z), ENTRIES, X, num_samples=4000)
    torch.testing.assert_close(split.kl["class"], of_class.expand(B))
    assert split.kl["address"].mean().item() == pytest.approx(of_address.item(), abs=0.03)
    assert split.how == {"class": "exact", "z": "sampled", "address": "mean over draws"}
    torch.testing.assert_close(split.kl_address, split.kl["class"] + split.kl["address"])
    expected = torch.einsum("c,n,cns->s", q_c, WEIGHTS, log_q.softmax(-1))
    torch.testing.assert_close(split.address_probs, expected.expand(B, -1), atol=0.02, rtol=0)


def z_first_in_the_model(which, x):
    if which == "q":
        a = sample_address(which)
        z = pyro.sample("z", dist.Normal(0.5 * a, 0.7))
    else:
        z = sample_z(which)
        a = sample_address(which, z.unsqueeze(-1) * LOGITS[which])
    observe(which, "x", ENTRIES[a] + z, x)


def test_another_order_in_the_model():
    """q(a) q(z | a) against p(z) p(a | z): in closed form p(a | z) would be that of the wrong a."""
    q = LOGITS["q"].softmax(0)
    z = 0.5 * torch.arange(S)[:, None] + 0.7 * NODES  # [S, nodes]
    log_p = (z[..., None] * LOGITS["p"]).log_softmax(-1)[torch.arange(S), :, torch.arange(S)]
    of_address = torch.einsum("s,n,sn->", q, WEIGHTS, q.log()[:, None] - log_p)
    of_z = q @ kl_divergence(Normal(0.5 * torch.arange(S), 0.7), Normal(0.0, 1.0))
    split = split_bound(*programs(z_first_in_the_model), ENTRIES, X, num_samples=4000)
    assert split.kl_address.mean().item() == pytest.approx(of_address.item(), abs=0.06)
    assert split.kl_z.mean().item() == pytest.approx(of_z.item(), abs=0.06)
    assert split.how == {"z": "sampled", "address": "sampled"}


def class_of_the_entry(which, x):
    if which == "q":
        c = pyro.sample("class", dist.Categorical(logits=CLASSES[which]))
        a = sample_address(which, TABLES[which][c])
    else:
        a = sample_address(which)
        c = pyro.sample("class", dist.Categorical(logits=TABLES[which].T[a]))
    observe(which, "x", ENTRIES[a] + c, x)


def test_a_class_after_the_address_in_the_model():
    """q(c) q(a | c) against p(a) p(c | a): the sum over all outcomes."""
    log_q = CLASSES["q"].log_softmax(0)[:, None] + TABLES["q"].log_softmax(-1)
    log_p = LOGITS["p"].log_softmax(0) + TABLES["p"].log_softmax(0)
    expected = (log_q.exp() * (log_q - log_p)).sum().item()
    report = kl_report(*programs(class_of_the_entry), ENTRIES, X, num_samples=3000)
    assert report.kl_address.mean == pytest.approx(expected, abs=0.04)
    assert report.how == {"address": "exact", "class": "sampled"}


# --- more sites than address, z and x


def two_levels(which, x):
    sample_address(which)
    top = pyro.sample("z_top", dist.Normal(0.0, 1.0) if which == "p" else dist.Normal(1.5, 0.5))
    z = pyro.sample("z", dist.Normal(top, 1.0) if which == "p" else dist.Normal(top + 0.2, 0.8))
    observe(which, "x", z, x)


def caption(which, x):
    z = sample_z(which)
    observe(which, "x", z, x)
    observe(which, "caption", 2 * z, x)


def masked(which, x):
    first = torch.arange(len(x)) < 2
    with poutine.mask(mask=first):
        a = sample_address(which)
    with poutine.mask(mask=a == 1), poutine.scale(scale=0.3):
        sample_z(which)
    with poutine.scale(scale=2.0):
        observe(which, "x", 0.0, x)


def masked_distributions(which, x):
    first = torch.arange(len(x)) < 2
    pyro.sample("address", dist.Categorical(logits=LOGITS[which]).mask(first))
    pyro.sample("style", dist.Bernoulli(0.3 if which == "p" else 0.6).mask(~first))
    observe(which, "x", 0.0, x)


def parts(which, x):
    a = sample_address(which)
    with pyro.plate("parts", 3, dim=-2):
        s = pyro.sample("s", dist.Bernoulli(0.3 if which == "p" else 0.6))
        z = sample_z(which)
        observe(which, "part", z, x)
    observe(which, "x", ENTRIES[a] + 0 * s.sum(-2, keepdim=True), x)


def two_addresses(which, x):
    sample_address(which)
    pyro.sample("address2", dist.OneHotCategorical(logits=CLASSES[which]))
    observe(which, "x", 0.0, x)


def no_latent(which, x):
    observe(which, "x", torch.zeros(()), x)


def factors(which, x):
    z = sample_z(which)
    pyro.factor("f", -z if which == "p" else torch.tensor(0.2), **({"has_rsample": True} if which == "q" else {}))
    observe(which, "x", z, x)


Q_A = LOGITS["q"].softmax(0)
FIRST = (torch.arange(B) < 2).float()
KL_LOWER = math.log(1 / 0.8) + (0.8**2 + 0.2**2) / 2 - 0.5
OF_ENTRY = (Q_A @ ENTRIES).item(), (Q_A @ ENTRIES**2 - (Q_A @ ENTRIES) ** 2).item()  # mean and variance of m_a
LOG_X = Normal(0.0, 1.0).log_prob(X)

# Body to KL by site and E log p of each observed site, [B] or the same for all images.
CASES = {
    two_levels: (
        {"address": KL_A, "z_top": kl_divergence(Normal(1.5, 0.5), Normal(0.0, 1.0)).item(), "z": KL_LOWER},
        {"x": expected_log_normal(X, 1.7, 0.25 + 0.64)},
        ("exact", "sampled", "sampled"),
    ),
    style_after: (
        {"address": KL_A, "style": KL_STYLE, "z": KL_Z},
        None,
        ("exact", "exact", "sampled"),
    ),
    by_the_entry: (
        {"address": KL_A, "style": (Q_A @ kl_of(TABLES["q"].T, TABLES["p"].T)).item(), "z1": KL_Z},
        {"x": LOG_X},
        ("exact", "mean over draws", "sampled"),
    ),
    caption: (
        {"z": KL_Z},
        {"x": expected_log_normal(X, 0.3, 0.49), "caption": expected_log_normal(X, 0.6, 4 * 0.49)},
        ("sampled",),
    ),
    masked: (
        {"address": FIRST * KL_A, "z": 0.3 * Q_A[1] * KL_Z},
        {"x": 2 * LOG_X},
        ("exact", "sampled"),
    ),
    masked_distributions: (
        {"address": FIRST * KL_A, "style": (1 - FIRST) * KL_COIN},
        {"x": LOG_X},
        ("exact", "exact"),
    ),
    parts: (
        {"address": KL_A, "s": 3 * KL_COIN, "z": 3 * KL_Z},
        {"part": 3 * expected_log_normal(X, 0.3, 0.49), "x": expected_log_normal(X, *OF_ENTRY)},
        ("exact", "exact", "sampled"),
    ),
    two_addresses: ({"address": KL_A, "address2": KL_STYLE}, {"x": LOG_X}, ("exact", "exact")),
    no_address: ({"z": KL_Z}, {"x": expected_log_normal(X, 0.3, 0.49)}, ("sampled",)),
    no_latent: ({}, {"x": LOG_X}, ()),
    factors: (
        {"z": KL_Z, "f": 0.2},
        {"f": torch.full((B,), -0.3), "x": expected_log_normal(X, 0.3, 0.49)},
        ("sampled", "sampled"),
    ),
}


@pytest.mark.parametrize("body", CASES, ids=lambda body: body.__name__)
def test_every_site_has_its_part_and_they_add_up(body):
    kl, observed, how = CASES[body]
    split = split_bound(*programs(body), ENTRIES, X, num_samples=K)
    assert list(split.kl) == list(kl)
    assert split.how == dict(zip(kl, how, strict=True))
    for name, expected in kl.items():
        tolerance = 1e-5 if split.how[name] == "exact" else NOISE
        expected = torch.as_tensor(expected).expand(B)
        torch.testing.assert_close(split.kl[name], expected, atol=tolerance, rtol=0)
    for name, expected in (observed or {}).items():
        torch.testing.assert_close(split.observed[name], expected, atol=NOISE, rtol=0)
    torch.testing.assert_close(split.reconstruction, sum(split.observed.values(), torch.zeros(B)))
    torch.testing.assert_close(split.kl_address + split.kl_z, sum(split.kl.values(), torch.zeros(B)))
    # The single-sample bound, from the weights that all objectives have.
    weights = log_weights(*programs(body), (ENTRIES, X), num_particles=K, max_plate_nesting=2)
    total = split.reconstruction - split.kl_address - split.kl_z
    torch.testing.assert_close(total, weights.mean(0), atol=2 * NOISE, rtol=0)
    report = kl_report(*programs(body), ENTRIES, X, num_samples=20)
    total = report.reconstruction.mean + report.kl_address.mean + report.kl_z.mean
    assert sum(cost.mean for _, cost in report.parts()) == pytest.approx(total, abs=1e-4)
    assert kl_report(*programs(body), ENTRIES, X, num_samples=1).how == split.how
    one = split_bound(*programs(body), ENTRIES, X)
    for name in kl:
        assert one.how[name] == split.how[name] or (one.how[name], split.how[name]) == ("mean over draws", "exact")
        if split.how[name] == "exact":
            torch.testing.assert_close(one.kl[name], split.kl[name])
    assert all(value.shape == (B,) for value in (*one.kl.values(), *one.observed.values()))


def test_a_bound_of_one_datapoint_has_no_scale_of_subsampling():
    def subsampled(program):
        def run(memory, x):
            with pyro.plate("data", 50, subsample_size=len(x)):
                style_after(program, x)

        return run

    split = split_bound(subsampled("p"), subsampled("q"), ENTRIES, X, num_samples=3)
    torch.testing.assert_close(split.kl["address"], torch.full((B,), KL_A))
    torch.testing.assert_close(split.kl["style"], torch.full((B,), KL_STYLE))


def test_the_datapoints_may_be_at_another_dimension():
    def program(which):
        def run(memory, x):
            with pyro.plate("data", len(x), dim=-2):
                by_covariate(which, x[:, None])
                with pyro.plate("pixels", 3, dim=-1):
                    observe(which, "pixel", sample_z(which), x[:, None])

        return run

    expected = kl_of(torch.stack([X, 0 * X, X, 0 * X], -1), torch.stack([X, -X, 0 * X, 2 * X], -1))
    split = split_bound(program("p"), program("q"), ENTRIES, X, num_samples=2000)
    torch.testing.assert_close(split.kl_address, expected)
    torch.testing.assert_close(split.kl["z"], torch.full((B,), 3 * KL_Z), atol=0.2, rtol=0)
    torch.testing.assert_close(split.address_probs, torch.stack([X, 0 * X, X, 0 * X], -1).softmax(-1))
    assert kl_report(program("p"), program("q"), ENTRIES, X, num_samples=5).kl_address.n == B


def test_a_site_that_is_not_always_there(monkeypatch):
    """b is drawn where a = 1: KL(b) is q(a = 1) times that of b, with draws one after the other."""

    def branch(which, x):
        a = pyro.sample("a", dist.Bernoulli(0.5 if which == "p" else 0.3))
        b = pyro.sample("b", dist.Bernoulli(0.3 if which == "p" else 0.6)) if a.item() == 1 else 0 * a
        observe(which, "x", b, x)

    with pytest.raises(
        ValueError, match=r"^site 'a': expected all draws and datapoints side by side, [^\n]*mask[^\n]*$"
    ):
        split_bound(*programs(branch), ENTRIES, X[:1], num_samples=3)
    monkeypatch.setattr("vma_pyro.evaluation.chunks.READS_PER_CHUNK", 1)
    report = kl_report(*programs(branch), ENTRIES, X[:1], num_samples=100)
    assert report.kl["a"].mean == pytest.approx(kl_divergence(Bernoulli(0.3), Bernoulli(0.5)).item(), abs=1e-5)
    assert report.kl["b"].mean == pytest.approx(0.3 * KL_COIN, abs=5 * 0.46 * KL_COIN / math.sqrt(100))
    assert report.how["b"] == "mean over draws"
