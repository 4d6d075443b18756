"""Atomic checkpoints, and resuming from the last one with the same command and the same loss curve."""

import contextlib
import dataclasses
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer import rotate_checkpoints

from dataset_builders.corpora.corpus import Corpus
from dataset_builders.files import content_of, differences, write_whole

logger = logging.getLogger(__name__)

COMPLETE = "complete"  # a file that is written last
RUN = "run.json"  # the settings of the checkpoints in a folder
# Settings that may change when a training is resumed, because the loss does not depend on them.
FREE = ("output_dir", "target", "resume_from_checkpoint", "run_name", "report_to", "project", "preflight")
FREE += ("disable_tqdm", "local_rank", "checker", "pool", "peak_tflops", "do_train")
FREE_PREFIXES = ("logging_", "log_", "save_", "eval_", "hub_", "push_to_hub", "following_", "trackio_", "include_", "_")


class WholeCheckpoints:
    """Mixin for a Trainer: a checkpoint counts when all its files are written, and only then are older ones deleted."""

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise OSError(f"{folder} could not be written: {error}") from error
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()  # each process writes its own random state
        if self.args.should_save:
            (folder / COMPLETE).touch()
            rotate_checkpoints(
                output_dir=str(folder.parent),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )


def last_checkpoint(folder: str | Path) -> Path | None:
    """Return the last complete checkpoint in a training's folder, None if there is none."""
    complete = [path.parent for path in Path(folder).glob(f"checkpoint-*/{COMPLETE}")]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def settings_of(*arguments) -> dict:
    """Return the arguments of the recipe that the loss curve depends on."""
    settings = {}
    for part in arguments:
        settings |= part.to_dict() if hasattr(part, "to_dict") else dataclasses.asdict(part)
    fixed = {n: value for n, value in settings.items() if n not in FREE and not n.startswith(FREE_PREFIXES)}
    return json.loads(json.dumps(fixed, default=str))


def contents_of(script_args, model_args, corpus: Corpus | None = None) -> dict[str, str]:
    """Return fingerprints of the models and the set of a training, because the content at their paths may change.
    `corpus` is that of the training if its clips do not come from a set."""
    contents = {name: content_of(getattr(script_args, name)) for name in ("audio", "text")}
    contents["model_name_or_path"] = content_of(model_args.model_name_or_path, model_args.model_revision)
    contents["dataset_name"] = corpus.revision if corpus else content_of(script_args.dataset_name, repo_type="dataset")
    return {f"content of {name}": content for name, content in contents.items() if content is not None}


def find_checkpoint(output_dir: str, settings: dict, resume_from: str | None, main_process: bool = True) -> str | None:
    """Return the checkpoint to resume from, the last complete one in the training's folder; None to start.

    Args:
        output_dir: folder of the training.
        settings: `settings_of` and `contents_of` the training; they are saved beside the checkpoints.
        resume_from: `--resume_from_checkpoint`: a checkpoint's folder, `true` for the last one even with other
            settings, or `false` to start again.
        main_process: whether this process writes.

    Raises:
        ValueError: the folder holds checkpoints with other settings or of another program, or the named checkpoint is
            not complete.
    """
    last, run = last_checkpoint(output_dir), Path(output_dir) / RUN
    if not run.is_file() and any(run.parent.glob("checkpoint-*")):
        raise ValueError(
            f"{output_dir} holds checkpoints of another program ({RUN} is missing); name another --output_dir."
        )
    if resume_from and resume_from.lower() not in ("true", "false"):
        if not (Path(resume_from) / COMPLETE).is_file():
            raise ValueError(
                f"--resume_from_checkpoint {resume_from} is not a complete checkpoint; the last complete one in "
                f"{output_dir} is {last}."
            )
        last = Path(resume_from)
    elif resume_from and resume_from.lower() == "false":
        last = None
    elif resume_from and last is None:
        raise ValueError(
            f"--resume_from_checkpoint {resume_from}: {output_dir} has no complete checkpoint; leave the option out to "
            "start a new training."
        )
    elif (
        not resume_from
        and last
        and run.is_file()
        and (changes := _changes(json.loads(run.read_text(encoding="utf-8")), settings))
    ):
        raise ValueError(
            f"{output_dir} holds a training with other settings ({'; '.join(changes)}): name another --output_dir, use "
            f"the old settings to resume from {last.name}, or the new ones with --resume_from_checkpoint true."
        )
    if main_process:
        _clear(Path(output_dir), everything=last is None)
        run.parent.mkdir(parents=True, exist_ok=True)
        write_whole(run, json.dumps(settings, indent=2, sort_keys=True))
    if last:
        logger.info("resuming from %s", last)
    return str(last) if last else None


def _changes(before: dict, now: dict) -> list[str]:
    """Return the changed settings, except those that only one side has, as other versions have other settings."""
    common = before.keys() & now.keys()
    changed = differences(*({name: settings[name] for name in common} for settings in (before, now)))
    return [f"{name} was {was}, now {value}" for name, (was, value) in changed.items()]


def _clear(folder: Path, everything: bool) -> None:
    """Remove incomplete checkpoints, or all of them."""
    for path in folder.glob("checkpoint-*"):
        if everything or not (path / COMPLETE).is_file():
            logger.warning("removing %s: %s", path, "the training starts again" if everything else "not complete")
            shutil.rmtree(path)


@contextlib.contextmanager
def naming_last_checkpoint(output_dir: str) -> Iterator[None]:
    """Add the last complete checkpoint to any exception that stops a training."""
    try:
        yield
    except Exception as error:
        last = last_checkpoint(output_dir)
        error.add_note(
            f"The last complete checkpoint is {last}; run the same command to resume from it."
            if last
            else f"{output_dir} has no complete checkpoint yet; --save_steps sets how often one is written."
        )
        raise
