"""From a corpus to the rows of a set: what is asked of which utterance, what is kept, shard by shard.

Follow one utterance: `read` takes it from the corpus, `draw_rows` gives it its tasks and wordings, `answer` its
responses, and `shards.BuildFolder` writes it with those of its shard.
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
        "audio": Audio(16_000, decode=False),  # to be read without torchcodec
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
    """Rows as they will be but for their responses: every utterance with each of its tasks, in order.

    Args:
        utterances: `id`, `transcript`, `source`, and whatever else the rows are to have.
        draw: what is asked of an utterance.
    """
    return [
        utterance | {"id": f"{utterance['source']}/{utterance['id']}/{task}", "task": task, "instruction": instruction}
        for utterance in utterances
        for task, instruction in draw.of(utterance["id"])
    ]


def read(
    corpus: Corpus, lines: list[tuple[str, dict]], trust_headers: bool = False
) -> tuple[list[dict], list[RefusedRowError]]:
    """The utterances of a shard, and those that cannot be used. What their headers say of their audio is found true by
    decoding it, in several threads, unless headers are trusted."""

    def read_line(where: str, line: dict) -> dict | RefusedRowError:
        try:
            return corpus.utterance(where, line)
        except RefusedRowError as error:
            return error

    def hear(where: str, utterance: dict | RefusedRowError) -> dict | RefusedRowError:
        if isinstance(utterance, dict):
            try:
                decode(utterance["audio"])
            except ValueError as error:
                return RefusedRowError(where, "unreadable audio", str(error))
        return utterance

    places, found = [where for where, _ in lines], [read_line(*line) for line in lines]
    if not trust_headers:
        with ThreadPoolExecutor(os.cpu_count()) as decoders:
            found = list(decoders.map(hear, places, found))
    utterances, refused = {}, []
    for where, utterance in zip(places, found, strict=True):
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
    """Add `response` and `responder` to the rows; returns those kept, and (task, reason) counts of the dropped.

    Transcription is not asked of the LLM: its response is the transcript.
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
    """Every task and its rows, as Parquet has them; one after the other, since each holds the audio of its rows."""
    for task in sorted({row["task"] for row in rows}):
        yield task, pa.Table.from_pylist([row for row in rows if row["task"] == task], FEATURES.arrow_schema)


def report(lines: int, refused: list[RefusedRowError], asked: list[dict], kept: list[dict], dropped) -> dict:
    """What became of a shard, in counts that `data_card.Summary` adds up."""
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
    """Build one split of a set, or go on with it: shards that are there are kept as they are.

    Args:
        corpus: as `open_corpus` returns it.
        responder: who answers.
        output: folder of the set; the corpus's split names the set's.
        draw: what is asked; the pool's tasks and transcription, evenly, one per utterance, if None.
        limit: the first so many rows, refused and dropped ones included; all if None.
        shard_size: utterances per shard: what a kill can lose; two shards are in memory at a time. If None, those of
            1000 rows, or of fewer where a limit would leave few shards for several processes to share.
        filters_off: names in `FILTERS` that drop nothing.
        judge_below: drop responses to which the LLM itself gives less than this, of 1 to 5; not asked if None.
        trust_headers: whether audio is taken for what its header says, without decoding it once.
        worker: which of the processes this is; the environment says so if None.

    Raises:
        ValueError: bad settings, others than the build was begun with, or no row is left.
        OSError: the disk is full, or the responder's server fails; the shards written so far are whole.
    """
    draw = draw or Draw(load_pool(), dict.fromkeys(TASKS, 1.0))
    _check(draw, limit, shard_size, filters_off, judge_below)
    if limit is None and corpus.default_limit is not None:
        limit = corpus.default_limit * draw.tasks_per_utterance
    utterances = None if limit is None else math.ceil(limit / draw.tasks_per_utterance)
    if shard_size is None:
        rows = SHARD_ROWS if limit is None else max(100, min(SHARD_ROWS, limit // 8))
        shard_size = max(1, rows // draw.tasks_per_utterance)
    folder = BuildFolder(output, corpus.split)
    folder.agree(
        {
            "corpus": corpus.describe(),
            "draw": draw.describe(),
            "responder": json.loads(responder.provenance),
            "limit": limit,
            "shard_size": shard_size,
            "filters_off": sorted(filters_off),
            "judge_below": judge_below,
            "trust_headers": trust_headers,
            # With a limit the corpus counts as one file: which rows are the first must not depend on the processes.
            "num_files": corpus.num_files if limit is None else 1,
        }
    )
    folder.settle()
    shards = _my_shards(corpus, folder, worker or Worker.from_environment(), utterances, trust_headers)
    for shard, lines, found, refused in ahead(shards):
        rows = draw_rows(found, draw)
        if limit is not None:  # the last utterance may be asked less than the others
            rows = rows[: limit - shard.chunk * shard_size * draw.tasks_per_utterance]
        kept, dropped = answer(rows, responder, draw, filters_off, judge_below)
        folder.commit(shard, to_tables(kept), report(lines, refused, rows, kept, dropped))
        logger.info("shard %s: %d rows, %d dropped", shard, len(kept), len(rows) - len(kept))
    return finish(folder, draw.pool)


def _check(
    draw: Draw, limit: int | None, shard_size: int | None, filters_off: Collection[str], judge_below: int | None
) -> None:
    """Raises ValueError for settings that cannot be."""
    check_names(filters_off)
    for name, value in {"limit": limit, "shard_size": shard_size}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be 1 or more.")
    if judge_below is not None and not 1 <= judge_below <= 5:
        raise ValueError(f"{judge_below=} must be 1 to 5.")
    for task in draw.weights:
        if draw.pool[task].held_out_task:
            raise ValueError(f"task {task!r} is held out of training (held_out_task in the pool); leave it out.")


def _my_shards(
    corpus: Corpus, folder: BuildFolder, worker: Worker, limit: int | None, trust_headers: bool
) -> Iterator[tuple[Shard, int, list[dict], list[RefusedRowError]]]:
    """This process's shards that are still to be written: how many lines they have, the utterances, and those refused.

    `limit` counts utterances.
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
            some = list(itertools.islice(lines, shard_size))
            if not some:
                break
            shard = Shard(file, chunk)
            if worker.has(file, chunk, num_files) and not folder.is_done(shard):
                yield shard, len(some), *read(corpus, some, trust_headers)
        folder.end(file, chunk)


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The items, each made in a thread while the one before is worked on: reading must not keep an LLM waiting."""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = reader.submit(next, items, None)
            yield item


def finish(folder: BuildFolder, pool: Mapping[str, Task]) -> Path:
    """Write the card if this process was the last; tells what was lost on the way."""
    missing = list(folder.missing())
    if missing:
        logger.warning(
            "%s: %d shards are still to be written by other processes (%s ...); if none is running, give the same "
            "command again.",
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
    logger.info("%s: %d rows of %d asked", folder.folder, summary.rows.total(), summary.asked.total())
    return folder.folder
