"""The house keeps its shape: imports point one way, and every experiment is run by a test."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Each layer may import those after it.
LAYERS = [
    {"demo"},
    {"report", "identities", "rehearsal"},
    {"claims", "alike"},
    {"several"},
    {"protocols"},
    {"few_shot", "laboratory", "trained"},
    {"training"},
    {"evaluation", "plots", "script", "results"},
    {"lock"},
    {"record"},
    {"large_memory"},
    {"fingerprint"},
    {"model", "guide", "baselines", "data", "infer"},
    {
        "memory",
        "padding",
        "selected_memory",
        "values",
        "refinement",
        "networks",
        "program",
        "pretrained",
        "published",
        "checkpoint",
        "allocator",
        "atomic",
        "kept",
        "ranks",
    },
]


def part_of(module):
    """What a module counts as: its subpackage, or in `jobs` itself; the package as the model."""
    parts = [part for part in module.split(".")[1:] if part != "jobs"]
    return parts[0] if parts else "model"


def layer(module):
    """Number of its layer."""
    return next(i for i, names in enumerate(LAYERS) if part_of(module) in names)


def imports(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module in ("vma_pyro", "vma_pyro.jobs"):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            else:
                yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def modules():
    for path in (ROOT / "vma_pyro").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if name != "vma_pyro":
            yield name, path


def test_imports_point_one_way():
    known = {name for names in LAYERS for name in names}
    for name, path in modules():
        for imported in imports(path):
            if imported.startswith("vma_pyro.") and part_of(imported) in known:
                same_part = part_of(imported) == part_of(name)
                assert same_part or layer(imported) >= layer(name), f"{name} imports {imported}"


def test_every_module_has_a_layer():
    assert {part_of(name) for name, _ in modules()} == {name for names in LAYERS for name in names}


def test_inference_knows_sites_but_not_our_classes():
    for name, path in modules():
        if name.startswith("vma_pyro.infer"):
            ours = {i for i in imports(path) if i.startswith("vma_pyro") and not i.startswith("vma_pyro.infer")}
            assert not ours, name


def test_networks_know_no_pyro_and_only_training_knows_fabric():
    for name, path in modules():
        found = set(imports(path))
        if name == "vma_pyro.networks":
            assert not any(i.startswith("pyro") for i in found)
        if not name.startswith("vma_pyro.training"):
            assert not any(i.startswith("lightning") for i in found), name


def test_every_experiment_is_run_by_a_test():
    for script in (ROOT / "experiments").glob("*.py"):
        assert (ROOT / "tests" / f"test_experiment_{script.stem}.py").exists(), script.name
