"""Callbacks of a training: the log as JSON lines, and the following rate on held-out instructions."""

from pathlib import Path

from transformers import TrainerCallback

from dataset_builders.corpora.opening import load_corpus
from dataset_builders.files import append_lines, read_lines, whole
from dataset_builders.instructions import SELF_POWERED_TASKS, digest_of, load_pool
from recipes.evaluation.following import held_out_rows, load_checker, score_following
from recipes.listening.features import AudioFeatureStore
from recipes.listening.speech_llm import Lsm
from recipes.training.arguments import LsmScriptArguments

LOG, FOLLOWING = "log.jsonl", "following.jsonl"


def rewind(file: Path, step: int) -> None:
    """Remove the records of steps after `step` from a log, because a resumed training repeats these steps."""
    if file.is_file():
        kept = [record for record in read_lines(file) if record["step"] <= step]
        with whole(file) as partial:
            append_lines(partial, kept)


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
            append_lines(Path(args.output_dir) / LOG, [record])


class FollowingCallback(TrainerCallback):
    """Lets the model answer held-out instructions every few steps, which `args` name with the corpus and the pool.

    The scores and a hash of the instruction pool are appended to `following.jsonl`, and the scores are also in the next
    log of the trainer.
    """

    def __init__(self, trainer, args: LsmScriptArguments, processor, store: AudioFeatureStore | None):
        corpus = load_corpus(args.following_corpus, args.following_split, limit=args.following_limit)
        pool = load_pool(args.pool)
        self.rows, self.pool = held_out_rows(corpus, SELF_POWERED_TASKS, pool=pool), digest_of(pool)
        self.checker = load_checker(args.checker)
        self.trainer, self.processor, self.store, self.every = trainer, processor, store, args.following_steps

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every and state.global_step != state.max_steps:
            return
        # Every process answers all rows, because no process can answer alone if the weights are sharded.
        replies = Lsm(model, self.processor).respond(self.rows, store=self.store, progress=False)
        model.train()
        scores = score_following(self.rows, [reply.text for reply in replies], self.checker)
        for name in scores.keys() - {"tasks"}:
            self.trainer._metrics["train"][name] = [scores[name]]
        if state.is_world_process_zero:
            append_lines(Path(args.output_dir) / FOLLOWING, [{"step": state.global_step, "pool": self.pool, **scores}])
