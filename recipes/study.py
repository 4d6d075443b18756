"""Named rows, several seeds, one table: what does each piece of the recipe do?

    make study                         # or: python -m recipes.study --output runs/study
    python -m recipes.study --rows vanilla align_distill_frozen --seeds 0 1 2 --workers 2

A configuration (`configs/study.yaml`) has the stages of a `base`, each a recipe's command in the form that `stages.py`
describes, and `rows`: what each changes in them. A row ends with its stage `evaluate` (`recipes.evaluate`), and with
those that its `also` names, such as `bias` (`recipes.analyze_bias`); only what these need is made, so a row whose
`evaluate` has `model: "{compose}"` trains nothing. `of: ROW` begins with what another row changes. What rows have in
common is made once. Stopped, the same command goes on; a changed row makes new folders and leaves the old ones alone.

Writes `study.json`, `study.md` and `study.png`/`.svg`, anew whenever a row is whole. Rows run in the order of the file,
so the longest should come first, and the first seed of all rows before the second of any.
"""

import argparse
import logging
import os
import signal
import sys
from pathlib import Path

from language_models.extras import extra

with extra("train"):
    from recipes.studies.stages import alone_in
    from recipes.studies.study import read, study


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", default=str(Path(__file__).parent / "configs" / "study.yaml"), help="YAML file of stages and rows"
    )
    parser.add_argument("--output", default="runs/study", help="folder of the stages and the table")
    parser.add_argument("--rows", nargs="+", default=[], metavar="NAME", help="rows of the study to run; all if absent")
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[], help="seeds of every row, instead of those that the row names"
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="number of commands that run at the same time"
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; the same command goes on."))
    folder = Path(args.output)
    if args.workers < 1:
        parser.error(f"--workers {args.workers}: expected 1 or more.")
    try:
        with alone_in(folder):
            failed = study(read(args.config), args.rows, args.seeds, args.workers, folder)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the same command goes on.")
    print(f"{folder}/study.md" + (f"; failed: {'; '.join(failed)}" if failed else ""))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
