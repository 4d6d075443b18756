"""Tiny random checkpoints of other speech LLMs, each of the real class, as folders that `from_pretrained` opens.

Granite Speech needs `tests/stand_ins` on the path of a fresh process: transformers looks for torchaudio as it starts.
Voxtral needs mistral-common.
"""

import base64
import json
from pathlib import Path

import torch
from tiny_tokenizer import tiny_tokenizer
from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor

LLM = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
}
ENCODER = {
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "num_mel_bins": 80,
}
# As Qwen2-Audio's own lays out text and audio; no date, no tools.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'audio' %}Audio: <|audio|>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    made = tiny_tokenizer()
    made.add_special_tokens({"additional_special_tokens": ["<|audio|>", "<|im_start|>", "<|im_end|>"]})
    made.eos_token, made.pad_token, made.chat_template = "<|im_end|>", "</s>", TEMPLATE
    return made


def _write(folder: Path, model, processor) -> Path:
    torch.manual_seed(0)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_qwen2_audio(folder: Path) -> Path:
    from transformers import (
        Qwen2AudioConfig,
        Qwen2AudioEncoderConfig,
        Qwen2AudioForConditionalGeneration,
        Qwen2AudioProcessor,
        Qwen2Config,
    )

    words = tokenizer()
    config = Qwen2AudioConfig(
        audio_config=Qwen2AudioEncoderConfig(**ENCODER),
        text_config=Qwen2Config(**LLM, vocab_size=len(words)),
        audio_token_index=words.convert_tokens_to_ids("<|audio|>"),
    )
    processor = Qwen2AudioProcessor(WhisperFeatureExtractor(feature_size=80), words, TEMPLATE, audio_token="<|audio|>")
    torch.manual_seed(0)
    return _write(folder, Qwen2AudioForConditionalGeneration(config), processor)


def write_audio_flamingo(folder: Path) -> Path:
    from transformers import (
        AudioFlamingo3Config,
        AudioFlamingo3EncoderConfig,
        AudioFlamingo3ForConditionalGeneration,
        AudioFlamingo3Processor,
        Qwen2Config,
    )

    words = tokenizer()
    encoder = AudioFlamingo3EncoderConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, num_mel_bins=80
    )
    config = AudioFlamingo3Config(
        audio_config=encoder,
        text_config=Qwen2Config(**LLM, vocab_size=len(words)),
        audio_token_id=words.convert_tokens_to_ids("<|audio|>"),
    )
    extractor = WhisperFeatureExtractor(feature_size=80, return_attention_mask=True)
    processor = AudioFlamingo3Processor(extractor, words, TEMPLATE, audio_token="<|audio|>")
    torch.manual_seed(0)
    return _write(folder, AudioFlamingo3ForConditionalGeneration(config), processor)


def write_granite_speech(folder: Path) -> Path:
    from transformers import (
        Blip2QFormerConfig,
        GraniteConfig,
        GraniteSpeechConfig,
        GraniteSpeechEncoderConfig,
        GraniteSpeechFeatureExtractor,
        GraniteSpeechForConditionalGeneration,
        GraniteSpeechProcessor,
    )

    words = tokenizer()
    config = GraniteSpeechConfig(
        text_config=GraniteConfig(**LLM, vocab_size=len(words)),
        encoder_config=GraniteSpeechEncoderConfig(num_layers=1, hidden_dim=32, num_heads=4, dim_head=8, output_dim=12),
        projector_config=Blip2QFormerConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, encoder_hidden_size=32
        ),
        audio_token_index=words.convert_tokens_to_ids("<|audio|>"),
        has_lora_adapter=False,
        tie_word_embeddings=False,
    )
    processor = GraniteSpeechProcessor(GraniteSpeechFeatureExtractor(), words, chat_template=TEMPLATE)
    torch.manual_seed(0)
    return _write(folder, GraniteSpeechForConditionalGeneration(config), processor)


# As Mistral's files have it, short of the words: 32 special tokens, the bytes, and one token that ends a sentence.
TEKKEN_SPECIAL = (
    "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] [TOOL_CALLS] "
    "[IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT] "
    "[ARGS] [CALL_ID] <22> <23> [AUDIO] [BEGIN_AUDIO] <26> <27> <28> <29> <30> [TRANSCRIBE]"
)
TEKKEN_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def write_tekken(path: Path) -> Path:
    special, pieces = TEKKEN_SPECIAL.split(), [*(bytes([byte]) for byte in range(256)), b".\n"]
    settings = {
        "config": {
            "pattern": TEKKEN_PATTERN,
            "num_vocab_tokens": len(pieces),
            "default_vocab_size": len(special) + len(pieces),
            "default_num_special_tokens": len(special),
            "version": "v11",
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(piece).decode(), "token_str": None}
            for rank, piece in enumerate(pieces)
        ],
        "special_tokens": [
            {"rank": rank, "token_str": token, "is_control": True} for rank, token in enumerate(special)
        ],
        "audio": {
            "sampling_rate": 16_000,
            "frame_rate": 12.5,
            "chunk_length_s": 30.0,
            "audio_encoding_config": {"num_mel_bins": 80, "hop_length": 160, "window_size": 400},
        },
    }
    path.write_text(json.dumps(settings))
    return path


def write_voxtral(folder: Path) -> Path:
    from transformers import (
        LlamaConfig,
        MistralCommonBackend,
        VoxtralConfig,
        VoxtralEncoderConfig,
        VoxtralForConditionalGeneration,
        VoxtralProcessor,
    )

    folder.mkdir()
    words = MistralCommonBackend(write_tekken(folder / "tekken.json"))
    encoder = VoxtralEncoderConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128, num_mel_bins=80
    )
    config = VoxtralConfig(
        audio_config=encoder,
        text_config=LlamaConfig(**LLM, vocab_size=len(words)),
        audio_token_id=words.convert_tokens_to_ids("[AUDIO]"),
    )
    torch.manual_seed(0)
    model = VoxtralForConditionalGeneration(config)
    return _write(folder, model, VoxtralProcessor(WhisperFeatureExtractor(feature_size=80), words))


WRITERS = {
    "qwen2_audio": write_qwen2_audio,
    "granite_speech": write_granite_speech,
    "audioflamingo3": write_audio_flamingo,
    "voxtral": write_voxtral,
}
