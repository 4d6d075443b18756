"""The calls of vLLM's backend for transformers models (0.32), which serves an LSM without a plugin. Its answers are
compared with those of transformers by `benchmarks/vllm_answers.py`, with vLLM itself."""

import pytest
import torch
from transformers import AutoModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_lsm import LsmModel
from processing_lsm import AUDIO_TOKEN


@pytest.fixture
def served(lsm, monkeypatch):
    """The base model that vLLM makes, with the weights of the LSM."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "vllm", sdpa_attention_forward)
    config = type(lsm.config).from_dict(lsm.config.to_dict())
    config.text_config._attn_implementation = "vllm"
    with torch.device("meta"):
        model = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=True)
    model.to_empty(device="cpu").load_state_dict(lsm.model.state_dict())
    return model.eval()


def test_vllm_gets_the_base_model_and_users_the_one_that_answers(lsm, served):
    assert type(served) is LsmModel
    assert type(AutoModel.from_config(lsm.config)) is type(lsm)
    assert served.get_encoder(modality="audio") is served.audio_tower
    assert served.get_decoder() is served.language_model
    assert type(lsm)._supports_attention_backend


def ask_as_vllm(processor, clips) -> dict:
    return processor(
        text=" ".join([AUDIO_TOKEN] * len(clips)),
        audio=clips,
        return_tensors="pt",
        return_text_replacement_offsets=True,
    )


@torch.no_grad()
@pytest.mark.parametrize("seconds", [(1, 1), (30, 30), (31, 31), (65.3,), (60,)])
def test_each_clip_has_one_row_of_features(lsm, served, processor, clip, seconds):
    clips = [clip(length, seed) for seed, length in enumerate(seconds)]
    inputs = ask_as_vllm(processor, clips)
    features, mask = inputs["input_features"], inputs["input_features_mask"]
    assert len(features) == len(mask) == len(clips)
    counts = [entry["replacement"].count(AUDIO_TOKEN) for entry in inputs["text_replacement_offsets"][0]]
    assert counts == processor.num_audio_tokens([len(audio) for audio in clips])
    expected = lsm.get_audio_features(**processor(audio=clips, return_tensors="pt")).pooler_output
    heard = served.get_audio_features(features, input_features_mask=mask, return_dict=True).pooler_output
    torch.testing.assert_close(heard, expected)
    assert len(heard) == sum(counts)


@torch.no_grad()
def test_clips_of_several_prompts_are_heard_one_at_a_time_each_with_a_list_of_its_mask(lsm, served, processor, clip):
    for audio in (clip(1, 1), clip(4, 2), clip(40, 3)):
        inputs = ask_as_vllm(processor, [audio])
        row, masks = inputs["input_features"][0], [inputs["input_features_mask"][0]]
        heard = served.get_audio_features(row[None], return_dict=True, input_features_mask=masks).pooler_output
        expected = lsm.get_audio_features(**processor(audio=[audio], return_tensors="pt")).pooler_output
        torch.testing.assert_close(heard, expected)


def test_a_row_without_a_mask_is_real_throughout(lsm, processor, clip):
    inputs = ask_as_vllm(processor, [clip(45)])
    whole = lsm.get_audio_features(inputs["input_features"]).num_tokens
    assert torch.equal(whole, torch.tensor(processor.num_audio_tokens([16_000 * 30]) * 2))


def test_a_long_clip_beside_another_is_refused_because_vllm_would_use_its_first_chunk_only(processor, clip):
    with pytest.raises(ValueError, match=r"vLLM takes clips of more than 30 s only if .* a prompt of its own"):
        ask_as_vllm(processor, [clip(31), clip(2)])


@torch.no_grad()
def test_a_row_has_the_tokens_of_many_prompts(lsm, served, monkeypatch):
    """They may be more than the LLM has positions; vLLM checks each prompt itself."""
    monkeypatch.setattr(served.config.text_config, "max_position_embeddings", 8)
    monkeypatch.setattr(lsm.config.text_config, "max_position_embeddings", 8)
    embeddings = torch.zeros(1, 10, lsm.config.text_config.hidden_size)
    positions = torch.arange(10)[None] % 5
    assert served(inputs_embeds=embeddings, position_ids=positions).last_hidden_state.shape[1] == 10
    with pytest.raises(ValueError, match="takes 10 tokens"):
        lsm(inputs_embeds=embeddings, position_ids=positions)
