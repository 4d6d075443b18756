"""The whole story, in minutes, on a CPU: expand a text LLM to speech three times, and see which of the three listens.

    make quickstart            # or: python -m recipes.quickstart --output runs/quickstart

A corpus is spoken, an LSM composed, the LLM inside it answers instructions over the transcripts, and three LSMs are
trained: `vanilla` on transcription rows alone and `paper` on the LLM's answers, both as the paper trains (by
cross-entropy, the LLM in full); and `self_powered` on the same rows as `paper`, but as we train: its projector is first
aligned with the LLM's embeddings, the LLM that reads is its teacher, and its own LLM stays as it was. All are asked
held-out instructions about held-out speech, of kinds that were trained and of kinds that never were. Every stage
appears under `--output` when it is whole, and the trainings keep checkpoints, so an interrupted run goes on where it
stopped.
"""

import argparse
import logging
import sys
from pathlib import Path

from language_models.extras import extra

with extra("train"):
    from datasets.utils.logging import disable_progress_bar

    from dataset_builders.files import read_yaml
    from recipes.nano.quickstart import CONFIGS, Quickstart, check_folder, contents, keep_caches_in
    from recipes.nano.report import table
    from recipes.studies.stages import alone_in


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/quickstart", help="folder of everything that is made")
    parser.add_argument("--config", default=str(CONFIGS / "quickstart.yaml"), help="YAML file of sizes and settings")
    parser.add_argument("--steps", type=int, help="steps of every training, instead of those in its configuration")
    parser.add_argument("--seed", type=int, default=0, help="seed of all draws and initial weights")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    disable_progress_bar()
    folder = Path(args.output)
    keep_caches_in(folder / ".cache")
    settings = read_yaml(args.config)
    check_folder(folder, {**settings, "seed": args.seed, "steps": args.steps, "content": contents(settings)})
    try:
        with alone_in(folder):
            report = Quickstart(folder, settings, args.seed, args.steps).run()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the same command goes on with what is whole.")
    print(f"\n{table(report)}\n\nReport: {folder}/report.md, {report['seconds'] / 60:.1f} minutes. Talk to it:\n")
    print(f"  {sys.executable} -m recipes.chat --model {folder}/checkpoint --audio {folder}/example.wav")


if __name__ == "__main__":
    main()
