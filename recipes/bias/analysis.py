"""Measure how much answers depend on instruction and speech in each layer, and report it with the scores of answers."""

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
from recipes.reporting.markdown import percent
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
    """Measure the saliency and attention of the rows' responses.

    Args:
        llm: the model.
        rows: dicts with `id`, `instruction`, `response`, `transcript` and, for the slot `audio`, `audio`.
        slot: what is put in the place of the speech: `audio` or `transcript`.
        store: store of the audio tower's output.
        batch_size: number of rows per batch.
        compare: whether to measure the similarity of speech and text; by default, it is measured for the slot `audio`
            if there are at least 8 rows.

    Returns:
        A dict: `layers`, `per_token` and `attention` are lists over layers of figures by role (`saliency.measure`),
        means over the rows; `intervals` are their 95 % intervals, from resampled rows; `rows` is the number of rows;
        `tokens` is the mean number of tokens by role; `similarity` is the result of `similarity.measure`, or None.
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


def bootstrap(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the 95 % interval of the mean over the first axis, from 1000 resamplings of the rows."""
    count = len(values)
    weights = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), DRAWS) / count
    low, high = np.quantile(np.tensordot(weights, values, 1), [0.025, 0.975], axis=0)
    return low, high


def _by_role(values: np.ndarray) -> list[dict]:
    return [dict(zip(ROLES, layer.round(6).tolist(), strict=True)) for layer in values]


def behave(rows: Sequence[dict], answers: Sequence[str], checker: str = following.BY_FORM) -> dict:
    """Return `following` and `transcript_copy` of the answers, None if no row is of such a task, and the `checker`."""
    scores = following.score_following(rows, answers, following.load_checker(checker))
    return {name: scores.get(name) for name in ("following", "transcript_copy")} | {"checker": checker}


def write(output: Path, bias: dict, label: str, others: dict[str, dict] | None = None) -> None:
    """Write `bias.json`, the figures and `report.html` of a model. `others` are the contents of other models'
    `bias.json`, which are drawn in the same figure."""
    write_whole(output / "bias.json", json.dumps(bias, indent=1) + "\n")
    together = {**(others or {}), label: bias}
    figures.plot_layers(together, output / "layers")
    figures.plot_composition(bias, output / "composition", label)
    blocks = [
        Text(DEFINITIONS, "Definitions"),
        Picture(output / "layers", "Shares of instruction and speech in each layer.", "Lines over layers"),
        Table("Behaviour", ["", "following", "transcript copies", "rows traced"], _behaviour(together)),
        Picture(output / "composition", "Shares of the saliency in each layer.", "Stacked bars over layers"),
    ]
    if bias.get("similarity"):
        figures.plot_similarity(bias["similarity"], output / "similarity")
        caption = "Similarity of speech and transcript inside the LLM (CKA, and cosine of the most similar token)."
        blocks.append(Picture(output / "similarity", caption, "Lines over layers and maps of tokens"))
    blocks.append(
        Facts({key: bias[key] for key in ("model", "data", "source", "hear", "target", "checker") if key in bias})
    )
    write_page(output / "report.html", f"Where the answers of {label} come from", f"{bias['rows']} rows", blocks)


DEFINITIONS = (
    "The saliency of a layer is |Σ A ⊙ ∂L/∂A|, attention times the gradient of the response's loss, summed over heads "
    "before the absolute value is taken, for the positions that predict the response (arXiv 2305.14160). It is divided "
    "among the kinds of tokens: instruction, speech (or transcript), template, earlier response, and the first token, "
    "which gets much attention whatever it says.",
    "Per token: 1 is the average token that the response can see. Speech takes many tokens and an instruction few, so "
    "the share of the sum and the mean per token differ.",
)


def _behaviour(biases: dict[str, dict]) -> list[list[str]]:
    return [
        [name, percent(bias.get("following")), percent(bias.get("transcript_copy")), str(bias["rows"])]
        for name, bias in biases.items()
    ]
