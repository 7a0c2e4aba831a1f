"""What every estimator says of programs outside its contract: the right value, or one line that names the site."""

import math
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from vma_pyro.infer import BINARY, ESTIMATORS, OVIS, dreg, iwae, loo, make, reinforce, vimco

N = 4
BITS = False  # whether the discrete site is a Bernoulli instead of a categorical one of three values
X = torch.tensor([0.3, 1.0, -0.5, 0.2])
Q, LOC = torch.zeros(N, 3, requires_grad=True), torch.zeros(N, requires_grad=True)


@pytest.fixture(autouse=True)
def of_binary_values(request, monkeypatch):
    """The same programs with a bit, for estimators of nothing else."""
    parameters = getattr(request.node, "callspec", None)
    name = parameters.params.get("name") if parameters else None
    monkeypatch.setattr(sys.modules[__name__], "BITS", name in BINARY)


def discrete(logits):
    """A site of three values, or of the first two."""
    return dist.Bernoulli(logits=logits[..., 1] - logits[..., 0]) if BITS else dist.Categorical(logits=logits)


def known():
    return KNOWN.clamp(max=1).float() if BITS else KNOWN


def model(x, **infer):
    with pyro.plate("data", N):
        a = pyro.sample("a", discrete(torch.zeros(3)), infer=dict(infer))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        soft = a.is_floating_point() and not BITS
        weights = a if soft else torch.nn.functional.one_hot(a.long(), 3).float()  # read softly
        pyro.sample("x", dist.Normal(z + weights @ torch.tensor([-1.0, 0.2, 1.5]), 1.0), obs=x)


def guide(x, of_a=None, of_z=None):
    with pyro.plate("data", N):
        pyro.sample("a", discrete(Q), infer=dict(of_a or {}))
        pyro.sample("z", dist.Normal(LOC, 1.0), infer=dict(of_z or {}))


def outcome(name, model, guide, *, K=3):
    """Loss and gradient of one draw, or the error."""
    torch.manual_seed(0)
    try:
        loss = make(name, K, site="a").differentiable_loss(model, guide, X)
    except Exception as error:
        return error
    gradients = torch.autograd.grad(loss, [Q, LOC], allow_unused=True) if loss.requires_grad else (None, None)
    return torch.cat([loss.detach()[None], *(torch.zeros(N) if g is None else g.flatten() for g in gradients)])


def refused(found, site):
    """One line that names the site; a silent figure or another error fails."""
    assert isinstance(found, ValueError), f"not refused: {found!r}"
    assert "\n" not in str(found), found
    assert f"'{site}'" in str(found), found


@pytest.mark.parametrize("name", ESTIMATORS)
def test_what_a_site_asks_for_is_served_or_refused(name):
    plain = outcome(name, model, guide)
    assert torch.is_tensor(plain), plain
    honours = make(name, 3, site="a")
    for asked, site in ((loo, "a"), (reinforce, "a"), (OVIS(0.5), "a"), (dreg, "z"), (iwae, "z")):
        options = {f"of_{site}": {"estimator": asked}}
        found = outcome(name, model, lambda x, o=options: guide(x, **o))
        if not torch.is_tensor(found):
            refused(found, site)
            continue
        own = getattr(honours, "baseline" if site == "a" else "pathwise", None)
        same = own is asked or (own is None and asked is iwae)
        same = same or (name == "nvil" and asked is reinforce)  # whose running mean is still zero
        assert torch.equal(found, plain) == same, (asked, own)


@pytest.mark.parametrize("asked", ["vimco", 3, {"baseline": vimco}])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_name_in_place_of_the_object_is_refused(name, asked):
    refused(outcome(name, model, lambda x: guide(x, of_a={"estimator": asked})), "a")
    refused(outcome(name, model, lambda x: guide(x, of_z={"estimator": asked})), "z")


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_option_under_another_key_or_at_the_model_is_refused(name):
    refused(outcome(name, model, lambda x: guide(x, of_a={"estimater": loo})), "a")
    refused(outcome(name, model, lambda x: guide(x, of_z={"rule": dreg})), "z")
    refused(outcome(name, lambda x: model(x, estimator=loo), guide), "a")


KNOWN = torch.tensor([0, 2, 1, 2])


def evidence_of_known():
    """-log p(x, a) of the model, z integrated: by hand."""
    mean = torch.tensor([-1.0, 0.2, 1.5])[known().long()]
    return -(dist.Normal(mean, 2**0.5).log_prob(X) - math.log(2 if BITS else 3)).sum().item()


def posterior_given(x, given=True):
    """z at its posterior given the known class."""
    mean = (x - torch.tensor([-1.0, 0.2, 1.5])[known().long()]) / 2
    with pyro.plate("data", N):
        pyro.sample("a", discrete(Q), obs=known() if given else None)
        pyro.sample("z", dist.Normal(mean, 0.5**0.5))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_given_value(name):
    """At the posterior of the rest the loss is -log p(x, a) whatever is drawn, and q(a) learns nothing."""
    conditioned = pyro.condition(model, {"a": known()})
    found = outcome(name, conditioned, posterior_given)
    if torch.is_tensor(found):
        assert found[0].item() == pytest.approx(evidence_of_known(), rel=1e-5)
        assert found[1:].abs().max() == 0
    else:
        refused(found, "a")
    refused(outcome(name, conditioned, lambda x: posterior_given(x, given=False)), "a")
    refused(outcome(name, model, posterior_given), "a")


@pytest.mark.parametrize("handler", [{"mask": torch.tensor([True, False, True, True])}, {"scale": 0.3}])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_another_power_in_the_guide_than_in_the_model(name, handler):
    around = poutine.mask if "mask" in handler else poutine.scale

    def at(program, site):
        def handled(x):
            with AtSite(site, around(**handler)):
                program(x)

        return handled

    for site in ("a", "z"):
        refused(outcome(name, model, at(guide, site)), site)
        refused(outcome(name, at(model, site), guide), site)


class AtSite(poutine.messenger.Messenger):
    """A handler for one site alone."""

    def __init__(self, site, handler):
        super().__init__()
        self.site, self.handler = site, handler

    def _pyro_sample(self, msg):
        if msg["name"] == self.site:
            self.handler._process_message(msg)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_auxiliary_discrete_site(name):
    def with_auxiliary(x):
        with pyro.plate("data", N):
            pyro.sample("c", dist.Bernoulli(0.4), infer={"is_auxiliary": True})
            pyro.sample("a", discrete(Q))
            pyro.sample("z", dist.Normal(LOC, 1.0))

    refused(outcome(name, model, with_auxiliary), "c")


@pytest.mark.parametrize("K", [2, 3, N])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_dimension_that_no_plate_declares(name, K):
    if name in ("unordered-set", "sum-and-sample", "distinct", "distinct+wake", "priority") and K > 3:
        K = 3  # values of the site
    refused(outcome(name, lambda x: model(x[:, None]), guide, K=K), "x")


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_site_under_a_condition(name):
    """One datapoint, all particles at once: none can look at a single value; the line says what to do."""

    def conditional(program):
        def run(x):
            with pyro.plate("data", 1):
                a = pyro.sample("a", discrete(Q[:1] if program == "guide" else torch.zeros(1, 3)))
                if a.item() == 1:
                    pyro.sample("b", dist.Bernoulli(0.5))
                if program == "model":
                    pyro.sample("x", dist.Normal(1.0 * a, 1.0), obs=x[:1])

        return run

    found = outcome(name, conditional("model"), conditional("guide"), K=2)
    assert isinstance(found, ValueError), found
    assert "\n" not in str(found)
