"""Imports go downwards: the floors of the house, lowest first, and what may not know the nano toy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A module imports from its own room and from floors below its own.
FLOORS = [
    {"configuration_lsm", "modeling_lsm", "processing_lsm"},
    {"language_models"},
    {"dataset_builders.files"},
    {"dataset_builders.corpora", "dataset_builders.responders"},
    {"dataset_builders"},
    {"dataset_builders.nano"},
    {"recipes.reporting"},
    {"recipes.listening"},
    {"recipes.evaluation"},
    {"recipes.bias", "recipes.serving", "recipes.training"},
    {"recipes.studies"},
    {"recipes.nano"},
    {"recipes"},
    {"benchmarks", "demo"},
]
MODULES = sorted(
    file.relative_to(ROOT)
    for name in FLOORS[1] | {"dataset_builders", "recipes", "benchmarks", "demo"}
    for file in ROOT.glob(f"{name}/**/*.py")
)


def room_of(module: str) -> str | None:
    """The room of one of our modules, the longest name that fits."""
    rooms = [room for floor in FLOORS for room in floor if module == room or module.startswith(f"{room}.")]
    return max(rooms, key=len, default=None)


def floor_of(room: str) -> int:
    return next(number for number, floor in enumerate(FLOORS) if room in floor)


def imported(file: Path) -> set[str]:
    """The modules that a file names in its imports, wherever they stand in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            # `from package import module` names the module, `from module import function` does not.
            inner = {f"{node.module}.{name.name}" for name in node.names}
            found |= {name for name in inner if ROOT.joinpath(*name.split(".")).with_suffix(".py").exists()} or {
                node.module
            }
    return found


@pytest.mark.parametrize("file", MODULES, ids=str)
def test_a_module_imports_from_its_own_room_and_from_lower_floors_alone(file):
    room = room_of(".".join(file.with_suffix("").parts))
    for module in imported(ROOT / file):
        other = room_of(module)
        if other not in (None, room):
            assert floor_of(other) < floor_of(room), f"{file} imports {module}"


@pytest.mark.parametrize(
    "file",
    [
        file
        for file in MODULES
        if "nano" not in file.parts and file.name != "quickstart.py" and file.parts[0] != "benchmarks"
    ],
    ids=str,
)
def test_only_nano_and_the_quickstart_import_nano(file):
    assert not [module for module in imported(ROOT / file) if ".nano" in module]


@pytest.mark.parametrize("module", ["modeling_lsm", "recipes.compose"])
def test_what_answers_and_composes_needs_nothing_of_training_evaluation_and_reports(module):
    heavy = {"datasets", "jiwer", "matplotlib", "sacrebleu", "trl"}
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
