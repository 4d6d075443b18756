"""Run everything in minutes on a CPU: train three LSMs from a text LLM, and see which of the three listens.

    make quickstart            # or: python -m recipes.quickstart --output runs/quickstart

A corpus is synthesised, an LSM is composed, the LLM inside it answers instructions about the transcripts, and three
LSMs are trained. `vanilla` learns only transcription rows, and `paper` learns the LLM's answers, both as in the paper
(with cross-entropy, training the whole LLM). `self_powered` learns the same rows as `paper` in our way: its projector
is first aligned with the LLM's embeddings, the LLM that reads is its teacher, and its own LLM is frozen. All are asked
held-out instructions about held-out speech, of kinds that were trained and of kinds that were not. Every stage appears
under `--output` when it is complete, and the trainings keep checkpoints, so the same command resumes an interrupted
run.

The same story with real checkpoints and any corpus is a study: `python -m recipes.study --config
recipes/configs/quickstart_real.yaml`.
"""

import logging
import sys
from pathlib import Path

from language_models.command_line import parser_of
from language_models.extras import extra

with extra("train"):
    from datasets.utils.logging import disable_progress_bar

    from dataset_builders.files import read_yaml
    from recipes.nano.quickstart import CONFIGS, Quickstart, check_folder, contents, keep_caches_in
    from recipes.nano.report import table
    from recipes.studies.stages import alone_in


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--output", default="runs/quickstart", help="folder for all outputs")
    parser.add_argument("--config", default=str(CONFIGS / "quickstart.yaml"), help="YAML file of sizes and settings")
    parser.add_argument("--steps", type=int, help="steps of every training, instead of those in its configuration")
    parser.add_argument("--seed", type=int, default=0, help="seed of all draws and initial weights")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    disable_progress_bar()
    folder = Path(args.output)
    keep_caches_in(folder / ".cache")
    settings = read_yaml(args.config)
    if "rows" in settings:
        parser.error(f"{args.config} is a study: run python -m recipes.study --config {args.config}.")
    check_folder(folder, {**settings, "seed": args.seed, "steps": args.steps, "content": contents(settings)})
    try:
        with alone_in(folder):
            report = Quickstart(folder, settings, args.seed, args.steps).run()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; run the same command to continue.")
    print(f"\n{table(report)}\n\nReport: {folder}/report.md, {report['seconds'] / 60:.1f} minutes. Talk to it:\n")
    print(f"  {sys.executable} -m recipes.chat --model {folder}/checkpoint --audio {folder}/example.wav")


if __name__ == "__main__":
    main()
