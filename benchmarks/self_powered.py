"""How fast a self-powered set is built: a whole build against a plain loop of `generate`, with the same answers.

    python -m benchmarks.self_powered --llm assets/nano/llm --rows 6000 --threads 2

The loop is what one would write first: requests in the order of the corpus, batches of 32, nothing else. The build does
all that a build does: it renders prompts, answers, filters, and writes Parquet with audio. They take turns, and each
turn's ratio of rows per second is one measurement. Speaking the nano corpus is no part of it.
"""

import argparse
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import torch

from dataset_builders.asr_corpora import NanoCorpus
from dataset_builders.building import build, draw_rows
from dataset_builders.instructions import SELF_POWERED_TASKS, Draw, load_pool
from dataset_builders.responders import LocalResponder

logger = logging.getLogger(__name__)

BATCH = 32


class SpokenCorpus(NanoCorpus):
    """Utterances of the nano corpus that were spoken before."""

    default_limit = None

    def __init__(self, utterances: list[dict]):
        super().__init__("train")
        self.utterances = utterances

    def lines(self, file: int) -> Iterator[tuple[str, dict]]:
        return ((utterance["id"], utterance) for utterance in self.utterances)

    def utterance(self, where: str, line: dict) -> dict:
        return line


@torch.inference_mode()
def plain_loop(responder: LocalResponder, rows: list[dict]) -> dict[str, str]:
    """The answers by row id."""
    processor, model, answers = responder.processor, responder.model, {}
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        prompts = [
            processor.apply_chat_template(
                processor.conversation(row["instruction"], transcript=row["transcript"]), add_generation_prompt=True
            )
            for row in batch
        ]
        inputs = processor.tokenizer(
            prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
        )
        output = model.generate(**inputs.to(model.device), max_new_tokens=responder.max_new_tokens, do_sample=False)
        texts = processor.tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        answers |= {row["id"]: text.strip() for row, text in zip(batch, texts, strict=True)}
    return answers


def whole_build(responder: LocalResponder, utterances: list[dict], draw: Draw, output: Path) -> dict[str, str]:
    """The answers by row id, read back from what was written."""
    build(SpokenCorpus(utterances), responder, output, draw)
    tables = [pq.read_table(file, columns=["id", "response"]) for file in output.glob("data/*/*.parquet")]
    return {row["id"]: row["response"] for table in tables for row in table.to_pylist()}


def measure(llm: str, rows: int, turns: int) -> dict:
    """Rows per second of both, and their ratio, turn by turn.

    Raises:
        ValueError: the answers differ, so that the times cannot be compared.
    """
    responder = LocalResponder(llm)
    draw = Draw(load_pool(), dict.fromkeys(SELF_POWERED_TASKS, 1.0))
    corpus, size = NanoCorpus("train"), rows // turns
    lines = corpus.lines(0)
    plain_loop(responder, draw_rows([corpus.utterance(*next(lines)) for _ in range(BATCH)], draw))  # warm up
    rates: dict[str, list[float]] = {"loop": [], "build": []}
    for turn in range(turns):
        utterances = [corpus.utterance(*next(lines)) for _ in range(size)]
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            built = whole_build(responder, utterances, draw, Path(folder) / "set")
            middle = time.perf_counter()
            looped = plain_loop(responder, draw_rows(utterances, draw))
            end = time.perf_counter()
        if differing := [id for id in built if built[id] != looped[id]]:
            raise ValueError(f"{len(differing)} of {size} answers differ, such as that to {differing[0]}.")
        if len(built) < 0.99 * size:
            raise ValueError(f"{size - len(built)} of {size} answers were dropped.")
        rates["build"].append(size / (middle - start))
        rates["loop"].append(size / (end - middle))
        logger.info("turn %d: loop %.0f rows/s, build %.0f rows/s", turn, rates["loop"][-1], rates["build"][-1])
    ratios = [mine / theirs for mine, theirs in zip(rates["build"], rates["loop"], strict=True)]
    return {
        "rows": size * turns,
        "threads": torch.get_num_threads(),
        "rows_per_second": {name: statistics.median(values) for name, values in rates.items()},
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", default="assets/nano/llm")
    parser.add_argument("--rows", type=int, default=6000)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("dataset_builders").setLevel(logging.WARNING)
    torch.set_num_threads(args.threads)
    found = measure(args.llm, args.rows, args.turns)
    spread = f"{min(found['ratios']):.2f} to {max(found['ratios']):.2f}"
    rate = found["rows_per_second"]
    print(
        f"{found['rows']} rows, {found['threads']} threads: build {rate['build']:.0f} rows/s, plain loop "
        f"{rate['loop']:.0f} rows/s, ratio {found['ratio']:.2f} ({spread})"
    )
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
