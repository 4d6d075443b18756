"""What a row costs to train on, in floating point operations: rows are grouped by it, and MFU and preflight count it.

Counted is useful work alone, 2 FLOPs per weight and token forwards: no padding, no recomputation of checkpointed
activations. Backwards costs as much again for the activations, and again for weights that learn (Kaplan et al., 2020,
arXiv 2001.08361, section 2.1; attention itself as in Chowdhery et al., 2022, arXiv 2204.02311, appendix B).
"""

from dataclasses import dataclass

from torch import nn

from modeling_lsm import LsmForConditionalGeneration

CHUNK_FRAMES = 1500  # encoder frames of Whisper's 30 s


def count(module: nn.Module) -> int:
    """Weights of a module: those in 4 bits, which lie two to a byte, and those that ZeRO-3 has elsewhere (`ds_numel`)
    are counted as what they are."""
    sizes = (
        (2 if type(w).__name__ == "Params4bit" else 1, getattr(w, "ds_numel", w.numel())) for w in module.parameters()
    )
    return sum(packed * size for packed, size in sizes)


@dataclass(frozen=True)
class Costs:
    """FLOPs of training one model, forwards and backwards.

    Args:
        frame: per encoder frame (50 per second), of the audio tower and of what the projector does per frame.
        frame_pair: per pair of encoder frames of a chunk: attention in the tower.
        speech_token: per speech token, of the projector.
        token: per token of the LLM.
        token_pair: per pair of tokens, each with itself and those before it: causal attention in the LLM.
        label: per labelled token, of the head.
    """

    frame: float
    frame_pair: float
    speech_token: float
    token: float
    token_pair: float
    label: float

    @classmethod
    def of(cls, model: LsmForConditionalGeneration, llm: str, stored: bool = False, distill: bool = False) -> "Costs":
        """
        Args:
            model: may be on the meta device: shapes alone are read.
            llm: `full`, or a mode in which the LLM's own weights do not learn.
            stored: the tower's output is read from disk.
            distill: the LLM runs twice: it reads, too, about as many tokens as it hears.
        """
        tower, projector, text = model.model.audio_tower, model.model.projector, model.config.text_config
        audio, passes = model.config.audio_config, (3 if llm == "full" else 2) + distill
        layers = projector.qformer.encoder.layer
        readers = [layer.crossattention.attention for layer in layers if layer.has_cross_attention]
        # Per frame: the scores of all queries of its window, and what they sum up; all else is per query.
        reads = sum(2 * r.num_attention_heads * model.config.queries_per_window * audio.d_model for r in readers)
        once = count(layers[0].attention) + count(readers[0].query)  # the queries of all windows are still the same
        body = count(model.model.language_model) - count(model.get_input_embeddings())
        head = model.lm_head.in_features * model.lm_head.out_features
        # Speech tokens are compared with all embeddings, forwards alone.
        search = 2 * text.vocab_size * text.hidden_size if model.config.pieces_per_token else 0
        encoder = count(tower.layers) + count(tower.conv2) + 2 * count(tower.conv1)  # which has two frames per frame
        return cls(
            frame=(0 if stored else 2 * encoder) + 6 * reads,
            frame_pair=0 if stored else 4 * audio.d_model * audio.encoder_layers,
            speech_token=6 * (count(projector) - once) + search,
            token=2 * passes * body,
            # half of the pairs: causal. Backwards is twice forwards whatever learns, as no operand is a weight.
            token_pair=(3 + distill) * 2 * _attention_width(text) * text.num_hidden_layers,
            label=2 * passes * head,
        )

    def row(self, frames, speech_tokens, tokens, labels):
        """FLOPs of rows.

        Args:
            frames: encoder frames of the clips, an array or tensor as all that follows.
            speech_tokens: of them, in the prompts.
            tokens: of prompt and response together, speech tokens included.
            labels: tokens of the responses.
        """
        chunk = frames.clip(max=CHUNK_FRAMES)  # of a longer clip, chunks do not see one another
        encoder = frames * self.frame + frames * chunk * self.frame_pair
        decoder = tokens * self.token + tokens * tokens * self.token_pair + labels * self.label
        return encoder + speech_tokens * self.speech_token + decoder


def _attention_width(text_config) -> int:
    heads = text_config.num_attention_heads
    return heads * (getattr(text_config, "head_dim", None) or text_config.hidden_size // heads)
