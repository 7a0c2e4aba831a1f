"""The split of the bound where values are given, where there is none, and with padding; and its report."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoNormal
from sites import (
    CLASSES,
    ENTRIES,
    KL_STYLE,
    LOGITS,
    NOISE,
    TABLES,
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
from torch.distributions import Normal, kl_divergence

from vma_pyro import Memory
from vma_pyro.evaluation import BoundParts, address_posterior, kl_report, split_bound

# --- values that are given, and sites of one program only

GIVEN = {"address": torch.tensor([0, 1, 2, 3, 0, 1])}


def plain(which, x):
    a = sample_address(which)
    observe(which, "x", ENTRIES[a] + sample_z(which), x)


def conditioned(program):
    return pyro.condition(program, data=GIVEN)


@pytest.mark.parametrize("hidden", [False, True])
def test_an_address_that_is_given_is_observed(hidden):
    """log p(a) is a part of what is observed, and nothing is looked up."""
    model, guide = (conditioned(program) for program in programs(plain))
    if hidden:
        guide = poutine.block(guide, hide=["address"])
    split = split_bound(model, guide, ENTRIES, X, num_samples=K)
    torch.testing.assert_close(split.observed["address"], LOGITS["p"].log_softmax(0)[GIVEN["address"]])
    mean = ENTRIES[GIVEN["address"]] + 0.3
    torch.testing.assert_close(split.observed["x"], expected_log_normal(X, mean, 0.49), atol=NOISE, rtol=0)
    assert list(split.kl) == ["z"]
    assert (split.kl_address == 0).all()
    assert torch.equal(split.address_probs, torch.eye(S)[GIVEN["address"]])


def test_a_style_that_is_given_is_observed():
    def body(which, x):
        s = pyro.sample("style", dist.Categorical(logits=CLASSES[which]))
        a = sample_address(which, TABLES[which][s])
        observe(which, "x", ENTRIES[a], x)

    style = {"style": torch.tensor([0, 1, 2, 0, 1, 2])}
    model, guide = (pyro.condition(program, data=style) for program in programs(body))
    split = split_bound(model, guide, ENTRIES, X, num_samples=2)
    rows = {which: TABLES[which][style["style"]] for which in "pq"}
    torch.testing.assert_close(split.kl_address, kl_of(rows["q"], rows["p"]))
    torch.testing.assert_close(split.observed["style"], CLASSES["p"].log_softmax(0)[style["style"]])
    torch.testing.assert_close(address_posterior(guide, ENTRIES, X), rows["q"].softmax(-1))


def test_marks_for_enumeration_change_no_part():
    model, guide = programs(style_after)
    split = split_bound(config_enumerate(model), config_enumerate(guide), ENTRIES, X, num_samples=3)
    torch.testing.assert_close(split.kl["style"], torch.full((B,), KL_STYLE))


def test_an_autoguide_and_its_base():
    """z is what follows from the base: the two parts are KL(q(z) || p(z))."""
    model = programs(no_address)[0]
    guide = AutoNormal(lambda memory, x: model(memory, x), init_scale=0.7)
    guide(ENTRIES, X)
    loc, scale = guide.locs.z.detach(), guide.scales.z.detach()
    split = split_bound(model, guide, ENTRIES, X, num_samples=K)
    assert set(split.kl) == {"z", "z_unconstrained"}
    expected = kl_divergence(Normal(loc, scale), Normal(0.0, 1.0))
    torch.testing.assert_close(split.kl_z, expected, atol=NOISE, rtol=0)


def model_alone(which, x):
    if which == "p":
        pyro.sample("c", dist.Categorical(logits=torch.zeros(2)), infer={"enumerate": "parallel"})
    plain(which, x)


def discrete_auxiliary(which, x):
    if which == "q":
        pyro.sample("c", dist.Categorical(logits=torch.zeros(2)), infer={"is_auxiliary": True})
    plain(which, x)


def continuous_auxiliary(which, x):
    if which == "q":
        pyro.sample("c", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
    plain(which, x)


def several_addresses(which, x):
    with pyro.plate("reads", 2, dim=-2):
        a = sample_address(which)
    observe(which, "x", ENTRIES[a].sum(-2, keepdim=True), x)


def no_finite_address(which, x):
    observe(which, "x", pyro.sample("address", dist.Poisson(2.0)), x)


def more_values(which, x):
    sample_address(which, torch.zeros(S + 1) if which == "q" else None)
    observe(which, "x", 0.0, x)


def undeclared(which, x):
    observe(which, "x", sample_z(which), x[:, None])


def undeclared_latent(which, x):
    z = pyro.sample("z", dist.Normal(torch.zeros(3, len(x)), 1.0))
    observe(which, "x", z.sum(-2), x)


def another_size(which, x):
    with pyro.plate("data", 3):
        plain(which, x[:3])


def outside(which, x):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        observe(which, "x", w + sample_z(which), x)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (model_alone, "site 'c': expected in the guide as in the model, guide has ['address', 'z']"),
        (discrete_auxiliary, "site 'c': expected in the model as in the guide, even as an auxiliary one"),
        (continuous_auxiliary, "site 'c': expected latents that are a function of all of this auxiliary site"),
        (several_addresses, "site 'address': expected in the plate 'data' alone"),
        (no_finite_address, "site 'address': expected a finite support, got Poisson"),
        (more_values, "site 'address': expected at most 4 values in the guide as in the model, got 5"),
        (undeclared, "site 'x': expected a log probability of shape [6]"),
        (undeclared_latent, "site 'z': expected a log probability of shape [6]"),
        (another_size, "x: expected 3 datapoints, as plate 'data' of site 'address' has, got 6"),
        (outside, "site 'w': expected inside the batch plates ['data'], found in []"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_has_no_split_is_refused_in_one_line(body, message):
    bare = body in (another_size, outside)
    pair = [lambda memory, x, w=w: body(w, x) for w in "pq"] if bare else programs(body)
    for samples in (1, B):
        with pytest.raises(ValueError, match="^[^\n]*$") as error:
            split_bound(*pair, ENTRIES, X, num_samples=samples)
        assert str(error.value).startswith(message)


def test_a_value_given_in_the_guide_alone_is_refused():
    model, guide = programs(plain)
    with pytest.raises(
        ValueError, match=r"^site 'address': expected its value given in the model as in the guide, [^\n]*$"
    ):
        split_bound(model, conditioned(guide), ENTRIES, X)
    with pytest.raises(
        ValueError, match=r"^site 'address': expected drawn in both programs or given in both, [^\n]*$"
    ):
        kl_report(conditioned(model), guide, ENTRIES, X)
    with pytest.raises(ValueError, match="^num_samples: expected at least 1, got 0$"):
        split_bound(model, guide, ENTRIES, X, num_samples=0)
    with pytest.raises(ValueError, match="^num_samples: expected at least 1, got 0$"):
        address_posterior(guide, ENTRIES, X, num_samples=0)


# --- memories of different sizes


class PaddedMemory(Memory):
    """With the entries that are there, as every memory may have."""

    def __init__(self, entries, mask, labels=None):
        super().__init__(entries, labels, event_dim=1)
        self.mask = mask


def padded(mask, impossible=False):
    def body(which, x):
        logits = LOGITS[which].expand(len(x), -1).masked_fill(~mask, -math.inf)
        if impossible and which == "p":
            logits = logits.masked_fill(torch.arange(S) == 0, -math.inf)
        sample_address(which, logits)
        observe(which, "x", 0.0, x)

    return programs(body)


SIZES = torch.tensor([1, 2, 3, 4, 2, 3])


@pytest.mark.parametrize("own", [True, False])
def test_padding_costs_nothing_and_counts_for_nothing(own):
    mask = torch.arange(S) < SIZES[:, None] if own else torch.tensor([True, True, True, False])
    sizes = SIZES if own else torch.full((B,), 3)
    memory = PaddedMemory(torch.randn(B, S, 1) if own else torch.randn(S, 1), mask)
    report = kl_report(*padded(mask), memory, X, num_samples=3)
    each = [kl_of(LOGITS["q"][:n], LOGITS["p"][:n]).item() for n in sizes]
    assert report.kl_address.mean == pytest.approx(sum(each) / B, rel=1e-5)
    assert report.log_memory == pytest.approx(sizes.double().log().mean().item(), rel=1e-12)
    shares = [kl / math.log(n) if n > 1 else 0.0 for kl, n in zip(each, sizes.tolist(), strict=True)]
    assert report.kl_address_share.mean == pytest.approx(sum(shares) / B, rel=1e-5, abs=1e-7)
    assert (report.mutual_information is None) == own


def test_an_address_that_p_rules_out_costs_without_end():
    mask = torch.ones(B, S, dtype=torch.bool)
    split = split_bound(*padded(mask, impossible=True), ENTRIES, X)
    assert (split.kl_address == math.inf).all()


# --- reports


def test_a_report_has_a_line_for_every_site():
    report = kl_report(*programs(by_the_entry), ENTRIES, X, num_samples=2)
    labels = [label for label, _ in report.parts()]
    assert labels == ["minus reconstruction of x", "KL(a), exact", "KL(style), mean over draws", "KL(z1), sampled"]
    assert [line.partition(":")[0] for line in str(report).splitlines()] == ["NLL, 2 samples", *labels]


def test_the_right_class_needs_an_address():
    memory = Memory(ENTRIES[:, None], torch.zeros(S, dtype=torch.long), event_dim=1)
    labels = torch.zeros(B, dtype=torch.long)
    assert kl_report(*programs(no_address), memory, X, labels=labels, num_samples=2).right_class is None
    assert kl_report(*programs(plain), memory, X, labels=labels, num_samples=2).right_class.mean == pytest.approx(
        1
    )
    few = Memory(ENTRIES[:3, None], torch.zeros(3, dtype=torch.long), event_dim=1)
    with pytest.raises(ValueError, match="^memory.labels: expected one label for each of 4 addresses, got 3$"):
        kl_report(*programs(plain), few, X, labels=labels, num_samples=2)


def test_a_split_of_given_figures_needs_no_sites():
    split = BoundParts(torch.zeros(1), torch.zeros(1), torch.zeros(1), torch.ones(1, 1))
    assert (dict(split.kl), dict(split.observed), dict(split.how)) == ({}, {}, {})
