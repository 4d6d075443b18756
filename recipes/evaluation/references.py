"""Find the right answers to a question in the columns of a corpus or with an oracle.

A column is given by its name, a dotted path (`answer_spans.answer`), or a template (`{action} {object}`).
"""

import importlib
import re
import reprlib
from collections.abc import Iterator, Sequence

from dataset_builders.instructions import TRANSCRIPTION
from recipes.evaluation.kinds import KINDS, LETTERS, POOL_KINDS
from recipes.evaluation.rows import NoReferenceError
from recipes.evaluation.tasks import COLUMN, EvaluationTask


def known_answers(task: EvaluationTask, utterance: dict, line: dict) -> dict:
    """Return the fields of a question about its answers that are known: `references`, `right`, `labels` and `answer`.

    Raises:
        NoReferenceError: the row has no usable reference.
        ValueError: a column does not exist.
    """
    if KINDS[task.kind].draw is not None:
        return {"answer": task.answer}
    known = KINDS[task.kind].known
    if known is not None and not task.reference:
        return {"references": known(line), "answer": task.answer}
    if task.oracle is not None and not task.reference:
        return answers_of_oracle(task.oracle, task.task, utterance["transcript"])
    if not task.reference:
        if not utterance["transcript"]:
            raise NoReferenceError("the transcript is unknown; name its column with --data NAME.columns.transcript.")
        return {"references": [utterance["transcript"]], "answer": task.answer}
    labels = () if task.labels == (COLUMN,) else task.labels
    choices = dict(zip(labels, labels, strict=True)) if task.choices is None else options(line, task.choices)
    spelt = KINDS[task.kind].spell(references(task.reference, line), choices)
    return {"references": spelt, "labels": list(choices.values()), "answer": task.answer}


def fillings(task: EvaluationTask, line: dict) -> dict[str, str]:
    """Return the texts for the slots of a prompt."""
    slots = {slot: " ".join(references([column], line)) for slot, column in task.slots.items()}
    if task.choices is not None:
        texts = options(line, task.choices).values()
        slots["choices"] = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, texts, strict=False))
    return slots


def look_up(line: dict, path: str) -> list:
    """Return the values of a column with flattened lists. A path such as `answer_spans.answer` looks into dicts and
    lists of dicts.

    Raises:
        KeyError: there is no such column.
    """
    values = [line]
    for key in [path] if path in line else path.split("."):
        values = [value[key] for value in _flat(values)]
    return list(_flat(values))


def _flat(values: Sequence) -> Iterator:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value


def fill(template: str, line: dict) -> list[str]:
    """Return the distinct texts of a column, or of a template such as `{action} {object}`, without empty texts.

    Raises:
        KeyError: there is no such column.
    """
    if "{" not in template:
        texts = [as_text(value) for value in look_up(line, template)]
    else:
        texts = [re.sub(r"\{([^{}]+)\}", lambda match: " ".join(map(as_text, look_up(line, match[1]))), template)]
    return list(dict.fromkeys(filter(None, (" ".join(text.split()) for text in texts))))


def as_text(value: object) -> str:
    """Return a value of a column as it is written in a prompt or a reference; an empty text for None."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)


def references(columns: Sequence[str], line: dict) -> list[str]:
    """Return the distinct right answers of a row, from columns and templates as in `fill`.

    Raises:
        ValueError: there is no such column; the message names the columns.
        NoReferenceError: all columns are empty.
    """
    try:
        texts = [text for column in columns for text in fill(column, line)]
    except (KeyError, TypeError) as error:
        raise ValueError(f"no column {' or '.join(map(repr, columns))}; there are {sorted(line)}.") from error
    if not texts:
        raise NoReferenceError(f"{' or '.join(map(repr, columns))} is empty; expected a text.")
    return list(dict.fromkeys(texts))


def options(line: dict, column: str) -> dict[str, str]:
    """Return the options of a question by name, from a column with a list of texts, whose names are A, B and so on, or
    with a dict of two lists, `text` and `label`.

    Raises:
        ValueError: there is no such column, or it has fewer than two options or more than 26.
    """
    if column not in line:
        raise ValueError(f"no column {column!r} with options; there are {sorted(line)}.")
    value = line[column]
    texts = value.get("text") if isinstance(value, dict) else value
    if not isinstance(texts, list | tuple) or not 2 <= len(texts) <= len(LETTERS):
        raise ValueError(f"{column!r} is {reprlib.repr(value)}; expected a list of two options or more.")
    names = value.get("label") if isinstance(value, dict) else None
    return dict(zip(map(str, names or LETTERS), map(as_text, texts), strict=False))


def answers_of_oracle(oracle: str | None, task: str, transcript: str) -> dict:
    """Return how answers to a task of the instruction pool are scored: `kind` and, if they are known, `references`,
    `right`, `labels` and `answer`.

    Args:
        oracle: module with `answers(task, transcript)`, which returns all right answers, the canonical one first. It
            may have `FORMS`, the sentences around the answers to closed questions (`{"intent": "The intent is {}."}`),
            and `labels(task)`, which returns these answers. If None, only the right transcriptions are known.
        task: a task of the pool.
        transcript: transcript of the clip.

    Raises:
        ValueError: the module has no `answers`, or cannot read the transcript.
    """
    name = POOL_KINDS.get(task, "oracle")
    if name == TRANSCRIPTION:
        return {"kind": name, "references": [transcript]}
    if oracle is None:
        return {"kind": name}
    module = importlib.import_module(oracle)
    if not hasattr(module, "answers"):
        raise ValueError(f"{oracle} has no answers(task, transcript); name a module that has it.")
    right = module.answers(task, transcript)
    asked, kind = {"kind": name, "right": right, "references": right}, KINDS[name]
    form = getattr(module, "FORMS", {}).get(task)
    if form is None:
        return asked
    before, after = form.split("{}")
    bare = right[0].removeprefix(before).removesuffix(after)
    asked["references"] = bare.split(kind.separator) if kind.separator else [bare]
    return asked | ({"labels": module.labels(task), "answer": form} if kind.choices else {})
