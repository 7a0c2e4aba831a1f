r"""A neural topic model: topic weights of each document, a discrete topic of each word (after ProdLDA).

.. math::
    \eta_d \sim \mathcal N(0, I), \quad \theta_d = \mathrm{softmax}(\eta_d, 0), \qquad
    t_{dn} \sim \mathrm{Categorical}(\theta_d), \qquad w_{dn} \sim \mathrm{Categorical}(\beta_{t_{dn}})

(Blei & Lafferty 2007; the amortised guide after Srivastava & Sutton 2017.) Documents differ in length: words
beyond the end are masked, in the model as in the guide. Departures: the topics of words stay latent, where
ProdLDA sums them out; the last weight has logit 0, as a shift of all of them changes nothing. The topics beta are
known, so that the guide alone learns.
"""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from pyro import poutine
from torch import Tensor, nn

from .interface import Field
from .quadrature import lattice

TOPICS, VOCABULARY = 4, 24
DOCUMENTS, SHORTEST, LONGEST = 64, 6, 12
POINTS = 31  # of the quadrature, in each of TOPICS - 1 dimensions


def log_weights_of(eta: Float[Tensor, "*N T-1"]) -> Float[Tensor, "*N T"]:
    """Compute log theta of logits without the last one, which is 0."""
    return F.pad(eta, (0, 1)).log_softmax(-1)


class Topics(nn.Module):
    """p(eta) prod_n p(t_n | eta) p(w_n | t_n)."""

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        logits = 2.5 * torch.randn(TOPICS, VOCABULARY, generator=generator)
        self.log_beta = nn.Parameter(logits.log_softmax(-1), requires_grad=False)

    def forward(self, words: Int64[Tensor, "D L"], present: Bool[Tensor, "D L"]) -> Any:
        """Words as numbers, and where there are any."""
        with pyro.plate("data", words.shape[0], dim=-2):
            eta = pyro.sample("eta", dist.Normal(torch.zeros(words.shape[0], 1, TOPICS - 1), 1.0).to_event(1))
            with (
                pyro.plate("words", words.shape[1], dim=-1),
                poutine.mask(mask=present),  # type: ignore[call-overload]  # Pyro's types ask for an older class
            ):
                topic = pyro.sample("topic", dist.OneHotCategorical(logits=log_weights_of(eta)))
                # Soft weights of topics mix their words, as the relaxations need.
                return pyro.sample("word", dist.Categorical(probs=topic @ self.log_beta.exp()), obs=words)


class Inference(nn.Module):
    """q(eta | w) by a network on the counts of words, and q(t_n | w_n, eta) as theta_t gamma_{t, w_n}.

    The second has the posterior's own form, with gamma in the place of beta.
    """

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.network = nn.Sequential(nn.Linear(VOCABULARY, 64), nn.Tanh(), nn.Linear(64, 2 * (TOPICS - 1)))
        self.log_gamma = nn.Parameter(torch.zeros(TOPICS, VOCABULARY))

    def forward(self, words: Int64[Tensor, "D L"], present: Bool[Tensor, "D L"]) -> None:
        """The same arguments as the model's."""
        loc, log_scale = self.network(counts(words, present))[:, None].chunk(2, -1)  # [D, 1, T - 1]
        with pyro.plate("data", words.shape[0], dim=-2):
            eta = pyro.sample("eta", dist.Normal(loc, log_scale.exp()).to_event(1))
            logits = log_weights_of(eta) + self.log_gamma.T[words]  # [*K, D, L, T]
            # A masked draw counts nothing, but it is drawn: its score would be noise, if it had parameters.
            logits = logits.masked_fill(~present[..., None], 0.0)
            with (
                pyro.plate("words", words.shape[1], dim=-1),
                poutine.mask(mask=present),  # type: ignore[call-overload]
            ):
                pyro.sample("topic", dist.OneHotCategorical(logits=logits))


def counts(words: Int64[Tensor, "D L"], present: Bool[Tensor, "D L"]) -> Float[Tensor, "D V"]:
    """Count each word of the vocabulary in each document."""
    return (F.one_hot(words, VOCABULARY) * present[..., None]).sum(1).float()


def data(model: Topics, *, seed: int = 0) -> tuple[Int64[Tensor, "D L"], Bool[Tensor, "D L"]]:
    """Let the model write documents of different lengths; beyond the end stands word 0."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        lengths = torch.randint(SHORTEST, LONGEST + 1, (DOCUMENTS, 1))
        present = torch.arange(LONGEST) < lengths
        words = poutine.uncondition(model)(torch.zeros_like(present, dtype=torch.long), present)
    return torch.where(present, words, 0), present


def log_evidence(
    model: Topics, words: Int64[Tensor, "D L"], present: Bool[Tensor, "D L"], *, points: int = POINTS
) -> Float[Tensor, " D"]:
    """Compute log p(w) of each document in nats: the topics of words are summed, eta by quadrature."""
    eta, log_weight = lattice(TOPICS - 1, points)
    log_word = (log_weights_of(eta).exp() @ model.log_beta.double().exp()).log()  # [N, V]
    return (log_weight + counts(words, present).double() @ log_word.T).logsumexp(1)


def field(*, seed: int = 0) -> Field:
    """The program with documents of its own making; only the guide is trained."""
    model = Topics(seed=seed)
    words, present = data(model, seed=seed)
    return Field(
        model=model,
        guide=Inference(seed=seed),
        args=(words, present),
        batch_plates=("data",),
        site="topic",
        evidence=log_evidence(model, words, present).sum().item(),
        error=0.0,
        how=f"the topics of words summed exactly, eta by quadrature on {POINTS}^{TOPICS - 1} nodes",
        learns_model=False,
    )
