"""Scores that tell listening from copying, and controls that take the listening away."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset

from dataset_builders.asr_corpora import load_corpus
from dataset_builders.instructions import SELF_POWERED_TASKS, load_pool
from dataset_builders.nano_tasks import answers, is_correct
from processing_lsm import load_audio
from recipes import evaluate as recipe
from recipes.evaluate import (
    evaluate,
    held_out_rows,
    is_copy,
    load_checker,
    predictions,
    respond,
    score,
    shuffle_clips,
)

SPOKEN = "the farmer proudly repaired the old clock in the attic"
OTHER = "the nurse sold the red lamp yesterday"


def asked(*tasks, transcript=SPOKEN):
    return [{"id": f"u/{task}", "task": task, "instruction": "Do.", "transcript": transcript} for task in tasks]


@pytest.fixture
def held_out(corpus_dir):
    return held_out_rows(load_corpus(corpus_dir, "train"), SELF_POWERED_TASKS)


# Scores


def test_perfect_answers():
    rows = asked(*SELF_POWERED_TASKS, "transcription", "question_who")
    scores = score(rows, [answers(row["task"], SPOKEN)[0] for row in rows], is_correct)
    assert scores == {
        "tasks": dict.fromkeys(sorted(row["task"] for row in rows), 1.0),
        "following": 1.0,
        "transcript_copy": 0.0,
        "wer": 0.0,
    }


def test_a_parrot_transcribes_and_follows_nothing():
    """What training on transcriptions alone makes: WER 0, following 0, every answer a copy."""
    rows = asked(*SELF_POWERED_TASKS, "transcription")
    scores = score(rows, [SPOKEN.capitalize() + "."] * len(rows), is_correct)
    assert (scores["wer"], scores["following"], scores["transcript_copy"]) == (0.0, 0.0, 1.0)


def test_following_is_the_mean_of_tasks_not_of_rows():
    rows = asked("intent", "intent", "intent", "keyword", "transcription", "question_who")
    right = ["The intent is repair."] * 3 + ["The intent is repair.", "nonsense", "nonsense"]
    scores = score(rows, right, is_correct)
    assert scores["following"] == 0.5
    assert scores["tasks"] == {"intent": 1.0, "keyword": 0.0, "question_who": 0.0, "transcription": 0.0}


def test_wer_is_of_words_over_all_transcriptions_after_normalisation():
    rows = asked("transcription") + asked("transcription", transcript=OTHER)
    heard = ["The FARMER proudly repaired the old clock, in the attic!", "the nurse sold a red lamp"]
    assert score(rows, heard, is_correct)["wer"] == pytest.approx(2 / 17)


def test_a_figure_without_rows_is_left_out():
    assert set(score(asked("transcription"), [""], is_correct)) == {"tasks", "wer"}
    assert set(score(asked("intent"), [""], is_correct)) == {"tasks", "following", "transcript_copy"}
    assert score([], [], is_correct) == {"tasks": {}}


def test_answers_and_rows_must_be_equally_many():
    with pytest.raises(ValueError, match="zip"):
        score(asked("intent", "keyword"), ["The intent is repair."], is_correct)


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


def test_a_restatement_close_to_the_transcript_is_no_copy():
    rows = asked("repetition", "intent")
    assert score(rows, [SPOKEN, "The intent is repair."], is_correct)["transcript_copy"] == 0.0


def test_predictions_keep_what_a_reader_needs_to_judge():
    (record,) = predictions("mine", asked("intent"), ["The intent is repair."], is_correct)
    assert record == {**asked("intent")[0], "model": "mine", "response": "The intent is repair.", "correct": True}


# What is asked and heard


def test_every_clip_is_asked_a_task_and_its_transcription_in_unseen_wordings(held_out, corpus_dir):
    corpus, pool = load_corpus(corpus_dir, "train"), load_pool()
    assert len(held_out) == 2 * len(corpus)
    for row in held_out:
        assert row["instruction"] in pool[row["task"]].held_out
        assert row["audio"] == corpus[row["row"]]["audio"]


def test_shuffling_leaves_no_clip_at_home_and_all_else_as_it_was(held_out):
    for rows in (held_out, held_out[:6], held_out[:4]):  # an even, an odd and the least number of clips
        shuffled = shuffle_clips(rows)
        for row, other in zip(rows, shuffled, strict=True):
            assert other["audio"]["bytes"] != row["audio"]["bytes"]
            assert {**other, "audio": None} == {**row, "audio": None}
        clips = [{row["audio"]["bytes"] for row in some} for some in (rows, shuffled)]
        assert clips[0] == clips[1]


def test_one_clip_cannot_be_shuffled(held_out):
    with pytest.raises(ValueError, match="at least two"):
        shuffle_clips(held_out[:2])


def inputs_of(lsm, processor, rows, monkeypatch, **options):
    """What the model is given for `rows`, in order."""
    seen = []

    def generate(**inputs):
        seen.append(inputs)
        return torch.cat([inputs["input_ids"], inputs["input_ids"][:, :1]], dim=1)

    monkeypatch.setattr(lsm, "generate", generate)
    evaluate(lsm, processor, rows, is_correct, batch_size=1, progress=False, **options)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["transcript"]))
    return [seen[order.index(index)] for index in range(len(rows))]


def test_the_transcript_is_heard_by_the_text_llm(lsm, processor, held_out, monkeypatch):
    for row, inputs in zip(held_out, inputs_of(lsm, processor, held_out, monkeypatch, hear="transcript"), strict=True):
        assert "input_features" not in inputs
        assert row["transcript"] in processor.tokenizer.decode(inputs["input_ids"][0])


def test_audio_shuffled_and_silence_differ_in_the_clip_alone(lsm, processor, held_out, monkeypatch):
    heard = {
        hear: inputs_of(lsm, processor, held_out[:6], monkeypatch, hear=hear)
        for hear in ("audio", "shuffled", "silence")
    }
    for index, row in enumerate(held_out[:6]):
        audio, shuffled, silence = (heard[hear][index]["input_features"] for hear in ("audio", "shuffled", "silence"))
        own = torch.from_numpy(processor.audio_features([load_audio(row["audio"])])["input_features"])
        assert torch.equal(audio, own)
        assert shuffled.shape != own.shape or not torch.equal(shuffled, own)
        nothing = processor.audio_features([np.zeros_like(load_audio(row["audio"]))])["input_features"]
        assert torch.equal(silence, torch.from_numpy(nothing))
        text = processor.tokenizer.decode(heard["audio"][index]["input_ids"][0])
        assert row["transcript"] not in text
        assert row["instruction"] in text


def test_answers_are_in_order_whatever_the_batches(lsm, processor, held_out):
    together = respond(lsm, processor, held_out, batch_size=5, max_new_tokens=3, progress=False)
    alone = [respond(lsm, processor, [row], max_new_tokens=3, progress=False)[0] for row in held_out]
    assert together == alone
    assert len(set(together)) > 1


@pytest.mark.parametrize("hear", ["music", ""])
def test_something_else_cannot_be_heard(lsm, processor, hear):
    with pytest.raises(ValueError, match=r"expected one of .*'silence'"):
        evaluate(lsm, processor, [], is_correct, hear=hear)


def test_a_checker_is_named_by_its_module():
    assert load_checker("dataset_builders.nano_tasks") is is_correct
    with pytest.raises(ValueError, match="json has no is_correct"):
        load_checker("json")


def test_the_command_line(lsm_dir, corpus_dir, tmp_path, monkeypatch):
    paths = ["--model", str(lsm_dir), "--corpus", str(corpus_dir), "--output", str(tmp_path / "out")]
    options = ["--split", "train", "--limit", "2", "--max-new-tokens", "2", "--tasks", "intent", "--hear", "shuffled"]
    monkeypatch.setattr("sys.argv", ["evaluate", *paths, *options])
    recipe.main()
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert set(scores["tasks"]) == {"intent", "transcription"}
    records = Dataset.from_parquet(str(tmp_path / "out" / "predictions.parquet"))
    assert records["task"][:] == ["intent", "transcription"] * 2
