"""From answers to figures, by the kind of the question."""

from collections.abc import Callable, Sequence

from dataset_builders.corpora.transcripts import bare_words
from dataset_builders.instructions import SELF_POWERED_TASKS
from recipes.evaluation.constraints import satisfied
from recipes.evaluation.following import is_copy
from recipes.evaluation.metrics import (
    Metric,
    accuracy,
    bleu,
    chrf,
    error_rate,
    exact_match,
    macro_f1,
    mean,
    normalize_text,
    set_f1,
    squad,
)
from recipes.evaluation.parsing import parse_choice, parse_label, parse_list, parse_yes_no

# The figure of a kind that stands in tables and pictures; of several the first that was measured.
MAIN = ("following", "wer", "cer", "bleu", "accuracy", "f1", "exact_match", "right")
LOWER_IS_BETTER = ("wer", "cer", "transcript_copy", "truncated", "unparsed")


def read_label(row: dict, response: str) -> str | None:
    """What a free answer to a closed question says, None if nothing or several things."""
    if row["kind"] == "yes_no":
        return parse_yes_no(response)
    if row["kind"] == "choice":
        return parse_choice(response, row["labels"])
    return parse_label(response, row["labels"])


def choices(row: dict) -> list[str] | None:
    """The only answers that a constrained model may give, None for an open question."""
    if row["kind"] == "yes_no":
        return [row["answer"].format(word) for word in ("yes", "no")]
    if row["kind"] == "choice":
        letters = [chr(ord("A") + place) for place in range(len(row["labels"]))]
        return [row["answer"].format(letter) for letter in letters]
    if row["kind"] == "classification":
        return [row["answer"].format(label) for label in row["labels"]]
    return None


def is_correct(row: dict, response: str) -> bool | None:
    """Whether one answer is right, as strictly as its kind allows; None if nothing is known of right answers."""
    kind, references = row["kind"], row["references"]
    if row["right"]:  # no matter how tolerantly figures read the answer
        return bare_words(response) in {bare_words(answer) for answer in row["right"]}
    if kind == "constraints":
        return satisfied(row["constraint"], response)
    if not references:
        return None
    if kind in ("classification", "yes_no", "choice"):
        return read_label(row, response) in references
    if kind == "transcription":
        return normalize_text(references[0], row["language"]) == normalize_text(response, row["language"])
    if kind == "keywords":
        return {item.casefold() for item in parse_list(response) or ()} == {word.casefold() for word in references}
    if kind == "extraction":
        return exact_match(references, response)
    return bare_words(response) in {bare_words(reference) for reference in references}


def score(rows: Sequence[dict], responses: Sequence[str], constrained: Sequence[str | None]) -> dict[str, Metric]:
    """The figures of rows of one kind: those of the field, `right` (the share that `is_correct`), and for all but
    transcriptions and restatements `transcript_copy`.

    Args:
        rows: as `questions.read_rows` gives them.
        responses: the free answers.
        constrained: the answers among the only ones allowed, None where there were none.
    """
    kind = rows[0]["kind"]
    figures = dict(_SCORERS[kind](rows, responses))
    figures["right"] = mean([bool(is_correct(row, response)) for row, response in zip(rows, responses, strict=True)])
    if kind in ("classification", "yes_no", "choice") and all(answer is not None for answer in constrained):
        gold = [row["references"][0] for row in rows]
        read = [read_label(row, answer) for row, answer in zip(rows, constrained, strict=True)]
        figures["accuracy_constrained"] = accuracy(gold, read)
    asked_otherwise = kind != "transcription" and rows[0]["task"] != "repetition"
    if asked_otherwise:
        copies = [is_copy(row["transcript"], response) for row, response in zip(rows, responses, strict=True)]
        figures["transcript_copy"] = mean(copies)
    return figures


def score_pool(rows: Sequence[dict], responses: Sequence[str]) -> dict[str, Metric]:
    """Over the several tasks of a pool, transcription apart: `following`, the mean over them of the share right (called
    `right` where none is a self-powered task), and `transcript_copy`, over rows."""
    pairs = [pair for pair in zip(rows, responses, strict=True) if pair[0]["kind"] != "transcription"]
    right = [(row["task"], is_correct(row, response)) for row, response in pairs]
    known = [(task, hit) for task, hit in right if hit is not None]
    figures = {}
    if known:
        self_powered = any(task in SELF_POWERED_TASKS for task, _ in known)
        share = mean([hit for _, hit in known], [task for task, _ in known])
        figures["following" if self_powered else "right"] = share
    copies = [is_copy(row["transcript"], response) for row, response in pairs if row["task"] != "repetition"]
    if copies:
        figures["transcript_copy"] = mean(copies)
    return figures


def _transcription(rows, responses):
    name, rate = error_rate([row["references"][0] for row in rows], responses, rows[0]["language"])
    return {name: rate}


def _translation(rows, responses):
    references, language = [row["references"] for row in rows], rows[0]["target_language"]
    return {"bleu": bleu(references, responses, language), "chrf": chrf(references, responses, language)}


def _closed(rows, responses):
    gold = [row["references"][0] for row in rows]
    read = [read_label(row, response) for row, response in zip(rows, responses, strict=True)]
    return {
        "accuracy": accuracy(gold, read),
        "macro_f1": macro_f1(gold, read),
        "unparsed": mean([label is None for label in read]),
    }


def _keywords(rows, responses):
    return {"f1": set_f1([row["references"] for row in rows], [parse_list(response) or [] for response in responses])}


def _following(rows, responses):
    return {"following": mean([is_correct(row, response) for row, response in zip(rows, responses, strict=True)])}


_SCORERS: dict[str, Callable] = {
    "transcription": _transcription,
    "translation": _translation,
    "classification": _closed,
    "yes_no": _closed,
    "choice": _closed,
    "keywords": _keywords,
    "extraction": lambda rows, responses: squad([row["references"] for row in rows], responses),
    "constraints": _following,
    "oracle": lambda rows, responses: {},
}
