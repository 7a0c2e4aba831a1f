"""Likelihoods p(x | z, m): modules from what the decoder gives to a distribution of images.

====================== ================== ================================================
likelihood             images             a pixel depends on
====================== ================== ================================================
`BernoulliPixels`      binary             z and m alone, as in the paper
`CausalBernoulli`      binary             z, m and the pixels above it and to its left
`ContinuousBernoulli`  grey, from 0 to 1  z and m alone
`DiscretizedLogistics` 8-bit, any colours z and m alone
`CausalLogistics`      8-bit, any colours z, m and the pixels above it and to its left
====================== ================== ================================================

A likelihood knows which images it can score, and how many numbers per pixel it wants from the decoder. For one of
your own subclass `Likelihood`, with parameters if you like::

    class Laplace(Likelihood):
        def forward(self, decoded):
            return dist.Laplace(decoded.sigmoid(), 0.1).to_event(3)
"""

from vma_pyro.likelihoods.causal import Causal, CausalBernoulli, CausalImages, CausalLogistics
from vma_pyro.likelihoods.interface import Likelihood
from vma_pyro.likelihoods.logistics import DiscretizedLogistics, bits_per_dim
from vma_pyro.likelihoods.pixels import BernoulliPixels, ContinuousBernoulli, StableContinuousBernoulli

__all__ = [
    "BernoulliPixels",
    "Causal",
    "CausalBernoulli",
    "CausalImages",
    "CausalLogistics",
    "ContinuousBernoulli",
    "DiscretizedLogistics",
    "Likelihood",
    "StableContinuousBernoulli",
    "bits_per_dim",
]
