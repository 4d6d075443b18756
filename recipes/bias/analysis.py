"""The layer-wise shares of instruction and speech in an answer, with intervals, and what the answers are."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dataset_builders.files import write_whole
from recipes.bias import saliency, similarity
from recipes.bias.roles import ROLES, teacher_forced
from recipes.evaluation import following
from recipes.listening.features import AudioFeatureStore
from recipes.listening.speech_llm import SpeechLLM
from recipes.reporting import figures
from recipes.reporting.page import Facts, Picture, Table, Text, write_page

logger = logging.getLogger(__name__)

FIGURES = ("layers", "per_token", "attention")
DRAWS = 1000


def analyze(
    llm: SpeechLLM,
    rows: list[dict],
    slot: str = "audio",
    store: AudioFeatureStore | None = None,
    batch_size: int = 16,
    compare: bool | None = None,
) -> dict:
    """Trace the rows' responses to what was given.

    Args:
        rows: `id`, `instruction`, `response`, `transcript` and, where it is heard, `audio`.
        slot: what stands where the speech belongs, `audio` or `transcript`.
        store: the audio tower's output for clips it was run on before.
        batch_size: rows traced at a time.
        compare: whether to measure how alike speech and text are; by default if the model hears and there are enough
            rows (8).

    Returns:
        `layers`, `per_token` and `attention`: lists over layers of figures by role (`saliency.measure`), means over
        the rows; `intervals`: 95 % of the same, rows resampled; `rows`; `tokens`: mean number by role; `similarity`
        (`similarity.measure`) or None.
    """
    measured, tokens = [], []
    order = sorted(rows, key=lambda row: len(row["transcript"]) + len(row["response"]))
    with tqdm(total=len(rows), desc="tracing answers", unit="row") as progress:
        for start in range(0, len(order), batch_size):
            batch = teacher_forced(llm, order[start : start + batch_size], slot, store)
            measured += saliency.measure(llm, batch)
            tokens += [[int((roles == role).sum()) for role in range(len(ROLES))] for roles in batch.roles]
            progress.update(len(batch.lengths))
    values = np.array(
        [[[[layer[name][role] for role in ROLES] for name in FIGURES] for layer in row] for row in measured]
    )
    low, high = bootstrap(values)
    result = {name: _by_role(values.mean(0)[:, place]) for place, name in enumerate(FIGURES)}
    bounds = np.stack([low, high], -1)
    result["intervals"] = {name: _by_role(bounds[:, place]) for place, name in enumerate(FIGURES)}
    result |= {"rows": len(rows), "tokens": dict(zip(ROLES, np.mean(tokens, 0).round(2).tolist(), strict=True))}
    if compare is None:
        compare = slot != "transcript" and len(rows) >= 8
    return result | {"similarity": similarity.measure(llm, rows, store, batch_size) if compare else None}


def bootstrap(values: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of the mean over the first axis, rows resampled 1000 times."""
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(values), np.full(len(values), 1 / len(values)), DRAWS) / len(values)
    means = weights @ values.reshape(len(values), -1)
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    return low.reshape(values.shape[1:]), high.reshape(values.shape[1:])


def _by_role(values: np.ndarray) -> list[dict]:
    return [dict(zip(ROLES, layer.round(6).tolist(), strict=True)) for layer in values]


def behave(rows: Sequence[dict], answers: Sequence[str], checker: str = following.BY_FORM) -> dict:
    """`following` and `transcript_copy` of the answers (None without rows that tell), and the `checker` that judged."""
    scores = following.score_following(rows, answers, following.load_checker(checker))
    return {name: scores.get(name) for name in ("following", "transcript_copy")} | {"checker": checker}


def write(output: Path, bias: dict, label: str, beside: dict[str, dict] | None = None) -> None:
    """`bias.json`, the pictures and `report.html`; `beside` are the bias.json of models drawn in the same picture."""
    output.mkdir(parents=True, exist_ok=True)
    write_whole(output / "bias.json", json.dumps(bias, indent=1) + "\n")
    together = {**(beside or {}), label: bias}
    figures.plot_layers(together, output / "layers")
    figures.plot_composition(bias, output / "composition", label)
    blocks = [
        Text(DEFINITIONS, "What is measured"),
        Picture(output / "layers", "Share of the instruction and of the speech, layer by layer.", "Lines over layers"),
        Table("Behaviour", ["", "following", "transcript copies", "rows traced"], _behaviour(together)),
        Picture(output / "composition", "All of the saliency, layer by layer.", "Stacked bars over layers"),
    ]
    if bias.get("similarity"):
        figures.plot_similarity(bias["similarity"], output / "similarity")
        caption = "How alike speech and transcript are inside the LLM (CKA; cosine of the token most alike)."
        blocks.append(Picture(output / "similarity", caption, "Lines over layers and maps of tokens"))
    blocks.append(
        Facts({key: bias[key] for key in ("model", "data", "source", "hear", "target", "checker") if key in bias})
    )
    write_page(output / "report.html", f"Where the answers of {label} come from", f"{bias['rows']} rows", blocks)


DEFINITIONS = (
    "Saliency of a layer is |Σ A ⊙ ∂L/∂A|, attention times the gradient of the response's loss, summed over heads "
    "before the absolute value, in the rows that predict the response (arXiv 2305.14160). It is split by what a token "
    "is: instruction, speech (or transcript), template, earlier response, and the first token, where attention sinks.",
    "Per token: 1 is the average token that the response can see. Speech takes many tokens, an instruction few, so the "
    "share of the sum and the mean per token tell different things.",
)


def _behaviour(biases: dict[str, dict]) -> list[list[str]]:
    def percent(value):
        return "–" if value is None else f"{100 * value:.1f} %"

    return [
        [name, percent(bias.get("following")), percent(bias.get("transcript_copy")), str(bias["rows"])]
        for name, bias in biases.items()
    ]
