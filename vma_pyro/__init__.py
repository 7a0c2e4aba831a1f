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

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from vma_pyro._system.parts import Part
    from vma_pyro.guide import Guide
    from vma_pyro.likelihoods import (
        BernoulliPixels,
        CausalBernoulli,
        CausalLogistics,
        ContinuousBernoulli,
        DiscretizedLogistics,
        Likelihood,
    )
    from vma_pyro.memory import Memory
    from vma_pyro.memory.index import AddressIndex
    from vma_pyro.memory.lists import InvertedLists
    from vma_pyro.model import Model
    from vma_pyro.networks import ConvNetworks, MLPNetworks, Networks
    from vma_pyro.priors import LearnedAddress, UniformAddress
    from vma_pyro.retrieval import RetrievalGuide
    from vma_pyro.similarity import CosineSimilarity, InnerProduct

__version__ = "0.1.0"

__all__ = [
    "AddressIndex",
    "BernoulliPixels",
    "CausalBernoulli",
    "CausalLogistics",
    "ContinuousBernoulli",
    "ConvNetworks",
    "CosineSimilarity",
    "DiscretizedLogistics",
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
    "RetrievalGuide",
    "UniformAddress",
    "load_pretrained",
]


# Imported when asked for: what needs no Torch (`--help`, a card) does not wait seconds for it.
HOMES = {
    "AddressIndex": "memory.index",
    "BernoulliPixels": "likelihoods",
    "CausalBernoulli": "likelihoods",
    "CausalLogistics": "likelihoods",
    "ContinuousBernoulli": "likelihoods",
    "ConvNetworks": "networks",
    "CosineSimilarity": "similarity",
    "DiscretizedLogistics": "likelihoods",
    "Guide": "guide",
    "InnerProduct": "similarity",
    "InvertedLists": "memory.lists",
    "LearnedAddress": "priors",
    "Likelihood": "likelihoods",
    "MLPNetworks": "networks",
    "Memory": "memory",
    "Model": "model",
    "Networks": "networks",
    "Part": "_system.parts",
    "RetrievalGuide": "retrieval",
    "UniformAddress": "priors",
}
ROOMS = (
    "comparisons",
    "data",
    "evaluation",
    "guide",
    "infer",
    "likelihoods",
    "memory",
    "model",
    "models",
    "networks",
    "pretrained",
    "priors",
    "program",
    "similarity",
    "training",
)


def __getattr__(name: str) -> Any:
    """Import a public name, or a public room of the package, when it is first asked for."""
    if name in ROOMS:
        return importlib.import_module(f"vma_pyro.{name}")
    if name not in HOMES:
        raise AttributeError(f"module 'vma_pyro' has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(f"vma_pyro.{HOMES[name]}"), name)
    return found


def __dir__() -> list[str]:
    """List the public names as well."""
    return sorted({*globals(), *__all__, *ROOMS})


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
