"""Figures that others have published, to stand beside ours. Facts, with their sources.

VMA: Bornschein, Mnih, Zoran, Rezende 2017. GMN: Bartunov and Vetrov 2016, Generative Matching Networks. The public
PyTorch re-implementation of VMA (artemZholus) works on 26 x 26 images, which have 14 % fewer pixels than 28 x 28:
its figures are lower for the same model. Figures that were written down from memory, and not read again, say so.
"""

from __future__ import annotations

SHOTS = (1, 2, 3, 4, 5, 10, 19)

# Table 1 of VMA, NLL in nats per image, canonical split of Omniglot, shots per class; by number of classes.
VMA_NLL = {
    1: (86.5, 83.0, 79.6, 79.0, 76.5, 76.2, 73.9),
    2: (87.2, 83.3, 80.9, 79.3, 79.1, 77.0, 75.0),
    4: (87.5, 83.3, 81.2, 80.7, 79.5, 78.6, 76.7),
    16: (89.6, 85.1, 81.5, 81.9, 81.3, 79.8, 77.0),
}

# The re-implementation, 26 x 26 images; shots are images in memory in all.
REIMPLEMENTATION_NLL = {
    1: (85.2, 79.8, 77.5, 76.2, 75.3, 73.2, 71.8),
    2: (85.2, 82.7, 80.1, 78.5, 77.5, 75.2, 73.5),
}

# Generative Matching Networks, one class, recalled; their public sampler draws with replacement.
GMN_NLL = {1: (83.3, 78.9, 75.7, 72.9, 70.1, 59.9, 45.8)}

# Cells of these tables that are recalled, by whose they are and number of classes.
RECALLED = (("VMA", 4), ("VMA", 16), ("GMN", 1))

# Variational Homoencoder (Hewitt et al. 2018): nats per image of 28 x 28, most likely the mean of the NLLs with 0
# to 19 images of the class given; recalled.
VHE_JOINT = 61.2

MEMORYLESS_NLL = 89.2  # the variational autoencoder on GMN's networks

# Share of images classified right from q(a | x), by (ways, shots); recalled.
VMA_ACCURACY = {(5, 1): 0.91, (5, 5): 0.97, (20, 1): 0.77, (20, 5): 0.90}

# The same of the Neural Statistician (Edwards and Storkey 2017), %; recalled.
STATISTICIAN_ACCURACY = {(5, 1): 98.1, (5, 5): 99.5, (20, 1): 93.2, (20, 5): 98.1}

# Figure 4B of VMA, 45/5 split: at 1 and at 16 examples per class, nats per image; recalled.
VMA_SPLIT = {"kl_address": (2.0, 4.5), "kl_z": (28.2, 21.8), "nll": (75.1, 69.1)}

# From so many entries on an update with hard attention takes less time than one with soft attention (VMA).
VMA_CROSSING = 48
