"""The benchmarks of builds run on very few rows."""

from types import SimpleNamespace

import pytest
from datasets import Audio, Dataset, load_dataset

from benchmarks.build_memory import peak_memory
from benchmarks.imperfect_reading import measure as measure_imperfect_reading
from benchmarks.real_size import measure as measure_real_size
from benchmarks.responders import measure as measure_responders
from benchmarks.self_powered import measure
from dataset_builders.responders.local import LocalResponder


def test_building_is_measured_against_a_plain_loop():
    found = measure("assets/nano/llm", rows=12, turns=2, cores=1, processes=1)
    assert (found["rows"], len(found["ratios"])) == (12, 2)
    assert found["ratio"] > 0


def test_a_build_that_fails_is_no_measurement():
    with pytest.raises(ChildProcessError, match="(?s)the build ended with 1: .*OSError"):
        peak_memory("no-such-llm", rows=7, threads=1)


def test_the_stages_of_a_real_size_are_measured_against_what_is_slower(lsm_dir, corpus_dir):
    clips = load_dataset(str(corpus_dir), split="train").cast_column("audio", Audio(decode=False))
    rows = [
        {**clips[index % len(clips)], "task": "keyword", "instruction": "Say it.", "response": "yes", "duration": 0.5}
        for index in range(16)
    ]
    found = measure_real_size(str(lsm_dir), Dataset.from_list(rows), "float32", count=3, rounds=1)
    assert set(found["stages"]) == {"training", "building", "storing"}
    for name, stage in found["stages"].items():
        assert {ratio > 0 for ratios in stage["ratios"].values() for ratio in ratios} == {True}, name
    assert found["stages"]["building"]["same"] == 3
    assert set(found["stages"]["training"]["of_matrix_rate"]) == {"fast", "sdpa"}


def test_responders_are_compared_with_the_first_one_on_the_same_rows():
    answers = {"here": ["yes", "no", "no", "ten"], "server": ["yes", "no", "yes", "nine"]}
    responders = {
        name: SimpleNamespace(respond=lambda rows, texts=texts: [SimpleNamespace(text=texts[row]) for row in rows])
        for name, texts in answers.items()
    }
    found = measure_responders(responders, [[0, 1], [2, 3]])
    assert [found["here"]["same"], found["server"]["same"]] == [1.0, 0.5]
    assert all(len(one["turns"]) == 2 and one["rows_per_second"] > 0 for one in found.values())
    assert [len(one["turns_of_cpu_time"]) for one in found.values()] == [2, 0]  # nobody told the server's process


def test_a_reading_without_fault_costs_nothing_and_wrong_words_do():
    said = ["the cat saw the small bird", "a dog and a cat ran home", "the bird saw a dog"]
    rows = [{"instruction": "Reply.", "transcript": transcript, "duration": 0.0} for transcript in said]
    found = measure_imperfect_reading(LocalResponder("assets/nano/llm", 6), rows)
    for blank in ("zeros", "mean", "space"):  # a clip of no length has no blanks
        assert found[blank]["lost"] == pytest.approx(0, abs=1e-4)
        assert found[blank]["chrf"] == 100
    assert found["wrong 35%"]["lost"] > 0.1
    assert found["wrong 35%"]["chrf"] < 100
