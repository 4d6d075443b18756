"""The stages of the quickstart, from the corpus to the report. Each stage writes a folder, atomically."""

import dataclasses
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import datasets
import torch
from datasets import Dataset
from tqdm import tqdm

from dataset_builders.building import build
from dataset_builders.corpora.opening import load_corpus, open_corpus
from dataset_builders.files import content_of, differences, read_lines, read_yaml, whole, write_whole
from dataset_builders.instructions import SELF_POWERED_TASKS, TRANSCRIPTION, Draw, load_pool
from dataset_builders.nano import speech as nano_speech
from dataset_builders.nano.tasks import UNSEEN_TASKS
from dataset_builders.responders.local import LocalResponder
from recipes.bias.analysis import analyze, behave, write
from recipes.evaluation.evaluation import Evaluation
from recipes.evaluation.pages import playable
from recipes.evaluation.questions import read_rows
from recipes.evaluation.tasks import load_tasks, override
from recipes.listening.composing import compose
from recipes.listening.features import AudioFeatureStore
from recipes.listening.speech_llm import load
from recipes.nano.report import COMPARED, NAMES, SHORT, scores_of, write_report
from recipes.reporting.markdown import percent
from recipes.studies.stages import die_with_parent
from recipes.training.alignment import FOLDER as ALIGNMENT
from recipes.training.callbacks import FOLLOWING, LOG

logger = logging.getLogger(__name__)

CONFIGS = Path(__file__).parents[1] / "configs"
CHECKER = "dataset_builders.nano.tasks"
MODELS = ("self_powered", "paper", "vanilla")  # the longest training is first
TRACED = {"text_llm": "base", **{name: f"training/{name}" for name in reversed(MODELS)}}
NEEDED_BYTES = 4 * 2**30


class Stages:
    """Makes folders atomically, and writes the seconds that each took to `stages.json`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.file = folder / "stages.json"
        self.seconds: dict[str, float] = json.loads(self.file.read_text()) if self.file.exists() else {}

    def run(self, name: str, make: Callable[[Path], object], resume: bool = False) -> Path:
        """Return `folder/name`, which `make(partial)` makes if it does not exist. With `resume`, `make` continues with
        the files of an interrupted run; otherwise they are deleted."""
        target = self.folder / name
        if target.exists() and name in self.seconds:
            logger.info("%-14s done before", name)
            return target
        shutil.rmtree(target, ignore_errors=True)
        logger.info("%-14s ...", name)
        start = time.monotonic()
        with whole(target, resume=resume) as partial:
            make(partial)
        self.seconds[name] = round(time.monotonic() - start, 1)
        write_whole(self.file, json.dumps(self.seconds))
        logger.info("%-14s %.0f s", name, self.seconds[name])
        return target


@dataclasses.dataclass
class Quickstart:
    """One run of the quickstart."""

    folder: Path  # for all outputs
    settings: dict  # as in `recipes/configs/quickstart.yaml`
    seed: int  # of all draws and initial weights
    steps: int | None = None  # of each training, instead of those in its configuration

    def __post_init__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        self.stages = Stages(self.folder)

    def run(self) -> dict:
        """Run all stages in order, and return the report."""
        self.stages.run("corpus", self.speak)
        self.stages.run("base", self.compose)
        self.stages.run("plain_base", lambda folder: self.compose(folder, pieces_per_token=0))
        self.stages.run("self_powered", self.answer)
        self.stages.run("features", self.encode)
        self.stages.run("training", self.train, resume=True)
        self.stages.run("predictions", self.evaluate)
        self.stages.run("bias", self.trace)
        trained = self.folder / "training" / "self_powered"
        ignore = shutil.ignore_patterns("checkpoint-*")
        self.stages.run("checkpoint", lambda folder: shutil.copytree(trained, folder, ignore=ignore))
        return self.report()

    def speak(self, folder: Path) -> None:
        sizes = {split: self.settings[f"{split}_clips"] for split in ("train", "validation", "test")}
        nano_speech.build(folder, sizes, self.seed, num_proc=os.cpu_count() or 1)

    def compose(self, folder: Path, **settings) -> None:
        shape = {key: self.settings[key] for key in ("window_frames", "qformer_hidden", "qformer_heads")}
        compose(self.settings["audio"], self.settings["text"], str(folder), seed=self.seed, **shape, **settings)

    def answer(self, folder: Path) -> None:
        corpus = open_corpus(self.folder / "corpus", "train")
        responder = LocalResponder(self.folder / "base", self.settings["max_new_tokens"])
        weights = {**dict.fromkeys(SELF_POWERED_TASKS, 1.0), TRANSCRIPTION: math.inf}
        build(corpus, responder, folder, Draw(load_pool(self.settings["pool"]), weights, 2, self.seed))

    def encode(self, folder: Path) -> None:
        llm = load(self.folder / "base")
        corpora = [load_corpus(self.folder / "corpus", split) for split in ("train", "validation", "test")]
        audio = (row["audio"] for corpus in corpora for row in corpus)
        AudioFeatureStore.build(folder, llm.model, llm.processor, audio)

    def train(self, folder: Path) -> None:
        """Run the trainings, one per core at the same time, and show their progress."""
        cores = os.cpu_count() or 1
        environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, cores // len(MODELS)))}
        folder.mkdir(parents=True, exist_ok=True)

        def start(name: str) -> subprocess.Popen:
            command = self.training_command(name, folder / name)
            with open(folder / f"{name}.log", "w", encoding="utf-8") as log:
                return subprocess.Popen(
                    command, stdout=log, stderr=subprocess.STDOUT, env=environment, preexec_fn=die_with_parent
                )

        steps = {name: sum(self.steps_of(name).values()) for name in MODELS}
        run_trainings(start, cores, LiveTable(folder, steps))

    def steps_of(self, name: str) -> dict[str, int]:
        """Return `max_steps` of a training and, if it begins with an alignment, `align_steps`."""
        config = read_yaml(CONFIGS / f"nano_{name}.yaml")
        return {key: self.steps or config[key] for key in ("max_steps", "align_steps") if config[key]}

    def training_command(self, name: str, output: Path) -> list[str]:
        options = {
            "config": CONFIGS / f"nano_{name}.yaml",
            # The paper's projector has no reader of word pieces.
            "model_name_or_path": self.folder / ("base" if name == "self_powered" else "plain_base"),
            "dataset_name": self.folder / "self_powered",
            "output_dir": output,
            "audio_feature_store": self.folder / "features",
            "following_corpus": self.folder / "corpus",
            "following_limit": self.settings["validation_clips"],
            "following_steps": self.settings["following_steps"],
            "pool": self.settings["pool"],
            "checker": CHECKER,
            "seed": self.seed,
            "use_cpu": not torch.cuda.is_available(),
            **self.steps_of(name),
        }
        flags = [part for key, value in options.items() for part in (f"--{key}", str(value))]
        return [sys.executable, "-m", "recipes.sft", *flags]

    def tasks(self) -> list:
        """Return the nano tasks of `recipes.evaluate`, about the corpus of this run."""
        corpus = {"corpus": str(self.folder / "corpus"), "split": "test"}
        return [override(load_tasks()[name], corpus) for name in ("nano", "nano_unseen")]

    def evaluate(self, folder: Path) -> None:
        """Evaluate the LSMs, the text LLM, a cascade, the self-powered LSM that reads text, and the controls."""
        Evaluation(
            output=folder,
            checkpoints={
                "model": str(self.folder / "training" / "self_powered"),
                **{name: str(self.folder / "training" / name) for name in ("vanilla", "paper")},
                "base": str(self.folder / "base"),
            },
            tasks=self.tasks(),
            limit={"nano": self.settings["test_clips"], "nano_unseen": self.settings["unseen_clips"]},
            control_limit=self.settings["control_clips"],
            batch_size=128,
            max_new_tokens=self.settings["max_new_tokens"],
            constrained=False,
            seed=self.seed,
            store=AudioFeatureStore(self.folder / "features"),
        ).run()

    def trace(self, folder: Path) -> None:
        """Measure the saliency of the text LLM's answers, in the text LLM and in all LSMs."""
        store, answers = AudioFeatureStore(self.folder / "features"), self.answers()
        questions = read_rows(self.tasks()[0], self.settings["test_clips"], self.seed)
        rows = [question.as_row() for question in questions]
        traced = [
            row | {"response": answers["text_llm", row["id"]]["response"]}
            for row in rows
            if row["task"] != TRANSCRIPTION
            and row["utterance"] < self.settings["bias_clips"]
            and answers["text_llm", row["id"]]["response"].strip()
        ]
        biases: dict[str, dict] = {}
        for name, path in TRACED.items():
            llm, slot = load(self.folder / path), "transcript" if name == "text_llm" else "audio"
            compare = None if name == "self_powered" else False  # the report shows the similarity of one model
            bias = analyze(llm, traced, slot, store if slot == "audio" else None, compare=compare)
            asked = [row for row in rows if (name, row["id"]) in answers]
            responses = [answers[name, row["id"]]["response"] for row in asked]
            facts = {"model": path, "data": "corpus", "source": rows[0]["source"], "hear": slot, "target": "response"}
            biases[SHORT[name]] = bias | behave(asked, responses, CHECKER) | facts
            write(folder / name, biases[SHORT[name]], SHORT[name], dict(list(biases.items())[:-1]))

    def answers(self) -> dict[tuple[str, str], dict]:
        """Return the records of all answers, by model and row."""
        records = Dataset.from_parquet(str(self.folder / "predictions" / "predictions.parquet"))
        return {(NAMES.get(record["system"], record["system"]), record["id"]): record for record in records}

    def report(self) -> dict:
        """Write `report.json`, `report.md`, `report.html`, figures, `predictions.parquet` and `example.wav`, and return
        the report."""
        results = json.loads((self.folder / "predictions" / "results.json").read_text(encoding="utf-8"))
        report, unseen = (
            {NAMES.get(name, name): scores_of(scored) for name, scored in results["tasks"][task]["systems"].items()}
            for task in ("nano", "nano_unseen")
        )
        report["unseen"] = {name: unseen[name]["right"] for name in COMPARED}
        report["unseen_tasks"] = unseen
        records = [
            {key: record[key] for key in ("id", "instruction", "transcript", "response", "correct")}
            | {"model": name, "task": record["part"]}
            for (name, _), record in self.answers().items()
        ]
        Dataset.from_list(records).to_parquet(str(self.folder / "predictions.parquet"))
        training = self.folder / "training"
        report["steps"] = {name: read_lines(training / name / LOG)[-1]["step"] for name in MODELS}
        report["steps"]["alignment"] = read_lines(training / "self_powered" / ALIGNMENT / LOG)[-1]["step"]
        asked = Counter(record["task"] for record in records if record["model"] == "self_powered")
        report["rows"] = sum(asked[task] for task in SELF_POWERED_TASKS)
        report["unseen_rows"] = sum(asked[task] for task in UNSEEN_TASKS)
        report["stages"] = dict(self.stages.seconds)
        report["seconds"] = round(sum(self.stages.seconds.values()), 1)
        report["seed"] = self.seed
        biases = {name: json.loads((self.folder / "bias" / name / "bias.json").read_text()) for name in TRACED}
        write_report(self.folder, report, records, results, biases)
        clip = load_corpus(self.folder / "corpus", "test", limit=1)[0]["audio"]
        (self.folder / "example.wav").write_bytes(playable(clip))
        return report


class LiveTable:
    """Shows progress bars of the trainings, and a line of scores after each evaluation on the validation clips. Each
    training has a subfolder with its name; its `steps` include those of its alignment."""

    def __init__(self, folder: Path, steps: dict[str, int]):
        self.folder = folder
        self.bars = {
            name: tqdm(desc=name, position=row, unit="step", total=total)
            for row, (name, total) in enumerate(steps.items())
        }
        self.shown: Counter[str] = Counter()

    def show(self) -> None:
        """Update the bars, and write the new scores."""
        for name, bar in self.bars.items():
            alignment, training = (read_lines(self.folder / name / part / LOG) for part in (ALIGNMENT, ""))
            bar.update(sum(log[-1]["step"] for log in (alignment, training) if log) - bar.n)
            scores = [row for row in alignment if "reading_wer" in row] + read_lines(self.folder / name / FOLLOWING)
            for row in scores[self.shown[name] :]:
                keys = [key for key in ("reading_wer", "following", "transcript_copy", "wer") if key in row]
                stage = f"{name}, alignment" if "reading_wer" in row else name
                figures = "  ".join(f"{key} {percent(row[key]):>7}" for key in keys)
                bar.write(f"step {row['step']:>5}  {stage:<24} {figures}")
            self.shown[name] = len(scores)

    def close(self) -> None:
        for bar in self.bars.values():
            bar.close()


def run_trainings(start: Callable[[str], subprocess.Popen], at_once: int, live: LiveTable) -> None:
    """Run the trainings of the table in its order, `at_once` at the same time.

    Raises:
        RuntimeError: a training failed. Shows the end of its log.
    """
    waiting, processes = list(live.bars), {}
    try:
        while True:
            running = [name for name, process in processes.items() if process.poll() is None]
            while waiting and len(running) < at_once:
                running.append(waiting.pop(0))
                processes[running[-1]] = start(running[-1])
            live.show()
            for name, process in processes.items():
                if process.returncode not in (None, 0):
                    file = live.folder / f"{name}.log"
                    log = file.read_text(encoding="utf-8", errors="replace")
                    raise RuntimeError(f"training {name} failed (exit {process.returncode}, {file}):\n{log[-3000:]}")
            if not running:
                return
            time.sleep(1)
    finally:
        for process in processes.values():
            process.kill()
        live.close()


def keep_caches_in(folder: Path) -> None:
    """Keep the caches of `datasets` in this folder instead of the user's home, also for the training processes."""
    datasets.config.HF_DATASETS_CACHE = str(folder)
    os.environ["HF_DATASETS_CACHE"] = str(folder)


def contents(settings: dict) -> dict[str, str | None]:
    """Return fingerprints of the models and configurations of a run."""
    sources = {name: settings[name] for name in ("audio", "text", "pool")}
    sources |= {name: CONFIGS / f"nano_{name}.yaml" for name in MODELS}
    return {name: content_of(source) for name, source in sources.items()}


def check_folder(folder: Path, identity: dict) -> None:
    """Write the settings and fingerprints of a run to its folder, or compare them with those that are there.

    Raises:
        ValueError: the folder holds a run with other settings.
        OSError: the disk has too little space.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "settings.json"
    if not file.exists():
        if (free := shutil.disk_usage(folder).free) < NEEDED_BYTES:
            raise OSError(
                f"{folder} has {free / 2**30:.1f} GiB free, but the quickstart needs {NEEDED_BYTES / 2**30:.0f} GiB; "
                "free some space or name another --output."
            )
        write_whole(file, json.dumps(identity, indent=2))
    elif differing := differences(json.loads(file.read_text(encoding="utf-8")), identity):
        raise ValueError(
            f"{folder} holds a run with other settings ({file}: {', '.join(differing)}); delete it or name another "
            "--output."
        )
