"""Build a self-powered set from an ASR corpus, shard by shard.

`read` takes utterances from the corpus, `draw_rows` gives them tasks and instructions, `answer` adds the responses, and
`shards.BuildFolder` writes the rows of a shard.
"""

import collections
import itertools
import json
import logging
import math
import os
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
from datasets import Audio, Features, Value

from dataset_builders.corpora.audio import decode
from dataset_builders.corpora.corpus import Corpus, RefusedRowError
from dataset_builders.data_card import Summary, write_card
from dataset_builders.filters import check_names, judge, reason_to_drop
from dataset_builders.instructions import SELF_POWERED_TASKS, TRANSCRIPTION, Draw, Task, load_pool
from dataset_builders.responders.exchange import Reply, Request
from dataset_builders.responders.local import Responder
from dataset_builders.shards import BuildFolder, Shard, Worker

logger = logging.getLogger(__name__)
T = TypeVar("T")

FEATURES = Features(
    {
        "id": Value("string"),
        "audio": Audio(16_000, decode=False),  # not decoded, so that reading does not need torchcodec
        "transcript": Value("string"),
        "task": Value("string"),
        "instruction": Value("string"),
        "response": Value("string"),
        "duration": Value("float32"),  # seconds
        "source": Value("string"),
        "responder": Value("string"),
    }
)
TASKS = (*SELF_POWERED_TASKS, TRANSCRIPTION)
SHARD_ROWS = 1000


def draw_rows(utterances: list[dict], draw: Draw) -> list[dict]:
    """Return the rows without their responses, in order: one row for each utterance and task. Utterances have `id`,
    `transcript`, `source` and any other columns that the rows need."""
    return [
        utterance | {"id": f"{utterance['source']}/{utterance['id']}/{task}", "task": task, "instruction": instruction}
        for utterance in utterances
        for task, instruction in draw.of(utterance["id"])
    ]


def read(
    corpus: Corpus, lines: list[tuple[str, dict]], trust_headers: bool = False
) -> tuple[list[dict], list[RefusedRowError]]:
    """Return the usable utterances of a shard, and an error for each line that cannot be used. Unless `trust_headers`,
    each clip is decoded once, in several threads, to check its header."""

    def read_line(where: str, line: dict) -> dict | RefusedRowError:
        try:
            return corpus.utterance(where, line)
        except RefusedRowError as error:
            return error

    def check_audio(where: str, utterance: dict | RefusedRowError) -> dict | RefusedRowError:
        if isinstance(utterance, dict):
            try:
                decode(utterance["audio"])
            except ValueError as error:
                return RefusedRowError(where, "unreadable audio", str(error))
        return utterance

    places, results = [where for where, _ in lines], [read_line(*line) for line in lines]
    if not trust_headers:
        with ThreadPoolExecutor(os.cpu_count()) as decoders:
            results = list(decoders.map(check_audio, places, results))
    utterances, refused = {}, []
    for where, utterance in zip(places, results, strict=True):
        if isinstance(utterance, dict) and utterance["id"] in utterances:
            utterance = RefusedRowError(where, "id used twice", utterance["id"])
        if isinstance(utterance, dict):
            utterances[utterance["id"]] = utterance
        else:
            logger.warning("refused %s", utterance)
            refused.append(utterance)
    return list(utterances.values()), refused


def answer(
    rows: list[dict], responder: Responder, draw: Draw, filters_off: Collection[str], judge_below: int | None
) -> tuple[list[dict], collections.Counter]:
    """Add `response` and `responder` to the rows. Returns the kept rows, and counts of dropped rows by (task, reason).

    The LLM does not answer transcription rows: their response is the transcript.
    """
    requests = [Request(row["instruction"], row["transcript"], row["task"]) for row in rows]
    written = iter(responder.respond([request for request in requests if request.task != TRANSCRIPTION]))
    replies = [Reply(r.transcript) if r.task == TRANSCRIPTION else next(written) for r in requests]
    reasons = [
        reason_to_drop(draw.pool[request.task], request.transcript, reply, filters_off)
        for request, reply in zip(requests, replies, strict=True)
    ]
    if judge_below is not None:
        asked = [i for i, reason in enumerate(reasons) if reason is None and requests[i].task != TRANSCRIPTION]
        scores = judge(responder.respond, [requests[i] for i in asked], [replies[i].text for i in asked])
        for index, score in zip(asked, scores, strict=True):
            reasons[index] = "judged" if score is None or score < judge_below else None
    kept, dropped, seen = [], collections.Counter(), set()
    for row, reply, reason in zip(rows, replies, reasons, strict=True):
        content = (row["instruction"], row["transcript"], reply.text)
        if reason is None and content in seen and "duplicate" not in filters_off:
            reason = "duplicate"
        if reason is not None:
            dropped[row["task"], reason] += 1
            continue
        seen.add(content)
        kept.append(row | {"response": reply.text, "responder": responder.provenance})
    return kept, dropped


def to_tables(rows: list[dict]) -> Iterator[tuple[str, pa.Table]]:
    """Yield each task and a table of its rows; one table at a time, because a table holds the audio of its rows."""
    for task in sorted({row["task"] for row in rows}):
        yield task, pa.Table.from_pylist([row for row in rows if row["task"] == task], FEATURES.arrow_schema)


def report(lines: int, refused: list[RefusedRowError], asked: list[dict], kept: list[dict], dropped) -> dict:
    """Return the counts of a shard, such as its kept and dropped rows; `data_card.Summary` adds them up."""
    words = [(row["task"], len(row["response"].split())) for row in kept]
    seconds, total_words = collections.Counter(), collections.Counter()
    for row, (task, count) in zip(kept, words, strict=True):
        seconds[task] += float(row["duration"])
        total_words[task] += count
    return {
        "utterances": lines,
        "refused": [(error.where, error.reason, str(error)) for error in refused],
        "asked": collections.Counter(row["task"] for row in asked),
        "dropped": {f"{task}/{reason}": count for (task, reason), count in dropped.items()},
        "rows": collections.Counter(row["task"] for row in kept),
        "seconds": seconds,
        "words": total_words,
        "longest": {task: max(count for other, count in words if other == task) for task in total_words},
    }


def build(
    corpus: Corpus,
    responder: Responder,
    output: str | Path,
    draw: Draw | None = None,
    *,
    limit: int | None = None,
    shard_size: int | None = None,
    filters_off: Collection[str] = (),
    judge_below: int | None = None,
    trust_headers: bool = False,
    worker: Worker | None = None,
) -> Path:
    """Build one split of a set, or continue a build. Shards that are already written are kept.

    Args:
        corpus: the corpus, from `open_corpus`.
        responder: the LLM that answers.
        output: folder of the set. The split of the set gets the name of the corpus's split.
        draw: decides the tasks and instructions. If None, every utterance gets one of `TASKS`, all equally likely.
        limit: number of rows to ask for, counted before any are refused or dropped. If None, the corpus decides; most
            corpora have no limit.
        shard_size: utterances per shard. If the build is killed, the shards being written are lost. Two shards are in
            memory at a time. If None, a shard has 1000 rows, or fewer with a small `limit`, so that several processes
            can share the shards.
        filters_off: names in `FILTERS` to switch off.
        judge_below: drop responses to which the LLM itself gives a lower score than this, from 1 to 5. If None, the LLM
            gives no scores.
        trust_headers: trust the headers of audio files, and do not decode each file once to check it.
        worker: rank of this process and number of processes; read from the environment if None.

    Raises:
        ValueError: a setting is invalid or differs from those that the build was started with, or no row is left.
        OSError: the disk is full, or the responder's server fails. The shards written so far are complete.
    """
    draw = draw or Draw(load_pool(), dict.fromkeys(TASKS, 1.0))
    _check(draw, limit, shard_size, filters_off, judge_below)
    if limit is None and corpus.default_limit is not None:
        limit = corpus.default_limit * draw.tasks_per_utterance
    count = None if limit is None else math.ceil(limit / draw.tasks_per_utterance)
    folder = BuildFolder(output, corpus.split)
    settings = _settings(corpus, responder, draw, limit, shard_size)
    options = {"filters_off": sorted(filters_off), "judge_below": judge_below, "trust_headers": trust_headers}
    folder.agree(settings | options)
    folder.settle()
    shards = my_shards(corpus, folder, worker or Worker.from_environment(), count, trust_headers)
    for shard, lines, utterances, refused in ahead(shards):
        rows = draw_rows(utterances, draw)
        if limit is not None:  # the last utterance may get fewer tasks than the others
            rows = rows[: limit - shard.chunk * settings["shard_size"] * draw.tasks_per_utterance]
        kept, dropped = answer(rows, responder, draw, filters_off, judge_below)
        folder.commit(shard, to_tables(kept), report(lines, refused, rows, kept, dropped))
        logger.info("shard %s: %d rows, %d dropped", shard, len(kept), len(rows) - len(kept))
    return finish(folder, draw.pool)


def _check(
    draw: Draw, limit: int | None, shard_size: int | None, filters_off: Collection[str], judge_below: int | None
) -> None:
    """Raise ValueError if a setting is invalid."""
    check_names(filters_off)
    for name, value in {"limit": limit, "shard_size": shard_size}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be 1 or more.")
    if judge_below is not None and not 1 <= judge_below <= 5:
        raise ValueError(f"{judge_below=} must be 1 to 5.")
    for task in draw.weights:
        if draw.pool[task].held_out_task:
            raise ValueError(f"task {task!r} is held out of training (held_out_task in the pool); do not ask for it.")


def _settings(corpus: Corpus, responder: Responder, draw: Draw, limit: int | None, shard_size: int | None) -> dict:
    """Return the settings of a build that decide which rows it asks for, and how they are divided into shards."""
    if shard_size is None:
        rows = SHARD_ROWS if limit is None else max(100, min(SHARD_ROWS, limit // 8))
        shard_size = max(1, rows // draw.tasks_per_utterance)
    return {
        "corpus": corpus.describe(),
        "draw": draw.describe(),
        "responder": json.loads(responder.provenance),
        "limit": limit,
        "shard_size": shard_size,
        # With a limit the corpus counts as one file: the rows must not depend on the number of processes.
        "num_files": corpus.num_files if limit is None else 1,
    }


def my_shards(
    corpus: Corpus, folder: BuildFolder, worker: Worker, limit: int | None, trust_headers: bool
) -> Iterator[tuple[Shard, int, list[dict], list[RefusedRowError]]]:
    """Yield the shards that this process still has to write: shard, number of lines, utterances, refused lines.

    `limit` is a number of utterances.
    """
    num_files, shard_size = folder.settings["num_files"], folder.settings["shard_size"]
    for file in worker.files(num_files):
        shards = folder.shards_of(file)
        if shards is not None and all(folder.is_done(Shard(file, chunk)) for chunk in range(shards)):
            continue
        if limit is None:
            lines = corpus.lines(file)
        else:
            lines = itertools.islice(itertools.chain.from_iterable(map(corpus.lines, range(corpus.num_files))), limit)
        for chunk in itertools.count():
            shard_lines = list(itertools.islice(lines, shard_size))
            if not shard_lines:
                break
            shard = Shard(file, chunk)
            if worker.has(file, chunk, num_files) and not folder.is_done(shard):
                yield shard, len(shard_lines), *read(corpus, shard_lines, trust_headers)
        folder.end(file, chunk)


def ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield the items, and prepare the next one in a thread meanwhile, so that the LLM does not wait for reading."""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = reader.submit(next, items, None)
            yield item


def finish(folder: BuildFolder, pool: Mapping[str, Task]) -> Path:
    """Write the card if all shards are written, and log how many utterances and rows were lost."""
    missing = list(folder.missing())
    if missing:
        logger.warning(
            "%s: %d shards are not written yet, such as %s. Wait for the other processes, or run the same command "
            "again if none is running.",
            folder.folder,
            len(missing),
            missing[0],
        )
        return folder.folder
    folder.settle()
    write_card(folder.folder, pool)
    summary = Summary.of(folder.reports())
    for line in summary.lines():
        logger.warning("%s", line)
    logger.info("%s: kept %d of the %d rows asked for", folder.folder, summary.rows.total(), summary.asked.total())
    return folder.folder
