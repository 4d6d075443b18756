"""The self-powered set: an LLM answers instructions over the transcripts of an ASR corpus.

    python -m dataset_builders.self_powered build --corpus nano|HUB_ID|MANIFEST|FOLDER --llm LLM --output DIR
    python -m dataset_builders.self_powered inspect DIR
    python -m dataset_builders.self_powered publish DIR --repo ORGANISATION/NAME

Every utterance is given a task, drawn by weight, in one wording from the pool, and the LLM answers it from the
transcript ("Self-Powered LLM Modality Expansion", arXiv 2410.03798, section 3.2); a `transcription` row keeps the
transcript itself. Draws are a function of (seed, utterance). Rows lie in `DIR/data/TASK/`, and
`load_dataset(DIR, TASK)` or `load_dataset(DIR, "all")` reads them, from the Hub too.

A build that was killed goes on with the same command, in any number of processes (torchrun, accelerate, srun, SLURM
arrays): see `shards.py`. An LLM behind a server answers with `--server URL`: see `server_responder.py`.

`import` and `export` exchange sets with the original project, whose JSONL has `instruction`, `audio` and `text`.
"""

import argparse
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from language_models.extras import extra

with extra("data"):
    import pyarrow.parquet as pq
    from datasets import (
        BuilderConfig,
        Dataset,
        DatasetInfo,
        DownloadManager,
        Features,
        GeneratorBasedBuilder,
        SplitGenerator,
        Value,
    )
    from tqdm.contrib.logging import logging_redirect_tqdm
    from transformers import HfArgumentParser

    from dataset_builders.building import FEATURES, SHARD_ROWS, TASKS, build
    from dataset_builders.corpora.corpus import Corpus
    from dataset_builders.corpora.opening import PRESETS, open_corpus
    from dataset_builders.corpora.transcripts import NORMALIZERS
    from dataset_builders.filters import FILTERS
    from dataset_builders.instructions import POOL_PATH, Draw, load_pool, parse_weights
    from dataset_builders.original_format import OriginalRows, export_original, import_original
    from dataset_builders.publishing import push_to_hub
    from dataset_builders.responders.local import MAX_NEW_TOKENS, LocalResponder, Responder
    from language_models.tokenizers import parse_template_settings

logger = logging.getLogger(__name__)


def _option(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class BuildArguments:
    """What a build can be told, on the command line and by [`SelfPoweredBuilder`]."""

    corpus: str = field(
        metadata={"help": "a Hub id, a manifest (.jsonl, .csv, .tsv), a folder, or one of " + ", ".join(PRESETS)}
    )
    llm: str = field(metadata={"help": "Causal LLM, or LSM with one inside: folder or Hub id."})
    # The corpus
    split: str = _option("train", "Split of the corpus, and name of the set's.")
    corpus_config: str | None = _option(None, "Configuration of the corpus on the Hub.")
    corpus_name: str | None = _option(None, "What rows call the corpus; by default its Hub id, folder or file name.")
    corpus_revision: str | None = _option(None, "Branch, tag or commit of the corpus on the Hub.")
    preset: str | None = _option(None, "Whose columns and transcript rule: " + ", ".join(PRESETS))
    audio_column: str | None = _option(None, "Column of the audio, where it has no customary name.")
    transcript_column: str | None = _option(None, "Column of the transcript.")
    id_column: str | None = _option(None, "Column of the utterance's id.")
    normalizer: str | None = _option(None, f"Rule for the transcripts: {', '.join(NORMALIZERS)}. By preset, or plain.")
    data_root: str | None = _option(None, "Folder that a manifest's audio must be in; its own by default.")
    limit: int | None = _option(None, "Ask for so many rows.")
    # What is asked
    tasks: list[str] = field(
        default_factory=lambda: list(TASKS), metadata={"help": "TASK or TASK=WEIGHT; TASK=inf for every utterance."}
    )
    tasks_per_utterance: int = _option(1, "How many of them an utterance gets.")
    languages: list[str] | None = field(default=None, metadata={"help": "To translate into; by default the pool's."})
    pool: str = _option(str(POOL_PATH), "YAML file of tasks and their wordings.")
    seed: int = _option(0, "Of the draws.")
    # Who answers
    max_new_tokens: int = _option(MAX_NEW_TOKENS, "Longest response.")
    max_prompt_tokens: int | None = _option(None, "Longer prompts are not asked; what the LLM has room for.")
    dtype: str = _option("auto", "Of a local LLM.")
    template_settings: str | None = _option(
        None, "JSON of what the chat template asks for, of an LLM that is in no LSM: '{\"enable_thinking\": true}'."
    )
    server: str | None = _option(None, "URL of a server that runs the LLM, such as http://localhost:8000/v1.")
    served_model: str | None = _option(None, "The LLM's name on the server, if it is not --llm.")
    prompt_format: str = _option("tokens", "What the server is sent: tokens, or text where it takes no tokens.")
    concurrency: int = _option(64, "Requests to the server at a time.")
    timeout: float = _option(300.0, "Seconds for one answer of the server.")
    # What is kept
    filters_off: list[str] = field(
        default_factory=list, metadata={"help": f"Names of filters that drop nothing: {', '.join(FILTERS)}."}
    )
    judge_below: int | None = _option(None, "Drop what the LLM itself scores below this, of 1 to 5.")
    trust_headers: bool = _option(False, "Take audio for what its header says, without decoding it once.")
    shard_size: int | None = _option(None, f"Utterances written at a time; by default those of {SHARD_ROWS} rows.")

    def open_corpus(self) -> Corpus:
        columns = {role: getattr(self, f"{role}_column") for role in ("audio", "transcript", "id")}
        return open_corpus(
            self.corpus,
            self.split,
            config=self.corpus_config,
            preset=self.preset,
            columns={role: column for role, column in columns.items() if column is not None},
            normalizer=self.normalizer,
            data_root=self.data_root,
            revision=self.corpus_revision,
            corpus_name=self.corpus_name,
        )

    def draw(self) -> Draw:
        pool = load_pool(self.pool, {"language": self.languages} if self.languages else None)
        return Draw(pool, parse_weights(self.tasks), self.tasks_per_utterance, self.seed)

    def load_responder(self) -> Responder:
        limits = {"max_new_tokens": self.max_new_tokens, "max_prompt_tokens": self.max_prompt_tokens}
        limits["template_settings"] = parse_template_settings(self.template_settings)
        if self.server is None:
            return LocalResponder(self.llm, dtype=self.dtype, **limits)
        from dataset_builders.responders.server import ServerResponder

        names = ("served_model", "prompt_format", "concurrency", "timeout")
        return ServerResponder(self.llm, self.server, **{name: getattr(self, name) for name in names}, **limits)

    def build(self, output: str | Path) -> Path:
        """Build the set in `output`, or go on with it. What is cheap to get wrong is looked at first.

        Raises:
            ValueError, OSError: as in `building.build`.
        """
        corpus, draw = self.open_corpus(), self.draw()
        return build(
            corpus,
            self.load_responder(),
            output,
            draw,
            limit=self.limit,
            shard_size=self.shard_size,
            filters_off=self.filters_off,
            judge_below=self.judge_below,
            trust_headers=self.trust_headers,
        )


@dataclass
class SelfPoweredConfig(BuilderConfig, BuildArguments):
    """`BuildArguments` as `datasets` takes them, and `output`: where the set is built (by default in the cache)."""

    output: str | None = None


class SelfPoweredBuilder(GeneratorBasedBuilder):
    """A self-powered set as a `datasets` builder: `SelfPoweredBuilder(corpus="nano", llm="assets/nano/llm")`, then
    `download_and_prepare()` and `as_dataset("train")`. Goes on with a build that was killed."""

    BUILDER_CONFIG_CLASS = SelfPoweredConfig

    def _info(self) -> DatasetInfo:
        # Bytes, not Audio: encoding that needs torchcodec even when there is nothing to encode
        stored = {"bytes": Value("binary"), "path": Value("string")}
        return DatasetInfo(features=Features({**FEATURES, "audio": stored}))

    def _split_generators(self, dl_manager: DownloadManager) -> list[SplitGenerator]:
        folder = self.config.build(self.config.output or f"{self.cache_dir}.set")
        files = sorted(map(str, folder.glob(f"data/*/{self.config.split}-*.parquet")))
        return [SplitGenerator(self.config.split, gen_kwargs={"files": files})]

    def _generate_examples(self, files: list[str]) -> Iterator[tuple[str, dict]]:
        for file in files:
            for batch in pq.ParquetFile(file).iter_batches(batch_size=100):
                yield from ((row["id"], row) for row in batch.to_pylist())

    def _as_dataset(self, *args, **kwargs) -> Dataset:
        return super()._as_dataset(*args, **kwargs).cast_column("audio", FEATURES["audio"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=HfArgumentParser)
    building = commands.add_parser("build", dataclass_types=BuildArguments, help="build a set, or go on with it")
    building.add_argument("--output", required=True, help="Folder of the set.")
    looking = commands.add_parser(
        "inspect", dataclass_types=[], help="print a table and write a page with samples to read and to hear"
    )
    looking.add_argument("folder")
    looking.add_argument("--html", help="file of the page; FOLDER/inspect.html by default")
    looking.add_argument("--samples", type=int, default=3, help="number of rows of every task on the page")
    looking.add_argument("--seed", type=int, default=0, help="seed that decides which rows are shown")
    pushing = commands.add_parser("publish", dataclass_types=[], help="push a finished set to the Hub")
    pushing.add_argument("folder")
    pushing.add_argument("--repo", required=True, help="ORGANISATION/NAME")
    pushing.add_argument("--revision", help="branch of the repository, created if it does not exist")
    pushing.add_argument("--private", action="store_true", default=None)
    importing = commands.add_parser("import", dataclass_types=[], help="make a set of the original project's JSONL")
    importing.add_argument("rows", help="JSONL of instruction, audio and text")
    importing.add_argument("--output", required=True, help="folder of the set")
    importing.add_argument("--transcripts", help="JSONL of audio and text: what is said")
    importing.add_argument("--task", default="unknown", help="the task of all rows, if they have the same one")
    importing.add_argument("--split", default="train")
    importing.add_argument("--data-root", help="folder that the audio must be in; the JSONL's own by default")
    exporting = commands.add_parser("export", dataclass_types=[], help="write a set as the original project's JSONL")
    exporting.add_argument("folder")
    exporting.add_argument("--output", required=True, help="folder for the JSONL and the audio")
    exporting.add_argument("--split", default="train")
    args = vars(parser.parse_args())
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for chatty in ("httpx", "httpx2"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    with logging_redirect_tqdm():
        COMMANDS[args.pop("command")](**args)


def _build(output: str, **arguments) -> None:
    BuildArguments(**arguments).build(output)


def _inspect(folder: str, html: str | None, samples: int, seed: int) -> None:
    from dataset_builders.inspection import inspect_set  # a second of imports that no other command needs

    found = inspect_set(folder, html or Path(folder) / "inspect.html", samples, seed)
    print(found["text"])


def _publish(folder: str, repo: str, revision: str | None, private: bool | None) -> None:
    logger.info("%s", push_to_hub(folder, repo, revision, private))


def _import(rows: str, output: str, **settings) -> None:
    import_original(OriginalRows(rows, **settings), output)


def _export(folder: str, output: str, split: str) -> None:
    logger.info("%s", export_original(folder, output, split))


COMMANDS = {"build": _build, "inspect": _inspect, "publish": _publish, "import": _import, "export": _export}

if __name__ == "__main__":
    main()
