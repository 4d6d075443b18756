"""Checkpoints that are whole or do not count, and going on from the last one: the same command, the same curve."""

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

COMPLETE = "complete"  # the file that is written last
RUN = "run.json"  # the settings that a folder's checkpoints were made with
# What may change between an interruption and the resumption, since the loss does not depend on it.
FREE = ("output_dir", "target", "resume_from_checkpoint", "run_name", "report_to", "project", "preflight")
FREE += ("disable_tqdm", "local_rank", "checker", "pool", "peak_tflops", "do_train")
FREE_PREFIXES = ("logging_", "log_", "save_", "eval_", "hub_", "push_to_hub", "following_", "trackio_", "include_", "_")


class WholeCheckpoints:
    """For a Trainer: a checkpoint counts once all its files are there, and none goes before the next one counts."""

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
    """The last complete checkpoint of a training's folder."""
    whole = [path.parent for path in Path(folder).glob(f"checkpoint-*/{COMPLETE}")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def settings_of(*arguments) -> dict:
    """What a loss curve is a function of, of the recipe's arguments."""
    found = {}
    for part in arguments:
        values = part.to_dict() if hasattr(part, "to_dict") else dataclasses.asdict(part)
        found |= {name: value for name, value in values.items() if name not in FREE}
    found = {name: value for name, value in found.items() if not name.startswith(FREE_PREFIXES)}
    return json.loads(json.dumps(found, default=str))


def contents_of(script_args, model_args, corpus: Corpus | None = None) -> dict[str, str]:
    """What the models and the set hold that a training is made from: their paths do not say what is there by now.

    Args:
        script_args, model_args: of the recipe.
        corpus: whose clips are learned, instead of those of a set.
    """
    found = {name: content_of(getattr(script_args, name)) for name in ("audio", "text")}
    found["model_name_or_path"] = content_of(model_args.model_name_or_path, model_args.model_revision)
    found["dataset_name"] = corpus.revision if corpus else content_of(script_args.dataset_name, repo_type="dataset")
    return {f"content of {name}": content for name, content in found.items() if content is not None}


def find_checkpoint(output_dir: str, settings: dict, asked: str | None, main_process: bool = True) -> str | None:
    """Where this training goes on: the last complete checkpoint in its folder, None to begin.

    Args:
        output_dir: of the training.
        settings: `settings_of` it and `contents_of` what it is made from, kept beside the checkpoints.
        asked: `--resume_from_checkpoint`: a checkpoint's folder, or `true` for the last one whatever the settings.
        main_process: whether this process writes.

    Raises:
        ValueError: the folder holds checkpoints of other settings or of another program, or what was asked for is no
            whole checkpoint.
    """
    last, run = last_checkpoint(output_dir), Path(output_dir) / RUN
    if not run.is_file() and any(run.parent.glob("checkpoint-*")):
        raise ValueError(
            f"{output_dir} holds checkpoints of something else ({RUN} is missing); name another --output_dir."
        )
    if asked and asked.lower() not in ("true", "false"):
        if not (Path(asked) / COMPLETE).is_file():
            raise ValueError(
                f"--resume_from_checkpoint {asked} is not a complete checkpoint; the last complete one in "
                f"{output_dir} is {last}."
            )
        last = Path(asked)
    elif asked and asked.lower() == "false":
        last = None
    elif asked and last is None:
        raise ValueError(
            f"--resume_from_checkpoint {asked}: {output_dir} has no complete checkpoint; leave the option out to "
            "begin anew."
        )
    elif (
        not asked
        and last
        and run.is_file()
        and (changes := _changes(json.loads(run.read_text(encoding="utf-8")), settings))
    ):
        raise ValueError(
            f"{output_dir} holds a training of other settings ({'; '.join(changes)}): name another --output_dir, give "
            f"the old ones to go on from {last.name}, or --resume_from_checkpoint true to go on from it with the new."
        )
    if main_process:
        _clear(Path(output_dir), everything=last is None)
        run.parent.mkdir(parents=True, exist_ok=True)
        write_whole(run, json.dumps(settings, indent=2, sort_keys=True))
    if last:
        logger.info("going on from %s", last)
    return str(last) if last else None


def _changes(before: dict, now: dict) -> list[str]:
    """Of what both have: other versions of ours have other settings."""
    known = {name: value for name, value in before.items() if name in now}
    changed = differences(known, {name: now[name] for name in known})
    return [f"{name}: {was} then, {value} now" for name, (was, value) in changed.items()]


def _clear(folder: Path, everything: bool) -> None:
    """Remove checkpoints that count no more: those that a kill cut short, or all of them."""
    for path in folder.glob("checkpoint-*"):
        if everything or not (path / COMPLETE).is_file():
            logger.warning("removing %s, %s", path, "of a training that begins anew" if everything else "not whole")
            shutil.rmtree(path)


@contextlib.contextmanager
def naming_last_checkpoint(output_dir: str) -> Iterator[None]:
    """Whatever stops a training says where it goes on."""
    try:
        yield
    except Exception as error:
        last = last_checkpoint(output_dir)
        error.add_note(
            f"The last complete checkpoint is {last}; the same command goes on from it."
            if last
            else f"{output_dir} has no complete checkpoint yet; --save_steps sets how often one is written."
        )
        raise
