"""The instruction pool: how each task is asked for, and which wording an utterance gets.

Draws are functions of their arguments alone, so the same rows come out on any machine, number of workers and order.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

POOL_PATH = Path(__file__).with_name("instructions.yaml")

REQUIRED_KEYS = {"description", "seen", "held_out"}
OPTIONAL_KEYS = {"held_out_task"}


@dataclass(frozen=True)
class Task:
    """One task and its paraphrases: `seen` ones are trained on, `held_out` ones only measured."""

    name: str
    description: str
    seen: tuple[str, ...]
    held_out: tuple[str, ...]
    held_out_task: bool = False  # never in the training mix: it measures an unseen task


def load_pool(path: str | Path = POOL_PATH) -> dict[str, Task]:
    """Read and check the pool at `path`; returns the tasks by name, in the file's order.

    Raises ValueError, naming the file and the task, for a missing or unknown key, a value of the wrong type, an empty
    list, or a paraphrase that occurs twice in the pool (within a split, in both splits, or in two tasks).
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(content, dict) or set(content) != {"tasks"} or not isinstance(content["tasks"], dict):
        raise ValueError(f"{path}: expected one top-level key `tasks`, a mapping from task name to task")
    if not content["tasks"]:
        raise ValueError(f"{path}: `tasks` is empty; add at least one task")

    pool = {str(name): _read_task(str(name), fields, path) for name, fields in content["tasks"].items()}
    found: dict[str, str] = {}  # paraphrase -> where it was first found
    for task in pool.values():
        lines = [("seen", line) for line in task.seen] + [("held_out", line) for line in task.held_out]
        for split, line in lines:
            here = f"{task.name}.{split}"
            if first := found.get(line.casefold()):
                raise ValueError(f"{path}: task {task.name!r}: {line!r} is a duplicate, in {first} and {here}")
            found[line.casefold()] = here
    return pool


def _read_task(name: str, fields: object, path: str | Path) -> Task:
    """Check one task's block and make it a Task; raises ValueError."""
    if trouble := _trouble(fields):
        raise ValueError(f"{path}: task {name!r}: {trouble}")
    lines = {split: tuple(line.strip() for line in fields[split]) for split in ("seen", "held_out")}
    return Task(name, fields["description"], **lines, held_out_task=fields.get("held_out_task", False))


def _trouble(fields: object) -> str | None:
    """What is wrong with one task's block, or None."""
    if not isinstance(fields, dict):
        return f"expected a mapping with the keys {sorted(REQUIRED_KEYS)}, got {fields!r}"
    if missing := sorted(REQUIRED_KEYS - set(fields)):
        return f"missing key {missing[0]!r}; a task needs {sorted(REQUIRED_KEYS)}"
    if unknown := sorted(map(str, set(fields) - REQUIRED_KEYS - OPTIONAL_KEYS)):
        return f"unknown key {unknown[0]!r}; known: {sorted(REQUIRED_KEYS | OPTIONAL_KEYS)}"
    if not isinstance(fields["description"], str):
        return f"`description` must be a string, got {fields['description']!r}"
    if not isinstance(fields.get("held_out_task", False), bool):
        return f"`held_out_task` must be true or false, got {fields['held_out_task']!r}"
    for split in ("seen", "held_out"):
        if not isinstance(fields[split], list) or not fields[split]:
            return f"`{split}` must be a list that is not empty, got {fields[split]!r}"
        for line in fields[split]:
            if not isinstance(line, str) or not line.strip():
                return f"`{split}` holds {line!r}, expected a sentence; quote it if it has or ends with a colon"
    return None


def draw_fraction(seed: int, *parts: str) -> float:
    """A uniform number in [0, 1) from the SHA-256 of `seed` and `parts`; the same on any machine, in any order."""
    key = "\x1f".join([str(seed), *parts]).encode()
    return (int.from_bytes(hashlib.sha256(key).digest()[:8]) >> 11) / 2**53


def draw_instruction(pool: Mapping[str, Task], task: str, id: str, seed: int, split: str = "seen") -> str:
    """The paraphrase of `task` for utterance `id`: a function of (seed, id, task). `split` is `seen` or `held_out`.

    Raises ValueError for a task that the pool lacks, or another split.
    """
    if task not in pool:
        raise ValueError(f"unknown task {task!r}; the pool has {sorted(pool)}; add a block to {POOL_PATH.name}")
    if split not in ("seen", "held_out"):
        raise ValueError(f"unknown split {split!r}; expected 'seen' or 'held_out'")
    lines = getattr(pool[task], split)
    return lines[int(draw_fraction(seed, "instruction", id, task) * len(lines))]


def draw_task(weights: Mapping[str, float], id: str, seed: int) -> str:
    """The one task of utterance `id`, drawn by `weights` (any scale, any key order): a function of (seed, id).

    Raises ValueError when a weight is negative or not finite, or none is above zero.
    """
    for task, weight in weights.items():
        if not 0 <= weight < float("inf"):
            raise ValueError(f"weight of task {task!r} is {weight}; expected a finite number, 0 or above")
    candidates = [(task, weights[task]) for task in sorted(weights) if weights[task] > 0]
    if not candidates:
        raise ValueError(f"no task has a weight above 0 in {dict(weights)}; give at least one")
    rest = draw_fraction(seed, "task", id) * sum(weight for _, weight in candidates)
    for task, weight in candidates:
        if rest < weight:
            return task
        rest -= weight
    return candidates[-1][0]  # rounding can leave a hair over the last weight
