"""Attention on a CPU, chosen by what was measured to be fast there (`docs/speed.md`, "At real size")."""

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ON_CPU = "on_cpu"
# With more scores (32 MiB) they leave the cache, and torch's blocks of them are faster: a batch of 32 clips of
# 8 s took 4 % longer to encode without this limit.
MOST_SCORES = 2**24
OTHER_SCORES = ("position_bias", "softcap", "cache")  # what only torch's own attention is told


def attend_fast(model: PreTrainedModel) -> None:
    """Have a model that runs on a CPU attend with [`attention_on_cpu`], if nothing but torch's own was chosen."""
    if not torch.cuda.is_available() and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(ON_CPU)


def attention_on_cpu(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention by two matrix products in bfloat16, and torch's own in float32 or for many scores.

    In bfloat16 torch's own takes two to four times as long forwards and up to seven times with the backward pass. Heads
    that share keys are rows of one product, so keys and values are not repeated for them.

    Args:
        query: `(batch, heads, length, size)`.
        key, value: `(batch, key heads, keys, size)`.
        attention_mask: `(batch, 1 or heads, length, keys)` bool, True where is attended to; None for everywhere.

    Returns:
        `(batch, length, heads, size)`, and no weights.
    """
    batch, heads, length, size = query.shape
    groups, keys = key.shape[1:3]
    other = any(kwargs.get(name) is not None for name in OTHER_SCORES)
    other = other or (attention_mask is not None and attention_mask.dtype != torch.bool)  # the caller's own
    if (
        other
        or query.dtype != torch.bfloat16
        or query.device.type != "cpu"
        or batch * heads * length * keys > MOST_SCORES
    ):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    rows = (query * (size**-0.5 if scaling is None else scaling)).reshape(batch, groups, -1, size)
    scores = (rows @ key.transpose(2, 3)).view(batch, heads, length, keys)
    if attention_mask is not None:
        scores = scores.masked_fill_(~attention_mask, torch.finfo(scores.dtype).min)
    weights = nn.functional.dropout(scores.softmax(-1), dropout)
    read = (weights.view(batch, groups, -1, keys) @ value).view(batch, heads, length, -1)
    return read.transpose(1, 2).contiguous(), None


def _mask_on_cpu(*args, **kwargs) -> torch.Tensor | None:
    """That of torch's attention, but always there if not all is attended to."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


AttentionInterface.register(ON_CPU, attention_on_cpu)
AttentionMaskInterface.register(ON_CPU, _mask_on_cpu)
