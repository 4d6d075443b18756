"""README and docs: their links lead somewhere, and their commands take the options that they are given."""

import functools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SUBCOMMANDS = {"build", "inspect", "publish", "import", "export"}


def commands() -> list[tuple[str, ...]]:
    """Every command of the pages that is one of ours: the module, its subcommand if it has one, and its options."""
    found = set()
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                starts = [i for i, word in enumerate(words) if word == "-m" or word.startswith("recipes/sft.py")]
                if starts:
                    module, *rest = words[starts[-1] + (words[starts[-1]] == "-m") :]
                    module = module.removesuffix(".py").replace("/", ".")
                    called = (module, *rest[: rest[:1] != [] and rest[0] in SUBCOMMANDS])
                    options = {word.partition("=")[0] for word in rest if word.startswith("--")}
                    found |= {
                        (*called, option) for option in options - {"--config"}
                    }  # of TRL, which keeps it to itself
    return sorted(found)


@functools.cache
def help_of(*called: str) -> str:
    environment = {**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *called, "--help"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_commands_take_the_options_that_they_are_given(command):
    *called, option = command
    assert re.search(rf"{re.escape(option)}\b", help_of(*called))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if not target.startswith("http")]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_every_page_can_be_found_from_the_readme_which_is_short():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 200
    assert [page.name for page in PAGES[1:] if page.name not in readme] == []
