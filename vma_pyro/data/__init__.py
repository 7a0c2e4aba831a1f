"""Data sets of binary images and the episodes drawn from them."""

from vma_pyro.data import glyphs, mnist, omniglot
from vma_pyro.data.episodes import Episode, EpisodeSampler
from vma_pyro.data.leave_one_out import LeaveOneOutSampler
from vma_pyro.data.nested import NestedEpisodes
from vma_pyro.data.recall import RecallSampler
from vma_pyro.data.records import Characters, GreyCharacters, LabelledImages
from vma_pyro.data.splits import Split, load_split
from vma_pyro.data.workers import Stream

__all__ = [
    "Characters",
    "Episode",
    "EpisodeSampler",
    "GreyCharacters",
    "LabelledImages",
    "LeaveOneOutSampler",
    "NestedEpisodes",
    "RecallSampler",
    "Split",
    "Stream",
    "glyphs",
    "load_split",
    "mnist",
    "omniglot",
]
