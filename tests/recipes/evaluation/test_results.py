"""What is reported: figures side by side, how far apart systems are, and texts that no answer can break."""

import json
import re
from dataclasses import replace

import pytest
import yaml
from corpus_files import clip
from huggingface_hub import ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results

from dataset_builders.nano.tasks import answers
from recipes.evaluation import pages
from recipes.evaluation.pages import draw, examples, playable, write
from recipes.evaluation.questions import read_rows
from recipes.evaluation.results import SystemResult, agreement, collect, compare, figures_of, relative
from recipes.evaluation.rows import Answer
from recipes.evaluation.systems import SYSTEMS
from recipes.evaluation.tables import comparisons, details, markdown, model_index, show, summary
from recipes.evaluation.tasks import load_tasks, override
from recipes.reporting.markdown import to_markdown

TASKS = load_tasks()


@pytest.fixture(scope="module")
def rows(corpus_dir):
    """Rows by task, of eight clips of noise with sentences of the nano language."""
    tasks = {
        name: override(TASKS[name], {"corpus": str(corpus_dir), "split": "train"})
        for name in ("nano", "nano_intent", "nano_sentiment", "nano_asr")
    }
    return {name: read_rows(task) for name, task in tasks.items()}


def said(rows, speak, **more):
    """What `speak` says to every row."""
    return SystemResult(rows, rows, [Answer(row.id, speak(row), **{"seconds": 0.5, **more}) for row in rows])


def right(row):
    task = {"nano_intent": "intent", "nano_sentiment": "sentiment", "nano_asr": "transcription"}
    return answers(task.get(row.task, row.task), row.transcript)[0]


def parrot(row):
    return row.transcript


def found_of(rows, **speakers):
    """Everything found of tasks and systems, each system answering in a way of its own."""
    results = {(name, system): said(rows[name], speakers[system]) for name in rows for system in speakers}
    found = collect([TASKS[name] for name in rows], [SYSTEMS[name] for name in speakers], results)
    return found | {"checkpoints": {"model": "runs/mine/checkpoint"}}, results


def value(scored, name):
    return scored["figures"][name]["value"]


# Figures


def test_every_task_and_system_has_its_figures_side_by_side(rows):
    found, _ = found_of(rows, text_llm=right, model=parrot)
    assert list(found["tasks"]) == list(rows)
    assert found["systems"]["model"] == {"label": "the model", "hears": "audio"}
    nano = found["tasks"]["nano"]
    assert (nano["rows"], nano["utterances"], nano["kind"], nano["split"]) == (16, 8, "pool", "test")
    assert {name: value(system, "following") for name, system in nano["systems"].items()} == {
        "text_llm": 1.0,
        "model": 0.0,
    }
    assert value(found["tasks"]["nano_asr"]["systems"]["model"], "wer") == 0.0
    assert {"python", "torch", "transformers"} <= set(found["versions"])
    assert json.loads(json.dumps(found)) == found


def test_a_pool_has_the_figures_of_its_parts_too(rows):
    scored = figures_of(said(rows["nano"], parrot))
    assert set(scored["parts"]) == {row.task for row in rows["nano"]}
    assert sum(part["rows"] for part in scored["parts"].values()) == scored["rows"] == 16
    assert value(scored["parts"]["transcription"], "wer") == 0.0
    assert "parts" not in figures_of(said(rows["nano_asr"], parrot))


def test_answers_cut_short_and_seconds_of_audio_per_second_are_counted(rows):
    result = said(rows["nano_asr"], right)
    first, *others = result.answers
    scored = figures_of(replace(result, answers=[replace(first, finished=False), *others]))
    assert scored["truncated"]["value"] == 1 / 8
    seconds = sum(row.duration for row in rows["nano_asr"])
    assert scored["rtfx"]["value"] == pytest.approx(seconds / (8 * 0.5), abs=1e-6)


def test_what_took_no_time_has_no_speed(rows):
    """A cascade's transcriptions are those of its ASR."""
    assert "rtfx" not in figures_of(said(rows["nano_asr"], right, seconds=None))


def test_a_part_of_which_nobody_knows_what_is_right_has_figures_of_its_form_alone(corpus_dir):
    task = override(TASKS["nano"], {"corpus": str(corpus_dir), "split": "train", "oracle": ""})
    some = read_rows(task)
    scored = figures_of(said(some, parrot))
    assert value(scored, "transcript_copy") == 1.0
    told = {name for part in scored["parts"].values() for name in part["figures"]}
    assert told == {"form", "transcript_copy", "wer", "right"}
    assert compare({"model": said(some, parrot), "text_llm": said(some, parrot)}) == {}


# Against the text LLM, where nobody knows what is right


def test_agreement_compares_answers_with_those_of_the_text_llm_and_likelihoods_token_by_token(rows):
    some = rows["nano"]
    likely, less = {"log_likelihood": -2.0, "tokens": 4}, {"log_likelihood": -8.0, "tokens": 4}
    text_llm = said(some, right, **likely)
    of_itself, of_parrot = agreement(text_llm, text_llm), agreement(said(some, parrot, **less), text_llm)
    assert (of_itself["agreement"].value, of_itself["likelihood_lost"].value) == (100.0, 0.0)
    assert of_parrot["agreement"].value < 60
    assert of_parrot["likelihood_lost"].value == pytest.approx((8.0 - 2.0) / 4)  # nats per token
    assert of_parrot["likelihood_lost"].low <= 1.5 <= of_parrot["likelihood_lost"].high


def test_agreement_leaves_out_transcriptions_and_what_the_text_llm_did_not_answer(rows):
    some = rows["nano"]
    mute = {row.id for row in some if row.kind != "transcription"}
    text_llm = said(some, lambda row: "" if row.id in mute else right(row))
    assert agreement(said(some, parrot), text_llm) == {}
    assert agreement(said(some, parrot), None) == {}


def test_a_system_whose_likelihoods_are_unknown_has_an_agreement_all_the_same(rows):
    some = rows["nano"]
    text_llm = said(some, right, log_likelihood=-2.0, tokens=4)
    assert set(agreement(said(some, parrot), text_llm)) == {"agreement"}


# Fewer rows, fewer systems


def test_a_control_that_saw_fewer_rows_is_scored_on_those(rows):
    few = [row for row in rows["nano"] if row.utterance < 3]
    results = {("nano", "model"): said(rows["nano"], parrot), ("nano", "silence"): said(few, parrot)}
    found = collect([TASKS["nano"]], [SYSTEMS["model"], SYSTEMS["silence"]], results)
    nano = found["tasks"]["nano"]
    assert (nano["rows"], nano["utterances"]) == (16, 8)
    assert {name: system["rows"] for name, system in nano["systems"].items()} == {"model": 16, "silence": 6}
    header, lines = summary(found)
    absent = {row.task for row in rows["nano"]} - {row.task for row in few}
    assert absent  # parts that the control was not asked
    cells = {line[0]: dict(zip(header, line, strict=True)) for line in lines}
    parts = nano["systems"]["model"]["parts"]
    assert {part for part in parts if cells[f"nano: {part}"]["silence"] == "–"} == absent


def test_a_system_may_be_left_out_of_a_task(rows):
    """As a text LLM is where nobody knows what is said."""
    results = {("nano_asr", "model"): said(rows["nano_asr"], right)}
    results |= {("nano_intent", system): said(rows["nano_intent"], right) for system in ("model", "text_llm")}
    tasks, systems = [TASKS["nano_asr"], TASKS["nano_intent"]], [SYSTEMS["text_llm"], SYSTEMS["model"]]
    header, lines = summary(collect(tasks, systems, results))
    assert header == ["task", "figure", "text_llm", "model"]
    assert [line[:3] for line in lines] == [
        ["nano_asr", "wer ↓", "–"],
        ["nano_intent", "accuracy ↑", "100.0 % (100.0–100.0)"],
    ]


def test_a_task_that_nobody_could_be_asked_is_left_out(rows):
    results = {("nano_asr", "text_llm"): said(rows["nano_asr"], right)}
    found = collect([TASKS["nano_intent"], TASKS["nano_asr"]], [SYSTEMS["text_llm"]], results)
    assert list(found["tasks"]) == ["nano_asr"]


# How far apart


def test_a_relative_difference_is_of_means_over_groups():
    hits = [True, False, True, True, True, False]
    base = [True, True, True, True, False, False]
    groups = ["intent"] * 2 + ["keyword"] * 4
    # (1/2 + 3/4) / 2 against (1 + 1/2) / 2
    assert relative(hits, base, groups)["value"] == pytest.approx((0.625 - 0.75) / 0.75, abs=1e-6)


def test_rows_are_drawn_for_both_alike_so_a_loss_on_the_same_rows_shows():
    """30 of 60 right, and 6 of those lost: the chance of either share alone would hide it."""
    base = [True] * 30 + [False] * 30
    hits = [True] * 24 + [False] * 36
    change = relative(hits, base, ["intent"] * 60)
    assert change["value"] == -0.2
    assert change["low"] < -0.2 < change["high"] < 0
    assert change == relative(hits, base, ["intent"] * 60)


def test_what_is_lost_here_and_won_there_may_be_chance():
    base = [True] * 30 + [False] * 30
    change = relative([False] * 6 + [True] * 24 + [True] * 5 + [False] * 25, base, ["intent"] * 60)
    assert change["value"] == pytest.approx(-1 / 30, abs=1e-6)
    assert change["low"] < 0 < change["high"]


def test_the_same_answers_are_no_difference():
    hits = [True, False, True, True]
    assert relative(hits, hits, ["a", "a", "b", "b"]) == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_forgetting_is_of_speech_and_text_kept_is_of_reading_both_against_the_text_llm(rows):
    some = rows["nano"]
    half = {row.id for row in some if row.kind != "transcription" and row.utterance % 2}

    def halting(row):
        return right(row) if row.id not in half else "?"

    answered = {"text_llm": said(some, right), "model": said(some, halting), "model_reading": said(some, right)}
    change = compare(answered)
    assert set(change) == {"forgetting", "text_kept"}
    assert change["forgetting"]["value"] < 0
    assert change["text_kept"]["value"] == 0.0
    assert set(compare({"text_llm": said(some, right), "model": said(some, parrot)})) == {"forgetting"}


def test_transcriptions_are_not_what_is_forgotten(rows):
    some = rows["nano"]

    def deaf(row):
        return right(row) if row.kind != "transcription" else "?"

    assert compare({"text_llm": said(some, right), "model": said(some, deaf)})["forgetting"]["value"] == 0.0
    asr = rows["nano_asr"]
    assert compare({"text_llm": said(asr, right), "model": said(asr, right)}) == {}


@pytest.mark.parametrize("absent", ["text_llm", "model"])
def test_there_is_nothing_to_compare_without_both(rows, absent):
    answered = {name: said(rows["nano"], right) for name in ("text_llm", "model") if name != absent}
    assert compare(answered) == {}


def test_what_the_text_llm_never_could_is_not_forgotten(rows):
    answered = {"text_llm": said(rows["nano"], parrot), "model": said(rows["nano"], right)}
    assert compare(answered) == {}


# Tables


@pytest.mark.parametrize(
    ("name", "figure", "cell"),
    [
        ("wer", {"value": 0.0512, "low": 0.04, "high": 0.0651}, "5.1 % (4.0–6.5)"),
        ("right", {"value": 1.0, "low": 1.0, "high": 1.0}, "100.0 % (100.0–100.0)"),
        ("bleu", {"value": 31.26, "low": 30.0, "high": 32.0}, "31.3 (30.0–32.0)"),
        ("rtfx", {"value": 12.0, "low": 11.0, "high": 13.0}, "12.0 (11.0–13.0)"),
        ("wer", None, "–"),
    ],
)
def test_a_figure_stands_with_its_interval(name, figure, cell):
    assert show(name, figure) == cell


def test_the_summary_has_a_row_per_task_and_part_and_a_column_per_system(rows):
    found, _ = found_of({"nano": rows["nano"]}, text_llm=right, model=parrot)
    header, lines = summary(found)
    assert header == ["task", "figure", "text_llm", "model"]
    parts = sorted({row.task for row in rows["nano"]})
    assert [line[0] for line in lines] == ["nano", *(f"nano: {part}" for part in parts)]
    assert lines[0][1:] == ["following ↑", "100.0 % (100.0–100.0)", "0.0 % (0.0–0.0)"]
    assert dict((line[0], line[1]) for line in lines)["nano: transcription"] == "wer ↓"


def test_details_have_every_figure_of_every_system(rows):
    found, _ = found_of({"nano_intent": rows["nano_intent"]}, text_llm=right, model=parrot)
    header, lines = details(found["tasks"]["nano_intent"])
    assert header[:2] == ["system", "question"] and header[-2:] == ["truncated", "× real time"]
    assert {"accuracy", "macro_f1", "unparsed", "right", "transcript_copy", "agreement"} == set(header[2:-2])
    by_system = {line[0]: dict(zip(header, line, strict=True)) for line in lines}
    assert by_system["model"]["transcript_copy"].startswith("100.0 %")
    assert by_system["text_llm"]["right"].startswith("100.0 %")


def test_a_relative_change_stands_with_its_sign(rows):
    found, _ = found_of({"nano_intent": rows["nano_intent"]}, text_llm=right, model=parrot)
    assert comparisons(found)[1] == [["nano_intent", "-100.0 % (-100.0 to -100.0)", "–"]]


def tables(text):
    """The tables of a Markdown text, as lists of rows of cells."""
    found = re.findall(r"(?:^\|.*\|\n?)+", text, re.MULTILINE)
    return [[line.strip("|").split("|") for line in table.strip().splitlines()] for table in found]


def test_a_table_has_as_many_cells_in_every_row():
    (table,) = tables(to_markdown(["a", "b"], [["x|y", "1"], ["z", "2"]]))
    assert [len(row) for row in table] == [2, 2, 2, 2]


def test_results_as_markdown(rows):
    found, _ = found_of(rows, text_llm=right, model=parrot)
    text = markdown(found)
    assert text.startswith("# runs/mine/checkpoint\n")
    assert [line for line in text.splitlines() if line.startswith("## ")] == [f"## {name}" for name in rows]
    assert "Relative change" in text
    assert len(tables(text)) == 2 + len(rows)
    for table in tables(text):
        assert len({len(row) for row in table}) == 1


def test_answers_and_prompts_of_any_form_break_no_table(rows, tmp_path):
    wild = "| a | b |\n|---|---|\n\n# <b>No</b> heading\u2028"
    some = [replace(row, instruction=f"Choose.\nA. x|y\n\n# {n}") for n, row in enumerate(rows["nano_intent"])]
    found, results = found_of({"nano_intent": some}, model=lambda row: wild)
    write(tmp_path, found, results)
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line.startswith("#")] == ["# runs/mine/checkpoint", "## nano_intent"]
    for table in tables(text):
        assert len({len(row) for row in table}) == 1
    quoted = [line for line in text.splitlines() if line.startswith(">")]
    assert quoted[:4] == ["> Choose.", "> A. x|y", "> ", "> # 0"]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<b>No</b>" not in page and "&lt;b&gt;No&lt;/b&gt;" in page


# The model card


def test_the_model_index_is_read_by_the_hubs_own_library(rows):
    found, _ = found_of({"nano": rows["nano"], "nano_asr": rows["nano_asr"]}, text_llm=right, model=parrot)
    index = yaml.safe_load(model_index(found))
    name, listed = model_index_to_eval_results(index["model-index"])
    assert name == "checkpoint"
    assert ModelCardData(**index).model_name == "checkpoint"
    by_name = {result.metric_name: result for result in listed}
    assert len(by_name) == len(listed)
    assert by_name["nano: following"].metric_value == 0.0  # the parrot's, not the text LLM's
    assert by_name["nano, transcription: wer"].metric_value == 0.0
    copies = by_name["nano: transcript_copy"]
    assert (copies.metric_type, copies.metric_value) == ("transcript_copy", 1.0)
    assert copies.metric_args == {"low": 1.0, "high": 1.0}
    assert (copies.dataset_type, copies.dataset_split, copies.task_type) == ("nano", "test", "text-generation")
    assert by_name["nano_asr: wer"].task_type == "automatic-speech-recognition"


def test_two_tasks_of_one_corpus_can_be_told_apart_on_the_card(rows):
    """The Hub's library merges what is of one corpus, and keeps the first name."""
    some = {name: rows[name] for name in ("nano_intent", "nano_sentiment")}
    found, _ = found_of(some, model=right)
    _, listed = model_index_to_eval_results(yaml.safe_load(model_index(found))["model-index"])
    assert {"nano_intent: accuracy", "nano_sentiment: accuracy"} <= {result.metric_name for result in listed}


def test_without_the_model_there_is_nothing_for_its_card(rows):
    found, _ = found_of({"nano_asr": rows["nano_asr"]}, text_llm=right)
    assert model_index(found) == ""


# Files


def test_what_is_written(rows, tmp_path):
    found, results = found_of({"nano": rows["nano"]}, text_llm=right, model=parrot)
    write(tmp_path, found, results)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "model_index.yaml",
        "nano.png",
        "nano.svg",
        "report.html",
        "results.json",
        "results.md",
    ]
    assert json.loads((tmp_path / "results.json").read_text()) == found
    assert (tmp_path / "report.html").read_text().count("<audio") == len({row.task for row in rows["nano"]})


def test_bars_of_two_pools_do_not_stand_in_for_each_other(rows, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(pages.figures, "plot_bars", lambda scores, stem, order, *_: drawn.update({stem.name: order}))
    results = {(name, "model"): said(rows["nano"], right) for name in ("nano", "mine")}
    tasks = [TASKS["nano"], replace(TASKS["nano"], name="mine")]
    draw(collect(tasks, [SYSTEMS["model"]], results), tmp_path)
    assert len(drawn["nano"]) == len(drawn["mine"]) == 1 + len({row.task for row in rows["nano"]})
    assert {"all, following", "transcription, wer"} <= set(drawn["nano"])


def test_examples_are_one_of_every_question_with_all_answers_and_a_playable_clip(rows):
    some = rows["nano"]
    assert some[0].task != "transcription"
    listed = examples({"text_llm": said(some, right), "silence": said(some[:2], parrot)})
    assert len(listed) == len({row.task for row in some})
    assert all(item["audio"].startswith(b"RIFF") for item in listed)
    by_instruction = {item["instruction"]: item for item in listed}
    assert by_instruction[some[0].instruction]["answers"] == [
        ("text_llm", right(some[0]), True),
        ("silence", some[0].transcript, False),
    ]
    asked_of_silence = {row.instruction for row in some[:2]}
    assert all(len(item["answers"]) == 1 + (item["instruction"] in asked_of_silence) for item in listed)


def test_a_clip_of_any_rate_and_form_is_made_playable():
    wav = playable({"bytes": clip(1, rate=8000), "path": None})
    assert wav[:4] == b"RIFF" and int.from_bytes(wav[24:28], "little") == 16_000
