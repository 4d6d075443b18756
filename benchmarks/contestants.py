"""The contestants: models of similar sizes with random weights, and their inputs for the same rows.

All encoders are frozen, and everything else learns. Batches, padding and logits are those of the model's processor, its
`forward` and an ordinary `Trainer`.
"""

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import nn
from transformers import (
    AudioFlamingo3Config,
    AudioFlamingo3EncoderConfig,
    AudioFlamingo3ForConditionalGeneration,
    GraniteConfig,
    GraniteSpeechConfig,
    GraniteSpeechEncoderConfig,
    GraniteSpeechForConditionalGeneration,
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2Config,
    VoxtralConfig,
    VoxtralEncoderConfig,
    VoxtralForConditionalGeneration,
)

from benchmarks.workloads import MELS, SIZES, Row, draw_rows, grouped_batches, representative, static_batches
from configuration_lsm import LsmConfig, num_audio_tokens
from modeling_lsm import LsmForConditionalGeneration, LsmWindowAttention
from recipes.training.costs import Costs
from recipes.training.objectives import predicts, response_loss

CHUNK = 3000  # mel frames of Whisper's 30 s


class Contestant:
    """A model of size `tiny` or `large`, and its inputs for rows."""

    longest = math.inf  # seconds of the longest audio that it takes
    batches: Callable[[list[Row], int], list[list[Row]]] = staticmethod(static_batches)

    def __init__(self, size: str, device: torch.device, dtype: torch.dtype):
        self.whisper, self.llama = SIZES[size]
        self.vocabulary = self.llama.vocab_size
        self.audio_token_id = self.vocabulary - 1
        self.device, self.dtype = device, dtype
        torch.manual_seed(0)
        with torch.device(device):
            self.model = self.make().to(dtype)
        self.encoder().requires_grad_(False)
        self.model.train()
        self.model.generation_config.pad_token_id = 0
        self.model.generation_config.eos_token_id = None  # otherwise the length of an answer would be random

    def make(self) -> nn.Module:
        raise NotImplementedError

    def encoder(self) -> nn.Module:
        return self.model.model.audio_tower

    def audio(self, rows: Sequence[Row]) -> tuple[dict[str, torch.Tensor], list[int]]:
        """Return the audio inputs of a batch, and the number of speech tokens of each row."""
        raise NotImplementedError

    def loss(self, batch: dict) -> torch.Tensor:
        return self.model(**batch, use_cache=False).loss

    def text(self, llm: type, **more):
        """Return a configuration of another family of LLMs with the same sizes."""
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        shapes = {name: getattr(self.llama, name) for name in (*names, "max_position_embeddings")}
        return llm(**shapes, num_key_value_heads=self.llama.num_attention_heads, **more)

    def some_batches(self, workload: str, size: int, count: int) -> list[list[Row]]:
        """Return a few of its batches, which represent all batches of a workload."""
        return representative(self.batches(draw_rows(workload), size), count)

    def training_batch(self, rows: Sequence[Row]) -> dict:
        """Return a batch of prompts with their responses and labels, padded on the right."""
        return self._batch(rows, answered=True)

    def prompts(self, rows: Sequence[Row]) -> dict:
        """Return a batch of prompts without responses, padded on the left."""
        return self._batch(rows, answered=False)

    def _batch(self, rows: Sequence[Row], answered: bool) -> dict:
        audio, counts = self.audio(rows)
        ids, labels = [], []
        for row, count in zip(rows, counts, strict=True):
            before, after, response = row.tokens(self.vocabulary)
            prompt = [*before, *[self.audio_token_id] * count, *after]
            ids.append(prompt + response if answered else prompt)
            labels.append([-100] * len(prompt) + response)
        side = "right" if answered else "left"
        pad = {"batch_first": True, "padding_side": side}
        tensors = [torch.tensor(row) for row in ids]
        batch = {
            "input_ids": nn.utils.rnn.pad_sequence(tensors, padding_value=0, **pad),
            "attention_mask": nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in tensors], **pad),
            **audio,
        }
        if answered:
            batch["labels"] = nn.utils.rnn.pad_sequence(
                [torch.tensor(row) for row in labels], padding_value=-100, **pad
            )
        return {name: self._place(value) for name, value in batch.items()}

    def _place(self, value: torch.Tensor) -> torch.Tensor:
        return value.to(self.device, self.dtype if value.is_floating_point() else None)

    def step(self, batch: dict) -> torch.Tensor:
        """Run a forward and a backward pass, and return the loss."""
        loss = self.loss(batch)
        loss.backward()
        self.model.zero_grad()
        return loss.detach()

    @torch.inference_mode()
    def write(self, batch: dict, tokens: int, **settings) -> torch.Tensor:
        """Generate greedy answers with this number of tokens."""
        self.model.eval()
        answer = self.model.generate(**batch, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **settings)
        self.model.train()
        return answer

    @staticmethod
    def pad_frames(features: Sequence[torch.Tensor], frames: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the features, padded with zeros, `(rows, mels, frames)`, and their mask `(rows, frames)`, with 1 for
        frames that are not padding."""
        padded = torch.stack([nn.functional.pad(row, (0, frames - row.shape[1])) for row in features])
        lengths = torch.tensor([row.shape[1] for row in features])
        return padded, (torch.arange(frames) < lengths[:, None]).long()

    @staticmethod
    def chunks(rows: Sequence[Row]) -> list[list[torch.Tensor]]:
        """Return the features of each row, in pieces of at most 30 s."""
        return [list(row.features().split(CHUNK, dim=1)) for row in rows]


class Ours(Contestant):
    """LSM as `recipes/sft.py` trains it."""

    batches = staticmethod(grouped_batches)
    settings: ClassVar = {}  # of the configuration

    def make(self) -> nn.Module:
        return LsmForConditionalGeneration(
            LsmConfig(
                audio_config=self.whisper.to_dict(),
                text_config=self.llama.to_dict(),
                audio_token_id=self.audio_token_id,
                **self.settings,
            )
        )

    def audio(self, rows: Sequence[Row]) -> tuple[dict[str, torch.Tensor], list[int]]:
        config, chunks = self.model.config, self.chunks(rows)
        pieces = [piece for row in chunks for piece in row]
        frames = CHUNK if config.audio_padding == "max_length" else max(piece.shape[1] for piece in pieces)
        features, mask = self.pad_frames(pieces, frames)
        if config.audio_padding == "max_length":
            mask = torch.ones_like(mask)  # the padding counts as silence
        counts = iter(
            num_audio_tokens(
                [(length + 1) // 2 for length in mask.sum(1).tolist()],
                window_frames=config.window_frames,
                window_mode=config.window_mode,
                queries_per_window=config.queries_per_window,
            )
        )
        counts = [sum(next(counts) for _ in row) for row in chunks]
        return {"input_features": features, "input_features_mask": mask}, counts

    def loss(self, batch: dict) -> torch.Tensor:
        labels = batch["labels"]
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = self.model(**inputs, logits_to_keep=predicts(labels), use_cache=False).logits
        tokens = labels[:, 1:][labels[:, 1:] != -100]
        return response_loss(logits, tokens) / len(tokens)

    def flops(self, rows: Sequence[Row]) -> float:
        """Return the useful FLOPs of a training step: those of unpadded frames, unpadded tokens and labelled logits."""
        costs, (_, counts) = Costs.of(self.model, "full"), self.audio(rows)
        frames, speech = torch.tensor([float(row.encoder_frames) for row in rows]), torch.tensor(counts)
        before, after, response = rows[0].tokens(self.vocabulary)
        tokens = speech.float() + len(before) + len(after) + len(response)
        return costs.row(frames, speech, tokens, len(response)).sum().item()


class ProjectsFrames(LsmWindowAttention):
    """The Q-Former's attention of transformers and of the original code, which projects each frame."""

    def _has_weights_at(self, frames: torch.Tensor) -> bool:
        return False


def project_frames(model: LsmForConditionalGeneration) -> None:
    """Make the Q-Former of a model project each frame."""
    for layer in model.model.projector.qformer.encoder.layer:
        layer.crossattention.attention.__class__ = ProjectsFrames


class WithoutWindowAttention(Ours):
    """Ours, but every frame is projected for the Q-Former."""

    def make(self) -> nn.Module:
        model = super().make()
        project_frames(model)
        return model


class Original(WithoutWindowAttention):
    """The mode of the original code: clips are padded to 30 s, windows are proportional, rows are not grouped into
    batches, and all logits are computed."""

    longest = 30.0
    batches = staticmethod(static_batches)
    settings: ClassVar = {"audio_padding": "max_length", "window_mode": "proportional", "pieces_per_token": 0}
    loss = Contestant.loss


class WithoutLabelledLogits(Ours):
    """Ours, with the logits of all positions."""

    loss = Contestant.loss


class WithoutReader(Ours):
    """Ours without the reader of word pieces, as in the paper."""

    settings: ClassVar = {"pieces_per_token": 0}


class WithoutGrouping(Ours):
    """Ours, but rows of similar length are not grouped into batches."""

    batches = staticmethod(static_batches)


class WithoutLongest(Ours):
    """Ours, but every clip is padded to 30 s, with a mask."""

    def audio(self, rows: Sequence[Row]) -> tuple[dict[str, torch.Tensor], list[int]]:
        audio, counts = super().audio(rows)
        missing = CHUNK - audio["input_features"].shape[-1]
        return {name: nn.functional.pad(value, (0, missing)) for name, value in audio.items()}, counts


class Stored(Ours):
    """Ours, but the tower's output is read from a store (`--audio_feature_store`)."""

    def audio(self, rows: Sequence[Row]) -> tuple[dict[str, torch.Tensor], list[int]]:
        audio, counts = super().audio(rows)
        mask = audio["input_features_mask"]
        states = torch.randn(len(mask), (mask.shape[1] + 1) // 2, self.whisper.d_model)
        return {"audio_hidden_states": states, "input_features_mask": mask}, counts


class Qwen2Audio(Contestant):
    """Clips are padded to 30 s, and a second has 25 tokens."""

    longest = 30.0

    def make(self) -> nn.Module:
        whisper = self.whisper
        encoder = Qwen2AudioEncoderConfig(
            num_mel_bins=MELS,
            d_model=whisper.d_model,
            encoder_layers=whisper.encoder_layers,
            encoder_attention_heads=whisper.encoder_attention_heads,
            encoder_ffn_dim=whisper.encoder_ffn_dim,
        )
        return Qwen2AudioForConditionalGeneration(
            Qwen2AudioConfig(
                audio_config=encoder, text_config=self.text(Qwen2Config), audio_token_index=self.audio_token_id
            )
        )

    def encoder(self) -> nn.Module:
        return self.model.get_submodule("model.audio_tower" if hasattr(self.model, "model") else "audio_tower")

    def audio(self, rows: Sequence[Row]) -> tuple[dict[str, torch.Tensor], list[int]]:
        features, mask = self.pad_frames([row.features() for row in rows], CHUNK)
        counts = [((frames - 1) // 2 - 1) // 2 + 1 for frames in mask.sum(1).tolist()]
        return {"input_features": features, "feature_attention_mask": mask}, counts


def _encoder_shapes(whisper) -> dict:
    return {
        "num_mel_bins": MELS,
        "hidden_size": whisper.d_model,
        "intermediate_size": whisper.encoder_ffn_dim,
        "num_hidden_layers": whisper.encoder_layers,
        "num_attention_heads": whisper.encoder_attention_heads,
    }


class Voxtral(Contestant):
    """Chunks are padded to 30 s, and a second of a padded chunk has 12.5 tokens."""

    def make(self) -> nn.Module:
        encoder = VoxtralEncoderConfig(**_encoder_shapes(self.whisper))
        config = VoxtralConfig(audio_config=encoder, text_config=self.llama, audio_token_id=self.audio_token_id)
        return VoxtralForConditionalGeneration(config)

    def audio(self, rows: Sequence[Row]) -> tuple[dict[str, torch.Tensor], list[int]]:
        chunks = self.chunks(rows)
        features, _ = self.pad_frames([piece for row in chunks for piece in row], CHUNK)
        return {"input_features": features}, [len(row) * CHUNK // 8 for row in chunks]


class AudioFlamingo3(Contestant):
    """Chunks are padded to 30 s, and a second has 25 tokens."""

    longest = 600.0

    def make(self) -> nn.Module:
        encoder = AudioFlamingo3EncoderConfig(**_encoder_shapes(self.whisper))
        return AudioFlamingo3ForConditionalGeneration(
            AudioFlamingo3Config(
                audio_config=encoder, text_config=self.text(Qwen2Config), audio_token_id=self.audio_token_id
            )
        )

    def audio(self, rows: Sequence[Row]) -> tuple[dict[str, torch.Tensor], list[int]]:
        chunks = self.chunks(rows)
        features, mask = self.pad_frames([piece for row in chunks for piece in row], CHUNK)
        counts = iter(((frames - 1) // 2 - 1) // 2 + 1 for frames in mask.sum(1).tolist())
        return {"input_features": features, "input_features_mask": mask}, [
            sum(next(counts) for _ in row) for row in chunks
        ]


class GraniteSpeech(Contestant):
    """A Conformer with as many layers and a Q-Former of our size. A second has 10 tokens, and clips are padded to the
    longest one."""

    def make(self) -> nn.Module:
        width, heads = self.whisper.d_model, self.whisper.encoder_attention_heads
        encoder = GraniteSpeechEncoderConfig(
            num_layers=self.whisper.encoder_layers, hidden_dim=width, num_heads=heads, dim_head=width // heads
        )
        qformer = LsmConfig(audio_config=self.whisper.to_dict()).qformer_config
        config = GraniteSpeechConfig(
            encoder_config=encoder,
            projector_config=qformer,
            text_config=self.text(GraniteConfig),
            audio_token_index=self.audio_token_id,
            has_lora_adapter=False,
            tie_word_embeddings=False,
        )
        return GraniteSpeechForConditionalGeneration(config)

    def encoder(self) -> nn.Module:
        return self.model.get_submodule("model.encoder" if hasattr(self.model, "model") else "encoder")

    def audio(self, rows: Sequence[Row]) -> tuple[dict[str, torch.Tensor], list[int]]:
        # Two mel frames make one encoder frame, and a window of 15 encoder frames makes 3 tokens.
        lengths = [row.encoder_frames for row in rows]
        stacked = [row.features() for row in rows]
        stacked = [nn.functional.pad(row, (0, row.shape[1] % 2)).T.reshape(-1, 2 * MELS) for row in stacked]
        counts = [3 * math.ceil(length / self.model.config.window_size) for length in lengths]
        features = nn.utils.rnn.pad_sequence(stacked, batch_first=True)
        mask = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
        return {"input_features": features, "input_features_mask": mask}, counts


PEERS: dict[str, type[Contestant]] = {
    "ours": Ours,
    "original": Original,
    "qwen2_audio": Qwen2Audio,
    "voxtral": Voxtral,
    "granite_speech": GraniteSpeech,
    "audio_flamingo_3": AudioFlamingo3,
}
# Ours without one of its optimisations, without the reader, or with a feature store.
LEVERS: dict[str, type[Contestant]] = {
    "without_window_attention": WithoutWindowAttention,
    "without_labelled_logits": WithoutLabelledLogits,
    "without_grouping": WithoutGrouping,
    "without_longest": WithoutLongest,
    "without_reader": WithoutReader,
    "stored_features": Stored,
}
CONTESTANTS = PEERS | LEVERS
