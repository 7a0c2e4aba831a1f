"""Every estimator on memories of different sizes in one batch: one call per datapoint on its own memory."""

import itertools
import math

import pytest
import torch
from padded import S, log_terms, setting

from programs import CATEGORICAL
from vma_pyro import Memory
from vma_pyro.infer import ESTIMATORS, make


class TestEstimators:
    """Two particles (or values) for 150 copies of each datapoint; expectations by enumeration, z bound 4.5."""

    COPIES = 150

    @staticmethod
    def bound(name, log_joint, log_q, k):
        """The objective of `name` as a random variable: its values and their probabilities."""
        log_w, n = log_joint - log_q, len(log_q)
        q = log_q.exp()
        kind = ESTIMATORS[name](k, "address", 1)
        if kind.objective == "exact":
            return [(log_joint.logsumexp(0), 1.0)]
        if name == "pyro-enum":
            return [((q * log_w).sum(), 1.0)]
        if name in ("distinct", "distinct+wake", "sum-and-sample"):
            best, rest = int(log_q.argmax()), [a for a in range(n) if a != int(log_q.argmax())]
            if not rest:
                return [(log_joint[best] if name != "sum-and-sample" else log_w[best], 1.0)]
            left = q[rest].sum()
            if name == "sum-and-sample":
                return [(q[best] * log_w[best] + left * log_w[a], q[a] / left) for a in rest]
            return [(torch.logaddexp(log_joint[best], left.log() + log_w[a]), q[a] / left) for a in rest]
        if name == "wake-wake-defensive":
            q = 0.9 * q + 0.1 / n
            log_w = log_joint - q.log()
        values = []
        for pair in itertools.product(range(n), repeat=k):
            w, probability = log_w[list(pair)], q[list(pair)].prod()
            if kind.objective == "elbo":
                value = w.mean()
            elif kind.objective == "tvo":
                value = sum(
                    (end - beta) * ((beta * w).softmax(0) * w).sum()
                    for beta, end in ((0.0, 0.1), (0.1, 0.3), (0.3, 1.0))
                )
            else:
                value = w.logsumexp(0) - math.log(k)
            values.append((value, probability))
        return values

    @staticmethod
    def repeated(padded, x, copies):
        index = torch.arange(len(x)).repeat_interleave(copies)
        return Memory(padded.entries[index], mask=padded.mask[index]), x[index]

    @pytest.mark.parametrize("name", CATEGORICAL)
    def test_loss_and_gradients(self, name):
        model, guide, own, padded, x = setting(holes=True)
        elbo = make(name, 2)(model, guide)
        loss = elbo(*self.repeated(padded, x, self.COPIES))
        loss.backward()
        assert math.isfinite(loss.item())
        assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in elbo.parameters())
        assert model.networks.to_logits[0].weight.grad.abs().sum() > 0
        if name in ("gumbel-softmax", "unordered-set", "priority"):
            return  # no short enumeration; with all values, or in the limit, see below
        mean = variance = 0.0
        for b, memory in enumerate(own):
            values = self.bound(name, *log_terms(model, guide, memory, x[b : b + 1]), 2)
            first = sum(float(p * v) for v, p in values)
            mean += self.COPIES * first
            variance += self.COPIES * sum(float(p * (v - first) ** 2) for v, p in values)
        assert abs(-loss.item() - mean) < 4.5 * math.sqrt(variance) + 1e-5 * abs(mean)

    @pytest.mark.parametrize(
        "name", ["exact", "distinct", "priority", "unordered-set", "sum-and-sample", "pyro-enum"]
    )
    def test_more_values_than_entries_are_all_of_them(self, name):
        """Then nothing is random: loss and gradient of each datapoint on its own memory."""
        model, guide, own, padded, x = setting(holes=True)
        elbo = make(name, S)(model, guide)
        loss = elbo(padded, x)
        loss.backward()
        gradients = [p.grad.clone() for p in elbo.parameters() if p.grad is not None]
        elbo.zero_grad()
        total = 0.0
        for b, memory in enumerate(own):
            exact = {"distinct": "exact", "priority": "exact"}.get(name, name if name == "exact" else "pyro-enum")
            alone = make(exact, 1)(model, guide)(memory, x[b : b + 1])
            alone.backward()
            total += alone.item()
            values = self.bound(exact, *log_terms(model, guide, memory, x[b : b + 1]), 1)
            assert alone.item() == pytest.approx(-float(values[0][0]), rel=1e-5)
        assert loss.item() == pytest.approx(total, rel=1e-5)
        if name not in ("distinct", "priority"):  # whose gradients hold the choice of values fixed
            expected = [p.grad for p in elbo.parameters() if p.grad is not None]
            for ours, theirs in zip(gradients, expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)

    def test_a_cold_relaxation_is_the_discrete_program(self):
        """gumbel-softmax: the mean over draws is that of straight-through, which sees hard values."""
        from vma_pyro.infer import RelaxedELBO, gumbel_softmax, gumbel_straight_through

        model, guide, _, padded, x = setting()
        memory, copies = self.repeated(padded, x, self.COPIES)
        losses = []
        for relaxation in (gumbel_straight_through, gumbel_softmax):
            torch.manual_seed(0)
            elbo = RelaxedELBO(2, temperature=1e-3, relaxation=relaxation)
            losses.append(elbo(model, guide)(memory, copies).item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
