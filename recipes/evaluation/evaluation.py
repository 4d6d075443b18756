"""One evaluation: tasks are asked of several systems, the answers are scored and written to a folder."""

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from dataset_builders.files import content_of, write_whole
from dataset_builders.instructions import TRANSCRIPTION, digest_of, load_pool
from dataset_builders.instructions import Task as PoolTask
from dataset_builders.responders.exchange import Reply
from language_models.tokenizers import text_processor
from recipes.evaluation import pages, results
from recipes.evaluation.answers import answer, to_parquet
from recipes.evaluation.questions import read_rows
from recipes.evaluation.scoring import choices, is_correct
from recipes.evaluation.systems import SYSTEMS, System, shuffle_clips, swap_instructions, transcription_rows
from recipes.evaluation.tasks import Task
from recipes.listening.features import AudioFeatureStore
from recipes.listening.speech_llm import Lsm, SpeechLLM, TextLLM, load, template_settings_of
from recipes.listening.transcriber import load_recogniser

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
        self._pools: dict[str | None, dict[str, PoolTask]] = {}
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
        rows = {task.name: read_rows(task, self.limit_of(task), self.seed, self.pool_of(task)) for task in self.tasks}
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

    def pool_of(self, task: Task) -> dict[str, PoolTask]:
        """The instruction pool of a task, read once."""
        if task.pool not in self._pools:
            self._pools[task.pool] = load_pool(task.pool)
        return self._pools[task.pool]

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
            return swap_instructions(rows, self.pool_of(task))
        return self.recognise(task, rows) if system.change == "recognised" else list(rows)

    def recognise(self, task: Task, rows: Sequence[dict]) -> list[dict]:
        """The rows with what the ASR model heard for a transcript."""
        asked = transcription_rows(rows, self.pool_of(task))
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
        for task in self.tasks:  # where a pool lies says nothing about its wordings
            tasks[task.name]["pool"] = digest_of(self.pool_of(task))
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
