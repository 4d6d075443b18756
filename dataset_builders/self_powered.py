"""The self-powered set: an LLM answers instructions over the transcripts of an ASR corpus.

    python -m dataset_builders.self_powered --model LSM --corpus CORPUS --split train --output OUTPUT

Every utterance is given one task, drawn by weight, in one wording, and the LLM inside the LSM answers it from the
transcript ("Self-Powered LLM Modality Expansion", arXiv 2410.03798, section 3.2); a `transcription` row beside it
keeps the transcript itself. Draws are a function of (seed, id). Rows lie under `OUTPUT/data/TASK/SPLIT.parquet` and
`load_dataset(OUTPUT, TASK)` or `load_dataset(OUTPUT, "all")` reads them.
"""

import argparse
import collections
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from datasets import Audio, Dataset, Features, Value, load_dataset
from datasets.table import embed_table_storage
from huggingface_hub import DatasetCard, DatasetCardData

from dataset_builders.asr_corpora import load_corpus
from dataset_builders.instructions import POOL_PATH, draw_instruction, draw_task, load_pool
from dataset_builders.responders import LocalResponder

logger = logging.getLogger(__name__)

TRANSCRIPTION = "transcription"
SELF_POWERED_TASKS = ("continuation", "repetition", "keyword", "intent", "sentiment", "translation")
FEATURES = Features(
    {
        "id": Value("string"),
        "audio": Audio(16_000, decode=False),
        "transcript": Value("string"),
        "task": Value("string"),
        "instruction": Value("string"),
        "response": Value("string"),
        "duration": Value("float32"),  # seconds
        "source": Value("string"),
        "responder": Value("string"),
    }
)


def draw_requests(
    corpus: Dataset, tasks: Mapping[str, float], seed: int, pool_path: str | Path = POOL_PATH, paraphrases: str = "seen"
) -> list[dict]:
    """What will be asked: for every utterance a self-powered task and a transcription, in wordings from the pool.

    Args:
        corpus: rows of `load_corpus`.
        tasks: weight of every self-powered task.
        seed: with an utterance's id, it decides task and wording.
        pool_path: the instruction pool.
        paraphrases: `seen` or `held_out` wordings.

    Returns:
        One dict per future row: `row` (index into `corpus`), `id`, `transcript`, `task`, `instruction`.

    Raises:
        ValueError: a task that the pool lacks.
    """
    pool, requests = load_pool(pool_path), []
    for row, (utterance, transcript) in enumerate(zip(corpus["id"], corpus["transcript"], strict=True)):
        for task in (draw_task(tasks, utterance, seed), TRANSCRIPTION):
            instruction = draw_instruction(pool, task, utterance, seed, paraphrases)
            request = {"row": row, "id": f"{utterance}/{task}", "transcript": transcript, "task": task}
            requests.append(request | {"instruction": instruction})
    return requests


def reason_to_drop(request: dict, response: str | None) -> str | None:
    """Why a response is not kept, or None: cut at the token limit, empty, or the bare transcript for another task."""
    if response is None:
        return "truncated"
    if not response:
        return "empty"
    if request["task"] != TRANSCRIPTION and response.casefold() == request["transcript"].casefold():
        return "copy of the transcript"
    return None


def answer(requests: list[dict], responder: LocalResponder) -> tuple[list[dict], collections.Counter]:
    """Add `response` and `responder` to the requests; returns those kept, and (task, reason) counts of the dropped.

    Transcription is not asked of the LLM: its response is the transcript.
    """
    asked = [request for request in requests if request["task"] != TRANSCRIPTION]
    written = iter(responder.respond([(request["instruction"], request["transcript"]) for request in asked]))
    kept, dropped = [], collections.Counter()
    for request in requests:
        response = request["transcript"] if request["task"] == TRANSCRIPTION else next(written)
        if reason := reason_to_drop(request, response):
            dropped[request["task"], reason] += 1
        else:
            kept.append(request | {"response": response, "responder": responder.provenance})
    for (task, reason), count in sorted(dropped.items()):
        logger.warning("%s: dropped %d rows: %s", task, count, reason)
    return kept, dropped


def write(rows: list[dict], corpus: Dataset, split: str, output: Path) -> None:
    """Write `OUTPUT/data/TASK/SPLIT.parquet` for every task among `rows`, with the audio of their utterances."""
    for task in sorted({row["task"] for row in rows}):
        mine = [row for row in rows if row["task"] == task]
        utterances = corpus.select([row["row"] for row in mine]).select_columns(["audio", "duration", "source"])
        if utterances[0]["audio"]["bytes"] is None:  # the corpus lists files, which the set must carry
            utterances = utterances.with_format("arrow").map(embed_table_storage, batched=True).with_format(None)
        columns = {name: [row[name] for row in mine] for name in FEATURES if name not in utterances.column_names}
        for name, values in columns.items():
            utterances = utterances.add_column(name, values)
        path = output / "data" / task / f"{split}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        utterances.select_columns(list(FEATURES)).cast(FEATURES).cast_column("audio", Audio(16_000)).to_parquet(
            str(path)
        )


def write_card(rows: list[dict], dropped: collections.Counter, split: str, output: Path) -> None:
    """Write `OUTPUT/README.md`, whose YAML gives `load_dataset` one configuration per task and `all`."""
    counts = collections.Counter(row["task"] for row in rows)
    files = {"all": "data/*", **{task: f"data/{task}" for task in sorted(counts)}}
    data = DatasetCardData(
        configs=[
            {"config_name": name, "data_files": [{"split": split, "path": f"{folder}/{split}.parquet"}]}
            for name, folder in files.items()
        ],
        tags=["self-powered", "speech"],
    )
    responder = json.loads(rows[0]["responder"])
    table = "\n".join(f"| {task} | {count} |" for task, count in sorted(counts.items()))
    losses = "\n".join(f"- {task}: {count} × {reason}" for (task, reason), count in sorted(dropped.items())) or "- none"
    text = (
        f"# Self-powered set\n\nResponses by `{responder['model']}` (revision `{responder['revision']}`, prompt "
        f"template `{responder['template']}`), decoding `{responder['decoding']}`.\n\n"
        f"| task | rows |\n|---|---|\n{table}\n\n"
        f"Dropped:\n{losses}\n"
    )
    DatasetCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(output / "README.md")


def load_self_powered(name: str | Path, config: str = "all", split: str = "train") -> Dataset:
    """Open a self-powered set, folder or Hub id: one task's rows, or all of them; audio not decoded.

    A folder's files are named one by one: `load_dataset(folder, config)` of datasets 5.2 keys its cache on the folder's
    name and the configuration alone, and would return the rows of an older set of that name.

    Raises:
        ValueError: the folder has no such rows.
    """
    if not Path(name).is_dir():
        return load_dataset(str(name), config, split=split).cast_column("audio", Audio(16_000, decode=False))
    files = sorted(map(str, Path(name).glob(f"data/{'*' if config == 'all' else config}/{split}.parquet")))
    if not files:
        raise ValueError(f"{name} has no data/{config}/{split}.parquet; expected a folder that self_powered.py wrote.")
    dataset = load_dataset("parquet", data_files={split: files}, split=split)
    return dataset.cast_column("audio", Audio(16_000, decode=False))


def build(
    model: str | Path,
    corpus: str | Path,
    split: str,
    output: str | Path,
    tasks: Mapping[str, float] | None = None,
    seed: int = 0,
    max_new_tokens: int = 225,
    limit: int | None = None,
) -> Path:
    """Build the set; `output` appears whole or not at all.

    Args:
        model: LSM folder or Hub id whose LLM answers.
        corpus, split, limit: as in `load_corpus`.
        output: folder to write.
        tasks: weight of every self-powered task; evenly if None.
        seed: of the draws.
        max_new_tokens: longest response.

    Raises:
        ValueError: `output` exists, or bad input as in `load_corpus` and `LocalResponder`.
    """
    output = Path(output)
    if output.exists():
        raise ValueError(f"{output} exists; delete it or name another output.")
    utterances = load_corpus(corpus, split, limit=limit)
    requests = draw_requests(utterances, tasks or dict.fromkeys(SELF_POWERED_TASKS, 1.0), seed)
    rows, dropped = answer(requests, LocalResponder(model, max_new_tokens))
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    write(rows, utterances, split, partial)
    write_card(rows, dropped, split, partial)
    os.replace(partial, output)
    logger.info("%s: %d rows of %d requests", output, len(rows), len(requests))
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="LSM folder or Hub id whose LLM answers")
    parser.add_argument("--corpus", required=True, help="Hub id or folder of an ASR corpus")
    parser.add_argument("--split", default="train")
    parser.add_argument("--output", required=True)
    parser.add_argument("--tasks", nargs="+", default=list(SELF_POWERED_TASKS), metavar="TASK")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-new-tokens", type=int, default=225)
    parser.add_argument("--limit", type=int, help="utterances at most")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    tasks = dict.fromkeys(args.tasks, 1.0)
    build(args.model, args.corpus, args.split, args.output, tasks, args.seed, args.max_new_tokens, args.limit)


if __name__ == "__main__":
    main()
