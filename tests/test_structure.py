"""The house keeps its shape: imports point one way, and every experiment is run by a test."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import processes

ROOT = Path(__file__).parents[1]

# Each room may import those after it; `infer` knows Pyro only, and the package no experiment.
ROOMS = [
    {"demo"},
    {"cli"},
    {"training"},
    {"models"},
    {"pretrained", "evaluation"},
    {"comparisons", "data"},
    {"retrieval"},
    {"model", "guide"},
    {"program", "priors", "similarity", "proposal"},
    {"likelihoods", "networks"},
    {"memory"},
    {"infer"},
    {"_system"},
]
# Within `infer`, and among what the experiments share.
FLOORS = {
    "vma_pyro.infer": [{"comparison"}, {"estimators"}, {"engine"}],
    "": [{"paper"}, {"laboratory"}, {"main_job"}, {"discrete_vae"}, {"common"}, {"vma_pyro"}],
}


@functools.cache
def imports(path):
    """What a file imports where it runs."""
    return tuple(_imports(path))


def _imports(path):
    tree = ast.parse(path.read_text())
    # What is imported for annotations alone is not there when the program runs.
    of_types = {
        part
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for part in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in of_types:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def modules():
    for root in (ROOT, ROOT / "experiments"):
        for folder in (
            ("vma_pyro",) if root == ROOT else ("common", "discrete_vae", "laboratory", "main_job", "paper")
        ):
            for path in (root / folder).rglob("*.py"):
                yield ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"), path


def check(levels, prefix, name, path):
    """Nothing above is imported."""

    def level(module):
        part = module.removeprefix(prefix).lstrip(".").split(".")[0]
        return next((i for i, names in enumerate(levels) if part in names), None)

    for imported in imports(path):
        if imported.startswith(prefix) and level(name) is not None and level(imported) is not None:
            assert level(imported) >= level(name), f"{name} imports {imported}"


def test_imports_point_one_way():
    for name, path in modules():
        check(ROOMS, "vma_pyro", name, path)
        for prefix, floors in FLOORS.items():
            if name.startswith(prefix):
                check(floors, prefix, name, path)


def test_every_room_has_its_place():
    known = {part for rooms in ROOMS for part in rooms}
    found = {name.split(".")[1] for name, _ in modules() if name.startswith("vma_pyro.")}
    assert found == known


def test_the_package_knows_no_experiment():
    for name, path in modules():
        if name.startswith("vma_pyro"):
            assert not {i.split(".")[0] for i in imports(path)} & {
                "common",
                "discrete_vae",
                "laboratory",
                "main_job",
                "paper",
            }, name


def test_inference_knows_sites_but_not_our_classes():
    allowed = ("vma_pyro.infer", "vma_pyro._system")
    for name, path in modules():
        if name.startswith("vma_pyro.infer"):
            assert all(i.startswith(allowed) for i in imports(path) if i.startswith("vma_pyro")), name


def test_a_memory_knows_no_pyro_and_only_training_knows_fabric():
    for name, path in modules():
        found = set(imports(path))
        if name.startswith("vma_pyro.memory.memory"):
            assert not any(i.startswith("pyro") for i in found)
        if not name.startswith("vma_pyro.training"):
            assert not any(i.startswith("lightning") for i in found), name


def test_a_model_is_loaded_without_what_only_training_and_pages_need():
    heavy = "tyro", "matplotlib", "fastapi", "lightning_fabric", "lightning", "torchvision", "torch._dynamo"
    code = f"import sys, vma_pyro; vma_pyro.load_pretrained(); print(*sorted(set({heavy}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_short_training_does_not_import_the_compiler(tmp_path):
    (tmp_path / "script.py").write_text(
        "import sys\n"
        "from vma_pyro import Guide, MLPNetworks, Model\n"
        "from vma_pyro.data import EpisodeSampler, glyphs\n"
        "from vma_pyro.infer import make\n"
        "from vma_pyro.training import TrainConfig, fit\n"
        "networks = MLPNetworks(3, hidden_dims=(8, 7), key_dim=5)\n"
        "episodes = EpisodeSampler(glyphs.load(classes=12, examples=6), classes=3, shots=2, queries=4, seed=0)\n"
        "config = TrainConfig(updates=2)\n"
        "fit(Model(networks), Guide(networks), make('vimco', 2), episodes, config=config, folder='run')\n"
        "print('torch._inductor.compile_fx' in sys.modules)\n"
    )
    assert processes.run(tmp_path / "script.py", cwd=tmp_path).stdout == "False\n"


def test_processes_of_the_tests_start_with_what_they_import(tmp_path):
    (tmp_path / "script.py").write_text(f"import sys; print(set({processes.PRELOADED}) - set(sys.modules))")
    assert processes.run(tmp_path / "script.py", cwd=tmp_path).stdout == "set()\n"


def test_every_experiment_is_run_by_a_test():
    for script in (ROOT / "experiments").glob("*.py"):
        assert (ROOT / "tests" / f"test_experiment_{script.stem}.py").exists(), script.name
