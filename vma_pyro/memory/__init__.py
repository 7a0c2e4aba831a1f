"""A memory, its encoding, and the index of a very large one."""

from vma_pyro.memory.encoded import Encoded
from vma_pyro.memory.memory import Memory
from vma_pyro.memory.selected import SelectedMemory

__all__ = ["Encoded", "Memory", "SelectedMemory"]
