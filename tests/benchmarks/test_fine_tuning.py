"""The benchmark of fine-tuning runs on a tiny model."""

import gc
import json
import math
import sys

import pytest
import torch

from benchmarks import fine_tuning
from benchmarks.fine_tuning import Bench, Sweep, main, make_processor, make_rows, measure, table
from modeling_lsm import LsmForConditionalGeneration
from recipes.training.rows import RowSizes

TINY = {"preset": "tiny", "batch": (1,), "seconds": (2.0,), "steps": 2, "workers": 0}
FIGURES = ("steps_per_second", "tokens_per_second", "audio_seconds_per_second", "mfu", "mfu_of_given")
FIGURES += ("peak_memory_gib", "estimated_memory_gib", "reading_seconds")


def rows_of(markdown: str) -> list[list[str]]:
    """Return the cells of a table with its header, without the line below it."""
    lines = [line.strip("| ").split(" | ") for line in markdown.splitlines() if line.startswith("|")]
    return [lines[0], *lines[2:]]


def models_alive() -> int:
    gc.collect()
    return sum(type(thing) is LsmForConditionalGeneration for thing in gc.get_objects())


@pytest.fixture
def no_memory(monkeypatch):
    def train(self, setting):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Bench, "train", train)


def test_each_setting_has_its_row_and_its_memory_is_given_back():
    alive = models_alive()
    found = measure(Sweep(**TINY, llm=("frozen", "lora"), peak_tflops=0.5))
    assert models_alive() == alive
    assert found["left_out"] == []
    for row in found["results"]:
        assert all(math.isfinite(row[name]) and row[name] > 0 for name in FIGURES), row
        # the trainer counts the right amount: one clip of two seconds in each step
        assert row["audio_seconds_per_second"] == pytest.approx(2 * row["steps_per_second"], rel=0.02)
    head, *rows = rows_of(table(found))
    assert "MFU of 0.5 TFLOP/s" in head
    assert [row[:5] for row in rows] == [[llm, "response", "yes", "1", "2 s"] for llm in ("frozen", "lora")]
    assert {len(row) for row in rows} == {len(head)}


def test_full_training_may_distill_without_checkpointing():
    sweep = Sweep(**TINY, llm=("full",), objective=("distill",), checkpointing=("false",), dtype="float32")
    ((head, row), (figures,)) = (rows_of(table(found := measure(sweep))), found["results"])
    assert row[:5] == ["full", "distill", "no", "1", "2 s"]
    assert figures["steps_per_second"] > 0
    assert not any(name.startswith("MFU of") for name in head)


def test_rows_have_the_requested_lengths():
    processor = make_processor()
    rows = make_rows(2, 5.0)
    sizes = RowSizes(processor).measure({name: [row[name] for row in rows] for name in rows[0]})
    assert (sizes["frames"].tolist(), sizes["labels"].tolist()) == ([250, 250], [40, 40])
    assert len(processor.tokenizer(rows[0]["instruction"], add_special_tokens=False).input_ids) == 15


@pytest.mark.parametrize("preset", fine_tuning.PRESETS)
def test_the_vocabulary_fits_every_preset(preset):
    processor = make_processor()
    config = fine_tuning.make_config(preset, processor)
    assert max(processor.tokenizer.get_vocab().values()) < config.text_config.vocab_size
    assert config.audio_token_id == processor.audio_token_id


def test_what_runs_out_of_memory_is_left_out_and_the_rest_goes_on(no_memory):
    found = measure(Sweep(**TINY, llm=("full", "frozen")))
    assert found["results"] == []
    assert [line.split(" --objective")[0] for line in found["left_out"]] == ["--llm full", "--llm frozen"]
    assert all("out of memory, estimated" in line for line in found["left_out"])
    assert table(found).count("Left out: --llm") == 2


def test_what_cannot_fit_is_not_tried(monkeypatch, no_memory):
    monkeypatch.setattr(fine_tuning, "free_memory", lambda device: 0.5)
    (line,) = measure(Sweep(**TINY, llm=("full",)))["left_out"]
    assert line.endswith("needs an estimated 1.5 GiB of 0.5")


@pytest.mark.parametrize(
    "option, expected",
    [
        ({"preset": "huge"}, "--preset 'huge' cannot be measured; expected tiny or base_0.5b or large_7b"),
        ({"llm": ("full", "qlora")}, "--llm 'qlora' cannot be measured; expected full or lora or frozen"),
        ({"objective": ("listen",)}, "--objective 'listen' .* expected response or distill"),
        ({"checkpointing": ("yes",)}, "--checkpointing 'yes' .* expected true or false"),
        ({"dtype": "int8"}, "--dtype 'int8' .* expected bfloat16 or float32"),
        ({"batch": (4, 0)}, "--batch 0 must be 1 or more"),
        ({"seconds": (math.nan,)}, "--seconds nan must be 0.1 or more, and finite"),
        ({"steps": 0}, "--steps 0 must be 1 or more"),
        ({"workers": -1}, "--workers -1 must be 0 or more"),
        ({"peak_tflops": 0.0}, "--peak-tflops 0.0 must be more than 0"),
    ],
)
def test_invalid_options_are_refused_by_name(option, expected):
    with pytest.raises(ValueError, match=expected):
        Sweep(**{**TINY, **option})


def test_a_clip_that_the_llm_has_no_positions_for_is_refused():
    with pytest.raises(ValueError, match="but the LLM has 2048 positions"):
        measure(Sweep(**{**TINY, "seconds": (900.0,)}))


def test_several_gpus_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="2 GPUs are visible; expected one. Set CUDA_VISIBLE_DEVICES=0"):
        Bench(Sweep(**TINY), str(tmp_path))


def test_the_command_prints_a_table_and_keeps_the_figures(monkeypatch, tmp_path, capsys, no_memory):
    file = tmp_path / "found.json"
    options = "--preset tiny --llm lora frozen --batch 2 --seconds 2 5 --steps 2 --workers 0 --json"
    monkeypatch.setattr(sys, "argv", ["fine_tuning", *options.split(), str(file)])
    main()
    found = json.loads(file.read_text(encoding="utf-8"))
    assert (found["sweep"]["llm"], len(found["left_out"])) == (["lora", "frozen"], 4)
    assert table(found) in capsys.readouterr().out
