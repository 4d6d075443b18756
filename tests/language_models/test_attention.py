"""Attention on a CPU: in bfloat16 it is another way to the same results."""

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from language_models import attention
from language_models.attention import ON_CPU, attention_on_cpu
from language_models.checkpoints import open_model


class Shares(torch.nn.Module):
    """What is read of a layer: three heads share keys, and nobody sees what follows."""

    num_key_value_groups, is_causal = 3, True


def inputs(length=20, keys=20, heads=6, dtype=torch.bfloat16):
    """Queries, keys and values with gradients, and a causal mask behind padding on the left."""
    torch.manual_seed(0)
    shapes = [(2, heads, length, 8), (2, heads // 3, keys, 8), (2, heads // 3, keys, 8)]
    mask = torch.ones(length, keys, dtype=torch.bool).tril(keys - length).expand(2, 1, -1, -1).clone()
    mask[0, :, :, :3] = False
    mask[0, :, :3, :] |= torch.eye(keys, dtype=torch.bool)[:3] if length == keys else False
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes], mask


@pytest.mark.parametrize("length", [20, 1])
def test_results_and_gradients_are_those_of_torchs_attention_in_float32(length):
    half, mask = inputs(length)
    full = [part.detach().float().requires_grad_() for part in half]
    found, _ = attention_on_cpu(Shares(), *half, mask, scaling=0.3)
    wanted, _ = sdpa_attention_forward(Shares(), *full, mask, scaling=0.3)
    torch.testing.assert_close(found.float(), wanted, atol=0.03, rtol=0.02)
    direction = torch.randn_like(wanted)
    (found * direction.bfloat16()).sum().backward()
    (wanted * direction).sum().backward()
    for mine, theirs in zip(half, full, strict=True):
        torch.testing.assert_close(mine.grad.float(), theirs.grad, atol=0.1, rtol=0.05)


def test_a_row_that_sees_nothing_breaks_nothing():
    parts, mask = inputs()
    mask[0, :, 0] = False  # padding on the left
    found, _ = attention_on_cpu(Shares(), *parts, mask)
    found.sum().backward()
    assert found.isfinite().all() and all(part.grad.isfinite().all() for part in parts)


@pytest.mark.parametrize(
    ("settings", "options", "own"),
    [
        ({}, {}, False),
        ({"dtype": torch.float32}, {}, True),
        ({"keys": 30}, {}, True),
        ({}, {"position_bias": torch.zeros(1, 6, 20, 20, dtype=torch.bfloat16)}, True),
    ],
    ids=["bfloat16", "float32", "many scores", "a bias of positions"],
)
def test_torchs_own_is_kept_where_it_is_faster_or_knows_more(settings, options, own, monkeypatch):
    asked = []
    monkeypatch.setattr(attention, "MOST_SCORES", 2 * 6 * 20 * 20)
    monkeypatch.setattr(
        attention, "sdpa_attention_forward", lambda *args, **kwargs: asked.append(kwargs) or (None, None)
    )
    parts, mask = inputs(**settings)
    attention_on_cpu(Shares(), *parts, mask, **options)
    assert bool(asked) is own
    assert all(asked[0][name] is value for name, value in options.items())


def test_a_model_that_is_opened_takes_it_unless_another_was_named(lsm_dir, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    parts = ("language_model", "audio_tower", "projector")
    model = open_model(lsm_dir)
    assert {getattr(model.model, part).config._attn_implementation for part in parts} == {ON_CPU}
    model = open_model(lsm_dir, attn_implementation="sdpa")
    assert {getattr(model.model, part).config._attn_implementation for part in parts} == {"sdpa"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert open_model(lsm_dir).config._attn_implementation == "sdpa"


def test_a_batch_without_padding_still_sees_nothing_of_what_follows(lsm_dir, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = open_model(lsm_dir, dtype=torch.bfloat16).eval()
    ids = torch.randint(5, 40, (2, 12))
    other = ids.clone()
    other[:, 6:] = torch.randint(5, 40, (2, 6))
    with torch.no_grad():
        before, after = (model(input_ids=asked).logits[:, :6] for asked in (ids, other))
    torch.testing.assert_close(before, after)
