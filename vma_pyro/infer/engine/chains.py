"""Latent values of every datapoint of a data set, kept from one update to the next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int64
from pyro.distributions import Unit
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from vma_pyro.infer.engine.handlers import DetachValues, Message, is_open
from vma_pyro.infer.engine.plates import PARTICLES, Layout


class Chains(nn.Module):
    """The values [N, rest, event] of each site at N datapoints, and which datapoints have been met.

    They are in `state_dict`, and so in checkpoints; before the first draw there are none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, Tensor] = {}
        self.met: Tensor | None = None  # [N]
        self.data: dict[str, Tensor] = {}  # observed values of the last draw, where they are the whole data

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.met is not None:
            destination[f"{prefix}met"] = self.met
            destination.update({f"{prefix}values.{name}": value for name, value in self.values.items()})

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
        start = f"{prefix}values."
        self.met = state_dict[f"{prefix}met"].clone() if f"{prefix}met" in state_dict else None
        self.values = {
            key.removeprefix(start): value.clone() for key, value in state_dict.items() if key.startswith(start)
        }

    def write(self, rows: Int64[Tensor, " B"], size: int, values: Mapping[str, Tensor]) -> None:
        """Keep values [B, rest, event] of the datapoints at these rows."""
        if self.met is None:
            self.met = torch.zeros(size, dtype=torch.bool, device=rows.device)
        for name, value in values.items():
            if name not in self.values:
                self.values[name] = value.new_zeros(size, *value.shape[1:])
            self.values[name][rows] = value
        self.met[rows] = True

    def check_same_data(self, data: Mapping[str, Tensor], plates: tuple[str, ...]) -> None:
        """Refuse data that change though the plates say that they are all there is.

        Which datapoint is which is then unknown, and a value that was kept for one would go on at another.
        """
        for name, value in data.items():
            before = self.data.get(name)
            if before is not None and not (before.shape == value.shape and torch.equal(before, value)):
                raise ValueError(
                    f"site '{name}': expected the same data in every draw, or their positions in the whole data "
                    f"set, as pyro.plate({', '.join(map(repr, plates)) or repr('data')}, N, subsample=positions), "
                    "got other data; values are kept for each datapoint"
                )
            self.data[name] = value.clone()

    def read(self, name: str, rows: Int64[Tensor, " B"], size: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Read the values [B, rest, event] of a site, and whether the datapoints have any [B].

        Raises:
            ValueError: another data set, or other values, than those that are kept.
        """
        if self.met is None or name not in self.values:
            return like, torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        self.met, kept = self.met.to(rows.device), self.values[name].to(like.device)
        if len(self.met) != size:
            raise ValueError(
                f"batch_plates: expected plates of {len(self.met)} datapoints in all, as the values that are kept "
                f"from earlier draws, got {size}"
            )
        if kept.shape[1:] != like.shape[1:] or kept.dtype != like.dtype:
            raise ValueError(
                f"site '{name}': expected values {list(kept.shape[1:])} of {kept.dtype} for a datapoint, as those "
                f"that are kept from earlier draws, got {list(like.shape[1:])} of {like.dtype}"
            )
        self.values[name] = kept
        return kept[rows], self.met[rows]


class Keep(DetachValues):
    """Draws all particles without gradients, but gives the first the values that are kept for its datapoint.

    Args:
        chains: the kept values.
        layout: of the objective.
    """

    def __init__(self, chains: Chains, layout: Layout) -> None:
        self.chains, self.layout = chains, layout
        self.positions: dict[str, Tensor] = {}  # of the elements of each plate
        self.drawn: dict[str, Tensor] = {}  # [K, B, rest, event]
        self.rows = torch.zeros(1, dtype=torch.long)  # of the datapoints among all [B]
        self.size = 1  # N
        self.are_named = False  # whether the program itself says which datapoints these are

    def _pyro_sample(self, msg: Message) -> None:
        if type(msg["fn"]).__name__ == "_Subsample":
            chosen = msg["value"] is not None or msg["fn"].subsample_size not in (None, msg["fn"].size)
            self.are_named = self.are_named or chosen
        was_open = is_open(msg)
        super()._pyro_sample(msg)
        if not was_open:
            return
        if hasattr(msg["value"], "_unquantize"):
            raise ValueError(f"site '{msg['name']}': expected values that can be kept, got straight-through ones")
        in_plates = any(frame.name != PARTICLES for frame in msg["cond_indep_stack"])
        layout = self.layout if in_plates else Layout((), self.layout.nesting)
        moved = layout.datapoints_first(msg, msg["value"])
        self._find_rows(msg, layout)
        rows = moved.reshape(len(moved), len(self.rows), *moved.shape[1 + len(layout.batch_plates) :])
        kept, met = self.chains.read(msg["name"], self.rows, self.size, rows[0])
        first = torch.where(met.reshape(-1, *(1 for _ in kept.shape[1:])), kept, rows[0])
        self.drawn[msg["name"]] = torch.cat([first[None], rows[1:]])
        msg["value"] = layout.in_place(msg, self.drawn[msg["name"]].reshape(moved.shape))

    def _pyro_post_sample(self, msg: Message) -> None:
        if type(msg["fn"]).__name__ == "_Subsample":
            self.positions[msg["name"]] = torch.as_tensor(msg["value"])

    def _find_rows(self, msg: Message, layout: Layout) -> None:
        """Number the datapoints of this draw among all."""
        frames = {frame.name: frame for frame in msg["cond_indep_stack"]}
        rows, self.size = torch.zeros((), dtype=torch.long, device=msg["value"].device), 1
        for name in layout.batch_plates:
            full = frames[name].full_size or frames[name].size
            if name not in self.positions:
                raise ValueError(f"plate '{name}': expected made where the guide runs, got one made before")
            rows = rows[..., None] * full + self.positions[name].to(rows)
            self.size *= full
        self.rows = rows.reshape(-1)


class Observed(Messenger):
    """Notes the data that a model observes."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def _pyro_post_sample(self, msg: Message) -> None:
        if msg["type"] != "sample" or not msg["is_observed"] or isinstance(msg["fn"], Unit):
            return
        if isinstance(msg["value"], Tensor) and type(msg["fn"]).__name__ != "_Subsample":
            self.values[msg["name"]] = msg["value"].detach()
