"""A memory, its encoding, and the index of a very large one."""

from vma_pyro.memory.memory import Memory

__all__ = ["Memory"]
