"""Inspect a self-powered set before training on it: counts, histograms, and a few rows to read and listen to.

`survey` counts the rows, `draw_samples` draws some, and `render_text` and `render_html` show both; `inspect_set` does
all of this. The same set gives the same text and page, byte for byte. Words are separated by white space.
"""

import base64
import bisect
import io
import itertools
import json
import logging
import random
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dataset_builders.files import read_template, write_whole

logger = logging.getLogger(__name__)

COLUMNS = ("id", "audio", "transcript", "task", "instruction", "response", "duration", "source", "responder")
_TEXTS = ("transcript", "task", "instruction", "response", "source", "responder")
_COUNTED = pa.schema([*((name, pa.string()) for name in _TEXTS), ("duration", pa.float64())])
_INK = "#010203"  # placeholder for the page's text colour, which matplotlib does not know


@dataclass
class Histogram:
    """Counts in `limit` bins of `width` that begin at `start`, and in one more bin for all larger values."""

    start: float
    width: float
    limit: int
    counts: np.ndarray = field(init=False)  # (limit + 1,)
    total: float = 0.0
    largest: float = 0.0

    def __post_init__(self):
        self.counts = np.zeros(self.limit + 1, dtype=np.int64)

    @property
    def mean(self) -> float:
        return self.total / max(1, int(self.counts.sum()))

    def add(self, values: np.ndarray) -> None:
        """Count `values` of shape (rows,), which must not be below `start`."""
        bins = np.minimum((values - self.start) / self.width, self.limit).astype(np.int64)
        self.counts += np.bincount(bins, minlength=self.limit + 1)
        self.total += float(values.sum())
        self.largest = max(self.largest, float(values.max(initial=0.0)))

    def bars(self) -> tuple[np.ndarray, np.ndarray]:
        """Return at most 12 wider bins to draw, as edges (bars + 1,) and counts (bars,), without the last, open bin."""
        used = max(1, int(np.flatnonzero(self.counts[:-1]).max(initial=0)) + 1)
        step = next(step for step in (1, 2, 5, 10, 20, 50) if used <= 12 * step)
        firsts = np.arange(0, used, step)
        edges = self.start + self.width * np.append(firsts, firsts[-1] + step)
        return edges, np.add.reduceat(self.counts[:used], firsts)


@dataclass
class Tally:
    """Counts of one task, or of all tasks."""

    rows: int = 0
    duration: Histogram = field(default_factory=partial(Histogram, 0.0, 0.5, 120))  # seconds
    # The bins begin at -0.5, so that each is centred on a whole number.
    transcript_words: Histogram = field(default_factory=partial(Histogram, -0.5, 1.0, 400))
    response_words: Histogram = field(default_factory=partial(Histogram, -0.5, 1.0, 400))
    instructions: dict[str, None] = field(default_factory=dict)  # a set that keeps the order

    def summary(self) -> dict[str, int | float | str]:
        """Return the values of a table row; `instructions_share` is the number of distinct instructions per row."""
        return {
            "rows": self.rows,
            "hours": self.duration.total / 3600,
            "transcript_words_mean": self.transcript_words.mean,
            "transcript_words_max": int(self.transcript_words.largest),
            "response_words_mean": self.response_words.mean,
            "response_words_max": int(self.response_words.largest),
            "instructions": len(self.instructions),
            "instructions_share": len(self.instructions) / max(1, self.rows),
            "example": next(iter(self.instructions), ""),
        }


@dataclass
class Survey:
    """Counts of a set: per task, for all tasks, and the rows per source and per responder (JSON)."""

    name: str
    tasks: dict[str, Tally] = field(default_factory=dict)
    total: Tally = field(default_factory=Tally)
    sources: Counter[str] = field(default_factory=Counter)
    responders: Counter[str] = field(default_factory=Counter)


def survey(folder: str | Path) -> Survey:
    """Count all rows of a set without reading its audio.

    Memory grows with the number of distinct instructions, sources and responders, not with the number of rows.

    Raises:
        ValueError: the folder has no `data/TASK/*.parquet`; or a file cannot be read, lacks a column, or has a row with
            a missing value, an invalid duration or another task than its folder. Names the file.
    """
    counts = Survey(Path(folder).resolve().name)
    for task, paths in _files(folder).items():
        counts.tasks[task] = Tally()
        for path in paths:
            with _open(path) as file:
                for batch in file.iter_batches(batch_size=4096, columns=_COUNTED.names):
                    _count(counts, task, path, batch)
    return counts


def draw_samples(folder: str | Path, per_task: int, seed: int) -> list[dict]:
    """Draw up to `per_task` rows of every task, with their audio. Only the row groups of these rows are read.

    Returns:
        Rows as dicts of `COLUMNS`, sorted by task, then in the set's order. They depend only on the set, `per_task` and
        `seed`.

    Raises:
        ValueError: `per_task` is negative, or the set is invalid as in `survey`.
    """
    if per_task < 0:
        raise ValueError(f"the number of samples per task is {per_task}; expected 0 or more.")
    samples = []
    for task, paths in _files(folder).items():
        groups = []  # (path, row group, rows)
        for path in paths:
            with _open(path) as file:
                groups += [(path, i, file.metadata.row_group(i).num_rows) for i in range(file.num_row_groups)]
        ends = list(itertools.accumulate(rows for _, _, rows in groups))
        size = ends[-1] if ends else 0
        drawn = sorted(random.Random(f"{seed}/{task}").sample(range(size), min(per_task, size)))
        for position, rows in itertools.groupby(drawn, key=lambda row, ends=ends: bisect.bisect_right(ends, row)):
            path, group, length = groups[position]
            with _open(path) as file:
                table = file.read_row_group(group, columns=list(COLUMNS))
            samples += [table.slice(row - (ends[position] - length), 1).to_pylist()[0] for row in rows]
    return samples


def render_text(survey: Survey) -> str:
    """Render the survey for a terminal: a row per task and a total, then a wording of every task, the responders and
    the sources."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("task", overflow="fold")
    for name in ("rows", "hours", "transcript words\nmean (max)", "response words\nmean (max)", "wordings\n(of rows)"):
        table.add_column(name, justify="right")
    *tasks, total = _table(survey)
    for task, *cells in tasks:
        table.add_row(Text(task), *cells)  # rich reads brackets in a plain string as markup
    table.add_section()
    table.add_row(*total)
    console = Console(file=io.StringIO(), width=100, color_system=None)
    console.print(table)
    lines = [line.rstrip() for line in console.file.getvalue().strip("\n").splitlines()]
    lines += [f"  a wording of {task}: {_example(tally)}" for task, tally in survey.tasks.items()]
    for responder in _responders(survey):
        who = ", ".join(f"{key} {value}" for key, value in responder.items() if key != "rows")
        lines.append(f"  answered by {who} ({responder['rows']:,} rows)")
    lines += [f"  source {source} ({rows:,} rows)" for source, rows in survey.sources.most_common()]
    return "\n".join(lines)


def render_html(survey: Survey, samples: list[dict]) -> str:
    """Render the survey, histograms and samples with their audio as one self-contained page."""
    return read_template(Path(__file__).with_name("inspection.html")).render(
        survey=survey,
        table=_table(survey),
        largest_task=max(tally.rows for tally in survey.tasks.values()),
        responders=_responders(survey),
        sources=survey.sources.most_common(),
        histograms={task: _histograms(f"t{i}", tally) for i, (task, tally) in enumerate(survey.tasks.items())},
        samples={task: [row for row in samples if row["task"] == task] for task in survey.tasks},
        example=_example,
        audio_url=_audio_url,
    )


def inspect_set(folder: str | Path, html: str | Path | None = None, samples: int = 3, seed: int = 0) -> dict:
    """Survey a set and, if `html` is given, write the page.

    Args:
        folder: folder of the set, as in `survey`.
        html: file of the page; its folder is created. If None, no page is written.
        samples: number of rows per task on the page.
        seed: seed that decides which rows are drawn.

    Returns:
        A dict for JSON: `total` and `tasks` (name to numbers, as in `Tally.summary`), `sources` (name to rows),
        `responders` (a list of dicts), `text` for the terminal, and `html`, the page's path or None.

    Raises:
        ValueError: as in `survey` and `draw_samples`.
    """
    counts = survey(folder)
    if html is not None:
        page = render_html(counts, draw_samples(folder, samples, seed))
        write_whole(html, page)
        logger.info("%s: %.1f MB", html, len(page) / 1e6)
    return {
        "total": counts.total.summary(),
        "tasks": {task: tally.summary() for task, tally in counts.tasks.items()},
        "sources": dict(counts.sources.most_common()),
        "responders": _responders(counts),
        "text": render_text(counts),
        "html": None if html is None else str(html),
    }


def _files(folder: str | Path) -> dict[str, list[Path]]:
    """Return the files of the set by task, sorted. Raises ValueError if there are none."""
    paths = sorted(Path(folder).glob("data/*/*.parquet"))
    if not paths:
        raise ValueError(
            f"{folder} has no data/TASK/*.parquet; expected a folder that `python -m dataset_builders.self_powered "
            "build` wrote."
        )
    return {task: list(files) for task, files in itertools.groupby(paths, key=lambda path: path.parent.name)}


@contextmanager
def _open(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a file of the set. Errors of reading inside the block become a ValueError that names the file."""
    try:
        with pq.ParquetFile(path) as file:
            if missing := [name for name in COLUMNS if name not in file.schema_arrow.names]:
                raise ValueError(f"{path} has no column {missing[0]!r}; expected {', '.join(COLUMNS)}.")
            yield file
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def _count(survey: Survey, task: str, path: Path, batch: pa.RecordBatch) -> None:
    """Add a batch of `path` to the survey. Raises ValueError if a row is invalid."""
    table = pa.table(batch).select(_COUNTED.names).cast(_COUNTED)
    for name in _COUNTED.names:
        if table[name].null_count:
            raise ValueError(f"{path}: a row has no {name}; expected a value in every row.")
    columns, seconds = table.to_pydict(), table["duration"].to_numpy()
    if not ((seconds >= 0) & (seconds < np.inf)).all():
        raise ValueError(f"{path}: a duration is negative or not a number; expected seconds.")
    if others := set(columns["task"]) - {task}:
        raise ValueError(f"{path} has rows of task {min(others)!r}; expected only {task!r}.")
    transcript_words, response_words = (
        np.array([len(text.split()) for text in columns[name]], dtype=np.int64) for name in ("transcript", "response")
    )
    for tally in (survey.tasks[task], survey.total):
        tally.rows += len(seconds)
        tally.duration.add(seconds)
        tally.transcript_words.add(transcript_words)
        tally.response_words.add(response_words)
        tally.instructions |= dict.fromkeys(columns["instruction"])
    survey.sources.update(columns["source"])
    survey.responders.update(columns["responder"])


def _table(survey: Survey) -> list[list[str]]:
    """Return the cells of each task, then the total: name, rows, hours, transcript words, response words, wordings."""
    table = []
    for name, tally in (*survey.tasks.items(), ("total", survey.total)):
        row = tally.summary()
        texts = ("transcript", "response")
        words = [f"{row[f'{text}_words_mean']:.1f} ({row[f'{text}_words_max']:,})" for text in texts]
        wordings = f"{row['instructions']:,} ({100 * row['instructions_share']:.1f} %)"
        table.append([name, f"{row['rows']:,}", f"{row['hours']:,.2f}", *words, wordings])
    return table


def _example(tally: Tally) -> str:
    """Return one of a task's wordings on one line; a task that asks nothing has none."""
    return " ".join(tally.summary()["example"].split()) or "(no instruction)"


def _responders(survey: Survey) -> list[dict]:
    """Return the responders, most rows first: `model`, `revision`, `template`, `decoding` as text, and `rows`."""
    responders = []
    for text, rows in survey.responders.most_common():
        try:
            provenance = dict(json.loads(text))
        except (TypeError, ValueError):  # not JSON: another program wrote it
            provenance = {"model": text}
        values = {key: provenance.get(key, "unknown") for key in ("model", "revision", "template", "decoding")}
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
        responders.append({**texts, "rows": rows})
    return responders


def _histograms(name: str, tally: Tally) -> list[Markup]:
    """Return a task's three histograms as SVG elements. `name` is the prefix of their ids, to be unique on the page."""
    return [
        _svg(f"{name}d", tally.duration, "duration", "seconds"),
        _svg(f"{name}t", tally.transcript_words, "transcript", "words"),
        _svg(f"{name}r", tally.response_words, "response", "words"),
    ]


def _svg(name: str, histogram: Histogram, what: str, unit: str) -> Markup:
    """Return a histogram as an SVG element in the page's text colour. It has no text from the data to be escaped."""
    alt = f"Histogram of the {what} in {unit}: mean {histogram.mean:.1f}, largest {round(histogram.largest, 1):g}."
    with matplotlib.rc_context({"svg.hashsalt": "lsm", "svg.fonttype": "none", "font.size": 9, "hatch.color": _INK}):
        svg = _draw(histogram, what, unit)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg[svg.index("<svg") :])  # HTML does not need them
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg).replace(_INK, "currentColor")
    return Markup(re.sub(r"<svg([^>]*)>", rf'<svg\1 role="img" aria-label="{alt}"><title>{alt}</title>', svg, count=1))


def _draw(histogram: Histogram, what: str, unit: str) -> str:
    edges, counts = histogram.bars()
    figure = Figure(figsize=(3.6, 2.1))
    axes = figure.add_axes((0.16, 0.22, 0.82, 0.75))
    style = {"align": "edge", "color": "#2a9d8f", "edgecolor": _INK, "linewidth": 0.5}
    axes.bar(edges[:-1], counts, np.diff(edges), **style)
    label = f"{what} ({unit})"
    if beyond := int(histogram.counts[-1]):
        axes.bar(edges[-1], beyond, edges[1] - edges[0], hatch="///", **style)
        label += f"; hatched: {histogram.limit * histogram.width:g} or more"
    axes.set_xlabel(label, color=_INK)
    axes.set_ylabel("rows", color=_INK)
    axes.tick_params(colors=_INK)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, integer=True))
        axis.set_major_formatter(EngFormatter(sep=""))
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_INK)
    drawing = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(drawing, format="svg", transparent=True, metadata=nothing)
    return drawing.getvalue()


def _audio_url(audio: dict | None) -> str | None:
    """Return a clip (`{"bytes", "path"}`) as a `data:` URL, or None if the set does not hold its bytes."""
    data = (audio or {}).get("bytes")
    return data and f"data:{_mime_type(data)};base64,{base64.b64encode(data).decode()}"


def _mime_type(data: bytes) -> str:
    """Return the MIME type of an audio file, from its first bytes."""
    if data.startswith(b"fLaC"):
        return "audio/flac"
    if data.startswith(b"RIFF") and data[8:12] == b"WAVE":
        return "audio/wav"
    if data.startswith(b"OggS"):
        return "audio/ogg"
    # An MPEG frame begins with eleven one bits; its layer is never 0, unlike that of AAC.
    if data.startswith(b"ID3") or (data[:1] == b"\xff" and data[1:2] >= b"\xe0" and data[1] & 0b110):
        return "audio/mpeg"
    return "application/octet-stream"
