"""What is built of this checkout is whole."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("language_models", "dataset_builders", "recipes")
BUILD = "from setuptools import build_meta; build_meta.build_wheel('dist'); build_meta.build_sdist('dist')"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of what a build reads: setuptools leaves its traces where it builds."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    others = [ROOT / name for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE")]
    for file in [*ROOT.glob("*_lsm.py"), *others]:
        shutil.copy(file, copy)
    return copy


@pytest.fixture(scope="module")
def built(checkout) -> Path:
    subprocess.run([sys.executable, "-c", BUILD], cwd=checkout, check=True, capture_output=True, timeout=120)
    return checkout / "dist"


@pytest.fixture(scope="module")
def ours() -> set[str]:
    """Modules, settings, tasks, pages: whatever stands in the packages, and the model's own files."""
    files = [*ROOT.glob("*_lsm.py"), *(file for name in PACKAGES for file in (ROOT / name).rglob("*"))]
    return {str(file.relative_to(ROOT)) for file in files if file.is_file() and file.suffix != ".pyc"}


def test_a_wheel_has_every_module_and_every_file_that_they_read(built, ours):
    [wheel] = built.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == ours


def test_a_source_distribution_has_them_too(built, ours):
    [sdist] = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert ours | {"setup.cfg", "pyproject.toml", "LICENSE"} <= names


def test_a_wheel_names_its_licence_and_its_extras(built):
    [wheel] = built.glob("self_powered_lsm-*.whl")
    archive = zipfile.ZipFile(wheel)
    [metadata] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    lines = archive.read(metadata).decode().splitlines()
    assert any(line.startswith("License") and line.endswith(": Apache-2.0") for line in lines)
    assert {"data", "eval", "train", "nano", "server", "dev"} <= {
        line.removeprefix("Provides-Extra: ") for line in lines if line.startswith("Provides-Extra: ")
    }
