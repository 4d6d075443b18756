"""What is learned: the response that the LLM wrote (the paper), or what it would say if it read.

The second is KL to its own distribution over the response, given the transcript: the objective of Ultravox and, on
hidden states, of BLSP-KD (arXiv 2405.19041). The same LLM is on both sides, so it is `self-powered` all the same.
"""

import torch
from torch import nn


def predicts(labels: torch.Tensor) -> torch.Tensor:
    """Which positions predict a label: a mask `(batch, length)`, one to the left of the labelled positions."""
    labelled = labels[:, 1:] != -100
    return nn.functional.pad(labelled, (0, 1), value=False)


def response_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Sum over positions of the cross-entropy of `logits` `(positions, vocabulary)` and the `tokens` `(positions,)`."""
    return nn.functional.cross_entropy(logits.float(), tokens, reduction="sum")


def distillation_loss(logits: torch.Tensor, wanted: torch.Tensor, temperature: float) -> torch.Tensor:
    """Sum over positions of KL(wanted ‖ given), both at `temperature`, times its square (Hinton et al., 2015, arXiv
    1503.02531: so that gradients do not shrink with the temperature).

    Args:
        logits: `(positions, vocabulary)` of the model that learns.
        wanted: the same of the model that it learns from.
    """
    given = nn.functional.log_softmax(logits.float() / temperature, dim=-1)
    wanted = nn.functional.log_softmax(wanted.float() / temperature, dim=-1)
    return nn.functional.kl_div(given, wanted, reduction="sum", log_target=True) * temperature**2
