"""The proposal over very many addresses: sums to one, draws what it says, leaves out what it must."""

import math

import pytest
import torch

from vma_pyro.proposal import DefensiveCategorical

S, P, B, K, SHARE = 11, 4, 3, 5, 0.3


def proposal(*, left_out=None, dtype=torch.float64, **options):
    logits = torch.randn(B, P, dtype=dtype, generator=torch.Generator().manual_seed(0))
    return DefensiveCategorical(
        logits.requires_grad_(), torch.tensor([1, 4, 6, 10]), S, share=SHARE, left_out=left_out, **options
    )


OUT = torch.tensor([4, 0, 10])  # a candidate, none, the last candidate


@pytest.mark.parametrize("left_out", [None, OUT])
def test_all_addresses_together_have_probability_one(left_out):
    q = proposal(left_out=left_out)
    log_q = q.log_prob(q.enumerate_support())  # [S, B]
    assert log_q.dtype == torch.float64
    assert torch.allclose(log_q.logsumexp(0), torch.zeros(B, dtype=torch.float64), atol=1e-14)
    assert bool((log_q > -math.inf).sum() == S * B - (0 if left_out is None else B))


def test_it_is_the_mixture():
    q = proposal()
    expected = torch.full((S, B), SHARE / S, dtype=torch.float64)
    expected[q.candidates] += (1 - SHARE) * q.logits.softmax(-1).T
    assert torch.allclose(q.log_prob(q.enumerate_support(expand=False)).exp(), expected, atol=1e-15)


def test_the_gradient_is_that_of_the_mixture():
    q = proposal(left_out=OUT)
    logits = q.logits
    assert torch.autograd.gradcheck(
        lambda logits: DefensiveCategorical(logits, q.candidates, S, share=SHARE, left_out=OUT).log_prob(
            torch.tensor([[6, 1, 4], [0, 10, 6], [1, 5, 2]])
        ),
        (torch.randn(B, P, dtype=torch.float64, requires_grad=True),),
    )
    assert logits[0, 1] == -math.inf
    assert logits[2, 3] == -math.inf


@pytest.mark.parametrize("left_out", [None, OUT])
def test_it_draws_what_it_says(left_out):
    number = 200_000
    q = proposal(left_out=left_out).expand([K, B])
    torch.manual_seed(3)
    found = q.sample([number // K])
    assert found.shape == (number // K, K, B)
    counts = torch.stack([(found == a).sum((0, 1)) for a in range(S)]) / number
    expected = q.log_prob(torch.arange(S).reshape(-1, 1, 1))[:, 0].exp().detach()
    z = (counts - expected) / (expected * (1 - expected) / number).sqrt().clamp(min=1e-9)
    assert float(z.abs().max()) < 4.5  # of 33 counts
    if left_out is not None:
        assert not bool((found == left_out).any())


def test_expanded_it_is_the_same():
    q = proposal(left_out=OUT)
    value = torch.arange(S).reshape(S, 1, 1).expand(S, K, B)
    larger = q.expand([K, B])
    assert larger.batch_shape == (K, B)
    assert larger.enumerate_support().shape == (S, K, B)
    assert torch.equal(larger.log_prob(value)[:, 2], q.log_prob(value[:, 2]))
    one = DefensiveCategorical(torch.zeros(1, P), q.candidates, S, share=SHARE).expand([2, B])
    assert one.sample().shape == (2, B)
    assert one.log_prob(one.sample()).shape == (2, B)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"candidates": torch.tensor([0, 1, 2])},
            r"candidates: expected 4 addresses, one for each logit, got shape \[3\]",
        ),
        (
            {"candidates": torch.tensor([0, 2, 2, 3])},
            "candidates: expected sorted and distinct addresses from 0 to 10",
        ),
        (
            {"candidates": torch.tensor([0, 2, 3, 11])},
            "candidates: expected sorted and distinct addresses from 0 to 10",
        ),
        ({"share": 0.0}, "share: expected between 0 and 1, as no address may be impossible, got 0.0"),
        ({"share": 1.0}, "share: expected between 0 and 1"),
    ],
)
def test_what_is_refused(arguments, message):
    given = {"candidates": torch.arange(P), "share": SHARE} | arguments
    with pytest.raises(ValueError, match=message):
        DefensiveCategorical(torch.zeros(B, P), given["candidates"], S, share=given["share"])


def test_a_single_candidate_that_is_left_out_is_refused():
    said = "candidates: expected one of a probability above 0 beside the address that is left out, got none"
    with pytest.raises(ValueError, match=said):
        DefensiveCategorical(torch.zeros(1, 1), torch.tensor([2]), S, share=SHARE, left_out=torch.tensor([2]))


def test_candidates_that_are_all_ruled_out_are_refused():
    logits = torch.tensor([[0.0, -math.inf], [-math.inf, -math.inf]])
    with pytest.raises(ValueError, match="candidates: expected one of a probability above 0, got none"):
        DefensiveCategorical(logits, torch.tensor([2, 5]), S, share=SHARE)


def test_logits_of_16_bits_make_probabilities_of_32():
    q = DefensiveCategorical(proposal().logits.bfloat16(), torch.tensor([1, 4, 6, 10]), 1000, share=SHARE)
    log_q = q.log_prob(q.enumerate_support())
    assert log_q.dtype == torch.float32
    assert torch.allclose(log_q.logsumexp(0), torch.zeros(B), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"left_out": torch.tensor([0, 11, 2])}, "^left_out: expected 0 to 10, got 0 to 11$"),
        ({"left_out": torch.tensor([0, -1, 2])}, "^left_out: expected 0 to 10, got -1 to 2$"),
        (
            {"candidates": torch.tensor([1.0, 4, 6, 10])},
            "^candidates: expected one or more of int64, got 4 of torch.fl",
        ),
        (
            {"logits": torch.tensor([0, 1, 2, math.inf])},
            "^logits: expected finite values, or -inf for what is ruled",
        ),
        (
            {"logits": torch.zeros(3, 0), "candidates": torch.zeros(0).long()},
            "^candidates: expected one or more of int64, got 0 of torch.int64$",
        ),
    ],
)
def test_what_is_no_proposal_is_refused(change, message):
    arguments = {"logits": torch.zeros(B, P), "candidates": torch.tensor([1, 4, 6, 10]), "size": S} | change
    with pytest.raises(ValueError, match=message):
        DefensiveCategorical(**arguments, share=SHARE, validate_args=True)
