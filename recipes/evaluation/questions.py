"""Make the questions of a task from its corpus, with the references that answers are scored against."""

import collections
import dataclasses
import hashlib
import logging
import math
from collections.abc import Iterator, Mapping

from dataset_builders.building import draw_rows
from dataset_builders.instructions import TRANSCRIPTION, Draw, Task, draw_instruction, load_pool
from recipes.evaluation.kinds import KINDS
from recipes.evaluation.readers import open_data
from recipes.evaluation.references import answers_of_oracle, fillings, known_answers
from recipes.evaluation.rows import NoReferenceError, Question
from recipes.evaluation.tasks import COLUMN, POOL, EvaluationTask

logger = logging.getLogger(__name__)


def read_rows(
    task: EvaluationTask, limit: int | None = None, seed: int = 0, pool: Mapping[str, Task] | None = None
) -> list[Question]:
    """Return the questions of a task in the order of the corpus, about at most `limit` utterances, or about the
    corpus's own default or all. Draws depend on the seed and the utterance's id. The pool is that of the task if None.

    Raises:
        RefusedRowError: an utterance cannot be used.
        ValueError: the corpus or a column does not exist, a reference is empty or not a label, two rows have the same
            id, or there are no rows.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"{limit=} must be 1 or more.")
    pool = load_pool(task.pool) if pool is None else pool
    hint = f"here, --data {task.name}=PATH names the corpus, and --data {task.name}.columns.audio=COLUMN a column"
    try:
        source = open_data(task.data)
    except ValueError as error:
        raise ValueError(f"task {task.name!r}: {error} ({hint})") from error
    limit = limit or source.corpus.default_limit
    rows, clips, count, skipped = [], {}, 0, 0
    for where, line in source.lines():
        utterance = source.utterance(where, line)
        try:
            asked = list(_ask(task, utterance, line, seed, pool))
        except ValueError as error:
            if not (task.skip_unlabelled and isinstance(error, NoReferenceError)):
                raise ValueError(f"task {task.name!r}, {where}: {error}") from error
            skipped += 1
            continue
        key = hashlib.sha256(utterance["audio"]["bytes"]).digest()
        index, count = clips.setdefault(key, len(clips)), count + 1
        rows += [row | {"utterance": index} for row in asked]
        if count == limit:
            break
    if skipped:
        logger.info("%s: %d utterances without a usable reference are left out", task.name, skipped)
    return _finish(task, rows)


def _ask(task: EvaluationTask, utterance: dict, line: dict, seed: int, pool: Mapping[str, Task]) -> Iterator[dict]:
    """Yield the questions about an utterance as dicts with the fields of `Question`; `slots` fills the prompt."""
    common = {**utterance, "duration": float(utterance["duration"]), "language": task.language}
    if task.kind == POOL:
        for row in draw_rows([common], _draw(task, seed, pool)):
            asked = row | answers_of_oracle(task.oracle, row["task"], row["transcript"])
            yield asked | {"target_language": task.target_language if asked["kind"] == "translation" else None}
        return
    id, draw = utterance["id"], KINDS[task.kind].draw
    row = common | {"id": f"{utterance['source']}/{id}/{task.name}", "task": task.name, "kind": task.kind}
    row |= known_answers(task, utterance, line) | {"target_language": task.target_language}
    if draw is not None:
        row["instruction"], constraint = draw(id, seed)
        row["constraint"] = constraint.name
    elif task.prompt is None:
        row["instruction"] = draw_instruction(pool, task.task, id, seed, "held_out")
    else:
        row["slots"] = fillings(task, line)
    yield row


def _draw(task: EvaluationTask, seed: int, pool: Mapping[str, Task]) -> Draw:
    """Return the draw of an utterance's tasks in held-out wordings; transcription is always drawn if it is a task."""
    weights = {name: math.inf if name == TRANSCRIPTION else 1.0 for name in task.tasks}
    count = task.tasks_per_utterance + (TRANSCRIPTION in weights)
    return Draw(pool, weights, min(count, len(weights)), seed, "held_out")


def _finish(task: EvaluationTask, rows: list[dict]) -> list[Question]:
    """Return the questions with all labels and filled prompts. Raises ValueError if two have the same id."""
    if not rows:
        raise ValueError(
            f"task {task.name!r}: {task.data.corpus} ({task.data.split}) has no utterance that can be used."
        )
    ids = collections.Counter(row["id"] for row in rows)
    if twice := next((id for id, count in ids.items() if count > 1), None):
        raise ValueError(
            f"task {task.name!r}: {twice!r} is the id of two rows; name a column with unique ids: --data "
            f"{task.name}.columns.id=COLUMN."
        )
    labels = sorted({text for row in rows for text in row.get("references", ())})
    for row in rows:
        if task.labels == (COLUMN,):
            row["labels"] = labels
        if "slots" in row:
            row["instruction"] = task.prompt.format(**row["slots"], labels=", ".join(row.get("labels", ())))
    names = [field.name for field in dataclasses.fields(Question)]
    return [Question(**{name: row[name] for name in names if name in row}) for row in rows]
