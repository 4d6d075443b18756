"""Compare times: all contestants process the same rows in turns, and each turn gives a ratio."""

import argparse
import gc
import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.contestants import CONTESTANTS, LEVERS, PEERS, Contestant
from benchmarks.machine import describe
from benchmarks.workloads import SIZES
from language_models.command_line import parser_of
from recipes.training.throughput import seconds_of

Job = Callable[[], object]


def arguments(description: str, workloads: Iterable[str]) -> argparse.ArgumentParser:
    """Return a parser with the options of all comparisons."""
    parser = parser_of(description)
    commas = {"type": lambda text: text.split(",")}
    parser.add_argument("--only", default=list(PEERS), **commas, help=f"contestants: {','.join(CONTESTANTS)}")
    parser.add_argument("--levers", action="store_true", help="compare ours with and without each optimisation")
    parser.add_argument("--workload", default=list(workloads), **commas, help=f"workloads: {','.join(workloads)}")
    parser.add_argument("--rounds", type=int, default=3, help="number of turns of every contestant, after a warm-up")
    parser.add_argument("--threads", type=int, help="number of CPU threads; torch's default if absent")
    parser.add_argument("--size", choices=SIZES, help="size of the models; by default large on a GPU, tiny on a CPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="device; cuda by default if there is a GPU")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--plot", type=Path, help="file for a picture of the ratios")
    return parser


@dataclass
class Setup:
    """Device, dtype and size of the models, from the options. The dtype is bfloat16 on a GPU, and float32 on a CPU,
    where it is the fastest.

    Raises:
        ValueError: an option is invalid. Names it.
    """

    options: argparse.Namespace
    workloads: Iterable[str]
    device: torch.device = field(init=False)
    dtype: torch.dtype = field(init=False)
    size: str = field(init=False)

    def __post_init__(self):
        options = self.options
        if options.levers:
            options.only = ["ours", *LEVERS]
        for name, choices in {"only": list(CONTESTANTS), "workload": list(self.workloads)}.items():
            for value in getattr(options, name):
                if value not in choices:
                    raise ValueError(f"--{name} {value!r} is unknown; expected some of {','.join(choices)}.")
        if "ours" not in options.only:
            raise ValueError(f"--only {','.join(options.only)} lacks ours, which the others are compared with.")
        if options.rounds < 1 or (options.threads or 1) < 1:
            raise ValueError(f"--rounds {options.rounds} and --threads {options.threads} must be 1 or more.")
        if options.threads:
            torch.set_num_threads(options.threads)
        transformers.logging.set_verbosity_error()
        self.device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        cuda = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if cuda else torch.float32
        self.size = options.size or ("large" if cuda else "tiny")

    def contestants(self) -> Iterable[list[Contestant]]:
        """Yield groups of contestants that take turns. On a GPU, each contestant is alone, so that it has all memory;
        turns are not necessary there, because the clock rate is steady."""
        names = self.options.only
        groups = [names] if self.device.type == "cpu" else [[name] for name in names]
        for group in groups:
            yield [CONTESTANTS[name](self.size, self.device, self.dtype) for name in group]
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def describe(self) -> str:
        return f"{describe(self.device)}, {self.size} models, {str(self.dtype).removeprefix('torch.')}"


def name_of(contestant: Contestant) -> str:
    return next(name for name, kind in CONTESTANTS.items() if type(contestant) is kind)


def take_turns(jobs: dict[str, list[Job]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Return the seconds that each contestant takes for all its jobs, in each round.

    Before the rounds, each contestant does its first job once. Each round begins with another contestant.
    """
    for first, *_ in jobs.values():
        first()
    names, seconds = list(jobs), {name: [] for name in jobs}
    for turn in tqdm(range(rounds), desc="rounds", leave=False):
        for name in [*names[turn % len(names) :], *names[: turn % len(names)]]:
            seconds[name].append(seconds_of(lambda todo=jobs[name]: [job() for job in todo], device))
    return seconds


@dataclass
class Results:
    """Seconds by contestant, workload and round."""

    machine: str
    unit: str  # the work that takes the seconds
    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    more: dict = field(default_factory=dict)

    def add(self, name: str, workload: str, seconds: list[float]) -> None:
        self.seconds.setdefault(name, {})[workload] = seconds

    def ratios(self, name: str, workload: str) -> list[float]:
        """Return their seconds over ours, for each round."""
        ours, theirs = self.seconds["ours"][workload], self.seconds[name][workload]
        return [slow / fast for slow, fast in zip(theirs, ours, strict=True)]

    def summary(self) -> dict:
        """Return `ratios`, their `spread` (smallest and largest) and `seconds`, by contestant and workload."""
        ratios, spread = {}, {}
        for name, workloads in self.seconds.items():
            if name != "ours":
                by_round = {workload: self.ratios(name, workload) for workload in workloads}
                ratios[name] = {workload: statistics.median(values) for workload, values in by_round.items()}
                spread[name] = {workload: [min(values), max(values)] for workload, values in by_round.items()}
        seconds = {
            name: {workload: statistics.median(values) for workload, values in workloads.items()}
            for name, workloads in self.seconds.items()
        }
        figures = {"ratios": ratios, "spread": spread, "seconds": seconds}
        return {"machine": self.machine, "seconds_of": self.unit, **figures, "notes": self.notes, **self.more}

    def table(self) -> str:
        """Return a Markdown table of the seconds, and of the ratios to ours with their spread."""
        workloads = list(self.seconds["ours"])
        lines = [["", *workloads], ["---"] * (1 + len(workloads))]
        for name, seconds in self.seconds.items():
            cells = [name]
            for workload in workloads:
                if workload not in seconds:
                    cells.append("–")
                    continue
                cell = f"{statistics.median(seconds[workload]):.3g} s"
                if name != "ours":
                    ratios = self.ratios(name, workload)
                    cell += f", × {statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
                cells.append(cell)
            lines.append(cells)
        rows = [f"| {' | '.join(line)} |" for line in lines]
        return "\n".join([f"{self.unit}; {self.machine}.\n", *rows, *(f"\n{note}" for note in self.notes)])

    def plot(self, path: Path) -> None:
        """Plot the ratios as bars, with a line at 1 for ours."""
        summary = self.summary()
        figure = Figure(figsize=(9, 1.2 + 0.5 * len(summary["ratios"])), layout="constrained")
        axes, workloads = figure.subplots(), list(self.seconds["ours"])
        for place, workload in enumerate(workloads):
            names = [name for name in summary["ratios"] if workload in summary["ratios"][name]]
            values = [summary["ratios"][name][workload] for name in names]
            around = [summary["spread"][name][workload] for name in names]
            errors = [[value - low for value, (low, _) in zip(values, around, strict=True)]]
            errors.append([high - value for value, (_, high) in zip(values, around, strict=True)])
            rows = [list(summary["ratios"]).index(name) + place / (len(workloads) + 1) for name in names]
            axes.barh(rows, values, 1 / (len(workloads) + 1), xerr=errors, label=workload)
        axes.set_yticks([index + 0.3 for index in range(len(summary["ratios"]))], list(summary["ratios"]))
        axes.axvline(1, color="black", linewidth=1)
        axes.invert_yaxis()
        axes.set_xlabel("times as long as ours")
        axes.set_title(f"{self.unit}\n{self.machine}", fontsize="small")
        axes.legend()
        figure.savefig(path, dpi=150)

    def report(self, options: argparse.Namespace) -> None:
        print(self.table())
        if options.json:
            options.json.write_text(json.dumps(self.summary(), indent=2), encoding="utf-8")
        if options.plot:
            self.plot(options.plot)
