"""What the documentation names exists; that it builds, with its lessons run in full, is CI's to see."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
NAMES = sorted({name for page in PAGES for name in re.findall(r"[`~<](vma_pyro(?:\.\w+)+)[`>]", page.read_text())})


def find(name):
    """The object of a dotted name."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise AttributeError(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_in_the_documentation_exists(name):
    find(name)


def test_names_were_found():
    assert len(NAMES) > 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_in_the_documentation_exist(page):
    for path in re.findall(r"`((?:experiments|docs|vma_pyro)/[\w/]+\.py)`", page.read_text()):
        assert (ROOT / path).exists(), path


def test_every_page_is_listed():
    index = (ROOT / "docs" / "index.md").read_text()
    pages = [p.relative_to(ROOT / "docs").with_suffix("") for p in (ROOT / "docs").rglob("*.md")]
    pages += [p.relative_to(ROOT / "docs").with_suffix("") for p in (ROOT / "docs" / "lessons").glob("0*.py")]
    listed = [p for p in pages if p.parts[0] not in ("results", "_build") and str(p) != "index"]
    assert listed
    assert all(f"\n{page}\n" in index for page in map(str, listed))
