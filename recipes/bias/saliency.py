"""Measure how much each layer of an LLM uses each kind of token when it writes a response.

The saliency of layer l is I_l = |Σ_h A_{h,l} ⊙ ∂L/∂A_{h,l}|, attention times the gradient of the response's loss,
summed over heads before the absolute value is taken ("Label Words are Anchors", arXiv 2305.14160). The paper's Figures
3 and 5 show it.

No attention matrix is kept. The output of a head is O = A·V, so ∂L/∂A = ∂L/∂O·Vᵀ. When the backward pass reaches a
layer, attention and gradient are computed again from queries, keys and values, only for the positions that predict the
response, and summed up. Memory grows with the length of the prompt, not with its square.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from recipes.bias.roles import ROLES, TeacherForcedBatch
from recipes.listening.speech_llm import SpeechLLM

ATTENTION = "lsm_recorded"

# (layer, batch row, attention (heads, queries, keys), its gradient, which keys a query may see (queries, keys))
Record = Callable[[int, int, torch.Tensor, torch.Tensor, torch.Tensor], None]


@dataclass
class _Recording:
    """The batch whose attention is recorded, the function that gets the attention, and the layers so far."""

    batch: TeacherForcedBatch
    record: Record
    layers: set[int] = field(default_factory=set)


_recordings: list[_Recording] = []


def recorded_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Compute SDPA attention as transformers does, and pass it to the current recording in the backward pass."""
    refused = [name for name in ("softcap", "s_aux") if kwargs.get(name) is not None]
    if refused:
        raise ValueError(
            f"the attention of {type(module).__name__} has {refused[0]}, which the saliency does not support; analyse "
            "an LLM with plain softmax attention."
        )
    output, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
    )
    if output.requires_grad and _recordings:
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        recording, tensors = _recordings[-1], [tensor.detach() for tensor in (query, key, value)]
        layer = module.layer_idx
        output.register_hook(lambda gradient: _record(recording, layer, *tensors, attention_mask, scale, gradient))
    return output, None


AttentionInterface.register(ATTENTION, recorded_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def _record(recording: _Recording, layer: int, query, key, value, mask, scale: float, gradient) -> None:
    """Record attention and its gradient for the positions that predict each response. `gradient` is that of the layer's
    output, `(batch, length, heads, width)`."""
    recording.layers.add(layer)
    groups = query.shape[1] // key.shape[1]
    for row, length in enumerate(recording.batch.lengths):
        rows = recording.batch.queries(row)
        keys = key[row, :, :length].repeat_interleave(groups, 0).float()
        values = value[row, :, :length].repeat_interleave(groups, 0).float()
        scores = query[row, :, rows].float() @ keys.transpose(-1, -2) * scale
        visible = _visible(mask, row, rows, length, scores.device)
        attention = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        downstream = gradient[row, rows].transpose(0, 1).float() @ values.transpose(-1, -2)
        recording.record(layer, row, attention, downstream, visible)


def _visible(mask: torch.Tensor | None, row: int, rows: slice, length: int, device) -> torch.Tensor:
    """Return which keys each query sees, `(queries, keys)` bool; without a mask, those up to its own position."""
    if mask is None:
        return torch.arange(length, device=device) <= torch.arange(rows.start, rows.stop, device=device)[:, None]
    part = mask[min(row, mask.shape[0] - 1), 0, rows, :length]
    return part if part.dtype == torch.bool else part == 0


@contextlib.contextmanager
def recording(llm: SpeechLLM, batch: TeacherForcedBatch, record: Record) -> Iterator[_Recording]:
    """Inside the block, a backward pass through the LLM calls `record` for each layer and row, the last layer first.

    Gradients end at the embeddings, and no weight gets one.
    """
    decoder, trained = llm.model.get_decoder(), [p for p in llm.model.parameters() if p.requires_grad]
    before = decoder.config._attn_implementation
    hook = llm.model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_(True))
    _recordings.append(_Recording(batch, record))
    try:
        llm.model.requires_grad_(False)
        decoder.set_attn_implementation(ATTENTION)
        yield _recordings[-1]
    finally:
        _recordings.pop()
        hook.remove()
        decoder.set_attn_implementation(before)
        for parameter in trained:
            parameter.requires_grad_(True)


def response_loss(llm: SpeechLLM, batch: TeacherForcedBatch) -> torch.Tensor:
    """Return the sum over the rows of the mean cross-entropy of the response's tokens.

    Tokens that are suppressed in generation have no probability, because their rows in the head may be arbitrary.
    """
    ids = batch.inputs["input_ids"]
    suppressed = torch.tensor(llm.model.generation_config.suppress_tokens or [], dtype=torch.long, device=ids.device)
    spans = [batch.queries(row) for row in range(len(batch.lengths))]
    positions = sorted({place for span in spans for place in range(span.start, span.stop)})
    logits = llm.logits(batch.inputs, torch.tensor(positions, device=ids.device))
    losses = []
    for row, span in enumerate(spans):
        first = positions.index(span.start)
        predicted = logits[row, first : first + span.stop - span.start].float().index_fill(-1, suppressed, -torch.inf)
        losses.append(torch.nn.functional.cross_entropy(predicted, ids[row, span.start + 1 : span.stop + 1]))
    return torch.stack(losses).sum()


@torch.enable_grad()
def measure(llm: SpeechLLM, batch: TeacherForcedBatch) -> list[list[dict[str, dict[str, float]]]]:
    """Measure saliency and attention of each row of a batch.

    Returns:
        A list over layers for each row, of dicts `{"layers", "per_token", "attention"}`, each with the keys of `ROLES`.
        `layers` are shares of the saliency; `per_token` is the saliency of a token, relative to the average token that
        the response can see; `attention` are shares of the attention, means over heads and response tokens. A role
        without tokens has 0.

    Raises:
        ValueError: the LLM has no attention layers that can be recorded.
    """
    shares: dict[tuple[int, int], dict] = {}

    def record(layer: int, row: int, attention, gradient, visible) -> None:
        shares[row, layer] = _shares(attention, gradient, visible, batch.roles[row, : batch.lengths[row]])

    with recording(llm, batch, record) as recorded:
        response_loss(llm, batch).backward()
    if not recorded.layers:
        raise ValueError(f"no attention of {llm.name} could be recorded; expected layers of softmax attention.")
    return [[shares[row, layer] for layer in sorted(recorded.layers)] for row in range(len(batch.lengths))]


def _shares(attention: torch.Tensor, gradient: torch.Tensor, visible: torch.Tensor, roles: torch.Tensor) -> dict:
    saliency = (attention * gradient).sum(0).abs()
    membership = torch.nn.functional.one_hot(roles, len(ROLES)).to(saliency.dtype)
    salient, pairs = (saliency @ membership).sum(0), (visible.to(saliency.dtype) @ membership).sum(0)
    share = salient / salient.sum().clamp(min=torch.finfo(saliency.dtype).tiny)
    per_token = share / (pairs / pairs.sum()).clamp(min=1e-12) * (pairs > 0)
    attended = (attention.mean(0) @ membership).mean(0)
    return {
        name: dict(zip(ROLES, values.tolist(), strict=True))
        for name, values in (("layers", share), ("per_token", per_token), ("attention", attended))
    }
