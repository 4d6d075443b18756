"""Run an evaluation: ask several systems the questions of the tasks, score the answers, and write all to a folder."""

import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from dataset_builders.files import content_of, write_whole
from dataset_builders.instructions import TRANSCRIPTION, Task, digest_of, load_pool
from dataset_builders.responders.exchange import Reply
from language_models.tokenizers import text_processor
from recipes.evaluation import pages
from recipes.evaluation.answers import Likelihoods, Replies, answer, to_parquet
from recipes.evaluation.kinds import allowed_answers
from recipes.evaluation.questions import read_rows
from recipes.evaluation.results import SystemResult, collect
from recipes.evaluation.rows import Answer, Question
from recipes.evaluation.systems import SYSTEMS, System, shuffle_clips, swap_instructions, transcription_rows
from recipes.evaluation.tasks import EvaluationTask
from recipes.listening.features import AudioFeatureStore
from recipes.listening.speech_llm import Lsm, SpeechLLM, TextLLM, is_url, load, template_settings_of
from recipes.listening.transcriber import Transcriber, load_recogniser

logger = logging.getLogger(__name__)

COMPARED_BY_NAME = ("checkpoints", "content")  # settings that are compared checkpoint by checkpoint
CHUNK = 4  # batches between two writes
JUDGE_TOKENS = 1024  # of a reply, as in VoiceBench; a judge may think before it answers


@dataclasses.dataclass
class Evaluation:
    """An evaluation of several systems on several tasks, with its own folder.

    Args:
        output: folder of the evaluation.
        checkpoints: folders, Hub ids or URLs of servers by name: `model`, and optionally `base`, `vanilla`, `paper` and
            `asr`.
        tasks: the tasks whose questions are asked.
        systems: names of the systems that answer; by default all that have a checkpoint.
        limit: largest number of utterances per task, for all tasks or by task name.
        control_limit: largest number of utterances per task for the controls.
        batch_size: number of questions that are answered together.
        max_new_tokens: largest number of tokens of an answer.
        constrained: whether closed questions are also answered with only the allowed answers possible.
        seed: seed of everything that is drawn.
        dtype: data type of the models; `"auto"` is that of each checkpoint.
        store: stored audio features of the LSM.
        endpoint: settings of [`ServedLLM`] for checkpoints that are URLs of servers.
        judge: `url` and, if the server has several models, `name` of the LLM that judges the answers to judged tasks.

    Raises:
        ValueError: a system is unknown or has no checkpoint, a task needs a judge, or `control_limit` is below 1.
    """

    output: Path
    checkpoints: dict[str, str]
    tasks: Sequence[EvaluationTask]
    systems: Sequence[str] = ()
    limit: int | Mapping[str, int] | None = None
    control_limit: int | None = None
    batch_size: int = 16
    max_new_tokens: int = 128
    constrained: bool = True
    seed: int = 0
    dtype: str = "auto"
    store: AudioFeatureStore | None = None
    endpoint: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    judge: Mapping[str, Any] | None = None

    def __post_init__(self):
        self.output = Path(self.output)
        paths = {"base": self.checkpoints["model"], "asr": self.checkpoints["model"], **self.checkpoints}
        if self.control_limit is not None and self.control_limit < 1:
            raise ValueError(f"control_limit is {self.control_limit}; expected 1 or more, or other --systems.")
        if unknown := sorted(set(self.systems) - set(SYSTEMS)):
            raise ValueError(f"unknown system {unknown[0]!r}; there are {list(SYSTEMS)}.")
        if absent := [name for name in self.systems if SYSTEMS[name].checkpoint not in paths]:
            raise ValueError(f"the system {absent[0]!r} needs --{SYSTEMS[absent[0]].checkpoint}.")
        judged = [task.name for task in self.tasks if task.judge is not None]
        if judged and self.judge is None:
            raise ValueError(
                f"an LLM judges the answers to {', '.join(judged)}: name an OpenAI-compatible server with --judge URL, "
                "or leave these tasks out."
            )
        wanted = self.systems or SYSTEMS
        self.chosen = [system for name, system in SYSTEMS.items() if name in wanted and system.checkpoint in paths]
        if "base" not in self.checkpoints:
            self.chosen = self._without_base()
        self.paths = paths
        self._pools: dict[str | None, dict[str, Task]] = {}
        self._open: tuple[str, SpeechLLM | Transcriber] | None = None

    def _without_base(self) -> list[System]:
        """Return the systems for an evaluation without `base`, in which the model itself is the text LLM. The label of
        the text LLM says so."""
        logger.info(
            "no --base: the checkpoint itself reads the transcripts; its answers may differ from its text LLM's before "
            "the training"
        )
        label = "the checkpoint itself, reads the transcript (no --base was named)"
        named = [dataclasses.replace(s, label=label) if s.name == "text_llm" else s for s in self.chosen]
        return [system for system in named if self.systems or system.name != "model_reading"]

    def llm(self, checkpoint: str) -> SpeechLLM | Transcriber:
        """Load a checkpoint and return it. Only the last one stays in memory."""
        path = str(self.paths[checkpoint])
        if self._open is None or self._open[0] != path:
            self._open = None
            if is_url(path):
                self._open = (path, _served(path, self.endpoint))
                return self._open[1]
            llm = (load_recogniser if checkpoint == "asr" else load)(path, self.dtype)
            if self.store is not None and isinstance(llm, Lsm) and llm.hears:
                self.store.check(llm.model)
            if isinstance(llm, TextLLM):
                model = self.paths["model"]
                llm.processor = text_processor(path, None if is_url(model) else template_settings_of(model))
            self._open = (path, llm)
        return self._open[1]

    def run(self) -> dict:
        """Ask the questions, score the answers and write the report. Returns the results.

        Raises:
            ValueError: the folder holds answers with other settings, no system could be asked, or the judge refuses.
            ConnectionError: the judge cannot be reached.
        """
        judge = self.judge_llm if any(task.judge for task in self.tasks) else None  # before anybody answers
        self._check_folder()
        limits = self.limit if isinstance(self.limit, Mapping) else {task.name: self.limit for task in self.tasks}
        rows = {task.name: read_rows(task, limits.get(task.name), self.seed, self.pool_of(task)) for task in self.tasks}
        results: dict[tuple[str, str], SystemResult] = {}
        if any(system.change == "recognised" for system in self.chosen):
            for task in self.tasks:
                self.recognise(task, rows[task.name])
        for system in self._in_order():
            for task in self.tasks:
                questions = rows[task.name]
                if system.is_control and self.control_limit is not None:
                    questions = [row for row in questions if row.utterance < self.control_limit]
                reads = system.slot == "transcript" and system.change != "recognised"
                if reads and not all(row.transcript for row in questions):
                    logger.warning("%s has rows without a transcript, so %s is left out", task.name, system.name)
                    continue
                results[task.name, system.name] = result = self.ask(task, system, questions)
                if system.name == "text_llm":  # the other systems are compared with it
                    pairs = zip(questions, result.responses, strict=True)
                    rows[task.name] = [dataclasses.replace(row, text_response=response) for row, response in pairs]
        if not results:
            raise ValueError("no system could be asked, because all of them need transcripts.")
        report = collect(self.tasks, self.chosen, results) | {"checkpoints": self.settings["checkpoints"]}
        report |= {"judge": {"model": judge.name, "url": judge.url}} if judge else {}
        report["limits"] = {task.name: limit for task in self.tasks if (limit := limits.get(task.name)) is not None}
        to_parquet(list(_predictions(results)), self.output / "predictions.parquet")
        pages.write(self.output, report, results)
        return report

    def _in_order(self) -> list[System]:
        """Return the systems sorted by checkpoint, because loading is slow, with the text LLM first."""
        base = self.paths["base"]

        def place(system: System) -> tuple[bool, str, bool]:
            path = self.paths[system.checkpoint]
            return path != base, str(path), system.name != "text_llm"

        return sorted(self.chosen, key=place)

    def pool_of(self, task: EvaluationTask) -> dict[str, Task]:
        """Return the instruction pool of a task, which is read only once."""
        if task.pool not in self._pools:
            self._pools[task.pool] = load_pool(task.pool)
        return self._pools[task.pool]

    def ask(self, task: EvaluationTask, system: System, rows: Sequence[Question]) -> SystemResult:
        """Return the answers of a system to the questions of a task."""
        changed = self.given(task, system, rows)
        # A cascade answers transcription questions with the transcript of its ASR model.
        recognised = [row for row in changed if system.change == "recognised" and row.kind == TRANSCRIPTION]
        by_id = {row.id: Answer(row.id, row.transcript) for row in recognised}
        answers = self.answer(task, system, [row for row in changed if row.id not in by_id], system.name)
        by_id |= {answer.id: answer for answer in answers}
        answers = [by_id[row.id] for row in changed]
        return SystemResult(rows, changed, self.judged(task, system, rows, answers) if task.judge else answers)

    @cached_property
    def judge_llm(self) -> Any:
        settings = {"option": "--judge-model", "key": "JUDGE_API_KEY"}  # no server gets the key of another
        return _served(self.judge["url"], {"name": self.judge.get("name"), **settings})

    def judged(
        self, task: EvaluationTask, system: System, rows: Sequence[Question], answers: Sequence[Answer]
    ) -> list[Answer]:
        """Return the answers with the judge's replies. Replies on disk are reused if the same judge gave them to the
        same question and answer."""
        judge, asked = self.judge_llm, []
        name = f"{judge.url} {judge.name}"  # a part of the question, so that another judge is asked anew
        for row, given in zip(rows, answers, strict=True):
            slots = {"instruction": row.instruction, "transcript": row.transcript, "response": given.response}
            question = task.judge.format(**slots, reference=" or ".join(row.references))
            asked.append(dataclasses.replace(row, instruction=question, transcript="", source=name))

        def respond(batch: Sequence[Question]) -> Replies:
            settings = {"max_new_tokens": JUDGE_TOKENS, "progress": False}
            return judge.respond([row.as_row() for row in batch], "transcript", **settings), [None] * len(batch)

        file = self.output / "judgements" / task.name / f"{system.name}.jsonl"
        replies = answer(asked, respond, file, CHUNK * self.batch_size, f"{task.name}, judge of {system.name}")
        pairs = zip(answers, replies, strict=True)
        return [dataclasses.replace(given, judgement=reply.response) for given, reply in pairs]

    def given(self, task: EvaluationTask, system: System, rows: Sequence[Question]) -> list[Question]:
        """Return the rows with the system's changes: other clips, instructions or transcripts."""
        if system.change == "shuffled":
            return shuffle_clips(rows)
        if system.change == "swapped":
            return swap_instructions(rows, self.pool_of(task))
        return self.recognise(task, rows) if system.change == "recognised" else list(rows)

    def recognise(self, task: EvaluationTask, rows: Sequence[Question]) -> list[Question]:
        """Return the rows with the transcripts of the ASR model."""
        asked = transcription_rows(rows, self.pool_of(task))
        answers = self.answer(task, System("asr", "ASR", "asr", "audio"), asked, "asr")
        transcripts = {row.utterance: answer.response for row, answer in zip(asked, answers, strict=True)}
        return [dataclasses.replace(row, transcript=transcripts[row.utterance] or " ") for row in rows]

    def answer(self, task: EvaluationTask, system: System, rows: Sequence[Question], name: str) -> list[Answer]:
        """Return the answers to the rows. Answers on disk are reused, and if all are there, no checkpoint is loaded."""
        file = self.output / "answers" / task.name / f"{name}.jsonl"

        def respond(batch: Sequence[Question]):
            return self.respond(self.llm(system.checkpoint), system, batch)

        def measure(batch: Sequence[Question], replies: list[Reply]):
            return self.measure(self.llm(system.checkpoint), system, batch, replies)

        return answer(rows, respond, file, CHUNK * self.batch_size, f"{task.name}, {name}", measure)

    def respond(self, llm: SpeechLLM | Transcriber, system: System, rows: Sequence[Question]) -> Replies:
        """Return the free answers to all questions, and the constrained answers to closed questions."""
        settings = {"batch_size": self.batch_size, "max_new_tokens": self.max_new_tokens, "progress": False}
        store = self.store if system.slot == "audio" else None
        replies = llm.respond([row.as_row() for row in rows], system.slot, store, **settings)
        constrained: list[str | None] = [None] * len(rows)
        allowed = {place: answers for place, row in enumerate(rows) if (answers := allowed_answers(row))}
        if allowed and self.constrained and not is_url(self.paths[system.checkpoint]):
            asked = [rows[place].as_row() for place in allowed]
            choices = llm.respond(asked, system.slot, store, allowed=list(allowed.values()), **settings)
            for place, reply in zip(allowed, choices, strict=True):
                constrained[place] = reply.text
        return replies, constrained

    def measure(
        self, llm: SpeechLLM | Transcriber, system: System, rows: Sequence[Question], replies: list[Reply]
    ) -> Likelihoods:
        """Return the log-likelihoods of the text LLM's answers; `replies` are these answers if it is the system."""
        text_responses = [
            reply.text if system.name == "text_llm" else row.text_response
            for row, reply in zip(rows, replies, strict=True)
        ]
        asked = [row.as_row() | {"response": text} for row, text in zip(rows, text_responses, strict=True) if text]
        if not asked or isinstance(llm, Transcriber) or is_url(self.paths[system.checkpoint]):
            return [(None, None)] * len(rows)
        store = self.store if system.slot == "audio" else None
        values = iter(llm.log_likelihoods(asked, system.slot, store, self.batch_size))
        return [next(values) if text else (None, None) for text in text_responses]

    @cached_property
    def settings(self) -> dict:
        """Return the settings that the answers depend on."""
        names = ("limit", "control_limit", "max_new_tokens", "constrained", "seed", "dtype")
        return {
            "checkpoints": {name: str(path) for name, path in self.paths.items()},
            # A checkpoint whose content cannot be read is identified by its path.
            "content": {name: content_of(path) or str(path) for name, path in self.paths.items()},
            **{name: getattr(self, name) for name in names},
            **({"endpoint": dict(self.endpoint)} if any(map(is_url, self.paths.values())) else {}),
        }

    def _check_folder(self) -> None:
        """Check that the answers in the folder have the same settings, and write the settings. Systems, their
        checkpoints and tasks may be added.

        Raises:
            ValueError: some settings differ; the message names them.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        file = self.output / "settings.json"
        tasks = {task.name: json.loads(json.dumps(dataclasses.asdict(task), default=list)) for task in self.tasks}
        for task in self.tasks:  # the content of a pool matters, not its path
            tasks[task.name]["pool"] = digest_of(self.pool_of(task))
        before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {**self.settings, "tasks": {}}
        now = {**self.settings, "tasks": tasks}
        for name in ("checkpoints", "content", "tasks"):
            now[name] = {**before.get(name, {}), **now[name]}
        content_before = before.get("content", {})  # older versions wrote only the paths
        differing = [name for name in before["checkpoints"] if content_before.get(name) != now["content"].get(name)]
        differing += [key for key in self.settings if key not in COMPARED_BY_NAME and before.get(key) != now[key]]
        differing += [f"task {name}" for name in tasks if before["tasks"].get(name, tasks[name]) != tasks[name]]
        if differing:
            raise ValueError(
                f"{self.output} holds answers with another {', '.join(differing)} ({file}): delete it or name another "
                "--output."
            )
        write_whole(file, json.dumps(now, indent=1) + "\n")


def _served(url: str, settings: Mapping[str, Any]) -> Any:
    from recipes.listening.served_llm import ServedLLM  # only this needs the extra `server`

    return ServedLLM(url, **settings)


def _predictions(results: Mapping[tuple[str, str], SystemResult]) -> Iterator[dict]:
    """Yield the rows of `predictions.parquet`."""
    for (task, system), result in results.items():
        for row, given, answered, hit in zip(result.questions, result.given, result.answers, result.hits, strict=True):
            asked = {"part": row.task, "transcript": row.transcript, "references": row.references}
            asked |= {"task": task, "system": system, "instruction": given.instruction}
            yield asked | vars(answered) | {"correct": hit}
