"""The comparisons run on tiny models and few rows, and they compare equal work."""

import json
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, WhisperConfig

from benchmarks import comparing, generation, growth, inference, same_loss, training, workloads
from benchmarks.comparing import Results, Setup
from benchmarks.contestants import CONTESTANTS, LEVERS, Ours
from benchmarks.workloads import WORKLOADS, Row, draw_rows, grouped_batches, representative, static_batches

CPU = torch.device("cpu")
MICRO = (
    WhisperConfig(d_model=48, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=192, decoder_layers=1),
    LlamaConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=300,
        max_position_embeddings=32_768,
    ),
)
ROWS = [Row(1.3, 0), Row(0.4, 1), Row(2.0, 2)]


@pytest.fixture(autouse=True)
def micro(monkeypatch):
    monkeypatch.setitem(workloads.SIZES, "tiny", MICRO)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run the command of a benchmark, and return the content of its `--json` file."""

    def call(module, *options):
        file = tmp_path / "found.json"
        monkeypatch.setattr(sys, "argv", ["benchmark", *options, "--device", "cpu", "--json", str(file)])
        module.main()
        return json.loads(file.read_text())

    return call


# Workloads


@pytest.mark.parametrize(("name", "mean"), [("librispeech", 12.3), ("common_voice", 5), ("gigaspeech", 4)])
def test_clips_are_as_long_as_the_corpus_has_them(name, mean):
    seconds = [row.seconds for row in draw_rows(name, 4000)]
    assert sum(seconds) / len(seconds) == pytest.approx(mean, rel=0.03)
    assert draw_rows(name, 10) == draw_rows(name, 10)


def test_grouped_and_static_batches_hold_the_same_rows():
    rows = draw_rows("gigaspeech", 64)
    grouped, static = grouped_batches(rows, 8), static_batches(rows, 8)
    assert sorted(row.seed for batch in grouped for row in batch) == [row.seed for batch in static for row in batch]

    def padding(batches):
        return sum(8 * max(row.seconds for row in batch) - sum(row.seconds for row in batch) for batch in batches)

    assert padding(grouped) < padding(static) / 4


def test_some_batches_stand_for_all():
    batches = [[Row(seconds, 0)] for seconds in (5, 1, 3, 2, 4, 6)]
    assert [row.seconds for [row] in representative(batches, 3)] == [2, 4, 6]


# Contestants


@pytest.mark.parametrize("name", CONTESTANTS)
def test_all_contestants_learn_from_rows_and_answer_them(name):
    contestant = CONTESTANTS[name]("tiny", CPU, torch.float32)
    batch = contestant.training_batch(ROWS)
    assert (batch["labels"] != -100).sum() == 3 * workloads.RESPONSE
    assert torch.isfinite(contestant.step(batch))
    assert not any(weight.requires_grad for weight in contestant.encoder().parameters())
    prompts = contestant.prompts(ROWS)
    assert contestant.write(prompts, 3).shape == (3, prompts["input_ids"].shape[1] + 3)


@pytest.mark.parametrize("name", ["voxtral", "granite_speech", "audio_flamingo_3", "ours"])
def test_contestants_with_long_clips_do_not_truncate_them(name):
    contestant = CONTESTANTS[name]("tiny", CPU, torch.float32)
    assert contestant.longest >= 31
    prompts = contestant.prompts([Row(31.0, 0)])
    assert contestant.write(prompts, 1).shape[1] == prompts["input_ids"].shape[1] + 1


@pytest.mark.parametrize("name", [name for name in LEVERS if name not in ("stored_features", "without_reader")])
def test_a_lever_changes_no_loss(name):
    ours, without = (CONTESTANTS[one]("tiny", CPU, torch.float32) for one in ("ours", name))
    losses = [one.step(one.training_batch(ROWS)) for one in (ours, without)]
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)


def test_useful_work_is_what_torch_counts_where_nothing_is_padded():
    ours, rows = Ours("tiny", CPU, torch.float32), [Row(8.5, seed) for seed in range(4)]  # 25 windows
    ours.model.set_attn_implementation("eager")  # whose products torch counts
    batch = ours.training_batch(rows)
    with FlopCounterMode(display=False) as counter:
        ours.step(batch)
    # eager attention also computes the upper triangle; the rest counts once
    assert ours.flops(rows) == pytest.approx(counter.get_total_flops(), rel=0.05)


# The commands


def test_steps_of_the_alignment_are_compared_too(run):
    only = ["--only", "ours,without_window_attention", "--workload", "common_voice", "--batch", "2", "--batches", "1"]
    found = run(training, "--alignment", *only, "--rounds", "1")
    assert found["seconds_of"] == "1 alignment steps of 2 rows"
    assert found["ratios"]["without_window_attention"]["common_voice"] > 0
    with pytest.raises(ValueError, match="--alignment --only ours,original: expected ours,without_window_attention"):
        run(training, "--alignment", "--only", "ours,original")


def test_training_gives_a_ratio_for_each_contestant(run, capsys, tmp_path):
    options = ["--rounds", "1", "--batches", "1", "--batch", "2", "--threads", "1", "--plot", str(tmp_path / "a.png")]
    found = run(training, *options, "--only", "ours,original,qwen2_audio", "--workload", "librispeech,common_voice")
    assert found["ratios"].keys() == {"original", "qwen2_audio"}
    for ratios in found["ratios"].values():
        assert ratios.keys() == {"librispeech", "common_voice"} and min(ratios.values()) > 0
    assert found["limit"]["librispeech"].keys() == {"tower", "projector", "LLM", "head", "step"}
    printed = capsys.readouterr().out
    assert "| original |" in printed and "1 threads" in printed and "relative to a matrix product" in printed
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_inference_leaves_out_contestants_that_truncate_the_clip(run, capsys, monkeypatch):
    monkeypatch.setattr(inference, "TEN_MINUTES", 31.0)
    options = ["--rounds", "1", "--clips", "1", "--only", "ours,original,voxtral"]
    found = run(inference, *options, "--workload", "common_voice,ten_minutes")
    assert found["ratios"]["original"].keys() == {"common_voice"}
    assert found["ratios"]["voxtral"].keys() == {"common_voice", "ten_minutes"}
    assert "too long for them: original." in capsys.readouterr().out


def test_generation_asks_once_and_one_by_one(run, monkeypatch):
    monkeypatch.setattr(generation, "RESPONSE", 3)
    monkeypatch.setattr(generation, "QUESTIONS", 2)
    options = ["--rounds", "1", "--batches", "1", "--batch", "2", "--only", "ours,original"]
    found = run(generation, *options, "--workload", "common_voice")
    assert found["ratios"].keys() == {"original", "one_by_one"}
    assert found["ratios"]["one_by_one"].keys() == {"questions"}
    assert found["limit"]["decode"].keys() == {"dynamic", "static"}


def test_ratios_are_of_the_same_round():
    found = Results("a machine", "steps")
    found.add("ours", "librispeech", [1.0, 2.0, 4.0])
    found.add("original", "librispeech", [3.0, 4.0, 12.0])
    summary = found.summary()
    assert summary["ratios"] == {"original": {"librispeech": 3.0}}
    assert summary["spread"] == {"original": {"librispeech": [2.0, 3.0]}}
    assert "| original | 4 s, × 3.00 (2.00–3.00) |" in found.table()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "ours,whisper"], "--only 'whisper' is unknown; expected some of ours,original"),
        (["--only", "original"], "--only original lacks ours"),
        (["--workload", "earnings"], "--workload 'earnings' is unknown; expected some of librispeech"),
        (["--rounds", "0"], "--rounds 0"),
    ],
)
def test_what_cannot_be_compared_is_refused(options, message):
    parsed = comparing.arguments("", WORKLOADS).parse_args(options)
    with pytest.raises(ValueError, match=message):
        Setup(parsed, WORKLOADS)


def test_levers_are_ours_without_each_of_them():
    parsed = comparing.arguments("", WORKLOADS).parse_args(["--levers", "--device", "cpu"])
    assert Setup(parsed, WORKLOADS).options.only == ["ours", *LEVERS]


# Growth, and what speed costs


@pytest.mark.parametrize("line", growth.LINES)
def test_every_line_has_points(line):
    _, sizes, _ = growth.LINES[line]
    point = growth.measure(line, min(sizes[0], 8), repeats=1)
    assert point["seconds"] > 0 and point["gib"] >= 0


def test_power_is_the_slope_of_the_last_two_points(tmp_path):
    points = [{"size": size, "seconds": size**2 / 100, "gib": 0.1} for size in (1, 2, 8)]
    assert growth.power(points, "seconds") == pytest.approx(2)
    found = {"machine": "a machine", "lines": {"clip": points}, "power": {"clip": 2.0}}
    assert "| clip, seconds | 1 | 8 | 0.01 → 0.64 | 0.10 → 0.10 | 2.00 |" in growth.table(found)
    growth.plot(found, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 1000


def test_levers_leave_a_training_as_it_is(monkeypatch, tmp_path, capsys):
    file = tmp_path / "same.json"
    options = ["--steps", "4", "--batch", "2", "--clips", "48", "--seeds", "0", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["same_loss", *options])
    same_loss.main()
    found = json.loads(file.read_text())
    assert found["apart"] < 1e-3
    assert [len(losses) for runs in found["curves"].values() for losses in runs] == [4, 4, 4]
    assert "all levers and grouping alone" in capsys.readouterr().out
