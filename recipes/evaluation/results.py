"""Compute the figures of each task and system from the answers, and compare the systems."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version

import numpy as np

from dataset_builders.instructions import SELF_POWERED_TASKS, TRANSCRIPTION
from recipes.evaluation import forms
from recipes.evaluation.following import is_copy
from recipes.evaluation.kinds import KINDS, is_right
from recipes.evaluation.metrics import (
    DRAWS,
    Metric,
    accuracy,
    bootstrap_ratio,
    chrf,
    main_figure,
    mean,
    mean_of_tasks,
)
from recipes.evaluation.rows import Answer, Question
from recipes.evaluation.systems import System
from recipes.evaluation.tasks import EvaluationTask

SHOWN_PROMPTS = 5


@dataclass(frozen=True)
class SystemResult:
    """The answers of a system to the questions of a task."""

    questions: Sequence[Question]
    given: Sequence[Question]  # the questions with the system's changes: another clip, instruction or transcript
    answers: Sequence[Answer]

    @cached_property
    def responses(self) -> list[str]:
        return [answer.response for answer in self.answers]

    @cached_property
    def scored(self) -> list[str]:
        """Return what is scored: the responses, or the judge's replies to them."""
        return [answer.response if answer.judgement is None else answer.judgement for answer in self.answers]

    @cached_property
    def hits(self) -> list[bool | None]:
        """Return whether each answer is right; None if the right answer, or what the judge says, is unknown."""
        return [is_right(*pair) for pair in zip(self.questions, self.scored, strict=True)]

    @classmethod
    def joined(cls, results: Sequence["SystemResult"]) -> "SystemResult":
        """Return the results of several tasks as one."""
        columns = ("questions", "given", "answers")
        return cls(*([row for result in results for row in getattr(result, column)] for column in columns))

    def parts(self) -> dict[str, "SystemResult"]:
        """Return the results of each question of the task, by its name in alphabetical order."""
        rows = list(zip(self.questions, self.given, self.answers, strict=True))
        tasks = sorted({question.task for question in self.questions})
        return {task: SystemResult(*zip(*(row for row in rows if row[0].task == task), strict=True)) for task in tasks}


def collect(
    tasks: Sequence[EvaluationTask], systems: Sequence[System], results: Mapping[tuple[str, str], SystemResult]
) -> dict:
    """Return the content of `results.json`, from results by the names of task and system: `systems`, `tasks`, `suites`
    and `versions`. Each task has what was asked, the figures of its `systems` as in `figures_of`, and `comparisons` as
    in `compare`."""
    scored = {}
    for task in tasks:
        answered = {s.name: results[task.name, s.name] for s in systems if (task.name, s.name) in results}
        if not answered:  # if only text LLMs were to answer, but clips have no transcripts
            continue
        rows = max((result.questions for result in answered.values()), key=len)
        scored[task.name] = {
            **{key: getattr(task, key) for key in ("group", "kind", "description")},
            **{key: getattr(task.data, key) for key in ("corpus", "config", "split")},
            "judged": task.judge is not None,
            "prompt": "drawn for every row" if task.prompt is None else task.prompt or "the clip alone",
            "prompts": list(dict.fromkeys(row.instruction for row in rows))[:SHOWN_PROMPTS],
            "rows": len(rows),
            "utterances": len({row.utterance for row in rows}),
            "systems": {name: figures_of(result, answered.get("text_llm")) for name, result in answered.items()},
            "comparisons": compare(answered),
        }
    about = {system.name: {"label": system.label, "hears": system.slot} for system in systems}
    packages = ("torch", "transformers", "jiwer", "sacrebleu", "whisper-normalizer")
    versions = {"python": platform.python_version(), **{package: version(package) for package in packages}}
    return {"systems": about, "tasks": scored, "suites": suites(tasks, scored, results), "versions": versions}


def suites(tasks: Sequence[EvaluationTask], scored: dict, results: Mapping[tuple[str, str], SystemResult]) -> dict:
    """Return the suites of the tasks by name: the names of their `tasks`, for each of the `systems` the mean of their
    main figures, and `comparisons` as in `compare` if all tasks tell right from wrong.

    The mean is the IFrate of Speech-IFEval and the overall score of VoiceBench, and `forgetting` is Speech-IFEval's Δ.
    """
    found: dict[str, dict] = {}
    for name in dict.fromkeys(task.suite for task in tasks if task.suite and task.name in scored):
        members = [task.name for task in tasks if task.suite == name and task.name in scored]
        by_system = [scored[member]["systems"] for member in members]
        # A judge whose replies cannot be read leaves a task without its figure.
        systems = [s for s in by_system[0] if all(s in by and main_figure(by[s]["figures"]) for by in by_system)]
        right = all("right" in by[system]["figures"] for by in by_system for system in systems)
        joined = {system: SystemResult.joined([results[member, system] for member in members]) for system in systems}
        found[name] = {
            "tasks": members,
            "systems": {s: mean_of_tasks([by[s]["figures"] for by in by_system]).as_dict() for s in systems},
            "comparisons": compare(joined) if right else {},
        }
    return found


def figures_of(result: SystemResult, text_llm: SystemResult | None = None) -> dict:
    """Return the figures of a system's answers to a task, and of its parts if the task asks several questions. They are
    compared with the answers of the text LLM."""
    answers, parts = result.answers, result.parts()
    report = {"rows": len(answers), "truncated": mean([not answer.finished for answer in answers]).as_dict()}
    seconds = [answer.seconds for answer in answers if answer.seconds]
    if len(seconds) == len(answers):  # rtfx: seconds of audio per second of computation
        report["rtfx"] = bootstrap_ratio([row.duration for row in result.questions], seconds).as_dict()
    if len(parts) == 1:
        return report | {"figures": _as_dicts(score_kind(result) | agreement(result, text_llm))}
    scored = {
        name: {
            "kind": part.questions[0].kind,
            "rows": len(part.questions),
            "figures": _as_dicts(score_kind(part) | agreement(part, text_llm)),
        }
        for name, part in parts.items()
    }
    return report | {"figures": _as_dicts(score_pool(result) | agreement(result, text_llm)), "parts": scored}


def score_kind(result: SystemResult) -> dict[str, Metric]:
    """Return the figures of questions of one kind: the usual ones of this kind, `right` (the share of right answers)
    and, except for transcription and repetition, `transcript_copy`. If right answers are unknown, there are only
    `transcript_copy` and `form`, the share of answers with the right form."""
    kind = KINDS[result.questions[0].kind]
    if None in result.hits and not kind.judged:
        return _form(result) | _transcript_copy(result)
    figures = dict(kind.figures(result.questions, result.scored))
    if hits := [hit for hit in result.hits if hit is not None]:
        figures["right"] = mean(hits)
    chosen = [answer.constrained for answer in result.answers]
    if kind.read and None not in chosen:
        gold = [question.references[0] for question in result.questions]
        figures["accuracy_constrained"] = accuracy(gold, list(map(kind.read, result.questions, chosen)))
    return figures | _transcript_copy(result)


def score_pool(result: SystemResult) -> dict[str, Metric]:
    """Return the figures over all tasks of a pool except transcription: `following`, the mean over tasks of the share
    of right answers (named `right` if no task is self-powered), and `transcript_copy`, the mean over rows."""
    asked = zip(result.questions, result.hits, strict=True)
    hits = [(row.task, hit) for row, hit in asked if row.kind != TRANSCRIPTION and hit is not None]
    if not hits:
        return _form(result) | _transcript_copy(result)
    tasks = [task for task, _ in hits]
    name = "following" if set(tasks) & set(SELF_POWERED_TASKS) else "right"
    return {name: mean([hit for _, hit in hits], tasks)} | _transcript_copy(result)


def agreement(result: SystemResult, text_llm: SystemResult | None) -> dict[str, Metric]:
    """Compare a system's answers from speech with the text LLM's answers from text, except transcriptions.

    Returns:
        `agreement`, the chrF of its greedy answers against those of the text LLM, and `likelihood_lost`, how much lower
        the log-likelihood of the text LLM's answers is under the system than under the text LLM, in nats per token. The
        result is empty if there is no text LLM or none of its answers.
    """
    if text_llm is None:
        return {}
    theirs = {answer.id: answer for answer in text_llm.answers if answer.response}
    rows = zip(result.questions, result.answers, strict=True)
    pairs = [(own, theirs[own.id]) for row, own in rows if row.kind != TRANSCRIPTION and own.id in theirs]
    if not pairs:
        return {}
    figures = {"agreement": chrf([[their.response] for _, their in pairs], [own.response for own, _ in pairs])}
    sums = [(own.log_likelihood, their.log_likelihood, their.tokens) for own, their in pairs]
    losses = [(their - own, tokens) for own, their, tokens in sums if own is not None and their is not None and tokens]
    if losses:
        lost, tokens = zip(*losses, strict=True)
        figures["likelihood_lost"] = bootstrap_ratio(lost, tokens)
    return figures


def _form(result: SystemResult) -> dict[str, Metric]:
    """Return `form`, the mean over tasks of the share of answers with the right form; nothing if no form is known."""
    rows = zip(result.questions, result.responses, strict=True)
    asked = [(row, response) for row, response in rows if row.kind != TRANSCRIPTION]
    hits = [(row.task, forms.is_correct(row.task, row.transcript, response)) for row, response in asked]
    hits = [(task, hit) for task, hit in hits if hit is not None]
    return {"form": mean([hit for _, hit in hits], [task for task, _ in hits])} if hits else {}


def _transcript_copy(result: SystemResult) -> dict[str, Metric]:
    pairs = zip(result.questions, result.responses, strict=True)
    asked = [pair for pair in pairs if pair[0].kind != TRANSCRIPTION and pair[0].task != "repetition"]
    return {"transcript_copy": mean([is_copy(row.transcript, response) for row, response in asked])} if asked else {}


def _as_dicts(figures: Mapping[str, Metric]) -> dict[str, dict]:
    return {name: metric.as_dict() for name, metric in figures.items()}


def compare(results: Mapping[str, SystemResult]) -> dict:
    """Return relative changes of the share of right answers, with paired 95 % intervals (the same resampled rows for
    both systems): `forgetting` of the model, and `text_kept` of the model that reads transcripts, relative to the text
    LLM. `results` are those of a task by system."""
    differences = {}
    for name, system in (("forgetting", "model"), ("text_kept", "model_reading")):
        if system not in results or "text_llm" not in results:
            continue
        one, other = results[system], results["text_llm"]
        pairs = zip(one.questions, one.hits, other.hits, strict=True)
        asked = [pair for pair in pairs if pair[0].kind != TRANSCRIPTION and None not in pair[1:]]
        if any(base for *_, base in asked):
            rows, hits, base = zip(*asked, strict=True)
            differences[name] = relative(hits, base, [row.task for row in rows])
    return differences


def relative(hits: Sequence[bool], base: Sequence[bool], groups: Sequence[str]) -> dict:
    """Return (share − base share) / base share with its 95 % interval, from whether each answer of both systems is
    right. A share is the mean over groups of rows, by their labels, of the share of right answers."""
    rng, both = np.random.default_rng(0), np.array([hits, base], dtype=float)
    labels = np.array(groups)
    values, drawn = [], []
    for group in sorted(set(groups)):
        in_group = both[:, labels == group]
        rows = in_group.shape[1]
        values.append(in_group.mean(1))
        weights = rng.multinomial(rows, np.full(rows, 1 / rows), DRAWS) / rows
        drawn.append(weights @ in_group.T)
    value, draws = np.mean(values, 0), np.mean(drawn, 0)
    change = (draws[:, 0] - draws[:, 1]) / np.maximum(draws[:, 1], 1e-9)
    low, high = np.quantile(change, [0.025, 0.975])
    return Metric(float((value[0] - value[1]) / value[1]), float(low), float(high)).as_dict()
