"""The work of a build, cut into shards that are written whole or not at all, by any number of processes.

A shard is `shard_size` utterances that follow one another in one file of the corpus; it depends on the corpus and the
settings alone. Its rows and its report appear together, by one rename of a folder:

    DIR/.build/SPLIT/settings.json              what every process of this build, now and later, must agree on
    DIR/.build/SPLIT/staging/SHARD.HOST.PID/    being written
    DIR/.build/SPLIT/shards/SHARD/              committed: report.json, and Parquet files on their way to data/
    DIR/.build/SPLIT/ends/FILE-SHARDS           a file of the corpus was read to its end, and has so many shards
    DIR/data/TASK/SPLIT-SHARD.parquet           the rows

So a kill at any moment loses the shards being written and nothing else, a committed shard is never written again, and
two processes that write the same shard end with one.
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

import pyarrow as pa
import pyarrow.parquet as pq

from dataset_builders.files import differences

logger = logging.getLogger(__name__)

ROW_GROUP = 100  # rows: what a viewer reads to show one
_INDICES = (
    ("RANK", "WORLD_SIZE"),  # torchrun and accelerate
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),  # srun; not SLURM_NTASKS: a batch script has it without any srun
)


class Worker(NamedTuple):
    """One of the processes that share a build."""

    rank: int = 0
    world_size: int = 1

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Worker":
        """Rank and number of processes as torchrun, accelerate, srun or a SLURM array set them; tasks of an array may
        each have several processes.

        Raises:
            ValueError: what is set is no number, or no rank of its world.
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
            rank, world_size = (
                index * world_size + rank,
                world_size * _integer(environment, "SLURM_ARRAY_TASK_COUNT"),
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"the environment says process {rank} of {world_size}; expected 0 to {world_size - 1}.")
        return cls(rank, world_size)

    def files(self, num_files: int) -> range:
        """The files of the corpus that this process reads: all of them where there are fewer than processes."""
        return range(self.rank, num_files, self.world_size) if num_files >= self.world_size else range(num_files)

    def has(self, file: int, chunk: int, num_files: int) -> bool:
        """Whether shard `chunk` of a file that it reads is its own."""
        return num_files >= self.world_size or (file + chunk) % self.world_size == self.rank


class Shard(NamedTuple):
    file: int
    chunk: int

    def __str__(self) -> str:
        return f"{self.file:05d}-{self.chunk:05d}"


class BuildFolder:
    """The folder of a set of which one split is being built, and what of it is done."""

    def __init__(self, folder: str | Path, split: str):
        self.folder, self.split = Path(folder), split
        self.state = self.folder / ".build" / split

    @classmethod
    def splits(cls, folder: str | Path) -> "list[BuildFolder]":
        """All splits that were built, or begun, in a folder."""
        return [cls(folder, settings.parent.name) for settings in sorted(Path(folder).glob(".build/*/settings.json"))]

    @property
    def settings(self) -> dict:
        return json.loads((self.state / "settings.json").read_text(encoding="utf-8"))

    def agree(self, settings: dict) -> None:
        """Note the settings, or compare them with those that the build was begun with.

        Raises:
            ValueError: they differ, or the folder holds something else.
        """
        file = self.state / "settings.json"
        if not self.state.parent.exists() and self.folder.exists() and any(self.folder.iterdir()):
            raise ValueError(f"{self.folder} holds something that is no build; name a new or an empty folder.")
        for name in ("staging", "shards", "ends"):
            (self.state / name).mkdir(parents=True, exist_ok=True)
        mine = self.state / f"settings.{_process()}"
        mine.write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")
        try:
            os.link(mine, file)  # fails if another process was first, and is never half written
        except FileExistsError:
            begun, given = self.settings, json.loads(mine.read_text(encoding="utf-8"))
            if differing := differences(begun, given):
                changes = "; ".join(f"{key} was {was!r}, now {now!r}" for key, (was, now) in differing.items())
                raise ValueError(
                    f"{self.folder} was begun with other settings: {changes}. Go on with those, or name another output."
                ) from None
        finally:
            mine.unlink()

    def settle(self) -> None:
        """Finish what killed processes of this machine left: committed rows go to their place, half shards go away."""
        for shard in sorted((self.state / "shards").iterdir()):
            self._move_rows(shard)
        for staging in (self.state / "staging").iterdir():
            host, pid = staging.name.rsplit(".", 2)[1:]
            if host == _host() and not _is_alive(int(pid)):
                shutil.rmtree(staging, ignore_errors=True)

    def is_done(self, shard: Shard) -> bool:
        return (self.state / "shards" / str(shard)).exists()

    def commit(self, shard: Shard, tables: Iterable[tuple[str, pa.Table]], report: dict) -> None:
        """Write a shard's rows, a table per task, and its report: all of it is there afterwards, or nothing.

        Raises:
            OSError: the disk is full, or the like; what was committed before is whole.
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
                use_content_defined_chunking=True,  # the Hub then stores again only what changed
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
            logger.warning("%s: another process wrote it too; its rows stay", target)
            shutil.rmtree(staging)
        _sync(target.parent)
        self._move_rows(target)

    def end(self, file: int, chunks: int) -> None:
        """Note that a file of the corpus has so many shards."""
        (self.state / "ends" / f"{file:05d}-{chunks:05d}").touch()

    def shards_of(self, file: int) -> int | None:
        """How many shards a file of the corpus has, None if nobody has read it to its end."""
        found = next((self.state / "ends").glob(f"{file:05d}-*"), None)
        return None if found is None else int(found.name.partition("-")[2])

    def missing(self) -> Iterator[str]:
        """Shards that are still to be written, by name; a file not yet read to its end counts as one."""
        for file in range(self.settings["num_files"]):
            chunks = self.shards_of(file)
            if chunks is None:
                yield f"{file:05d}-?"
            else:
                yield from (str(Shard(file, c)) for c in range(chunks) if not self.is_done(Shard(file, c)))

    def reports(self) -> Iterator[dict]:
        """The reports of the committed shards, in order."""
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


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _hash(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Have the disk write a file or folder, so that a power cut loses no committed shard."""
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
