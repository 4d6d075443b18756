"""The constraints of IFEval (arXiv 2311.07911), with the parameters that each row has for them.

The names, the parameters and what each constraint means are those of IFEval's instructions.py (Apache 2.0), as
VoiceBench and Speech-IFEval publish it; the checks here are our own. They differ from it where it needs a package:
sentences are counted by their punctuation, and English in capitals is not told from another language.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence

from recipes.evaluation.constraints import count_sentences
from recipes.evaluation.rows import NoReferenceError

PARAMETERS = ("instruction_id_list", "kwargs")  # a row's columns: names of constraints, and a mapping for each
_DIVIDER = r"\s?\*{3}\s?"
_OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def _compare(count: int, least: int, relation: str) -> bool:
    return count < least if relation == "less than" else count >= least


def _is_json(text: str) -> bool:
    try:
        json.loads(re.sub(r"^```(?:json)?|```$", "", text, flags=re.IGNORECASE))
    except ValueError:
        return False
    return True


def _parts(text: str, divider: str) -> list[str]:
    """Return the parts between dividers. Only the first and the last may be empty, and are left out then."""
    first, *others = map(str.strip, re.split(divider, text))
    return [part for part in (first, *others[:-1], *others[-1:]) if part] if all(others[:-1]) else []


def _begins_paragraph(text: str, count: int, place: int, word: str) -> bool:
    paragraphs = [part.strip() for part in text.split("\n\n") if part.strip()]
    if len(paragraphs) != count or not 1 <= place <= count:
        return False
    return re.split(r"[.,?!'\"]", paragraphs[place - 1].split()[0].lstrip("'\""))[0].lower() == word.lower()


def _postscript(text: str, marker: str) -> bool:
    spelt = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}.get(marker.strip(), re.escape(marker.strip()))
    return bool(re.search(spelt, text, re.IGNORECASE))


# Checks of a stripped, non-empty answer, given the parameters of the row.
CHECKS: dict[str, Callable[[str, Mapping], bool]] = {
    "keywords:existence": lambda text, row: all(word.lower() in text.lower() for word in row["keywords"]),
    "keywords:forbidden_words": lambda text, row: (
        not any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in row["forbidden_words"])
    ),
    "keywords:frequency": lambda text, row: _compare(
        text.lower().count(row["keyword"].strip().lower()), row["frequency"], row["relation"]
    ),
    "keywords:letter_frequency": lambda text, row: _compare(
        text.lower().count(row["letter"].lower()), row["let_frequency"], row["let_relation"]
    ),
    "length_constraints:number_words": lambda text, row: _compare(
        len(re.findall(r"\w+", text)), row["num_words"], row["relation"]
    ),
    "length_constraints:number_sentences": lambda text, row: _compare(
        count_sentences(text), row["num_sentences"], row["relation"]
    ),
    "length_constraints:number_paragraphs": lambda text, row: len(_parts(text, _DIVIDER)) == row["num_paragraphs"],
    "length_constraints:nth_paragraph_first_word": lambda text, row: _begins_paragraph(
        text, row["num_paragraphs"], row["nth_paragraph"], row["first_word"]
    ),
    "detectable_content:number_placeholders": lambda text, row: (
        len(re.findall(r"\[.*?\]", text)) >= row["num_placeholders"]
    ),
    "detectable_content:postscript": lambda text, row: _postscript(text, row["postscript_marker"]),
    "detectable_format:number_bullet_lists": lambda text, row: (
        len(re.findall(r"^\s*(?:\*[^*\n]|-)", text, re.MULTILINE)) == row["num_bullets"]
    ),
    "detectable_format:constrained_response": lambda text, row: any(option in text for option in _OPTIONS),
    "detectable_format:number_highlighted_sections": lambda text, row: (
        len(re.findall(r"\*[^*\n]*[^*\s][^*\n]*\*", text)) >= row["num_highlights"]
    ),
    "detectable_format:multiple_sections": lambda text, row: (
        len(re.findall(rf"{re.escape(row['section_spliter'].strip())}\s?\d+", text)) >= row["num_sections"]
    ),
    "detectable_format:json_format": lambda text, row: _is_json(text),
    "detectable_format:title": lambda text, row: bool(re.search(r"<<[^\n]*[^\s<>][^\n]*>>", text)),
    "combination:two_responses": lambda text, row: len(set(parts := _parts(text, r"\*{6}"))) == len(parts) == 2,
    "combination:repeat_prompt": lambda text, row: text.lower().startswith(row["prompt_to_repeat"].strip().lower()),
    "startend:end_checker": lambda text, row: text.strip('"').lower().endswith(row["end_phrase"].strip().lower()),
    "startend:quotation": lambda text, row: bool(re.fullmatch(r'".*"', text, re.DOTALL)),
    "change_case:english_capital": lambda text, row: text.isupper(),
    "change_case:english_lowercase": lambda text, row: text.islower(),
    "change_case:capital_word_frequency": lambda text, row: _compare(
        sum(word.isupper() for word in re.findall(r"[\w'’-]+", text)), row["capital_frequency"], row["capital_relation"]
    ),
    "punctuation:no_comma": lambda text, row: "," not in text,
}
# In Speech-IFEval, more lines are bullets, every line is a paragraph, and a repeated text may be quoted.
SPEECH_CHECKS = CHECKS | {
    "length_constraints:number_paragraphs": lambda text, row: (
        len(_parts(text, r"\s*\*{3}\s*|\n+")) == row["num_paragraphs"]
    ),
    "detectable_format:number_bullet_lists": lambda text, row: (
        len(re.findall(r"^\s*(?:\*[^*\n]|[-•\d])", text, re.MULTILINE)) == row["num_bullets"]
    ),
    "combination:repeat_prompt": lambda text, row: CHECKS["combination:repeat_prompt"](text.strip("\"'"), row),
}


def listed_constraints(line: Mapping) -> list[str]:
    """Return the constraints of a row as JSON, each with its name as `id` and its parameters, from its `PARAMETERS`.

    Raises:
        NoReferenceError: a constraint has no check here, as `language:response_language`, which needs a detector.
        ValueError: the columns are missing or do not fit together.
    """
    names, given = (line.get(column) for column in PARAMETERS)
    if not isinstance(names, list) or not isinstance(given, list) or len(names) != len(given):
        found = {column: line.get(column) for column in PARAMETERS if column in line} or sorted(line)
        raise ValueError(f"expected the columns {PARAMETERS}, two lists of one length; got {found}.")
    if unknown := [name for name in names if name not in CHECKS]:
        raise NoReferenceError(f"{unknown[0]!r} is a constraint without a check; there are {list(CHECKS)}.")
    # Parquet has all parameters in every row, most of them empty.
    kept = [{key: value for key, value in one.items() if value is not None} for one in given]
    return [json.dumps({"id": name} | one) for name, one in zip(names, kept, strict=True)]


def satisfied_of(constraints: Sequence[str], response: str, speech: bool = False, loose: bool = False) -> list[bool]:
    """Return whether a response satisfies each of the `listed_constraints`, checked as in Speech-IFEval if `speech`. An
    empty one satisfies none. If `loose`, as in the loose accuracy of IFEval, it is enough that the response satisfies a
    constraint without asterisks, its first or its last line."""
    lines, checks = response.split("\n"), SPEECH_CHECKS if speech else CHECKS
    texts = ["\n".join(part) for part in (lines, lines[1:], lines[:-1], lines[1:-1])] if loose else [response]
    texts = [text.strip() for text in (*texts, *(text.replace("*", "") for text in texts if loose)) if text.strip()]
    return [any(checks[row["id"]](text, row) for text in texts) for row in map(json.loads, constraints)]
