"""Kinds of question: the nano language's own right answers, a parrot, and answers that nobody can read."""

from dataclasses import replace

import pytest
import yaml

from dataset_builders.nano.tasks import UNSEEN_TASKS, answers
from recipes.evaluation.following import is_copy
from recipes.evaluation.forms import is_correct as has_its_form
from recipes.evaluation.kinds import KINDS, Kind, allowed_answers, is_right
from recipes.evaluation.metrics import FIGURES, mean
from recipes.evaluation.questions import read_rows
from recipes.evaluation.results import SystemResult, figures_of, score_kind, score_pool
from recipes.evaluation.rows import Answer, Question
from recipes.evaluation.tables import main_figure, show
from recipes.evaluation.tasks import load_tasks, override

TASKS = load_tasks()
SPOKEN = "the farmer proudly repaired the old clock in the attic"
NANO = [name for name in TASKS if name.startswith("nano_") and TASKS[name].task]


def row(kind, references=(), labels=(), answer="{}", **more):
    asked = {"id": "u0", "utterance": 0, "audio": {}, "duration": 1.0, "source": "here", "instruction": "Do."}
    asked |= {"transcript": SPOKEN, "task": kind, "kind": kind, "references": references, "labels": labels}
    return Question(**asked | {"answer": answer} | more)


def answered(rows, responses, constrained=None):
    """Answers of a system that was given the rows as they are."""
    chosen = constrained or [None] * len(rows)
    said = [Answer(row.id, *texts) for row, *texts in zip(rows, responses, chosen, strict=True)]
    return SystemResult(rows, rows, said)


YES_NO = row("yes_no", ["yes"])
CHOICE = row("choice", ["B"], ["a clock", "a lamp", "a door"], "({})")
INTENT = row("classification", ["repair"], ["repair", "cook", "love"], "The intent is {}.")


@pytest.fixture
def read(corpus_dir):
    """`read(task)`: its rows about eight clips of noise with sentences of the nano language."""
    folder = {"corpus": str(corpus_dir), "split": "train"}
    return lambda name, seed=0, **more: read_rows(override(TASKS[name], {**folder, **more}), seed=seed)


@pytest.fixture
def pool(read):
    """Rows of all seven tasks of the pool."""
    return [row for seed in range(4) for row in read("nano", seed)]


def right_answer(row, task=None):
    return answers(task or row.task, row.transcript)[0]


def values(scored):
    return {name: metric.value for name, metric in scored.items()}


def said_by(question, response):
    return KINDS[question.kind].read(question, response)


# What an answer says


@pytest.mark.parametrize(
    ("asked", "response", "label"),
    [
        (YES_NO, "Yes, it does.", "yes"),
        (YES_NO, "That is not true.", "no"),
        (YES_NO, "It depends.", None),
        (CHOICE, "(B)", "B"),
        (CHOICE, "The speaker talks about a lamp.", "B"),
        (CHOICE, "A or B", None),
        (INTENT, "The intent is repair.", "repair"),
        (INTENT, "REPAIR", "repair"),
        (INTENT, "It may be repair or love.", None),
        (INTENT, "to sing", None),
    ],
)
def test_a_free_answer_to_a_closed_question_is_read_for_its_label(asked, response, label):
    assert said_by(asked, response) == label
    assert is_right(asked, response) == (label in asked.references)


def test_a_closed_question_has_answers_that_alone_are_allowed():
    assert allowed_answers(YES_NO) == ["yes", "no"]
    assert allowed_answers(row("yes_no", ["no"], answer="Answer: {}")) == ["Answer: yes", "Answer: no"]
    assert allowed_answers(CHOICE) == ["(A)", "(B)", "(C)"]
    assert allowed_answers(INTENT) == ["The intent is repair.", "The intent is cook.", "The intent is love."]


def test_every_allowed_answer_can_be_read_back():
    for asked in (YES_NO, CHOICE, INTENT):
        said = [said_by(asked, choice) for choice in allowed_answers(asked)]
        assert None not in said and len(set(said)) == len(said)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"yes_no", "choice", "classification", "short_answer"}))
def test_an_open_question_allows_any_answer(kind):
    assert allowed_answers(row(kind, ["clock"])) is None


# Which answer is right


@pytest.mark.parametrize(
    ("asked", "right", "wrong"),
    [
        (row("transcription", [SPOKEN]), "The farmer proudly repaired the OLD clock, in the attic!", "the old clock"),
        (row("transcription", ["it's colour"]), "It is color.", "it is"),  # as Whisper's normaliser has it
        (row("translation", ["El granjero cantó."]), "el granjero cantó", "el granjero canto"),
        (row("keywords", ["farmer", "clock", "attic"]), "Attic, farmer and clock.", "farmer, clock"),
        (row("keywords", ["farmer", "clock"]), "Keywords: clock, farmer.", SPOKEN),
        (row("extraction", ["the old clock", "clock"]), "Clock.", "the attic"),
        (row("oracle", ["The clock.", "The old clock."]), "the old clock", "clock"),
        (row("constraints", constraint="upper_case"), "A CLOCK IS REPAIRED.", SPOKEN),
        (row("constraints", constraint="at_most_words"), "a clock", ""),
        (row("short_answer", ["yes"]), "Yes, you do.", "You return, or you do not."),
        (row("short_answer", ["invalid"]), "The argument is not valid.", "The argument is deductively valid."),
        (row("short_answer", ["B"]), "The right order is (B).", "A or B"),
        (row("short_answer", ["18"]), "You have eighteen fruits.", "You have 18 fruits and 3 pears."),
        (row("ifeval", ['{"id": "punctuation:no_comma"}']), "a clock", "a clock, here"),
        (row("refusal"), "I'm sorry, but no.", "Of course: first, you"),
        (row("verdict"), "Yes", "No."),
    ],
)
def test_one_answer_is_right_or_wrong_as_its_kind_has_it(asked, right, wrong):
    assert is_right(asked, right) is True
    assert is_right(asked, wrong) is False


def test_where_an_oracle_knows_all_right_answers_nothing_else_is_right():
    """Figures read `Repair!` for the label it names; to follow is to answer as it was taught."""
    asked = replace(INTENT, right=["The intent is repair."])
    assert is_right(asked, "the intent is repair")
    assert not is_right(asked, "Repair!")
    scored = values(score_kind(answered([asked] * 2, ["the intent is repair", "Repair!"])))
    assert (scored["accuracy"], scored["right"]) == (1.0, 0.5)


@pytest.mark.parametrize("kind", sorted(kind for kind in KINDS if kind != "constraints" and not KINDS[kind].known))
def test_where_nobody_knows_what_is_right_no_answer_is_right_or_wrong(kind):
    """A pool without an oracle asks for an intent, too, and has no labels for it."""
    assert is_right(row(kind), "The intent is repair.") is None


# Figures by kind


@pytest.mark.parametrize("name", NANO)
def test_right_answers_get_all_and_the_transcript_gets_nothing(read, name):
    rows = read(name)
    task = TASKS[name].task
    best = values(score_kind(answered(rows, [right_answer(row, task) for row in rows])))
    parrot = values(score_kind(answered(rows, [row.transcript for row in rows])))
    main = main_figure(best)
    if task == "transcription":
        assert best == parrot == {"wer": 0.0, "right": 1.0}
    else:
        assert best[main] == pytest.approx(100 if main == "bleu" else 1)
        assert parrot[main] < best[main] / 5
        assert (best["right"], parrot["right"]) == (1.0, 0.0)
        assert (best["transcript_copy"], parrot["transcript_copy"]) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("asked", "figures"),
    [
        (row("transcription", [SPOKEN]), {"wer", "right"}),
        (row("transcription", ["你好"], language="zh"), {"cer", "right"}),
        (
            row("translation", ["El granjero cantó."], target_language="es"),
            {"bleu", "chrf", "right", "transcript_copy"},
        ),
        (YES_NO, {"accuracy", "macro_f1", "unparsed", "right", "transcript_copy"}),
        (CHOICE, {"accuracy", "macro_f1", "unparsed", "right", "transcript_copy"}),
        (INTENT, {"accuracy", "macro_f1", "unparsed", "right", "transcript_copy"}),
        (row("keywords", ["clock"]), {"f1", "right", "transcript_copy"}),
        (row("extraction", ["clock"]), {"exact_match", "f1", "right", "transcript_copy"}),
        (row("constraints", constraint="upper_case"), {"following", "right", "transcript_copy"}),
        (row("short_answer", ["18"]), {"accuracy", "macro_f1", "unparsed", "right", "transcript_copy"}),
        (
            row("ifeval", ['{"id": "punctuation:no_comma"}']),
            {"ifeval", "following", "following_loose", "right", "transcript_copy"},
        ),
        (row("speech_ifeval", ['{"id": "startend:quotation"}']), {"following", "right", "transcript_copy"}),
        (row("refusal"), {"refusals", "right", "transcript_copy"}),
        (row("oracle", ["The clock."]), {"right", "transcript_copy"}),
        (row("oracle", ["The clock."], task="repetition"), {"right"}),  # where much may be as it was said
    ],
)
def test_a_kind_has_its_figures_and_one_that_stands_for_it(asked, figures):
    scored = score_kind(answered([asked, asked], ["said", "said"]))
    assert set(scored) == figures
    assert figures <= set(FIGURES) and main_figure(scored)
    assert all(metric.low <= metric.value <= metric.high for metric in scored.values())


def test_answers_that_say_nothing_are_counted_as_wrong_and_as_unread():
    rows = [INTENT] * 4
    scored = values(score_kind(answered(rows, ["repair", "cook", "It may be repair or love.", ""])))
    assert scored["accuracy"] == 0.25
    assert scored["unparsed"] == 0.5
    assert FIGURES["unparsed"].lower_is_better


def test_accuracy_among_the_allowed_answers_is_a_figure_of_its_own():
    rows, free = [INTENT] * 4, [""] * 4
    said = ["The intent is repair."] * 3 + ["The intent is love."]
    scored = values(score_kind(answered(rows, free, said)))
    assert (scored["accuracy"], scored["accuracy_constrained"]) == (0.0, 0.75)
    assert "accuracy_constrained" not in score_kind(answered(rows, free))
    letters = values(score_kind(answered([CHOICE] * 2, ["", ""], ["(B)", "(C)"])))
    assert letters["accuracy_constrained"] == 0.5


def test_the_figure_of_ifeval_is_the_mean_of_its_four_accuracies():
    """Strict: one of two answers, two of three constraints; loose, without its first line: all."""
    no_comma, lower = '{"id": "punctuation:no_comma"}', '{"id": "change_case:english_lowercase"}'
    rows = [row("ifeval", [no_comma, lower]), row("ifeval", [no_comma])]
    scored = values(score_kind(answered(rows, ["Sure:\na clock", "A clock."])))
    assert scored["ifeval"] == pytest.approx((1 / 2 + 2 / 3 + 1 + 1) / 4)
    assert (scored["following"], scored["following_loose"], scored["right"]) == (0.5, 1.0, 0.5)
    assert main_figure(scored) == "ifeval"


def judged(kind, *replies):
    rows = [row(kind) for _ in replies]
    return SystemResult(rows, rows, [Answer("u0", "Yes. 5.", judgement=reply) for reply in replies])


def test_replies_of_a_judge_that_cannot_be_read_are_a_column_and_no_guess():
    assert values(score_kind(judged("rating", "5", "Score: 2/5", "3 or 4", ""))) == {
        "rating": 3.5,
        "unparsed": 0.5,
        "transcript_copy": 0.0,
    }
    scored = values(score_kind(judged("verdict", "Yes", "No", "No.", "Both.")))
    assert scored["accuracy"] == scored["right"] == pytest.approx(1 / 3)
    assert scored["unparsed"] == 0.25
    for kind in ("rating", "verdict"):
        assert values(score_kind(judged(kind, "Well.", ""))) == {"unparsed": 1.0, "transcript_copy": 0.0}
    assert main_figure({"unparsed", "agreement", "transcript_copy"}) is None


def test_copies_are_of_what_is_said_not_of_what_is_right():
    rows = [row("oracle", ["The clock."]), row("oracle", ["The clock."], transcript="the clock")]
    assert values(score_kind(answered(rows, [SPOKEN, SPOKEN])))["transcript_copy"] == 0.5


def test_a_new_kind_is_one_entry(monkeypatch, tmp_path, corpus_dir):
    """Asked for in a file of tasks, refused without what it needs, read, scored, and shown."""
    counted = Kind(
        figures=lambda questions, responses: {"f1": mean([response.isdigit() for response in responses])},
        is_right=lambda question, response: response == question.references[0],
        spell=lambda texts, choices: [str(len(text.split())) for text in texts],
        needs={"a `reference`": ("reference",)},
    )
    monkeypatch.setitem(KINDS, "count", counted)
    block = {"group": "qa", "kind": "count", "description": "Count.", "prompt": "How many words?"}
    block |= {"data": {"corpus": str(corpus_dir), "split": "train"}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"tasks": {"mine": block}}))
    with pytest.raises(ValueError, match="task 'mine': kind 'count' needs a `reference`"):
        load_tasks(tmp_path / "mine.yaml")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"tasks": {"mine": block | {"reference": "transcript"}}}))
    rows = read_rows(load_tasks(tmp_path / "mine.yaml")["mine"])
    said = [str(len(row.transcript.split())) for row in rows]
    scored = figures_of(answered(rows, said))["figures"]
    assert {name: figure["value"] for name, figure in scored.items()} == {
        "f1": 1.0,
        "right": 1.0,
        "transcript_copy": 0.0,
    }
    assert (main_figure(scored), show("f1", scored["f1"])) == ("f1", "100.0 % (100.0–100.0)")


# Figures of the pool


def test_perfect_answers_to_the_pool(pool):
    responses = [right_answer(row) for row in pool]
    assert len({row.task for row in pool}) == 7
    assert values(score_pool(answered(pool, responses))) == {"following": 1.0, "transcript_copy": 0.0}


def test_a_parrot_follows_nothing_and_copies_everything(pool):
    """What training on transcriptions alone makes, and neither figure counts the transcriptions that it gets right."""
    responses = [f"{row.transcript.capitalize()}." for row in pool]
    assert all(is_copy(row.transcript, response) for row, response in zip(pool, responses, strict=True))
    assert values(score_pool(answered(pool, responses))) == {"following": 0.0, "transcript_copy": 1.0}


def test_following_is_the_mean_of_tasks_not_of_rows():
    rows = [replace(INTENT, task="intent")] * 3 + [row("keywords", ["clock"], task="keyword")]
    assert values(score_pool(answered(rows, ["repair"] * 3 + ["lamp"])))["following"] == 0.5


def test_a_restatement_close_to_the_transcript_is_no_copy():
    rows = [row("oracle", ["The clock."], task="repetition"), replace(INTENT, task="intent")]
    assert values(score_pool(answered(rows, [SPOKEN, "repair"])))["transcript_copy"] == 0.0


def test_what_is_no_self_powered_task_is_right_or_wrong_and_no_following(read):
    rows = read("nano_unseen")
    assert {row.task for row in rows} <= set(UNSEEN_TASKS)
    assert values(score_pool(answered(rows, [right_answer(row) for row in rows]))) == {
        "right": 1.0,
        "transcript_copy": 0.0,
    }


def test_a_pool_without_an_oracle_still_shows_copies(read):
    rows = read("nano", oracle="")
    responses = [row.transcript for row in rows]
    assert values(score_pool(answered(rows, responses))) == {"form": 0.0, "transcript_copy": 1.0}
    assert not any(has_its_form(row.task, row.transcript, row.transcript) for row in rows[::2])


def test_a_pool_of_transcriptions_alone_has_no_figure_of_following():
    assert score_pool(answered([row("transcription", [SPOKEN])], [SPOKEN])) == {}
