"""Variational Memory Addressing (Bornschein, Mnih, Zoran, Rezende 2017) as a probabilistic program in Pyro.

    p(x | M) = sum_a p(a | M) integral p(z | m_a) p(x | z, m_a) dz

Glossary, the same letters everywhere:

    M, S     memory and its number of entries, |M| = S      x   image
    a        address, the site "address"                    m_a the entry read at a
    z, Z     Gaussian latent and its dimension              K   particles
    B        datapoints, the plate "data"                   w   importance weight of a particle
    [K, B, ...] is the order of dimensions; an enumerated address stands left of K.

A memory is a tensor of entries; an address is a sample site; everything else follows from ordinary Pyro.
"""

from torch import nn

from vma_pyro._system.parts import Part
from vma_pyro.guide import Guide
from vma_pyro.likelihoods import BernoulliPixels, ContinuousBernoulli, Likelihood
from vma_pyro.memory import Memory
from vma_pyro.memory.index import AddressIndex
from vma_pyro.memory.lists import InvertedLists
from vma_pyro.model import Model
from vma_pyro.networks import ConvNetworks, MLPNetworks, Networks
from vma_pyro.priors import LearnedAddress, UniformAddress
from vma_pyro.similarity import CosineSimilarity, InnerProduct

__version__ = "0.1.0"

__all__ = [
    "AddressIndex",
    "BernoulliPixels",
    "ContinuousBernoulli",
    "ConvNetworks",
    "CosineSimilarity",
    "Guide",
    "InnerProduct",
    "InvertedLists",
    "LearnedAddress",
    "Likelihood",
    "MLPNetworks",
    "Memory",
    "Model",
    "Networks",
    "Part",
    "UniformAddress",
    "load_pretrained",
]


def load_pretrained(name: str = "omniglot") -> tuple[nn.Module, nn.Module]:
    """Model and guide, trained.

    Args:
        name: of the data that it was trained on.

    Returns:
        A `Model` and a `Guide` over the same networks, on the CPU.

    Raises:
        ValueError: no model of that name.

    Example::

        model, guide = load_pretrained("omniglot")
        images = model(memory, num_images=8)
    """
    from vma_pyro import (
        models,
        pretrained,  # with the training loop, which nothing else here needs
    )

    return models.load(pretrained.path_of(name), program="memory")
