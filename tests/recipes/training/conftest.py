"""Fixtures that run the recipe in this process, on a tiny LSM and a set of sixteen rows."""

import shutil
from dataclasses import fields
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from trl import ModelConfig

from dataset_builders.files import read_lines
from recipes import sft
from recipes.training.arguments import LsmScriptArguments, LsmTrainingArguments
from recipes.training.callbacks import LOG


@pytest.fixture
def parts_of():
    """Return `parts_of(options)`, which gives the recipe's three kinds of arguments, each with its own options."""

    def sort(options: dict) -> list:
        parts, left = [], dict(options)
        for kind in (LsmScriptArguments, LsmTrainingArguments, ModelConfig):
            known = {field.name for field in fields(kind)}
            parts.append(kind(**{name: left.pop(name) for name in list(left) if name in known}))
        assert not left
        return parts

    return sort


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Skip the 5 s that `datasets` sleeps when a stream is left before its end."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


@pytest.fixture
def defaults(lsm_dir, set_dir, tmp_path) -> dict:
    return {
        "model_name_or_path": str(lsm_dir),
        "dataset_name": str(set_dir),
        "output_dir": str(tmp_path / "out"),
        "llm": "full",
        "objective": "response",
        "align_steps": 0,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "disable_tqdm": True,
        "lora_dropout": 0.0,
    }


@pytest.fixture
def train(defaults, parts_of):
    """Return `train(llm="lora", ...)`, which trains, by default for two steps, and returns the output folder."""

    def run(**options) -> Path:
        parts = parts_of({**defaults, **options})
        sft.train(*parts)
        return Path(parts[1].output_dir)

    return run


@pytest.fixture
def losses():
    """Return the losses of all steps in a training's log."""

    def read(folder: Path) -> list[float]:
        return [line["loss"] for line in read_lines(folder / LOG) if "loss" in line]

    return read


@pytest.fixture(scope="session")
def long_set_dir(set_dir, tmp_path_factory) -> Path:
    """Return the set's transcriptions forty times, because streams of a few rows would open their files all the
    time."""
    (file,) = sorted((set_dir / "data" / "transcription").glob("*.parquet"))[:1]
    rows = pq.read_table(file)
    folder = tmp_path_factory.mktemp("sets") / "long"
    (folder / "data" / "transcription").mkdir(parents=True)
    shutil.copy(set_dir / "README.md", folder)
    pq.write_table(pa.concat_tables([rows] * 40), folder / "data" / "transcription" / file.name)
    return folder
