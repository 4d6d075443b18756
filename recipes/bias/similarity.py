"""How alike speech and its transcript are inside the LLM, at its input and after every layer.

- CKA over utterances: mean state of the speech tokens against mean state of the transcript tokens, linear kernel
  (Kornblith et al., arXiv 1905.00414) with the unbiased HSIC (Song et al., 2012): 0 for unrelated features whatever
  their width, 1 for the same up to rotation and scale.
- Token similarity: for every transcript token the cosine of the speech token most like it, averaged; beside it the same
  with another utterance's speech, which says how much of it is owed to the content.
"""

from collections.abc import Sequence

import torch

from recipes.bias.roles import ROLES, teacher_forced
from recipes.listening.features import AudioFeatureStore
from recipes.listening.speech_llm import SpeechLLM

EXAMPLES = 2  # token maps kept


def cka(left: torch.Tensor, right: torch.Tensor) -> float:
    """Linear CKA of two views `(n, width)`, `(n, other width)` of the same n examples, unbiased.

    Raises:
        ValueError: fewer than 4 examples, or other numbers of them.
    """
    if len(left) != len(right) or len(left) < 4:
        raise ValueError(f"CKA needs the same examples twice, 4 or more; got {len(left)} and {len(right)}.")
    # The estimator is blind to what all examples share; rounding is not, and states of LLMs share a lot.
    centred = [view.double() - view.double().mean(0) for view in (left, right)]
    kernels = [view @ view.T for view in centred]
    cross, one, other = _hsic(*kernels), _hsic(kernels[0], kernels[0]), _hsic(kernels[1], kernels[1])
    return float(cross / (one * other).clamp(min=1e-30).sqrt())


def _hsic(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    n = len(left)
    left, right = left - torch.diag(left.diag()), right - torch.diag(right.diag())
    between = left.sum() * right.sum() / ((n - 1) * (n - 2)) - 2 * (left.sum(0) @ right.sum(0)) / (n - 2)
    return ((left * right).sum() + between) / (n * (n - 3))


def cka_interval(left: torch.Tensor, right: torch.Tensor, folds: int = 20) -> tuple[float, float]:
    """95 % interval of `cka` by the jackknife over groups of examples: resampling would repeat examples, which are
    alike to themselves and inflate it."""
    n = len(left)
    if n < 8:
        raise ValueError(f"an interval of CKA needs 8 or more examples; got {n}.")
    folds = min(folds, n // 2)
    groups = torch.arange(n) % folds
    parts = torch.tensor([cka(left[groups != fold], right[groups != fold]) for fold in range(folds)])
    error = ((folds - 1) / folds * (parts - parts.mean()).square().sum()).sqrt()
    value = cka(left, right)
    return value - 1.96 * float(error), value + 1.96 * float(error)


def best_match(speech: torch.Tensor, text: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Mean over text tokens of the cosine of the speech token most like them, and all cosines `(speech, text)`."""
    normal = torch.nn.functional.normalize
    cosines = normal(speech.float(), dim=-1) @ normal(text.float(), dim=-1).T
    return float(cosines.amax(0).mean()), cosines


@torch.inference_mode()
def token_states(
    llm: SpeechLLM, rows: Sequence[dict], slot: str, store: AudioFeatureStore | None = None, batch_size: int = 16
) -> list[torch.Tensor]:
    """For every row the states of what stands in the slot, `(levels, tokens, width)`: input and every layer."""
    states = []
    speech = ROLES.index("speech")
    for start in range(0, len(rows), batch_size):
        batch = teacher_forced(llm, rows[start : start + batch_size], slot, store)
        hidden = torch.stack(llm.model(**batch.inputs, output_hidden_states=True, use_cache=False).hidden_states)
        states += [hidden[:, row, roles == speech].cpu() for row, roles in enumerate(batch.roles)]
    return states


def measure(llm: SpeechLLM, rows: Sequence[dict], store: AudioFeatureStore | None = None, batch_size: int = 16) -> dict:
    """Similarity of speech and transcript over utterances, level by level.

    Args:
        rows: at least 8, with `audio`, `transcript`, `instruction` and `response`. All are read with the instruction
            of the first: behind instructions of their own, speech and transcript would be alike for what they share.

    Returns:
        `levels` (`input`, `layer 1`, ...), `cka`, `cosine`, `cosine_other` (lists over levels), `intervals` of each,
        and `examples`: transcript, tokens and the map of cosines `(speech, text)` at the input, the middle and the end.
    """
    rows = [row | {"instruction": rows[0]["instruction"]} for row in rows]
    heard = token_states(llm, rows, "audio", store, batch_size)
    read = token_states(llm, rows, "transcript", None, batch_size)
    levels = ["input", *(f"layer {layer}" for layer in range(1, len(heard[0])))]
    found = {"levels": levels, "cka": [], "cosine": [], "cosine_other": []}
    intervals: dict[str, list] = {"cka": [], "cosine": [], "cosine_other": []}
    for level in range(len(levels)):
        speech, text = ([states[level] for states in side] for side in (heard, read))
        left, right = (torch.stack([state.float().mean(0) for state in side]) for side in (speech, text))
        found["cka"].append(cka(left, right))
        intervals["cka"].append(cka_interval(left, right))
        for name, shift in (("cosine", 0), ("cosine_other", len(rows) // 2)):
            matches = [best_match(speech[(i + shift) % len(rows)], text[i])[0] for i in range(len(rows))]
            value = torch.tensor(matches)
            error = 1.96 * float(value.std()) / len(matches) ** 0.5
            found[name].append(float(value.mean()))
            intervals[name].append((float(value.mean()) - error, float(value.mean()) + error))
    return found | {"intervals": intervals, "examples": _examples(llm, rows, heard, read, levels)}


def _examples(llm: SpeechLLM, rows: Sequence[dict], heard, read, levels: list[str]) -> list[dict]:
    shown = sorted({0, len(levels) // 2, len(levels) - 1})
    examples = []
    for row, speech, text in list(zip(rows, heard, read, strict=True))[:EXAMPLES]:
        tokens = [token for token, role in llm.spans(row, "transcript") if role == "speech"]
        maps = {levels[level]: best_match(speech[level], text[level])[1].round(decimals=3).tolist() for level in shown}
        words = [llm.tokenizer.decode([token]) for token in tokens]
        examples.append({"id": row["id"], "transcript": row["transcript"], "tokens": words, "maps": maps})
    return examples
