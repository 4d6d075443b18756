"""The cost of a row equals the FLOPs that torch counts."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from modeling_lsm import LsmForConditionalGeneration
from recipes.training.costs import Costs


@pytest.mark.parametrize("llm", ["full", "frozen"])
def test_the_cost_is_what_torch_counts(lsm_dir, processor, clip, llm):
    model = LsmForConditionalGeneration.from_pretrained(lsm_dir, attn_implementation="eager").train()
    if llm == "frozen":
        model.model.language_model.requires_grad_(False)
        model.lm_head.requires_grad_(False)
    inputs = processor(text=f"{processor.audio_token} what is said?", audio=clip(8.2), return_tensors="pt")
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == processor.audio_token_id, -100)
    counter = FlopCounterMode(display=False)
    with counter:
        model(**inputs, labels=labels, use_cache=False).loss.backward()

    costs = Costs.of(model, llm)
    costs = dataclasses.replace(costs, token_pair=2 * costs.token_pair)  # eager attention computes all pairs
    length = inputs["input_ids"].shape[1]
    speech = int((inputs["input_ids"] == processor.audio_token_id).sum())
    frames = torch.tensor([(inputs["input_features"].shape[-1] + 1) // 2])
    # without the fused head, all positions have logits
    assert costs.row(frames, speech, length, length).item() == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_only_shapes_are_read(lsm, lsm_dir):
    with torch.device("meta"):
        empty = LsmForConditionalGeneration(lsm.config)
    assert Costs.of(empty, "full") == Costs.of(lsm, "full")


def test_what_is_read_from_disk_costs_nothing_to_encode(lsm):
    encoded, stored = Costs.of(lsm, "full"), Costs.of(lsm, "full", stored=True)
    assert stored.frame < encoded.frame and stored.frame_pair == 0 and stored.token == encoded.token


def test_an_llm_that_does_not_learn_costs_two_thirds(lsm):
    assert Costs.of(lsm, "lora").token == pytest.approx(Costs.of(lsm, "full").token * 2 / 3)


def test_chunks_of_a_long_clip_do_not_see_one_another(lsm):
    costs, minute = Costs.of(lsm, "full"), torch.tensor([1500, 3000])
    half, whole = costs.row(minute, 0, 0, 0).tolist()
    assert whole == pytest.approx(2 * half)
