"""Learning from what the LSM itself answers."""

import copy
from types import SimpleNamespace

import pytest
import torch

from recipes.collator import SpeechResponseCollator
from recipes.speech_llm import Lsm
from recipes.training.on_policy import LONGER, with_own_answers
from recipes.training.trainer import LsmTrainer


@pytest.fixture
def swapped(lsm, processor, answered):
    """`swapped(rows)`: the batch of the collator, and the same with answers of a model that is all but sure of them."""
    sure = copy.deepcopy(lsm)
    sure.lm_head.weight.data *= 1000

    def swap(rows=None) -> tuple[dict, dict, dict]:
        batch = SpeechResponseCollator(processor, teacher=True)(answered)
        teacher = {name.removeprefix("teacher_"): batch.pop(name) for name in list(batch) if "teacher_" in name}
        return batch, *with_own_answers(sure, processor, batch, teacher, rows)

    return swap


def responses(batch) -> list[list[int]]:
    return [row[row != -100].tolist() for row in batch["labels"]]


def test_a_response_is_what_the_model_answers_to_what_it_hears(swapped, lsm, processor, answered):
    before, after, _ = swapped()
    longest = max(map(len, responses(before))) + LONGER
    replies = Lsm(copy.deepcopy(lsm), processor).respond(answered, max_new_tokens=longest, progress=False)
    found = processor.tokenizer.batch_decode(responses(after), skip_special_tokens=True)
    assert [text.strip() for text in found] == [reply.text for reply in replies]
    assert max(map(len, responses(after))) <= longest


def test_the_teacher_reads_the_same_answers_after_its_own_prompts(swapped, processor, answered):
    before, after, teacher = swapped()
    assert responses(teacher) == responses(after) != responses(before)
    for index, row in enumerate(answered):
        ids, labels = after["input_ids"][index], after["labels"][index]
        prompt = int((labels != -100).int().argmax())
        assert torch.equal(ids[:prompt], before["input_ids"][index][:prompt])
        assert torch.equal(ids[labels != -100], labels[labels != -100])
        assert after["attention_mask"][index].sum() == prompt + (labels != -100).sum()
        assert row["transcript"] in processor.tokenizer.decode(teacher["input_ids"][index])


def test_rows_without_a_teacher_keep_their_responses(lsm, processor, answered):
    rows = [row | {"task": "transcription" if row["id"] in "13" else "quiz"} for row in answered]
    batch = SpeechResponseCollator(processor, teacher=True, response_tasks={"transcription"})(rows)
    teacher = {name.removeprefix("teacher_"): batch.pop(name) for name in list(batch) if "teacher_" in name}
    after, teacher = with_own_answers(lsm, processor, batch, teacher, teacher.pop("rows"))
    kept, own = responses(batch), responses(after)
    assert [own[index] == kept[index] for index in range(4)] == [False, True, False, True]
    assert responses(teacher) == [own[0], own[2]]


def test_an_answer_ends_with_its_end(lsm, processor, answered, monkeypatch):
    end, audio = processor.tokenizer.eos_token_id, processor.audio_token_id
    written = torch.tensor([[7, end, 0, 0], [7, 8, end, end], [end, 0, 0, 0], [7, 8, 9, 10]])
    given = {}

    def generate(input_ids, **settings):
        given.update(settings)
        return torch.cat([input_ids, written], dim=1)

    monkeypatch.setattr(lsm, "generate", generate, raising=False)
    batch = SpeechResponseCollator(processor)(answered)
    after, _ = with_own_answers(lsm, processor, batch, batch, None)
    assert responses(after) == [[7, end], [7, 8, end], [end], [7, 8, 9, 10]]
    assert given["suppress_tokens"] == [audio] and given["temperature"] == 1.0


def test_all_batches_of_a_step_are_answered_or_none(train, losses, tmp_path, monkeypatch):
    answered_at, steps = [], []

    def look(self):
        steps.append(self.state.global_step)
        answered_at.append(drawn(self))
        return answered_at[-1]

    drawn = LsmTrainer._is_on_policy
    monkeypatch.setattr(LsmTrainer, "_is_on_policy", look)
    options = {"objective": "distill", "llm": "lora", "on_policy": 0.3, "gradient_accumulation_steps": 2}
    options |= {"per_device_train_batch_size": 2, "max_steps": 4}
    once = train(output_dir=str(tmp_path / "once"), **options)
    assert steps == [0, 0, 1, 1, 2, 2, 3, 3]
    assert answered_at[::2] == answered_at[1::2] and 0 < sum(answered_at) < 8
    assert losses(train(output_dir=str(tmp_path / "again"), **options)) == pytest.approx(losses(once), abs=1e-6)


@pytest.mark.parametrize("sharding", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_a_model_in_parts_is_refused(lsm, sharding):
    args = SimpleNamespace(on_policy=0.5, distill_top_k=None)
    trainer = {"model": lsm, "args": args, "is_fsdp_enabled": False, "is_deepspeed_enabled": False, sharding: True}
    with pytest.raises(ValueError, match="--on_policy 0.5 needs the whole LLM on each device"):
        LsmTrainer._check_objective(SimpleNamespace(**trainer))
