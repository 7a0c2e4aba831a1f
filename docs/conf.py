"""The reference and the lessons: `uv run --group docs sphinx-build -W docs docs/_build/html`."""

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pyro

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # `docs/conf.py` documents the package beside it

pyro.settings.set(module_local_params=True)

project = "vma_pyro"
author = "The vma_pyro developers"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx-mathjax-offline",  # formulas are set without a network
]
exclude_patterns = ["_build", "conf.py", "page_picture.py", "lessons/pictures.py", "**/.ipynb_checkpoints"]
html_theme = "furo"
html_title = "vma_pyro"
html_static_path = ["static"]
html_css_files = ["wide.css"]
copyright = f"{author}, MIT license"

# Lessons are Python files in percent format, run while the documentation is built.
nb_custom_formats = {".py": ["jupytext.reads", {"fmt": "py:percent"}]}
nb_execution_mode = "force"
nb_execution_timeout = 900
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_merge_streams = True
# Progress bars and warnings of a notebook's own machinery are no part of a lesson.
nb_output_stderr = "remove"

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True, "exclude-members": "__init__, __new__"}
napoleon_use_ivar = True
napoleon_attr_annotations = False

# Every reference to something of ours must resolve; other projects' inventories are not at hand.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(?!vma_pyro\.).*"),
    # Named in signatures, of use to nobody outside.
    (
        r"py:.*",
        r"vma_pyro\..*\.(PlateOptions|RunOptions|DrawOptions|SiteScore|SiteGate|Layout|Lists|Ranks|Episodes|_F)",
    ),
]

# The pages of results link to each other: they are shown as they are, from a copy beside the sources.
shutil.copytree(ROOT / "experiments" / "results", Path(__file__).with_name("results"), dirs_exist_ok=True)


def as_plain_text(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings write |M|, S_-k and [*K, B]; to reStructuredText these signs mean other things."""
    code: int | None = None  # indentation of the line that begins a block of code or a directive
    for i, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if code is not None and line.strip() and indent <= code:
            code = None
        if code is None and (line.lstrip().startswith((".. ", ">>> ")) or line.rstrip().endswith("::")):
            code = indent if not line.lstrip().startswith(">>> ") else indent - 1
        elif code is None:
            lines[i] = re.sub(r"(?<!\\)([*|]|_(?=\W|$))", r"\\\1", line)


def without_field_numbers(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """The fields of a named tuple are described in its own docstring."""
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None


def setup(app: Any) -> None:
    """Before the sections of a docstring are taken apart."""
    app.connect("autodoc-process-docstring", as_plain_text, priority=100)
    app.connect("autodoc-skip-member", without_field_numbers)
