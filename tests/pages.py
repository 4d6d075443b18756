"""The pages of the documentation, and the code blocks in them.

A bash or Python block is run by tests/test_pages.py, unless a line above it says why not:

    <!-- not run: needs a GPU -->
"""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG", "SECURITY")),
    *sorted((ROOT / "docs").glob("*.md")),
]
SUBCOMMANDS = {"build", "inspect", "publish", "import", "export"}
_BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)


class Block(NamedTuple):
    """A code block, and the reason why it is not run, if there is one."""

    language: str
    code: str
    reason: str | None


def blocks(page: Path) -> list[Block]:
    return [Block(**found.groupdict()) for found in _BLOCK.finditer(page.read_text(encoding="utf-8"))]


def commands(block: Block) -> list[list[str]]:
    """The commands of a bash block, in words."""
    lines = block.code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def called(command: list[str]) -> tuple[str, list[str]] | None:
    """The module of ours that a command runs, and its arguments; None for a command of others."""
    if "recipes/sft.py" in command:
        start = command.index("recipes/sft.py")
        return "recipes.sft", command[start + 1 :]
    if "-m" in command and Path(command[0]).name == "python":
        start = command.index("-m") + 1
        return command[start], command[start + 1 :]
    return None
