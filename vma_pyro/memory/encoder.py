"""What a memory asks of networks."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class Encoder(Protocol):
    """What `Memory.encode` needs of the networks: features of a flat batch of entries.

    They may also have `heads`, from features to what is needed of an entry that is read, tensors [N, *F] both, and
    `marked(read, rows)`, which notes from which rows of a table that does not change entries were read.
    """

    def encode(self, entries: Tensor) -> Any:
        """Features of entries [N, *E]: a tensor [N, *F] or a (named) tuple of such tensors."""
