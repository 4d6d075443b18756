"""Answers as they come, on disk: a run that is killed goes on where it stopped."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from datasets import Dataset, Features, Value
from datasets import Sequence as ListOf
from tqdm import tqdm

from dataset_builders.files import append_lines, read_lines, whole
from dataset_builders.responders.exchange import Reply
from recipes.evaluation.rows import Answer, Question
from recipes.listening.features import audio_key

Replies = tuple[list[Reply], list[str | None]]  # free and constrained answers
Likelihoods = list[tuple[float | None, int | None]]  # log-likelihood and tokens of the text LLM's answers
FEATURES = Features(
    {
        "task": Value("string"),  # of the registry
        "system": Value("string"),
        "id": Value("string"),
        "part": Value("string"),  # of a task with several questions, such as the pool's: which
        "instruction": Value("string"),  # as it was given
        "transcript": Value("string"),
        "references": ListOf(Value("string")),
        "response": Value("string"),
        "constrained": Value("string"),  # the answer among the only ones allowed
        "correct": Value("bool"),
        "finished": Value("bool"),  # the model ended it, within its limit of tokens
        "seconds": Value("float64"),  # the batch's time, shared evenly
        "log_likelihood": Value("float64"),  # of the text LLM's answer, the sum over its tokens
        "tokens": Value("int64"),  # of the text LLM's answer
    }
)


def answer(
    rows: Sequence[Question],
    respond: Callable[[Sequence[Question]], Replies],
    file: Path,
    size: int,
    name: str = "answers",
    measure: Callable[[Sequence[Question], list[Reply]], Likelihoods] | None = None,
) -> list[Answer]:
    """Answers to `rows`, in order; those that the file holds are not asked for again, unless the row is another by now.

    Args:
        rows: with unique `id`s.
        respond: returns free and constrained answers to some of the rows.
        file: JSON Lines, appended to after every `size` rows, with a hash of each. A line that a killed run tore is
            dropped.
        size: rows asked at a time.
        name: of the progress bar.
        measure: returns how likely the text LLM's answers to these rows are, from the rows and the free answers. Its
            time is not part of the answers' time. None leaves that unknown.
    """
    asked = {row.id: _content(row) for row in rows}
    known = {r["id"]: Answer(**r) for r in read_lines(file) if r.pop("row", None) == asked.get(r["id"])}
    left = [row for row in rows if row.id not in known]
    # Longest together: a batch is as long as its longest row, and the slowest batch comes first.
    left.sort(key=lambda row: -row.duration)
    with tqdm(total=len(rows), initial=len(rows) - len(left), desc=name, unit="row") as progress:
        for start in range(0, len(left), size):
            some = left[start : start + size]
            began = time.perf_counter()
            replies, constrained = respond(some)
            seconds = (time.perf_counter() - began) / len(some)
            likelihoods = measure(some, replies) if measure else [(None, None)] * len(some)
            answers = [
                Answer(row.id, reply.text, choice, reply.finish == "stop", round(seconds, 6), *likelihood)
                for row, reply, choice, likelihood in zip(some, replies, constrained, likelihoods, strict=True)
            ]
            append_lines(file, [vars(answer) | {"row": asked[answer.id]} for answer in answers])
            known |= {answer.id: answer for answer in answers}
            progress.update(len(some))
    return [known[row.id] for row in rows]


def _content(row: Question) -> str:
    """Of what a row was when it was asked."""
    content = row.as_row() | {"audio": audio_key(row.audio)}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def to_parquet(records: list[dict], file: Path) -> None:
    """Write predictions with the columns of `FEATURES`, whole or not at all."""
    dataset = Dataset.from_list(records, features=FEATURES).select_columns(list(FEATURES))  # in this order
    with whole(file) as partial:
        dataset.to_parquet(str(partial))
