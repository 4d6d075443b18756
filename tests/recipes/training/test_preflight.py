"""The preflight: its checks before anything large is downloaded or loaded."""

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from recipes.training.memory import Target, estimate
from recipes.training.models import check_vocabulary
from recipes.training.preflight import preflight


@pytest.fixture
def check(defaults, capsys, parts_of):
    """Return `check(...)`, which runs the preflight of a training and returns its exit code, and its lines by check."""

    def run(**options) -> tuple[int, dict[str, str]]:
        options = {**defaults, **options}
        options = {name: value for name, value in options.items() if value is not None}
        code = preflight(*parts_of(options))
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("  ok", "  FAIL", "  --"))]
        return code, {line[8:19].strip(): line for line in lines}

    return run


@pytest.mark.parametrize("mode", [{}, {"llm": "lora", "objective": "distill"}, {"llm": "frozen"}, {"llm": "qlora"}])
def test_a_good_training_is_ready(check, mode):
    code, lines = check(**mode)
    assert code == 0
    assert list(lines) == ["model", "download", "template", "data", "labels", "memory", "two steps", "time"]
    assert all(line.startswith("  ok") for line in lines.values())
    assert "16 rows" in lines["data"] and "speech tokens, learns" in lines["labels"] and "losses" in lines["two steps"]


def test_two_models_are_checked_before_they_are_composed(check, whisper_dir, llm_dir, defaults):
    sizes = {"qformer_hidden": 32, "qformer_heads": 4, "qformer_ffn": 64}
    code, lines = check(model_name_or_path=None, audio=str(whisper_dir), text=str(llm_dir), composition=sizes)
    assert code == 0, lines
    assert not Path(defaults["output_dir"]).exists()


@pytest.mark.parametrize("llm", ["full", "frozen"])  # with `full`, a second LLM is the teacher
def test_an_lsm_that_reads_with_whispers_words_is_checked_too(check, reading_whisper_dir, llm_dir, llm):
    parts = {"model_name_or_path": None, "audio": str(reading_whisper_dir), "text": str(llm_dir)}
    code, lines = check(**parts, llm=llm, objective="distill")
    assert code == 0, lines
    assert "audio tower and its words (frozen)" in lines["model"]


def test_checks_that_need_a_failed_check_are_skipped(check):
    code, lines = check(model_name_or_path=None)
    assert code == 1
    assert "no model: give --model_name_or_path" in lines["model"]
    assert lines["two steps"].endswith("needs labels")
    assert "nothing: all weights are on this machine" in lines["download"]


def test_a_model_out_of_reach_is_said_to_be(check):
    code, lines = check(model_name_or_path="nobody/has-this")
    assert code == 1 and lines["model"].startswith("  FAIL") and lines["download"].startswith("  FAIL")


def test_foreign_rows_fail_with_the_way_out(check, lsm_dir, tmp_path):
    shutil.copytree(lsm_dir, tmp_path / "other")
    config = tmp_path / "other" / "config.json"
    config.write_text(config.read_text().replace('"tiny-llama"', '"another"'))
    code, lines = check(model_name_or_path=str(tmp_path / "other"))
    assert code == 1 and "foreign to this LSM" in lines["data"]


def test_an_empty_response_fails_by_its_row(check, set_dir, tmp_path):
    shutil.copytree(set_dir, tmp_path / "set")
    file = next((tmp_path / "set" / "data" / "transcription").glob("*.parquet"))
    table = pq.read_table(file)
    column = table.schema.get_field_index("response")
    pq.write_table(table.set_column(column, "response", [[" "] * len(table)]), file)
    code, lines = check(dataset_name=str(tmp_path / "set"))
    assert code == 1 and "has an empty response" in lines["data"]


def test_every_task_is_looked_at_wherever_its_rows_lie(check, monkeypatch):
    """Each file of a set has one task, so the first rows of the whole set would all have the same task."""
    monkeypatch.setattr("recipes.training.preflight.PEEKED", 1)
    assert "8 rows; of 1:" in check(tasks=["transcription"])[1]["data"]
    assert "16 rows; of 5:" in check()[1]["data"]


def test_what_does_not_fit_the_target_fails_with_what_would(check):
    code, lines = check(target={"memory_gib": 0.5})
    assert code == 1 and "--llm lora or qlora" in lines["memory"]
    assert lines["two steps"].startswith("  ok") and "one layer each" in lines["two steps"]


def test_a_targets_rate_gives_a_time(check):
    code, lines = check(target={"memory_gib": 80, "peak_tflops": 1e-6, "devices": 2})
    assert code == 0 and "assumed MFU" in lines["time"] and "min for" in lines["time"]


@pytest.mark.parametrize(("setting", "message"), [({"sharding": "zero9"}, "zero9"), ({"devices": 0}, "devices 0")])
def test_invalid_targets_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        Target(**setting)


def test_sharding_divides_what_it_says(lsm, defaults, parts_of):
    script_args, training_args, model_args = parts_of(dict(defaults))
    row = {"frames": 100, "tokens": 100, "labels": 10}

    def parts(sharding):
        return estimate(lsm, script_args, training_args, model_args, Target(4, sharding=sharding), row)

    plain, zero2, fsdp = parts("ddp"), parts("zero2"), parts("fsdp2")
    assert fsdp["weights"] == pytest.approx(plain["weights"] / 4)
    assert fsdp["gradients"] == pytest.approx(plain["gradients"] / 4)
    assert zero2["weights"] > fsdp["weights"] and zero2["activations"] == plain["activations"]


# Models and tokenizers that do not belong together


def test_a_tokenizer_of_another_llm_is_refused(processor, lsm):
    embeddings = lsm.get_input_embeddings().num_embeddings
    check_vocabulary(processor, embeddings, lsm.config.audio_token_id)
    with pytest.raises(ValueError, match=rf"ids up to {embeddings - 1}, but the LLM has {embeddings - 5} embeddings"):
        check_vocabulary(processor, embeddings - 5, lsm.config.audio_token_id)
    with pytest.raises(ValueError, match=r"<\|audio\|> is \d+ in the tokenizer, but 3 in the model: they belong"):
        check_vocabulary(processor, embeddings, 3)


def test_a_training_with_such_a_tokenizer_is_refused(train, lsm_dir, tmp_path):
    shutil.copytree(lsm_dir, tmp_path / "mixed")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "mixed")
    tokenizer.add_tokens([f"word{number}" for number in range(9)])
    tokenizer.save_pretrained(tmp_path / "mixed")
    with pytest.raises(ValueError, match="they belong to different models"):
        train(model_name_or_path=str(tmp_path / "mixed"))
