"""A memory that belongs to the model: one for all episodes, with a learned p(a), and learned entries if wanted."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vma_pyro.data import Episode
from vma_pyro.data.episodes import as_images
from vma_pyro.memory import Memory
from vma_pyro.program import Program


class OneMemory:
    """Episodes of one memory for all: targets from the images, drawn without replacement within an update."""

    def __init__(self, images: np.ndarray, memory: Memory, *, queries: int, seed: int) -> None:
        self.images, self.memory, self.queries = torch.from_numpy(images), memory, queries
        self._generator = torch.Generator().manual_seed(seed)

    def sample(self) -> Episode:
        """The next episode."""
        drawn = torch.randperm(len(self.images), generator=self._generator)[: self.queries]
        memory = Memory(self.memory.entries)  # unencoded
        return Episode(memory, as_images(self.images[drawn]), torch.zeros(len(drawn), dtype=torch.long))

    def state_dict(self) -> dict[str, Any]:
        """The position in the stream."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position."""
        self._generator.set_state(state["generator"])


class Components(nn.Module):
    """A learned p(a), with one parameter for each entry, and the entries themselves if they are learned."""

    def __init__(self, entries: Tensor, *, learn_entries: bool) -> None:
        super().__init__()
        self.log_weights = nn.Parameter(torch.zeros(len(entries)))
        # Ink probabilities of a learned entry start near those of an image.
        self.entry_logits = nn.Parameter(4 * entries - 2) if learn_entries else None

    def forward(self, memory: Memory) -> Tensor:
        """Logits of p(a | M) [S]."""
        return self.log_weights

    def memory(self, given: Memory) -> Memory:
        """The learned entries, or those given."""
        return given if self.entry_logits is None else Memory(self.entry_logits.sigmoid(), learned=True)


class WithComponents(Program):
    """A model or guide on the memory that is learned with it."""

    def __init__(self, program: Program, components: Components) -> None:
        super().__init__()
        self.program, self.components = program, components

    def forward(self, memory: Memory, *args: Any, **kwargs: Any) -> Any:
        """Run the program on the learned memory."""
        return self.program(self.components.memory(Memory.of(memory)), *args, **kwargs)
