"""Whatever our code imports, an installation brings along: the plain one what it takes to ask a checkpoint, and an
extra what the commands take that name it."""

import ast
import configparser
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("language_models", "dataset_builders", "recipes")
OURS = {*PACKAGES, *(path.stem for path in ROOT.glob("*_lsm.py"))}
FILES = sorted([*ROOT.glob("*_lsm.py"), *(file for name in PACKAGES for file in ROOT.glob(f"{name}/**/*.py"))])
NAMED = {"mistral_common", "sounddevice"}  # their absence is an error that names them
DISTRIBUTIONS = packages_distributions()
# Those that run on a plain installation; all others say which extra they take.
PLAIN = ("recipes.__main__", "recipes.chat", "recipes.compose", "recipes.convert_reference", "recipes.nano.train_llm")
COMMANDS = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for file in FILES
    if '__name__ == "__main__"' in file.read_text(encoding="utf-8")
)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", name)[0]).lower()


def declared() -> dict[str, set[str]]:
    """What setup.cfg names, by extra, and under `""` what a plain installation has, which all extras have besides."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    own = setup["metadata"]["name"]
    lists = {"": setup["options"]["install_requires"], **setup["options.extras_require"]}
    lines = {
        name: [line for line in text.split("\n") if line.strip() and line[0] != "#"] for name, text in lists.items()
    }

    def named(extra: str) -> set[str]:
        found = set()
        for line in lines[extra]:
            inner = re.fullmatch(rf"{own}\[(.*)\]", line)
            found |= set().union(*map(named, inner[1].split(","))) if inner else {normal(line)}
        return found

    return {extra: named(extra) | named("") for extra in lines}


DECLARED = declared()


def module_file(module: str) -> Path | None:
    path = ROOT.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.exists()), None)


def imports(node: ast.AST) -> set[str]:
    """The modules that are named in the imports below a node, those of functions among them."""
    found = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.Import):
            found |= {alias.name for alias in inner.names}
        elif isinstance(inner, ast.ImportFrom) and not inner.level:
            found |= {inner.module, *(f"{inner.module}.{alias.name}" for alias in inner.names)}
    return {name for name in found if name.split(".")[0] not in OURS or module_file(name)}


def extra_of(node: ast.AST) -> str | None:
    """The `NAME` of a statement `with extra("NAME"):`."""
    call = node.items[0].context_expr if isinstance(node, ast.With) else None
    if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "extra":
        return call.args[0].value
    return None


def top_level(module: str) -> tuple[set[str], str]:
    """What a module imports when it is imported, and the extra that it says it takes."""
    tree = ast.parse(module_file(module).read_text(encoding="utf-8"))
    nodes = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return set().union(*map(imports, nodes)), next(filter(None, map(extra_of, nodes)), "")


def foreign(module: str, seen: set[str]) -> set[str]:
    """The distributions of others that are imported when this module of ours is."""
    if module in seen:
        return set()
    seen.add(module)
    found = set()
    for name in top_level(module)[0]:
        top = name.split(".")[0]
        if top in OURS:
            found |= foreign(name, seen)
        elif top not in sys.stdlib_module_names:
            found.add(top)
    return found


def undeclared(names: set[str], extra: str) -> set[str]:
    return {name for name in names if not DECLARED[extra] & set(map(normal, DISTRIBUTIONS.get(name, [name])))}


def test_every_import_is_declared():
    names = {name.split(".")[0] for file in FILES for name in imports(ast.parse(file.read_text(encoding="utf-8")))}
    assert not undeclared(names - OURS - NAMED - sys.stdlib_module_names, "dev")


@pytest.mark.parametrize("module", ["configuration_lsm", "modeling_lsm", "processing_lsm", *COMMANDS])
def test_a_module_imports_what_its_extra_brings(module):
    extra = top_level(module)[1]
    assert (extra == "") == (module in PLAIN or module not in COMMANDS)
    assert not undeclared(foreign(module, set()), extra)


def test_what_stands_under_an_extra_is_in_it():
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if (extra := extra_of(node)) is not None:
                names = {name.split(".")[0] for name in imports(node)} - OURS - sys.stdlib_module_names
                assert not undeclared(names, extra), file


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [
        ("recipes/sft.py", "trl", "train"),
        ("recipes/quickstart.py", "datasets", "train"),
        ("dataset_builders/self_powered.py", "pyarrow", "data"),
        ("demo/app.py", "gradio", "demo"),
    ],
)
def test_a_command_without_its_extra_says_which_it_takes(command, package, extra):
    code = f"import runpy, sys; sys.modules[{package!r}] = None; runpy.run_path({command!r})"  # as if not installed
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert f"ImportError: {package} is not installed." in done.stderr
    assert f"pip install 'self-powered-lsm[{extra}]'" in done.stderr
