"""The two objectives: cross-entropy on the LLM's responses (the paper), or distillation from an LLM that reads text.

Distillation is the KL divergence from the LLM's own distribution over the response given the transcript, as in
Ultravox and, on hidden states, in BLSP-KD (arXiv 2405.19041). Teacher and student are the same LLM, so this is
self-powered, too.

Logits stay in the model's dtype. Their float32 copies, which are at least twice as large, exist for one chunk of
positions at a time; the backward pass computes each chunk again.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

CHUNK = 256  # positions whose logits are in float32 at the same time
NEVER = -1e30  # a logit of probability 0; with -inf, gradients would be NaN


def predicts(labels: torch.Tensor) -> torch.Tensor:
    """Return a mask `(batch, length)` of the positions that predict a label, one to the left of the labelled ones."""
    labelled = labels[:, 1:] != -100
    return nn.functional.pad(labelled, (0, 1), value=False)


def response_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the sum of the cross-entropy of `logits` `(positions, vocabulary)` and `tokens` `(positions,)`."""
    return _in_chunks(_cross_entropy, logits, tokens)


def distillation_loss(
    logits: torch.Tensor,
    wanted: torch.Tensor,
    temperature: float,
    tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the sum over positions of KL(teacher ‖ student) at `temperature`, times the square of the temperature, so
    that gradients do not depend on it (Hinton et al., 2015, arXiv 1503.02531).

    Args:
        logits: `(positions, vocabulary)`, logits of the student.
        wanted: logits of the teacher, `(positions, vocabulary)` or those of [`most_likely`].
        temperature: temperature of both distributions.
        tokens: `(positions, k)` int64, tokens of [`most_likely`]; None if `wanted` has the whole vocabulary.
    """
    divergence = partial(_divergence, temperature=temperature)
    return _in_chunks(divergence, logits, wanted, *([] if tokens is None else [tokens]))


def most_likely(logits: torch.Tensor, k: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Reduce logits `(positions, vocabulary)` to the `k` most likely tokens of each position, and one logit for all
    other tokens together, whose probabilities are summed at `temperature`.

    Returns:
        Logits `(positions, k + 1)` float32, the last for all other tokens, and the tokens `(positions, k)` int64.
    """
    tokens = logits.topk(k, dim=-1).indices
    chunks = zip(logits.split(CHUNK), tokens.split(CHUNK), strict=True)
    return torch.cat([_gather(*chunk, temperature) for chunk in chunks]), tokens


def _in_chunks(loss: Callable[..., torch.Tensor], *parts: torch.Tensor) -> torch.Tensor:
    """Return the sum of `loss` over chunks of positions, without keeping intermediate results."""
    chunks = zip(*(part.split(CHUNK) for part in parts), strict=True)
    return sum(checkpoint(loss, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks)


def _cross_entropy(logits, tokens) -> torch.Tensor:
    return nn.functional.cross_entropy(logits.float(), tokens, reduction="sum")


def _divergence(logits, wanted, tokens=None, *, temperature: float) -> torch.Tensor:
    if tokens is not None:
        logits = _gather(logits, tokens, temperature)
    student = nn.functional.log_softmax(logits.float() / temperature, dim=-1)
    wanted = nn.functional.log_softmax(wanted.float() / temperature, dim=-1)
    return nn.functional.kl_div(student, wanted, reduction="sum", log_target=True) * temperature**2


def _gather(logits, tokens, temperature: float) -> torch.Tensor:
    """Return the logits of `tokens`, and last a logit whose probability at `temperature` is the sum of all others'."""
    logits = logits.float()
    others = logits.scatter(-1, tokens, NEVER) / temperature
    return torch.cat([logits.gather(-1, tokens), temperature * others.logsumexp(-1, keepdim=True)], dim=-1)
