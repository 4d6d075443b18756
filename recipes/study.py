"""Measure what each part of the recipe does: train and evaluate many settings with several seeds, in one table.

    make study                         # or: python -m recipes.study --output runs/study
    python -m recipes.study --rows vanilla align_distill_frozen --seeds 0 1 2 --workers 2

A configuration (`configs/study.yaml`) has a `base`, whose stages are commands in the form that `stages.py` describes,
and `rows`, each with its changes to the base. A row ends with the stage `evaluate` (`recipes.evaluate`) and the stages
in its `also`, such as `bias` (`recipes.analyze_bias`). Only the stages that these need are run, so a row whose
`evaluate` has `model: "{compose}"` trains nothing. `of: ROW` starts from the changes of another row. Rows share equal
stages. `values` are names that stages mention in braces; `--set` replaces them, so that one configuration serves
several checkpoints and corpora. To continue a stopped study, run the same command again; a changed row gets new folders
and leaves the old ones alone.

`study.json`, `study.md` and `study.png`/`.svg` are written whenever a row is complete. Rows run in the order of the
file, so the longest should come first. The first seed of all rows runs before the second.
"""

import logging
import os
import signal
import sys
from pathlib import Path

from language_models.command_line import parser_of
from language_models.extras import extra

with extra("train"):
    from recipes.studies.stages import alone_in
    from recipes.studies.study import read, study


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--config", default=str(Path(__file__).parent / "configs" / "study.yaml"), help="YAML file of stages and rows"
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="values that replace those of the configuration"
    )
    parser.add_argument("--output", default="runs/study", help="folder of the stages and the table")
    parser.add_argument("--rows", nargs="+", default=[], metavar="NAME", help="rows of the study to run; all if absent")
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[], help="seeds for every row, instead of those in the configuration"
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="number of commands that run at the same time"
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; run the same command to continue."))
    folder = Path(args.output)
    if args.workers < 1:
        parser.error(f"--workers {args.workers}: expected 1 or more.")
    if bad := next((entry for entry in args.set if not entry.partition("=")[1]), None):
        parser.error(f"--set {bad}: expected NAME=VALUE.")
    values = dict(entry.split("=", 1) for entry in args.set)
    try:
        with alone_in(folder):
            failed = study(read(args.config, values), args.rows, args.seeds, args.workers, folder)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; run the same command to continue.")
    print(f"{folder}/study.md" + (f"; failed: {'; '.join(failed)}" if failed else ""))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
