"""Where an answer comes from: layer by layer, the share that the instruction and the speech have in it.

    python -m recipes.analyze_bias --model runs/quickstart/checkpoint --data runs/quickstart/corpus --split test \
        --output runs/bias/self_powered
    python -m recipes.analyze_bias --model runs/quickstart/base --hear transcript --data runs/quickstart/corpus \
        --split test --output runs/bias/text_llm --beside "self-powered LSM=runs/bias/self_powered/bias.json"

`--model` is an LSM, another speech LLM of transformers or, with `--hear transcript`, a text LLM. `--data` is a
self-powered set or an ASR corpus. Writes `bias.json`, the pictures and `report.html`.
"""

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dataset_builders.files import write_whole
from dataset_builders.instructions import SELF_POWERED_TASKS
from dataset_builders.nano_grammar import Sentence
from recipes import figures
from recipes.audio_features import AudioFeatureStore
from recipes.bias import saliency, similarity
from recipes.bias.roles import ROLES, force
from recipes.bias.rows import TARGETS, load_rows, with_targets
from recipes.evaluation import following
from recipes.page import Facts, Picture, Table, Text, write_page
from recipes.speech_llm import SpeechLLM, load

logger = logging.getLogger(__name__)

FIGURES = ("layers", "per_token", "attention")
DRAWS = 1000


def analyze(
    llm: SpeechLLM,
    rows: list[dict],
    hear: str = "audio",
    store: AudioFeatureStore | None = None,
    batch_size: int = 16,
    compare: bool | None = None,
) -> dict:
    """Trace the rows' responses to what was given.

    Args:
        rows: `id`, `instruction`, `response`, `transcript` and, unless it is the transcript that is heard, `audio`.
        hear: `audio` or `transcript`.
        store: the audio tower's output for clips it was run on before.
        batch_size: rows traced at a time.
        compare: whether to measure how alike speech and text are; by default if the model hears and there are enough
            rows (8).

    Returns:
        `layers`, `per_token` and `attention`: lists over layers of figures by role (`saliency.measure`), means over
        the rows; `intervals`: 95 % of the same, rows resampled; `rows`; `tokens`: mean number by role; `similarity`
        (`similarity.measure`) or None.
    """
    found, tokens = [], []
    order = sorted(rows, key=lambda row: len(row["transcript"]) + len(row["response"]))
    with tqdm(total=len(rows), desc="tracing answers", unit="row") as progress:
        for start in range(0, len(order), batch_size):
            batch = force(llm, order[start : start + batch_size], hear, store)
            found += saliency.measure(llm, batch)
            tokens += [[int((roles == role).sum()) for role in range(len(ROLES))] for roles in batch.roles]
            progress.update(len(batch.lengths))
    values = np.array([[[[layer[name][role] for role in ROLES] for name in FIGURES] for layer in row] for row in found])
    low, high = bootstrap(values)
    result = {name: _by_role(values.mean(0)[:, place]) for place, name in enumerate(FIGURES)}
    bounds = np.stack([low, high], -1)
    result["intervals"] = {name: _by_role(bounds[:, place]) for place, name in enumerate(FIGURES)}
    result |= {"rows": len(rows), "tokens": dict(zip(ROLES, np.mean(tokens, 0).round(2).tolist(), strict=True))}
    if compare is None:
        compare = hear != "transcript" and len(rows) >= 8
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


def behave(rows: Sequence[dict], answers: Sequence[str], checker: str | None = None) -> dict:
    """`following` and `transcript_copy` of the answers (None without rows that tell), and the `checker` that judged.

    Without a checker the nano oracle judges sentences of the nano language, and the form of the answer others.
    """
    checker = checker or (following.NANO_CHECKER if all(map(_is_nano, rows)) else "recipes.evaluation.kinds")
    scores = following.score(rows, answers, following.load_checker(checker))
    return {name: scores.get(name) for name in ("following", "transcript_copy")} | {"checker": checker}


def _is_nano(row: dict) -> bool:
    try:
        return bool(Sentence.parse(row["transcript"]))
    except ValueError:
        return False


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id")
    parser.add_argument("--data", required=True, help="self-powered set, or ASR corpus: folder, manifest or Hub id")
    parser.add_argument("--split", help="`test` if there is one, else the first")
    parser.add_argument("--output", required=True)
    parser.add_argument("--hear", choices=("audio", "transcript"), default="audio")
    parser.add_argument("--target", choices=TARGETS, default="response", help="which response is traced")
    parser.add_argument("--tasks", nargs="+", default=list(SELF_POWERED_TASKS))
    parser.add_argument("--limit", type=int, default=120, help="rows at most")
    parser.add_argument("--checker", help="module whose is_correct(task, transcript, response) judges the answers")
    parser.add_argument("--label", help="the model's label in figures; its name by default")
    parser.add_argument(
        "--beside", nargs="*", default=[], metavar="LABEL=BIAS_JSON", help="other results to draw in the same figure"
    )
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    beside = {}
    for entry in args.beside:
        name, equals, file = entry.rpartition("=")
        if not equals or not Path(file).is_file():
            parser.error(f"--beside {entry!r}: expected LABEL=FILE, a bias.json that is there.")
        if name in beside:
            parser.error(f"--beside names {name!r} twice.")
        beside[name] = json.loads(Path(file).read_text(encoding="utf-8"))
    rows = load_rows(args.data, args.split, args.limit, args.tasks, args.seed)
    llm = load(args.model)
    options = {"batch_size": args.batch_size, "max_new_tokens": args.max_new_tokens}
    answers = [reply.text for reply in llm.respond(rows, args.hear, **options)]
    traced = with_targets(rows, llm, args.target, answers, None, **options)
    if len(traced) < len(rows):
        logger.warning("%d of %d rows have an empty response and are not traced", len(rows) - len(traced), len(rows))
    bias = analyze(llm, traced, args.hear, batch_size=args.batch_size)
    about = {"model": llm.name, "data": args.data, "source": rows[0]["source"], "hear": args.hear}
    bias |= behave(rows, answers, args.checker) | about | {"target": args.target}
    label = args.label or llm.name
    if label in beside:
        label = f"{label} (this run)"
    write(Path(args.output), bias, label, beside)
    logger.info("%s: following %s, transcript copies %s", args.output, bias["following"], bias["transcript_copy"])


if __name__ == "__main__":
    main()
