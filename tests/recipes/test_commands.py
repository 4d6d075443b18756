"""`lsm COMMAND ...`: short names for all commands, and one grammar for their options."""

import subprocess
import sys

import pytest

from recipes import __main__ as lsm
from recipes.training.arguments import LsmScriptArguments, LsmTrainingArguments
from recipes.training.command_line import parse


def run(monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["lsm", *words])
    lsm.main()


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)])
def test_help_names_every_command(monkeypatch, capsys, words):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, *words)
    assert not ended.value.code
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert listed == list(lsm.COMMANDS)


def test_help_imports_nothing_heavy():
    code = "import sys; from recipes import __main__ as lsm; lsm.usage(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("name", lsm.COMMANDS)
def test_a_command_tells_its_options_under_its_short_name(monkeypatch, capsys, name):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, name, "--help")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: lsm {name} ")


def test_an_unknown_command_is_refused_with_those_there_are(monkeypatch):
    with pytest.raises(SystemExit, match="'trian' is not a command; expected one of compose, data, .*train"):
        run(monkeypatch, "trian")


@pytest.mark.parametrize(
    "words",
    [
        "--dataset_name d --dataset_train_split s --output_dir o --align_steps 7",
        "--dataset-name d --dataset-train-split s --output-dir o --align-steps 7",
        "--data d --split s --output o --align-steps=7",
        "--data=d --split=s --output=o --align_steps=7",
    ],
)
def test_trainings_take_the_names_of_the_other_commands_and_of_trl(monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["sft", *words.split()])
    script, training = parse(LsmScriptArguments, LsmTrainingArguments)
    assert (script.dataset_name, script.dataset_train_split) == ("d", "s")
    assert (training.output_dir, training.align_steps) == ("o", 7)
