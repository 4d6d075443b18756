"""What is seen while a training goes on: the log as lines of JSON, and whether the model does what it is told."""

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
    """Forget what was written of the steps after `step`, which come again."""
    if file.is_file():
        kept = [record for record in read_lines(file) if record["step"] <= step]
        with whole(file) as partial:
            append_lines(partial, kept)


class LogCallback(TrainerCallback):
    """Append what the trainer logs (loss, rates, throughput, ...) to `log.jsonl`, as it happens."""

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            for name in (LOG, FOLLOWING):
                rewind(Path(args.output_dir) / name, state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        # A resumed training averages the loss from its checkpoint on; an uninterrupted one must do the same.
        control.should_log |= control.should_save
        return control

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            record = {"step": state.global_step, "max_steps": state.max_steps, **(logs or {})}
            append_lines(Path(args.output_dir) / LOG, [record])


class FollowingCallback(TrainerCallback):
    """Every so many steps let the model answer held-out instructions; the scores go to `following.jsonl`, beside the
    digest of the pool that was asked from, and, as `following` and so on, to the trainer's next log.

    Args:
        trainer: whose log it is.
        args: which corpus, which pool of instructions, and how often.
        processor: of the LSM.
        store: of the corpus's features, if there is one.
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
        # Every process answers all rows: where weights are sharded, none can answer without the others.
        replies = Lsm(model, self.processor).respond(self.rows, store=self.store, progress=False)
        model.train()
        scores = score_following(self.rows, [reply.text for reply in replies], self.checker)
        for name in scores.keys() - {"tasks"}:
            self.trainer._metrics["train"][name] = [scores[name]]
        if state.is_world_process_zero:
            append_lines(Path(args.output_dir) / FOLLOWING, [{"step": state.global_step, "pool": self.pool, **scores}])
