"""Measure the similarity of speech and its transcript inside the LLM, at its input and after each layer.

- CKA compares the mean state of the speech tokens with the mean state of the transcript tokens over utterances, with a
  linear kernel (Kornblith et al., arXiv 1905.00414) and the unbiased HSIC (Song et al., 2012). It is 0 for unrelated
  features of any width, and 1 for features that are the same up to rotation and scale.
- Token similarity is the mean, over the transcript tokens, of the cosine of the most similar speech token. The same
  with the speech of another utterance shows how much of it depends on the content.
"""

from collections.abc import Sequence

import torch

from recipes.bias.roles import ROLES, teacher_forced
from recipes.listening.features import AudioFeatureStore
from recipes.listening.speech_llm import SpeechLLM

EXAMPLES = 2  # utterances whose token maps are kept


def cka(left: torch.Tensor, right: torch.Tensor) -> float:
    """Return the unbiased linear CKA of two views `(n, width)` and `(n, other width)` of the same n examples.

    Raises:
        ValueError: there are fewer than 4 examples, or the views have different numbers of them.
    """
    if len(left) != len(right) or len(left) < 4:
        raise ValueError(f"CKA needs the same examples twice, 4 or more; got {len(left)} and {len(right)}.")
    # CKA ignores what all examples have in common, but removing it avoids rounding errors: LLM states share a lot.
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
    """Return the 95 % interval of `cka` by the jackknife over groups of examples. Resampling would repeat examples,
    which would increase the similarity."""
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
    """Return the mean over text tokens of the cosine of the most similar speech token, and all cosines
    `(speech, text)`."""
    normal = torch.nn.functional.normalize
    cosines = normal(speech.float(), dim=-1) @ normal(text.float(), dim=-1).T
    return float(cosines.amax(0).mean()), cosines


@torch.inference_mode()
def token_states(
    llm: SpeechLLM, rows: Sequence[dict], slot: str, store: AudioFeatureStore | None = None, batch_size: int = 16
) -> list[torch.Tensor]:
    """Return the states of the tokens in the slot for each row, `(levels, tokens, width)`, at the input and after each
    layer."""
    states = []
    speech = ROLES.index("speech")
    for start in range(0, len(rows), batch_size):
        batch = teacher_forced(llm, rows[start : start + batch_size], slot, store)
        hidden = torch.stack(llm.model(**batch.inputs, output_hidden_states=True, use_cache=False).hidden_states)
        states += [hidden[:, row, roles == speech].cpu() for row, roles in enumerate(batch.roles)]
    return states


def measure(llm: SpeechLLM, rows: Sequence[dict], store: AudioFeatureStore | None = None, batch_size: int = 16) -> dict:
    """Measure the similarity of speech and transcript at each level, on at least 8 rows. All get the instruction of the
    first row, because different instructions would also make speech and transcript similar.

    Returns:
        A dict: `levels` (`input`, `layer 1`, ...), `cka`, `cosine` and `cosine_other` (lists over levels), their
        `intervals`, and `examples`: transcript, tokens, and the cosines `(speech, text)` of three levels.
    """
    rows = [row | {"instruction": rows[0]["instruction"]} for row in rows]
    speech_states = token_states(llm, rows, "audio", store, batch_size)
    text_states = token_states(llm, rows, "transcript", None, batch_size)
    levels = ["input", *(f"layer {layer}" for layer in range(1, len(speech_states[0])))]
    values: dict[str, list] = {"cka": [], "cosine": [], "cosine_other": []}
    intervals: dict[str, list] = {"cka": [], "cosine": [], "cosine_other": []}
    for level in range(len(levels)):
        speech, text = ([states[level] for states in side] for side in (speech_states, text_states))
        left, right = (torch.stack([state.float().mean(0) for state in side]) for side in (speech, text))
        values["cka"].append(cka(left, right))
        intervals["cka"].append(cka_interval(left, right))
        for name, shift in (("cosine", 0), ("cosine_other", len(rows) // 2)):
            matches = torch.tensor([best_match(speech[(i + shift) % len(rows)], text[i])[0] for i in range(len(rows))])
            mean, error = float(matches.mean()), 1.96 * float(matches.std()) / len(rows) ** 0.5
            values[name].append(mean)
            intervals[name].append((mean - error, mean + error))
    examples = _examples(llm, rows, speech_states, text_states, levels)
    return {"levels": levels, **values, "intervals": intervals, "examples": examples}


def _examples(llm: SpeechLLM, rows: Sequence[dict], speech_states, text_states, levels: list[str]) -> list[dict]:
    shown = sorted({0, len(levels) // 2, len(levels) - 1})
    examples = []
    for row, speech, text in list(zip(rows, speech_states, text_states, strict=True))[:EXAMPLES]:
        tokens = [token for token, role in llm.spans(row, "transcript") if role == "speech"]
        maps = {levels[level]: best_match(speech[level], text[level])[1].round(decimals=3).tolist() for level in shown}
        words = [llm.tokenizer.decode([token]) for token in tokens]
        examples.append({"id": row["id"], "transcript": row["transcript"], "tokens": words, "maps": maps})
    return examples
