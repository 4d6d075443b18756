"""Check that our optimisations do not change the loss: train with all of them and with none, for several seeds.

    python -m benchmarks.same_loss --steps 200 --seeds 0 1 2 --json same_loss.json

The nano base is trained on a self-powered set with `recipes/sft.py`. Without the optimisations, rows come in random
order, clips are padded to 30 s, every frame is projected for the Q-Former, and TRL's fused head computes the logits of
all positions. The comparison is of the loss over the last quarter of the steps. The difference must be smaller than
that between two seeds, which change the order of the rows and the projector's initial weights.
"""

import contextlib
import json
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from trl import ModelConfig, TrlParser

import recipes.sft
from benchmarks.contestants import CHUNK, project_frames
from benchmarks.machine import describe
from dataset_builders.files import read_lines, read_yaml
from language_models.command_line import parser_of
from recipes.listening.collator import SpeechResponseCollator
from recipes.nano.quickstart import CONFIGS, Quickstart
from recipes.training.arguments import LsmScriptArguments, LsmTrainingArguments
from recipes.training.callbacks import LOG
from recipes.training.trainer import LsmTrainer

ALL, ORDER, NONE = ARMS = ("all levers", "grouping alone", "none")
FIRST = 20  # steps in which rounding errors stay small


@contextlib.contextmanager
def without_levers() -> Iterator[None]:
    """Switch off the optimisations that no setting switches off."""
    collate_audio, load = SpeechResponseCollator._audio, recipes.sft.load_model

    def padded(self, rows):
        audio, samples = collate_audio(self, rows)
        return {name: nn.functional.pad(value, (0, CHUNK - value.shape[-1])) for name, value in audio.items()}, samples

    def projecting(*args):
        model, processor = load(*args)
        project_frames(model)
        return model, processor

    with (
        mock.patch.object(SpeechResponseCollator, "_audio", padded),
        mock.patch.object(recipes.sft, "load_model", projecting),
        mock.patch.object(LsmTrainer, "_needs_trl", lambda self: True),
    ):
        yield


def prepare(folder: Path, clips: int, seed: int) -> Quickstart:
    """Make the quickstart's corpus, base and self-powered set, with fewer clips."""
    settings = read_yaml(CONFIGS / "quickstart.yaml")
    settings |= {"train_clips": clips, "validation_clips": 8, "test_clips": 8}
    quickstart = Quickstart(folder, settings, seed)
    quickstart.stages.run("corpus", quickstart.speak)
    quickstart.stages.run("base", quickstart.compose)
    quickstart.stages.run("self_powered", quickstart.answer)
    return quickstart


def train(quickstart: Quickstart, output: Path, steps: int, batch: int, seed: int, arm: str) -> list[float]:
    """Train, and return the loss of each step."""
    levers, grouped = arm == ALL, arm != NONE
    options = {
        "config": CONFIGS / "nano_paper.yaml",
        "model_name_or_path": quickstart.folder / "base",
        "dataset_name": quickstart.folder / "self_powered",
        "output_dir": output,
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": seed,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,  # its rounding is larger than what is looked for
        "train_sampling_strategy": "group_by_length" if grouped else "random",
    }
    flags = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    parser = TrlParser((LsmScriptArguments, LsmTrainingArguments, ModelConfig))
    with contextlib.nullcontext() if levers else without_levers():
        recipes.sft.train(*parser.parse_args_and_config(flags))
    return [line["loss"] for line in read_lines(output / LOG) if "loss" in line]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=200, help="steps of each training")
    parser.add_argument("--batch", type=int, default=16, help="number of rows per step")
    parser.add_argument("--clips", type=int, default=1500, help="number of clips of the corpus, each with two rows")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the trainings")
    parser.add_argument("--threads", type=int, help="number of CPU threads; torch's default if absent")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    curves: dict[str, list[list[float]]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            quickstart = prepare(Path(folder) / str(seed), options.clips, seed)
            for arm, runs in curves.items():
                output = Path(folder) / f"{seed} {arm}"
                runs.append(train(quickstart, output, options.steps, options.batch, seed, arm))
    pairs = list(zip(curves[ALL], curves[ORDER], strict=True))
    apart = max(abs(a - b) for ours, same in pairs for a, b in zip(ours[:FIRST], same[:FIRST], strict=True))
    ends = {name: [statistics.mean(losses[-(len(losses) // 4) :]) for losses in runs] for name, runs in curves.items()}
    machine = describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    print(f"Loss over the last quarter of {options.steps} steps of {options.batch} rows; {machine}.")
    for name, losses in ends.items():
        spread = f", standard deviation {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
        print(f"{name}: {', '.join(f'{loss:.3f}' for loss in losses)}; mean {statistics.mean(losses):.3f}{spread}")
    print(f"{ALL} and {ORDER}, over the first {FIRST} steps: at most {apart:.1e} apart")
    if options.json:
        options.json.write_text(
            json.dumps({"machine": machine, "ends": ends, "apart": apart, "curves": curves}), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
