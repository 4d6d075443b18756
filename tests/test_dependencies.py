"""Whatever our code imports, an installation of it brings along."""

import ast
import configparser
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("language_models", "dataset_builders", "recipes")
OURS = {*PACKAGES, *(path.stem for path in ROOT.glob("*_lsm.py"))}
NAMED = {"mistral_common"}  # its absence is an error that names it


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", name)[0]).lower()


def imports(file: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.split(".")[0] for name in names}


def test_every_import_is_declared():
    files = [
        *ROOT.glob("*_lsm.py"),
        *(file for name in PACKAGES for file in ROOT.glob(f"{name}/**/*.py")),
    ]
    found = set().union(*map(imports, files)) - OURS - NAMED - sys.stdlib_module_names
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    lists = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    declared = {normal(line) for lines in lists for line in lines.split("\n") if line.strip() and line[0] != "#"}
    distributions = packages_distributions()
    undeclared = {name for name in found if not declared & set(map(normal, distributions.get(name, [name])))}
    assert not undeclared
