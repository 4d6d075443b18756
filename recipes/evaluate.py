"""What a speech LLM can do, whether it follows instructions, and whether it listens: one command, one table.

    python -m recipes.evaluate --model runs/quickstart/checkpoint --base runs/quickstart/base --tasks nano \
        --vanilla runs/quickstart/training/vanilla --output runs/evaluation
    python -m recipes.evaluate --model Qwen/Qwen2-Audio-7B-Instruct --tasks librispeech_clean --output runs/qwen2_audio
    python -m recipes.evaluate --list

`--model` is an LSM or another speech LLM of transformers. `--tasks` are names or groups of `evaluation/tasks.yaml`;
`--data librispeech_clean=DIR` says where a corpus is if not on the Hub. Beside the model stand baselines (`--systems`):
the text LLM (`--base`; else the checkpoint itself) that reads the transcript, a cascade, a vanilla LSM and one trained
as in the paper; and controls: the clips shuffled, silence, the instruction of another task. Writes every answer
(`predictions.parquet`), `results.json`, `results.md`, `model_index.yaml` for the model card, and `report.html`.
Interrupted, the same command goes on where it stopped.
"""

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from dataset_builders.exchange import Reply
from dataset_builders.files import content_of, write_whole
from dataset_builders.instructions import TRANSCRIPTION
from dataset_builders.text_llm import text_processor
from recipes.audio_features import AudioFeatureStore
from recipes.evaluation import pages, results, tables
from recipes.evaluation.answers import answer, to_parquet
from recipes.evaluation.questions import read_rows
from recipes.evaluation.scoring import choices, is_correct
from recipes.evaluation.systems import SYSTEMS, System, shuffle_clips, swap_instructions, transcription_rows
from recipes.evaluation.tasks import Task, choose_tasks, load_tasks, override
from recipes.speech_llm import Lsm, SpeechLLM, TextLLM, load, template_settings_of
from recipes.transcriber import load_recogniser

logger = logging.getLogger(__name__)

COMPARED_BY_NAME = ("checkpoints", "content")  # those of systems that are asked this time
CHUNK = 4  # batches asked between two writes


@dataclasses.dataclass
class Evaluation:
    """A run over tasks and systems, in a folder of its own.

    Args:
        output: the folder.
        checkpoints: `model` and, as far as they are there, `base`, `vanilla`, `paper` and `asr`: folders or Hub ids.
        tasks: what is asked.
        systems: who is asked; by default all for which there is a checkpoint.
        limit: utterances of a task at most; or of the tasks named.
        control_limit: utterances of a task that the controls are asked about, at most.
        constrained: whether closed questions are also answered among the allowed answers alone.
        store: an LSM's audio features, computed before.
    """

    output: Path
    checkpoints: dict[str, str]
    tasks: Sequence[Task]
    systems: Sequence[str] = ()
    limit: int | Mapping[str, int] | None = None
    control_limit: int | None = None
    batch_size: int = 16
    max_new_tokens: int = 128
    constrained: bool = True
    seed: int = 0
    dtype: str = "auto"
    store: AudioFeatureStore | None = None

    def __post_init__(self):
        self.output = Path(self.output)
        there = {"base": self.checkpoints["model"], "asr": self.checkpoints["model"], **self.checkpoints}
        if self.control_limit is not None and self.control_limit < 1:
            raise ValueError(f"control_limit is {self.control_limit}; expected 1 or more, or other --systems.")
        unknown = sorted(set(self.systems) - set(SYSTEMS))
        if unknown:
            raise ValueError(f"unknown system {unknown[0]!r}; there are {list(SYSTEMS)}.")
        absent = [name for name in self.systems if SYSTEMS[name].checkpoint not in there]
        if absent:
            raise ValueError(f"the system {absent[0]!r} needs --{SYSTEMS[absent[0]].checkpoint}.")
        self.chosen = [
            system
            for system in SYSTEMS.values()
            if (system.name in self.systems or not self.systems) and system.checkpoint in there
        ]
        if "base" not in self.checkpoints:
            self.chosen = self._without_base()
        self.paths = there
        self._open: tuple[str, SpeechLLM] | None = None

    def _without_base(self) -> list[System]:
        """The systems where the checkpoint has to stand for the text LLM that it was: said in its label."""
        logger.info("no --base: the checkpoint itself reads the transcripts, which may not be what its text LLM could")
        label = "the checkpoint itself, reads the transcript (no --base was named)"
        named = [dataclasses.replace(s, label=label) if s.name == "text_llm" else s for s in self.chosen]
        return [system for system in named if self.systems or system.name != "model_reading"]

    def llm(self, checkpoint: str) -> SpeechLLM:
        """One of the checkpoints; one is held at a time."""
        path = str(self.paths[checkpoint])
        if self._open is None or self._open[0] != path:
            self._open = None
            llm = (load_recogniser if checkpoint == "asr" else load)(path, self.dtype)
            if self.store is not None and isinstance(llm, Lsm) and llm.hears:
                self.store.check(llm.model)
            if isinstance(llm, TextLLM):
                llm.processor = text_processor(path, template_settings_of(self.paths["model"]))
            self._open = (path, llm)
        return self._open[1]

    def run(self) -> dict:
        """Ask, score and write; returns the results."""
        self._check_folder()
        rows = {task.name: read_rows(task, self.limit_of(task), self.seed) for task in self.tasks}
        asked: dict[tuple[str, str], list[dict]] = {}
        answers: dict[tuple[str, str], list[dict]] = {}
        if any(system.change == "recognised" for system in self.chosen):
            for task in self.tasks:
                self.recognise(task, rows[task.name])
        # Checkpoint by checkpoint: loading is what costs.
        for system in sorted(self.chosen, key=lambda system: str(self.paths[system.checkpoint])):
            for task in self.tasks:
                some = rows[task.name]
                if system.is_control and self.control_limit is not None:
                    some = [row for row in some if row["utterance"] < self.control_limit]
                if system.hear == "transcript" and not all(row["transcript"] for row in some):
                    logger.warning("%s has rows without a transcript, so %s is left out", task.name, system.name)
                    continue
                asked[task.name, system.name] = some
                answers[task.name, system.name] = self.ask(task, system, some)
        if not answers:
            raise ValueError("nothing could be asked: no system here can do without a transcript.")
        found = results.collect(self.tasks, self.chosen, asked, answers) | {"checkpoints": self.settings["checkpoints"]}
        to_parquet(list(self._records(asked, answers)), self.output / "predictions.parquet")
        pages.write(self.output, found, asked, answers)
        return found

    def limit_of(self, task: Task) -> int | None:
        return self.limit.get(task.name) if isinstance(self.limit, Mapping) else self.limit

    def ask(self, task: Task, system: System, rows: Sequence[dict]) -> list[dict]:
        """The answers of one system to one task, and what it was given: `asked` under each."""
        given = self.given(task, system, rows)
        # A cascade's transcription is what its ASR model heard.
        heard = [row for row in given if system.change == "recognised" and row["kind"] == TRANSCRIPTION]
        records = [
            {"id": row["id"], "response": row["transcript"], "constrained": None, "finished": True, "seconds": None}
            for row in heard
        ]
        known = {record["id"] for record in records}
        records += self.answer(task, system, [row for row in given if row["id"] not in known], system.name)
        by_id = {record["id"]: record for record in records}
        return [by_id[row["id"]] | {"asked": row["instruction"]} for row in given]

    def given(self, task: Task, system: System, rows: Sequence[dict]) -> list[dict]:
        """The rows as the system gets them."""
        if system.change == "shuffled":
            return shuffle_clips(rows)
        if system.change == "swapped":
            return swap_instructions(rows)
        return self.recognise(task, rows) if system.change == "recognised" else list(rows)

    def recognise(self, task: Task, rows: Sequence[dict]) -> list[dict]:
        """The rows with what the ASR model heard for a transcript."""
        asked = transcription_rows(rows)
        records = self.answer(task, System("asr", "ASR", "asr", "audio"), asked, "asr")
        heard = {row["utterance"]: record["response"] for row, record in zip(asked, records, strict=True)}
        return [row | {"transcript": heard[row["utterance"]] or " "} for row in rows]

    def answer(self, task: Task, system: System, rows: Sequence[dict], name: str) -> list[dict]:
        """Answers to rows as they were given; those on disk are not asked for again, and load no checkpoint."""
        file = self.output / "answers" / task.name / f"{name}.jsonl"

        def respond(some: Sequence[dict]):
            return self.respond(self.llm(system.checkpoint), system, some)

        return answer(rows, respond, file, CHUNK * self.batch_size, f"{task.name}, {name}")

    def respond(self, llm: SpeechLLM, system: System, rows: Sequence[dict]) -> tuple[list[Reply], list[str | None]]:
        """Free answers, and to closed questions those among the allowed ones."""
        settings = {"batch_size": self.batch_size, "max_new_tokens": self.max_new_tokens, "progress": False}
        store = self.store if system.hear == "audio" else None
        replies = llm.respond(rows, system.hear, store, **settings)
        constrained: list[str | None] = [None] * len(rows)
        closed = [place for place, row in enumerate(rows) if choices(row)] if self.constrained else []
        if closed:
            asked = [rows[place] for place in closed]
            among = llm.respond(asked, system.hear, store, allowed=[choices(row) for row in asked], **settings)
            for place, reply in zip(closed, among, strict=True):
                constrained[place] = reply.text
        return replies, constrained

    def _records(self, asked: dict, answers: dict):
        for (task, system), records in answers.items():
            for row, record in zip(asked[task, system], records, strict=True):
                yield {
                    "task": task,
                    "system": system,
                    "part": row["task"],
                    "instruction": record["asked"],
                    "correct": is_correct(row, record["response"]),
                    **{key: row[key] for key in ("id", "transcript", "references")},
                    **{key: record[key] for key in ("response", "constrained", "finished", "seconds")},
                }

    @cached_property
    def settings(self) -> dict:
        """What the answers depend on."""
        names = ("limit", "control_limit", "max_new_tokens", "constrained", "seed", "dtype")
        return {
            "checkpoints": {name: str(path) for name, path in self.paths.items()},
            # Of what is not to be found, the path is all that is known.
            "content": {name: content_of(path) or str(path) for name, path in self.paths.items()},
            **{name: getattr(self, name) for name in names},
        }

    def _check_folder(self) -> None:
        """Refuse a folder with the answers of other settings; systems, their checkpoints and tasks may be added.

        Raises:
            ValueError: says which settings differ.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        file = self.output / "settings.json"
        tasks = {task.name: json.loads(json.dumps(dataclasses.asdict(task), default=list)) for task in self.tasks}
        before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {**self.settings, "tasks": {}}
        now = {**self.settings, "tasks": tasks}
        for name in ("checkpoints", "content", "tasks"):
            now[name] = {**before.get(name, {}), **now[name]}
        known = before.get("content", {})  # older versions kept the paths alone
        differing = [name for name in before["checkpoints"] if known.get(name) != now["content"].get(name)]
        differing += [key for key in self.settings if key not in COMPARED_BY_NAME and before.get(key) != now[key]]
        differing += [f"task {name}" for name in tasks if before["tasks"].get(name, tasks[name]) != tasks[name]]
        if differing:
            raise ValueError(
                f"{self.output} holds answers given with another {', '.join(differing)} ({file}): delete it or name "
                "another --output."
            )
        write_whole(file, json.dumps(now, indent=1) + "\n")


def list_tasks(tasks: dict[str, Task]) -> str:
    width = max(map(len, tasks))
    return "\n".join(f"{task.group:<10} {task.name:<{width}}  {task.description}" for task in tasks.values())


def parse_overrides(entries: Sequence[str]) -> dict[str, dict[str, str]]:
    """`NAME=PATH` and `NAME.SETTING=VALUE` by task, as `tasks.override` takes them.

    Raises:
        ValueError: an entry of another form.
    """
    overrides: dict[str, dict[str, str]] = {}
    for entry in entries:
        key, equals, value = entry.partition("=")
        name, _, setting = key.partition(".")
        if not equals or not name:
            raise ValueError(f"cannot read --data {entry!r}; expected TASK=PATH or TASK.SETTING=VALUE.")
        overrides.setdefault(name, {})[setting or "corpus"] = value
    return overrides


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id of a speech LLM")
    parser.add_argument("--tasks", nargs="+", default=["nano"], help="names or groups; --list shows them")
    parser.add_argument("--output")
    parser.add_argument("--base", help="the text LLM that the model was made of")
    parser.add_argument("--vanilla", help="an LSM trained on transcription alone")
    parser.add_argument("--paper", help="an LSM trained as in the paper: the whole LLM, with cross-entropy")
    parser.add_argument("--asr", help="the cascade's ASR model (a Whisper or a speech LLM); the model by default")
    parser.add_argument("--systems", nargs="+", default=[], metavar="NAME", help=f"among {', '.join(SYSTEMS)}")
    parser.add_argument("--data", nargs="+", default=[], metavar="TASK=PATH", help="where a task's corpus is")
    parser.add_argument("--task-file", help="YAML of your own tasks, in the form of evaluation/tasks.yaml")
    parser.add_argument("--list", action="store_true", help="show all tasks and stop")
    parser.add_argument("--limit", type=int, help="utterances of a task at most")
    parser.add_argument("--control-limit", type=int, help="utterances that the controls are asked about, at most")
    parser.add_argument("--audio-feature-store", help="folder of recipes.audio_features with the audio tower's output")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--no-constrained", action="store_true", help="ask closed questions for free answers only")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    tasks = load_tasks(more=args.task_file)
    if args.list:
        sys.exit(print(list_tasks(tasks)))
    if not args.model or not args.output:
        parser.error("--model and --output are needed.")
    for name, settings in parse_overrides(args.data).items():
        tasks |= {task.name: override(task, settings) for task in choose_tasks([name], tasks)}
    checkpoints = ("model", "base", "vanilla", "paper", "asr")
    run = Evaluation(
        output=args.output,
        checkpoints={name: path for name in checkpoints if (path := getattr(args, name))},
        tasks=choose_tasks(args.tasks, tasks),
        systems=args.systems,
        limit=args.limit,
        control_limit=args.control_limit,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        constrained=not args.no_constrained,
        seed=args.seed,
        dtype=args.dtype,
        store=AudioFeatureStore(args.audio_feature_store) if args.audio_feature_store else None,
    )
    found = run.run()
    print(tables.markdown(found))


if __name__ == "__main__":
    main()
