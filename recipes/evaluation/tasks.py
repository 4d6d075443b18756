"""Read the evaluation tasks of `tasks.yaml`.

A task names a corpus, an instruction, and the columns with the right answer. `questions.read_rows` makes its questions.
"""

import dataclasses
import re
import string
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dataset_builders.corpora.transcripts import NORMALIZERS
from dataset_builders.files import read_yaml
from dataset_builders.instructions import TRANSCRIPTION
from recipes.evaluation.kinds import KINDS, POOL_KINDS
from recipes.evaluation.readers import READERS, Data

TASKS_PATH = Path(__file__).with_name("tasks.yaml")
JUDGE_SLOTS = {"instruction", "transcript", "reference", "response"}
GROUPS = ("asr", "st", "slu", "qa", "following")
POOL = "pool"  # the kind of a task that asks several questions, each of which has a kind of its own
COLUMN = "column"  # with `labels: column`, the labels are the distinct references of all rows that are read
ROLES = ("audio", "transcript", "id")
REQUIRED_KEYS = {"group", "kind", "description", "data"}
LISTS = ("reference", "labels", "tasks")


@dataclass(frozen=True)
class EvaluationTask:
    """A task: what is asked about a corpus, and how answers are scored."""

    name: str
    group: str
    kind: str
    description: str
    data: Data
    language: str | None = "en"  # language of the speech
    target_language: str | None = None  # language of translations
    prompt: str | None = None  # may contain {slots}, {labels} and {choices}; None if instructions are drawn
    # YAML file of the instruction pool, relative to the file of tasks; None for dataset_builders/instructions.yaml. The
    # instructions of the systems `swapped` and `cascade` are also drawn from it.
    pool: str | None = None
    slots: Mapping[str, str] = field(default_factory=dict)  # columns that fill the slots of the prompt, by slot
    reference: tuple[str, ...] = ()  # columns, dotted paths, or templates such as "{action} {object}"
    labels: tuple[str, ...] = ()  # the possible answers
    choices: str | None = None  # the column with the options, if each question has its own
    judge: str | None = None  # what the judge of a judged kind is asked, with the slots of `JUDGE_SLOTS`
    suite: str | None = None  # the benchmark that the task is a part of; its figure is the mean of its tasks'
    answer: str = "{}"  # the sentence around a label in a constrained answer
    oracle: str | None = None  # module with `answers(task, transcript)`, if no column has the answers
    task: str | None = None  # task of the pool, for the oracle and for held-out wordings if there is no prompt
    tasks: tuple[str, ...] = ()  # tasks of the pool: some are drawn per utterance; transcription, if listed, always
    tasks_per_utterance: int = 1  # number of tasks that are drawn, without transcription
    skip_unlabelled: bool = False  # whether rows without a reference, or with one that is not a label, are left out


KEYS = {name.name for name in dataclasses.fields(EvaluationTask)} - {"name"}
DATA_KEYS = {name.name for name in dataclasses.fields(Data)}


def load_tasks(path: str | Path = TASKS_PATH, more: str | Path | None = None) -> dict[str, EvaluationTask]:
    """Read and check the tasks of a YAML file. Returns them by name, in the order of the file. Those of the file `more`
    are added, or replace those with the same name.

    Raises:
        ValueError: a key is unknown, missing, duplicate or of the wrong type; a kind, group, reader or normalizer is
            unknown; a slot of a prompt is not filled; or a reference is missing. The message names file and task.
    """
    tasks = _read_file(path)
    if more is not None:
        tasks |= _read_file(more)
    return tasks


def _read_file(path: str | Path) -> dict[str, EvaluationTask]:
    content = read_yaml(path, "a file of tasks")
    if not isinstance(content, dict) or set(content) != {"tasks"} or not isinstance(content["tasks"], dict):
        raise ValueError(f"{path}: expected one top-level key `tasks`, a mapping from task name to task")
    tasks = {}
    for name, fields in content["tasks"].items():
        try:
            task = _read_task(str(name), fields)
        except ValueError as error:
            raise ValueError(f"{path}: task {name!r}: {error}") from error
        pool = task.pool and str((Path(path).parent / task.pool).resolve())
        tasks[task.name] = dataclasses.replace(task, pool=pool)
    return tasks


def _read_task(name: str, fields: object) -> EvaluationTask:
    """Return the task of a block in YAML. Raises ValueError if it is invalid."""
    if not re.fullmatch(r"\w[\w-]*", name) or name in GROUPS:  # the name of a folder, which must differ from a group's
        raise ValueError(f"expected a name of letters, digits, - and _, and none of {GROUPS}")
    if not isinstance(fields, dict):
        raise ValueError(f"expected a mapping with the keys {sorted(REQUIRED_KEYS)}, got {fields!r}")
    _check_keys(fields, KEYS, REQUIRED_KEYS, "key")
    if not isinstance(fields["data"], dict):
        raise ValueError(f"`data` must be a mapping with keys of {sorted(DATA_KEYS)}, got {fields['data']!r}")
    _check_keys(fields["data"], DATA_KEYS, set(), "key of `data`")
    values = fields | {key: _as_tuple(key, fields[key]) for key in LISTS if key in fields}
    task = EvaluationTask(name, **values | {"data": Data(**fields["data"])})
    _check(task)
    return task


def _check_keys(fields: Mapping, known: set[str], required: set[str], what: str) -> None:
    if missing := sorted(required - set(fields)):
        raise ValueError(f"missing {what} {missing[0]!r}; needed are {sorted(required)}")
    if unknown := sorted(map(str, set(fields) - known)):
        raise ValueError(f"unknown {what} {unknown[0]!r}; known: {sorted(known)}")


def _as_tuple(key: str, value: object) -> tuple:
    values = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(text, str) and text for text in values):
        raise ValueError(f"`{key}` must be a text or a list of texts, got {value!r}; quote what YAML takes for others")
    if len(set(values)) < len(values):
        raise ValueError(f"`{key}` names one twice: {value!r}")
    return tuple(values)


def _check(task: EvaluationTask) -> None:
    """Raise ValueError if a task is invalid."""
    for part, prefix in ((task, ""), (task.data, "data.")):
        hints = typing.get_type_hints(type(part))
        for key in (attribute.name for attribute in dataclasses.fields(part)):
            _check_type(f"{prefix}{key}", getattr(part, key), hints[key])
    for key, known in (("kind", (*KINDS, POOL)), ("group", GROUPS)):
        if getattr(task, key) not in known:
            raise ValueError(f"unknown {key} {getattr(task, key)!r}; expected one of {known}")
    if task.data.normalizer not in (None, *NORMALIZERS):
        raise ValueError(f"unknown normalizer {task.data.normalizer!r}; there are {list(NORMALIZERS)}")
    if task.data.reader not in (None, *READERS):
        raise ValueError(f"unknown reader {task.data.reader!r}; there are {READERS}")
    _check_columns(task.data)
    _check_answers(task)
    _check_prompt(task)


def _check_type(key: str, value: object, hint: typing.Any) -> None:
    kind = typing.get_origin(hint)
    if kind is Mapping:
        items = value.items() if isinstance(value, Mapping) else [(None, None)]
        if not all(isinstance(name, str) and isinstance(column, str | None) for name, column in items):
            raise ValueError(f"`{key}` must be a mapping from names to columns, got {value!r}")
    elif kind is not tuple and not isinstance(value, hint):  # tuples are checked by `_as_tuple`
        expected = {bool: "true or false", int: "a whole number"}.get(hint, "a text")
        raise ValueError(f"`{key}` must be {expected}, got {value!r}; quote what YAML takes for others")


def _check_columns(data: Data) -> None:
    _check_keys(data.columns, set(ROLES), set(), "column in `data.columns`:")
    without = [role for role in ROLES if data.columns.get(role, "") is None]
    if without not in ([], ["transcript"]):
        raise ValueError(f"`data.columns.{without[0]}` must be a text; only the transcript may be null")
    if without and "audio" not in data.columns:
        raise ValueError("`data.columns.transcript` is null, so `data.columns.audio` must be named")
    if data.reader == "fleurs" and not (data.config and data.target_config):
        raise ValueError("the reader 'fleurs' needs `data.config` and `data.target_config`, such as en_us and de_de")


def _check_answers(task: EvaluationTask) -> None:
    if task.kind == POOL and not task.tasks:
        raise ValueError("kind 'pool' needs `tasks`, names of the instruction pool")
    if task.tasks_per_utterance < 1:
        raise ValueError(f"`tasks_per_utterance` is {task.tasks_per_utterance}; expected 1 or more")
    if task.oracle is not None and task.task is None and task.kind != POOL:
        raise ValueError("`oracle` needs `task`, the task whose answers it gives")
    for kind in _scored_kinds(task):
        for what, keys in KINDS[kind].needs.items():
            if not any(getattr(task, key) for key in keys):
                raise ValueError(f"kind {kind!r} needs {what}")
    if task.judge is not None and (task.kind == POOL or not KINDS[task.kind].judged):
        raise ValueError(f"kind {task.kind!r} takes no `judge`: its answers are scored by rule")
    if unknown := sorted(_slots(task.judge or "") - JUDGE_SLOTS):
        raise ValueError(f"nothing fills the slot {{{unknown[0]}}} of its `judge`; there are {sorted(JUDGE_SLOTS)}")
    scored = POOL_KINDS.get(task.task, "oracle")
    if task.kind != POOL and task.oracle is not None and not task.reference and scored != task.kind:
        raise ValueError(f"kind {task.kind!r} is not how {task.task!r} is scored; that is {scored!r}")
    if [name for _, name, _, _ in string.Formatter().parse(task.answer) if name is not None] != [""]:
        raise ValueError(f"`answer` is {task.answer!r}; expected a text with {{}} where the label stands")


def _scored_kinds(task: EvaluationTask) -> list[str]:
    """Return the kinds of those questions of a task to which right answers are known."""
    if task.kind != POOL:
        return [task.kind]
    return [POOL_KINDS.get(name, "oracle") for name in task.tasks if task.oracle or name == TRANSCRIPTION]


def _check_prompt(task: EvaluationTask) -> None:
    drawn = task.kind == POOL or KINDS[task.kind].draw is not None
    if drawn and task.prompt is not None:
        raise ValueError(f"kind {task.kind!r} takes no `prompt`: its instructions are drawn")
    if not drawn and task.prompt is None and task.task is None:
        raise ValueError("missing key 'prompt'; or name a `task` of the instruction pool, whose wordings are drawn")
    named = _slots(task.prompt or "")
    known = {*task.slots, *(["labels"] if task.labels else []), *(["choices"] if task.choices else [])}
    if unknown := sorted(named - known):
        raise ValueError(f"nothing fills the slot {{{unknown[0]}}} of its prompt; there are {sorted(known)}")
    if idle := sorted(set(task.slots) - named):
        raise ValueError(f"its prompt lacks the slot {{{idle[0]}}}")


def _slots(prompt: str) -> set[str]:
    try:
        parts = [part for part in string.Formatter().parse(prompt) if part[1] is not None]
    except ValueError as error:
        raise ValueError(f"the braces of its prompt {prompt!r} do not match ({error})") from error
    return {name + (f":{spec}" if spec else "") + (f"!{way}" if way else "") for _, name, spec, way in parts}


def choose_tasks(names: str | Iterable[str], tasks: Mapping[str, EvaluationTask]) -> list[EvaluationTask]:
    """Return the tasks with these names, in these groups or of these suites, in the given order and each once. A text
    may have several names, separated by commas or spaces.

    Raises:
        ValueError: there are no names, or a name is no task, group or suite; the message lists them.
    """
    members: dict[str, dict[str, EvaluationTask]] = {}
    for key, task in tasks.items():
        for name in filter(None, (task.group, task.suite)):
            members.setdefault(name, {})[key] = task
    hint = f"there are {list(tasks)} and the groups {list(members)}"
    chosen: dict[str, EvaluationTask] = {}
    for name in " ".join([names] if isinstance(names, str) else names).replace(",", " ").split():
        if not (named := members.get(name) or {k: task for k, task in tasks.items() if k == name}):
            raise ValueError(f"no task or group {name!r}; {hint}")
        chosen |= named
    if not chosen:
        raise ValueError(f"no task is named; {hint}")
    return list(chosen.values())


def override(task: EvaluationTask, settings: Mapping[str, str]) -> EvaluationTask:
    """Return the task with other settings, such as `{"corpus": "clips.jsonl", "split": "dev", "columns.audio": "wav",
    "language": "fr"}`, by key of the task, of its `data`, `data.columns` or `slots`. Only texts can be changed. An
    empty text removes a setting.

    Raises:
        ValueError: a key is unknown, or the new task is invalid.
    """
    own = {key for key, hint in typing.get_type_hints(EvaluationTask).items() if hint == str | None} | {"reference"}
    inner = [*(f"columns.{role}" for role in ROLES), *(f"slots.{slot}" for slot in task.slots)]
    changed = dataclasses.asdict(task)
    for key, text in settings.items():
        if key not in {*DATA_KEYS - {"columns"}, *own, *inner}:
            known = sorted(DATA_KEYS - {"columns"} | own) + inner
            raise ValueError(f"task {task.name!r} has no setting {key!r}; there are {known}")
        part, _, name = key.rpartition(".")
        place = changed["data"] if key in DATA_KEYS or part == "columns" else changed
        (place[part] if part else place)[name] = text or (() if name == "reference" else None)
    try:
        return _read_task(changed.pop("name"), changed)
    except ValueError as error:
        raise ValueError(f"task {task.name!r} with {dict(settings)}: {error}") from error
