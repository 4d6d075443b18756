"""The instruction pool: how each task is asked for, and which tasks and wordings an utterance gets.

Draws are functions of their arguments alone, so the same rows come out on any machine, number of workers and order.
"""

import hashlib
import math
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from dataset_builders.files import read_yaml

POOL_PATH = Path(__file__).with_name("instructions.yaml")  # the pool that is meant where none is named

TRANSCRIPTION = "transcription"
SELF_POWERED_TASKS = ("continuation", "repetition", "keyword", "intent", "sentiment", "translation")

SPLITS = ("seen", "held_out")
REQUIRED_KEYS = {"description", "seen"}
SWITCHES = {
    "held_out_task": False,
    "ends_like_a_sentence": True,
    "may_copy_transcript": False,
    "without_instruction": False,
}
OPTIONAL_KEYS = {*SWITCHES, "held_out", "slots"}


@dataclass(frozen=True)
class Task:
    """One task and its paraphrases: `seen` ones are trained on, `held_out` ones only measured."""

    name: str
    description: str
    seen: tuple[str, ...]
    held_out: tuple[str, ...]
    held_out_task: bool = False  # never in the training mix: it measures an unseen task
    ends_like_a_sentence: bool = True  # whether a response must
    may_copy_transcript: bool = False  # whether a response may
    without_instruction: bool = False  # the LLM replies to the speech alone: its only wording is the empty one
    slots: tuple[tuple[str, tuple[str, ...]], ...] = ()  # names and values, which the paraphrases were filled with


def load_pool(path: str | Path | None = None, slots: Mapping[str, Sequence[str]] | None = None) -> dict[str, Task]:
    """Read and check a pool; returns the tasks by name, in the file's order.

    Args:
        path: YAML file of the pool; `POOL_PATH` if None.
        slots: values that replace those of the file, such as `{"language": ["German", "French"]}`. Every paraphrase
            is repeated for every value of its task's slots.

    Raises:
        ValueError: a missing or unknown key, a value of the wrong type, an empty list, a paraphrase without a slot that
            its task declares or with one that it does not, a slot without values or with one that is no text, a
            paraphrase that occurs twice in the pool (within a split, in both splits, or in two tasks), or `slots` that
            no task has. Names the file and the task.
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
    known = {slot for fields in content["tasks"].values() for slot in fields.get("slots", {})}
    if unknown := sorted(set(slots) - known):
        raise ValueError(f"{path}: no task has the slot {unknown[0]!r}; there are {sorted(known)}")
    places: dict[str, str] = {}  # paraphrase -> its first place
    for task in pool.values():
        lines = [("seen", line) for line in task.seen] + [("held_out", line) for line in task.held_out]
        for split, line in lines if not task.without_instruction else ():
            here = f"{task.name}.{split}"
            if first := places.get(line.casefold()):
                raise ValueError(f"{path}: task {task.name!r}: {line!r} is a duplicate, in {first} and {here}")
            places[line.casefold()] = here
    return pool


def _read_task(name: str, fields: object, slots: Mapping[str, Sequence[str]], path: str | Path) -> Task:
    """Check one task's block and make it a Task; raises ValueError."""
    if not re.fullmatch(r"\w[\w-]*", name) or name == "all":  # it names a folder and a configuration, besides `all`
        raise ValueError(f"{path}: task {name!r}: expected a name of letters, digits, - and _, other than 'all'")
    if trouble := _trouble(fields):
        raise ValueError(f"{path}: task {name!r}: {trouble}")
    values = {slot: slots.get(slot, given) for slot, given in fields.get("slots", {}).items()}
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
    """What is wrong with one task's block, or None."""
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
    """What is wrong with slots and their values, or None."""
    if not isinstance(slots, Mapping) or not all(isinstance(slot, str) and slot.isidentifier() for slot in slots):
        return f"`slots` must be a mapping from names to lists of values, got {slots!r}"
    for slot, values in slots.items():
        texts = isinstance(values, list | tuple) and all(isinstance(value, str) and value.strip() for value in values)
        if not values or not texts:
            return f"slot {slot!r} must have a list of texts, got {values!r}; quote those that YAML takes for others"
    return None


def _trouble_in_lines(split: str, lines: object, slots: Mapping[str, list]) -> str | None:
    """What is wrong with the paraphrases of one split, or None."""
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
            return (
                f"`{split}` holds {line!r}, whose slot {{{unknown[0]}}} is none of {sorted(slots)}, which it declares"
            )
    return None


def draw_fraction(seed: int, *parts: str) -> float:
    """A uniform number in [0, 1) from the SHA-256 of `seed` and `parts`; the same on any machine, in any order."""
    key = "\x1f".join([str(seed), *parts]).encode()
    return (int.from_bytes(hashlib.sha256(key).digest()[:8]) >> 11) / 2**53


def draw_instruction(pool: Mapping[str, Task], task: str, id: str, seed: int, split: str = "seen") -> str:
    """The paraphrase of `task` for utterance `id`: a function of (seed, id, task). `split` is `seen` or `held_out`.

    Raises ValueError for a task that the pool lacks or that has no such wordings, or another split.
    """
    if task not in pool:
        raise ValueError(f"unknown task {task!r}; the pool has {sorted(pool)}; add a block to its file")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; expected 'seen' or 'held_out'")
    lines = getattr(pool[task], split)
    if not lines:
        raise ValueError(f"task {task!r} of the pool has no {split} wordings to ask with; add `{split}` to its block")
    return lines[int(draw_fraction(seed, "instruction", id, task) * len(lines))]


def draw_tasks(weights: Mapping[str, float], id: str, seed: int, count: int = 1) -> list[str]:
    """`count` different tasks for utterance `id`, drawn by `weights` (any scale, any key order) without replacement: a
    function of (seed, id). A task of infinite weight is in every draw, and comes last.

    Raises ValueError when a weight is negative or no number, when fewer than `count` tasks have a weight above zero,
    or when more than `count` have an infinite one.
    """
    for task, weight in weights.items():
        if not weight >= 0:
            raise ValueError(f"weight of task {task!r} is {weight}; expected a number, 0 or above")
    always = sorted(task for task, weight in weights.items() if math.isinf(weight))
    rest = {task: weights[task] for task in sorted(weights) if 0 < weights[task] < math.inf}
    if not max(len(always), 1) <= count <= len(always) + len(rest):
        raise ValueError(
            f"cannot draw {count} tasks per utterance from {dict(weights)}: expected 1 or more, at least as many tasks "
            "with a weight above 0, and no more than that with an infinite one"
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
    return task  # rounding can leave a hair over the last weight


def digest_of(pool: Mapping[str, Task]) -> str:
    """What a pool says, as 16 hex digits: its tasks with their wordings, slots filled and switches."""
    content = repr([pool[task] for task in sorted(pool)])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Draw:
    """What will be asked of utterances: tasks by weight, wordings from the pool.

    Args:
        pool: as `load_pool` returns it.
        weights: of the tasks; infinite for one that every utterance gets.
        tasks_per_utterance: how many of them an utterance gets.
        seed: with an utterance's id, it decides everything.
        paraphrases: `seen` or `held_out` wordings.

    Raises:
        ValueError: as in `draw_tasks`, or a task that the pool lacks.
    """

    pool: Mapping[str, Task]
    weights: Mapping[str, float]
    tasks_per_utterance: int = 1
    seed: int = 0
    paraphrases: str = "seen"

    def __post_init__(self):
        self.of("any utterance")
        for task in self.weights:
            draw_instruction(self.pool, task, "any utterance", self.seed, self.paraphrases)

    def describe(self) -> dict:
        """What it is, as JSON takes it; the pool by its digest."""
        languages = (name for task in self.pool.values() for name in dict(task.slots).get("language", ()))
        return {
            "pool": digest_of(self.pool),
            "languages": list(dict.fromkeys(languages)),  # in this order: another one draws other lines
            "weights": {task: str(weight) for task, weight in self.weights.items()},
            "tasks_per_utterance": self.tasks_per_utterance,
            "seed": self.seed,
            "paraphrases": self.paraphrases,
        }

    def of(self, id: str) -> list[tuple[str, str]]:
        """`(task, instruction)` pairs for utterance `id`."""
        tasks = draw_tasks(self.weights, id, self.seed, self.tasks_per_utterance)
        return [(task, draw_instruction(self.pool, task, id, self.seed, self.paraphrases)) for task in tasks]


def parse_weights(tasks: Sequence[str]) -> dict[str, float]:
    """Weights from the command line: `intent` weighs 1, `intent=2.5` as it says, `transcription=inf` is in every draw;
    several may stand between commas.

    Raises:
        ValueError: a weight that is no number, or a task named twice.
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
