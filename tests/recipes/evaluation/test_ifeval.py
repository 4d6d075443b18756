"""The constraints of IFEval, each with answers that satisfy it and answers that do not."""

import json

import pytest

from recipes.evaluation.ifeval import CHECKS, listed_constraints, satisfied_of
from recipes.evaluation.rows import NoReferenceError

# Name and parameters, an answer that satisfies it, and one that does not.
EXAMPLES = [
    ("keywords:existence", {"keywords": ["clock", "old lamp"]}, "An OLD LAMP and a clock.", "An old clock."),
    ("keywords:forbidden_words", {"forbidden_words": ["lock"]}, "A clock.", "The Lock."),
    ("keywords:frequency", {"keyword": "la", "frequency": 3, "relation": "at least"}, "La, la, la!", "La, la."),
    ("keywords:frequency", {"keyword": "la", "frequency": 2, "relation": "less than"}, "La.", "La, la."),
    ("keywords:letter_frequency", {"letter": "A", "let_frequency": 2, "let_relation": "at least"}, "a lamp", "a key"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "Two words.", "Now three words."),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}, "He left. So?", "He left."),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "One.\n***\nTwo.\n***", "One.\n\nTwo."),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Then"},
        'First.\n\n"then, he left."',
        "Then.\n\nHe left.",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] of [town]", "[name] of a town"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "So.\nP. S. Bye.", "So. PS: bye."),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "So.\nP.P.S Bye.", "So.\nP.S. Bye."),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "Two:\n* one\n- two", "* one\n**two**\n1. three"),
    ("detectable_format:constrained_response", {}, "Well. My answer is maybe.", "Maybe."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*one* and **two**", "*one* and ** **"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        "SECTION 1\nSo.\nSECTION 2\nThus.",
        "Section 1\nSo.\nSection 2\nThus.",
    ),
    ("detectable_format:json_format", {}, '```JSON\n{"answer": 1}\n```', "{answer: 1}"),
    ("detectable_format:title", {}, "<<A clock>>\nIt ticks.", "<< >>\nIt ticks."),
    ("combination:two_responses", {}, "One.\n******\nTwo.", "One.\n******\nOne."),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it. "}, "say it. So.", "Well: say it."),
    ("startend:end_checker", {"end_phrase": "That is all."}, '"So. THAT is all."', "That is all. So."),
    ("startend:quotation", {}, '"So."', '"So." Yes.'),
    ("change_case:english_capital", {}, "SO, 3 CLOCKS.", "SO, 3 Clocks."),
    ("change_case:english_lowercase", {}, "so, 3 clocks.", "So."),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "less than"},
        "ONE Two",
        "ONE TWO",
    ),
    ("punctuation:no_comma", {}, "So.", "So, so."),
]


def row(*names, **parameters):
    """The columns of a row, with all parameters as Parquet has them."""
    return {"instruction_id_list": list(names), "kwargs": [parameters | {"language": None} for _ in names]}


@pytest.mark.parametrize(("name", "parameters", "right", "wrong"), EXAMPLES)
def test_an_answer_satisfies_a_constraint_or_does_not(name, parameters, right, wrong):
    asked = listed_constraints(row(name, **parameters))
    assert json.loads(asked[0]) == {"id": name} | parameters
    assert satisfied_of(asked, f"\n{right}\n") == [True]
    assert satisfied_of(asked, wrong) == [False]
    assert satisfied_of(asked, " \n") == satisfied_of(asked, "", loose=True) == [False]


def test_every_check_has_an_example():
    assert {name for name, *_ in EXAMPLES} == set(CHECKS)


@pytest.mark.parametrize(
    ("name", "parameters", "answer"),
    [
        ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "One.\n\nTwo."),
        ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "• one\n2. two"),
        ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, '"Say it." So.'),
    ],
)
def test_speech_ifeval_is_more_lenient_in_three_of_them(name, parameters, answer):
    asked = listed_constraints(row(name, **parameters))
    assert (satisfied_of(asked, answer), satisfied_of(asked, answer, speech=True)) == ([False], [True])


def test_loosely_the_first_line_the_last_line_and_asterisks_do_not_count():
    asked = listed_constraints(row("change_case:english_lowercase", "startend:quotation"))
    assert satisfied_of(asked, 'Sure:\n**"so."**', loose=True) == [True, True]
    assert satisfied_of(asked, 'Sure:\n**"so."**') == [False, False]
    assert satisfied_of(asked, 'Sure:\nHere:\n"So."\nBye.\nBye.', loose=True) == [False, False]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "Do."}, r"expected the columns \('instruction_id_list', 'kwargs'\), .*got \['prompt'\]"),
        (row("punctuation:no_comma") | {"kwargs": []}, r"two lists of one length; got .*'kwargs': \[\]"),
        (row("punctuation:no_comma") | {"kwargs": {"num_words": [1]}}, "two lists of one length"),
    ],
)
def test_rows_without_constraints_are_refused(line, message):
    with pytest.raises(ValueError, match=message):
        listed_constraints(line)


def test_a_constraint_that_nobody_checks_has_no_right_answer():
    with pytest.raises(NoReferenceError, match="'language:response_language' is a constraint without a check"):
        listed_constraints(row("punctuation:no_comma", "language:response_language"))
