"""Model of an LSM: a frozen Whisper encoder, a windowed Q-Former and a causal LLM.

Architecture: "Self-Powered LLM Modality Expansion for Large Speech-Text Models", arXiv 2410.03798.
"""

import contextlib
import copy
import functools
import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    WhisperModel,
)
from transformers import initialization as init
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel, Blip2QFormerMultiHeadAttention
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils import SAFE_WEIGHTS_NAME, ModelOutput, cached_file, logging
from transformers.utils.generic import can_return_tuple

try:
    from .configuration_lsm import LsmConfig, num_audio_tokens, num_encoder_frames, num_positions, window_layout
except ImportError:
    from configuration_lsm import LsmConfig, num_audio_tokens, num_encoder_frames, num_positions, window_layout

logger = logging.get_logger(__name__)
# The initial bias of the blank is positive, because with 0, the most frequent piece replaced the blank for two of three
# seeds. `recipes/listening/composing.py` replaces the initial scale by the one that the LLM's embeddings need.
BLANK_BIAS, READING_SCALE = 3.0, 10.0
VOCABULARY_CHUNK = 16_384  # embeddings that are compared with speech at the same time
# Prefixes of the names of the weights that come from another checkpoint.
PARTS = {"audio": ("model.audio_tower.", "model.reading_embeddings."), "text": ("model.language_model.", "lm_head.")}
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token")
SAMPLE = 256  # number of values of a weight in its hash
AUDIO_INPUTS = ("input_features", "input_features_mask", "audio_hidden_states", "audio_embeds")


@dataclass
class LsmAudioOutput(ModelOutput):
    """Output of [`LsmModel.get_audio_features`]. The output for a clip can replace the clip in
    [`LsmProcessor.__call__`], so that it is not encoded again for another question.

    Args:
        last_hidden_state: `(chunks, encoder_frames, d_audio)`, the output of the audio tower. Because the tower is
            frozen, it can be reused as `audio_hidden_states` while the projector is trained.
        pooler_output: `(total_tokens, hidden)`, the speech embeddings in prompt order, for `audio_embeds`.
        num_tokens: `(chunks,)` int64 on the CPU, numbers of speech tokens;
            `pooler_output.split(num_tokens.tolist())` splits the embeddings by chunk.
    """

    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    num_tokens: torch.Tensor | None = None


class LsmPreTrainedModel(PreTrainedModel):
    config_class = LsmConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("audio", "text")
    supports_gradient_checkpointing = True
    _no_split_modules: list[str] | set[str] = ["WhisperEncoderLayer", "Blip2QFormerLayer"]  # noqa: RUF012
    _skip_keys_device_placement: ClassVar = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, LsmProjector):
            # With the usual standard deviation of 0.02, queries are tiny beside the windows and training stagnates.
            init.normal_(module.queries, mean=0.0, std=1.0)
            if module.config.context_frames:
                init.normal_(module.frame_positions, mean=0.0, std=0.3)
        elif isinstance(module, LsmReader):
            init.normal_(module.blank, mean=0.0, std=1.0)
            init.constant_(module.blank_bias, BLANK_BIAS)
            init.constant_(module.scale, READING_SCALE)


class Frozen(nn.Module):
    """A module that never learns: `from_pretrained` enables gradients, and then calls `eval()`."""

    def train(self, mode: bool = True):
        self.requires_grad_(False)
        return super().train(False)


class LsmReadingEmbeddings(Frozen, nn.Embedding):
    """The vectors `(vocab_size, d_audio)` of the LLM's word pieces that [`reading_vectors`] makes."""


class LsmAudioTower(Frozen, WhisperEncoder):
    """Whisper's encoder for clips of up to 30 s, always frozen and in eval mode.

    The parameters have the names of `WhisperEncoder`. The output for a clip does not depend on other clips in the batch
    or on the amount of padding: padding is set to zero before each convolution, as after the end of a clip, and masked
    in the attention.
    """

    def __init__(self, config):
        super().__init__(config)
        self.eval()

    @torch.no_grad()
    def forward(self, input_features: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs):
        """Encode log-mel features.

        Args:
            input_features: `(chunks, mels, frames)` float, log-mel features at 100 frames per second.
            attention_mask: `(chunks, frames)`, 1 for real frames, right-padded. Without it, all frames are real, and
                the result is that of Whisper's encoder.

        Returns:
            `BaseModelOutput` with `last_hidden_state` `(chunks, ceil(frames / 2), d_audio)`; its values at padding are
            meaningless.

        Raises:
            ValueError: there are more frames than the encoder has positions.
        """
        max_frames = 2 * self.max_source_positions
        if input_features.shape[-1] > max_frames:
            raise ValueError(f"The audio tower takes at most {max_frames} frames, got {input_features.shape[-1]}.")
        features = input_features.to(self.conv1.weight.dtype)
        if attention_mask is not None:
            mask = attention_mask.to(features.dtype)[:, None]
            # The mask is also applied after the first convolution, whose bias and last frames leak into the padding.
            features = nn.functional.gelu(self.conv1(features * mask)) * mask
            attention_mask = attention_mask[:, ::2]
        else:
            features = nn.functional.gelu(self.conv1(features))
        hidden_states = nn.functional.gelu(self.conv2(features)).transpose(1, 2)
        hidden_states = hidden_states + self.embed_positions.weight[: hidden_states.shape[1]]

        attention_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask
        )
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask)
        return BaseModelOutput(last_hidden_state=self.layer_norm(hidden_states))


def forward_promoted(layer: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """Run a linear map or a LayerNorm in the more precise dtype of its input and its weights.

    [`LsmProjector`] replaces the `forward` of its layers by this, and not the layers, because libraries that quantise
    models look for `nn.Linear`. A layer that such a library has changed runs as its class does.

    Args:
        hidden_states: `(..., in_features)` float.

    Returns:
        `(..., out_features)`, or `(..., in_features)` of a LayerNorm.
    """
    if not is_plain(layer):
        return type(layer).forward(layer, hidden_states)
    dtype = torch.promote_types(hidden_states.dtype, layer.weight.dtype)
    hidden_states, weight, bias = (tensor.to(dtype) for tensor in (hidden_states, layer.weight, layer.bias))
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(hidden_states, weight, bias)
    return nn.functional.layer_norm(hidden_states, layer.normalized_shape, weight, bias, layer.eps)


def is_plain(layer: nn.Module) -> bool:
    """Return whether the layer is one of torch with ordinary weights: not quantised, sharded or parametrised."""
    return type(layer) in (nn.Linear, nn.LayerNorm) and type(layer.weight) is nn.Parameter


class LsmWindowAttention(Blip2QFormerMultiHeadAttention):
    """The Q-Former's attention to a window, with the same weights and results but less computation.

    A window has many frames and few queries. Therefore, the key matrix is applied to the queries, qᵀ(Kx) = (Kᵀq)ᵀx, and
    the value matrix to the weighted sums of frames, Σ p(Vx) = V Σ px, as in DeepSeek-V2's decoding (arXiv 2405.04434,
    section 2.1.2). Both are applied once per query instead of once per frame, which halves the time of a step of the
    alignment (`docs/speed.md`).
    """

    def forward(
        self, hidden_states, attention_mask=None, encoder_hidden_states=None, encoder_attention_mask=None, **kwargs
    ):
        """Attend to the frames of each window.

        Args:
            hidden_states: `(windows, queries, hidden)`, or `(1, queries, hidden)` if all windows have the same queries.
            encoder_hidden_states: `(windows, frames, d_audio)`.
            encoder_attention_mask: mask of the frames in the format of the attention implementation.

        Returns:
            `(windows, queries, hidden)`, and None instead of the attention weights.
        """
        frames, mask = encoder_hidden_states, encoder_attention_mask
        if not (self._has_weights_at(frames) and (mask is None or torch.is_tensor(mask))):
            queries = hidden_states.expand(frames.shape[0], -1, -1)
            return super().forward(queries, attention_mask, frames, mask, **kwargs)
        # In float32 at least, as in torch's attention: in bfloat16, a score of 16 would be rounded by up to 0.06.
        frames = frames.to(torch.promote_types(frames.dtype, torch.float32))
        windows, _, width = frames.shape
        batch, queries = hidden_states.shape[:2]
        heads, size = self.num_attention_heads, self.attention_head_size
        by_head = self.query(hidden_states).to(frames) * self.scaling
        by_head = by_head.view(batch * queries, heads, size).transpose(0, 1)
        projected = by_head @ self.key.weight.to(frames).view(heads, size, width)
        projected = projected.transpose(0, 1).reshape(batch, queries * heads, width)
        biases = (by_head * self.key.bias.view(heads, 1, size)).sum(-1)  # no effect on a softmax, but a gradient
        scores = projected @ frames.transpose(1, 2) + biases.transpose(0, 1).reshape(batch, queries * heads, 1)
        if mask is not None:
            mask = mask[:, 0, :1]
            scores = scores + mask if mask.is_floating_point() else scores.masked_fill(~mask, -torch.inf)
        weights = nn.functional.dropout(scores.softmax(-1), self.attention_dropout, self.training)
        sums = (weights @ frames).view(windows * queries, heads, width).transpose(0, 1)
        output = (sums @ self.value.weight.to(frames).view(heads, size, width).transpose(1, 2)).transpose(0, 1)
        output = output + self.value.bias.view(heads, size) * weights.sum(-1).view(windows * queries, heads, 1)
        return output.reshape(windows, queries, heads * size).to(hidden_states.dtype), None

    def _has_weights_at(self, frames: torch.Tensor) -> bool:
        """Return whether the key and value weights are plain matrices on the device of `frames`: without adapter,
        quantisation or sharding, and not loaded only when their module is called (ZeRO-3, offloading)."""
        return all(
            is_plain(linear)
            and linear.weight.shape == (linear.out_features, linear.in_features)
            and linear.weight.device == frames.device
            for linear in (self.key, self.value)
        )


class LsmQFormer(Blip2QFormerModel):
    """BLIP-2's Q-Former without its casts: it also takes float32 with weights in half precision."""

    def __init__(self, config):
        super().__init__(config)
        for layer in self.encoder.layer:
            if layer.has_cross_attention:
                layer.crossattention.attention = LsmWindowAttention(self.config, is_cross_attention=True)

    def forward(
        self,
        query_embeds: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return what the queries hear in each window, `(windows, queries, hidden)`.

        Args:
            query_embeds: `(1, queries, hidden)`: before the cross-attention, they are the same for all windows.
            encoder_hidden_states: windows `(windows, frames, d_audio)`, of the dtype of the queries.
            encoder_attention_mask: `(windows, frames)`, 1 for real frames; if None, all frames are real.
        """
        hidden_states, mask = self.dropout(self.layernorm(query_embeds)), encoder_attention_mask
        if mask is not None:
            mask = create_bidirectional_mask(
                config=self.config,
                inputs_embeds=hidden_states,
                attention_mask=mask,
                encoder_hidden_states=encoder_hidden_states,
            )
        return self.encoder(
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=mask,
            query_length=query_embeds.shape[1],
            return_dict=True,
        ).last_hidden_state


class LsmReader(nn.Module):
    """Reads speech tokens as word pieces, by their cosines with a vector of each piece, times a learned scale.

    The vectors are the LLM's input embeddings, or [`LsmReadingEmbeddings`]. A token without a word piece is read as the
    blank of CTC (Graves et al., 2006), a learned vector with a bias. The lengths of vectors have no effect, so scaled
    embeddings (Gemma) need no special treatment.
    """

    def __init__(self, config: LsmConfig):
        super().__init__()
        self.config = config
        self.blank = nn.Parameter(torch.empty(config.reading_size))
        self.blank_bias = nn.Parameter(torch.empty(1))  # not scalars, which FSDP2 cannot shard
        self.scale = nn.Parameter(torch.empty(1))

    def logits(self, speech: torch.Tensor, pieces: torch.Tensor) -> torch.Tensor:
        """Return the logits of the blank and the word pieces for each speech token.

        Args:
            speech: `(tokens, hidden)` float, output of the projector's linear map.
            pieces: vectors of the word pieces to choose from, `(pieces, hidden)` float, or `(tokens, pieces, hidden)`
                if each token has its own.

        Returns:
            `(tokens, 1 + pieces)` float32 (float64 for a model in float64); the blank comes first.
        """
        dtype = torch.promote_types(speech.dtype, torch.float32)
        speech = nn.functional.normalize(speech.to(dtype), dim=-1)
        blank = speech @ nn.functional.normalize(self.blank.to(dtype), dim=-1)
        pieces = nn.functional.normalize(pieces.to(dtype), dim=-1)
        cosines = speech @ pieces.T if pieces.ndim == 2 else (pieces @ speech[..., None])[..., 0]
        bias = nn.functional.pad(self.blank_bias.to(dtype), (0, cosines.shape[-1]))
        return self.scale.to(dtype) * torch.cat([blank[:, None], cosines], -1) + bias

    def forward(
        self, speech: torch.Tensor, vectors: Callable, embeddings: Callable, num_tokens: list[int]
    ) -> torch.Tensor:
        """Express speech in the LLM's input embeddings, as LegoSLM does (arXiv 2505.11352).

        A speech token becomes the mean of the embeddings of its `pieces_per_token` nearest pieces, weighted by their
        probabilities. A token becomes zeros, which the LLM does not attend to ([`without_blanks`]), if the blank is
        likelier than every piece, or if its likeliest piece is that of the token before, as in CTC's greedy decoding.
        The blank therefore learns in the alignment alone. In each chunk, the words come before the blanks, so that they
        are next to each other also where nothing can be masked (vLLM).

        Args:
            speech: `(total_tokens, reading_size)` float.
            vectors: function from ids to the vectors that speech is compared with. The weights themselves may be
                offloaded or sharded until their module is called, and accelerate would move a module.
            embeddings: function from ids to the LLM's embeddings.
            num_tokens: number of speech tokens of each chunk.

        Returns:
            `(total_tokens, hidden)`.
        """
        ids = self._search(speech, vectors)
        # To the speech's dtype and device, because with a device map, the LLM may be elsewhere.
        logits = self.logits(speech, vectors(ids).to(speech))
        pieces = embeddings(ids).to(speech)
        chunk = torch.arange(len(num_tokens)).repeat_interleave(torch.tensor(num_tokens)).to(speech.device)
        best = logits.argmax(-1, keepdim=True)
        read = torch.cat([ids.new_full((len(ids), 1), -1), ids], 1).gather(1, best)[:, 0]
        # As CTC decodes: a piece that the token before has, too, was said once.
        again = nn.functional.pad((read[1:] == read[:-1]) & (chunk[1:] == chunk[:-1]), (1, 0))
        is_blank = again | (best[:, 0] == 0)
        # Among the pieces alone: an embedding that a blank has made shorter is not one that the LLM knows.
        words = (logits[:, None, 1:].softmax(-1) @ pieces.to(logits))[:, 0].masked_fill(is_blank[:, None], 0.0)
        return words[(2 * chunk + is_blank).argsort(stable=True)].to(speech.dtype)

    @torch.no_grad()
    def _search(self, speech: torch.Tensor, vectors: Callable) -> torch.Tensor:
        """Return the ids `(tokens, pieces_per_token)` of the vectors with the largest cosines with each token."""
        # In float32, because bfloat16 does not tell apart cosines that differ by 0.004.
        speech, device = (
            nn.functional.normalize(speech.to(torch.promote_types(speech.dtype, torch.float32)), dim=-1),
            speech.device,
        )
        never = torch.tensor(self.config.non_text_token_ids, dtype=torch.long, device=device)
        scores, ids = speech.new_empty(len(speech), 0), torch.empty(len(speech), 0, dtype=torch.long, device=device)
        for chunk in torch.arange(self.config.text_config.vocab_size, device=device).split(VOCABULARY_CHUNK):
            cosines = speech @ nn.functional.normalize(vectors(chunk).to(speech), dim=-1).T
            cosines = cosines.masked_fill(torch.isin(chunk, never), -torch.inf)
            scores, ids = torch.cat([scores, cosines], 1), torch.cat([ids, chunk.expand(len(speech), -1)], 1)
            scores, kept = scores.topk(min(self.config.pieces_per_token, scores.shape[1]))
            ids = ids.gather(1, kept)
        return ids


def without_blanks(
    attention_mask: torch.Tensor, embeds: torch.Tensor, places: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the mask of a prompt without its blanks, the speech tokens of zeros. The LLM then sees the words that were
    said and nothing else, at the positions of a text; any vector for a blank would disturb it (`docs/real.md`).

    Args:
        attention_mask: `(batch, length)`, 1 for real tokens, also for those in a cache, which come first.
        embeds: embeddings of the new tokens, `(batch, new tokens, hidden)`, or of `places` alone, `(places, hidden)`.
        places: `(batch, new tokens)` bool.
    """
    says = embeds.any(-1)
    if places is not None:
        says = (~places).masked_scatter(places, says.to(places.device))
    cached = attention_mask.shape[1] - says.shape[1]
    return attention_mask * nn.functional.pad(says, (cached, 0), value=True).to(attention_mask)


class LsmProjector(LsmPreTrainedModel):
    """Projector from the encoder to the LLM: windows, LayerNorm, a Q-Former with learned queries for each window, a
    linear map, and a reader that expresses speech in the LLM's embeddings (unless `pieces_per_token` is 0)."""

    def __init__(self, config: LsmConfig):
        super().__init__(config)
        qformer_config = config.qformer_config
        self.layer_norm = nn.LayerNorm(config.audio_config.d_model)
        if config.context_frames:  # attention ignores positions, but the context should count less than the window
            frames = config.window_frames + 2 * config.context_frames
            self.frame_positions = nn.Parameter(torch.empty(frames, config.audio_config.d_model))
        self.queries = nn.Parameter(torch.empty(config.queries_per_window, qformer_config.hidden_size))
        # The Q-Former does not support flash attention, which may be set for the whole model.
        attention = qformer_config._attn_implementation or ""
        self.qformer = LsmQFormer._from_config(
            qformer_config, **({"attn_implementation": "sdpa"} if "flash" in attention else {})
        )
        self.linear = nn.Linear(qformer_config.hidden_size, config.reading_size)
        self._own_layers = [module for module in self.modules() if isinstance(module, nn.Linear | nn.LayerNorm)]
        for layer in self._own_layers:
            layer.forward = functools.partial(forward_promoted, layer)
        if config.pieces_per_token:
            self.reader = LsmReader(config)
        self.post_init()

    def get_input_embeddings(self):
        return None

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the computation without autocast: float32 also for weights in half precision, where the rounding of
        each layer would add up to 2 %. BLIP-2 keeps its Q-Former in float32, too. If another library has replaced
        layers or weights (vLLM, 4 bits), it is the dtype of the weights, because the new ones may take no other."""
        modules = set(self.modules())
        plain = all(layer in modules and is_plain(layer) for layer in self._own_layers)
        return torch.promote_types(self.queries.dtype, torch.float32) if plain else self.queries.dtype

    def cut_windows(
        self, hidden_states: torch.Tensor, encoder_frames: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Cut the frames into windows with their context, and drop windows without real frames.

        Args:
            hidden_states: `(chunks, frames, d_audio)` float.
            encoder_frames: number of real frames of each chunk.

        Returns:
            Windows `(windows, frames, d_audio)`, and the mask `(windows, frames)` int64 of their real frames, which is
            None in the proportional mode.
        """
        window, counts = window_layout(encoder_frames, self.config.window_frames, self.config.window_mode)
        chunks, frames, width = hidden_states.shape
        most = max(counts)
        context, padding = self.config.context_frames, most * window - frames
        # Negative padding removes the frames at the end that fill no window of the proportional mode.
        padded = nn.functional.pad(hidden_states, (0, 0, context, padding + context))
        windows = padded.unfold(1, window + 2 * context, window).transpose(2, 3).reshape(chunks * most, -1, width)
        if self.config.window_mode == "proportional":
            return windows, None
        device = hidden_states.device
        lengths = torch.tensor(encoder_frames, device=device)
        places = torch.arange(-context, most * window + context, device=device)
        mask = (places >= 0) & (places < lengths[:, None])
        mask = mask.unfold(1, window + 2 * context, window).reshape(chunks * most, -1)
        real = mask[:, context : context + window].any(dim=-1)
        return windows[real], mask[real].long()

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_frames: list[int],
        vectors: Callable | None = None,
        embeddings: Callable | None = None,
    ) -> torch.Tensor:
        """Return the speech embeddings `(total_tokens, hidden)` of all chunks, one chunk after the other.

        Args:
            hidden_states: `(chunks, frames, d_audio)` float.
            encoder_frames: number of real frames of each chunk.
            vectors, embeddings: for the reader, see [`LsmReader.forward`]. If None, the output is what it would read,
                `(total_tokens, reading_size)`.
        """
        windows, mask = self.cut_windows(hidden_states, encoder_frames)
        dtype = self.compute_dtype
        windows = self.layer_norm(windows.to(dtype))
        if self.config.context_frames:
            windows = windows + self.frame_positions.to(windows)
        heard = self.qformer(
            query_embeds=self.queries[None].to(dtype), encoder_hidden_states=windows, encoder_attention_mask=mask
        )
        speech = self.linear(heard).flatten(0, 1)
        if embeddings is not None and self.config.pieces_per_token:
            tokens = num_audio_tokens(encoder_frames, **self.config.windowing)
            speech = self.reader(speech, vectors, embeddings, tokens)
        return speech if dtype == self.queries.dtype else speech.to(self.queries.dtype)


class LsmModel(LsmPreTrainedModel):
    """Audio tower, projector and LLM, without the language modelling head."""

    def __init__(self, config: LsmConfig):
        super().__init__(config)
        self.audio_tower = LsmAudioTower._from_config(config.audio_config)
        if config.reading_embeddings == "audio":
            vocabulary, width = config.text_config.vocab_size, config.reading_size
            self.reading_embeddings = LsmReadingEmbeddings(vocabulary, width)
        self.projector = LsmProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()
        self._no_split_modules = self._layer_classes()

    def _layer_classes(self) -> set[str]:
        """Return the names of the layer classes that FSDP wraps and `device_map` does not split. transformers would add
        names of classes that the model does not contain, such as Whisper's decoder layers, which accelerate refuses."""
        names = {*LsmPreTrainedModel._no_split_modules, *(self.language_model._no_split_modules or ())}
        return names & {type(module).__name__ for module in self.modules()}

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

    def get_reading_embeddings(self) -> nn.Module:
        """Return the module from the LLM's ids to the vectors that the reader compares speech with."""
        own = self.config.reading_embeddings == "audio"
        return self.reading_embeddings if own else self.get_input_embeddings()

    def get_audio_features(
        self,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        audio_hidden_states: torch.Tensor | None = None,
        return_dict: bool | None = None,
    ) -> LsmAudioOutput:
        """Return the speech embeddings of all chunks of a batch, with the output of the audio tower.

        Args:
            input_features: `(chunks, mels, frames)` float, log-mel features at 100 frames per second. A row may also
                have all chunks of a clip one after the other, as vLLM needs them.
            input_features_mask: `(chunks, frames)`, 1 for real frames, right-padded, or a list of its rows; if absent,
                all frames are real.
            audio_hidden_states: `(chunks, encoder_frames, d_audio)` float, the audio tower's output for these chunks,
                instead of `input_features`.
            return_dict: has no effect; vLLM passes it to all models.

        Raises:
            ValueError: not exactly one of `input_features` and `audio_hidden_states` is given, it is empty, or the mask
                does not fit it.
        """
        if isinstance(input_features_mask, list):
            input_features_mask = torch.stack(input_features_mask)
        if input_features is not None and input_features.shape[-1] > 2 * self.config.audio_config.max_source_positions:
            input_features, input_features_mask = self._cut_rows(input_features, input_features_mask)
        hidden_states, encoder_frames = self.encode_audio(input_features, input_features_mask, audio_hidden_states)
        return LsmAudioOutput(
            last_hidden_state=hidden_states,
            pooler_output=self.projector(
                hidden_states,
                encoder_frames,
                self.get_reading_embeddings().__call__,
                self.get_input_embeddings().__call__,
            ),
            num_tokens=torch.tensor(self._num_audio_tokens(encoder_frames)),
        )

    def encode_audio(
        self,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        audio_hidden_states: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, list[int]]:
        """Return the audio tower's output `(chunks, encoder_frames, d_audio)`, which is only computed if it is not
        given, and the number of real frames of each chunk. Arguments and errors are as in [`get_audio_features`]."""
        if (input_features is None) == (audio_hidden_states is None):
            raise ValueError("Give exactly one of `input_features` and `audio_hidden_states`.")
        audio = input_features if audio_hidden_states is None else audio_hidden_states
        if audio.ndim != 3 or audio.numel() == 0:
            raise ValueError(f"The audio must have three axes, none of them empty, got shape {tuple(audio.shape)}.")
        encoder_frames = self._encoder_frames(input_features, input_features_mask, audio_hidden_states)
        if audio_hidden_states is None:
            # With "max_length", the padding is not masked, as in the training of Whisper and of the original code.
            mask = input_features_mask if self.config.audio_padding == "longest" else None
            audio_hidden_states = self.audio_tower(input_features, attention_mask=mask).last_hidden_state
        chunks, frames, _ = audio_hidden_states.shape
        if len(encoder_frames) != chunks or max(encoder_frames) > frames:
            raise ValueError(
                f"`input_features_mask` is of {len(encoder_frames)} chunks of up to {max(encoder_frames)} encoder "
                f"frames, but the audio has {chunks} of up to {frames}."
            )
        return audio_hidden_states, encoder_frames

    def _cut_rows(self, features: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Cut rows with all chunks of a clip into a row for each chunk with real frames."""
        most, (rows, mels, frames) = 2 * self.config.audio_config.max_source_positions, features.shape
        padding = -frames % most
        mask = nn.functional.pad(features.new_ones(rows, frames).long() if mask is None else mask, (0, padding))
        mask = mask.reshape(-1, most)
        features = nn.functional.pad(features, (0, padding)).reshape(rows, mels, -1, most).transpose(1, 2)
        real = mask.any(dim=-1)
        return features.reshape(-1, mels, most)[real], mask[real]

    def _num_audio_tokens(self, encoder_frames: list[int]) -> list[int]:
        return num_audio_tokens(encoder_frames, **self.config.windowing)

    @staticmethod
    def _encoder_frames(input_features, input_features_mask, audio_hidden_states) -> list[int]:
        """Return the number of real encoder frames of each chunk."""
        if input_features_mask is not None:
            return [num_encoder_frames(frames) for frames in input_features_mask.sum(-1).tolist()]
        if audio_hidden_states is not None:
            return [audio_hidden_states.shape[1]] * audio_hidden_states.shape[0]
        return [num_encoder_frames(input_features.shape[-1])] * input_features.shape[0]

    def _speech(self, input_features, input_features_mask, audio_hidden_states, audio_embeds) -> torch.Tensor | None:
        """Return the speech embeddings `(total_tokens, hidden)` from one of the inputs; None without audio."""
        sources = (input_features, audio_hidden_states, audio_embeds)
        if (count := sum(source is not None for source in sources)) > 1:
            raise ValueError(
                "Give exactly one of `input_features`, `audio_hidden_states` and `audio_embeds`, or none of them; got "
                f"{count}."
            )
        if not count or audio_embeds is not None:
            return audio_embeds
        return self.get_audio_features(input_features, input_features_mask, audio_hidden_states).pooler_output

    def _check_length(self, prompt: torch.Tensor, attention_mask, past_key_values) -> None:
        """Refuse a prompt (ids or embeddings) that is empty or too long. The LLM itself would not notice.

        Raises:
            ValueError: the prompt is empty, or longer than the LLM has positions; the message contains the lengths.
        """
        batch, length = prompt.shape[:2]
        if prompt.numel() == 0:
            raise ValueError(f"The prompt is empty: it has the shape {tuple(prompt.shape)}.")
        positions = num_positions(self.config.text_config)
        past = 0 if past_key_values is None or length == 1 else past_key_values.get_seq_length()
        if positions is None or past + length <= positions:
            return
        padded = attention_mask is not None and attention_mask.ndim == 2
        lengths = attention_mask.sum(-1) if padded else torch.full((batch,), past + length)
        tokens, row = (int(value) for value in lengths.max(0))
        if tokens <= positions:
            return
        speech = int((prompt[row] == self.config.audio_token_id).sum()) if prompt.ndim == 2 else 0
        fits = self.config.seconds_that_fit(positions - tokens + speech)
        way_out = f"{fits} s of speech fit beside its other tokens: cut the audio" if speech else "cut it"
        raise ValueError(
            f"The prompt takes {tokens} tokens, {speech} of them speech, but the LLM has {positions} positions; "
            f"{way_out}, or take an LLM with more positions or longer windows."
        )

    def _embed(self, input_ids: torch.Tensor, past_key_values, *audio: torch.Tensor | None) -> torch.Tensor:
        """Embed the prompt, with the speech embeddings in place of the audio placeholders."""
        # The text is embedded first, as without speech, because processes with sharded weights must gather them in the
        # same order.
        inputs_embeds = self.get_input_embeddings()(input_ids)
        speech = self._speech(*audio)
        # Generated tokens contain no placeholders, and counting them would synchronise with the device at each step.
        generating = past_key_values is not None and (input_ids.shape[1] == 1 or past_key_values.get_seq_length() > 0)
        if generating and speech is None:
            return inputs_embeds
        placeholders = input_ids == self.config.audio_token_id
        expected = int(placeholders.sum()) if self.config.audio_token_id is not None else 0
        actual = 0 if speech is None else speech.shape[0]
        if expected != actual:
            raise ValueError(
                f"The prompt has {expected} audio placeholder tokens, but the audio has {actual} embeddings."
            )
        if speech is None:
            return inputs_embeds + self._run_on_silence() if self.training and not generating else inputs_embeds
        speech = speech.to(inputs_embeds.device, inputs_embeds.dtype)
        return inputs_embeds.masked_scatter(placeholders[..., None], speech)

    def _mask_blanks(self, attention_mask: torch.Tensor | None, inputs_embeds: torch.Tensor, past_key_values):
        """Return the mask without blanks. A static cache's masks of more axes, or a dict of them, were made from one
        without blanks; vLLM masks nothing."""
        made = attention_mask is not None and getattr(attention_mask, "ndim", None) != 2
        if made or _is_in_vllm(self.config):
            return attention_mask
        if attention_mask is not None:
            return without_blanks(attention_mask, inputs_embeds)
        cached = 0 if past_key_values is None else past_key_values.get_seq_length()
        batch, length = inputs_embeds.shape[:2]
        mask = torch.ones(batch, cached + length, dtype=torch.long, device=inputs_embeds.device)
        mask = without_blanks(mask, inputs_embeds)
        return None if mask.all() else mask

    def _run_on_silence(self) -> torch.Tensor:
        """Run tower and projector on silence and return zero, for batches of text in training. With DDP, FSDP and ZeRO,
        all processes must use the same modules in each step, or they wait for each other forever."""
        silence = torch.zeros(1, self.config.audio_config.num_mel_bins, 2, device=self.projector.queries.device)
        return 0 * self.get_audio_features(silence, silence.new_ones(1, 2, dtype=torch.long)).pooler_output.sum()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        audio_hidden_states: torch.Tensor | None = None,
        audio_embeds: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Return the LLM's last hidden states `(batch, length, hidden)`. The arguments are those of
        [`LsmForConditionalGeneration.forward`]."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        if not _is_in_vllm(self.config):  # there, a row has the tokens of many prompts, whose lengths vLLM checks
            self._check_length(input_ids if inputs_embeds is None else inputs_embeds, attention_mask, past_key_values)
        may_have_blanks = inputs_embeds is not None
        if inputs_embeds is None:
            audio = (input_features, input_features_mask, audio_hidden_states, audio_embeds)
            may_have_blanks = any(value is not None for value in audio)
            inputs_embeds = self._embed(input_ids, past_key_values, *audio)
        elif any(audio is not None for audio in (input_features, audio_hidden_states, audio_embeds)):
            raise ValueError(
                "Audio needs `input_ids` with placeholder tokens; `inputs_embeds` already contain speech embeddings."
            )
        if may_have_blanks:
            attention_mask = self._mask_blanks(attention_mask, inputs_embeds, past_key_values)
        if position_ids is None and past_key_values is None and attention_mask is not None and attention_mask.ndim == 2:
            # As in `generate`: padding on the left must not shift positions.
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )


def content_of(weights: Mapping[str, torch.Tensor], part: str, dtype: torch.dtype) -> str:
    """Return the hash of an LSM's encoder or LLM, `"sha256:"` and 16 hex digits.

    To be fast, it depends on only some values of each weight, which every training changes. They are converted to
    bfloat16, so that the hash is the same for all data types but float16.

    Args:
        weights: an LSM's `state_dict()`.
        part: a key of `PARTS`.
        dtype: data type in which the LSM was composed.
    """
    digest = hashlib.sha256()
    for name in sorted(name for name in weights if name.startswith(PARTS[part])):
        values = weights[name].flatten()
        values = values[:: -(-len(values) // SAMPLE)].to("cpu", dtype).to(torch.bfloat16).contiguous()
        digest.update(f"{name} {tuple(weights[name].shape)}".encode() + values.view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()[:16]}"


def reading_vectors(
    words: torch.Tensor, audio_tokenizer: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase, config: LsmConfig
) -> torch.Tensor:
    """Return the reading embeddings of `reading_embeddings="audio"`: a vector of each of the LLM's word pieces, made of
    the embeddings of Whisper's decoder, which are also its output matrix.

    What Whisper's decoder reads from the encoder points to the words that are said, also to those that the training of
    the projector does not have (`docs/real.md`). A piece that Whisper divides has, seen from the mean of all, the
    direction of the sum and the mean length of its parts. A piece without text has zeros.

    Args:
        words: `(audio vocabulary, d_audio)` float, `WhisperModel.decoder.embed_tokens.weight` in the data type of the
            checkpoint, so that the vectors are the same for LSMs of all data types.
        audio_tokenizer, tokenizer: the tokenizers of Whisper and of the LLM.
        config: the LSM's configuration, of which `non_text_token_ids` and the number of embeddings are used.

    Returns:
        `(vocab_size, d_audio)` float64, because another order of summation should not change what is rounded to the
        model's data type. Round it to float32 first, so that bfloat16 is the same for LSMs composed in either.
    """
    words, vocabulary = words.detach().cpu().double(), config.text_config.vocab_size
    special = [id for id in audio_tokenizer.added_tokens_decoder if id < len(words)]
    ordinary = torch.ones(len(words), dtype=torch.bool).index_fill_(0, torch.tensor(special, dtype=torch.long), False)
    mean = words[ordinary].mean(0)
    differences = words - mean

    ids = torch.tensor(sorted(set(range(vocabulary)) - set(config.non_text_token_ids)))
    parts = _divide(tokenizer.convert_ids_to_tokens(ids.tolist()), tokenizer, audio_tokenizer)
    lengths = torch.tensor([len(part) for part in parts])
    piece = ids.repeat_interleave(lengths)
    said = differences[[id for part in parts for id in part]]
    sums = torch.zeros(vocabulary, words.shape[1], dtype=words.dtype).index_add_(0, piece, said)
    norms = torch.zeros(vocabulary, dtype=words.dtype).index_add_(0, piece, said.norm(dim=-1))
    vectors = torch.zeros_like(sums)
    ids, lengths = ids[lengths > 0], lengths[lengths > 0, None]
    vectors[ids] = mean + nn.functional.normalize(sums[ids], dim=-1) * norms[ids, None] / lengths
    return vectors


def _divide(tokens: list[str], tokenizer, audio_tokenizer) -> list[list[int]]:
    """Return the ids of Whisper's word pieces that have the text of each token of the LLM."""
    characters = bytes_to_unicode()
    codes = {character: byte for byte, character in characters.items()}
    # A decoder for whole sentences would drop sentencepiece's first space.
    texts = [
        token.replace("\u2581", " ") if "\u2581" in token else tokenizer.convert_tokens_to_string([token])
        for token in tokens
    ]
    parts = audio_tokenizer(texts, add_special_tokens=False).input_ids
    for place, (token, text) in enumerate(zip(tokens, texts, strict=True)):
        if "\ufffd" in text:  # bytes that are only a part of a character
            byte = re.fullmatch(r"<0x([0-9A-F]{2})>", token)  # as sentencepiece writes them
            found = [int(byte[1], 16)] if byte else [codes[character] for character in token if character in codes]
            parts[place] = audio_tokenizer.convert_tokens_to_ids([characters[code] for code in found])
    return parts


def _join(
    source, config: LsmConfig, replacements: Mapping[str, str | None], allow_other_weights: bool, place: Mapping
) -> dict[str, torch.Tensor]:
    """Return all weights of an LSM whose checkpoint contains only the projector.

    Args:
        source: folder or Hub id of the checkpoint.
        config: configuration of the checkpoint.
        replacements: folders or Hub ids of `audio` and `text`; None for those in the configuration.
        allow_other_weights: whether encoder and LLM may have other weights than in the configuration.
        place: options of `from_pretrained` that say where the checkpoint is.

    Raises:
        OSError, ValueError: as in [`LsmForConditionalGeneration.from_pretrained`].
    """
    hub = {name: value for name, value in place.items() if name in HUB_OPTIONS}
    weights = load_file(cached_file(source, SAFE_WEIGHTS_NAME, **place))
    # The tokenizer needs no code of the checkpoint; unless told, transformers would ask the user whether to run it.
    load_tokenizer = functools.partial(AutoTokenizer.from_pretrained, source, trust_remote_code=False, **place)
    load_audio = functools.partial(_load_audio, load_tokenizer=load_tokenizer)
    loads: dict[str, Callable] = {"audio": load_audio, "text": _load_llm}
    # Not `config.dtype`: `AutoModel` writes the data type that it is asked for into the configuration.
    composed = LsmConfig.from_pretrained(source, **place).dtype or torch.float32
    for part, load in loads.items():
        origin = config.sources[part]
        name, revision = replacements[part], None
        try:
            if name is None and origin["revision"].startswith("sha256:"):
                name = str(_folder_near(source, origin["model"]))
            elif name is None:
                name, revision = origin["model"], origin["revision"]
            weights |= load(name, config, {**hub, "revision": revision})
        except OSError as error:
            raise OSError(
                f"{source} is a projector for {origin['model']} ({origin['revision']}), which cannot be loaded: {error}"
                f" Download it, put its folder next to the projector's, or name it with `{part}_model=FOLDER`."
            ) from error
        content = content_of(weights, part, composed)
        if content != origin["content"] and not allow_other_weights:
            raise ValueError(
                f"{source} is a projector for {origin['model']} ({origin['revision']}, weights {origin['content']}), "
                f"but {name} has other weights ({content}): name the right ones with `{part}_model=...`, or pass "
                "`allow_other_weights=True`."
            )
    return weights


def _folder_near(source, name: str) -> Path:
    """Return the folder with this name inside the folder `source`, inside its parent, or inside the parent of that.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    folder = Path(source).resolve()
    places = [near / name for near in (folder, *folder.parents[:2])] if folder.is_dir() else []
    if not (existing := [place for place in places if place.is_dir()]):
        raise FileNotFoundError(f"there is no folder {name}.")
    return existing[0]


def _load_audio(source: str, config: LsmConfig, options: dict, load_tokenizer: Callable) -> dict[str, torch.Tensor]:
    whisper, loaded = WhisperModel.from_pretrained(source, dtype="auto", output_loading_info=True, **options)
    reads_with_words = config.reading_embeddings == "audio"
    needed = ("encoder.", "decoder.embed_tokens.") if reads_with_words else "encoder."
    _refuse_missing(source, [name for name in loaded["missing_keys"] if name.startswith(needed)])
    tower, reading = PARTS["audio"]
    weights = {tower + name: value for name, value in whisper.encoder.state_dict().items()}
    if reads_with_words:
        words, audio_tokenizer = whisper.decoder.embed_tokens.weight, AutoTokenizer.from_pretrained(source, **options)
        weights[f"{reading}weight"] = reading_vectors(words, audio_tokenizer, load_tokenizer(), config).float()
    return weights


def _load_llm(source: str, config: LsmConfig, options: dict) -> dict[str, torch.Tensor]:
    llm, loaded = AutoModelForCausalLM.from_pretrained(source, dtype="auto", output_loading_info=True, **options)
    _refuse_missing(source, loaded["missing_keys"])
    modules = dict(zip(PARTS["text"], (llm.get_decoder(), llm.get_output_embeddings()), strict=True))
    weights = {begin + name: value for begin, module in modules.items() for name, value in module.state_dict().items()}
    # The audio placeholder may have an additional row, which is 0 as in `recipes/compose.py`.
    rows, loaded_rows = config.text_config.vocab_size, llm.get_input_embeddings().num_embeddings
    tables = {llm.get_input_embeddings().weight.data_ptr(), llm.get_output_embeddings().weight.data_ptr()}
    for name, value in weights.items():
        if rows > loaded_rows and (value.data_ptr() in tables or name == "lm_head.bias"):
            weights[name] = nn.functional.pad(value, (0, 0) * (value.ndim - 1) + (0, rows - loaded_rows))
    return weights


def _refuse_missing(source: str, missing) -> None:
    if missing:
        raise ValueError(
            f"{source} lacks weights, which would be random: {len(missing)}, such as {sorted(missing)[:3]}."
        )


def _is_in_vllm(config: LsmConfig) -> bool:
    """Return whether vLLM's backend for transformers models runs the model, with its own attention."""
    return config.text_config._attn_implementation == "vllm"


class LsmForConditionalGeneration(LsmPreTrainedModel, GenerationMixin):
    """A large speech-text model: reads text and speech, writes text."""

    def __init__(self, config: LsmConfig):
        super().__init__(config)
        self.model = LsmModel(config)
        text_config = config.text_config
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=config.lm_head_bias)
        embeddings = self.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}  # LLMs have different names for it
        self.post_init()
        self._no_split_modules = self.model._no_split_modules

    @classmethod
    def _from_config(cls, config, **kwargs):
        """Create a model with random weights. vLLM's backend for transformers models asks `AutoModel` for the base
        model, without a head, to which it adds its own; for all others, `AutoModel` is this class."""
        if _is_in_vllm(config):
            return LsmModel._from_config(config, **kwargs)
        return super()._from_config(config, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        source,
        *args,
        audio_model: str | None = None,
        text_model: str | None = None,
        allow_other_weights: bool = False,
        output_loading_info: bool = False,
        **kwargs,
    ):
        """Load an LSM as in transformers, but refuse checkpoints with missing or unexpected weights.

        A checkpoint that contains only the projector (`save_pretrained(..., projector_only=True)`) is joined to its
        Whisper encoder and its LLM. If their names are those of folders, they are searched in and next to the
        projector's folder.

        Args:
            source: folder or Hub id.
            audio_model, text_model: folder or Hub id of the Whisper checkpoint and of the LLM, instead of those that
                the projector was trained with.
            allow_other_weights: whether the projector may be joined to weights with which it was not trained.
            output_loading_info: whether to return the loading info of transformers, too.
            args, kwargs: as in transformers.

        Raises:
            OSError: encoder or LLM cannot be found.
            ValueError: weights are missing or unexpected, or the projector was trained with other weights.
        """
        place = {name: kwargs[name] for name in (*HUB_OPTIONS, "revision", "subfolder") if name in kwargs}
        config, replacements = kwargs.get("config"), {"audio": audio_model, "text": text_model}
        if source is not None and not hasattr(config, "projector_only"):  # remote code has its own configuration class
            with contextlib.suppress(OSError):  # not an LSM; transformers loads an adapter or says what is missing
                config = LsmConfig.from_pretrained(config or source, **place)
        joined = getattr(config, "projector_only", False)
        if not joined and (named := next(filter(None, replacements.values()), None)):
            raise ValueError(f"{source} has its own encoder and LLM, so {named!r} has no effect; leave it out.")
        if joined:
            config = copy.deepcopy(config)
            config.projector_only = False
            kwargs |= {"config": config, "state_dict": _join(source, config, replacements, allow_other_weights, place)}
        model, info = super().from_pretrained(None if joined else source, *args, output_loading_info=True, **kwargs)
        if joined:
            model.name_or_path = model.config._name_or_path = str(source)
            model.generation_config = GenerationConfig.from_pretrained(source, **place)
        problems = {kind: sorted(map(str, info.get(kind) or ())) for kind in ("missing_keys", "unexpected_keys")}
        if any(problems.values()):
            listed = "; ".join(f"{len(keys)} {kind}: {keys[:5]}" for kind, keys in problems.items() if keys)
            raise ValueError(f"The checkpoint does not fit the model, which would leave weights random. {listed}")
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory, *, projector_only: bool = False, **kwargs):
        """Save an LSM as in transformers.

        Args:
            save_directory: folder.
            projector_only: whether to save only the projector, in the LLM's data type, without encoder and LLM.
                `from_pretrained` joins it to them again.
            kwargs: as in transformers.

        Raises:
            ValueError: `projector_only` is set, but encoder or LLM are unknown or were trained.
        """
        if not projector_only:
            return super().save_pretrained(save_directory, **kwargs)
        weights, sources = self.state_dict(), self.config.sources
        for part in PARTS:
            if sources is None or sources[part]["content"] != content_of(weights, part, self.dtype):
                problem = "is not named in the configuration" if sources is None else f"is not {sources[part]} any more"
                raise ValueError(
                    f"The {part} model {problem}, so the projector alone could not restore this LSM: save the whole "
                    "LSM, or compose it again and train it with `--llm frozen`."
                )
        own = {name: value for name, value in weights.items() if not name.startswith(sum(PARTS.values(), ()))}
        dtype = self.get_input_embeddings().weight.dtype
        self.config.projector_only = True
        try:
            super().save_pretrained(
                save_directory, state_dict={name: value.to(dtype) for name, value in own.items()}, **kwargs
            )
        finally:
            self.config.projector_only = False

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module):
        self.lm_head = value

    def get_audio_features(self, *args, **kwargs) -> LsmAudioOutput:
        """See [`LsmModel.get_audio_features`]."""
        return self.model.get_audio_features(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        audio_hidden_states: torch.Tensor | None = None,
        audio_embeds: torch.Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Run the model on a batch of prompts.

        Blanks in speech are masked. `generate` masks them in all steps; another loop with a cache needs
        [`without_blanks`], too.

        Args:
            input_ids: `(batch, length)` int64, with audio placeholders in the places of the speech embeddings.
            attention_mask: `(batch, length)`, 1 for real tokens.
            labels: `(batch, length)` int64, not shifted; -100 for tokens without a loss.
            logits_to_keep: the positions whose logits are computed: the last ones if an integer (0 for all), those in
                `(kept,)` int64 for all rows, or those of a mask `(batch, length)` bool, which gives logits of the shape
                `(positions, vocabulary)`.
            input_features: `(chunks, mels, frames)` float, log-mel features of all clips in prompt order, at 100
                frames per second, with each clip cut into chunks of at most 30 s. Absent for text-only prompts.
            input_features_mask: `(chunks, frames)`, 1 for real frames, right-padded.
            audio_hidden_states: `(chunks, encoder_frames, d_audio)` float, precomputed output of the audio tower,
                instead of `input_features` and with the same mask.
            audio_embeds: `(total_tokens, hidden)` float, precomputed speech embeddings, instead of both.
            position_ids, past_key_values, inputs_embeds, use_cache, kwargs: as in transformers.

        Raises:
            ValueError: the numbers of speech embeddings and of placeholders differ, the prompt has more tokens than the
                LLM has positions, or arguments exclude each other.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            input_features=input_features,
            input_features_mask=input_features_mask,
            audio_hidden_states=audio_hidden_states,
            audio_embeds=audio_embeds,
            **kwargs,
        )
        logits = self._logits(outputs.last_hidden_state, logits_to_keep)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _logits(self, hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
        """Return the logits at these positions. Some LLMs change them after the head: Cohere and Granite scale them,
        and Gemma caps them."""
        if isinstance(logits_to_keep, int):
            hidden_states = hidden_states[:, -logits_to_keep:]
        elif logits_to_keep.dtype == torch.bool:
            hidden_states = hidden_states[logits_to_keep]
        else:
            hidden_states = hidden_states[:, logits_to_keep]
        config = self.config.text_config
        logits = self.lm_head(hidden_states) * (getattr(config, "logit_scale", None) or 1.0)
        logits = logits / (getattr(config, "logits_scaling", None) or 1.0)
        cap = getattr(config, "final_logit_softcapping", None)
        return cap * torch.tanh(logits / cap) if cap else logits

    @torch.no_grad()
    def generate(self, inputs=None, **kwargs):
        """Generate as in transformers. Speech is read first, because its blanks are masked in every step."""
        ids, embeds, places = kwargs.get("input_ids", inputs), kwargs.get("inputs_embeds"), None
        audio = {name: kwargs.get(name) for name in AUDIO_INPUTS}
        if embeds is None and ids is not None and any(value is not None for value in audio.values()):
            self.model._check_length(ids, kwargs.get("attention_mask"), None)  # before the speech is encoded
            embeds, places = self.model._speech(**audio), ids == self.config.audio_token_id
            if kwargs.get("assistant_model") is None:  # which may be an LSM with embeddings of its own
                kwargs.update(dict.fromkeys(audio), audio_embeds=embeds)
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        if embeds is not None and (places is None or int(places.sum()) == len(embeds)):  # `forward` refuses others
            mask = self._real_tokens(embeds if places is None else ids, **kwargs) if mask is None else mask
            kwargs["attention_mask"] = without_blanks(mask, embeds, places)
            if cache is not None:  # for a prompt that goes on without the audio
                cache.attention_mask = kwargs["attention_mask"]
        elif (before := getattr(cache, "attention_mask", None)) is not None and ids is not None:
            mask = (self._real_tokens(ids, **kwargs) if mask is None else mask).clone()
            cached = min(int(cache.get_seq_length()), before.shape[1])  # 0 if the cache was reset
            mask[:, :cached] *= before[:, :cached]
            kwargs["attention_mask"] = mask
        if inputs is not None:
            kwargs["inputs"] = inputs
        return super().generate(**kwargs)

    def _real_tokens(self, prompt: torch.Tensor, **kwargs) -> torch.Tensor:
        """Return the mask that transformers uses if none is given."""
        settings = copy.deepcopy(self.generation_config)
        settings.update(**kwargs)
        self._prepare_special_tokens(settings, kwargs_has_attention_mask=True, device=prompt.device)
        return self._prepare_attention_mask_for_generation(prompt, settings, {})

    def prepare_inputs_for_generation(
        self, input_ids, *args, inputs_embeds=None, is_first_iteration: bool = False, **kwargs
    ):
        """Pass the audio on only in the step with the prompt; in later steps, it is in the cache, if there is one. If
        the first step cannot be recognised (a draft model, or a cache from before), placeholders in the ids decide."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, *args, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        cache, ids = inputs.get("past_key_values"), inputs.get("input_ids")
        begins = is_first_iteration and (cache is None or cache.get_seq_length() == 0)
        if begins or not kwargs.get("use_cache", True) or ids is None:
            return inputs
        token = self.config.audio_token_id
        has_audio = token is not None and ids.shape[1] > 1 and bool((ids == token).any())
        audio = {name: kwargs.get(name) if has_audio else None for name in AUDIO_INPUTS}
        return {**inputs, **audio}

    def _prepare_generated_length(self, generation_config, *args, input_ids_length, inputs_tensor, **kwargs):
        """Limit the length of the answer to the LLM's positions."""
        generation_config = super()._prepare_generated_length(
            generation_config, *args, input_ids_length=input_ids_length, inputs_tensor=inputs_tensor, **kwargs
        )
        positions = num_positions(self.config.text_config)
        unseen = inputs_tensor.shape[1] - input_ids_length  # embeddings, which transformers does not count
        if positions is not None and generation_config.max_length + unseen > positions:
            most = max(positions - unseen, input_ids_length + 1)  # `forward` refuses prompts that are too long
            logger.warning(f"The LLM has {positions} positions: the answer may have {most - input_ids_length} tokens.")
            generation_config.max_length = most
        return generation_config

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **kwargs):
        """Repeat prompts for beams or samples. The rows of audio of a prompt must stay together."""
        audio = {name: kwargs.pop(name) for name in AUDIO_INPUTS if kwargs.get(name) is not None}
        if audio and expand_size > 1:
            rows = self._expanded_audio_rows(input_ids, expand_size, **audio)
            audio = {name: value[rows.to(value.device)] for name, value in audio.items()}
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        return input_ids, {**kwargs, **audio}

    def _expanded_audio_rows(
        self,
        input_ids,
        expand_size,
        input_features=None,
        input_features_mask=None,
        audio_hidden_states=None,
        audio_embeds=None,
    ) -> torch.Tensor:
        """Return the indices of the audio rows after each prompt is repeated `expand_size` times."""
        if audio_embeds is not None:
            row_ends = torch.arange(1, audio_embeds.shape[0] + 1)
        else:
            frames = self.model._encoder_frames(input_features, input_features_mask, audio_hidden_states)
            row_ends = torch.tensor(self.model._num_audio_tokens(frames)).cumsum(0)
        prompt_ends = (input_ids == self.config.audio_token_id).sum(-1).cumsum(0).cpu()
        prompts = torch.searchsorted(prompt_ends, row_ends)  # the prompt that contains each row's last token
        return torch.cat([(prompts == index).nonzero()[:, 0].repeat(expand_size) for index in range(len(prompt_ends))])


LsmForConditionalGeneration.register_for_auto_class("AutoModelForMultimodalLM")
if not __package__:  # in a checkout (not remote code), `trust_remote_code` should not be needed
    for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM):
        auto_class.register(LsmConfig, LsmForConditionalGeneration, exist_ok=True)

__all__ = ["LsmForConditionalGeneration", "LsmModel", "LsmPreTrainedModel"]
