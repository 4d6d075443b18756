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
from recipes.listening.features import audio_key

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
    }
)


def answer(
    rows: Sequence[dict],
    respond: Callable[[Sequence[dict]], tuple[list[Reply], list[str | None]]],
    file: Path,
    size: int,
    name: str = "answers",
) -> list[dict]:
    """Answers to `rows`, in order; those that the file holds are not asked for again, unless the row is another by now.

    Args:
        rows: with unique `id`s.
        respond: free and constrained answers to some of the rows.
        file: JSON Lines, appended to after every `size` rows, with a hash of each. A line that a killed run tore is
            dropped.
        size: rows asked at a time.

    Returns:
        For every row `{"id", "response", "constrained", "finished", "seconds"}`.
    """
    asked = {row["id"]: _content(row) for row in rows}
    known = {r["id"]: r for r in read_lines(file) if r.pop("row", None) == asked.get(r["id"])}
    left = [row for row in rows if row["id"] not in known]
    # Longest together: a batch is as long as its longest row, and the slowest batch comes first.
    left.sort(key=lambda row: -row["duration"])
    with tqdm(total=len(rows), initial=len(rows) - len(left), desc=name, unit="row") as progress:
        for start in range(0, len(left), size):
            some = left[start : start + size]
            began = time.perf_counter()
            replies, constrained = respond(some)
            seconds = (time.perf_counter() - began) / len(some)
            records = [
                {
                    "id": row["id"],
                    "response": reply.text,
                    "constrained": choice,
                    "finished": reply.finish == "stop",
                    "seconds": round(seconds, 6),
                }
                for row, reply, choice in zip(some, replies, constrained, strict=True)
            ]
            append_lines(file, [record | {"row": asked[record["id"]]} for record in records])
            known |= {record["id"]: record for record in records}
            progress.update(len(some))
    return [known[row["id"]] for row in rows]


def _content(row: dict) -> str:
    """Of what a row was when it was asked."""
    content = row | {"audio": row.get("audio") and audio_key(row["audio"])}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def to_parquet(records: list[dict], file: Path) -> None:
    """Write predictions with the columns of `FEATURES`, whole or not at all."""
    dataset = Dataset.from_list(records, features=FEATURES).select_columns(list(FEATURES))  # in this order
    with whole(file) as partial:
        dataset.to_parquet(str(partial))
