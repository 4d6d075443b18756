"""The inputs of all contestants: clips with the lengths of real corpora, prompts and responses, and model sizes."""

from dataclasses import dataclass

import numpy as np
import torch
from transformers import LlamaConfig, WhisperConfig

from configuration_lsm import num_encoder_frames, num_mel_frames
from recipes.training.order import group

RATE = 16_000
MELS = 80

# Tokens of a prompt: the first 35 are Vicuna's system message and "USER:", the same in every row (LLaVA's image tokens
# begin at position 35 for the same reason). The instruction follows, then the speech, then " ASSISTANT:".
TEMPLATE, INSTRUCTION, AFTER, RESPONSE = 35, 25, 5, 40

# The means are those of the corpora, and the distributions are our approximations. Many clips of LibriSpeech are just
# below 17 s, where its segmentation ends; those of Common Voice and GigaSpeech are short, with a tail.
WORKLOADS = {
    "librispeech": lambda random, count: 1.3 + 15.7 * random.beta(1.81, 0.77, count),  # mean 12.3 s
    "common_voice": lambda random, count: random.gamma(9.8, 0.51, count).clip(1, 11),  # 5 s
    "gigaspeech": lambda random, count: random.gamma(1.9, 2.1, count).clip(0.5, 20),  # 4 s
}
TEN_MINUTES = 600.0

SIZES = {
    # Whisper tiny's encoder, and an LLM that a CPU can train.
    "tiny": (
        WhisperConfig(d_model=384, encoder_layers=4, encoder_attention_heads=6, encoder_ffn_dim=1536, decoder_layers=1),
        LlamaConfig(
            hidden_size=512,
            intermediate_size=1376,
            num_hidden_layers=8,
            num_attention_heads=8,
            vocab_size=32_000,
            max_position_embeddings=32_768,
        ),
    ),
    # openai/whisper-large-v2 and lmsys/vicuna-7b-v1.5, which is LlamaConfig's default
    "large": (
        WhisperConfig(
            d_model=1280, encoder_layers=32, encoder_attention_heads=20, encoder_ffn_dim=5120, decoder_layers=1
        ),
        LlamaConfig(max_position_embeddings=32_768),
    ),
}


@dataclass(frozen=True)
class Row:
    """A clip of some length, with an instruction and a response. The seed is that of the features and of the tokens."""

    seconds: float
    seed: int

    @property
    def samples(self) -> int:
        return round(self.seconds * RATE)

    @property
    def mel_frames(self) -> int:
        return num_mel_frames(self.samples)

    @property
    def encoder_frames(self) -> int:
        return num_encoder_frames(self.mel_frames)

    def features(self) -> torch.Tensor:
        """Return features `(mels, frames)` float32. They are noise, because the content does not change the time."""
        return torch.randn(MELS, self.mel_frames, generator=torch.Generator().manual_seed(self.seed))

    def tokens(self, vocabulary: int) -> tuple[list[int], list[int], list[int]]:
        """Return the tokens before the speech, those after it, and the response."""
        random = np.random.default_rng(self.seed)
        own = random.integers(100, vocabulary - 1, INSTRUCTION + RESPONSE).tolist()
        return [*range(1, 1 + TEMPLATE), *own[:INSTRUCTION]], [*range(50, 50 + AFTER)], own[INSTRUCTION:]


def draw_rows(workload: str, count: int = 400, seed: int = 0) -> list[Row]:
    """Return rows of a workload, in random order."""
    seconds = WORKLOADS[workload](np.random.default_rng(seed), count)
    return [Row(float(length), index) for index, length in enumerate(seconds)]


def static_batches(rows: list[Row], size: int) -> list[list[Row]]:
    """Return batches of rows in their own order."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def grouped_batches(rows: list[Row], size: int) -> list[list[Row]]:
    """Return batches of rows of similar cost, as in a training. Since all texts have the same length, the cost is the
    length of the clip."""
    order = group([row.seconds for row in rows], size, np.random.default_rng(0))
    return [[rows[index] for index in order[start : start + size]] for start in range(0, len(order), size)]


def representative(batches: list[list[Row]], count: int) -> list[list[Row]]:
    """Return a few batches that represent all: batches are sorted by their longest clip and divided into `count`
    classes, and the middle batch of each class is returned."""
    ranked = sorted(batches, key=lambda batch: max(row.seconds for row in batch))
    return [ranked[int((index + 0.5) * len(ranked) / count)] for index in range(count)]
