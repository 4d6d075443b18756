"""Measure how our time and memory grow with the clip, the batch, the number of speech tokens and the size of the set.

    python -m benchmarks.growth --threads 1 --json growth.json --plot growth.png

Every point runs in a separate process, whose peak memory comes from the operating system. For each line, `power` is the
slope of time over size between the last two points on logarithmic axes: 1 is linear, 2 is quadratic. Only the LLM's
attention is quadratic, in the length of the prompt. The tower's is not, because it encodes chunks of 30 s.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from datasets import Dataset
from matplotlib.figure import Figure

from benchmarks.contestants import Ours
from benchmarks.fine_tuning import make_processor, make_rows
from benchmarks.machine import describe
from benchmarks.workloads import Row
from language_models.command_line import parser_of
from recipes.listening.features import AudioFeatureStore
from recipes.training.costs import Costs
from recipes.training.order import EpochSampler
from recipes.training.rows import RowSizes
from recipes.training.throughput import peak_memory

CPU = torch.device("cpu")


def ours(**settings) -> Ours:
    kind = type("Sized", (Ours,), {"settings": settings})
    return kind("tiny", CPU, torch.float32)


def clip(seconds: int) -> Callable[[], object]:
    """Generate the first token about one clip."""
    model = ours()
    prompt = model.prompts([Row(float(seconds), 0)])
    return lambda: model.write(prompt, 1)


def batch(rows: int) -> Callable[[], object]:
    """Run a training step with this number of clips of 5 s."""
    model = ours()
    made = model.training_batch([Row(5.0, seed) for seed in range(rows)])
    return lambda: model.step(made)


def speech_tokens(queries: int) -> Callable[[], object]:
    """Run a training step of 4 clips of 12 s with this number of queries per window, each of which gives 36 speech
    tokens."""
    model = ours(queries_per_window=queries)
    made = model.training_batch([Row(12.0, seed) for seed in range(4)])
    return lambda: model.step(made)


def rows_ordered(rows: int) -> Callable[[], object]:
    """Measure and group this number of rows, as before each training; their audio is not read."""
    one, processor = make_rows(1, 5.0)[0], make_processor()
    columns = {name: [value] * rows for name, value in one.items() if name != "audio"}
    dataset = Dataset.from_dict(columns)
    costs = Costs(*[1.0] * 6)

    def run():
        measured = costs.row(**RowSizes(processor).measure_all(dataset))
        return list(EpochSampler(rows, 0, np.asarray(measured), 8))

    return run


def clips_stored(rows: int) -> Callable[[], object]:
    """Compute and write the tower's output of this number of clips, which have different lengths from 0.5 to 3.5 s."""
    model, processor = ours(), make_processor()
    clips = [make_rows(1, 0.5 + 3 * row / rows)[0]["audio"] for row in range(rows)]

    def run():
        with tempfile.TemporaryDirectory() as folder:
            AudioFeatureStore.build(f"{folder}/store", model.model, processor, clips, batch_size=8)

    return run


LINES: dict[str, tuple[Callable[[int], Callable[[], object]], tuple[int, ...], str]] = {
    "clip": (clip, (1, 10, 30, 60, 300, 600, 1800), "seconds"),
    "batch": (batch, (1, 2, 4, 8, 16, 32), "rows"),
    "speech_tokens": (speech_tokens, (1, 2, 4, 8, 16), "queries per window"),
    "rows_ordered": (rows_ordered, (1_000, 10_000, 100_000), "rows"),
    "clips_stored": (clips_stored, (100, 400, 1_600), "clips"),
}


def measure(line: str, size: int, repeats: int) -> dict[str, float]:
    """Measure the seconds (the best of `repeats`) and GiB of one point, in this process."""
    transformers.logging.set_verbosity_error()
    run = LINES[line][0](size)
    before = peak_memory(CPU)
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return {"size": size, "seconds": best, "gib": peak_memory(CPU) - before}


def power(points: list[dict[str, float]], figure: str) -> float:
    """Return the slope between the last two points, on logarithmic axes."""
    first, last = points[-2:]
    return math.log(last[figure] / first[figure]) / math.log(last["size"] / first["size"])


def table(results: dict) -> str:
    lines = [
        f"{results['machine']}.\n",
        "| | from | to | seconds | GiB above the start | power |",
        "|---|---|---|---|---|---|",
    ]
    for name, points in results["lines"].items():
        first, last = points[0], points[-1]
        lines.append(
            f"| {name}, {LINES[name][2]} | {first['size']} | {last['size']} | {first['seconds']:.3g} → "
            f"{last['seconds']:.3g} | {first['gib']:.2f} → {last['gib']:.2f} | {results['power'][name]:.2f} |"
        )
    return "\n".join(lines)


def plot(results: dict, path: Path) -> None:
    figure = Figure(figsize=(3.2 * len(results["lines"]), 3.4), layout="constrained")
    all_axes = figure.subplots(1, len(results["lines"]), squeeze=False)[0]
    for axes, (name, points) in zip(all_axes, results["lines"].items(), strict=True):
        sizes = [point["size"] for point in points]
        axes.loglog(sizes, [point["seconds"] for point in points], "o-", label="seconds")
        axes.loglog(sizes, [max(point["gib"], 1e-3) for point in points], "s--", label="GiB")
        axes.set_xlabel(LINES[name][2])
        axes.set_title(f"{name} (power {results['power'][name]:.2f})", fontsize="small")
        axes.legend(fontsize="small")
    figure.suptitle(results["machine"], fontsize="small")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--line", nargs="+", choices=LINES, default=list(LINES), help="what grows")
    parser.add_argument("--largest", type=int, help="leave out points above this size")
    parser.add_argument("--repeats", type=int, default=2, help="number of measurements of each point")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="number of CPU threads")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--plot", type=Path, help="file for the picture")
    parser.add_argument(
        "--point",
        nargs=2,
        metavar=("LINE", "SIZE"),
        help="measure one point in this process; used by this script itself",
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.point:
        print(json.dumps(measure(options.point[0], int(options.point[1]), options.repeats)))
        return
    results: dict = {"machine": describe(CPU), "lines": {}, "power": {}}
    for line in options.line:
        points = []
        for size in LINES[line][1]:
            if options.largest is None or size <= options.largest:
                command = [sys.executable, "-m", "benchmarks.growth", "--point", line, str(size)]
                command += ["--threads", str(options.threads), "--repeats", str(options.repeats)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise ChildProcessError(f"{line} {size} ended with {done.returncode}: {done.stderr[-1000:]}")
                points.append(json.loads(done.stdout.splitlines()[-1]))
        if len(points) < 2:
            raise ValueError(f"--largest {options.largest} leaves {len(points)} points of {line}; a line needs two.")
        results["lines"][line], results["power"][line] = points, power(points, "seconds")
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2), encoding="utf-8")
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
