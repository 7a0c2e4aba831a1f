"""Latent values of every datapoint of a data set, kept from one update to the next."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Int64
from pyro.distributions import Unit
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from vma_pyro.infer.engine.handlers import DetachValues, Message, is_open
from vma_pyro.infer.engine.plates import PARTICLES, Layout


class Chains(nn.Module):
    """The values [N, rest, event] of each site at N datapoints, and which datapoints have met it.

    They are in `state_dict`, and so in checkpoints; before the first draw there are none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, Tensor] = {}
        self.met: dict[str, Tensor] = {}  # [N]
        self.data: dict[str, Tensor] = {}  # of the last draw, where it is the whole data
        self.digests: dict[str, Tensor] = {}  # of such data before a checkpoint

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        digests = self.digests | {name: _digest(value) for name, value in self.data.items()}
        for kind, tensors in (("values", self.values), ("met", self.met), ("digests", digests)):
            destination.update({f"{prefix}{kind}.{name}": value for name, value in tensors.items()})

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
        self.data = {}
        for kind in ("values", "met", "digests"):
            start = f"{prefix}{kind}."
            found = {k.removeprefix(start): v.clone() for k, v in state_dict.items() if k.startswith(start)}
            setattr(self, kind, found)

    def write(self, rows: Int64[Tensor, " B"], size: int, values: Mapping[str, Tensor]) -> None:
        """Keep values [B, rest, event] of the datapoints at these rows."""
        for name, value in values.items():
            if name not in self.values:
                self.values[name] = value.new_zeros(size, *value.shape[1:])
                self.met[name] = torch.zeros(size, dtype=torch.bool, device=rows.device)
            self.values[name][rows] = value
            self.met[name][rows] = True

    def check_same_data(self, data: Mapping[str, Tensor], plates: tuple[str, ...]) -> None:
        """Refuse data that change though the plates say that they are all there is.

        Which datapoint is which is then unknown, and a value that was kept for one would go on at another.
        """
        for name, value in data.items():
            before, digest = self.data.get(name), self.digests.get(name)
            same = before is None or _is_same(before, value)
            if before is None and digest is not None:
                same = torch.equal(digest.cpu(), _digest(value))
            if not same:
                raise ValueError(
                    f"{name}: expected the same data in every draw, or their positions in the whole data "
                    f"set, as pyro.plate({', '.join(map(repr, plates)) or repr('data')}, N, subsample=positions), "
                    "got other data; values are kept for each datapoint"
                )
            self.data[name] = value.clone()

    def read(self, name: str, rows: Int64[Tensor, " B"], size: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Read the values [B, rest, event] of a site, and whether the datapoints have any [B].

        Raises:
            ValueError: another data set, or other values, than those that are kept.
        """
        if name not in self.values:
            return like, torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        met, kept = self.met[name].to(rows.device), self.values[name].to(like.device)
        if len(met) != size:
            raise ValueError(
                f"batch_plates: expected plates of {len(met)} datapoints in all, as the values that are kept "
                f"from earlier draws, got {size}"
            )
        if kept.shape[1:] != like.shape[1:] or kept.dtype != like.dtype:
            raise ValueError(
                f"site '{name}': expected values {list(kept.shape[1:])} of {kept.dtype} for a datapoint, as those "
                f"that are kept from earlier draws, got {list(like.shape[1:])} of {like.dtype}"
            )
        self.met[name], self.values[name] = met, kept
        return kept[rows], met[rows]


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Compare data, of which some may be missing (NaN)."""
    return one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())


def _digest(value: Tensor) -> Tensor:
    """Digest data into a few numbers, for a checkpoint."""
    plain = value.detach().cpu().contiguous()
    told = f"{plain.dtype} {list(plain.shape)}".encode() + plain.reshape(-1).view(torch.uint8).numpy().tobytes()
    return torch.frombuffer(bytearray(hashlib.sha256(told).digest()), dtype=torch.int64).clone()


def tensors_in(tree: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    """Find what may be data among arguments, with a name for each: neither parameters nor single numbers."""
    if isinstance(tree, Tensor):
        if tree.dim() and not tree.requires_grad:
            yield path, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from tensors_in(value, f"{path} {key!r}")
    elif isinstance(tree, tuple | list):
        for position, value in enumerate(tree):
            yield from tensors_in(value, f"{path} {position}")


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
        if type(msg["fn"]).__name__ == "_Subsample" and msg["name"] in self.layout.batch_plates:
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
        if type(msg["fn"]).__name__ != "_Subsample":
            return
        name, positions = msg["name"], torch.as_tensor(msg["value"])
        if name not in self.layout.batch_plates and positions.tolist() != list(range(len(positions))):
            raise ValueError(
                f"plate '{name}': expected its elements in order, as their values are kept by place within the "
                "datapoint, got others; name it in batch_plates, or give it no subsample"
            )
        if len(positions) and not -msg["fn"].size <= positions.min() <= positions.max() < msg["fn"].size:
            raise ValueError(
                f"plate '{name}': expected positions below its size {msg['fn'].size}, got {positions.max().item()}"
            )
        self.positions[name] = positions % msg["fn"].size

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
        is_data = not msg["infer"].get("_deterministic") and type(msg["fn"]).__name__ != "_Subsample"
        if is_data and isinstance(msg["value"], Tensor):
            self.values[f"site '{msg['name']}'"] = msg["value"].detach()
