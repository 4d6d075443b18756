import json
from pathlib import Path

import pytest
from transformers import Blip2QFormerConfig, GPT2Config, LlamaConfig, MambaConfig, WhisperConfig

from configuration_lsm import (
    LsmConfig,
    num_audio_tokens,
    num_encoder_frames,
    num_mel_frames,
    num_positions,
    window_layout,
)


def test_defaults_are_the_papers():
    config = LsmConfig()
    qformer = config.qformer_config
    assert (qformer.num_hidden_layers, qformer.hidden_size, qformer.num_attention_heads) == (2, 768, 12)
    assert qformer.cross_attention_frequency == 1
    assert qformer.hidden_dropout_prob == qformer.attention_probs_dropout_prob == 0.0
    assert qformer.encoder_hidden_size == config.audio_config.d_model
    assert (config.window_frames, config.window_mode, config.queries_per_window) == (17, "fixed", 1)


def test_roundtrip_keeps_every_field(tmp_path):
    responder = {"model": "org/llm", "revision": "abc", "template": "0123"}
    config = LsmConfig(
        audio_config=WhisperConfig(d_model=32),
        qformer_config={"hidden_size": 24, "num_attention_heads": 2},
        text_config=LlamaConfig(hidden_size=16, num_attention_heads=2, tie_word_embeddings=True, vocab_size=50),
        window_frames=8,
        audio_token_id=49,
        responder=responder,
    )
    config.save_pretrained(tmp_path)
    loaded = LsmConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.responder == responder
    assert loaded.tie_word_embeddings
    assert loaded.qformer_config.encoder_hidden_size == 32
    assert loaded.get_text_config().hidden_size == 16
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForMultimodalLM",
        "AutoProcessor",
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window_mode": "sliding"}, "window_mode"),
        ({"context_frames": -1}, "context_frames"),
        ({"context_frames": 4, "window_mode": "proportional"}, "context_frames"),
        ({"sources": {"audio": {}}}, "sources"),
        ({"projector_only": True}, "sources"),
        ({"audio_padding": "none"}, "audio_padding"),
        ({"window_frames": 0}, "window_frames"),
        ({"window_frames": 2.5}, "window_frames"),
        ({"queries_per_window": -1}, "queries_per_window"),
        ({"audio_token_id": 100, "text_config": {"model_type": "llama", "vocab_size": 100}}, "audio_token_id"),
        ({"text_config": {"model_type": "no_such_llm"}}, "no_such_llm"),
        ({"text_config": "llama"}, "text_config"),
        ({"audio_config": LlamaConfig()}, "audio_config"),
        ({"qformer_config": LlamaConfig()}, "qformer_config"),
        ({"responder": {"model": "x"}}, "responder"),
    ],
)
def test_unusable_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LsmConfig(**settings)


def test_a_qformer_config_object_is_taken():
    config = LsmConfig(qformer_config=Blip2QFormerConfig(hidden_size=64))
    assert config.qformer_config.hidden_size == 64


@pytest.mark.parametrize(("samples", "mels", "frames"), [(1, 1, 1), (160, 1, 1), (161, 2, 1), (480_000, 3000, 1500)])
def test_lengths(samples, mels, frames):
    assert num_mel_frames(samples) == mels
    assert num_encoder_frames(mels) == frames


def test_fixed_windows_count_a_partly_filled_one():
    counts = num_audio_tokens([1, 17, 18, 1500], window_frames=17, window_mode="fixed", queries_per_window=2)
    assert counts == [2, 2, 4, 178]


@pytest.mark.parametrize(
    ("frames", "window", "count"), [([150], 2, 75), ([615], 7, 87), ([100, 375], 4, 93), ([45], 1, 45)]
)
def test_proportional_windows_are_the_original_codes(frames, window, count):
    assert window_layout(frames, 17, "proportional") == (window, [count] * len(frames))


@pytest.mark.parametrize("frames", [[], [10, 0]])
def test_rows_without_frames_are_refused(frames):
    with pytest.raises(ValueError, match="at least one"):
        window_layout(frames, 17, "fixed")


def test_the_configuration_of_another_family_is_refused(llm_dir, whisper_dir):
    for folder, family in ((llm_dir, "llama"), (whisper_dir, "whisper")):
        with pytest.raises(ValueError, match=f"'{family}' model, not of an LSM"):
            LsmConfig.from_pretrained(folder)


@pytest.mark.parametrize(
    ("config", "rope", "positions"),
    [
        (LlamaConfig, None, 4096),
        (LlamaConfig, {"rope_type": "linear", "factor": 4.0}, 4 * 4096),  # Vicuna v1.5 16k
        (LlamaConfig, {"rope_type": "dynamic", "factor": 2.0}, 2 * 4096),
        (LlamaConfig, {"rope_type": "yarn", "factor": 4.0}, 4 * 4096),  # as Qwen documents it
        (LlamaConfig, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}, 4096),
        (
            LlamaConfig,
            {
                "rope_type": "llama3",
                "factor": 32.0,
                "original_max_position_embeddings": 2048,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
            4096,
        ),
        (GPT2Config, None, 4096),
        (MambaConfig, None, None),
    ],
)
def test_positions_are_counted_as_they_are_stretched(config, rope, positions):
    limit = {} if config is MambaConfig else {"max_position_embeddings": 4096}
    theta = {"rope_parameters": {"rope_theta": 10_000.0, **rope}} if rope else {}
    assert num_positions(config(**limit, **theta)) == positions


@pytest.mark.parametrize(
    ("tokens", "mode", "seconds"), [(89, "fixed", 30), (88, "fixed", 29), (90, "proportional", 30)]
)
def test_what_fits_is_what_is_counted(tokens, mode, seconds):
    config = LsmConfig(window_mode=mode)
    assert config.seconds_that_fit(tokens) == seconds
    assert num_audio_tokens([50 * seconds], **config.windowing)[0] <= tokens
    assert config.seconds_that_fit(-tokens) == 0


def test_the_docs_say_how_long_fits():
    """Beside a prompt and an answer of 300 tokens."""
    page = (Path(__file__).parents[1] / "docs" / "use.md").read_text()
    for positions, frames in ((2048, 8), (4096, 8), (4096, 17)):
        seconds = LsmConfig(window_frames=frames).seconds_that_fit(positions - 300)
        assert f"{seconds // 60} minutes" in page
