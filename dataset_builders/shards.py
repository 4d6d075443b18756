"""The shards of a build: any number of processes write them, and each shard appears completely or not at all.

A shard is `shard_size` consecutive utterances of one file of the corpus; it depends only on the corpus and the
settings. Its rows and its report appear together, because one rename of a folder commits both:

    DIR/.build/SPLIT/settings.json              the settings, which must be the same for every process of the build
    DIR/.build/SPLIT/staging/SHARD.HOST.PID/    a shard that is being written
    DIR/.build/SPLIT/shards/SHARD/              a committed shard: report.json, and Parquet files to be moved to data/
    DIR/.build/SPLIT/ends/FILE-SHARDS           the number of shards of a file of the corpus that was read to its end
    DIR/data/TASK/SPLIT-SHARD.parquet           the rows

A build that is killed loses only the shards being written. A committed shard is never written again. If two processes
write the same shard, one copy is kept.
"""

import hashlib
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from dataset_builders.files import differences

logger = logging.getLogger(__name__)

ROW_GROUP = 100  # rows that a viewer must read to show one row
_INDICES = (
    ("RANK", "WORLD_SIZE"),  # torchrun and accelerate
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),  # srun; SLURM_NTASKS is also set in a batch script without srun
)


class Worker(NamedTuple):
    """One of the processes that share a build."""

    rank: int = 0
    world_size: int = 1

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Worker":
        """Read rank and number of processes as torchrun, accelerate, srun or a SLURM array set them. Each task of an
        array may have several processes.

        Raises:
            ValueError: a variable is not an integer, or the rank is not below the number of processes.
        """
        rank, world_size = 0, 1
        for names in _INDICES:
            if all(name in environment for name in names):
                rank, world_size = (_integer(environment, name) for name in names)
                break
        if "SLURM_ARRAY_TASK_COUNT" in environment:
            step = _integer(environment, "SLURM_ARRAY_TASK_STEP") if "SLURM_ARRAY_TASK_STEP" in environment else 1
            first = _integer(environment, "SLURM_ARRAY_TASK_MIN")
            index = (_integer(environment, "SLURM_ARRAY_TASK_ID") - first) // step
            rank, world_size = (index * world_size + rank, world_size * _integer(environment, "SLURM_ARRAY_TASK_COUNT"))
        if not 0 <= rank < world_size:
            raise ValueError(
                f"the environment says rank {rank} of {world_size} processes; expected 0 to {world_size - 1}."
            )
        return cls(rank, world_size)

    def files(self, num_files: int) -> range:
        """Return the files of the corpus that this process reads: all files if there are fewer files than processes."""
        return range(self.rank, num_files, self.world_size) if num_files >= self.world_size else range(num_files)

    def has(self, file: int, chunk: int, num_files: int) -> bool:
        """Whether this process writes shard `chunk` of a file that it reads."""
        return num_files >= self.world_size or (file + chunk) % self.world_size == self.rank


class Shard(NamedTuple):
    file: int
    chunk: int

    def __str__(self) -> str:
        return f"{self.file:05d}-{self.chunk:05d}"


class BuildFolder:
    """The folder of a set, and the state of the build of one split."""

    def __init__(self, folder: str | Path, split: str):
        self.folder, self.split = Path(folder), split
        self.state = self.folder / ".build" / split

    @classmethod
    def splits(cls, folder: str | Path) -> "list[BuildFolder]":
        """Return all splits of a folder whose build was started."""
        return [cls(folder, settings.parent.name) for settings in sorted(Path(folder).glob(".build/*/settings.json"))]

    @property
    def settings(self) -> dict:
        return json.loads((self.state / "settings.json").read_text(encoding="utf-8"))

    def agree(self, settings: dict) -> None:
        """Write the settings, or compare them with those that the build was started with.

        Raises:
            ValueError: the settings differ, or the folder holds something else.
        """
        file = self.state / "settings.json"
        if not self.state.parent.exists() and self.folder.exists() and any(self.folder.iterdir()):
            raise ValueError(f"{self.folder} is not empty and holds no build; name a new or an empty folder.")
        for name in ("staging", "shards", "ends"):
            (self.state / name).mkdir(parents=True, exist_ok=True)
        mine = self.state / f"settings.{_process()}"
        mine.write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")
        try:
            os.link(mine, file)  # atomic; fails if another process was first
        except FileExistsError:
            if differing := differences(self.settings, json.loads(mine.read_text(encoding="utf-8"))):
                changes = "; ".join(f"{key} was {was!r}, now {now!r}" for key, (was, now) in differing.items())
                raise ValueError(
                    f"{self.folder} was started with other settings: {changes}. Use those, or name another output."
                ) from None
        finally:
            mine.unlink()

    def settle(self) -> None:
        """Clean up after killed processes of this machine: move committed rows to `data/`, delete unfinished shards."""
        for shard in sorted((self.state / "shards").iterdir()):
            self._move_rows(shard)
        for staging in (self.state / "staging").iterdir():
            host, pid = staging.name.rsplit(".", 2)[1:]
            if host == _host() and not psutil.pid_exists(int(pid)):
                shutil.rmtree(staging, ignore_errors=True)

    def is_done(self, shard: Shard) -> bool:
        return (self.state / "shards" / str(shard)).exists()

    def commit(self, shard: Shard, tables: Iterable[tuple[str, pa.Table]], report: dict) -> None:
        """Write a shard's rows, a table per task, and its report, atomically.

        Raises:
            OSError: writing fails, for example because the disk is full. Shards committed before are complete.
        """
        staging, target = self.state / "staging" / f"{shard}.{_process()}", self.state / "shards" / str(shard)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        hashes = {}
        for task, table in tables:
            file = staging / f"{task}.parquet"
            pq.write_table(
                table,
                file,
                row_group_size=ROW_GROUP,
                use_content_defined_chunking=True,  # so that the Hub stores only what changed
                write_page_index=True,
            )
            hashes[task] = _hash(file)
        (staging / "report.json").write_text(json.dumps({**report, "sha256": hashes}), encoding="utf-8")
        for file in staging.iterdir():
            _sync(file)
        _sync(staging)
        try:
            staging.rename(target)
        except OSError:
            if not target.exists():
                raise
            logger.warning("%s: another process has already written this shard; its rows are kept", target)
            shutil.rmtree(staging)
        _sync(target.parent)
        self._move_rows(target)

    def end(self, file: int, chunks: int) -> None:
        """Record the number of shards of a file of the corpus."""
        (self.state / "ends" / f"{file:05d}-{chunks:05d}").touch()

    def shards_of(self, file: int) -> int | None:
        """Return the number of shards of a file of the corpus, None if no process has read it to its end."""
        end = next((self.state / "ends").glob(f"{file:05d}-*"), None)
        return None if end is None else int(end.name.partition("-")[2])

    def missing(self) -> Iterator[str]:
        """Yield the names of shards that are not written yet. A file not yet read to its end counts as one."""
        for file in range(self.settings["num_files"]):
            chunks = self.shards_of(file)
            if chunks is None:
                yield f"{file:05d}-?"
            else:
                yield from (str(Shard(file, c)) for c in range(chunks) if not self.is_done(Shard(file, c)))

    def reports(self) -> Iterator[dict]:
        """Yield the reports of the committed shards, in order."""
        for shard in sorted((self.state / "shards").iterdir()):
            yield json.loads((shard / "report.json").read_text(encoding="utf-8"))

    def _move_rows(self, committed: Path) -> None:
        for file in committed.glob("*.parquet"):
            target = self.folder / "data" / file.stem / f"{self.split}-{committed.name}.parquet"
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.replace(file, target)
            except FileNotFoundError:  # another process moved it just now
                if not target.exists():
                    raise


def _host() -> str:
    return socket.gethostname().replace(".", "-")


def _process() -> str:
    return f"{_host()}.{os.getpid()}"


def _hash(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Flush a file or folder to disk, so that a power cut does not lose a committed shard."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _integer(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise ValueError(f"{name} is {environment[name]!r} in the environment; expected an integer.") from None
