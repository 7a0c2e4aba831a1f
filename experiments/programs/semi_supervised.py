r"""The semi-supervised VAE: the class of an image is given for some and latent for the others.

.. math::
    y \sim \mathrm{Categorical}(1/C), \qquad z \sim \mathcal N(0, I), \qquad
    x_p \sim \mathrm{Bernoulli}(\sigma(f_{yp} + \textstyle\sum_j z_j g_{yjp}))

(Kingma et al. 2014, model M2.) Pyro's `obs_mask` says of which images the class is given: there log p counts it,
and the guide, under the opposite mask, draws none. Departures: the images are the model's own, around small
characters; the decoder is linear in z, one for each class, and known, so that the guide alone learns. To learn it
as well, `model.requires_grad_()`. Given classes then teach q(y | x) nothing directly; Kingma's classification
loss is one more term beside an estimator's, alpha times the cross entropy of `guide.classes` on those images.
"""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pyro import poutine
from torch import Tensor, nn

from vma_pyro.data import glyphs

from .interface import Field
from .quadrature import lattice

CLASSES, FACTORS, SIDE = 5, 2, 7
IMAGES, LABELLED = 80, 20
POINTS = 61  # of the quadrature, in each of FACTORS dimensions


class Images(nn.Module):
    """p(y) p(z) p(x | y, z)."""

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        characters = torch.from_numpy(glyphs.load(classes=CLASSES, seed=seed).images).float()  # [C, E, 28, 28]
        ink = F.avg_pool2d(characters.mean(1), characters.shape[-1] // SIDE).flatten(1)  # [C, P]
        generator = torch.Generator().manual_seed(seed)
        styles = torch.randn(CLASSES, FACTORS, SIDE * SIDE, generator=generator)
        self.ink = nn.Parameter(6 * ink - 2, requires_grad=False)
        self.styles = nn.Parameter(0.7 * styles, requires_grad=False)

    def forward(self, x: Float[Tensor, "B P"], labels: Float[Tensor, "B C"], given: Bool[Tensor, " B"]) -> Any:
        """Images of 0 and 1, their classes as one-hot rows, and whether a class is given."""
        with pyro.plate("data", len(x)):
            prior = dist.OneHotCategorical(logits=torch.zeros(CLASSES))
            y = pyro.sample("y", prior, obs=labels, obs_mask=given)  # type: ignore[arg-type]  # a Tensor will do
            z = pyro.sample("z", dist.Normal(torch.zeros(FACTORS), 1.0).to_event(1))
            pixels = dist.Bernoulli(logits=self.logits(y, z)).to_event(1)
            return y, pyro.sample("x", pixels, obs=x)

    def logits(self, y: Float[Tensor, "*N C"], z: Float[Tensor, "*N J"]) -> Float[Tensor, "*N P"]:
        """Decode; soft classes mix the logits, as the relaxations need."""
        return y @ self.ink + torch.einsum("...c,...j,cjp->...p", y, z, self.styles)


class Inference(nn.Module):
    """q(y | x) q(z | x, y)."""

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.classes = nn.Sequential(nn.Linear(SIDE * SIDE, 64), nn.Tanh(), nn.Linear(64, CLASSES))
            self.hidden = nn.Linear(SIDE * SIDE + CLASSES, 64)
            self.style = nn.Linear(64, 2 * FACTORS)

    def forward(self, x: Float[Tensor, "B P"], labels: Float[Tensor, "B C"], given: Bool[Tensor, " B"]) -> None:
        """The same arguments as the model's."""
        # A masked draw counts nothing, but it is drawn: its score would be noise, if it had parameters.
        logits = self.classes(x).masked_fill(given[:, None], 0.0)
        with pyro.plate("data", len(x)):
            with poutine.mask(mask=~given):  # type: ignore[call-overload]
                drawn = pyro.sample("y_unobserved", dist.OneHotCategorical(logits=logits))
            y = torch.where(given[:, None], labels, drawn)
            both = torch.cat([x.expand(*y.shape[:-1], -1), y], -1)
            loc, log_scale = self.style(self.hidden(both).tanh()).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def data(model: Images, *, seed: int = 0) -> tuple[Float[Tensor, "B P"], Float[Tensor, "B C"], Bool[Tensor, " B"]]:
    """Let the model draw images; the first have their class given, and class 0 stands for the others'."""
    given = torch.arange(IMAGES) < LABELLED
    no_class = F.one_hot(torch.zeros(IMAGES, dtype=torch.long), CLASSES).float()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        y, x = poutine.uncondition(model)(torch.zeros(IMAGES, SIDE * SIDE), no_class, torch.zeros_like(given))
    return x, torch.where(given[:, None], y, no_class), given


def log_evidence(
    model: Images,
    x: Float[Tensor, "B P"],
    labels: Float[Tensor, "B C"],
    given: Bool[Tensor, " B"],
    *,
    points: int = POINTS,
) -> Float[Tensor, " B"]:
    """Compute log p(x, y) where y is given and log p(x) where not, in nats: y summed, z by quadrature."""
    z, log_weight = lattice(FACTORS, points)
    x, joint = x.double(), []
    for ink, styles in zip(model.ink.double(), model.styles.double(), strict=True):
        logits = ink + z @ styles  # [N, P]
        log_p = F.logsigmoid(logits) @ x.T + F.logsigmoid(-logits) @ (1 - x).T  # [N, B]
        joint.append((log_weight[:, None] + log_p).logsumexp(0))
    log_joint = torch.stack(joint, -1) - torch.tensor(CLASSES).double().log()  # [B, C]
    return torch.where(given, (log_joint * labels).sum(-1), log_joint.logsumexp(-1))


def field(*, seed: int = 0) -> Field:
    """The program with images of its own making; only the guide is trained."""
    model = Images(seed=seed)
    x, labels, given = data(model, seed=seed)
    return Field(
        model=model,
        guide=Inference(seed=seed),
        args=(x, labels, given),
        batch_plates=("data",),
        site="y_unobserved",
        evidence=log_evidence(model, x, labels, given).sum().item(),
        error=0.0,
        how=f"the classes that are not given summed exactly, z by quadrature on {POINTS}^{FACTORS} nodes",
        learns_model=False,
    )
