"""Learning the response, or what the LLM would say if it read."""

import copy

import pytest
import torch
from torch import nn
from transformers import Qwen3NextConfig
from trl import ModelConfig

from recipes.collator import SpeechResponseCollator
from recipes.training.arguments import LsmScriptArguments, LsmTrainingArguments
from recipes.training.callbacks import LOG, read_lines
from recipes.training.models import can_share_prefix, load_teacher
from recipes.training.objectives import distillation_loss, predicts
from recipes.training.trainer import LsmTrainer


def test_the_loss_is_kl_at_a_temperature():
    logits, wanted = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0))
    given, taught = nn.functional.softmax(logits / 3, -1), nn.functional.softmax(wanted / 3, -1)
    expected = (taught * (taught / given).log()).sum() * 9
    torch.testing.assert_close(distillation_loss(logits, wanted, 3.0), expected)
    assert distillation_loss(wanted, wanted, 3.0).abs() < 1e-5


def test_a_label_is_predicted_one_position_before_it():
    labels = torch.tensor([[-100, -100, 5, 6], [-100, 7, -100, -100]])
    assert predicts(labels).tolist() == [[False, True, True, False], [True, False, False, False]]


def test_logits_of_chosen_positions_are_those_of_all(lsm, processor, spoken):
    batch = SpeechResponseCollator(processor)([row | {"response": "so"} for row in spoken])
    mask = predicts(batch.pop("labels"))
    with torch.no_grad():
        chosen, everything = lsm(**batch, logits_to_keep=mask).logits, lsm(**batch).logits
    torch.testing.assert_close(chosen, everything[mask], atol=1e-5, rtol=1e-5)


def test_the_teacher_reads_the_same_rows_and_answers_with_the_same_tokens(processor, answered):
    batch = SpeechResponseCollator(processor, teacher=True)(answered)
    for index, row in enumerate(answered):
        heard, read = (batch[name][index] for name in ("labels", "teacher_labels"))
        assert heard[heard != -100].tolist() == read[read != -100].tolist()
        text = processor.tokenizer.decode(batch["teacher_input_ids"][index])
        assert row["transcript"] in text and processor.audio_token not in text


@pytest.mark.parametrize("llm", ["frozen", "lora", "full"])
def test_a_model_that_only_reads_has_nothing_to_learn(train, losses, llm, defaults, monkeypatch):
    """Teacher and student are the same LLM: given the same prompts, the divergence is zero."""
    monkeypatch.setattr("recipes.collator.SpeechResponseCollator._audio", lambda self, rows: ({}, []))
    monkeypatch.setattr(
        "recipes.collator.SpeechResponseCollator.__call__",
        lambda self, rows, call=SpeechResponseCollator.__call__: call(self, [row | {"audio": None} for row in rows]),
    )
    first = losses(train(llm=llm, objective="distill", max_steps=1))[0]
    assert first == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("llm", ["frozen", "lora", "full"])
def test_the_divergence_gets_smaller(train, losses, llm):
    options = {"objective": "distill", "per_device_train_batch_size": 16, "learning_rate": 1e-2, "warmup_steps": 2}
    found = losses(train(llm=llm, max_steps=12, **options))
    assert found[-1] < 0.9 * found[0]


@pytest.mark.parametrize(("llm", "copies"), [("frozen", 0), ("lora", 0), ("full", 1)])
def test_only_a_full_training_keeps_a_second_llm(lsm_dir, llm, copies, defaults):
    training = LsmTrainingArguments(output_dir=defaults["output_dir"], objective="distill", use_cpu=True)
    model = ModelConfig(model_name_or_path=str(lsm_dir))
    teacher = load_teacher(LsmScriptArguments(dataset_name="any", llm=llm), training, model)
    assert (teacher is not None) == copies
    if teacher is not None:
        assert not hasattr(teacher.model, "audio_tower")
        assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_accumulated_batches_give_the_loss_of_one(train, losses, tmp_path):
    """Both objectives are means over all response tokens of a step, however it is cut."""
    for objective in ("response", "distill"):
        options = {"objective": objective, "train_sampling_strategy": "sequential", "max_steps": 3}
        one = train(per_device_train_batch_size=8, output_dir=str(tmp_path / f"{objective}-one"), **options)
        cut = train(
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            output_dir=str(tmp_path / f"{objective}-cut"),
            **options,
        )
        assert losses(cut) == pytest.approx(losses(one), abs=1e-4)


@pytest.mark.parametrize("options", [{}, {"objective": "distill", "llm": "full"}, {"llm": "lora"}])
def test_reading_what_rows_begin_with_once_changes_no_loss(train, losses, options, tmp_path, monkeypatch):
    shared, count = [], SpeechResponseCollator._shared
    monkeypatch.setattr("recipes.collator.LEAST_SHARED", 8)
    monkeypatch.setattr(SpeechResponseCollator, "_shared", lambda *args: shared.append(count(*args)) or shared[-1])
    options = {"gradient_checkpointing": False, "per_device_train_batch_size": 8, "max_steps": 3, **options}
    once = train(output_dir=str(tmp_path / "once"), **options)
    assert len(shared) >= 3 and all(shared)
    each = train(output_dir=str(tmp_path / "each"), share_prefix=False, **options)
    assert losses(once) == pytest.approx(losses(each), abs=1e-4)


def test_trls_fused_head_and_labelled_positions_give_one_training(train, losses, tmp_path, monkeypatch):
    labelled = train(output_dir=str(tmp_path / "labelled"))
    monkeypatch.setattr(LsmTrainer, "_needs_trl", lambda self: True)
    fused = train(output_dir=str(tmp_path / "fused"))
    assert losses(labelled) == pytest.approx(losses(fused), abs=1e-4)
    logs = [[line for line in read_lines(run / LOG) if "loss" in line] for run in (labelled, fused)]
    accuracies = [[line["mean_token_accuracy"] for line in log] for log in logs]
    assert accuracies[0] == pytest.approx(accuracies[1])


def test_an_llm_that_writes_over_its_states_reads_every_row(lsm):
    assert can_share_prefix(lsm)
    lsm = copy.deepcopy(lsm)
    lsm.config.text_config = Qwen3NextConfig(num_hidden_layers=2)
    assert not can_share_prefix(lsm)


def test_throughput_is_logged_with_the_loss(train):
    line = read_lines(train() / LOG)[1]
    assert 0 <= line["padding_tokens"] < 0.5 and 0 <= line["padding_frames"] < 0.5
    assert line["tokens_per_second"] > 0 and line["audio_seconds_per_second"] > 0
    assert 0 < line["mfu"] < 1 and line["peak_memory_gib"] > 0
