"""Run commands that each write a folder: atomically, once for all that need it, and several at the same time.

A stage is a command with its options, in YAML:

    sft:
      run: python -m recipes.sft
      output: output_dir                 # the option that names the folder; `output` if this line is missing
      model_name_or_path: "{compose}"    # the folder of another stage, which runs before
      seed: "{seed}"                     # a value: the seed of the row, or one of the `values`
      tasks: [intent, transcription]     # --tasks intent transcription
      bf16: true                         # --bf16, without a value
      packing: null                      # no such option

The name of a folder contains a hash of its command and of the folders and files named in it, so another option gives
another folder. The code of the commands is not in the hash: if it changes, delete the folders that it wrote. A command
writes to `FOLDER.partial`, which remains if the command is stopped, and continues from it when it runs again.
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
LOOK = 0.2  # seconds between two checks of the running commands
fingerprint = cache(files.fingerprint)  # many rows name the same folders


@dataclass(frozen=True)
class Stage:
    """The `name` of a folder, the `command` that writes it, and the names of the folders that it `needs`."""

    name: str
    command: tuple[str, ...]
    needs: tuple[str, ...]


def plan(
    settings: Mapping[str, Mapping], wanted: Iterable[str], values: Mapping[str, object], folder: Path
) -> dict[str, Stage]:
    """Return the `wanted` stages and all that they need, by key, each after those that it needs.

    Args:
        settings: stages by key, as in the text above.
        wanted: keys of the wanted stages.
        values: what replaces placeholders that are no stages, such as `{"seed": 0}`.
        folder: parent of the stages' folders.

    Raises:
        ValueError: a stage does not exist or has no `run`, stages need each other, or a stage and a value have the same
            name.
    """
    texts = {name: str(value) for name, value in values.items()}
    if both := sorted(texts.keys() & settings.keys()):
        raise ValueError(f"{both[0]!r} is the name of a stage and of a value; rename one of them.")
    stages: dict[str, Stage] = {}

    def add(key: str, above: tuple[str, ...]) -> None:
        if key in above:
            raise ValueError(f"the stages {' → '.join((*above, key))} need each other; remove one of the references.")
        if not (settings.get(key) or {}).get("run"):
            where = f"{{{key}}} in {above[-1]}" if above else repr(key)
            raise ValueError(f"{where} is not a stage with a `run`; the stages are {', '.join(settings)}.")
        words = _fill(_words(settings[key]), texts)
        needs = [name for word in words for name in PLACE.findall(word)]
        for need in needs:
            if need not in stages:
                add(need, (*above, key))
        names = {need: stages[need].name for need in needs}
        identity = [_fill(words, names), [fingerprint(word.rpartition("=")[2]) for word in words]]
        name = f"{key}-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:10]}"
        output = [f"--{settings[key].get('output', 'output')}", str(partial_of(folder / name))]
        command = _fill(words, {need: str(folder / name) for need, name in names.items()})
        stages[key] = Stage(name, (*command, *output), tuple(stages[need].name for need in needs))

    for key in wanted:
        if key not in stages:
            add(key, ())
    return stages


def _words(stage: Mapping) -> list[str]:
    """Return the command line without its output, before placeholders are replaced."""
    words = shlex.split(stage["run"])
    for key, value in stage.items():
        if key in ("run", "output") or value is None:
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        words += [f"--{key}", *(json.dumps(v) if isinstance(v, dict | bool) else str(v) for v in values)]
    return words


def _fill(words: Sequence[str], names: Mapping[str, str]) -> list[str]:
    """Replace the placeholders that have a name; the others remain."""
    return [PLACE.sub(lambda place: names.get(place[1], place[0]), word) for word in words]


def make(stages: Iterable[Stage], folder: Path, workers: int, finished: Callable[[Stage], None]) -> dict[str, str]:
    """Run the stages whose folders do not exist yet, `workers` at the same time, in the given order where possible.

    Args:
        stages: the stages to run, and all that they need.
        folder: parent of the stages' folders; the logs are in it, too.
        workers: number of commands at the same time; they share the cores.
        finished: called with each finished stage.

    Returns:
        The reasons of failure by the names of failed stages. The other stages run nevertheless.
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
    """Rename the folder of a finished stage, or return why the stage failed."""
    partial, log = partial_of(folder / stage.name), folder / f"{stage.name}.log"
    if code == 0 and partial.exists():
        os.replace(partial, folder / stage.name)
        return None
    what = f"ended with exit code {code}" if code else f"did not write {partial.name}"
    return f"{stage.name} {what}; the end of {log}:\n{log.read_text(encoding='utf-8', errors='replace')[-2000:]}"


def seconds(folder: Path) -> dict[str, float]:
    """Return the seconds of each stage, over all attempts except those that were killed together with the study."""
    file = folder / SECONDS
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _add_seconds(folder: Path, name: str, more: float) -> None:
    before = seconds(folder)
    write_whole(folder / SECONDS, json.dumps(before | {name: round(before.get(name, 0) + more, 1)}, indent=1))


def die_with_parent() -> None:
    """For `preexec_fn`: stop a command when its parent is killed, so that it does not interfere with the next run."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Lock a folder for this process, creating it if necessary.

    Raises:
        ValueError: another process has locked it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is using {folder}; wait for it or name another --output.") from None
        yield
