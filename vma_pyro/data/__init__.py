"""Data sets of images with classes, and the episodes drawn from them."""

from vma_pyro.data import folder, glyphs, labelled, mnist, omniglot
from vma_pyro.data.division import Split, divide
from vma_pyro.data.episodes import Episode, EpisodeSampler
from vma_pyro.data.leave_one_out import LeaveOneOutSampler
from vma_pyro.data.matching import MatchingEpisodes
from vma_pyro.data.nested import NestedEpisodes
from vma_pyro.data.recall import RecallSampler
from vma_pyro.data.records import Characters, GreyCharacters, ImageClasses, LabelledImages
from vma_pyro.data.splits import load_split, split_of
from vma_pyro.data.workers import Stream

__all__ = [
    "Characters",
    "Episode",
    "EpisodeSampler",
    "GreyCharacters",
    "ImageClasses",
    "LabelledImages",
    "LeaveOneOutSampler",
    "MatchingEpisodes",
    "NestedEpisodes",
    "RecallSampler",
    "Split",
    "Stream",
    "divide",
    "folder",
    "glyphs",
    "labelled",
    "load_split",
    "mnist",
    "omniglot",
    "split_of",
]
