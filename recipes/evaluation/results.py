"""The figures of a run as data: of every task and system, and how systems compare."""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version

import numpy as np

from recipes.evaluation.metrics import DRAWS, Metric, bootstrap_ratio, mean
from recipes.evaluation.scoring import is_correct, score, score_pool
from recipes.evaluation.systems import System
from recipes.evaluation.tasks import Task

SHOWN_PROMPTS = 5


def collect(
    tasks: Sequence[Task],
    systems: Sequence[System],
    asked: Mapping[tuple[str, str], Sequence[dict]],
    answers: Mapping[tuple[str, str], Sequence[dict]],
) -> dict:
    """All figures.

    Args:
        asked: rows by task and system, as `read_rows` gives them.
        answers: by task and system, as `answers.answer` gives them.

    Returns:
        `systems` and `tasks`; of a task what was asked, and for every system its `figures` and, where a task asks
        several questions, those of its `parts`; `comparisons` as in `compare`.
    """
    found = {}
    for task in tasks:
        answered = [system.name for system in systems if (task.name, system.name) in answers]
        if not answered:  # a text LLM alone, of clips without a transcript
            continue
        rows = max((asked[task.name, system] for system in answered), key=len)
        prompts = list(dict.fromkeys(row["instruction"] for row in rows))
        found[task.name] = {
            "group": task.group,
            "kind": task.kind,
            "description": task.description,
            "corpus": task.data.corpus,
            "config": task.data.config,
            "split": task.data.split,
            "prompt": task.prompt or "drawn for every row",
            "prompts": prompts[:SHOWN_PROMPTS],
            "rows": len(rows),
            "utterances": len({row["utterance"] for row in rows}),
            "systems": {
                system: figures_of(asked[task.name, system], answers[task.name, system]) for system in answered
            },
            "comparisons": compare(rows, {system: answers[task.name, system] for system in answered}),
        }
    about = {system.name: {"label": system.label, "hears": system.hear} for system in systems}
    packages = ("torch", "transformers", "jiwer", "sacrebleu", "whisper-normalizer")
    versions = {"python": platform.python_version(), **{package: version(package) for package in packages}}
    return {"systems": about, "tasks": found, "versions": versions}


def figures_of(rows: Sequence[dict], records: Sequence[dict]) -> dict:
    """Figures of one system's answers to one task, and of the parts of a task that asks several questions."""
    parts: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        parts.setdefault(row["task"], []).append(place)
    scored = {name: _part(rows, records, places) for name, places in sorted(parts.items())}
    report = {"rows": len(rows), "truncated": mean([not record["finished"] for record in records]).as_dict()}
    if all(record["seconds"] for record in records):  # seconds of audio for one of computing
        heard = [row["duration"] for row in rows]
        report["rtfx"] = bootstrap_ratio(heard, [record["seconds"] for record in records]).as_dict()
    if len(scored) == 1:
        (only,) = scored.values()
        return report | {"figures": only["figures"]}
    overall = score_pool(rows, [record["response"] for record in records])
    return report | {"figures": _as_dicts(overall), "parts": scored}


def _part(rows: Sequence[dict], records: Sequence[dict], places: Sequence[int]) -> dict:
    some, said = [rows[place] for place in places], [records[place] for place in places]
    if not all(row["references"] for row in some) and some[0]["kind"] != "constraints":
        return {"kind": some[0]["kind"], "rows": len(some), "figures": {}}
    responses = [record["response"] for record in said]
    scored = score(some, responses, [record["constrained"] for record in said])
    return {"kind": some[0]["kind"], "rows": len(some), "figures": _as_dicts(scored)}


def _as_dicts(scored: Mapping[str, Metric]) -> dict[str, dict]:
    return {name: metric.as_dict() for name, metric in scored.items()}


def compare(rows: Sequence[dict], answers: Mapping[str, Sequence[dict]]) -> dict:
    """Relative differences of the share right, with paired 95 % intervals (rows resampled for both alike):
    `forgetting`, the model against the text LLM; `text_kept`, the model that reads against the text LLM.
    """
    found, asked = {}, [place for place, row in enumerate(rows) if row["kind"] != "transcription"]
    for name, system in (("forgetting", "model"), ("text_kept", "model_reading")):
        if not asked or system not in answers or "text_llm" not in answers:
            continue
        hits = [
            [is_correct(rows[place], answers[one][place]["response"]) for place in asked]
            for one in (system, "text_llm")
        ]
        if None not in hits[0] and any(hits[1]):
            found[name] = relative(*hits, [rows[place]["task"] for place in asked])
    return found


def relative(hits: Sequence[bool], base: Sequence[bool], groups: Sequence[str], seed: int = 0) -> dict:
    """(share − base share) / base share, shares being means over the groups, and its 95 % interval."""
    rng, both = np.random.default_rng(seed), np.array([hits, base], dtype=float)
    labels = np.array(groups)
    values, drawn = [], []
    for group in sorted(set(groups)):
        some = both[:, labels == group]
        values.append(some.mean(1))
        weights = rng.multinomial(some.shape[1], np.full(some.shape[1], 1 / some.shape[1]), DRAWS) / some.shape[1]
        drawn.append(weights @ some.T)
    value, draws = np.mean(values, 0), np.mean(drawn, 0)
    change = (draws[:, 0] - draws[:, 1]) / np.maximum(draws[:, 1], 1e-9)
    low, high = np.quantile(change, [0.025, 0.975])
    return Metric(float((value[0] - value[1]) / value[1]), float(low), float(high)).as_dict()
