import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, WhisperModel

from configuration_lsm import LsmConfig
from modeling_lsm import LsmForConditionalGeneration, LsmModel, LsmProjector, LsmWindowAttention
from processing_lsm import AUDIO_TOKEN

TOLERANCE = 1e-5


def prompt(processor, clips, text="Repeat: {}", **kwargs):
    """One prompt per clip."""
    texts = [text.format(AUDIO_TOKEN) + " !" * row for row in range(len(clips))]
    return processor(text=texts, audio=clips, return_tensors="pt", **kwargs)


def close(actual, expected, tolerance=TOLERANCE):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


# Audio tower and projector


@torch.no_grad()
def test_full_length_is_whispers_encoder(lsm, whisper_dir, processor, clip):
    features = torch.from_numpy(processor.audio_features([clip(30)])["input_features"])
    expected = WhisperModel.from_pretrained(whisper_dir).eval().encoder(features).last_hidden_state
    mask = torch.ones(1, 3000, dtype=torch.long)
    close(lsm.model.audio_tower(features, attention_mask=mask).last_hidden_state, expected)
    close(lsm.model.audio_tower(features).last_hidden_state, expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_clip_does_not_depend_on_its_neighbours(lsm_dir, processor, clip, attention):
    lsm = LsmForConditionalGeneration.from_pretrained(lsm_dir, attn_implementation=attention)
    clips = [clip(seconds, seed) for seed, seconds in enumerate([0.01, 1.0, 4.37, 2.22, 31.0])]
    together = lsm.get_audio_features(**audio_inputs(processor, clips))
    rows = iter(together.pooler_output.split(together.num_tokens.tolist()))
    for audio in clips:
        alone = lsm.get_audio_features(**audio_inputs(processor, [audio]))
        expected = torch.cat([next(rows) for _ in alone.num_tokens])
        close(alone.pooler_output, expected)


def audio_inputs(processor, clips):
    return {name: torch.from_numpy(value) for name, value in processor.audio_features(clips).items()}


def test_padding_is_never_heard(lsm, processor, clip):
    inputs = audio_inputs(processor, [clip(1.0), clip(2.0)])
    expected = lsm.get_audio_features(**inputs).pooler_output
    noise = 50 * torch.randn_like(inputs["input_features"])
    mask = inputs["input_features_mask"]
    inputs["input_features"] = torch.where(mask[:, None] == 1, inputs["input_features"], noise)
    close(lsm.get_audio_features(**inputs).pooler_output, expected)


@pytest.mark.parametrize("mode", ["fixed", "proportional"])
@pytest.mark.parametrize(("window", "queries"), [(17, 1), (5, 3)])
def test_processor_and_model_count_alike(lsm_dir, lsm, processor, mode, window, queries):
    settings = {"window_frames": window, "window_mode": mode, "queries_per_window": queries}
    counter = type(processor).from_pretrained(lsm_dir, **settings)
    config = LsmConfig.from_pretrained(lsm_dir, **settings)
    projector = type(lsm.model.projector)(config)
    lengths = [1, 159, 160, 161, 320, 5439, 5440, 5441, 16_000, 99_999, 479_999, 480_000]
    for batch in [[length] for length in lengths] + [lengths]:
        frames = [-(-length // 320) for length in batch]
        speech = projector(torch.zeros(len(batch), max(frames), 32), frames)
        assert speech.shape[0] == sum(counter.num_audio_tokens(batch))


@pytest.fixture
def with_context(lsm):
    """A projector whose tokens see 5 frames before and behind their windows of 8."""
    torch.manual_seed(0)
    settings = {"window_frames": 8, "context_frames": 5, "pieces_per_token": 0}
    projector = LsmProjector(LsmConfig(**{**lsm.config.to_dict(), **settings})).eval()
    for weight in projector.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return projector


@torch.no_grad()
def test_a_token_sees_its_context_and_no_more(with_context):
    frames = torch.randn(1, 40, 32)
    before = with_context(frames, [40])
    for place, seen in {2: {0}, 10: {0, 1}, 11: {0, 1, 2}, 30: {3, 4}}.items():  # window 1 sees frames 3 to 20
        changed = frames.clone()
        changed[0, place] = torch.randn(32)
        moved = (with_context(changed, [40]) - before).abs().amax(-1) > 1e-4
        assert set(moved.nonzero()[:, 0].tolist()) == seen


@torch.no_grad()
def test_a_token_tells_what_comes_before_from_what_comes_behind(with_context):
    frames = torch.randn(1, 18, 32)
    assert (with_context(frames.flip(1), [18])[1] - with_context(frames, [18])[1]).abs().max() > 1e-2


@torch.no_grad()
def test_context_is_of_the_clip_alone(with_context):
    """Neither padding nor another clip is heard."""
    frames = 5 * torch.randn(2, 60, 32)
    together = with_context(frames, [21, 60])
    close(together[:3], with_context(frames[:1, :21], [21]))
    close(together[3:], with_context(frames[1:], [60]))


def test_only_windows_with_real_frames_run(lsm, processor, clip):
    rows = []
    handle = lsm.model.projector.qformer.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["encoder_hidden_states"].shape[0]), with_kwargs=True
    )
    lsm.get_audio_features(**audio_inputs(processor, [clip(0.1), clip(30)]))
    handle.remove()
    assert rows == [1 + 89]


def windows_read(projector, frames) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Two clips' speech embeddings, and the gradients of a loss on them."""
    projector.zero_grad()
    speech = projector(frames, [60, 38])  # 17 goes into neither: both end in a window that is partly padding
    (speech * torch.linspace(-1, 1, speech.numel()).view_as(speech)).sum().backward()
    return speech.detach(), {name: weight.grad.clone() for name, weight in projector.named_parameters()}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("queries", [1, 3])
def test_windows_are_read_as_the_library_reads_them(lsm, attention, queries, monkeypatch):
    torch.manual_seed(0)
    config = LsmConfig(**{**lsm.config.to_dict(), "queries_per_window": queries, "pieces_per_token": 0})
    config.qformer_config._attn_implementation = attention
    projector = LsmProjector(config).train()
    for weight in projector.parameters():
        torch.nn.init.normal_(weight, std=0.3)  # biases, too
    frames = torch.randn(2, 60, config.audio_config.d_model)
    speech, gradients = windows_read(projector, frames)
    monkeypatch.setattr(LsmWindowAttention, "_has_weights_at", lambda self, frames: False)
    expected_speech, expected_gradients = windows_read(projector, frames)
    torch.testing.assert_close(speech, expected_speech, atol=1e-4, rtol=1e-4)
    assert gradients.keys() == expected_gradients.keys()
    for name, expected in expected_gradients.items():
        scale = max(1.0, expected.abs().max())
        torch.testing.assert_close(gradients[name] / scale, expected / scale, atol=1e-4, rtol=1e-4, msg=name)


@torch.no_grad()
def test_in_bfloat16_windows_are_read_as_exactly_as_by_the_library(lsm, monkeypatch):
    """With loud weights, so that scores are large: rounded to bfloat16, they made 1.4 times the library's error."""
    torch.manual_seed(0)
    reader = LsmWindowAttention(lsm.model.projector.qformer.config, is_cross_attention=True).eval()
    for weight in reader.parameters():
        torch.nn.init.normal_(weight, std=0.8)
    half, exact = reader.bfloat16(), copy.deepcopy(reader.bfloat16()).double()
    queries, frames = torch.randn(200, 1, 32).bfloat16(), torch.randn(200, 17, 32).bfloat16()
    found = half(queries, None, frames)[0].double()
    monkeypatch.setattr(LsmWindowAttention, "_has_weights_at", lambda self, frames: False)
    library = half(queries, None, frames)[0].double()
    wanted = exact(queries.double(), None, frames.double())[0]
    assert (found - wanted).norm() < 1.2 * (library - wanted).norm()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_projector_in_half_precision_computes_in_float32(lsm_dir, dtype):
    """Only its output is rounded. When each layer was, the errors were several times as large, and in bfloat16, speech
    differed by up to 2 % from that beside other clips."""
    torch.manual_seed(0)
    frames = torch.randn(2, 60, 32).to(dtype)
    projector = LsmForConditionalGeneration.from_pretrained(lsm_dir, dtype=dtype).eval().model.projector
    heard = projector(frames, [60, 38])
    assert heard.dtype == dtype
    expected = copy.deepcopy(projector).double()(frames.double(), [60, 38])
    assert ((heard - expected).norm(dim=-1) / expected.norm(dim=-1)).max() < torch.finfo(dtype).eps / 2


@torch.no_grad()
def test_layers_that_another_library_has_replaced_get_the_dtype_of_the_weights(lsm_dir, processor, clip):
    """vLLM replaces linear maps by its own, which take no other."""
    model = LsmForConditionalGeneration.from_pretrained(lsm_dir, dtype=torch.bfloat16).eval()
    inputs = audio_inputs(processor, [clip(1.3), clip(3)])
    expected = model.get_audio_features(**inputs).pooler_output
    projector = model.model.projector
    for name, module in list(projector.named_modules()):
        if isinstance(module, torch.nn.Linear):
            other = torch.nn.Linear(module.in_features, module.out_features, dtype=torch.bfloat16)
            other.load_state_dict(module.state_dict())
            projector.set_submodule(name, other)
    heard = model.get_audio_features(**inputs).pooler_output
    assert heard.dtype == expected.dtype == torch.bfloat16
    assert projector.compute_dtype == torch.bfloat16


@torch.no_grad()
def test_the_projector_is_quantised_with_the_model(wide_lsm_dir, processor, clip, tmp_path):
    """By libraries that look for `nn.Linear`; a checkpoint of theirs is loaded as it was saved."""
    config = BitsAndBytesConfig(load_in_8bit=True)
    model = LsmForConditionalGeneration.from_pretrained(wide_lsm_dir, quantization_config=config, dtype=torch.bfloat16)
    assert model.model.projector.linear.weight.dtype == torch.int8
    inputs = audio_inputs(processor, [clip(1.3)])
    expected = model.get_audio_features(**inputs).pooler_output
    model.save_pretrained(tmp_path / "quantised")
    again = LsmForConditionalGeneration.from_pretrained(tmp_path / "quantised")
    torch.testing.assert_close(again.get_audio_features(**inputs).pooler_output, expected)


@torch.no_grad()
def test_a_fresh_adapter_of_a_projector_in_half_precision_changes_little(lsm_dir, processor, clip):
    """The adapted layers still compute in float32. Keys and values are computed for every frame then, so the results
    are not the same bit by bit."""
    model = LsmForConditionalGeneration.from_pretrained(lsm_dir, dtype=torch.bfloat16).eval()
    inputs = audio_inputs(processor, [clip(1.3), clip(3)])
    expected = model.model.projector(*model.model.encode_audio(**inputs))
    adapted = get_peft_model(model, LoraConfig(target_modules=r".*projector.*\.(query|key|value|dense)")).eval()
    heard = adapted.base_model.model.model.projector(*model.model.encode_audio(**inputs))
    assert (heard - expected).norm() < torch.finfo(torch.bfloat16).eps / 2 * expected.norm()


def test_matrices_that_are_more_than_weights_are_asked_as_modules(lsm_dir, lsm, processor, clip):
    """An adapter, say, or what is in 4 bits: then every frame is projected, as the library does it."""

    class Doubled(torch.nn.Linear):
        def forward(self, frames):
            return 2 * super().forward(frames)

    inputs = audio_inputs(processor, [clip(1.3), clip(3)])
    model = LsmForConditionalGeneration.from_pretrained(lsm_dir).eval()
    reader = model.model.projector.qformer.encoder.layer[0].crossattention.attention
    reader.value.weight.data /= 2
    reader.value.bias.data /= 2
    reader.value.__class__ = Doubled
    with torch.no_grad():
        close(model.get_audio_features(**inputs).pooler_output, lsm.get_audio_features(**inputs).pooler_output)


def test_clips_longer_than_the_encoder_are_refused(lsm):
    with pytest.raises(ValueError, match="at most 3000 frames, got 3001"):
        lsm.model.audio_tower(torch.zeros(1, 80, 3001))


def test_max_length_hears_the_silence_as_whisper_does(lsm_dir, whisper_dir, processor, clip):
    lsm = LsmForConditionalGeneration.from_pretrained(lsm_dir)
    lsm.config.audio_padding = "max_length"
    counter = type(processor).from_pretrained(lsm_dir, audio_padding="max_length")
    inputs = audio_inputs(counter, [clip(2)])
    encoder = WhisperModel.from_pretrained(whisper_dir).eval().encoder
    expected = encoder(inputs["input_features"]).last_hidden_state
    output = lsm.get_audio_features(**inputs)
    close(output.last_hidden_state, expected)
    assert output.num_tokens.tolist() == [6]


# Prompts


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_equals_single(lsm_dir, processor, clip, side):
    """In float64: of what float32 rounds in the reader, an LLM of such large random weights makes 2e-5."""
    lsm = LsmForConditionalGeneration.from_pretrained(lsm_dir, dtype=torch.float64).eval()
    clips = [clip(0.6, 1), clip(3.3, 2), clip(1.9, 3)]
    batch = prompt(processor, clips, padding_side=side)
    logits = lsm(**batch).logits
    for row, audio in enumerate(clips):
        text = processor.tokenizer.decode(batch["input_ids"][row][batch["attention_mask"][row] == 1])
        single = prompt(processor, [audio], text="Repeat: {}" + " !" * row)
        assert processor.tokenizer.decode(single["input_ids"][0]) == text
        close(logits[row][batch["attention_mask"][row] == 1], lsm(**single).logits[0])


@torch.no_grad()
def test_precomputed_audio_is_the_same(lsm, processor, clip):
    inputs = prompt(processor, [clip(0.6, 1), clip(2.5, 2)])
    expected = lsm(**inputs).logits
    tower = lsm.get_audio_features(inputs["input_features"], inputs["input_features_mask"]).last_hidden_state
    generated = lsm.generate(**inputs, max_new_tokens=4, do_sample=False)
    inputs["audio_hidden_states"] = tower
    del inputs["input_features"]
    close(lsm(**inputs).logits, expected)
    assert torch.equal(lsm.generate(**inputs, max_new_tokens=4, do_sample=False), generated)


@torch.no_grad()
def test_text_only_is_the_llm(lsm, llm_dir, processor):
    llm = AutoModelForCausalLM.from_pretrained(llm_dir)
    inputs = processor(text=["what is asked", "the speech"], return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}
    vocab = llm.config.vocab_size
    close(lsm(**inputs).logits[..., :vocab], llm(**inputs).logits)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 1}
    assert torch.equal(lsm.generate(**inputs, **settings), llm.generate(**inputs, **settings))


def test_one_batch_may_mix_text_and_speech(lsm, processor, clip):
    inputs = processor(text=["text only", f"{AUDIO_TOKEN}?"], audio=[clip(1)], return_tensors="pt")
    alone = processor(text=["text only"], return_tensors="pt")
    logits = lsm(**inputs).logits[0][inputs["attention_mask"][0] == 1]
    close(logits, lsm(**alone).logits[0])


def test_another_count_is_an_error_with_both_numbers(lsm, processor, clip):
    inputs = prompt(processor, [clip(1)])
    fewer = inputs["input_ids"].clone()
    fewer[fewer == processor.audio_token_id] = torch.tensor([processor.audio_token_id, 5, 5])
    with pytest.raises(ValueError, match=r"has 1 audio placeholder.* has 3 embeddings"):
        lsm(**{**inputs, "input_ids": fewer})
    with pytest.raises(ValueError, match=r"has 3 audio placeholder.* has 0 embeddings"):
        lsm(input_ids=inputs["input_ids"])
    with pytest.raises(ValueError, match=r"has 0 audio placeholder.* has 3 embeddings"):
        lsm(**{**inputs, "input_ids": torch.full((1, 4), 5), "attention_mask": None})


def test_inputs_that_exclude_each_other(lsm, processor, clip):
    inputs = prompt(processor, [clip(1)])
    tower = torch.zeros(1, 50, 32)
    embeds = torch.zeros(1, 4, 48)
    for wrong in (
        {**inputs, "audio_hidden_states": tower},
        {"input_ids": inputs["input_ids"], "inputs_embeds": embeds},
        {"inputs_embeds": embeds, "audio_hidden_states": tower},
        {},
    ):
        with pytest.raises(ValueError, match=r"[Gg]ive exactly one|needs `input_ids`"):
            lsm(**wrong)


def test_a_mask_of_other_audio_is_refused(lsm):
    tower = torch.zeros(2, 50, 32)
    for mask in (torch.ones(1, 100), torch.ones(2, 103)):
        with pytest.raises(ValueError, match=r"has 2 of up to 50"):
            lsm.get_audio_features(input_features_mask=mask.long(), audio_hidden_states=tower)


def test_empty_inputs_are_refused(lsm):
    for shape in ((0, 4), (1, 0)):
        with pytest.raises(ValueError, match="prompt is empty"):
            lsm(input_ids=torch.zeros(shape, dtype=torch.long))
    for shape in ((0, 80, 100), (1, 80, 0), (80, 100)):
        with pytest.raises(ValueError, match="none of them empty, got shape"):
            lsm.get_audio_features(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"at least one encoder frame.*\[50, 0\]"):
        mask = torch.tensor([[1] * 100, [0] * 100])
        lsm.get_audio_features(torch.zeros(2, 80, 100), mask)


# Generation


def test_generation_of_a_batch_is_that_of_each(lsm, processor, clip):
    clips = [clip(0.6, 1), clip(3.3, 2)]
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    batch = lsm.generate(**prompt(processor, clips), **settings)[:, -6:]
    for row, audio in enumerate(clips):
        single = lsm.generate(**prompt(processor, [audio], text="Repeat: {}" + " !" * row), **settings)
        assert torch.equal(single[0, -6:], batch[row])


def test_a_static_cache_gives_the_same(lsm, processor, clip):
    inputs = prompt(processor, [clip(0.6, 1), clip(3.3, 2)])
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    static = lsm.generate(**inputs, **settings, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, lsm.generate(**inputs, **settings))


@pytest.mark.parametrize("use_cache", [True, False])
def test_audio_is_heard_once_with_a_cache_and_without(lsm, processor, clip, use_cache):
    calls = []
    handle = lsm.model.projector.register_forward_pre_hook(lambda *args: calls.append(1))
    output = lsm.generate(**prompt(processor, [clip(1)]), max_new_tokens=4, min_new_tokens=4, use_cache=use_cache)
    handle.remove()
    assert len(calls) == 1
    assert processor.audio_token_id not in output[0, -4:]


def test_beams_keep_the_rows_of_a_long_clip_together(lsm, processor, clip):
    inputs = processor(
        text=[AUDIO_TOKEN, "none", f"{AUDIO_TOKEN}{AUDIO_TOKEN}"],
        audio=[clip(31, 1), clip(1, 2), clip(2, 3)],
        return_tensors="pt",
    )
    kwargs = {name: value for name, value in inputs.items() if name != "input_ids"}
    ids, kwargs = lsm._expand_inputs_for_generation(expand_size=2, input_ids=inputs["input_ids"], **kwargs)
    rows = torch.tensor([0, 1, 0, 1, 2, 3, 2, 3])
    assert torch.equal(kwargs["input_features"], inputs["input_features"][rows])
    assert torch.equal(ids, inputs["input_ids"].repeat_interleave(2, dim=0))
    expected = lsm.generate(**inputs, max_new_tokens=3, do_sample=False)
    sequences = lsm.generate(**inputs, max_new_tokens=3, do_sample=True, top_k=1, num_return_sequences=2)
    assert torch.equal(sequences[::2], expected)
    assert torch.equal(sequences[1::2], expected)


# Training


def training_batch(processor, clip):
    inputs = prompt(processor, [clip(0.6, 1), clip(1.2, 2)], padding_side="right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return {**inputs, "labels": labels.masked_fill(labels == processor.audio_token_id, -100)}


@pytest.mark.filterwarnings("ignore:.*checkpointing.*:FutureWarning")  # renamed in transformers 5.23
def test_the_tower_is_frozen_even_in_training(lsm_dir, processor, clip):
    lsm = LsmForConditionalGeneration.from_pretrained(lsm_dir).train()
    assert lsm.training
    assert not any(module.training for module in lsm.model.audio_tower.modules())
    lsm.gradient_checkpointing_enable()
    lsm.enable_input_require_grads()
    lsm(**training_batch(processor, clip), use_cache=False).loss.backward()
    for name, parameter in lsm.named_parameters():
        if "audio_tower" in name:
            assert not parameter.requires_grad and parameter.grad is None, name
        elif "projector" in name and "attention.attention.key.bias" not in name:
            assert parameter.grad is not None, name
    assert lsm.model.projector.queries.grad.abs().sum() > 0


def test_loss_takes_the_number_of_items(lsm, processor, clip):
    batch = training_batch(processor, clip)
    mean = lsm(**batch).loss
    items = (batch["labels"][:, 1:] != -100).sum()
    close(lsm(**batch, num_items_in_batch=2 * items).loss, mean / 2)


def test_trl_may_take_the_body_and_the_head_apart(lsm, processor, clip):
    batch = training_batch(processor, clip)
    labels = batch.pop("labels")
    hidden = lsm.model(**batch).last_hidden_state
    logits = torch.nn.functional.linear(hidden, lsm.get_output_embeddings().weight)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    close(loss, lsm(**batch, labels=labels).loss)
    assert lsm.base_model is lsm.model
    assert lsm.get_decoder() is not None


def test_logits_to_keep_and_attentions(lsm_dir, processor, clip):
    lsm = LsmForConditionalGeneration.from_pretrained(lsm_dir, attn_implementation="eager")
    inputs = prompt(processor, [clip(1)])
    full = lsm(**inputs, output_attentions=True, output_hidden_states=True)
    length = inputs["input_ids"].shape[1]
    assert [attention.shape for attention in full.attentions] == [(1, 4, length, length)] * 2
    assert len(full.hidden_states) == 3
    close(lsm(**inputs, logits_to_keep=2).logits, full.logits[:, -2:])
    assert isinstance(lsm(**inputs, return_dict=False), tuple)


def test_queries_start_with_unit_variance(lsm):
    projector = lsm.model.projector
    wide = type(projector)(LsmConfig(**{**lsm.config.to_dict(), "queries_per_window": 64}))
    assert 0.9 < wide.queries.std() < 1.1
    assert 0.015 < wide.qformer.encoder.layer[0].attention.attention.query.weight.std() < 0.025


# Checkpoints


def test_checkpoints_that_do_not_fit_are_refused(lsm_dir, lsm, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(lsm_dir, folder)
    weights = load_file(folder / "model.safetensors")
    taken = weights.pop("model.projector.linear.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing_keys: \['model.projector.linear.weight'\]"):
        LsmForConditionalGeneration.from_pretrained(folder)
    weights["model.projector.linear.weight"], weights["stray"] = taken, torch.zeros(1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"unexpected_keys: \['stray'\]"):
        LsmForConditionalGeneration.from_pretrained(folder)


def test_bfloat16_runs(lsm_dir, processor, clip):
    lsm = LsmForConditionalGeneration.from_pretrained(lsm_dir, dtype=torch.bfloat16)
    loss = lsm(**training_batch(processor, clip)).loss
    assert loss.isfinite()
    assert {parameter.dtype for parameter in lsm.parameters()} == {torch.bfloat16}


FRESH = """
import json, sys
import numpy as np, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoProcessor
torch.set_num_threads(1)
source, target = sys.argv[1:]
trust = {"trust_remote_code": True}
processor = AutoProcessor.from_pretrained(source, **trust)
inputs = processor(text="Repeat: <|audio|>", audio=np.sin(np.arange(9000) / 20), return_tensors="pt")
sums = []
for auto in (AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM):
    model = auto.from_pretrained(source, **trust).eval()
    sums.append(model(**inputs).logits.double().abs().sum().item())
assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
assert type(processor).__module__.startswith("transformers_modules"), type(processor).__module__
assert AutoConfig.from_pretrained(source, **trust).model_type == "lsm"
model.save_pretrained(target)
processor.save_pretrained(target)
print(json.dumps({"sums": sums, "hash": processor.template_hash}))
"""


def fresh_process(source: Path, target: Path, tmp_path: Path) -> dict:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    result = subprocess.run(
        [sys.executable, "-c", FRESH, str(source), str(target)],
        env=environment, cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@torch.no_grad()
def test_a_fresh_process_loads_saves_and_loads_again(lsm_dir, lsm, processor, tmp_path):
    inputs = processor(text=f"Repeat: {AUDIO_TOKEN}", audio=np.sin(np.arange(9000) / 20), return_tensors="pt")
    expected = lsm(**inputs).logits.double().abs().sum().item()
    first = fresh_process(lsm_dir, tmp_path / "again", tmp_path)
    second = fresh_process(tmp_path / "again", tmp_path / "thrice", tmp_path)
    for found in (first, second):
        assert found["sums"] == pytest.approx([expected] * 3, rel=1e-5)
        assert found["hash"] == processor.template_hash
    for name in ("config.json", "processor_config.json", "chat_template.jinja", "modeling_lsm.py"):
        assert (tmp_path / "again" / name).read_text() == (lsm_dir / name).read_text(), name


def test_the_body_is_a_model_of_its_own(lsm, processor, clip):
    inputs = prompt(processor, [clip(1)])
    assert isinstance(lsm.model, LsmModel)
    assert lsm.model(**inputs).last_hidden_state.shape == (*inputs["input_ids"].shape, 48)
