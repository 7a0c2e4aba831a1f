"""Open the live page: `uv run --extra demo python -m vma_pyro.demo`."""

from __future__ import annotations

from vma_pyro._system import quick_help  # noqa: F401  # isort: skip  # before Torch: --help needs none

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vma_pyro import cli, models
from vma_pyro.data import folder, glyphs, omniglot

if TYPE_CHECKING:
    from vma_pyro.data.pictures import Mode
    from vma_pyro.demo.format import Format
    from vma_pyro.demo.messages import Bank


@dataclass(frozen=True)
class DemoConfig:
    """Draw a character and watch where the model looks it up."""

    load: Path = models.CAUSAL
    """A model: `pretrained-causal`, which draws sharp strokes, `pretrained`, or a checkpoint of your own."""
    code: str | None = None
    """A Python file or module of your own, whose classes the checkpoint may name. It is run: give only code that
    you trust."""
    data: Literal["glyphs", "omniglot"] = "glyphs"
    """Where the tiles come from: made by a program, or Omniglot's evaluation alphabets as well."""
    data_dir: Path | None = None
    """Folder of Omniglot; it is downloaded if missing."""
    images: Path | None = None
    """A folder of your own pictures, or an npz file, to fill the memory with; brought to the model's size."""
    skip_unreadable: bool = False
    """Go on without pictures that cannot be read."""
    port: int = 8000
    """Port of 127.0.0.1; 0 takes a free one."""


def main(config: DemoConfig) -> None:
    """Load, say where the page is, and serve until Ctrl-C."""
    try:
        from vma_pyro.demo.app import create_app
        from vma_pyro.demo.connection import make_server
        from vma_pyro.demo.engine import Engine
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{error.name}: not installed; run `uv run --extra demo python -m vma_pyro.demo`"
        ) from error
    if not 0 <= config.port < 2**16:
        raise ValueError(f"port: expected 0 to 65535, got {config.port}")
    pair = models.load(config.load, program="memory", classes=models.classes_in(config.code))
    engine = Engine(*pair)
    app = create_app(engine, banks(config, engine.format), about=about(config.load))
    try:
        listening = socket.create_server(("127.0.0.1", config.port))
    except OSError as error:
        raise OSError(f"port: expected a free one, got {config.port} ({error.strerror})") from error
    print(f"http://127.0.0.1:{listening.getsockname()[1]}  (Ctrl-C ends)", flush=True)
    make_server(app).run(sockets=[listening])


def banks(config: DemoConfig, format_: Format) -> list[Bank]:
    """Images that fit the model: your own first, then characters that the pretrained model has not seen."""
    from vma_pyro.demo.banks import bank_of, make_banks

    made = []
    if config.images is not None:
        with cli.option("images", instead_of="data_dir"):
            own = folder.load(
                config.images,
                size=format_.shape[1:],
                mode=mode_of(format_),
                skip_unreadable=config.skip_unreadable,
            )
        made.append(bank_of(f"{config.images.resolve().name} (yours)", own))
    if format_ != ((1, 28, 28), 1):
        return made
    if config.data == "omniglot":
        made += make_banks(omniglot.load(config.data_dir, split="evaluation"))
    return [*made, *make_banks(glyphs.load(classes=200, seed=1))]


def mode_of(format_: Format) -> Mode:
    """How pictures are prepared for a model."""
    if format_.shape[0] == 3:
        return "colour"
    return "binary" if format_.bits == 1 else "grey"


def about(path: Path) -> str:
    """A line on a model, from what its file says of itself."""
    facts = models.facts_of(path)
    known = {name: facts[name] for name in ("data", "classes", "shots", "updates") if name in facts}
    return f"{path}: " + ", ".join(f"{name} {value}" for name, value in known.items())


if __name__ == "__main__":
    cli.run(main, DemoConfig, __doc__)
