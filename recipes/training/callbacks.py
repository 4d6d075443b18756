"""Callbacks of a training: the log as JSON lines, and the following rate on held-out instructions."""

import json
from pathlib import Path

from transformers import TrainerCallback

from dataset_builders.corpora.opening import load_corpus
from dataset_builders.instructions import SELF_POWERED_TASKS
from recipes.evaluation.following import held_out_rows, load_checker, score
from recipes.listening.features import AudioFeatureStore
from recipes.listening.speech_llm import Lsm
from recipes.training.arguments import LsmScriptArguments

LOG, FOLLOWING = "log.jsonl", "following.jsonl"


def read_lines(file: Path) -> list[dict]:
    """Return the records of a file of JSON lines; an empty list if the file does not exist."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def append_line(file: Path, record: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a", encoding="utf-8") as lines:
        lines.write(json.dumps(record) + "\n")


def rewind(file: Path, step: int) -> None:
    """Remove the records of steps after `step`, because a resumed training repeats these steps."""
    lines = [json.dumps(record) + "\n" for record in read_lines(file) if record["step"] <= step]
    if file.is_file():
        file.write_text("".join(lines), encoding="utf-8")


class LogCallback(TrainerCallback):
    """Appends what the trainer logs (loss, learning rate, throughput, ...) to `log.jsonl`."""

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            for name in (LOG, FOLLOWING):
                rewind(Path(args.output_dir) / name, state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        # A resumed training averages the loss from its checkpoint on, so an uninterrupted one logs at each checkpoint.
        control.should_log |= control.should_save
        return control

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            record = {"step": state.global_step, "max_steps": state.max_steps, **(logs or {})}
            append_line(Path(args.output_dir) / LOG, record)


class FollowingCallback(TrainerCallback):
    """Lets the model answer held-out instructions every few steps. The scores go to `following.jsonl` and to the
    trainer's next log.

    Args:
        trainer: the trainer.
        args: the arguments with the corpus and the number of steps.
        processor: the LSM's processor.
        store: store of the corpus's features, if there is one.
    """

    def __init__(self, trainer, args: LsmScriptArguments, processor, store: AudioFeatureStore | None):
        corpus = load_corpus(args.following_corpus, args.following_split, limit=args.following_limit)
        self.rows = held_out_rows(corpus, SELF_POWERED_TASKS)
        self.checker = load_checker(args.checker)
        self.trainer, self.processor, self.store, self.every = trainer, processor, store, args.following_steps

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every and state.global_step != state.max_steps:
            return
        # Every process answers all rows, because no process can answer alone if the weights are sharded.
        replies = Lsm(model, self.processor).respond(self.rows, store=self.store, progress=False)
        model.train()
        scores = score(self.rows, [reply.text for reply in replies], self.checker)
        for name in scores.keys() - {"tasks"}:
            self.trainer._metrics["train"][name] = [scores[name]]
        if state.is_world_process_zero:
            append_line(Path(args.output_dir) / FOLLOWING, {"step": state.global_step, **scores})
