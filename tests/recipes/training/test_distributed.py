"""Several processes give the same training as one, with DDP on the CPU with gloo."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dataset_builders.files import read_lines
from recipes.training.callbacks import FOLLOWING, LOG

ROOT = Path(__file__).parents[3]
DISTILL = {"response_tasks": ["transcription"], "distill_top_k": 20}


@pytest.fixture
def launch(defaults, tmp_path):
    """`launch(processes, ...)` runs `recipes/sft.py`; returns the training's folder. By torchrun: `accelerate launch`
    starts several processes on GPUs alone."""

    def run(processes: int, **options) -> Path:
        options = {**defaults, **options}
        values = {name: value if isinstance(value, list) else [value] for name, value in options.items()}
        flags = [part for name, value in values.items() for part in (f"--{name}", *map(str, value))]
        torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [sys.executable, "-m", *torchrun, "recipes/sft.py", *flags]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return Path(options["output_dir"])

    return run


@pytest.mark.parametrize(
    "mode",
    [
        {"llm": "full"},
        # rows of like cost go together: one process often hears nothing while the other does
        {"llm": "lora", "objective": "distill", "text_ratio": 1.0, **DISTILL},
    ],
    ids=["full", "distill with text rows"],
)
def test_two_processes_give_the_losses_of_one(launch, train, losses, tmp_path, mode, corpus_dir):
    mode = {**mode, "max_steps": 6, "learning_rate": 3e-3, "max_grad_norm": 1.0}
    look = {"following_corpus": str(corpus_dir), "following_split": "train", "following_limit": 2}
    look |= {"following_steps": 6, "checker": "dataset_builders.nano.tasks"}
    one = train(**mode, **look, per_device_train_batch_size=4, output_dir=str(tmp_path / "one"))
    two = launch(2, **mode, **look, per_device_train_batch_size=2, output_dir=str(tmp_path / "two"))
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)
    assert len(losses(two)) == 6
    assert read_lines(two / FOLLOWING) == read_lines(one / FOLLOWING)
    for name in ("grad_norm", "epoch"):
        found, expected = ([line[name] for line in read_lines(f / LOG) if "loss" in line] for f in (two, one))
        assert found == pytest.approx(expected, rel=1e-3)


def test_two_processes_go_on_where_they_were_stopped(launch, losses, tmp_path):
    """It resumes in the third epoch, whose order of rows differs from that of the first."""
    options = {"max_steps": 10, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2}
    options |= {"objective": "distill"}
    whole = launch(2, **options, output_dir=str(tmp_path / "whole"))
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    (whole / "checkpoint-9").rename(stopped / "checkpoint-9")
    for name in ("run.json", LOG):
        (stopped / name).write_bytes((whole / name).read_bytes())
    launch(2, **options, output_dir=str(stopped))
    assert losses(stopped) == pytest.approx(losses(whole), rel=1e-5)


# Writes the names of the threads of a process when Python begins to shut down.
AT_EXIT = """
import atexit, os
from pathlib import Path

def write():
    names = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
    Path(__file__).with_name(f"{os.environ['RANK']}.threads").write_text(" ".join(names))

if "RANK" in os.environ:
    atexit.register(write)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc has the names of the threads")
def test_no_thread_of_the_group_runs_while_python_shuts_down(launch, tmp_path, monkeypatch):
    """It would abort the process every few runs."""
    (tmp_path / "sitecustomize.py").write_text(AT_EXIT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    launch(2, max_steps=1, per_device_train_batch_size=2, output_dir=str(tmp_path / "out"))
    for rank in range(2):
        assert "gloo" not in (tmp_path / f"{rank}.threads").read_text()
