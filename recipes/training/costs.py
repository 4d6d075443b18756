"""The cost of training on a row in floating point operations, for grouping rows, MFU and preflight.

Only useful work counts, 2 FLOPs per weight and token in the forward pass, without padding and without recomputing
checkpointed activations. The backward pass costs as much for the activations, and as much again for weights that learn
(Kaplan et al., 2020, arXiv 2001.08361, section 2.1; attention as in Chowdhery et al., 2022, arXiv 2204.02311, appendix
B).
"""

from dataclasses import dataclass

from torch import nn

from modeling_lsm import LsmForConditionalGeneration

CHUNK_FRAMES = 1500  # encoder frames of Whisper's 30 s


def count(module: nn.Module) -> int:
    """Return the number of weights of a module, correct also for weights in 4 bits, two of which share a byte, and for
    weights that ZeRO-3 keeps on other devices (`ds_numel`)."""
    sizes = (
        (2 if type(w).__name__ == "Params4bit" else 1, getattr(w, "ds_numel", w.numel())) for w in module.parameters()
    )
    return sum(packed * size for packed, size in sizes)


def count_frozen_audio(model: LsmForConditionalGeneration) -> int:
    """Return the number of weights of the audio tower and of the reading embeddings, which never learn."""
    parts = model.model.named_children()
    return sum(count(module) for name, module in parts if name not in ("projector", "language_model"))


@dataclass(frozen=True)
class Costs:
    """FLOPs of training a model, forward and backward pass together."""

    frame: float  # of audio tower and projector, per encoder frame (50 per second)
    frame_pair: float  # of the tower's attention, per pair of encoder frames of a chunk
    speech_token: float  # of the projector
    token: float  # of the LLM
    token_pair: float  # of the LLM's causal attention, per pair of a token with itself or an earlier one
    label: float  # of the head, per labelled token

    @classmethod
    def of(cls, model: LsmForConditionalGeneration, llm: str, stored: bool = False, distill: bool = False) -> "Costs":
        """Return the costs of a model.

        Args:
            model: the LSM; it may be on the meta device, because only shapes are read.
            llm: `full`, or a mode in which the LLM's own weights do not learn.
            stored: whether the tower's output is read from a feature store.
            distill: whether the LLM also reads the transcript, which has about as many tokens as the speech.
        """
        tower, projector, text = model.model.audio_tower, model.model.projector, model.config.text_config
        audio, passes = model.config.audio_config, (3 if llm == "full" else 2) + distill
        layers = projector.qformer.encoder.layer
        readers = [layer.crossattention.attention for layer in layers if layer.has_cross_attention]
        # Per frame: the attention scores of its window's queries and their weighted sums. The rest is per query.
        reads = sum(2 * r.num_attention_heads * model.config.queries_per_window * audio.d_model for r in readers)
        once = count(layers[0].attention) + count(readers[0].query)  # the same for all windows
        body = count(model.model.language_model) - count(model.get_input_embeddings())
        head = model.lm_head.in_features * model.lm_head.out_features
        # The reader compares speech tokens with all word pieces, in the forward pass only.
        search = 2 * text.vocab_size * model.config.reading_size if model.config.pieces_per_token else 0
        encoder = count(tower.layers) + count(tower.conv2) + 2 * count(tower.conv1)  # conv1 runs per mel frame
        return cls(
            frame=(0 if stored else 2 * encoder) + 6 * reads,
            frame_pair=0 if stored else 4 * audio.d_model * audio.encoder_layers,
            speech_token=6 * (count(projector) - once) + search,
            token=2 * passes * body,
            # Causal: half of the pairs. The backward pass costs twice the forward pass, as no operand is a weight.
            token_pair=(3 + distill) * 2 * _attention_width(text) * text.num_hidden_layers,
            label=2 * passes * head,
        )

    def row(self, frames, speech_tokens, tokens, labels):
        """Return the FLOPs of rows, from their encoder frames, speech tokens, all tokens of prompt and response, and
        tokens of the response. All are arrays or tensors `(rows,)`."""
        chunk = frames.clip(max=CHUNK_FRAMES)  # the chunks of a longer clip do not attend to each other
        encoder = frames * self.frame + frames * chunk * self.frame_pair
        decoder = tokens * self.token + tokens * tokens * self.token_pair + labels * self.label
        return encoder + speech_tokens * self.speech_token + decoder


def _attention_width(text_config) -> int:
    heads = text_config.num_attention_heads
    return heads * (getattr(text_config, "head_dim", None) or text_config.hidden_size // heads)
