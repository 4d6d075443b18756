"""Scores that tell doing what is asked from transcribing whatever is asked."""

import pytest

from dataset_builders.corpora.opening import load_corpus
from dataset_builders.instructions import SELF_POWERED_TASKS, load_pool
from dataset_builders.nano.tasks import POOL_PATH, answers, is_correct
from recipes.evaluation.following import BY_FORM, held_out_rows, is_copy, load_checker, score_following
from recipes.evaluation.metrics import error_rate

SPOKEN = "the farmer proudly repaired the old clock in the attic"
OTHER = "the nurse sold the red lamp yesterday"


def asked(*tasks, transcript=SPOKEN):
    return [{"id": f"u/{task}", "task": task, "instruction": "Do.", "transcript": transcript} for task in tasks]


# Scores


def test_perfect_answers():
    rows = asked(*SELF_POWERED_TASKS, "transcription", "question_who")
    scores = score_following(rows, [answers(row["task"], SPOKEN)[0] for row in rows], is_correct)
    assert scores == {
        "tasks": dict.fromkeys(sorted(row["task"] for row in rows), 1.0),
        "following": 1.0,
        "transcript_copy": 0.0,
        "wer": 0.0,
    }


def test_a_parrot_transcribes_and_follows_nothing():
    """What training on transcriptions alone makes: WER 0, following 0, every answer a copy."""
    rows = asked(*SELF_POWERED_TASKS, "transcription")
    scores = score_following(rows, [SPOKEN.capitalize() + "."] * len(rows), is_correct)
    assert (scores["wer"], scores["following"], scores["transcript_copy"]) == (0.0, 0.0, 1.0)


def test_following_is_the_mean_of_tasks_not_of_rows():
    rows = asked("intent", "intent", "intent", "keyword", "transcription", "question_who")
    right = ["The intent is repair."] * 3 + ["The intent is repair.", "nonsense", "nonsense"]
    scores = score_following(rows, right, is_correct)
    assert scores["following"] == 0.5
    assert scores["tasks"] == {"intent": 1.0, "keyword": 0.0, "question_who": 0.0, "transcription": 0.0}


def test_wer_is_of_words_over_all_transcriptions_after_normalisation():
    rows = asked("transcription") + asked("transcription", transcript=OTHER)
    heard = ["The FARMER proudly repaired the old clock, in the attic!", "the nurse sold a red lamp"]
    assert score_following(rows, heard, is_correct)["wer"] == pytest.approx(2 / 17)


def test_a_figure_without_rows_is_left_out():
    assert set(score_following(asked("transcription"), [""], is_correct)) == {"tasks", "wer"}
    assert set(score_following(asked("intent"), [""], is_correct)) == {"tasks", "following", "transcript_copy"}
    assert score_following([], [], is_correct) == {"tasks": {}}


def test_answers_and_rows_must_be_equally_many():
    with pytest.raises(ValueError, match="zip"):
        score_following(asked("intent", "keyword"), ["The intent is repair."], is_correct)


@pytest.mark.parametrize(
    ("response", "copy"),
    [
        (SPOKEN, True),
        (SPOKEN.upper() + "!", True),
        (SPOKEN.replace("old ", ""), True),  # one word of ten
        (SPOKEN.replace("old ", "").replace("proudly ", ""), False),
        ("The old clock was proudly repaired by the farmer in the attic.", False),
        ("The intent is repair.", False),
        ("", False),
    ],
)
def test_a_copy_is_within_a_fifth_of_the_words(response, copy):
    assert is_copy(SPOKEN, response) == copy


@pytest.mark.parametrize("response", ["", "anything at all"])
def test_nothing_is_a_copy_of_a_transcript_that_nobody_knows(response):
    assert not is_copy("", response)


def test_a_restatement_close_to_the_transcript_is_no_copy():
    rows = asked("repetition", "intent")
    assert score_following(rows, [SPOKEN, "The intent is repair."], is_correct)["transcript_copy"] == 0.0


# What is asked, and by what it is checked


def test_every_clip_is_asked_a_task_and_its_transcription_in_unseen_wordings(corpus_dir):
    corpus, pool = load_corpus(corpus_dir, "train"), load_pool()
    rows = held_out_rows(corpus, SELF_POWERED_TASKS)
    assert len(rows) == 2 * len(corpus)
    for row in rows:
        assert row["instruction"] in pool[row["task"]].held_out
        assert row["audio"] == corpus[row["row"]]["audio"]


def test_tasks_of_which_the_checker_knows_nothing_do_not_count():
    rows = asked("summary", "intent")
    found = score_following(rows, ["A man repaired something.", "The intent is repair."], load_checker(BY_FORM))
    assert found == {"tasks": {"intent": 1.0}, "following": 1.0, "transcript_copy": 0.0}


def test_clips_are_asked_in_the_wordings_of_the_pool_that_is_given(corpus_dir):
    corpus = load_corpus(corpus_dir, "train")
    nano = load_pool(POOL_PATH)
    rows = held_out_rows(corpus, SELF_POWERED_TASKS, pool=nano)
    assert all(row["instruction"] in nano[row["task"]].held_out for row in rows)
    assert [row["id"] for row in rows] == [row["id"] for row in held_out_rows(corpus, SELF_POWERED_TASKS)]
    with pytest.raises(ValueError, match="unknown task 'question_who'"):
        held_out_rows(corpus, ["question_who"])


def test_a_checker_is_named_by_its_module():
    assert load_checker("dataset_builders.nano.tasks") is is_correct
    with pytest.raises(ValueError, match="json has no is_correct"):
        load_checker("json")


def test_the_word_error_rate_is_the_one_of_all_tables():
    said, heard = "Mr. Smith's colour is twenty one", "mister smith's color is 21"
    row = {"task": "transcription", "transcript": said}
    found = score_following([row], [heard], lambda *_: True)["wer"]
    assert found == error_rate([said], [heard])[1].value == 0
    assert is_copy(said, heard)
