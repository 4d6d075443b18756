"""The self-powered set: an LLM answers instructions over the transcripts of an ASR corpus.

    python -m dataset_builders.self_powered build --corpus nano|HUB_ID|MANIFEST|FOLDER --llm LLM --output DIR
    python -m dataset_builders.self_powered inspect DIR
    python -m dataset_builders.self_powered publish DIR --repo ORGANISATION/NAME

Every utterance gets a task, drawn by weight, and an instruction from the pool, and the LLM answers it from the
transcript ("Self-Powered LLM Modality Expansion", arXiv 2410.03798, section 3.2). The response of a `transcription` row
is the transcript itself. The draws depend only on the seed and the utterance. The rows are in `DIR/data/TASK/`;
`load_dataset(DIR, TASK)` and `load_dataset(DIR, "all")` read them, also from the Hub.

To continue a build that was killed, run the same command again, with any number of processes (torchrun, accelerate,
srun, SLURM arrays): see `shards.py`. `--server URL` uses an LLM on a server: see `responders/server.py`.

`import` and `export` exchange sets with the original project, whose JSONL has `instruction`, `audio` and `text`.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from language_models.command_line import parser_of
from language_models.extras import extra

with extra("data"):
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
    from dataset_builders.corpora.opening import OF_FILES, PRESETS, open_corpus
    from dataset_builders.corpora.transcripts import NORMALIZERS
    from dataset_builders.filters import FILTERS
    from dataset_builders.instructions import Draw, load_pool, parse_weights
    from dataset_builders.original_format import OriginalRows, export_original, import_original, stored_rows
    from dataset_builders.publishing import push_to_hub
    from dataset_builders.responders.local import MAX_NEW_TOKENS, LocalResponder, Responder
    from language_models.tokenizers import parse_template_settings

logger = logging.getLogger(__name__)


def _option(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class BuildArguments:
    """The options of a build, for the command line and for [`SelfPoweredBuilder`]."""

    corpus: str = field(
        metadata={"help": "A Hub id, a manifest (.jsonl, .csv, .tsv), a folder, or one of " + ", ".join(PRESETS)}
    )
    llm: str = field(metadata={"help": "Folder or Hub id of a causal LLM, or of an LSM, whose LLM answers then."})
    # The corpus
    split: str = _option("train", "Split of the corpus; the split of the set gets the same name.")
    corpus_config: str | None = _option(None, "Configuration of the corpus on the Hub.")
    corpus_name: str | None = _option(
        None, "Name of the corpus in the rows; by default its Hub id, folder or file name."
    )
    corpus_revision: str | None = _option(None, "Branch, tag or commit of the corpus on the Hub.")
    preset: str | None = _option(None, "Corpus whose columns and transcript rule are used: " + ", ".join(OF_FILES))
    audio_column: str | None = _option(None, "Column of the audio, if its name is not a common one.")
    transcript_column: str | None = _option(None, "Column of the transcript.")
    id_column: str | None = _option(None, "Column of the utterance's id.")
    normalizer: str | None = _option(
        None, f"Rule for the transcripts: {', '.join(NORMALIZERS)}; by default that of the preset, or plain."
    )
    data_root: str | None = _option(None, "Folder that a manifest's audio must be in; by default the manifest's own.")
    limit: int | None = _option(None, "Number of rows to ask for.")
    # What is asked
    tasks: list[str] = field(
        default_factory=lambda: list(TASKS),
        metadata={"help": "Tasks to draw from: TASK, TASK=WEIGHT, or TASK=inf for a task that every utterance gets."},
    )
    tasks_per_utterance: int = _option(1, "Number of tasks that an utterance gets.")
    languages: list[str] | None = field(
        default=None, metadata={"help": "Languages to translate into and to answer in; by default those of the pool."}
    )
    pool: str | None = _option(
        None, "YAML file of instructions, tasks and their wordings; by default dataset_builders/instructions.yaml."
    )
    seed: int = _option(0, "Seed of the draws.")
    # Who answers
    max_new_tokens: int = _option(MAX_NEW_TOKENS, "Longest response, in tokens.")
    max_prompt_tokens: int | None = _option(
        None, "Longest prompt, in tokens; by default what the LLM has room for. Longer ones are left out."
    )
    dtype: str = _option("auto", "Data type of an LLM that runs here.")
    template_settings: str | None = _option(
        None, "JSON of settings for the LLM's chat template, such as '{\"enable_thinking\": true}'. An LSM has its own."
    )
    server: str | None = _option(None, "URL of a server that runs the LLM, such as http://localhost:8000/v1.")
    served_model: str | None = _option(None, "Name of the LLM on the server; --llm by default.")
    prompt_format: str = _option("tokens", "Form of the prompts for the server: tokens, or text if it takes no tokens.")
    concurrency: int = _option(64, "Number of requests that the server gets at the same time.")
    timeout: float = _option(300.0, "Seconds that the server has for an answer.")
    # What is kept
    filters_off: list[str] = field(
        default_factory=list, metadata={"help": f"Filters to switch off: {', '.join(FILTERS)}."}
    )
    judge_below: int | None = _option(
        None, "Drop responses to which the LLM itself gives a lower score than this, from 1 to 5."
    )
    trust_headers: bool = _option(
        False, "Trust the headers of audio files, and do not decode each file once to check it."
    )
    shard_size: int | None = _option(
        None, f"Number of utterances written together; by default as many as make {SHARD_ROWS} rows."
    )

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
        """Build the set in `output`, or continue a build. The corpus and the pool are checked before the LLM is loaded.

        Raises:
            ValueError, OSError: as in `building.build`.
        """
        corpus, draw = self.open_corpus(), self.draw()
        names = ("limit", "shard_size", "filters_off", "judge_below", "trust_headers")
        return build(corpus, self.load_responder(), output, draw, **{name: getattr(self, name) for name in names})


@dataclass
class SelfPoweredConfig(BuilderConfig, BuildArguments):
    """`BuildArguments` for `datasets`, and `output`, the folder of the set (by default in the cache)."""

    output: str | None = None


class SelfPoweredBuilder(GeneratorBasedBuilder):
    """A self-powered set as a `datasets` builder: `SelfPoweredBuilder(corpus="nano", llm="assets/nano/llm")`, then
    `download_and_prepare()` and `as_dataset("train")`. It continues a build that was killed."""

    BUILDER_CONFIG_CLASS = SelfPoweredConfig

    def _info(self) -> DatasetInfo:
        # Bytes instead of Audio, because encoding Audio needs torchcodec even if there is nothing to encode.
        stored = {"bytes": Value("binary"), "path": Value("string")}
        return DatasetInfo(features=Features({**FEATURES, "audio": stored}))

    def _split_generators(self, dl_manager: DownloadManager) -> list[SplitGenerator]:
        folder = self.config.build(self.config.output or f"{self.cache_dir}.set")
        files = sorted(map(str, folder.glob(f"data/*/{self.config.split}-*.parquet")))
        return [SplitGenerator(self.config.split, gen_kwargs={"files": files})]

    def _generate_examples(self, files: list[str]) -> Iterator[tuple[str, dict]]:
        yield from ((row["id"], row) for row in stored_rows(files))

    def _as_dataset(self, *args, **kwargs) -> Dataset:
        return super()._as_dataset(*args, **kwargs).cast_column("audio", FEATURES["audio"])


def main() -> None:
    parser = parser_of(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=HfArgumentParser)
    building = commands.add_parser("build", dataclass_types=BuildArguments, help="build a set, or continue a build")
    building.add_argument("--output", required=True, help="Folder of the set.")
    looking = commands.add_parser(
        "inspect", dataclass_types=[], help="print a table and write a page with samples to read and listen to"
    )
    looking.add_argument("folder", help="folder of the set")
    looking.add_argument("--html", help="file of the page; FOLDER/inspect.html by default")
    looking.add_argument("--samples", type=int, default=3, help="number of rows of every task on the page")
    looking.add_argument("--seed", type=int, default=0, help="seed that decides which rows are shown")
    pushing = commands.add_parser("publish", dataclass_types=[], help="push a finished set to the Hub")
    pushing.add_argument("folder", help="folder of the set")
    pushing.add_argument("--repo", required=True, help="ORGANISATION/NAME")
    pushing.add_argument("--revision", help="branch of the repository, created if it does not exist")
    pushing.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    importing = commands.add_parser("import", dataclass_types=[], help="make a set from the original project's JSONL")
    importing.add_argument("rows", help="JSONL with instruction, audio and text")
    importing.add_argument("--output", required=True, help="folder of the set")
    importing.add_argument("--transcripts", help="JSONL with audio and text, the transcripts")
    importing.add_argument("--task", default="unknown", help="task of all rows, if they have the same one")
    importing.add_argument("--split", default="train", help="name of the set's split")
    importing.add_argument("--data-root", help="folder that the audio must be in; the JSONL's own by default")
    exporting = commands.add_parser("export", dataclass_types=[], help="write a set in the original project's format")
    exporting.add_argument("folder", help="folder of the set")
    exporting.add_argument("--output", required=True, help="folder for the JSONL and the audio")
    exporting.add_argument("--split", default="train", help="split to write")
    args = vars(parser.parse_args())
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for chatty in ("httpx", "httpx2"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    with logging_redirect_tqdm():
        match args.pop("command"):
            case "build":
                output = args.pop("output")
                BuildArguments(**args).build(output)
            case "inspect":
                from dataset_builders.inspection import inspect_set  # takes a second, and only this needs it

                args["html"] = args["html"] or Path(args["folder"]) / "inspect.html"
                print(inspect_set(**args)["text"])
            case "publish":
                logger.info("%s", push_to_hub(args["folder"], args["repo"], args["revision"], args["private"]))
            case "import":
                rows, output = args.pop("rows"), args.pop("output")
                import_original(OriginalRows(rows, **args), output)
            case "export":
                logger.info("%s", export_original(**args))


if __name__ == "__main__":
    main()
