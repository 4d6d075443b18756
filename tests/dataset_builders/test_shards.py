"""Builds by several processes, and the files after each step of a commit."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataset_builders.shards import BuildFolder, Shard, Worker

SETTINGS = {"seed": 0, "num_files": 1}


@pytest.fixture
def folder(tmp_path):
    folder = BuildFolder(tmp_path / "set", "train")
    folder.agree(SETTINGS)
    return folder


def table(*values):
    return pa.table({"id": list(values)})


def files(folder):
    return sorted(str(file.relative_to(folder.folder)) for file in folder.folder.rglob("*") if file.is_file())


# The work of each process


@pytest.mark.parametrize(
    ("environment", "worker"),
    [
        ({}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4"}, (3, 4)),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, (1, 2)),
        # A batch script without srun is one process, even if it has several tasks.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (0, 1)),
        ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_COUNT": "4"}, (2, 4)),
        (
            {
                "SLURM_ARRAY_TASK_ID": "9",
                "SLURM_ARRAY_TASK_MIN": "5",
                "SLURM_ARRAY_TASK_STEP": "2",
                "SLURM_ARRAY_TASK_COUNT": "4",
            },
            (2, 4),
        ),
        # Two tasks of an array, three processes in each.
        (
            {
                "RANK": "2",
                "WORLD_SIZE": "3",
                "SLURM_ARRAY_TASK_ID": "1",
                "SLURM_ARRAY_TASK_MIN": "0",
                "SLURM_ARRAY_TASK_COUNT": "2",
            },
            (5, 6),
        ),
    ],
)
def test_rank_and_world_size_come_from_the_environment(environment, worker):
    assert Worker.from_environment(environment) == worker


@pytest.mark.parametrize(
    ("environment", "message"),
    [({"RANK": "x", "WORLD_SIZE": "2"}, "RANK is 'x'"), ({"RANK": "2", "WORLD_SIZE": "2"}, "rank 2 of 2 processes")],
)
def test_a_broken_environment_is_refused(environment, message):
    with pytest.raises(ValueError, match=message):
        Worker.from_environment(environment)


@pytest.mark.parametrize("num_files", [1, 2, 5, 8])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_every_shard_has_exactly_one_process(num_files, world_size):
    owners = {}
    for rank in range(world_size):
        worker = Worker(rank, world_size)
        for file in worker.files(num_files):
            for chunk in range(6):
                if worker.has(file, chunk, num_files):
                    owners.setdefault((file, chunk), []).append(rank)
    assert set(owners) == {(file, chunk) for file in range(num_files) for chunk in range(6)}
    assert all(len(ranks) == 1 for ranks in owners.values())


def test_where_there_are_files_enough_each_process_reads_its_own():
    assert [list(Worker(rank, 2).files(5)) for rank in range(2)] == [[0, 2, 4], [1, 3]]


# Commits


def test_a_commit_leaves_rows_and_a_report_and_nothing_else(folder):
    folder.commit(Shard(0, 0), {"intent": table("a"), "keyword": table("b", "c")}.items(), {"rows": 3})
    assert files(folder) == [
        ".build/train/settings.json",
        ".build/train/shards/00000-00000/report.json",
        "data/intent/train-00000-00000.parquet",
        "data/keyword/train-00000-00000.parquet",
    ]
    (report,) = folder.reports()
    assert (report["rows"], set(report["sha256"])) == (3, {"intent", "keyword"})
    assert pq.read_table(folder.folder / "data/keyword/train-00000-00000.parquet")["id"].to_pylist() == ["b", "c"]


def test_a_shard_without_rows_is_done_all_the_same(folder):
    folder.commit(Shard(0, 0), {}.items(), {"rows": 0})
    assert folder.is_done(Shard(0, 0))


@pytest.mark.parametrize("step", ["write_table", "rename", "replace"])
def test_a_kill_within_a_commit_leaves_all_of_the_shard_or_nothing(folder, monkeypatch, step):
    """After each step, the next process finds a complete shard or none."""
    with monkeypatch.context() as patch:
        owner = {"write_table": pq, "rename": type(folder.folder), "replace": os}[step]
        count = iter(range(9))
        real = getattr(owner, step)

        def die(*args, **kwargs):
            if next(count) == (0 if step == "rename" else 1):  # between the shard's two files
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        patch.setattr(owner, step, die)
        with pytest.raises(KeyboardInterrupt):
            folder.commit(Shard(0, 0), {"intent": table("a"), "keyword": table("b")}.items(), {"rows": 2})
    was_committed = folder.is_done(Shard(0, 0))
    assert was_committed == (step == "replace")
    folder.settle()
    there = [file for file in files(folder) if file.startswith("data")]
    assert there == (
        ["data/intent/train-00000-00000.parquet", "data/keyword/train-00000-00000.parquet"] * was_committed
    )
    if not was_committed:
        folder.commit(Shard(0, 0), {"intent": table("a"), "keyword": table("b")}.items(), {"rows": 2})
        assert len([file for file in files(folder) if file.startswith("data")]) == 2


def test_of_two_processes_that_write_the_same_shard_the_first_stays(folder, tmp_path, caplog):
    folder.commit(Shard(0, 0), {"intent": table("first")}.items(), {"rows": 1})
    folder.commit(Shard(0, 0), {"intent": table("second")}.items(), {"rows": 1})
    assert pq.read_table(folder.folder / "data/intent/train-00000-00000.parquet")["id"].to_pylist() == ["first"]
    assert "another process has already written this shard" in caplog.text
    assert not list((folder.state / "staging").iterdir())


def test_what_a_dead_process_was_writing_goes_away_and_what_a_live_one_writes_stays(folder):
    from dataset_builders.shards import _host

    dead = folder.state / "staging" / f"00000-00001.{_host()}.{2**22 + 1}"
    alive = folder.state / "staging" / f"00000-00002.{_host()}.{os.getppid()}"
    elsewhere = folder.state / "staging" / "00000-00003.another-machine.1"
    for staging in (dead, alive, elsewhere):
        staging.mkdir()
    folder.settle()
    assert [staging.exists() for staging in (dead, alive, elsewhere)] == [False, True, True]


def test_a_full_disk_is_told_and_what_was_committed_stays(folder, monkeypatch):
    folder.commit(Shard(0, 0), {"intent": table("a")}.items(), {"rows": 1})

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", full)
        with pytest.raises(OSError, match="No space left"):
            folder.commit(Shard(0, 1), {"intent": table("b")}.items(), {"rows": 1})
    assert not folder.is_done(Shard(0, 1))
    assert pq.read_table(folder.folder / "data/intent/train-00000-00000.parquet").num_rows == 1


def test_a_row_group_is_what_a_viewer_reads_to_show_a_row(folder):
    folder.commit(Shard(0, 0), {"intent": table(*map(str, range(250)))}.items(), {"rows": 250})
    file = pq.ParquetFile(folder.folder / "data/intent/train-00000-00000.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [100, 100, 50]
    assert file.metadata.row_group(0).column(0).has_offset_index


# What is missing


def test_a_build_knows_what_is_missing(folder):
    assert list(folder.missing()) == ["00000-?"]
    folder.commit(Shard(0, 1), {}.items(), {})
    folder.end(0, 3)
    assert list(folder.missing()) == ["00000-00000", "00000-00002"]


# Settings


def test_a_build_is_continued_only_with_its_own_settings(folder):
    BuildFolder(folder.folder, "train").agree(dict(SETTINGS))
    with pytest.raises(ValueError, match=r"seed was 0, now 1; tasks was None, now 'x'. Use those, or name"):
        BuildFolder(folder.folder, "train").agree({**SETTINGS, "seed": 1, "tasks": "x"})


def test_another_split_has_settings_of_its_own(folder):
    test = BuildFolder(folder.folder, "test")
    test.agree({**SETTINGS, "seed": 5})
    assert [build.split for build in BuildFolder.splits(folder.folder)] == ["test", "train"]
    assert test.settings["seed"] == 5


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="is not empty and holds no build"):
        BuildFolder(tmp_path, "train").agree(SETTINGS)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_settings_are_never_half_written(folder):
    assert json.loads((folder.state / "settings.json").read_text()) == SETTINGS
    assert sorted(path.name for path in folder.state.iterdir()) == ["ends", "settings.json", "shards", "staging"]
