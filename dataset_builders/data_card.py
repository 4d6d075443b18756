"""The dataset card: the configurations that `load_dataset` reads, and what a user should know before training."""

import collections
import hashlib
import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq
from huggingface_hub import DatasetCardData

from dataset_builders.files import write_whole
from dataset_builders.filters import FILTERS
from dataset_builders.instructions import digest_of, load_pool
from dataset_builders.shards import BuildFolder

REPOSITORY = "THIS_REPOSITORY"  # `push_to_hub` replaces it
_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
_COLUMNS = """\
| column | meaning |
|---|---|
| `id` | source, utterance and task |
| `audio` | the corpus's own file, byte for byte; `cast_column("audio", Audio(16_000))` decodes it |
| `transcript` | the text of the speech, as the LLM read it |
| `task` | kind of instruction |
| `instruction` | the instruction, in one of the wordings below |
| `response` | the LLM's answer; for `transcription`, the transcript |
| `duration` | seconds of audio |
| `source` | corpus and split |
| `responder` | LLM that answered: name, revision, hash of the prompt template, decoding settings |
"""


@dataclass
class Summary:
    """Counts of all shards of a split."""

    utterances: int = 0
    refused: collections.Counter = field(default_factory=collections.Counter)  # by reason
    asked: collections.Counter = field(default_factory=collections.Counter)  # by task
    dropped: collections.Counter = field(default_factory=collections.Counter)  # by (task, reason)
    rows: collections.Counter = field(default_factory=collections.Counter)  # by task
    seconds: collections.Counter = field(default_factory=collections.Counter)  # of audio, by task
    words: collections.Counter = field(default_factory=collections.Counter)  # of responses, by task
    longest: dict[str, int] = field(default_factory=dict)  # response in words, by task
    content: str = ""  # hash of all rows

    @classmethod
    def of(cls, reports: Iterable[dict]) -> "Summary":
        """Add up the counts of `building.report`."""
        total, content = cls(), hashlib.sha256()
        for report in reports:
            content.update(json.dumps(report["sha256"], sort_keys=True).encode())
            total.utterances += report["utterances"]
            total.refused.update(reason for _, reason, _ in report["refused"])
            total.dropped.update({tuple(key.split("/")): count for key, count in report["dropped"].items()})
            for name in ("asked", "rows", "seconds", "words"):
                getattr(total, name).update(report[name])
            for task, words in report["longest"].items():
                total.longest[task] = max(words, total.longest.get(task, 0))
        total.content = content.hexdigest()[:16]
        return total

    def lines(self) -> list[str]:
        """Return a line for each reason why utterances were refused or rows dropped."""
        refused = [f"utterances refused: {count} × {reason}" for reason, count in sorted(self.refused.items())]
        dropped = [f"{task}: dropped {count} × {reason}" for (task, reason), count in sorted(self.dropped.items())]
        return refused + dropped


def write_card(folder: Path, pool: Mapping) -> None:
    """Write `FOLDER/README.md`, which describes all splits of the set and lists the wordings of the pool. Raises
    ValueError if no row is left."""
    builds = BuildFolder.splits(folder)
    summaries = {build.split: Summary.of(build.reports()) for build in builds}
    if not any(summary.rows for summary in summaries.values()):
        lost = "; ".join(line for summary in summaries.values() for line in summary.lines())
        raise ValueError(f"{folder}: no row is left ({lost or 'the corpus is empty'}).")
    text = "\n".join(
        [
            f"---\n{_metadata(builds, summaries).to_yaml()}\n---\n",
            *_introduction(builds[0].settings),
            *(line for build in builds for line in _split(build, summaries[build.split])),
            *_examples(folder, summaries),
            *_settings(builds, pool),
        ]
    )
    write_whole(folder / "README.md", text)


def _metadata(builds: list[BuildFolder], summaries: Mapping[str, Summary]) -> DatasetCardData:
    corpora = [build.settings["corpus"] for build in builds]
    tasks = sorted({task for summary in summaries.values() for task in summary.rows})
    total = sum(sum(summary.rows.values()) for summary in summaries.values())
    splits = {
        name: [split for split, summary in summaries.items() if any(summary.rows[task] for task in names)]
        for name, names in {"all": tasks, **{task: [task] for task in tasks}}.items()
    }
    # A hash of the rows goes into the description: datasets 5.2 keys its cache on the folder's name and its
    # configurations, and would otherwise return the rows of another folder of the same name.
    content = ", ".join(f"{split} {summary.content}" for split, summary in summaries.items())
    folders = {"all": "data/*", **{task: f"data/{task}" for task in tasks}}
    on_hub = sorted({corpus["origin"] for corpus in corpora if _commit(corpus)})
    licenses = sorted({corpus["license"] for corpus in corpora if corpus["license"]})
    return DatasetCardData(
        configs=[
            {
                "config_name": name,
                **({"default": True} if name == "all" else {}),
                "description": f"content {content}",
                "data_files": [{"split": split, "path": f"{path}/{split}-*.parquet"} for split in splits[name]],
            }
            for name, path in folders.items()
        ],
        language=sorted({corpus["language"] for corpus in corpora if corpus["language"]}) or None,
        license=licenses[0] if len(licenses) == 1 else None,
        size_categories=next((name for bound, name in _SIZES if total < bound), "n>10M"),
        source_datasets=on_hub or None,
        task_categories=["automatic-speech-recognition", "audio-text-to-text"],
        tags=["self-powered", "speech", "instruction-following"],
        pretty_name="Self-powered speech instructions",
    )


def _introduction(settings: dict) -> list[str]:
    responder = settings["responder"]
    return [
        "# Self-powered speech instructions\n",
        f"An LLM, `{responder['model']}`, answered instructions about the transcripts of an ASR corpus. A speech LLM "
        "made from the same LLM learns to give these answers from the speech, so it learns to listen and keeps its way "
        'of answering ("Self-Powered LLM Modality Expansion", arXiv 2410.03798).\n',
        f'```python\nfrom datasets import load_dataset\n\nrows = load_dataset("{REPOSITORY}", "all", split='
        f'"{settings["corpus"]["split"]}", streaming=True)\n```\n',
        _COLUMNS,
    ]


def _commit(corpus: dict) -> str | None:
    """Return the corpus's commit on the Hub; None if the corpus is in local files."""
    of_files = (corpus["revision"] or "").startswith("sha256:")
    return corpus["revision"] if corpus["kind"] == "HubCorpus" and not of_files else None


def _split(build: BuildFolder, summary: Summary) -> list[str]:
    corpus = build.settings["corpus"]
    revision = f" at revision `{corpus['revision']}`" if corpus["revision"] else ""
    table = [
        f"| {task} | {summary.asked[task]} | {summary.rows[task]} | {summary.seconds[task] / 3600:.2f} | "
        f"{summary.words[task] / max(1, summary.rows[task]):.1f} | {summary.longest.get(task, 0)} |"
        for task in sorted(summary.asked)
    ]
    seconds = sum(summary.seconds.values())
    return [
        f"## Split `{build.split}`\n",
        f"Source: `{corpus['name']}`, split `{corpus['split']}`{revision}; licence: "
        f"{corpus['license'] or 'see the corpus, whose terms hold for its audio and transcripts'}. Rule for the "
        f"transcripts: `{corpus['normalizer']}`. Utterances read: {summary.utterances}.\n",
        "| task | asked | rows | hours | words per response | longest |\n|---|---|---|---|---|---|",
        *table,
        f"| all | {sum(summary.asked.values())} | {sum(summary.rows.values())} | {seconds / 3600:.2f} | | |\n",
        "Refused and dropped:\n",
        *([f"- {line}" for line in summary.lines()] or ["- nothing"]),
        "",
    ]


def _examples(folder: Path, summaries: Mapping[str, Summary]) -> list[str]:
    """Return a table with one row of each task, without its audio."""
    lines = ["## Examples\n", "| task | instruction | transcript | response |", "|---|---|---|---|"]
    for task in sorted({task for summary in summaries.values() for task in summary.rows}):
        file = next(iter(sorted((folder / "data" / task).glob("*.parquet"))))
        columns = ["instruction", "transcript", "response"]
        row = pq.ParquetFile(file).read_row_group(0, columns=columns).slice(0, 1).to_pylist()[0]
        lines.append(f"| {task} | " + " | ".join(_cell(row[column]) for column in columns) + " |")
    return [*lines, ""]


def _cell(text: str) -> str:
    """Escape a text for a cell of a Markdown table."""
    for mark in "\\`*_<>[]|":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())


def _settings(builds: list[BuildFolder], pool: Mapping) -> list[str]:
    settings = builds[0].settings
    responder, draw = settings["responder"], settings["draw"]
    if draw is None:
        return [
            "## How it was made\n",
            "Imported from JSONL of the original project, which does not say which LLM answered.\n",
        ]
    filters = [f"- `{name}`: {what}" for name, what in FILTERS.items() if _is_on(name, settings)]
    wordings = [f"- {task}: " + " / ".join(pool[task].seen) for task in draw["weights"]]
    return [
        "## How it was made\n",
        f"- LLM: `{responder['model']}`, revision `{responder['revision']}`; prompt template `{responder['template']}`",
        f"- template settings: `{json.dumps(responder.get('template_settings', {}), sort_keys=True)}`",
        f"- decoding: `{json.dumps(responder['decoding'], sort_keys=True)}`",
        f"- tasks and weights: {draw['weights']}; {draw['tasks_per_utterance']} per utterance; seed {draw['seed']}",
        f"- instruction pool: `{draw['pool']}`; wordings marked `{draw['paraphrases']}`:\n",
        "<details><summary>wordings</summary>\n",
        *wordings,
        "\n</details>\n",
        "Filters:\n",
        *(filters or ["- none"]),
        "\nTo build it again (`POOL`, if the command has it, is the YAML file with the wordings above):\n",
        "```bash",
        *(rebuild_command(build.settings) for build in builds),
        "```\n",
    ]


def _is_on(name: str, settings: dict) -> bool:
    return settings["judge_below"] is not None if name == "judged" else name not in settings["filters_off"]


def rebuild_command(settings: dict) -> str:
    """Return the command that repeats a build. Local files appear without their folders, and another pool as POOL."""
    corpus, draw, responder = settings["corpus"], settings["draw"], settings["responder"]
    options = {
        "corpus": corpus["origin"],
        "corpus-name": corpus["name"] if corpus["name"] != corpus["origin"] else None,
        "split": corpus["split"],
        "corpus-config": corpus["config"],
        "corpus-revision": _commit(corpus),
        "normalizer": corpus["normalizer"],
        **{f"{role}-column": column for role, column in corpus["columns"].items()},
        "llm": responder["model"],
        "max-new-tokens": responder["decoding"]["max_new_tokens"],
        "template-settings": json.dumps(template) if (template := responder.get("template_settings")) else None,
        "seed": draw["seed"],
        "tasks-per-utterance": draw["tasks_per_utterance"],
        "limit": settings["limit"],
        "shard-size": settings["shard_size"],
        "judge-below": settings["judge_below"],
    }
    parts = ["python", "-m", "dataset_builders.self_powered", "build"]
    for name, value in options.items():
        if value is not None:
            parts += [f"--{name}", str(value)]
    parts += ["--tasks", *(f"{task}={weight}" for task, weight in draw["weights"].items())]
    if draw["languages"]:
        parts += ["--languages", *draw["languages"]]
    if draw["pool"] != digest_of(load_pool(slots={"language": draw["languages"]} if draw["languages"] else None)):
        parts += ["--pool", "POOL"]
    if settings.get("trust_headers"):
        parts.append("--trust-headers")
    if settings["filters_off"]:
        parts += ["--filters-off", *settings["filters_off"]]
    return shlex.join([*parts, "--output", "OUTPUT"])
