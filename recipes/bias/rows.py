"""Rows whose answers are to be explained: instructions about speech, with the response that is traced."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from datasets import get_dataset_split_names, load_dataset

from dataset_builders.corpora.opening import PRESETS, load_corpus
from dataset_builders.instructions import SELF_POWERED_TASKS, TRANSCRIPTION, Task, draw_fraction
from dataset_builders.publishing import load_self_powered
from recipes.evaluation.following import held_out_rows
from recipes.listening.features import AudioFeatureStore
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
    """At most `limit` rows with one of `tasks`, evenly over them.

    Args:
        data: a finished self-powered set (folder or Hub id), whose responses are kept; or an ASR corpus, as
            `open_corpus` opens it, whose utterances get a task in a held-out wording and no response yet.
        split: of either; `test` if None and there is one, else the first.
        pool: whose held-out wordings the utterances of a corpus get; the package's if None.

    Raises:
        ValueError: a limit below 1, none of the tasks, or as the readers do.
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
    """The splits of a self-powered set, of which a configuration `all` has instructions and responses; of anything
    else none."""
    if data in PRESETS or Path(data).is_file():
        return []
    try:
        splits = get_dataset_split_names(data, "all")
        stream = load_dataset(data, "all", split=splits[0], streaming=True)
    except (ValueError, OSError):  # no such configuration, or no such data set: whoever reads it will say
        return []
    return splits if {"instruction", "response"} <= set(stream.column_names or ()) else []


def _spread(task_of: Sequence[str], ids: Sequence[str], tasks: Sequence[str], seed: int) -> list[int]:
    """Places of the rows with one of `tasks`, in an order in which the tasks take turns."""
    places = sorted(range(len(ids)), key=lambda place: draw_fraction(seed, "bias rows", ids[place]))
    turns = itertools.zip_longest(*([place for place in places if task_of[place] == task] for task in tasks))
    return [place for turn in turns for place in turn if place is not None]


def with_targets(
    rows: list[dict], llm: SpeechLLM, target: str, answers: Sequence[str], store: AudioFeatureStore | None, **options
) -> list[dict]:
    """The rows with the `response` that is traced; rows whose response is empty are left out.

    Args:
        target: `response` is the rows' own or, where they have none, what the model answers when it reads the
            transcript; `own` is what it answered from what it was given.
        answers: what it answered.
        options: of `SpeechLLM.respond`.

    Raises:
        ValueError: unknown target, or all responses are empty.
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
        raise ValueError(f"all {len(rows)} responses are empty; there is nothing to trace.")
    return traced
