"""Commands that make folders: named by what they are made of, whole or not at all, several at a time."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recipes.studies import stages
from recipes.studies.stages import alone_in, make, plan, seconds

# A command that notes how often it was started, does what it is told, and writes its folder.
COMMAND = """
import argparse, os, pathlib, sys, time
parser = argparse.ArgumentParser()
for name in ("output", "of", "fail", "wait-for", "touch", "sleep", "alone", "notes"):
    parser.add_argument(f"--{name}")
args = parser.parse_args()
folder = pathlib.Path(args.output)
folder.mkdir(exist_ok=True)
with open(folder / "starts", "a") as starts:
    starts.write(os.environ["OMP_NUM_THREADS"])
if args.alone:
    open(args.alone, "x")
if args.touch:
    pathlib.Path(args.touch).touch()
while args.wait_for and not pathlib.Path(args.wait_for).exists():
    time.sleep(0.01)
time.sleep(float(args.sleep or 0))
if args.fail and pathlib.Path(args.fail).exists():
    print("no power")
    sys.exit(3)
(folder / "whole").touch()
if args.alone:
    os.remove(args.alone)
"""


@pytest.fixture
def run(tmp_path) -> str:
    """The `run` of a stage."""
    (tmp_path / "command.py").write_text(COMMAND)
    return f"python {tmp_path / 'command.py'}"


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def build(folder, settings, *wanted, workers=1, told=None):
    """Make stages; returns their folders by key, and what failed."""
    planned = plan(settings, wanted, {"seed": 0}, folder)
    failed = make(planned.values(), folder, workers, (told if told is not None else []).append)
    return {key: folder / stage.name for key, stage in planned.items()}, failed


# The plan

SETTINGS = {
    "corpus": {"run": "python -m speak", "train": 4},
    "base": {"run": "python -m compose", "window-frames": 8, "seed": "{seed}"},
    "learn": {"run": "python -m sft", "output": "output_dir", "model": "{base}", "data": "nano={corpus}"},
    "other": {"run": "python -m other"},
}


def names(settings=SETTINGS, seed=0):
    return {key: stage.name for key, stage in plan(settings, ["learn"], {"seed": seed}, Path("out")).items()}


def changed(**options):
    """Which stages get another folder when options of them are changed."""
    before, after = names(), names({key: {**SETTINGS[key], **options.get(key, {})} for key in SETTINGS})
    return {key for key in before if before[key] != after[key]}


def test_only_what_is_needed_is_planned_and_each_comes_after_what_it_needs():
    planned = plan(SETTINGS, ["learn"], {"seed": 7}, Path("out"))
    assert list(planned) == ["base", "corpus", "learn"]
    base, corpus, learn = planned.values()
    assert base.command == (
        *("python", "-m", "compose", "--window-frames", "8", "--seed", "7"),
        *("--output", f"out/{base.name}.partial"),
    )
    assert learn.command == (
        *("python", "-m", "sft", "--model", f"out/{base.name}", "--data", f"nano=out/{corpus.name}"),
        *("--output_dir", f"out/{learn.name}.partial"),
    )
    assert learn.needs == (base.name, corpus.name)


def test_an_option_changes_its_own_folder_and_those_that_need_it():
    assert changed(corpus={"train": 5}) == {"corpus", "learn"}
    assert changed(base={"window-frames": 17}) == {"base", "learn"}
    assert changed(learn={"steps": 2}) == {"learn"}
    assert changed(other={"steps": 2}) == set()
    assert {key for key, name in names(seed=1).items() if name != names()[key]} == {"base", "learn"}


def test_where_the_study_stands_does_not_matter():
    elsewhere = plan(SETTINGS, ["learn"], {"seed": 0}, Path("another/place"))
    assert {key: stage.name for key, stage in elsewhere.items()} == names()


def test_what_the_files_hold_that_a_command_names_matters(tmp_path):
    (tmp_path / "llm").mkdir()
    settings = {"base": {"run": "python -m compose", "text": str(tmp_path / "llm")}}
    found = []
    for content in ("weights", "other weights", "weights"):
        (tmp_path / "llm" / "model").write_text(content)
        stages.fingerprint.cache_clear()
        found.append(plan(settings, ["base"], {"seed": 0}, Path("out"))["base"].name)
    assert found[0] == found[2] != found[1]


def test_options_are_words_as_the_recipes_take_them():
    options = {"flag": True, "off": False, "none": None, "list": ["a", "b=inf"], "rate": 1.0e-3, "more": {"a": 1}}
    settings = {"only": {"run": "accelerate launch 'a file.py'"} | options}
    command = plan(settings, ["only"], {"seed": 0}, Path("out"))["only"].command
    assert command[:-2] == (
        *("accelerate", "launch", "a file.py", "--flag", "--off", "false", "--list", "a", "b=inf"),
        *("--rate", "0.001", "--more", '{"a": 1}'),
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"learn": {"run": "a", "model": "{base}"}},
            "{base} in learn is not a stage with a `run`; the stages are learn",
        ),
        ({"learn": {"model": "{base}"}}, "'learn' is not a stage with a `run`"),
        ({"learn": {"run": "a", "x": "{b}"}, "b": {"run": "a", "x": "{learn}"}}, "learn → b → learn need each other"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        plan(settings, ["learn"], {"seed": 0}, Path("out"))


# The folders


def test_a_folder_is_made_once_for_all_that_need_it(folder, run):
    told = []
    settings = {"a": {"run": run}, "b": {"run": run, "of": "{a}"}, "c": {"run": run, "of": "{a}", "notes": "2"}}
    folders, failed = build(folder, settings, "b", "c", told=told)
    assert failed == {}
    assert [folder / stage.name for stage in told] == list(folders.values())
    assert all((path / "whole").exists() for path in folders.values())
    assert not list(folder.glob("*.partial"))
    build(folder, settings, "b", "c")
    assert [len((path / "starts").read_text()) for path in folders.values()] == [1, 1, 1]
    assert seconds(folder).keys() == {path.name for path in folders.values()}


def test_a_command_that_failed_is_named_with_the_end_of_its_log_and_goes_on_later(folder, run, tmp_path):
    (tmp_path / "off").touch()
    settings = {"a": {"run": run, "fail": str(tmp_path / "off")}, "b": {"run": run, "of": "{a}"}, "c": {"run": run}}
    folders, failed = build(folder, settings, "b", "c")
    assert failed.keys() == {folders["a"].name, folders["b"].name}
    assert "ended with exit code 3" in failed[folders["b"].name] and "no power" in failed[folders["b"].name]
    assert not folders["a"].exists() and not folders["b"].exists() and (folders["c"] / "whole").exists()

    stages_before = plan(settings, ["b"], {"seed": 0}, folder)
    (tmp_path / "off").unlink()
    assert make(stages_before.values(), folder, 1, lambda stage: None) == {}
    assert len((folders["a"] / "starts").read_text()) == 2  # it went on with what the first attempt had left


def test_a_command_that_writes_no_folder_has_failed(folder):
    _, failed = build(folder, {"a": {"run": "python -c ''"}}, "a")
    assert "did not write a-" in next(iter(failed.values()))


def test_as_many_run_at_a_time_as_there_are_workers(folder, run, tmp_path, monkeypatch):
    """Each of two waits for the other; and each has its share of the cores."""
    monkeypatch.setattr(stages.os, "cpu_count", lambda: 8)
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    settings = {"a": {"run": run, "touch": one, "wait-for": two}, "b": {"run": run, "touch": two, "wait-for": one}}
    folders, failed = build(folder, settings, "a", "b", workers=2)
    assert failed == {}
    assert (folders["a"] / "starts").read_text() == "4"


def test_no_more_run_at_a_time_than_there_are_workers(folder, run, tmp_path):
    alone = {"run": run, "alone": str(tmp_path / "busy"), "sleep": 0.2}
    _, failed = build(folder, {"a": alone, "b": alone}, "a", "b", workers=1)
    assert failed == {}


# What is killed


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's death")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_commands_die_with_whoever_started_them(folder, how):
    command = "import os, sys, time; os.mkdir(sys.argv[-1]); print(os.getpid(), flush=True); time.sleep(60)"
    settings = {"a": {"run": f'python -c "{command}"'}}
    code = (
        # what a shell starts in the background ignores interrupts
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from pathlib import Path; from recipes.studies.stages import make, plan\n"
        f"folder = Path({str(folder)!r})\n"
        f"make(plan({settings!r}, ['a'], {{'seed': 0}}, folder).values(), folder, 1, print)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    log = folder / f"{plan(settings, ['a'], {'seed': 0}, folder)['a'].name}.log"
    while not (log.exists() and log.read_text().count("\n") == 2):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(how)
    process.wait()
    pid = int(log.read_text().splitlines()[1])
    deadline = time.monotonic() + 10
    while is_running(pid):
        assert time.monotonic() < deadline, "the command outlived the study"
        time.sleep(0.05)
    assert list(folder.glob("a-*.partial")) and not [path for path in folder.glob("a-*") if path.suffix == ""]


def test_a_folder_is_for_one_at_a_time(tmp_path):
    with alone_in(tmp_path / "new"):
        second = pytest.raises(ValueError, match="another process is using")
        with second, alone_in(tmp_path / "new"):
            pass
    with alone_in(tmp_path / "new"):
        pass
