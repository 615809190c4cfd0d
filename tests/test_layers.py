"""Imports go downward only, and only d2c_ray/distributed imports Ray."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

PACKAGE = ROOT / "d2c_ray"
LAYERS = {
    0: ("config", "schema", "seeding", "errors", "stopping", "wording", "logs", "metrics", "repeating"),
    1: ("models", "diffusion", "selection", "training", "evaluate", "data.decode", "hardware"),
    2: (
        "rundir",
        "plan",
        "trials",
        "schedule",
        "rates",
        "bench",
        "tracking",
        "estimate",
        "progress",
        "watch",
        "rejects",
        "job",
        "report",
        "data",
    ),
    3: ("distributed",),
    4: ("stages", "pipeline", "sweep", "forecast"),
    5: ("cli",),
}


def layer(module: str) -> int:
    """The layer of `d2c_ray.<module>`; the longest name that fits decides."""
    found = [(len(name), number) for number, names in LAYERS.items() for name in names if module == name or module.startswith(name + ".")]
    assert found, f"d2c_ray.{module} belongs to no layer: name one in this test"
    return max(found)[1]


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")
        if name:
            found[name] = ast.parse(path.read_text())
    return found


def imports(tree: ast.Module) -> set[str]:
    """Every module that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports would slip through this test"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


MODULES = modules()


@pytest.mark.parametrize("module", MODULES)
def test_only_distributed_imports_ray(module: str) -> None:
    uses_ray = any(name == "ray" or name.startswith("ray.") for name in imports(MODULES[module]))
    assert not uses_ray or module.startswith("distributed."), f"d2c_ray.{module} imports ray"


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_downward(module: str) -> None:
    mine = layer(module)
    for name in imports(MODULES[module]):
        inner = name.removeprefix("d2c_ray.")
        # 'from d2c_ray.x import y' also lists x.y, which may be a name and no module.
        if name.startswith("d2c_ray.") and inner in MODULES:
            assert layer(inner) <= mine, f"d2c_ray.{module} (layer {mine}) imports d2c_ray.{inner} (layer {layer(inner)})"


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("stages.")])
def test_no_stage_imports_another(module: str) -> None:
    assert not [name for name in imports(MODULES[module]) if name.startswith("d2c_ray.stages")]


def test_the_lowest_layer_needs_no_torch_ray_or_pyarrow() -> None:
    code = "import sys, d2c_ray.config, d2c_ray.schema, d2c_ray.seeding; print([m for m in ('torch', 'ray', 'pyarrow', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_training_core_runs_without_ray() -> None:
    """The models, the loop, scoring and evaluation import on a machine where Ray is not installed."""
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "import d2c_ray.training.loop, d2c_ray.selection.difficulty, d2c_ray.evaluate.measures, d2c_ray.evaluate.sampling, d2c_ray.data.condensed, d2c_ray.plan, d2c_ray.bench"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
