"""The form of an answer: what passes for one of the asked kind, whatever its content."""

import random

import pytest

from dataset_builders.instructions import SELF_POWERED_TASKS
from dataset_builders.nano.grammar import sample_sentence
from dataset_builders.nano.tasks import answers
from recipes.evaluation.following import load_checker
from recipes.evaluation.forms import is_correct

SPOKEN = "the farmer proudly repaired the old clock in the attic"
ANSWERS = {
    "continuation": [
        "Then he hung it on the wall.",
        "After that, the farmer climbed down the ladder and showed the clock to his wife.",
        "It has ticked ever since",
    ],
    "repetition": [
        "The old clock in the attic was proudly repaired by the farmer.",
        "Up in the attic, a farmer has repaired an ancient clock, and proudly so.",
        "A proud farmer fixed the clock that stood in the attic.",
    ],
    "keyword": [
        "Keywords: farmer, clock, attic.",
        "farmer, repaired, old clock",
        "The keywords are farmer, clock and attic.",
        "- farmer\n- old clock\n- attic",
        "1. farmer\n2. clock",
        '["farmer", "clock"]',
    ],
    "intent": ["The intent is repair.", "To tell somebody that a clock works again.", "repair"],
    "sentiment": ["The sentiment is positive.", "Positive", "I would say it is neutral.", "Not positive but negative."],
    "translation": [
        "El granjero reparó con orgullo el viejo reloj en el desván.",
        "Der Bauer reparierte stolz die alte Uhr auf dem Dachboden.",
        "农夫自豪地修好了阁楼里的旧钟。",
    ],
}


@pytest.mark.parametrize(
    ("task", "response"), [(task, response) for task in SELF_POWERED_TASKS for response in ANSWERS[task]]
)
def test_an_answer_of_the_asked_kind_passes_in_any_wording(task, response):
    assert is_correct(task, SPOKEN, response)


def test_the_right_answers_of_the_nano_language_have_their_form():
    draw = random.Random(0)
    for transcript in (str(sample_sentence(draw, "train")) for _ in range(30)):
        for task in (*SELF_POWERED_TASKS, "transcription"):
            assert is_correct(task, transcript, answers(task, transcript)[0])


@pytest.mark.parametrize("task", SELF_POWERED_TASKS)
@pytest.mark.parametrize("response", [SPOKEN, f"{SPOKEN.capitalize()}.", SPOKEN.upper(), SPOKEN.replace("old ", "")])
def test_the_transcript_is_no_answer_to_any_of_them(task, response):
    assert not is_correct(task, SPOKEN, response)


@pytest.mark.parametrize(
    ("task", "others"),
    [
        ("repetition", ["intent", "sentiment", "translation"]),
        ("keyword", ["continuation", "translation", "intent", "sentiment"]),
        ("sentiment", ["continuation", "repetition", "keyword", "intent", "translation"]),
        ("translation", ["repetition", "keyword"]),
        ("transcription", SELF_POWERED_TASKS),
    ],
)
def test_an_answer_to_something_else_fails_where_the_form_can_tell(task, others):
    for other in others:
        assert not is_correct(task, SPOKEN, ANSWERS[other][0]), other


@pytest.mark.parametrize(
    ("task", "response"),
    [
        ("continuation", f"{SPOKEN} and then he hung it on the wall of the kitchen downstairs."),  # says it again
        ("keyword", ", ".join(f"clock {number}" for number in range(16))),
        ("keyword", "dog, cat, mouse"),  # of something else
        ("keyword", "the farmer repaired a clock, attic"),
        ("intent", "word " * 31),
        ("sentiment", "It could be positive or negative."),
    ],
)
def test_an_answer_that_overdoes_it_fails(task, response):
    assert not is_correct(task, SPOKEN, response)


@pytest.mark.parametrize("task", [*SELF_POWERED_TASKS, "transcription"])
@pytest.mark.parametrize("response", ["", " \n"])
def test_no_answer_is_of_no_kind(task, response):
    assert not is_correct(task, SPOKEN, response)


def test_a_transcription_is_the_transcript_but_for_a_fifth_of_its_words():
    assert is_correct("transcription", SPOKEN, "The farmer proudly repaired the clock, in the attic!")
    assert not is_correct("transcription", SPOKEN, "the farmer sold the old clock")


@pytest.mark.parametrize("response", ["la la", "", SPOKEN])
def test_nothing_is_said_of_answers_to_a_task_without_a_known_form(response):
    assert is_correct("singing", SPOKEN, response) is None


def test_it_is_a_checker_that_training_can_name():
    assert load_checker("recipes.evaluation.forms") is is_correct
