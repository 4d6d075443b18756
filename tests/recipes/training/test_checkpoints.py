"""Checkpoints: a training that stops at any step is resumed by the same command, with the same losses."""

import copy
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from dataset_builders.files import read_lines
from recipes.listening import collator
from recipes.training.callbacks import LOG, rewind
from recipes.training.checkpoints import COMPLETE, find_checkpoint, last_checkpoint
from recipes.training.trainer import LsmTrainer

ROOT = Path(__file__).parents[3]
SETTINGS = {"max_steps": 10, "save_strategy": "steps", "save_steps": 3, "learning_rate": 3e-3}  # 2.5 epochs of 16 rows


class StoppedError(Exception):
    """An error that stops a training, like a kill."""


@pytest.fixture
def stop_at(monkeypatch):
    """Return `stop_at(step)`, which makes later trainings stop within that step; None lets them finish."""
    step_of, original = {"stop": None}, LsmTrainer.training_step

    def training_step(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        if self.state.global_step + 1 == step_of["stop"]:
            raise StoppedError
        return loss

    monkeypatch.setattr(LsmTrainer, "training_step", training_step)
    return lambda step: step_of.update(stop=step)


def curve(folder):
    """Return the log of each step, without times and rates."""
    kept = ("step", "loss", "grad_norm", "learning_rate", "epoch", "mean_token_accuracy")
    return [{name: line[name] for name in kept} for line in read_lines(folder / LOG) if "loss" in line]


@pytest.mark.parametrize(
    "mode",
    [
        {"llm": "full"},
        {"llm": "lora", "lora_dropout": 0.3},
        {"llm": "frozen", "dataset_streaming": True, "shuffle_buffer": 8, "tasks": ["transcription"]},
        {"llm": "lora", "objective": "distill", "text_ratio": 0.5, "logging_steps": 2},
        {"llm": "frozen", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    ],
    ids=["full", "lora with dropout", "streaming", "distill, logged rarely", "accumulated"],
)
def test_stopped_at_any_step_it_gives_the_same_curve(train, stop_at, tmp_path, mode, monkeypatch, long_set_dir):
    monkeypatch.setattr("recipes.training.rows.MEGA_BATCHES", 2)  # a stream's first batch would need 200 rows
    if "dataset_streaming" in mode:
        mode = {**mode, "dataset_name": str(long_set_dir)}
    whole = curve(train(**SETTINGS, **mode, output_dir=str(tmp_path / "whole")))
    assert whole[-1]["step"] == 10
    for step in (4, 8):  # after the first checkpoint, and in a later epoch
        output = tmp_path / f"stopped-{step}"
        stop_at(step)
        with pytest.raises(StoppedError):
            train(**SETTINGS, **mode, output_dir=str(output))
        stop_at(None)
        train(**SETTINGS, **mode, output_dir=str(output))
        found = curve(output)
        assert [line["step"] for line in found] == [line["step"] for line in whole]
        for line, expected in zip(found, whole, strict=True):
            assert line == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_a_killed_training_is_resumed_from_the_last_complete_checkpoint(defaults, tmp_path, train):
    options = {**defaults, **SETTINGS, "max_steps": 40, "output_dir": str(tmp_path / "killed")}
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "recipes.sft", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    output = tmp_path / "killed"
    deadline = time.monotonic() + 240
    while not last_checkpoint(output) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert last_checkpoint(output) is not None
    options = {name: value for name, value in options.items() if name not in defaults or value != defaults[name]}
    assert curve(train(**options)) == curve_like(train(**{**options, "output_dir": str(tmp_path / "whole")}))


def curve_like(folder):
    return [pytest.approx(line, rel=1e-5, abs=1e-6) for line in curve(folder)]


def test_a_finished_training_is_not_repeated(train, tmp_path):
    before = curve(train(**SETTINGS))
    assert curve(train(**SETTINGS)) == before


def test_a_training_of_other_settings_does_not_go_on_unasked(train):
    train(**SETTINGS)
    with pytest.raises(ValueError, match=r"other settings \(learning_rate was 0.003, now 0.1\): name another --out"):
        train(**{**SETTINGS, "learning_rate": 0.1})
    train(**{**SETTINGS, "logging_steps": 5, "save_steps": 5})  # the loss does not depend on them
    train(**{**SETTINGS, "max_steps": 12}, resume_from_checkpoint="true")


@pytest.mark.parametrize("changed", ["model_name_or_path", "dataset_name"])
def test_a_model_or_a_set_that_changed_in_place_is_another(train, lsm, lsm_dir, set_dir, tmp_path, changed):
    folders = {"model_name_or_path": lsm_dir, "dataset_name": set_dir}
    options = {name: str(shutil.copytree(folder, tmp_path / name)) for name, folder in folders.items()}
    options |= {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "llm": "frozen"}
    train(**options)
    if changed == "dataset_name":
        file = next(Path(options[changed]).glob("data/*/*.parquet"))
        rows = pq.read_table(file)
        place, texts = rows.column_names.index("response"), [text.swapcase() for text in rows["response"].to_pylist()]
        pq.write_table(rows.set_column(place, "response", [texts]), file)
    else:
        other = copy.deepcopy(lsm)
        other.model.projector.linear.weight.data += 1
        other.save_pretrained(options[changed])
    with pytest.raises(ValueError, match=rf"content of {changed} was sha256:\w+, now sha256:\w+\): name another"):
        train(**options)


def test_a_checkpoint_that_is_not_whole_does_not_count(tmp_path):
    for step, whole in {3: True, 9: True, 12: False}.items():
        (tmp_path / f"checkpoint-{step}").mkdir()
        if whole:
            (tmp_path / f"checkpoint-{step}" / COMPLETE).touch()
    assert last_checkpoint(tmp_path).name == "checkpoint-9"
    with pytest.raises(ValueError, match=r"checkpoints of another program \(run.json is missing\)"):
        find_checkpoint(str(tmp_path), {}, None)
    (tmp_path / "run.json").write_text("{}")
    assert find_checkpoint(str(tmp_path), {}, None) == str(tmp_path / "checkpoint-9")
    assert not (tmp_path / "checkpoint-12").exists()
    with pytest.raises(ValueError, match="checkpoint-12 is not a complete checkpoint"):
        find_checkpoint(str(tmp_path), {}, str(tmp_path / "checkpoint-12"))


def test_asking_to_resume_where_nothing_is_names_the_folder(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} has no complete checkpoint"):
        find_checkpoint(str(tmp_path), {}, "true")


def test_repeated_steps_are_logged_once(tmp_path):
    (tmp_path / LOG).write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)))
    rewind(tmp_path / LOG, 2)
    assert [line["step"] for line in read_lines(tmp_path / LOG)] == [1, 2]
    rewind(tmp_path / "none.jsonl", 0)


def test_a_full_disk_leaves_the_last_checkpoint_and_says_which(train, monkeypatch, defaults):
    original = LsmTrainer._save_optimizer_and_scheduler

    def full(self, folder):
        if self.state.global_step > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, folder)

    monkeypatch.setattr(LsmTrainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(OSError, match=r"checkpoint-6 could not be written: .*No space left on device") as stopped:
        train(**SETTINGS, save_total_limit=1)
    output = Path(defaults["output_dir"])
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-3"]
    assert (
        f"The last complete checkpoint is {output / 'checkpoint-3'}; run the same command to resume"
        in stopped.value.__notes__[0]
    )


def test_older_checkpoints_go_when_the_next_is_whole(train, defaults):
    train(**SETTINGS, save_total_limit=2)
    names = sorted(path.name for path in Path(defaults["output_dir"]).glob("checkpoint-*"))
    assert names == ["checkpoint-10", "checkpoint-9"]


def test_a_dying_worker_ends_in_a_clear_error(train, monkeypatch, defaults):
    """The kernel may kill a worker because of its memory."""
    checkpoint = Path(defaults["output_dir"]) / "checkpoint-3" / COMPLETE
    trainer_process, load_clip = os.getpid(), collator.load_clip

    def die(*args):
        if os.getpid() != trainer_process and checkpoint.exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return load_clip(*args)

    monkeypatch.setattr(collator, "load_clip", die)
    with pytest.raises(RuntimeError, match=r"DataLoader worker .*(killed by signal|exited unexpectedly)") as stopped:
        train(**SETTINGS, dataloader_num_workers=1, dataloader_prefetch_factor=1)
    assert "checkpoint-3; run the same command to resume from it" in stopped.value.__notes__[0]


def test_a_loss_that_is_no_number_stops_with_what_to_change(train):
    with pytest.raises(
        FloatingPointError, match=r"the loss is (nan|inf) after \d steps: lower --learning_rate \(1e\+30\)"
    ):
        train(**{**SETTINGS, "learning_rate": 1e30})
