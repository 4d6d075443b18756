"""Right and wrong answers about sentences of the nano language."""

import itertools
import random

import pytest

from dataset_builders.corpora.transcripts import bare_words
from dataset_builders.instructions import SELF_POWERED_TASKS
from dataset_builders.nano.grammar import SPLITS, sample_sentence
from dataset_builders.nano.tasks import UNSEEN_TASKS, answers, is_correct

TASKS = [*SELF_POWERED_TASKS, "transcription", "reply", *UNSEEN_TASKS]
SPOKEN = "the farmer proudly repaired the old clock in the attic"


@pytest.fixture(scope="module")
def transcripts():
    rng = random.Random(0)
    return [str(sample_sentence(rng, rng.choice(SPLITS))) for _ in range(300)]


def test_every_task_by_example():
    """In Spanish, adjectives have the gender of their noun, and no part of the sentence is lost."""
    assert {task: answers(task, SPOKEN)[0] for task in TASKS} == {
        "continuation": "Then the farmer tested the clock.",
        "repetition": "The old clock was proudly repaired by the farmer in the attic.",
        "keyword": "Keywords: farmer, clock, attic.",
        "intent": "The intent is repair.",
        "sentiment": "The sentiment is positive.",
        "translation": "El granjero reparó orgullosamente el reloj viejo en el ático.",
        "transcription": SPOKEN,
        "reply": "So the old clock was proudly repaired by the farmer in the attic.",
        "question_who": "The farmer.",
        "question_what": "The clock.",
        "question_circumstance": "In the attic.",
        "question_deed": "Repaired the clock.",
        "spanish_who": "El granjero.",
        "numbered": "1. farmer, 2. clock, 3. attic.",
    }


@pytest.mark.parametrize(
    ("transcript", "spanish"),
    [
        ("the nurse sold the red lamp yesterday", "La enfermera vendió la lámpara roja ayer."),
        ("the nurse sold the red mirror yesterday", "La enfermera vendió el espejo rojo ayer."),
        ("the king sadly lost the golden key in winter", "El rey perdió tristemente la llave dorada en invierno."),
        ("the queen baked the big cake tonight", "La reina horneó el pastel grande esta noche."),
        ("the tourist found the map on monday", "El turista encontró el mapa el lunes."),
    ],
)
def test_spanish_agrees_in_gender(transcript, spanish):
    assert answers("translation", transcript) == [spanish]


def test_the_other_gender_is_wrong():
    assert is_correct("translation", "the nurse sold the red lamp today", "La enfermera vendió la lámpara roja hoy.")
    assert not is_correct(
        "translation", "the nurse sold the red lamp today", "La enfermera vendió la lámpara rojo hoy."
    )
    assert not is_correct(
        "translation", "the nurse sold the red lamp today", "El enfermera vendió la lámpara roja hoy."
    )


def test_an_accent_is_content():
    assert bare_words("¡El ático!") == "el ático"
    assert not is_correct("translation", "the king sold the lamp today", "El rey vendio la lampara hoy.")


def test_a_restatement_keeps_everything_and_may_begin_with_the_circumstance():
    accepted = answers("repetition", SPOKEN)
    assert accepted[1] == "In the attic the old clock was proudly repaired by the farmer."
    assert not is_correct("repetition", SPOKEN, "The clock was proudly repaired by the farmer in the attic.")
    assert answers("repetition", "the thief chose the sofa today") == [
        "The sofa was chosen by the thief today.",
        "Today the sofa was chosen by the thief.",
    ]


def test_keywords_may_come_in_any_order_but_all_of_them():
    assert is_correct("keyword", SPOKEN, "Keywords: attic, farmer, clock.")
    assert not is_correct("keyword", SPOKEN, "Keywords: attic, farmer.")
    assert not is_correct("keyword", SPOKEN, "Keywords: attic, attic, farmer.")


def test_a_numbered_list_may_come_in_any_order_but_counts_from_one_to_three():
    assert is_correct("numbered", SPOKEN, "1. attic, 2. farmer, 3. clock.")
    assert not is_correct("numbered", SPOKEN, "farmer, clock, attic.")
    assert not is_correct("numbered", SPOKEN, "1. attic, 3. farmer, 2. clock.")


def test_the_person_in_spanish_has_the_article_of_its_gender():
    assert answers("spanish_who", "the nurse sold the red lamp yesterday") == ["La enfermera."]
    assert not is_correct("spanish_who", "the nurse sold the red lamp yesterday", "El enfermera.")


def test_a_reply_is_a_restatement_that_begins_with_so():
    replies = answers("reply", SPOKEN)
    assert [reply.removeprefix("So ").capitalize() for reply in replies] == answers("repetition", SPOKEN)


def test_no_adverb_is_neutral():
    assert answers("sentiment", "the farmer repaired the clock today") == ["The sentiment is neutral."]


@pytest.mark.parametrize("task", TASKS)
def test_right_answers_are_right_whatever_their_case_and_punctuation(task, transcripts):
    for transcript in transcripts:
        for answer in answers(task, transcript):
            assert is_correct(task, transcript, answer)
        canonical = answers(task, transcript)[0]
        assert is_correct(task, transcript, canonical.upper())
        assert is_correct(task, transcript, f"  {canonical.rstrip('.').lower()} !\n")


@pytest.mark.parametrize("task", TASKS)
def test_the_transcript_answers_transcription_alone(task, transcripts):
    for transcript in transcripts:
        assert is_correct(task, transcript, transcript) == (task == "transcription")


@pytest.mark.parametrize("task", TASKS)
def test_another_tasks_answer_is_wrong(task, transcripts):
    for transcript in transcripts:
        for other in TASKS:
            if other != task:
                assert not any(is_correct(task, transcript, answer) for answer in answers(other, transcript)), other


@pytest.mark.parametrize("task", TASKS)
def test_another_sentences_answer_is_wrong(task, transcripts):
    """Some answers are right for both sentences, such as the same intent, but most pairs can be checked."""
    checked = 0
    for transcript, other in itertools.pairwise(transcripts):
        foreign = set(answers(task, other)) - set(answers(task, transcript))
        assert not any(is_correct(task, transcript, answer) for answer in foreign)
        checked += bool(foreign)
    assert checked > 100


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("response", ["", " ", ".", "Yes.", "The intent is repair. The sentiment is positive."])
def test_empty_and_chatty_answers_are_wrong(task, response):
    assert not is_correct(task, SPOKEN, response)


def test_an_unknown_task_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'singing'.*'continuation'"):
        answers("singing", SPOKEN)


@pytest.mark.parametrize("task", TASKS)
def test_a_transcript_of_another_language_is_refused(task):
    with pytest.raises(ValueError, match="not a sentence of the nano language"):
        is_correct(task, "ask not what your country can do for you", "The intent is repair.")
