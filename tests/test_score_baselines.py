"""Score baselines against slow float64 references."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vma_pyro.infer import (
    OVIS,
    OVISMonteCarlo,
    leave_one_out_logsumexp,
    loo,
    reinforce,
    vimco,
    vimco_geometric,
)


def others(log_w, k):
    return torch.cat([log_w[:k], log_w[k + 1 :]]).double()


def slow_loo(log_w):
    return torch.stack([others(log_w, k).logsumexp(0) for k in range(len(log_w))])


def test_formulas():
    log_w = torch.randn(6, 3, dtype=torch.float64) * 5
    rest = slow_loo(log_w)
    geometric = torch.stack([others(log_w, k).mean(0) for k in range(6)])
    torch.testing.assert_close(vimco(log_w), rest - math.log(5))
    torch.testing.assert_close(loo(log_w), rest - math.log(6))
    torch.testing.assert_close(vimco_geometric(log_w), torch.logaddexp(rest, geometric) - math.log(6))
    assert reinforce(log_w).abs().max() == 0


def test_geometric_and_arithmetic_vimco_agree_for_two_particles():
    log_w = torch.randn(2, 7, dtype=torch.float64)
    torch.testing.assert_close(vimco(log_w), vimco_geometric(log_w))


@pytest.mark.parametrize("baseline", [vimco, vimco_geometric, loo])
def test_baseline_k_ignores_particle_k(baseline):
    log_w = torch.randn(5, 3)
    changed = log_w.clone()
    changed[2] += 50
    torch.testing.assert_close(baseline(log_w)[2], baseline(changed)[2])
    assert (baseline(log_w)[0] != baseline(changed)[0]).all()


@pytest.mark.parametrize("k", [2, 17, 1024])
@pytest.mark.parametrize("gap", [0.0, 17.0, 100.0])
def test_leave_one_out_in_float32_with_large_gaps(k, gap):
    log_w = torch.randn(k, 4)
    log_w[torch.arange(4) % k, torch.arange(4)] += gap
    log_w[-1, 0] = -math.inf
    torch.testing.assert_close(leave_one_out_logsumexp(log_w).double(), slow_loo(log_w), rtol=1e-5, atol=1e-4)


@given(st.lists(st.one_of(st.floats(-200, 200), st.just(-math.inf)), min_size=2, max_size=40))
@settings(deadline=None, max_examples=200)
def test_leave_one_out_of_any_weights(values):
    log_w = torch.tensor(values)[:, None]
    got = leave_one_out_logsumexp(log_w)
    assert not got.isnan().any()
    torch.testing.assert_close(got.double(), slow_loo(log_w), rtol=1e-5, atol=1e-3)
    assert not vimco_geometric(log_w).isnan().any()
    assert not loo(log_w).isnan().any()
    assert not OVIS(0.5)(log_w).isnan().any()
    assert not OVISMonteCarlo(3)(log_w, torch.tensor([[0.0], [-math.inf], [5.0]])).isnan().any()


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=12), st.floats(-100, 100), st.integers(0, 11))
@settings(deadline=None, max_examples=100)
def test_a_shift_of_all_weights_shifts_every_baseline(values, shift, k):
    """log p(x) times a constant moves bound and baselines alike: the learning signal does not change."""
    log_w = torch.tensor(values, dtype=torch.float64)[:, None]
    for baseline in (vimco, vimco_geometric, loo, OVIS(1.0)):
        torch.testing.assert_close(baseline(log_w + shift), baseline(log_w) + shift, rtol=1e-9, atol=1e-9)
    # And no baseline but OVIS's looks at particle k.
    changed = log_w.clone()
    changed[k % len(values)] += 3.0
    for baseline in (vimco, vimco_geometric, loo):
        row = k % len(values)
        torch.testing.assert_close(baseline(changed)[row], baseline(log_w)[row], rtol=1e-9, atol=1e-9)


def test_ovis_at_its_ends():
    log_w = torch.randn(6, 3, dtype=torch.float64) * 3
    torch.testing.assert_close(OVIS(0.0)(log_w), loo(log_w))
    torch.testing.assert_close(OVIS(1.0)(log_w), vimco(log_w) - log_w.softmax(0))
    assert OVIS(0.0).unbiased
    assert not OVIS(0.1).unbiased


def test_ovis_monte_carlo_puts_fresh_particles_into_slot_k():
    log_w, fresh = torch.randn(4, 2, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    want = torch.stack(
        [
            torch.stack([torch.cat([others(log_w, k), f[None]]).logsumexp(0) - math.log(4) for f in fresh]).mean(0)
            for k in range(4)
        ]
    )
    torch.testing.assert_close(OVISMonteCarlo(3)(log_w, fresh), want)
