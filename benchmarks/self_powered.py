"""Measure how fast a self-powered set is built, against a simple loop of `generate` with the same answers.

    python -m benchmarks.self_powered --llm assets/nano/llm --rows 6000 --cores 2 --processes 2

The loop answers requests in the order of the corpus, in batches of 32, and does nothing else. The build is complete: it
reads a corpus of Parquet files, renders prompts, answers them, filters the answers, and writes rows with their audio.
Its processes share the cores as with `torchrun`. The LLM is loaded beforehand. Both take turns on the same rows, and
the ratio of rows per second in a turn is one measurement.
"""

import itertools
import json
import logging
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import torch
from datasets import Dataset

from dataset_builders.building import build, draw_rows
from dataset_builders.corpora.corpus import FEATURES
from dataset_builders.corpora.opening import open_corpus
from dataset_builders.instructions import SELF_POWERED_TASKS, Draw, load_pool
from dataset_builders.nano.tasks import POOL_PATH
from dataset_builders.responders.local import LocalResponder
from dataset_builders.shards import Worker
from language_models.command_line import parser_of
from recipes.listening.collator import render_prompt

BATCH = 32
DRAW = Draw(load_pool(POOL_PATH), dict.fromkeys(SELF_POWERED_TASKS, 1.0))
RESPONDER: LocalResponder  # of this process


def load(llm: str, threads: int) -> None:
    global RESPONDER
    logging.getLogger("dataset_builders").setLevel(logging.WARNING)
    torch.set_num_threads(threads)
    RESPONDER = LocalResponder(llm)


def build_share(corpus: Path, output: Path, worker: Worker) -> None:
    build(open_corpus(corpus), RESPONDER, output, DRAW, worker=worker)


@torch.inference_mode()
def plain_loop(responder: LocalResponder, rows: list[dict]) -> dict[str, str]:
    """Return the answers by row id."""
    processor, model, answers = responder.processor, responder.model, {}
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        prompts = [render_prompt(processor, row, "transcript") for row in batch]
        inputs = processor.tokenizer(
            prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
        )
        output = model.generate(**inputs.to(model.device), max_new_tokens=responder.max_new_tokens, do_sample=False)
        texts = processor.tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        answers |= {row["id"]: text.strip() for row, text in zip(batch, texts, strict=True)}
    return answers


def whole_build(pool: ProcessPoolExecutor, processes: int, corpus: Path, output: Path) -> dict[str, str]:
    """Build a set, and return its answers by row id."""
    shares = [pool.submit(build_share, corpus, output, Worker(rank, processes)) for rank in range(processes)]
    for share in shares:
        share.result()
    tables = [pq.read_table(file, columns=["id", "response"]) for file in output.glob("data/*/*.parquet")]
    return {row["id"]: row["response"] for table in tables for row in table.to_pylist()}


def measure(llm: str, rows: int, turns: int, cores: int, processes: int) -> dict:
    """Measure the rows per second of build and loop, and their ratio in each turn.

    Raises:
        ValueError: the answers differ, so that the times cannot be compared.
    """
    load(llm, cores)
    nano, size = iter(open_corpus("nano")), rows // turns
    rates: dict[str, list[float]] = {"loop": [], "build": []}
    context = multiprocessing.get_context("spawn")
    settings = {"mp_context": context, "initializer": load, "initargs": (llm, cores // processes)}
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(processes, **settings) as pool:
        for turn in range(-1, turns):  # the one before the first warms up
            spoken = list(itertools.islice(nano, size if turn >= 0 else BATCH * processes))
            corpus = Path(folder) / f"corpus{turn}"
            Dataset.from_list(spoken, features=FEATURES).to_parquet(str(corpus / "train.parquet"))
            utterances = [{**utterance, "source": f"{corpus.name}/train"} for utterance in spoken]
            start = time.perf_counter()
            built = whole_build(pool, processes, corpus, Path(folder) / f"set{turn}")
            middle = time.perf_counter()
            looped = plain_loop(RESPONDER, draw_rows(utterances, DRAW))
            end = time.perf_counter()
            if differing := [id for id in built if built[id] != looped[id]]:
                raise ValueError(f"{len(differing)} of {size} answers differ, such as that to {differing[0]}.")
            if len(built) < 0.99 * len(looped):
                raise ValueError(f"{len(looped) - len(built)} of {len(looped)} answers were dropped.")
            if turn >= 0:
                rates["build"].append(size / (middle - start))
                rates["loop"].append(size / (end - middle))
                print(f"turn {turn}: loop {rates['loop'][-1]:.0f} rows/s, build {rates['build'][-1]:.0f} rows/s")
    ratios = [mine / theirs for mine, theirs in zip(rates["build"], rates["loop"], strict=True)]
    return {
        "rows": size * turns,
        "cores": cores,
        "processes": processes,
        "rows_per_second": {name: statistics.median(values) for name, values in rates.items()},
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--llm", default="assets/nano/llm", help="folder or Hub id of the LLM")
    parser.add_argument("--rows", type=int, default=6000, help="number of rows of the set")
    parser.add_argument("--turns", type=int, default=3, help="number of measurements")
    parser.add_argument("--cores", type=int, default=2, help="number of CPU cores")
    parser.add_argument(
        "--processes",
        type=int,
        default=2,
        help="number of processes of the build; the loop has one process with all cores",
    )
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()
    results = measure(args.llm, args.rows, args.turns, args.cores, args.processes)
    rate, ratios = results["rows_per_second"], results["ratios"]
    print(
        f"{results['rows']} rows, {args.cores} cores: build in {args.processes} processes {rate['build']:.0f} rows/s, "
        f"plain loop {rate['loop']:.0f} rows/s, ratio {results['ratio']:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    )
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
