"""Encoders and decoders: everything neural about p(z | m), p(x | z, m), q(a | x) and q(z | x, m).

One pyramid embeds the target x and the entries m (tied weights). What depends on m alone has two stages: `encode`,
once per entry, gives the key that every x is compared with; `heads` gives what is needed of entries that are read,
of those or of all, whichever are fewer. What remains per particle is cheap apart from the decoder.

`interface` says what model and guide need, `pyramid` what the two kinds of networks share.
"""

from vma_pyro.networks.convolutional import ConvNetworks
from vma_pyro.networks.interface import Entry, Features, Networks, Query
from vma_pyro.networks.keys import KeyNetwork
from vma_pyro.networks.layers import at_least_32_bits, dtype_of
from vma_pyro.networks.perceptron import MLPNetworks
from vma_pyro.networks.pyramid import PyramidNetworks, gaussian, loc_and_scale
from vma_pyro.networks.refinement import Refinement

__all__ = [
    "ConvNetworks",
    "Entry",
    "Features",
    "KeyNetwork",
    "MLPNetworks",
    "Networks",
    "PyramidNetworks",
    "Query",
    "Refinement",
    "at_least_32_bits",
    "dtype_of",
    "gaussian",
    "loc_and_scale",
]
