"""Tiny models, composed once per session through the recipe that users run. Everything is offline and on the CPU."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import io
import random
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from hypothesis.internal.conjecture import providers
from tiny_tokenizer import tiny_tokenizer
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)
# Hypothesis mixes in the numbers of our source: its examples would be others after every change of a constant.
providers._get_local_constants = lambda: providers._local_constants  # which are none


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory):
    """What `datasets` keeps of a test's files goes away with them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="session")
def whisper_dir(tmp_path_factory) -> Path:
    """A Whisper of width 32 with 80 mels and the usual 30 s."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("parts") / "tiny-whisper"
    config = WhisperConfig(
        d_model=32,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=32,
        vocab_size=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    model = WhisperModel(config)
    # Default weights of 0.02 leave attention all but uniform; larger ones make leaks between clips visible.
    for parameter in model.encoder.layers.parameters():
        parameter.data.mul_(4)
    model.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)
    return folder


@pytest.fixture
def reading_whisper_dir(whisper_dir, tmp_path) -> Path:
    """A Whisper with a tokenizer, and a decoder that has the sizes of a Q-Former of two layers."""
    folder = tmp_path / "reading-whisper"
    sizes = {"decoder_layers": 3, "decoder_ffn_dim": 128, "decoder_attention_heads": 4, "vocab_size": 300}
    torch.manual_seed(1)
    WhisperModel(WhisperConfig.from_pretrained(whisper_dir, **sizes, init_std=0.2)).save_pretrained(folder)
    WhisperFeatureExtractor.from_pretrained(whisper_dir).save_pretrained(folder)
    tiny_tokenizer("and is what says the ear hears speech").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llm_dir(tmp_path_factory) -> Path:
    """A Llama of width 48 with grouped queries, an untied head and a chat template."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("parts") / "tiny-llama"
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def compose_tiny():
    """`composing.compose` with a Q-Former of width 32 that listens: fresh weights of 0.02 let so little of the
    speech through that all clips would sound alike, and no leak between them would show."""
    from recipes.listening.composing import compose

    def compose_and_turn_up(audio, text, output=None, **settings):
        sizes = {"qformer_hidden": 32, "qformer_heads": 4, "qformer_ffn": 64}
        model, processor = compose(audio, text, **{**sizes, **settings})
        for parameter in model.model.projector.qformer.parameters():
            if parameter.ndim == 2:
                parameter.data.mul_(10)
        if model.config.pieces_per_token:  # a blank says nothing, and fresh weights would be blank throughout
            model.model.projector.reader.blank_bias.data.fill_(-3)
        if output is not None:
            model.save_pretrained(output)
            processor.save_pretrained(output)
        return model, processor

    return compose_and_turn_up


@pytest.fixture(scope="session")
def lsm_dir(tmp_path_factory, compose_tiny, whisper_dir, llm_dir) -> Path:
    """An LSM folder as `recipes.compose` writes it."""
    folder = tmp_path_factory.mktemp("lsm") / "tiny-lsm"
    compose_tiny(str(whisper_dir), str(llm_dir), str(folder))
    return folder


@pytest.fixture(scope="session")
def plain_lsm_dir(tmp_path_factory, compose_tiny, whisper_dir, llm_dir) -> Path:
    """With the paper's plain map to the LLM: nothing is decided about speech, so half precision is near, too."""
    folder = tmp_path_factory.mktemp("lsm") / "plain"
    compose_tiny(str(whisper_dir), str(llm_dir), str(folder), pieces_per_token=0)
    return folder


@pytest.fixture
def wide_lsm_dir(compose_tiny, whisper_dir, llm_dir, tmp_path):
    """Of widths that the CPU's 4-bit kernels take."""
    llm = LlamaConfig.from_pretrained(
        llm_dir, hidden_size=128, intermediate_size=256, head_dim=32, num_key_value_heads=4
    )
    LlamaForCausalLM(llm).save_pretrained(tmp_path / "llm")
    AutoTokenizer.from_pretrained(llm_dir).save_pretrained(tmp_path / "llm")
    compose_tiny(str(whisper_dir), str(tmp_path / "llm"), str(tmp_path / "lsm"))
    return tmp_path / "lsm"


@pytest.fixture(scope="session")
def processor(lsm_dir):
    from processing_lsm import LsmProcessor

    return LsmProcessor.from_pretrained(lsm_dir)


@pytest.fixture(scope="session")
def lsm(lsm_dir):
    """Shared by all tests: do not change its weights or its mode."""
    from modeling_lsm import LsmForConditionalGeneration

    return LsmForConditionalGeneration.from_pretrained(lsm_dir).eval()


@pytest.fixture
def clip():
    """Makes clips: `clip(seconds, seed)` is 16 kHz float32 noise under a slow envelope."""

    def make(seconds: float, seed: int = 0) -> np.ndarray:
        samples = int(seconds * 16_000)
        noise = np.random.default_rng(seed).normal(size=samples)
        envelope = 0.1 + 0.1 * np.sin(np.arange(samples) / 1500)
        return (noise * envelope).astype(np.float32)

    return make


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory) -> Path:
    """An ASR corpus as a Hub repository has it: eight clips of noise with sentences of the nano language."""
    from dataset_builders.nano.grammar import sample_sentence

    rows, draw = [], random.Random(0)
    for index in range(8):
        wav = io.BytesIO()
        noise = np.random.default_rng(index).normal(0, 0.1, 4000 + 800 * index)
        soundfile.write(wav, noise, 16_000, format="WAV", subtype="PCM_16")
        audio = {"bytes": wav.getvalue(), "path": f"utt-{index}.wav"}
        rows.append({"id": f"utt-{index}", "audio": audio, "transcript": str(sample_sentence(draw, "train"))})
    folder = tmp_path_factory.mktemp("corpora") / "noise"
    folder.mkdir()
    datasets.Dataset.from_list(rows).to_parquet(str(folder / "train.parquet"))
    return folder


@pytest.fixture(scope="module")
def hub():
    """A Hub of one's own, which must have understood all that it was asked."""
    from hub_clients import HARMLESS
    from local_hub import LocalHub

    with LocalHub() as hub:
        yield hub
        assert set(hub.unanswered) <= HARMLESS
