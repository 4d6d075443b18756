"""Folders that commands make: each whole or not at all, made once for all that need it, several at a time.

A stage is a command and its options, as YAML has them:

    sft:
      run: python -m recipes.sft
      output: output_dir                 # the option that names the folder; `output` if this line is missing
      model_name_or_path: "{compose}"    # the folder of another stage, which is made before
      seed: "{seed}"
      tasks: [intent, transcription]     # --tasks intent transcription
      bf16: true                         # --bf16, without a value
      packing: null                      # no such option

A folder is named by a hash of its command, of the folders named there, and of the files named there: another option
makes another folder. The code of the commands is not in the hash: after a change in it, delete what it made. A command
writes to `FOLDER.partial`, which stays when it is stopped: all recipes go on with what they find.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from dataset_builders import files
from dataset_builders.files import partial_of, write_whole

logger = logging.getLogger(__name__)

PLACE = re.compile(r"\{(\w+)\}")
SECONDS = "seconds.json"
LOOK = 0.2  # seconds between two looks at what runs
fingerprint = cache(files.fingerprint)  # many rows name the same folders


@dataclass(frozen=True)
class Stage:
    """A folder's `name`, the `command` that makes it, and the names of the folders that it `needs`."""

    name: str
    command: tuple[str, ...]
    needs: tuple[str, ...]


def plan(settings: Mapping[str, Mapping], wanted: Iterable[str], seed: int, folder: Path) -> dict[str, Stage]:
    """The stages that are needed for those `wanted`, by their keys in `settings`; each comes after what it needs.

    Args:
        settings: stages as in the text above.
        seed: in the place of `{seed}`.
        folder: which the stages' folders are in.

    Raises:
        ValueError: a stage that is not there or has no `run`, or stages that need each other.
    """
    found: dict[str, Stage] = {}

    def add(key: str, above: tuple[str, ...]) -> None:
        if key in above:
            raise ValueError(f"the stages {' → '.join((*above, key))} need each other.")
        if not (settings.get(key) or {}).get("run"):
            where = f"{{{key}}} in {above[-1]}" if above else repr(key)
            raise ValueError(f"{where} is no stage with a `run`; there are {', '.join(settings)}.")
        words = _words(settings[key])
        needs = [name for word in words for name in PLACE.findall(word) if name != "seed"]
        for need in needs:
            if need not in found:
                add(need, (*above, key))
        names = {"seed": str(seed)} | {need: found[need].name for need in needs}
        identity = [_fill(words, names), [fingerprint(word.rpartition("=")[2]) for word in words]]
        name = f"{key}-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:10]}"
        output = [f"--{settings[key].get('output', 'output')}", str(partial_of(folder / name))]
        command = _fill(words, {key: name if key == "seed" else str(folder / name) for key, name in names.items()})
        found[key] = Stage(name, (*command, *output), tuple(found[need].name for need in needs))

    for key in wanted:
        if key not in found:
            add(key, ())
    return found


def _words(stage: Mapping) -> list[str]:
    """The command line, with places not filled and without its output."""
    words = shlex.split(stage["run"])
    for key, value in stage.items():
        if key in ("run", "output") or value is None:
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        words += [f"--{key}", *(json.dumps(v) if isinstance(v, dict | bool) else str(v) for v in values)]
    return words


def _fill(words: Sequence[str], names: Mapping[str, str]) -> list[str]:
    return [PLACE.sub(lambda place: names[place[1]], word) for word in words]


def make(stages: Iterable[Stage], folder: Path, workers: int, finished: Callable[[Stage], None]) -> dict[str, str]:
    """Make the folders that are not there yet, `workers` at a time, in the order given as far as they can begin.

    Args:
        stages: what to make, and all that it needs.
        folder: which the stages' folders are in; logs are beside them.
        workers: commands at a time; each has its share of the cores.
        finished: told of each that is whole.

    Returns:
        By name of those that could not be made, why not; the others are made all the same.
    """
    waiting = [stage for stage in dict.fromkeys(stages) if not (folder / stage.name).exists()]
    running: dict[Stage, tuple[subprocess.Popen, float]] = {}
    failed: dict[str, str] = {}
    total = len(waiting)
    try:
        while waiting or running:
            for stage in list(waiting):
                if broken := next((need for need in stage.needs if need in failed), None):
                    waiting.remove(stage)
                    failed[stage.name] = failed[broken]
                elif len(running) < workers and all((folder / need).exists() for need in stage.needs):
                    waiting.remove(stage)
                    logger.info("[%d/%d] %s ...", total - len(waiting), total, stage.name)
                    running[stage] = _start(stage, folder, workers), time.monotonic()
            for stage, (process, start) in list(running.items()):
                if process.poll() is not None:
                    del running[stage]
                    _add_seconds(folder, stage.name, time.monotonic() - start)
                    if reason := _end(stage, folder, process.returncode):
                        logger.error(reason)
                        failed[stage.name] = reason
                    else:
                        logger.info("%s: %.0f s", stage.name, seconds(folder)[stage.name])
                        finished(stage)
            time.sleep(LOOK if running else 0)
    finally:
        for stage, (process, start) in running.items():
            _add_seconds(folder, stage.name, time.monotonic() - start)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
    return failed


def _start(stage: Stage, folder: Path, workers: int) -> subprocess.Popen:
    threads = max(1, (os.cpu_count() or 1) // workers)
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    environment = {**os.environ, "PATH": programs, "OMP_NUM_THREADS": str(threads)}
    environment.setdefault("HF_DATASETS_CACHE", str(folder / ".cache"))
    with open(folder / f"{stage.name}.log", "a", encoding="utf-8") as log:
        log.write(f"$ {shlex.join(stage.command)}\n")
        log.flush()
        settings = {"stdout": log, "stderr": subprocess.STDOUT, "env": environment, "start_new_session": True}
        return subprocess.Popen(stage.command, **settings, preexec_fn=die_with_parent)


def _end(stage: Stage, folder: Path, code: int) -> str | None:
    """Give a folder that is whole its name, or say why it is not."""
    partial, log = partial_of(folder / stage.name), folder / f"{stage.name}.log"
    if code == 0 and partial.exists():
        os.replace(partial, folder / stage.name)
        return None
    what = f"ended with {code}" if code else f"wrote no {partial.name}"
    return f"{stage.name} {what}; the end of {log}:\n{log.read_text(encoding='utf-8', errors='replace')[-2000:]}"


def seconds(folder: Path) -> dict[str, float]:
    """How long each stage took, all attempts together but those that were killed with whoever started them."""
    file = folder / SECONDS
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _add_seconds(folder: Path, name: str, more: float) -> None:
    known = seconds(folder)
    write_whole(folder / SECONDS, json.dumps(known | {name: round(known.get(name, 0) + more, 1)}, indent=1))


def die_with_parent() -> None:
    """For `preexec_fn`: what is killed must not leave commands behind that write where the next run goes on."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder, made if need be, for this process.

    Raises:
        ValueError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is at work in {folder}; wait for it or name another --output.") from None
        yield
