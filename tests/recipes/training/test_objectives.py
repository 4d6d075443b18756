"""The objectives: cross-entropy on the response, and distillation from the LLM that reads the transcript."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from trl import ModelConfig

from dataset_builders.files import read_lines
from recipes.listening.collator import SpeechResponseCollator
from recipes.training.arguments import LsmScriptArguments, LsmTrainingArguments
from recipes.training.callbacks import LOG
from recipes.training.models import load_teacher
from recipes.training.objectives import (
    CHUNK,
    distillation_loss,
    most_likely,
    predicts,
    response_loss,
)
from recipes.training.trainer import LsmTrainer


def test_the_loss_is_kl_at_a_temperature():
    logits, wanted = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0))
    given, taught = nn.functional.softmax(logits / 3, -1), nn.functional.softmax(wanted / 3, -1)
    expected = (taught * (taught / given).log()).sum() * 9
    torch.testing.assert_close(distillation_loss(logits, wanted, 3.0), expected)
    assert distillation_loss(wanted, wanted, 3.0).abs() < 1e-5


# The teacher's likeliest tokens


def test_the_likeliest_tokens_and_all_others_as_one():
    logits, wanted = torch.randn(2, 6, 11, generator=torch.Generator().manual_seed(0)).requires_grad_()
    given, taught = nn.functional.softmax(logits / 2, -1), nn.functional.softmax(wanted / 2, -1)
    order = taught.argsort(-1, descending=True)
    given, taught = (
        torch.cat([chances.gather(-1, order)[:, :3], chances.gather(-1, order)[:, 3:].sum(-1, keepdim=True)], -1)
        for chances in (given, taught)
    )
    expected = (taught * (taught / given).log()).sum() * 4
    kept, tokens = most_likely(wanted.detach(), 3, 2.0)
    found = distillation_loss(logits, kept, 2.0, tokens)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_as_many_as_the_vocabulary_are_all():
    logits, wanted = torch.randn(2, 6, 11, generator=torch.Generator().manual_seed(0)).requires_grad_()
    every = distillation_loss(logits, wanted.detach(), 2.0)
    kept, tokens = most_likely(wanted.detach(), 11, 2.0)
    bucketed = distillation_loss(logits, kept, 2.0, tokens)
    torch.testing.assert_close(bucketed, every)
    torch.testing.assert_close(*[torch.autograd.grad(loss, logits)[0] for loss in (bucketed, every)])


# Memory


@pytest.mark.parametrize("positions", [0, 1, CHUNK, 2 * CHUNK + 3])
def test_chunks_of_positions_give_the_gradient_of_all_at_once(positions):
    logits, wanted = torch.randn(2, positions, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    wanted, tokens = wanted.detach(), torch.arange(positions) % 7
    log_softmax = nn.functional.log_softmax
    whole = {
        "distill": nn.functional.kl_div(
            log_softmax(logits, -1), log_softmax(wanted, -1), reduction="sum", log_target=True
        ),
        "response": -log_softmax(logits, -1).gather(1, tokens[:, None]).sum(),
    }
    for name, found in {
        "distill": distillation_loss(logits, wanted, 1.0),
        "response": response_loss(logits, tokens),
    }.items():
        torch.testing.assert_close(found, whole[name])
        torch.testing.assert_close(*[torch.autograd.grad(loss, logits)[0] for loss in (found, whole[name])])


class LargestFloat32(TorchDispatchMode):
    """Records the size of the largest float32 tensor."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else [found]:
            if torch.is_tensor(tensor) and tensor.dtype == torch.float32:
                self.numbers = max(self.numbers, tensor.numel())
        return found


@pytest.mark.parametrize("objective", ["response", "all tokens", "some tokens"])
def test_half_precision_logits_are_in_float32_for_a_chunk_at_a_time(objective):
    logits, wanted = torch.randn(2, 4 * CHUNK, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    logits.requires_grad_()
    saved = []

    def save(tensor):
        saved.append(tensor)
        return tensor

    with LargestFloat32() as largest, saved_tensors_hooks(save, lambda tensor: tensor):
        if objective == "response":
            loss = response_loss(logits, torch.zeros(4 * CHUNK, dtype=torch.long))
        elif objective == "some tokens":
            kept, tokens = most_likely(wanted, 3, 2.0)
            loss = distillation_loss(logits, kept, 2.0, tokens)
        else:
            loss = distillation_loss(logits, wanted, 2.0)
        loss.backward()
    assert 0 < largest.numbers <= CHUNK * 40
    assert sum(tensor.numel() for tensor in saved if tensor.dtype == torch.float32) < CHUNK * 40


def test_logits_reach_the_loss_in_the_dtype_that_they_were_computed_in(train, monkeypatch):
    seen = set()

    def look(logits, wanted, *rest):
        seen.update((logits.dtype, wanted.dtype))
        return distillation_loss(logits, wanted, *rest)

    monkeypatch.setattr("recipes.training.trainer.distillation_loss", look)
    train(objective="distill", llm="full", bf16=True, max_steps=1, peak_tflops=1.0)
    assert seen == {torch.bfloat16}


# Which positions, of which rows


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


def test_the_teacher_reads_only_what_is_learned_from_it(processor, answered):
    rows = [
        row | {"task": task} for row, task in zip(answered, ("quiz", "transcription", "quiz", "count"), strict=True)
    ]
    batch = SpeechResponseCollator(processor, teacher=True, response_tasks={"transcription", "count"})(rows)
    assert batch["teacher_rows"].tolist() == [True, False, True, False]
    assert len(batch["labels"]) == 4 and len(batch["teacher_labels"]) == 2
    for index, row in enumerate((rows[0], rows[2])):
        assert row["transcript"] in processor.tokenizer.decode(batch["teacher_input_ids"][index])
    nothing = SpeechResponseCollator(processor, teacher=True, response_tasks={"quiz"})([rows[0], rows[2]])
    assert not nothing["teacher_rows"].any() and (nothing["teacher_labels"] == -100).all()
    assert "teacher_rows" not in SpeechResponseCollator(processor, teacher=True, response_tasks={"count"})(rows[:3])


def test_every_row_has_the_loss_of_its_task(train, losses, rows, processor, tmp_path):
    options = {"per_device_train_batch_size": 16, "max_steps": 1}
    tasks = sorted({row["task"] for row in rows} - {"transcription"})
    heard = train(tasks=["transcription"], objective="response", output_dir=str(tmp_path / "heard"), **options)
    read = train(tasks=tasks, objective="distill", output_dir=str(tmp_path / "read"), **options)
    options |= {"objective": "distill", "response_tasks": ["transcription"]}
    both = train(output_dir=str(tmp_path / "both"), **options)
    tokens = {True: 0, False: 0}
    for row in rows:
        labels = SpeechResponseCollator(processor)([row])["labels"]
        tokens[row["task"] == "transcription"] += int((labels != -100).sum())
    expected = losses(heard)[0] * tokens[True] + losses(read)[0] * tokens[False]
    assert losses(both)[0] == pytest.approx(expected / sum(tokens.values()), abs=1e-4)


def test_with_a_response_to_learn_in_every_row_nothing_is_distilled(train, losses, rows, tmp_path):
    tasks = sorted({row["task"] for row in rows})
    found = train(objective="distill", response_tasks=tasks, output_dir=str(tmp_path / "distill"))
    assert losses(found) == pytest.approx(losses(train(output_dir=str(tmp_path / "response"))), abs=1e-5)


def test_a_task_without_rows_is_refused(train):
    with pytest.raises(
        ValueError, match="--response_tasks transcriptoin: the training has no rows of this task; expected"
    ):
        train(objective="distill", response_tasks=["transcriptoin"])


def test_more_tokens_than_there_are_is_refused(train, lsm):
    vocabulary = lsm.config.text_config.vocab_size
    with pytest.raises(ValueError, match=f"--distill_top_k {vocabulary + 1} is more than the {vocabulary} tokens"):
        train(objective="distill", distill_top_k=vocabulary + 1)


# Trainings


@pytest.mark.parametrize(
    ("llm", "options"),
    [("frozen", {}), ("lora", {}), ("full", {"distill_top_k": 5})],
)
def test_a_model_that_only_reads_has_nothing_to_learn(train, losses, llm, options, monkeypatch):
    """Teacher and student are the same LLM, so with the same prompts, the divergence is zero."""
    monkeypatch.setattr("recipes.listening.collator.SpeechResponseCollator._audio", lambda self, rows: ({}, []))
    monkeypatch.setattr(
        "recipes.listening.collator.SpeechResponseCollator.__call__",
        lambda self, rows, call=SpeechResponseCollator.__call__: call(self, [row | {"audio": None} for row in rows]),
    )
    first = losses(train(llm=llm, objective="distill", max_steps=1, **options))[0]
    assert first == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(
    ("llm", "options"),
    [
        ("frozen", {"distill_top_k": 5}),
        ("lora", {}),
        ("full", {"response_tasks": ["transcription"]}),
        ("full", {}),
    ],
)
def test_the_divergence_gets_smaller(train, losses, plain_lsm_dir, llm, options):
    settings = {"per_device_train_batch_size": 16, "learning_rate": 1e-2, "warmup_steps": 2, "max_steps": 12}
    if llm == "frozen":  # words alone can change, which a reader that was never aligned hardly does
        settings["model_name_or_path"] = str(plain_lsm_dir)
    found = losses(train(llm=llm, objective="distill", **settings, **options))
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


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"objective": "distill"},
        {"objective": "distill", "response_tasks": ["transcription"], "distill_top_k": 5},
    ],
    ids=["response", "distill", "both"],
)
def test_accumulated_batches_give_the_loss_of_one(train, losses, tmp_path, options):
    """All objectives are means over all response tokens of a step, however it is divided into batches."""
    options = {**options, "train_sampling_strategy": "sequential", "max_steps": 3}
    one = train(per_device_train_batch_size=8, output_dir=str(tmp_path / "one"), **options)
    cut = train(
        per_device_train_batch_size=2, gradient_accumulation_steps=4, output_dir=str(tmp_path / "cut"), **options
    )
    assert losses(cut) == pytest.approx(losses(one), abs=1e-4)


def test_trls_fused_head_and_labelled_positions_give_one_training(train, losses, tmp_path, monkeypatch):
    labelled = train(output_dir=str(tmp_path / "labelled"))
    monkeypatch.setattr(LsmTrainer, "_needs_trl", lambda self: True)
    fused = train(output_dir=str(tmp_path / "fused"))
    assert losses(labelled) == pytest.approx(losses(fused), abs=1e-4)
    logs = [[line for line in read_lines(run / LOG) if "loss" in line] for run in (labelled, fused)]
    accuracies = [[line["mean_token_accuracy"] for line in log] for log in logs]
    assert accuracies[0] == pytest.approx(accuracies[1])


def test_throughput_is_logged_with_the_loss(train):
    line = read_lines(train() / LOG)[1]
    assert 0 <= line["padding_tokens"] < 0.5 and 0 <= line["padding_frames"] < 0.5
    assert line["tokens_per_second"] > 0 and line["audio_seconds_per_second"] > 0
    assert 0 < line["mfu"] < 1 and line["peak_memory_gib"] > 0
