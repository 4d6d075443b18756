"""The rows of a task: what models are asked, and what answers are scored by.

One row per question, in one schema whatever the corpus is.
"""

import collections
import hashlib
import logging
import math
from collections.abc import Iterator, Mapping

from dataset_builders.building import draw_rows
from dataset_builders.instructions import TRANSCRIPTION, Draw, draw_instruction, load_pool
from dataset_builders.instructions import Task as PoolTask
from recipes.evaluation.constraints import draw_constraint
from recipes.evaluation.readers import open_data
from recipes.evaluation.references import NoReferenceError, answers, fillings, from_oracle
from recipes.evaluation.tasks import COLUMN, Task

logger = logging.getLogger(__name__)

ROW = (
    "id",
    "utterance",
    "audio",
    "transcript",
    "duration",
    "source",
    "task",
    "kind",
    "instruction",
    "references",
    "right",
    "labels",
    "answer",
    "language",
    "target_language",
    "constraint",
)


def read_rows(
    task: Task, limit: int | None = None, seed: int = 0, pool: Mapping[str, PoolTask] | None = None
) -> list[dict]:
    """What is asked, in the corpus's order.

    Args:
        task: as `load_tasks` returns it.
        limit: utterances at most; all of the corpus if None.
        seed: with an utterance's id, it decides what is drawn.
        pool: the instruction pool; that of the task if None.

    Returns:
        Rows with `id` (corpus, utterance and task; unique), `utterance` (int; questions about one clip share it),
        `audio` (`{"bytes", "path"}`, the encoded file), `transcript` ("" if unknown), `duration` (float, seconds),
        `source` (corpus and split), `task` (of kind pool: the pool's), `kind` (of kind pool: how that is scored),
        `instruction`, `references` (list of right answers, of all keywords, or of the right option's letter; empty if
        unknown), `right` (every right answer in full, if an oracle knows them; else empty), `labels` (list of possible
        answers, of a choice its options in order; or empty), `answer` (what an answer constrained to the labels looks
        like), `language`, `target_language` (None but for translations) and
        `constraint` (its name; None but for kind constraints).

    Raises:
        RefusedRowError: an utterance that cannot be used.
        ValueError: no such corpus or column, a reference that is empty or no label, an id used twice, or no row.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"{limit=} must be 1 or more.")
    pool = load_pool(task.pool) if pool is None else pool
    told = f"here --data {task.name}=PATH says where it is, and --data {task.name}.columns.audio=COLUMN which is which"
    try:
        source = open_data(task.data)
    except ValueError as error:
        raise ValueError(f"task {task.name!r}: {error} ({told})") from error
    limit = limit or source.corpus.default_limit
    rows, clips, count, skipped = [], {}, 0, 0
    for where, line in source.lines():
        utterance = source.utterance(where, line)
        try:
            asked = list(_ask(task, utterance, line, seed, pool))
        except NoReferenceError as error:
            if not task.skip_unlabelled:
                raise ValueError(f"task {task.name!r}, {where}: {error}") from error
            skipped += 1
            continue
        except ValueError as error:
            raise ValueError(f"task {task.name!r}, {where}: {error}") from error
        key = hashlib.sha256(utterance["audio"]["bytes"]).digest()
        index, count = clips.setdefault(key, len(clips)), count + 1
        rows += [row | {"utterance": index} for row in asked]
        if count == limit:
            break
    if skipped:
        logger.info("%s: %d utterances without a usable reference are left out", task.name, skipped)
    return _finish(task, rows)


def _ask(task: Task, utterance: dict, line: dict, seed: int, pool: Mapping[str, PoolTask]) -> Iterator[dict]:
    """The rows of an utterance, but for what `_finish` adds."""
    common = {**utterance, "duration": float(utterance["duration"]), "language": task.language, "constraint": None}
    if task.kind == "pool":
        for row in draw_rows([common], _draw(task, seed, pool)):
            asked = from_oracle(task.oracle, row["task"], row["transcript"])
            yield row | asked | {"target_language": task.target_language if asked["kind"] == "translation" else None}
        return
    id = utterance["id"]
    row = common | {"id": f"{utterance['source']}/{id}/{task.name}", "task": task.name}
    row |= answers(task, utterance, line) | {"kind": task.kind, "target_language": task.target_language}
    if task.kind == "constraints":
        row["instruction"], constraint = draw_constraint(id, seed)
        row["constraint"] = constraint.name
    elif task.prompt is None:
        row["instruction"] = draw_instruction(pool, task.task, id, seed, "held_out")
    else:
        row["slots"] = fillings(task, line)
    yield row


def _draw(task: Task, seed: int, pool: Mapping[str, PoolTask]) -> Draw:
    """One task for an utterance, in held-out wordings, and transcription besides if that is among them."""
    weights = {name: math.inf if name == TRANSCRIPTION else 1.0 for name in task.tasks}
    return Draw(pool, weights, min(2, len(weights)) if TRANSCRIPTION in weights else 1, seed, "held_out")


def _finish(task: Task, rows: list[dict]) -> list[dict]:
    """The rows with all labels known, prompts filled and keys in one order; raises ValueError for ids used twice."""
    if not rows:
        raise ValueError(
            f"task {task.name!r}: {task.data.corpus} ({task.data.split}) has no utterance that can be used."
        )
    ids = collections.Counter(row["id"] for row in rows)
    if twice := next((id for id, count in ids.items() if count > 1), None):
        raise ValueError(
            f"task {task.name!r}: {twice!r} is the id of two rows; name a column that tells utterances apart: --data "
            f"{task.name}.columns.id=COLUMN."
        )
    found = sorted({text for row in rows for text in row["references"]})
    for row in rows:
        if task.labels == (COLUMN,):
            row["labels"] = found
        if "slots" in row:
            row["instruction"] = task.prompt.format(**row["slots"], labels=", ".join(row["labels"]))
    return [{key: row[key] for key in ROW} for row in rows]
