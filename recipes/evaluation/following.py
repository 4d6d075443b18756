"""Measure whether a model follows instructions about speech, or transcribes whatever the instruction is."""

import importlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import jiwer
import numpy as np

from dataset_builders.building import draw_rows
from dataset_builders.instructions import SELF_POWERED_TASKS, TRANSCRIPTION, Draw, Task, load_pool
from recipes.evaluation.metrics import error_rate, normalize_text

COPY_WER = 0.2  # an answer with a lower word error rate against the transcript is a copy of it
BY_FORM = "recipes.evaluation.forms"  # the checker of an answer's form, which ignores its content
Checker = Callable[[str, str, str], bool | None]  # None: the right answers to this task are unknown


def load_checker(module: str) -> Checker:
    """Return the function `is_correct(task, transcript, response)` of a module. Raises ValueError if it has none."""
    checker = getattr(importlib.import_module(module), "is_correct", None)
    if checker is None:
        raise ValueError(f"{module} has no is_correct(task, transcript, response); name a module that has it.")
    return checker


def held_out_rows(
    corpus: Iterable[dict], tasks: Sequence[str], seed: int = 0, pool: Mapping[str, Task] | None = None
) -> list[dict]:
    """Return two rows for every utterance of `corpus`, with its audio: one of the `tasks` of the pool, and
    transcription. The instructions are held-out wordings.

    Raises:
        ValueError: the pool lacks one of the tasks, or has no held-out wordings of it.
    """
    weights = {**dict.fromkeys(tasks, 1.0), TRANSCRIPTION: math.inf}
    draw = Draw(load_pool() if pool is None else pool, weights, min(2, len(weights)), seed, "held_out")
    return draw_rows([utterance | {"row": row} for row, utterance in enumerate(corpus)], draw)


def is_copy(transcript: str, response: str) -> bool:
    """Return whether a response copies the transcript: its word error rate after normalisation is below 0.2."""
    reference, hypothesis = normalize_text(transcript), normalize_text(response)
    return bool(reference) and jiwer.wer(reference, hypothesis) < COPY_WER


def score_following(rows: Sequence[Mapping], responses: Sequence[str], checker: Checker) -> dict:
    """Return the following rate, the rate of transcript copies and the word error rate.

    Returns:
        `tasks`: the share of right answers to each task, if the checker knows them;
        `following`: the mean of these shares over the self-powered tasks;
        `transcript_copy`: the share of copies of the transcript among the answers to all tasks but repetition and
        transcription;
        `wer`: the word error rate of the transcriptions, as in `metrics.error_rate` for English.
        Figures without any rows are left out.
    """
    answered = list(zip(rows, responses, strict=True))
    right: dict[str, list[bool]] = {}
    for row, response in answered:
        if (hit := checker(row["task"], row["transcript"], response)) is not None:
            right.setdefault(row["task"], []).append(hit)
    tasks = {task: float(np.mean(hits)) for task, hits in sorted(right.items())}
    followed = [share for task, share in tasks.items() if task in SELF_POWERED_TASKS]
    others = [pair for pair in answered if pair[0]["task"] not in (TRANSCRIPTION, "repetition")]
    copies = [is_copy(row["transcript"], response) for row, response in others]
    shares = {"following": followed, "transcript_copy": copies}
    scores = {"tasks": tasks} | {name: float(np.mean(values)) for name, values in shares.items() if values}
    if transcriptions := [pair for pair in answered if pair[0]["task"] == TRANSCRIPTION]:
        references = [row["transcript"] for row, _ in transcriptions]
        scores["wer"] = error_rate(references, [response for _, response in transcriptions])[1].value
    return scores
