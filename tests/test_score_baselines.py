"""Score baselines against slow float64 references."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vma_pyro.infer import leave_one_out_logsumexp, loo, reinforce, vimco, vimco_geometric


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
