"""The training rows: mixed as requested, self-powered or refused, and never silently dropped."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
from datasets import Dataset

from dataset_builders.publishing import load_self_powered
from recipes.listening.collator import SpeechResponseCollator
from recipes.training.arguments import LsmScriptArguments
from recipes.training.costs import Costs
from recipes.training.rows import (
    RowSizes,
    check_columns,
    check_rows,
    count_tasks,
    load_rows,
    mix,
    refuse_foreign,
    stream_rows,
    with_text_rows,
)

TASKS = ["intent"] * 4 + ["keyword"] * 6 + ["transcription"] * 10
SET = Dataset.from_dict({"id": [f"u{i}" for i in range(20)], "task": TASKS})


def arguments(folder, **options):
    return LsmScriptArguments(dataset_name=str(folder), **options)


# The mix


@pytest.mark.parametrize(
    ("tasks", "ratio", "counts"),
    [
        (None, None, {"intent": 4, "keyword": 6, "transcription": 10}),
        (["intent", "transcription"], None, {"intent": 4, "transcription": 10}),
        (None, 0.0, {"intent": 4, "keyword": 6}),
        (None, 0.5, {"intent": 4, "keyword": 6, "transcription": 5}),
        (["intent", "transcription"], 1.0, {"intent": 4, "transcription": 4}),
        (["intent"], 1.0, {"intent": 4}),
        (None, 100.0, {"intent": 4, "keyword": 6, "transcription": 10}),  # the task has no more rows
        (["intent=1", "keyword=1"], None, {"intent": 4, "keyword": 4}),
        (["intent=2", "keyword"], None, {"intent": 4, "keyword": 2}),
        (["intent=1", "keyword=3"], None, {"intent": 2, "keyword": 6}),
        (["intent=1", "keyword=1", "transcription"], 0.5, {"intent": 4, "keyword": 4, "transcription": 4}),
        (["intent=0.5", "keyword=0.5", "transcription=1"], None, {"intent": 4, "keyword": 4, "transcription": 8}),
    ],
)
def test_tasks_weights_and_transcription_ratio(tasks, ratio, counts):
    assert Counter(mix(SET, tasks, ratio, seed=0)["task"]) == counts


@pytest.mark.parametrize(("tasks", "ratio"), [(None, 0.5), (["intent=3", "keyword"], None)])
def test_which_rows_stay_is_a_function_of_seed_and_id(tasks, ratio):
    def kept(dataset, seed):
        return set(mix(dataset, tasks, ratio, seed)["id"])

    assert kept(SET, 0) == kept(SET.select(range(19, -1, -1)), 0)
    assert kept(SET, 0) != kept(SET, 1)


@pytest.mark.parametrize(
    ("tasks", "ratio", "message"),
    [
        (["singing"], None, r"no rows of \['singing'\]; it has \['intent', 'keyword', 'transcription'\]"),
        (["intent=0"], None, "'intent' has the weight 0"),
        (["intent=inf"], None, "'intent' has the weight inf"),
        (["intent=much"], None, "cannot read the weight in 'intent=much'"),
        (["intent", "transcription=2"], 1.0, "transcription has a weight in --tasks and a --transcription_ratio"),
        (["transcription"], 1.0, "no row of .* is left"),
    ],
)
def test_invalid_mixes_are_refused_with_the_reason(tasks, ratio, message):
    with pytest.raises(ValueError, match=message):
        mix(SET, tasks, ratio, seed=0)


# Text rows


def test_text_rows_are_the_same_rows_without_their_clips(set_dir, processor, lsm):
    heard = load_rows(arguments(set_dir), 0, lsm.config.responder)
    mixed = load_rows(arguments(set_dir, text_ratio=1.0), 0, lsm.config.responder)
    assert mixed[: len(heard)]["id"] == heard["id"]
    read = mixed.select(range(len(heard), len(mixed))).to_list()
    assert len(read) == 8 and all(row["audio"] is None and row["task"] != "transcription" for row in read)
    batch = SpeechResponseCollator(processor)(read[:2])
    assert "input_features" not in batch and read[0]["transcript"] in processor.tokenizer.decode(batch["input_ids"][0])
    counts = count_tasks(mixed)
    assert counts["transcription"] == 8 and sum(n for task, n in counts.items() if task.endswith("(read)")) == 8


def test_how_many_are_read_is_asked_for_and_nested(set_dir, lsm):
    dataset = load_rows(arguments(set_dir), 0, lsm.config.responder)
    read = [with_text_rows(dataset, ratio, 0)["id"][len(dataset) :] for ratio in (0.0, 0.5, 1.0)]
    assert len(read[0]) == 0 and set(read[1]) < set(read[2]) and len(read[2]) == 8


# Self-powered or not


@pytest.mark.parametrize("key", ["model", "revision", "template"])
def test_rows_that_another_llm_or_template_wrote_are_refused(set_dir, lsm, key):
    responder = {**lsm.config.responder, key: "mine"}
    message = rf"foreign to this LSM \({key}: .* wrote it, 'mine' would learn it\).*--allow_foreign_responses true"
    with pytest.raises(ValueError, match=message):
        load_rows(arguments(set_dir), 0, responder)


def test_rows_of_this_llm_are_taken_and_foreign_ones_when_asked_for(set_dir, lsm):
    assert len(load_rows(arguments(set_dir), 0, lsm.config.responder)) == 16
    assert len(load_rows(arguments(set_dir, allow_foreign_responses=True), 0, None)) == 16
    refuse_foreign(load_self_powered(set_dir)[0]["responder"], lsm.config.responder)


# Bad rows


def test_a_set_without_the_columns_is_refused_by_their_names(set_dir):
    features = load_self_powered(set_dir).remove_columns(["response", "responder"]).features
    with pytest.raises(ValueError, match=r"has no column responder, response; it has .*transcript.*self_powered build"):
        check_columns(features, "mine")


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [("response", " \n", "row 'b' has an empty response"), ("duration", 0.0, "row 'b' has a clip of 0.0 s")],
)
def test_rows_without_text_or_speech_are_refused_before_training(column, value, message):
    good = {"instruction": "", "transcript": "", "response": "no", "duration": 1.0}
    rows = Dataset.from_list([{"id": "a", **good}, {"id": "b", **good, column: value}])
    with pytest.raises(ValueError, match=message):
        check_rows(rows)


def test_short_answers_are_rows_like_others(processor, spoken):
    """The original code drops all responses of five tokens or less, such as yes and no."""
    rows = [row | {"response": response} for row, response in zip(spoken, ["Yes", "no", "1", "?"], strict=True)]
    check_rows(Dataset.from_list([{**row, "audio": None, "duration": 1.0} for row in rows]))
    assert ((SpeechResponseCollator(processor)(rows)["labels"] != -100).sum(-1) >= 2).all()


# Their sizes


def test_rows_are_as_long_as_the_collator_makes_them(set_dir, processor, lsm):
    dataset = load_rows(arguments(set_dir, text_ratio=1.0), 0, lsm.config.responder)
    sizes = RowSizes(processor).measure_all(dataset)
    for index, row in enumerate(dataset):
        batch = SpeechResponseCollator(processor)([row])
        assert (
            abs(sizes["tokens"][index] - batch["input_ids"].shape[1]) <= 2
        )  # tokens merge across the template's seams
        assert sizes["labels"][index] == (batch["labels"] != -100).sum()
        assert sizes["speech_tokens"][index] == (batch["input_ids"] == processor.audio_token_id).sum()
        frames = batch["input_features_mask"].sum().item() if "input_features_mask" in batch else 0
        assert sizes["frames"][index] == (frames + 1) // 2


def test_a_row_that_the_llm_has_no_room_for_is_refused(set_dir, processor, lsm):
    dataset = load_rows(arguments(set_dir), 0, lsm.config.responder)
    with pytest.raises(ValueError, match=r"row '.*' takes \d+ tokens, but the LLM has 30 positions"):
        RowSizes(processor, context=30).measure_all(dataset)


# Streams


def stream(set_dir, processor, lsm, seed=0, **options):
    args = arguments(set_dir, dataset_streaming=True, **options)
    return stream_rows(args, seed, lsm.config.responder, Costs.of(lsm, "full"), processor, 4)


def test_a_stream_never_ends_and_is_a_function_of_the_seed(set_dir, processor, lsm):
    def ids(seed):
        return [row["id"] for row in islice(stream(set_dir, processor, lsm, seed), 600)]

    first = ids(0)
    assert len(first) == 600 and len(set(first)) == 16
    assert ids(0) == first != ids(1)


def test_a_streams_tasks_come_in_shares(set_dir, processor, lsm):
    def shares(**options):
        rows = list(islice(stream(set_dir, processor, lsm, shuffle_buffer=50, **options), 600))
        counts = Counter(row["task"] if row["audio"] else "read" for row in rows)
        return {task: count / len(rows) for task, count in counts.items()}

    present = sorted(set(load_self_powered(set_dir)["task"]) - {"transcription"})
    one, other = present[:2]
    found = shares(tasks=[f"{one}=3", other])
    assert found == pytest.approx({one: 0.75, other: 0.25}, abs=0.08)
    found = shares(tasks=[one, other, "transcription"], transcription_ratio=2.0)
    assert found == pytest.approx({"transcription": 2 / 3, one: 1 / 6, other: 1 / 6}, abs=0.08)
    found = shares(tasks=[one], text_ratio=1.0)
    assert found == pytest.approx({one: 0.5, "read": 0.5}, abs=0.02)


def test_a_streams_batches_hold_rows_of_like_cost(set_dir, processor, lsm):
    rows = list(islice(stream(set_dir, processor, lsm), 200))
    durations = np.array([row["duration"] for row in rows]).reshape(-1, 4)
    assert np.ptp(durations, axis=1).mean() < np.ptp(np.random.default_rng(0).permuted(durations), axis=1).mean() / 2


def test_foreign_rows_in_a_stream_are_refused_when_they_come(set_dir, processor, lsm):
    args = arguments(set_dir, dataset_streaming=True)
    foreign = {**lsm.config.responder, "model": "mine"}
    with pytest.raises(ValueError, match="foreign to this LSM"):
        next(iter(stream_rows(args, 0, foreign, Costs.of(lsm, "full"), processor, 4)))
