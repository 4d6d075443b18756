"""Ask questions and write the answers to disk batch by batch, so that an interrupted run can continue."""

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
        "task": Value("string"),  # a name in `tasks.yaml`
        "system": Value("string"),
        "id": Value("string"),
        "part": Value("string"),  # the question, of a task that asks several
        "instruction": Value("string"),  # what the system was asked
        "transcript": Value("string"),
        "references": ListOf(Value("string")),
        "response": Value("string"),
        "constrained": Value("string"),  # the answer when only the allowed answers are possible
        "correct": Value("bool"),
        "finished": Value("bool"),  # whether the model ended the answer within the limit of tokens
        "seconds": Value("float64"),  # the time of the batch divided by its rows
        "log_likelihood": Value("float64"),  # the sum over the tokens of the text LLM's answer
        "tokens": Value("int64"),  # the number of tokens of the text LLM's answer
        "judgement": Value("string"),  # the judge's reply, as it is
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
    """Return the answers to `rows`, in order. Answers that the file already has are reused if their rows are unchanged.

    Args:
        rows: questions with unique `id`s.
        respond: returns the free and the constrained answers to a batch of rows.
        file: JSON Lines file, to which the answers of each batch are appended, each with a hash of its row. Incomplete
            lines, which a killed run leaves behind, are ignored.
        size: number of rows in a batch.
        name: label of the progress bar.
        measure: returns the log-likelihoods of the text LLM's answers to a batch of rows, given the rows and the free
            answers. Its time is not part of the answers' time. If None, they are not measured.
    """
    hashes = {row.id: _hash_of(row) for row in rows}
    by_id = {r["id"]: Answer(**r) for r in read_lines(file) if r.pop("row", None) == hashes.get(r["id"])}
    remaining = [row for row in rows if row.id not in by_id]
    # Rows of similar duration share a batch, because it takes as long as its longest row. The slowest batch is first.
    remaining.sort(key=lambda row: -row.duration)
    with tqdm(total=len(rows), initial=len(rows) - len(remaining), desc=name, unit="row") as progress:
        for start in range(0, len(remaining), size):
            batch = remaining[start : start + size]
            began = time.perf_counter()
            replies, constrained = respond(batch)
            seconds = (time.perf_counter() - began) / len(batch)
            likelihoods = measure(batch, replies) if measure else [(None, None)] * len(batch)
            answers = [
                Answer(row.id, reply.text, choice, reply.finish == "stop", round(seconds, 6), *likelihood)
                for row, reply, choice, likelihood in zip(batch, replies, constrained, likelihoods, strict=True)
            ]
            append_lines(file, [vars(answer) | {"row": hashes[answer.id]} for answer in answers])
            by_id |= {answer.id: answer for answer in answers}
            progress.update(len(batch))
    return [by_id[row.id] for row in rows]


def _hash_of(row: Question) -> str:
    """Return a hash of all fields of a row and of its audio."""
    content = row.as_row() | {"audio": audio_key(row.audio)}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def to_parquet(records: list[dict], file: Path) -> None:
    """Write predictions atomically as Parquet, with the columns of `FEATURES`."""
    dataset = Dataset.from_list(records, features=FEATURES).select_columns(list(FEATURES))  # in the order of FEATURES
    with whole(file) as partial:
        dataset.to_parquet(str(partial))
