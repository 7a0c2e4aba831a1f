"""Every claim of the paper in one table: the paper's figure, the re-implementation's, ours, and the verdict.

Collects `experiments/results/*.json` into `README.md` beside them and a short form into the project's README. With
`--add`, first takes over what experiments have left in their folders. Identities that no figure may violate are
checked; a violated one is printed in red, and the command fails.
"""

from __future__ import annotations

from vma_pyro._system import quick_help  # noqa: F401  # isort: skip  # before Torch: --help needs none

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.results import plural
from paper.claims import claims
from paper.identities import Identity, identities
from paper.verdicts import Claim
from vma_pyro import cli
from vma_pyro._system import lock
from vma_pyro._system.atomic import write_text
from vma_pyro._system.markdown import table

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- report: start -->", "<!-- report: end -->"
RED, PLAIN = "\033[31m", "\033[0m"
RECALLED = "Recalled: the figure was written down from memory, and has not been read again in the paper."


@dataclass(frozen=True)
class ReportConfig:
    """Collect all results."""

    results: Path = ROOT / "experiments" / "results"
    """Folder of results."""
    readme: Path | None = ROOT / "README.md"
    """File that the short form goes into, between its two marks."""
    add: tuple[Path, ...] = ()
    """Folders of finished experiments to take over, each under its own name."""
    tiny: bool = False
    """No effect; the tests run every experiment with it."""


def take_over(folder: Path, into: Path) -> None:
    """NAME/results.json, NAME/report.md and NAME/NAME*.png become NAME.json, NAME.md and NAME*.png.

    Raises:
        FileNotFoundError: a folder without results.
        ValueError: results that name a file of this machine.
    """
    for name in ("results.json", "report.md"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"add: expected a finished experiment, found no {name} in {folder}")
    if any(str(Path.home()) in value or value.startswith("/") for value in _texts(folder)):
        raise ValueError(f"add: expected results without absolute paths, got some in {folder}")
    into.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / "results.json", into / f"{folder.name}.json")
    shutil.copyfile(folder / "report.md", into / f"{folder.name}.md")
    for picture in folder.glob(f"{folder.name}*.png"):
        shutil.copyfile(picture, into / picture.name)


def _texts(folder: Path) -> list[str]:
    """Every word of the command, the options and the facts about training."""
    content = json.loads((folder / "results.json").read_text())
    found = content["command"].replace("=", " ").split()
    todo = [content["config"], content["training"]]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            todo += value.values()
        elif isinstance(value, list):
            todo += value
        elif isinstance(value, str):
            found.append(value)
    return found


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Read all results by name, those in folders of their own among them."""
    found = {}
    for path in sorted(
        [*folder.glob("*.json"), *folder.glob("benchmarks/**/*.json"), *folder.glob("address/*.json")]
    ):
        name = path.relative_to(folder).with_suffix("").as_posix()
        try:
            found[name] = json.loads(path.read_text())
            found[name]["command"]
        except (json.JSONDecodeError, UnicodeDecodeError, LookupError, TypeError) as error:
            raise ValueError(f"results: expected JSON with a command in {path}, got {error!r}") from error
    return found


def row(claim: Claim) -> list[str]:
    """One row of the table."""
    ours, causal = (
        f"{figures} ([{name}]({name}.md))" if figures else ""
        for figures, name in ((claim.ours, claim.source), (claim.causal, f"{claim.source}_causal"))
    )
    return [claim.claim, claim.paper, claim.reimplementation, ours, claim.verdict, causal]


def identity_line(identity: Identity) -> str:
    """One line: that an identity holds, or what violates it."""
    if not identity.violations:
        figures = plural(identity.checked, "figure")
        return f"- {identity.what} ({identity.source}): holds for {figures}"
    found = "; ".join(identity.violations)
    return f'- <span style="color:red">**VIOLATED** {identity.what} ({identity.source}): {found}</span>'


def page(found: dict[str, dict[str, Any]], folder: Path) -> str:
    """The page results/README.md."""
    head = ["claim", "paper", "re-implementation", "ours", "verdict", "ours, causal likelihood"]
    rows = claims(found)
    pages = [
        f"- [{name}]({name}.md): `{content['command']}`"
        for name, content in found.items()
        if (folder / f"{name}.md").exists()
    ]
    return (
        "\n\n".join(
            [
                "# Results",
                "Made by `uv run experiments/report.py`; every figure is read from the results beside this "
                "page, which say how to repeat them. ± is one standard error over test images. Exceeded: "
                "better than the paper's figure by more than two of them; reproduced: not worse by more than "
                f"two, or the claim holds. {RECALLED} Causal: pixels also see their neighbours, which the paper's "
                "do not; figures of the two likelihoods are not to be compared.",
                "## The paper's claims",
                table(head, map(row, rows)),
                "## Identities",
                "\n".join(map(identity_line, identities(found))),
                "## All results",
                "\n".join(pages),
            ]
        )
        + "\n"
    )


def short(rows: Sequence[Claim]) -> str:
    """The headlines, for the project's README."""
    lines = [
        [claim.claim, claim.paper, claim.ours, claim.verdict, claim.causal] for claim in rows if claim.headline
    ]
    counts = {
        word: sum(claim.verdict.startswith(word) for claim in rows)
        for word in ("exceeded", "reproduced", "not reached")
    }
    summary = ", ".join(f"{number} {word}" for word, number in counts.items())
    shown = table(["claim", "paper", "ours", "verdict", "causal likelihood"], lines)
    return f"{shown}\n\nOf {sum(counts.values())} claims: {summary}. {RECALLED}"


def insert(readme: Path, text: str) -> None:
    """Replace what stands between the marks.

    Raises:
        ValueError: a file without them.
    """
    before = readme.read_text()
    if START not in before or END not in before:
        raise ValueError(f"readme: expected {START} and {END} in {readme}, found none")
    head, rest = before.split(START, 1)
    write_text(readme, f"{head}{START}\n{text}\n{END}{rest.split(END, 1)[1]}")


def main(config: ReportConfig) -> None:
    """Take results over, check them, and write both pages."""
    lock.take(config.results, argument="results")  # the pages are read, changed and written
    for folder in config.add:
        take_over(folder, config.results)
    found = read_results(config.results)
    if not found:
        raise FileNotFoundError(f"results: expected some *.json, found none in {config.results}")
    write_text(config.results / "README.md", page(found, config.results))
    if config.readme is not None:
        insert(config.readme, short(claims(found)))
    print((config.results / "README.md").read_text())
    violated = [identity for identity in identities(found) if identity.violations]
    for identity in violated:
        print(f"{RED}VIOLATED: {identity.what} ({identity.source}): {'; '.join(identity.violations)}{PLAIN}")
    if violated:
        raise ValueError(f"identities: expected all to hold, got {len(violated)} violated")


if __name__ == "__main__":
    cli.run(main, ReportConfig, __doc__)
