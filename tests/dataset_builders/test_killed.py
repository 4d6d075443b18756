"""A build is killed at random moments, and continued with another number of processes each time. `LSM_KILLS=50 pytest
tests/dataset_builders/test_killed.py` kills more often than CI does."""

import hashlib
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("LSM_KILLS", "3"))
ROWS = 60 + 24 * KILLS  # enough rows for a build that takes a while


def build_nano(output: str, rank: int, world_size: int) -> None:
    """Do what `python -m dataset_builders.self_powered build` does, in a process that has already imported
    everything."""
    import torch

    from dataset_builders.nano.tasks import POOL_PATH
    from dataset_builders.self_powered import BuildArguments

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    settings = {"limit": ROWS, "shard_size": 4, "tasks_per_utterance": 2, "pool": str(POOL_PATH)}
    BuildArguments("nano", str(ROOT / "assets/nano/llm"), **settings).build(output)


@pytest.fixture(scope="module")
def processes():
    """Starts builds. Its server imports torch once and forks, so a build starts within a fraction of a second."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "dataset_builders.self_powered"])

    def start(output: Path, world_size: int):
        started = [context.Process(target=build_nano, args=(str(output), r, world_size)) for r in range(world_size)]
        for process in started:
            process.start()
        return started

    return start


def data_files(folder: Path) -> dict[str, str]:
    """Return all files under data/ with the hashes of their content."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in (folder / "data").rglob("*")
        if file.is_file()
    }


def rows_of(folder: Path) -> list[dict]:
    return [row for file in sorted(folder.glob("data/*/*.parquet")) for row in pq.read_table(file).to_pylist()]


def test_nothing_is_lost_or_written_twice_or_changed(processes, tmp_path):
    (whole,) = processes(tmp_path / "undisturbed", 1)
    whole.join()
    assert whole.exitcode == 0

    folder, draw, kills, seen = tmp_path / "killed", random.Random(0), 0, {}
    while kills < KILLS:
        before = len(list(folder.glob(".build/train/shards/*")))
        running = processes(folder, draw.choice([1, 1, 2, 3]))
        deadline = time.monotonic() + 60
        while len(list(folder.glob(".build/train/shards/*"))) == before and time.monotonic() < deadline:
            time.sleep(0.002)  # a kill before the first shard would test little
        time.sleep(draw.uniform(0, 0.05))
        for process in running:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        kills += any(process.exitcode == -signal.SIGKILL for process in running)
        there = data_files(folder)
        assert seen.items() <= there.items(), "a committed file changed or went away"
        seen = there
        assert not (folder / "README.md").exists(), "the build was over before it could be killed; give it more rows"

    (last,) = processes(folder, 1)
    last.join()
    assert last.exitcode == 0
    assert seen.items() <= data_files(folder).items()
    assert not list(folder.glob(".build/train/staging/*"))

    rows, expected = rows_of(folder), rows_of(tmp_path / "undisturbed")
    assert len(expected) == ROWS
    assert len({row["id"] for row in rows}) == len(rows) == len(expected)
    assert rows == expected  # ids, instructions, audio and, with a float32 LLM, responses
