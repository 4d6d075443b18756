"""Load the rows of a bias analysis: instructions about speech, with their responses."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from datasets import get_dataset_split_names, load_dataset

from dataset_builders.corpora.opening import PRESETS, load_corpus
from dataset_builders.instructions import SELF_POWERED_TASKS, TRANSCRIPTION, Task, draw_fraction
from dataset_builders.publishing import load_self_powered
from recipes.evaluation.following import held_out_rows
from recipes.listening.speech_llm import SpeechLLM

TARGETS = ("response", "own")


def load_rows(
    data: str,
    split: str | None,
    limit: int,
    tasks: Sequence[str] = SELF_POWERED_TASKS,
    seed: int = 0,
    pool: Mapping[str, Task] | None = None,
) -> list[dict]:
    """Return at most `limit` rows of `tasks`, about as many of each task.

    Args:
        data: a finished self-powered set (folder or Hub id), whose responses are kept; or an ASR corpus for
            `open_corpus`, whose utterances get a task in a held-out wording, and no response yet.
        split: split of the set or the corpus. If None, it is `test`, or the first split of a set without `test`.
        limit: largest number of rows.
        tasks: tasks of the rows.
        seed: seed that decides which rows are used.
        pool: pool whose held-out wordings the utterances of a corpus get; the default pool if None.

    Raises:
        ValueError: the limit is below 1, no row has one of the tasks, or the data cannot be read.
    """
    if limit < 1:
        raise ValueError(f"{limit=} must be 1 or more.")
    splits = self_powered_splits(data)
    split = split or ("test" if not splits or "test" in splits else splits[0])
    if splits:
        dataset = load_self_powered(data, "all", split)
        rows = dataset.select(_spread(dataset["task"], dataset["id"], tasks, seed)[:limit]).to_list()
    else:
        rows = held_out_rows(load_corpus(data, split, limit=limit), tasks, seed, pool)
        rows = [row for row in rows if row["task"] != TRANSCRIPTION][:limit]
    if not rows:
        raise ValueError(f"{data} ({split}) has no row of {list(tasks)}.")
    return rows


def self_powered_splits(data: str) -> list[str]:
    """Return the splits of a self-powered set, whose configuration `all` has instructions and responses; an empty list
    for any other data."""
    if data in PRESETS or Path(data).is_file():
        return []
    try:
        splits = get_dataset_split_names(data, "all")
        stream = load_dataset(data, "all", split=splits[0], streaming=True)
    except (ValueError, OSError):  # no such configuration or no such data, which is an error when it is loaded
        return []
    return splits if {"instruction", "response"} <= set(stream.column_names or ()) else []


def _spread(task_of: Sequence[str], ids: Sequence[str], tasks: Sequence[str], seed: int) -> list[int]:
    """Return the positions of the rows of `tasks`, in an order in which the tasks alternate."""
    places = sorted(range(len(ids)), key=lambda place: draw_fraction(seed, "bias rows", ids[place]))
    turns = itertools.zip_longest(*([place for place in places if task_of[place] == task] for task in tasks))
    return [place for turn in turns for place in turn if place is not None]


def with_targets(rows: list[dict], llm: SpeechLLM, target: str, answers: Sequence[str], **options) -> list[dict]:
    """Return the rows with the `response` that is analysed, without rows whose response is empty.

    The target `response` uses the responses of the rows or, if they have none, the model's answers to the transcripts,
    with options of `SpeechLLM.respond`; `own` uses `answers`, those of the model to the rows.

    Raises:
        ValueError: the target is unknown, or all responses are empty.
    """
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}; expected one of {TARGETS}.")
    if target == "own":
        traced = [row | {"response": answer} for row, answer in zip(rows, answers, strict=True)]
    elif all("response" in row for row in rows):
        traced = rows
    else:
        replies = llm.respond(rows, "transcript", **options)
        traced = [row | {"response": reply.text} for row, reply in zip(rows, replies, strict=True)]
    traced = [row for row in traced if row["response"].strip()]
    if not traced:
        raise ValueError(f"all {len(rows)} responses are empty; there is nothing to analyse.")
    return traced
