"""README and docs: their links lead somewhere, and commands that tests/test_pages.py cannot run take their options."""

import functools
import os
import re
import subprocess
import sys

import pytest
import yaml
from pages import PAGES, ROOT, SUBCOMMANDS, blocks, called, commands


def options() -> list[tuple[str, ...]]:
    """Every option of a command of ours that is not run, behind the command's module and subcommand."""
    found = set()
    for block in (block for page in PAGES for block in blocks(page) if block.reason is not None):
        for module, arguments in filter(None, map(called, commands(block))):
            command = (module, *arguments[: arguments[:1] != [] and arguments[0] in SUBCOMMANDS])
            given = {word.partition("=")[0] for word in arguments if word.startswith("--")}
            found |= {(*command, option) for option in given - {"--config"}}  # of TRL, which keeps it to itself
    return sorted(found)


@functools.cache
def help_of(*command: str) -> str:
    environment = {**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", *command, "--help"]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("command", options(), ids=" ".join)
def test_commands_take_the_options_that_they_are_given(command):
    *module, option = command
    assert re.search(rf"{re.escape(option)}\b", help_of(*module))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if not target.startswith("http")]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_every_page_can_be_found_from_the_readme_which_is_short():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 200
    assert [page.name for page in PAGES[1:] if page.name not in readme] == []


def test_the_site_has_every_page():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    entries = [entry for section in site["nav"] for entry in section.values()]
    pages = {page for entry in entries if isinstance(entry, list) for named in entry for page in named.values()}
    assert {page.name for page in (ROOT / "docs").glob("*.md")} <= pages
