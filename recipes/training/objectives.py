"""What is learned: the response that the LLM wrote (the paper), or what it would say if it read.

The second is KL to its own distribution over the response, given the transcript: the objective of Ultravox and, on
hidden states, of BLSP-KD (arXiv 2405.19041). The same LLM is on both sides, so it is `self-powered` all the same.

Logits stay in the model's own dtype. Their copies in float32, which are twice as large or more, exist for one chunk of
positions at a time: backward computes each chunk again.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

CHUNK = 256  # positions whose logits are in float32 at one time
NEVER = -1e30  # a logit of probability 0; of -inf, gradients would be NaN


def predicts(labels: torch.Tensor) -> torch.Tensor:
    """Which positions predict a label: a mask `(batch, length)`, one to the left of the labelled positions."""
    labelled = labels[:, 1:] != -100
    return nn.functional.pad(labelled, (0, 1), value=False)


def response_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Sum over positions of the cross-entropy of `logits` `(positions, vocabulary)` and the `tokens` `(positions,)`."""
    return _in_chunks(_cross_entropy, logits, tokens)


def distillation_loss(
    logits: torch.Tensor,
    wanted: torch.Tensor,
    temperature: float,
    tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum over positions of KL(wanted ‖ given), both at `temperature`, times its square (Hinton et al., 2015, arXiv
    1503.02531: so that gradients do not shrink with the temperature).

    Args:
        logits: `(positions, vocabulary)` of the model that learns.
        wanted: the same of the model that it learns from; or what [`most_likely`] keeps of it.
        tokens: `(positions, k)` int64, of [`most_likely`]; None if `wanted` has the whole vocabulary.
    """
    divergence = partial(_divergence, temperature=temperature)
    return _in_chunks(divergence, logits, wanted, *([] if tokens is None else [tokens]))


def most_likely(logits: torch.Tensor, k: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The `k` most likely tokens of every position, and all the others as one.

    Args:
        logits: `(positions, vocabulary)`.

    Returns:
        Logits `(positions, k + 1)` float32, the last one of all other tokens together, and the tokens `(positions, k)`.
    """
    tokens = logits.topk(k, dim=-1).indices
    chunks = zip(logits.split(CHUNK), tokens.split(CHUNK), strict=True)
    return torch.cat([_gather(*chunk, temperature) for chunk in chunks]), tokens


def _in_chunks(loss: Callable[..., torch.Tensor], *parts: torch.Tensor) -> torch.Tensor:
    """The sum of `loss` over chunks of the positions of `parts`, none of whose intermediate results are kept."""
    chunks = zip(*(part.split(CHUNK) for part in parts), strict=True)
    return sum(checkpoint(loss, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks)


def _cross_entropy(logits, tokens) -> torch.Tensor:
    return nn.functional.cross_entropy(logits.float(), tokens, reduction="sum")


def _divergence(logits, wanted, tokens=None, *, temperature: float) -> torch.Tensor:
    if tokens is not None:
        logits = _gather(logits, tokens, temperature)
    given = nn.functional.log_softmax(logits.float() / temperature, dim=-1)
    wanted = nn.functional.log_softmax(wanted.float() / temperature, dim=-1)
    return nn.functional.kl_div(given, wanted, reduction="sum", log_target=True) * temperature**2


def _gather(logits, tokens, temperature: float) -> torch.Tensor:
    """Logits of `tokens` and, last, of all others as one: at `temperature` its probability is the sum of theirs."""
    logits = logits.float()
    others = logits.scatter(-1, tokens, NEVER) / temperature
    return torch.cat([logits.gather(-1, tokens), temperature * others.logsumexp(-1, keepdim=True)], dim=-1)
