"""Does a model do what it is asked about speech, or does it transcribe whatever it is asked?"""

import importlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import jiwer
import numpy as np

from dataset_builders.building import draw_rows
from dataset_builders.instructions import SELF_POWERED_TASKS, TRANSCRIPTION, Draw, Task, load_pool
from recipes.evaluation.metrics import error_rate, normalize_text

COPY_WER = 0.2  # an answer this close to the transcript is a copy of it
BY_FORM = "recipes.evaluation.forms"  # the checker that judges the form of an answer alone
Checker = Callable[[str, str, str], bool | None]  # None: nothing is known of right answers to this task


def load_checker(module: str) -> Checker:
    """The `is_correct(task, transcript, response)` of a module named by its import path.

    Raises:
        ValueError: the module has none.
    """
    checker = getattr(importlib.import_module(module), "is_correct", None)
    if checker is None:
        raise ValueError(f"{module} has no is_correct(task, transcript, response); name a module that has.")
    return checker


def held_out_rows(
    corpus: Iterable[dict], tasks: Sequence[str], seed: int = 0, pool: Mapping[str, Task] | None = None
) -> list[dict]:
    """Evaluation rows: every clip with one of `tasks` and with transcription, in held-out wordings of `pool` (by
    default the package's), and its audio.

    Raises:
        ValueError: the pool lacks one of the tasks, or has no held-out wordings of it.
    """
    weights = {**dict.fromkeys(tasks, 1.0), TRANSCRIPTION: math.inf}
    draw = Draw(load_pool() if pool is None else pool, weights, min(2, len(weights)), seed, "held_out")
    return draw_rows([utterance | {"row": row} for row, utterance in enumerate(corpus)], draw)


def is_copy(transcript: str, response: str) -> bool:
    """Whether a response is the transcript: word error rate below 0.2 after normalisation."""
    said, answered = normalize_text(transcript), normalize_text(response)
    return bool(said) and jiwer.wer(said, answered) < COPY_WER


def score_following(rows: Sequence[Mapping], responses: Sequence[str], checker: Checker) -> dict:
    """Following rate, transcript copy rate and word error rate.

    Returns:
        `following`: mean over the self-powered tasks of the share right; `tasks`: that share for every task asked of
        which the checker knows right answers;
        `transcript_copy`: share of answers to tasks other than repetition and transcription that are the transcript;
        `wer`: of the transcription rows, as `metrics.error_rate` has it of English. A figure without rows is left out.
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
    if written := [pair for pair in answered if pair[0]["task"] == TRANSCRIPTION]:
        said, heard = [row["transcript"] for row, _ in written], [response for _, response in written]
        scores["wer"] = error_rate(said, heard)[1].value
    return scores
