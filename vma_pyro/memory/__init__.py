"""A memory, its encoding, a bank with keys for training on thousands, and the index of a very large one."""

from vma_pyro.memory.bank_memory import BankMemory
from vma_pyro.memory.encoded import Encoded
from vma_pyro.memory.keyed import KeyedBank
from vma_pyro.memory.memory import Memory
from vma_pyro.memory.retrieved import Retrieved
from vma_pyro.memory.selected import SelectedMemory

__all__ = ["BankMemory", "Encoded", "KeyedBank", "Memory", "Retrieved", "SelectedMemory"]
