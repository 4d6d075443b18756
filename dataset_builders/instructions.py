"""The instruction pool: the wordings of each task, and which tasks and wordings an utterance gets.

A draw depends only on its arguments, so the rows are the same on any machine, with any number of workers, in any order.
"""

import hashlib
import math
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path

from dataset_builders.files import read_yaml

POOL_PATH = Path(__file__).with_name("instructions.yaml")  # the default pool

TRANSCRIPTION = "transcription"
SELF_POWERED_TASKS = ("continuation", "repetition", "keyword", "intent", "sentiment", "translation")

SPLITS = ("seen", "held_out")
REQUIRED_KEYS = {"description", "seen"}


@dataclass(frozen=True)
class Task:
    """A task and its paraphrases. Trainings use the `seen` paraphrases, and evaluations the `held_out` ones."""

    name: str
    description: str
    seen: tuple[str, ...]
    held_out: tuple[str, ...]
    held_out_task: bool = False  # never used in training, because evaluations use it as an unseen task
    ends_like_a_sentence: bool = True  # a response must end like a sentence
    may_copy_transcript: bool = False  # a response may be the transcript
    without_instruction: bool = False  # the LLM replies to the speech alone, so the only paraphrase is empty
    slots: tuple[tuple[str, tuple[str, ...]], ...] = ()  # names and values that were put into the paraphrases


SWITCHES = {field.name: field.default for field in fields(Task) if isinstance(field.default, bool)}
OPTIONAL_KEYS = {*SWITCHES, "held_out", "slots"}


def load_pool(path: str | Path | None = None, slots: Mapping[str, Sequence[str]] | None = None) -> dict[str, Task]:
    """Read and check a pool. Returns the tasks by name, in the order of the file.

    Args:
        path: YAML file of the pool; `POOL_PATH` if None.
        slots: values that replace those of the file, such as `{"language": ["German", "French"]}`. Each paraphrase is
            repeated for each value of its task's slots.

    Raises:
        ValueError: a key is missing or unknown, a value has the wrong type, a list is empty, a paraphrase lacks a slot
            of its task or has another one, a slot has no values or one that is not a text, a paraphrase occurs twice in
            the pool (within a split, in both splits, or in two tasks), or no task has one of the `slots`. Names the
            file and the task.
    """
    path = POOL_PATH if path is None else path
    content = read_yaml(path, "a pool of instructions")
    if not isinstance(content, dict) or set(content) != {"tasks"} or not isinstance(content["tasks"], dict):
        raise ValueError(f"{path}: expected one top-level key `tasks`, a mapping from task name to task")
    if not content["tasks"]:
        raise ValueError(f"{path}: `tasks` is empty; add at least one task")

    slots = slots or {}
    if trouble := _trouble_in_slots(slots):
        raise ValueError(f"{path}: {trouble}")
    pool = {str(name): _read_task(str(name), fields, slots, path) for name, fields in content["tasks"].items()}
    all_slots = {slot for fields in content["tasks"].values() for slot in fields.get("slots", {})}
    if unknown := sorted(set(slots) - all_slots):
        raise ValueError(f"{path}: no task has the slot {unknown[0]!r}; there are {sorted(all_slots)}")
    places: dict[str, str] = {}  # paraphrase -> its first place
    for task in pool.values():
        lines = [("seen", line) for line in task.seen] + [("held_out", line) for line in task.held_out]
        for split, line in lines if not task.without_instruction else ():
            place = f"{task.name}.{split}"
            if first := places.get(line.casefold()):
                raise ValueError(f"{path}: task {task.name!r}: {line!r} is a duplicate, in {first} and {place}")
            places[line.casefold()] = place
    return pool


def _read_task(name: str, fields: object, slots: Mapping[str, Sequence[str]], path: str | Path) -> Task:
    """Check the block of a task and return the task. Raises ValueError if the block is invalid."""
    if not re.fullmatch(r"\w[\w-]*", name) or name == "all":  # the name of a folder and of a configuration
        raise ValueError(f"{path}: task {name!r}: expected a name of letters, digits, - and _, other than 'all'")
    if trouble := _trouble(fields):
        raise ValueError(f"{path}: task {name!r}: {trouble}")
    values = {slot: slots.get(slot, choices) for slot, choices in fields.get("slots", {}).items()}
    fillings = [dict(zip(values, choice, strict=True)) for choice in product(*values.values())]
    written = {split: [""] for split in SPLITS} if fields.get("without_instruction") else fields
    lines = {
        split: tuple(line.strip().format(**filling) for line in written.get(split, ()) for filling in fillings)
        for split in SPLITS
    }
    switches = {key: fields.get(key, default) for key, default in SWITCHES.items()}
    return Task(
        name,
        fields["description"],
        **lines,
        **switches,
        slots=tuple((slot, tuple(choices)) for slot, choices in values.items()),
    )


def _trouble(fields: object) -> str | None:
    """Return what is wrong with the block of a task; None if it is valid."""
    if not isinstance(fields, dict):
        return f"expected a mapping with the keys {sorted(REQUIRED_KEYS)}, got {fields!r}"
    silent = fields.get("without_instruction") is True
    if silent and (named := sorted(set(fields) & {*SPLITS, "slots"})):
        return f"`without_instruction` is true, so `{named[0]}` has no meaning; leave one of them out"
    if missing := sorted(REQUIRED_KEYS - set(fields) - (set(SPLITS) if silent else set())):
        return f"missing key {missing[0]!r}; a task needs {sorted(REQUIRED_KEYS)}"
    if unknown := sorted(map(str, set(fields) - REQUIRED_KEYS - OPTIONAL_KEYS)):
        return f"unknown key {unknown[0]!r}; known: {sorted(REQUIRED_KEYS | OPTIONAL_KEYS)}"
    if not isinstance(fields["description"], str):
        return f"`description` must be a string, got {fields['description']!r}"
    for key in SWITCHES:
        if not isinstance(fields.get(key, False), bool):
            return f"`{key}` must be true or false, got {fields[key]!r}"
    slots = fields.get("slots", {})
    if trouble := _trouble_in_slots(slots):
        return trouble
    written = [split for split in SPLITS if split in fields]
    return next(filter(None, (_trouble_in_lines(split, fields[split], slots) for split in written)), None)


def _trouble_in_slots(slots: object) -> str | None:
    """Return what is wrong with slots and their values; None if they are valid."""
    if not isinstance(slots, Mapping) or not all(isinstance(slot, str) and slot.isidentifier() for slot in slots):
        return f"`slots` must be a mapping from names to lists of values, got {slots!r}"
    for slot, values in slots.items():
        texts = isinstance(values, list | tuple) and all(isinstance(value, str) and value.strip() for value in values)
        if not values or not texts:
            return f"slot {slot!r} must have a list of texts, got {values!r}; quote texts such as no or 1"
    return None


def _trouble_in_lines(split: str, lines: object, slots: Mapping[str, list]) -> str | None:
    """Return what is wrong with the paraphrases of a split; None if they are valid."""
    if not isinstance(lines, list) or not lines:
        return f"`{split}` must be a list that is not empty, got {lines!r}"
    for line in lines:
        if not isinstance(line, str) or not line.strip():
            return f"`{split}` holds {line!r}, expected a sentence; quote it if it has or ends with a colon"
        try:
            parts = [part[1:] for part in string.Formatter().parse(line) if part[1] is not None]
        except ValueError as error:
            return f"`{split}` holds {line!r}, whose braces do not match ({error}); write {{{{ and }}}} for plain ones"
        named = {slot + (f":{spec}" if spec else "") + (f"!{way}" if way else "") for slot, spec, way in parts}
        if missing := sorted(set(slots) - named):
            return f"`{split}` holds {line!r}, which lacks the slot {{{missing[0]}}} of this task"
        if unknown := sorted(named - set(slots)):
            return f"`{split}` holds {line!r}, whose slot {{{unknown[0]}}} is none of the task's slots {sorted(slots)}"
    return None


def draw_fraction(seed: int, *parts: str) -> float:
    """Return a uniform number in [0, 1) from the SHA-256 of `seed` and `parts`; it is the same on any machine."""
    key = "\x1f".join([str(seed), *parts]).encode()
    return (int.from_bytes(hashlib.sha256(key).digest()[:8]) >> 11) / 2**53


def draw_instruction(pool: Mapping[str, Task], task: str, id: str, seed: int, split: str = "seen") -> str:
    """Return the `seen` or `held_out` paraphrase of `task` for utterance `id`. It depends only on seed, id and task.

    Raises:
        ValueError: the pool has no such task, the task has no paraphrases of this split, or the split is unknown.
    """
    if task not in pool:
        raise ValueError(f"unknown task {task!r}; the pool has {sorted(pool)}; add a block to the pool's file")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; expected 'seen' or 'held_out'")
    lines = getattr(pool[task], split)
    if not lines:
        raise ValueError(f"task {task!r} of the pool has no {split} wordings; add `{split}` to its block")
    return lines[int(draw_fraction(seed, "instruction", id, task) * len(lines))]


def draw_tasks(weights: Mapping[str, float], id: str, seed: int, count: int = 1) -> list[str]:
    """Draw `count` different tasks for utterance `id`, by `weights`. The draw depends only on weights, seed and id.

    Weights may have any scale and order. A task of infinite weight is in every draw, and comes last.

    Raises:
        ValueError: a weight is negative or not a number, fewer than `count` tasks have a weight above zero, or more
            than `count` have an infinite one.
    """
    for task, weight in weights.items():
        if not weight >= 0:
            raise ValueError(f"weight of task {task!r} is {weight}; expected a number, 0 or above")
    always = sorted(task for task, weight in weights.items() if math.isinf(weight))
    rest = {task: weights[task] for task in sorted(weights) if 0 < weights[task] < math.inf}
    if not max(len(always), 1) <= count <= len(always) + len(rest):
        raise ValueError(
            f"cannot draw {count} tasks per utterance from {dict(weights)}: expected 1 or more, at least as many tasks "
            "with a weight above 0, and at most as many with an infinite weight"
        )
    drawn: list[str] = []
    while len(drawn) < count - len(always):
        drawn.append(_draw_one(rest, draw_fraction(seed, "task", id, *drawn)))
        del rest[drawn[-1]]
    return drawn + always


def _draw_one(weights: Mapping[str, float], fraction: float) -> str:
    rest = fraction * sum(weights.values())
    for task, weight in weights.items():
        if rest < weight:
            return task
        rest -= weight
    return task  # after a rounding error


def digest_of(pool: Mapping[str, Task]) -> str:
    """Return a hash of a pool's tasks, paraphrases, slots and switches, in 16 hex digits."""
    content = repr([pool[task] for task in sorted(pool)])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Draw:
    """Draws the tasks of each utterance, and the wordings of their instructions.

    Raises:
        ValueError: as in `draw_tasks`, or the pool lacks a task.
    """

    pool: Mapping[str, Task]
    weights: Mapping[str, float]  # of the tasks; infinite for a task that every utterance gets
    tasks_per_utterance: int = 1
    seed: int = 0  # of the draws, which depend on nothing else but the id of the utterance
    paraphrases: str = "seen"  # or "held_out"

    def __post_init__(self):
        self.of("any utterance")
        for task in self.weights:
            draw_instruction(self.pool, task, "any utterance", self.seed, self.paraphrases)

    def describe(self) -> dict:
        """Return a description for JSON, with a hash of the pool."""
        languages = (name for task in self.pool.values() for name in dict(task.slots).get("language", ()))
        return {
            "pool": digest_of(self.pool),
            "languages": list(dict.fromkeys(languages)),  # in this order, because the draws depend on it
            "weights": {task: str(weight) for task, weight in self.weights.items()},
            "tasks_per_utterance": self.tasks_per_utterance,
            "seed": self.seed,
            "paraphrases": self.paraphrases,
        }

    def of(self, id: str) -> list[tuple[str, str]]:
        """Return the `(task, instruction)` pairs of utterance `id`."""
        tasks = draw_tasks(self.weights, id, self.seed, self.tasks_per_utterance)
        return [(task, draw_instruction(self.pool, task, id, self.seed, self.paraphrases)) for task in tasks]


def parse_weights(tasks: Sequence[str]) -> dict[str, float]:
    """Parse the tasks of the command line: `intent` has the weight 1, `intent=2.5` the weight 2.5, and
    `transcription=inf` is in every draw. A text may list several, separated by commas.

    Raises:
        ValueError: a weight is not a number, or a task is named twice.
    """
    weights: dict[str, float] = {}
    for entry in ",".join(tasks).split(","):
        task, equals, weight = entry.partition("=")
        if task in weights:
            raise ValueError(f"task {task!r} is named twice")
        try:
            weights[task] = float(weight) if equals else 1.0
        except ValueError:
            raise ValueError(f"cannot read the weight in {entry!r}; expected TASK=NUMBER or TASK=inf") from None
    return weights
