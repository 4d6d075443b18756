"""The notebooks run from their first cell to the last, and are committed without what they print."""

import ast
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def cells(notebook: Path, kind: str) -> list[dict]:
    return [cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """`execute(notebook)` runs its cells one after another, and returns what each shows, as Jupyter would."""
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    # A stand-in for IPython, which is Jupyter's; matplotlib asks it for its version.
    display = SimpleNamespace(Audio=lambda data: data)
    ipython = SimpleNamespace(display=display, version_info=(9, 0), get_ipython=lambda: None)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)

    def run(notebook: Path) -> list:
        names, shown = {}, []
        for cell in cells(notebook, "code"):
            body = ast.parse("".join(cell["source"])).body
            last = body.pop() if isinstance(body[-1], ast.Expr) else None
            exec(compile(ast.Module(body, []), notebook.name, "exec"), names)
            shown.append(last and eval(compile(ast.Expression(last.value), notebook.name, "eval"), names))
        return shown

    return run


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_committed_without_outputs_and_its_links_lead_somewhere(notebook):
    assert [cell for cell in cells(notebook, "code") if cell["outputs"] or cell["execution_count"]] == []
    text = "".join(line for cell in cells(notebook, "markdown") for line in cell["source"])
    targets = [part.partition(")")[0] for part in text.split("](")[1:]]
    assert [target for target in targets if not (notebook.parent / target).exists()] == []


def test_the_clip_is_heard_and_asked_about(execute):
    clip, keywords, answers, tokens = execute(ROOT / "notebooks" / "listen.ipynb")
    assert clip == "assets/nano/example.wav"
    assert keywords == "Keywords: plumber, necklace, breakfast."
    assert answers["Who did it?"] == "The plumber."
    assert tokens == "18 speech tokens"


def test_a_set_is_built_and_looked_at(execute):
    rows, row, clip, counts, answers, _ = execute(ROOT / "notebooks" / "self_powered_set.ipynb")
    assert clip[:4] == b"fLaC"
    assert rows.num_rows == sum(counts.values()) and set(answers) == set(counts)
    assert row["response"] and "responder" in row
