"""What is asked of a speech LLM about which corpus: the tasks of `tasks.yaml`.

A task names a corpus, an instruction and where the right answer stands; `questions.read_rows` makes rows of it.
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
GROUPS = ("asr", "st", "slu", "qa", "following")
POOL = "pool"  # the kind of a task that asks several questions, each scored by a kind of its own
COLUMN = "column"  # `labels: column`: the distinct references of the rows that are read
ROLES = ("audio", "transcript", "id")
REQUIRED_KEYS = {"group", "kind", "description", "data"}
LISTS = ("reference", "labels", "tasks")


@dataclass(frozen=True)
class EvaluationTask:
    """What is asked about a corpus, and how answers are scored."""

    name: str
    group: str
    kind: str
    description: str
    data: Data
    language: str | None = "en"  # spoken
    target_language: str | None = None  # of translations
    prompt: str | None = None  # with {slots}, {labels} and {choices}; None: drawn, for kinds pool and constraints
    # YAML file of the instruction pool that is drawn from, also by systems that ask otherwise than the task does; seen
    # from the file of tasks. None: dataset_builders/instructions.yaml.
    pool: str | None = None
    slots: Mapping[str, str] = field(default_factory=dict)  # of the prompt: names and columns
    reference: tuple[str, ...] = ()  # columns, dotted paths, or templates such as "{action} {object}"
    labels: tuple[str, ...] = ()  # the possible answers
    choices: str | None = None  # the column of a question's own options
    answer: str = "{}"  # what an answer that is constrained to the labels looks like
    oracle: str | None = None  # module with `answers(task, transcript)`, where no column has the answers
    task: str | None = None  # whose answers the oracle gives, and whose held-out wordings stand in for a prompt
    tasks: tuple[str, ...] = ()  # of the pool; every utterance gets some of them, and transcription if that is named
    tasks_per_utterance: int = 1  # of the pool, transcription apart
    skip_unlabelled: bool = False  # pass over rows without a reference, or with one that is no label


KEYS = {name.name for name in dataclasses.fields(EvaluationTask)} - {"name"}
DATA_KEYS = {name.name for name in dataclasses.fields(Data)}


def load_tasks(path: str | Path = TASKS_PATH, more: str | Path | None = None) -> dict[str, EvaluationTask]:
    """Read and check the tasks of a file, by name in its order.

    Args:
        path: a YAML file; `tasks.yaml` has the format.
        more: another of that form, whose tasks are added, or replace those of the same name.

    Raises:
        ValueError: a key that is unknown, missing, there twice or of the wrong type, an unknown kind, group, reader or
            normalizer, a prompt whose slots nothing fills, no reference where the kind needs one. Names file and task.
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
    """Check one task's block and make it an EvaluationTask; raises ValueError."""
    if not re.fullmatch(r"\w[\w-]*", name) or name in GROUPS:  # it names a folder, and is chosen by name
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
    """Raises ValueError for a task that cannot be."""
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
    elif kind is not tuple and not isinstance(value, hint):  # tuples are checked where they are made
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
        raise ValueError("`oracle` needs `task`, which says what it is asked")
    for kind in _scored_kinds(task):
        for what, keys in KINDS[kind].needs.items():
            if not any(getattr(task, key) for key in keys):
                raise ValueError(f"kind {kind!r} needs {what}")
    scored = POOL_KINDS.get(task.task, "oracle")
    if task.kind != POOL and task.oracle is not None and not task.reference and scored != task.kind:
        raise ValueError(f"kind {task.kind!r} is not how {task.task!r} is scored; that is {scored!r}")
    if [name for _, name, _, _ in string.Formatter().parse(task.answer) if name is not None] != [""]:
        raise ValueError(f"`answer` is {task.answer!r}; expected a text with {{}} where the label stands")


def _scored_kinds(task: EvaluationTask) -> list[str]:
    """Those of a task's questions to which right answers are known."""
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
    """Tasks by name, or by group, in the order they are named; none twice.

    Args:
        names: with commas or spaces between them, or several such texts.
        tasks: as `load_tasks` returns them.

    Raises:
        ValueError: nothing is named, or what is neither a task nor a group; names those there are.
    """
    members = {group: {k: task for k, task in tasks.items() if task.group == group} for group in GROUPS}
    known = f"there are {list(tasks)} and the groups {[group for group in GROUPS if members[group]]}"
    chosen: dict[str, EvaluationTask] = {}
    for name in " ".join([names] if isinstance(names, str) else names).replace(",", " ").split():
        if not (named := members.get(name) or {k: task for k, task in tasks.items() if k == name}):
            raise ValueError(f"no task or group {name!r}; {known}")
        chosen |= named
    if not chosen:
        raise ValueError(f"no task is named; {known}")
    return list(chosen.values())


def override(task: EvaluationTask, settings: Mapping[str, str]) -> EvaluationTask:
    """The task with other settings.

    Args:
        task: one of those.
        settings: such as `{"corpus": "clips.jsonl", "split": "dev", "columns.audio": "wav", "language": "fr"}`: keys
            of `data`, of its `columns`, of `slots`, or of the task's own texts. An empty text is none.

    Raises:
        ValueError: an unknown key, or a value that cannot be.
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
