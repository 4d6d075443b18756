"""The self-powered set: an LLM answers instructions over the transcripts of an ASR corpus.

    python -m dataset_builders.self_powered build --corpus nano|HUB_ID|MANIFEST|FOLDER --llm LLM --output DIR
    python -m dataset_builders.self_powered inspect DIR
    python -m dataset_builders.self_powered publish DIR --repo ORGANISATION/NAME

Every utterance is given a task, drawn by weight, in one wording from the pool, and the LLM answers it from the
transcript ("Self-Powered LLM Modality Expansion", arXiv 2410.03798, section 3.2); a `transcription` row keeps the
transcript itself. Draws are a function of (seed, utterance). Rows lie in `DIR/data/TASK/`, and
`load_dataset(DIR, TASK)` or `load_dataset(DIR, "all")` reads them, from the Hub too.

A build that was killed goes on with the same command, in any number of processes (torchrun, accelerate, srun, SLURM
arrays): see `shards.py`. What an LLM behind a server answers is asked with `--server URL`: see `server_responder.py`.
"""

import argparse
import collections
import hashlib
import itertools
import json
import logging
import math
from collections.abc import Collection, Iterator
from pathlib import Path

import pyarrow as pa
from datasets import Audio, Dataset, Features, Value, load_dataset
from huggingface_hub import HfApi

from dataset_builders.asr_corpora import PRESETS, open_corpus
from dataset_builders.corpus import Corpus, RefusedRowError
from dataset_builders.data_card import Summary, write_card
from dataset_builders.filters import FILTERS, check_names, judge, reason_to_drop
from dataset_builders.instructions import (
    POOL_PATH,
    SELF_POWERED_TASKS,
    TRANSCRIPTION,
    Draw,
    load_pool,
    parse_weights,
)
from dataset_builders.responders import MAX_NEW_TOKENS, LocalResponder, Reply, Request, Responder
from dataset_builders.shards import BuildFolder, Shard, Worker
from dataset_builders.transcripts import NORMALIZERS

logger = logging.getLogger(__name__)

FEATURES = Features(
    {
        "id": Value("string"),
        "audio": Audio(16_000),
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
SHARD_SIZE = 1000  # utterances


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


def read(corpus: Corpus, lines: list[tuple[str, dict]]) -> tuple[list[dict], list[RefusedRowError]]:
    """The utterances of a shard, and those that cannot be used."""
    utterances, refused, ids = [], [], set()
    for where, line in lines:
        try:
            utterance = corpus.utterance(where, line)
            if utterance["id"] in ids:
                raise RefusedRowError(where, "id used twice", utterance["id"])
        except RefusedRowError as error:
            logger.warning("refused %s", error)
            refused.append(error)
        else:
            ids.add(utterance["id"])
            utterances.append(utterance)
    return utterances, refused


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
        scores = judge(responder, [requests[i] for i in asked], [replies[i].text for i in asked])
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


def to_tables(rows: list[dict]) -> dict[str, pa.Table]:
    """The rows of every task, as Parquet has them."""
    tasks = sorted({row["task"] for row in rows})
    schema = FEATURES.arrow_schema
    return {task: pa.Table.from_pylist([row for row in rows if row["task"] == task], schema) for task in tasks}


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
    shard_size: int = SHARD_SIZE,
    filters_off: Collection[str] = (),
    judge_below: int | None = None,
    worker: Worker | None = None,
) -> Path:
    """Build one split of a set, or go on with it: shards that are there are kept as they are.

    Args:
        corpus: as `open_corpus` returns it.
        responder: who answers.
        output: folder of the set; the corpus's split names the set's.
        draw: what is asked; the pool's tasks and transcription, evenly, one per utterance, if None.
        limit: the first so many rows, refused and dropped ones included; all if None.
        shard_size: utterances per shard: what a kill can lose, and what is in memory at a time.
        filters_off: names in `FILTERS` that drop nothing.
        judge_below: drop responses to which the LLM itself gives less than this, of 1 to 5; not asked if None.
        worker: which of the processes this is; the environment says so if None.

    Raises:
        ValueError: bad settings, others than the build was begun with, or no row is left.
        OSError: the disk is full, or the responder's server fails; the shards written so far are whole.
    """
    draw = draw or Draw(load_pool(), dict.fromkeys(TASKS, 1.0))
    check_names(filters_off)
    if shard_size < 1 or (limit is not None and limit < 1):
        raise ValueError(f"{shard_size=} and {limit=} must be 1 or more.")
    if judge_below is not None and not 1 <= judge_below <= 5:
        raise ValueError(f"{judge_below=} must be 1 to 5.")
    for task in draw.weights:
        if draw.pool[task].held_out_task:
            raise ValueError(f"task {task!r} is held out of training (held_out_task in the pool); leave it out.")
    if limit is None and corpus.default_limit is not None:
        limit = corpus.default_limit * draw.tasks_per_utterance
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
            "num_files": corpus.num_files if limit is None else 1,
        }
    )
    folder.settle()
    for shard, lines in _my_shards(corpus, folder, worker or Worker.from_environment(), shard_size, limit, draw):
        utterances, refused = read(corpus, lines)
        rows = draw_rows(utterances, draw)
        if limit is not None:  # the last utterance may be asked less than the others
            rows = rows[: limit - shard.chunk * shard_size * draw.tasks_per_utterance]
        kept, dropped = answer(rows, responder, draw, filters_off, judge_below)
        folder.commit(shard, to_tables(kept), report(len(lines), refused, rows, kept, dropped))
        logger.info("shard %s: %d rows, %d dropped", shard, len(kept), len(rows) - len(kept))
    return _finish(folder, draw)


def _my_shards(
    corpus: Corpus, folder: BuildFolder, worker: Worker, shard_size: int, limit: int | None, draw: Draw
) -> Iterator[tuple[Shard, list[tuple[str, dict]]]]:
    """This process's shards that are still to be written, and their lines.

    With a limit the corpus counts as one file: which rows are the first must not depend on the processes.
    """
    num_files = corpus.num_files if limit is None else 1
    for file in worker.files(num_files):
        shards = folder.shards_of(file)
        if shards is not None and all(folder.is_done(Shard(file, chunk)) for chunk in range(shards)):
            continue
        if limit is None:
            lines = corpus.lines(file)
        else:
            every = itertools.chain.from_iterable(map(corpus.lines, range(corpus.num_files)))
            lines = itertools.islice(every, math.ceil(limit / draw.tasks_per_utterance))
        for chunk in itertools.count():
            some = list(itertools.islice(lines, shard_size))
            if not some:
                break
            shard = Shard(file, chunk)
            if worker.has(file, chunk, num_files) and not folder.is_done(shard):
                yield shard, some
        folder.end(file, chunk)


def _finish(folder: BuildFolder, draw: Draw) -> Path:
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
    write_card(folder.folder, draw.pool)
    summary = Summary.of(folder.reports())
    for line in summary.lines():
        logger.warning("%s", line)
    logger.info("%s: %d rows of %d asked", folder.folder, summary.rows.total(), summary.asked.total())
    return folder.folder


def check(folder: str | Path) -> int:
    """Whether a set is fit to be published: whole, and every id once. Returns its number of rows.

    Raises:
        ValueError: says what is missing, or which id comes twice.
    """
    folder = Path(folder)
    builds = BuildFolder.splits(folder)
    if not builds or not (folder / "README.md").is_file():
        raise ValueError(f"{folder} is no finished set; expected what `build` wrote, with its README.md.")
    for split in builds:
        if missing := list(split.missing()):
            raise ValueError(
                f"{folder} lacks {len(missing)} shards of {split.split!r} ({missing[0]} ...); build it to its end."
            )
        split.settle()
    rows, ids = 0, set()
    for file in sorted(folder.glob("data/*/*.parquet")):
        # 8 bytes an id, not the id: a set may have millions of rows
        for id in pa.parquet.read_table(file, columns=["id"])["id"].to_pylist():
            rows += 1
            ids.add(int.from_bytes(hashlib.sha256(id.encode()).digest()[:8]))
            if len(ids) != rows:
                raise ValueError(f"{file} has the id {id!r}, which another row has too; ids of a corpus must differ.")
    return rows


def push_to_hub(
    folder: str | Path, repo_id: str, revision: str | None = None, private: bool | None = None, token: str | None = None
) -> str:
    """Publish a finished set; what the repository has under `data/` and the folder has not goes away.

    Args:
        folder: of the set.
        repo_id: `ORGANISATION/NAME`, made if it is not there.
        revision: a branch, made if it is not there; `main` if None.
        private, token: as in `huggingface_hub`.

    Returns:
        The commit's URL.

    Raises:
        ValueError: as in `check`.
    """
    rows, api = check(folder), HfApi(token=token)
    api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    if revision is not None:
        api.create_branch(repo_id, repo_type="dataset", branch=revision, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        repo_type="dataset",
        revision=revision,
        allow_patterns=["README.md", "data/*/*.parquet"],
        delete_patterns=["data/**"],
        commit_message=f"Self-powered set of {rows} rows",
    )
    return commit.commit_url


def load_self_powered(name: str | Path, config: str = "all", split: str = "train") -> Dataset:
    """Open a self-powered set, folder or Hub id: one task's rows, or all of them; audio not decoded.

    A folder's files are named one by one: `load_dataset(folder, config)` of datasets 5.2 keys its cache on the folder's
    name and the configuration alone, and would return the rows of an older set of that name.

    Raises:
        ValueError: the folder has no such rows.
    """
    if not Path(name).is_dir():
        return load_dataset(str(name), config, split=split).cast_column("audio", Audio(16_000, decode=False))
    files = sorted(map(str, Path(name).glob(f"data/{'*' if config == 'all' else config}/{split}-*.parquet")))
    if not files:
        raise ValueError(f"{name} has no data/{config}/{split}-*.parquet; expected a folder that `build` wrote.")
    dataset = load_dataset("parquet", data_files={split: files}, split=split)
    return dataset.cast_column("audio", Audio(16_000, decode=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_build(commands.add_parser("build", help="build a set, or go on with it"))
    publish = commands.add_parser("publish", help="push a finished set to the Hub")
    publish.add_argument("folder")
    publish.add_argument("--repo", required=True, help="ORGANISATION/NAME")
    publish.add_argument("--revision", help="branch, made if it is not there")
    publish.add_argument("--private", action="store_true", default=None)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if args.command == "build":
        _build(args)
    elif args.command == "publish":
        logger.info("%s", push_to_hub(args.folder, args.repo, args.revision, args.private))


def _add_build(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--output", required=True, help="folder of the set; the same command goes on with what is there")
    corpus = parser.add_argument_group("corpus")
    add = corpus.add_argument
    add("--corpus", required=True, help="nano, a Hub id, a manifest (.jsonl, .csv, .tsv), a folder, or a preset")
    add("--split", default="train")
    add("--config", help="configuration on the Hub")
    add("--revision", help="branch, tag or commit on the Hub")
    add("--preset", choices=list(PRESETS), help="columns and transcript rule of a well-known corpus")
    for role in ("audio", "transcript", "id"):
        add(f"--{role}-column")
    add("--normalizer", choices=list(NORMALIZERS), help="rule for the transcripts; the preset's, or plain")
    add("--data-root", help="folder that a manifest's audio must be in; the manifest's own by default")
    add("--limit", type=int, help="rows at most")
    asked = parser.add_argument_group("what is asked")
    add = asked.add_argument
    add("--tasks", nargs="+", default=list(TASKS), metavar="TASK[=WEIGHT]", help="=inf for every utterance")
    add("--tasks-per-utterance", type=int, default=1, metavar="N")
    add("--languages", nargs="+", help="to translate into; the pool's by default")
    add("--pool", default=POOL_PATH, help="YAML file of tasks and their wordings")
    add("--seed", type=int, default=0, help="of the draws")
    llm = parser.add_argument_group("who answers")
    add = llm.add_argument
    add("--llm", required=True, help="causal LLM, or LSM with one inside: folder or Hub id")
    add("--max-new-tokens", type=int, default=MAX_NEW_TOKENS)
    add("--max-prompt-tokens", type=int, help="longer prompts are not asked; by default, what the LLM has room for")
    add("--dtype", default="auto", help="of a local LLM")
    add("--server", help="URL of an OpenAI-compatible server that runs the LLM, such as http://localhost:8000/v1")
    add("--served-model", help="the LLM's name on the server, if it is not --llm")
    add("--prompt-format", choices=["tokens", "text"], default="tokens", help="what the server is sent")
    add("--concurrency", type=int, default=64, help="requests to the server at a time")
    add("--timeout", type=float, default=300.0, help="seconds for one answer of the server")
    kept = parser.add_argument_group("what is kept")
    add = kept.add_argument
    add("--filters-off", nargs="+", default=[], choices=list(FILTERS), metavar="NAME", help=", ".join(FILTERS))
    add("--judge-below", type=int, metavar="SCORE", help="drop what the LLM itself scores below this, of 1 to 5")
    add("--shard-size", type=int, default=SHARD_SIZE, help="utterances written at a time")


def _build(args: argparse.Namespace) -> None:
    columns = {role: getattr(args, f"{role}_column") for role in ("audio", "transcript", "id")}
    corpus = open_corpus(
        args.corpus,
        args.split,
        config=args.config,
        preset=args.preset,
        columns={role: column for role, column in columns.items() if column is not None},
        normalizer=args.normalizer,
        data_root=args.data_root,
        revision=args.revision,
    )
    slots = {"language": args.languages} if args.languages else None
    draw = Draw(load_pool(args.pool, slots), parse_weights(args.tasks), args.tasks_per_utterance, args.seed)
    settings = {"max_new_tokens": args.max_new_tokens, "max_prompt_tokens": args.max_prompt_tokens}
    if args.server is None:
        responder: Responder = LocalResponder(args.llm, dtype=args.dtype, **settings)
    else:
        from dataset_builders.server_responder import ServerResponder

        responder = ServerResponder(
            args.llm,
            args.server,
            served_model=args.served_model,
            prompt_format=args.prompt_format,
            concurrency=args.concurrency,
            timeout=args.timeout,
            **settings,
        )
    build(
        corpus,
        responder,
        args.output,
        draw,
        limit=args.limit,
        shard_size=args.shard_size,
        filters_off=args.filters_off,
        judge_below=args.judge_below,
    )


if __name__ == "__main__":
    main()
