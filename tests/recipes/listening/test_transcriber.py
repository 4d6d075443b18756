"""A recogniser stands where a speech LLM may: a tiny random Whisper of the real class."""

import shutil

import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

from recipes.listening.speech_llm import Lsm
from recipes.listening.transcriber import Transcriber, load_recogniser


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    """A Whisper with the special tokens and time stamps of the English ones, and one token per byte."""
    named = ["<|endoftext|>", "<|startoftranscript|>", "<|translate|>", "<|transcribe|>", "<|startoflm|>"]
    named += [
        "<|startofprev|>",
        "<|nospeech|>",
        "<|notimestamps|>",
        *(f"<|{tick * 0.02:.2f}|>" for tick in range(1501)),
    ]
    vocabulary = {token: index for index, token in enumerate([*sorted(ByteLevel.alphabet()), *named])}
    words = WhisperTokenizer(vocab=vocabulary, merges=[], pad_token="<|endoftext|>")
    end, start = (words.convert_tokens_to_ids(token) for token in named[:2])
    torch.manual_seed(2)
    config = WhisperConfig(
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        vocab_size=len(words),
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=start,
        max_target_positions=16,
        init_std=0.5,
        begin_suppress_tokens=None,
    )
    model = WhisperForConditionalGeneration(config)
    model.generation_config.no_timestamps_token_id = words.convert_tokens_to_ids("<|notimestamps|>")
    model.generation_config.max_length = 12
    folder = tmp_path_factory.mktemp("asr") / "tiny-whisper"
    model.save_pretrained(folder)
    WhisperProcessor(WhisperFeatureExtractor(feature_size=80), words).save_pretrained(folder)
    return folder


def test_it_transcribes_whatever_it_is_asked(whisper, clip):
    recogniser = load_recogniser(whisper)
    assert isinstance(recogniser, Transcriber)
    rows = [
        {"audio": clip(1.5, seed), "instruction": instruction} for seed in (0, 1) for instruction in ("Sing.", "Lie.")
    ]
    first, same, other, _ = (reply.text for reply in recogniser.respond(rows))
    assert first == same
    assert first != other
    assert recogniser.name == "tiny-whisper"


def test_clips_of_over_half_a_minute_are_heard_whole(whisper, clip):
    long = recogniser_text(whisper, clip(40.0))
    assert len(long) > len(recogniser_text(whisper, clip(4.0)))


def recogniser_text(folder, waveform):
    (reply,) = Transcriber(folder).respond([{"audio": waveform}])
    return reply.text


def test_it_can_hear_nothing_but_the_clip(whisper, clip):
    with pytest.raises(ValueError, match="it needs audio, but got 'transcript'"):
        Transcriber(whisper).respond([{"audio": clip(1.0), "transcript": "so"}], "transcript")


def test_a_speech_llm_may_do_the_hearing_too(lsm_dir):
    assert isinstance(load_recogniser(lsm_dir), Lsm)


def test_a_tokenizer_without_a_pad_token_pads_with_its_end(whisper, clip, tmp_path):
    folder = shutil.copytree(whisper, tmp_path / "whisper")
    words = WhisperTokenizer.from_pretrained(folder)
    words.pad_token = None
    words.save_pretrained(folder)
    rows = [{"audio": clip(seconds)} for seconds in (0.4, 0.7)]
    padded = [reply.text for reply in Transcriber(folder).respond(rows, batch_size=2)]
    assert padded == [reply.text for reply in Transcriber(whisper).respond(rows, batch_size=2)]


@pytest.mark.parametrize(
    ("languages", "expected"), [(["de", "de"], {"language": "de"}), (["de", "fr"], {}), ([None, None], {})]
)
def test_a_multilingual_whisper_is_told_the_language_and_decodes_greedily(whisper, monkeypatch, languages, expected):
    recogniser = Transcriber(whisper)
    rows = [{"language": language} for language in languages]
    assert recogniser._decoding(rows) == {"num_beams": 1}
    monkeypatch.setattr(recogniser.pipe.model.generation_config, "is_multilingual", True, raising=False)
    assert recogniser._decoding(rows) == {"num_beams": 1, "task": "transcribe", **expected}
