"""What is reported: figures of every task and system, side by side, as JSON, Markdown, model card and page."""

import io
import json
import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import soundfile
from huggingface_hub import EvalResult, ModelCardData

from processing_lsm import load_audio
from recipes import figures
from recipes.evaluation.metrics import DRAWS, Metric, bootstrap_ratio, mean
from recipes.evaluation.scoring import LOWER_IS_BETTER, MAIN, is_correct, score, score_pool
from recipes.evaluation.systems import System
from recipes.evaluation.tasks import Task
from recipes.page import Examples, Facts, Picture, Table, Text, write_page

PERCENT = ("wer", "cer", "accuracy", "accuracy_constrained", "macro_f1", "f1", "exact_match", "following", "unparsed")
PERCENT += ("transcript_copy", "truncated", "right")
# As the Hub's task types have them.
HUB_TASKS = {"asr": "automatic-speech-recognition", "st": "translation", "slu": "text-classification"}
HUB_TASKS |= {"qa": "question-answering"}
SHOWN_PROMPTS = 5
EXAMPLES = 8
STYLES = {
    "text_llm": ("text LLM (reads the transcript)", "#1b3a4b", ""),
    "cascade": ("cascade", "#5b7c8d", "\\\\"),
    "model": ("the model", "#2a9d8f", "//"),
    "vanilla": ("vanilla LSM (transcription only)", "#e9a23b", ".."),
    "model_reading": ("the model reads", "#8ecfc5", "--"),
    "shuffled": ("another sentence's clip", "#cccccc", "xx"),
    "silence": ("silence", "#eeeeee", ""),
    "swapped": ("another task's instruction", "#f5e6cc", "++"),
}


def collect(
    tasks: Sequence[Task],
    systems: Sequence[System],
    asked: Mapping[tuple[str, str], Sequence[dict]],
    answers: Mapping[tuple[str, str], Sequence[dict]],
) -> dict:
    """All figures.

    Args:
        asked: rows by task and system, as `read_rows` gives them.
        answers: by task and system, as `answers.answer` gives them.

    Returns:
        `systems` and `tasks`; of a task what was asked, and for every system its `figures` and, where a task asks
        several questions, those of its `parts`; `comparisons` as in `compare`.
    """
    found = {}
    for task in tasks:
        answered = [system.name for system in systems if (task.name, system.name) in answers]
        if not answered:  # a text LLM alone, of clips without a transcript
            continue
        rows = max((asked[task.name, system] for system in answered), key=len)
        prompts = list(dict.fromkeys(row["instruction"] for row in rows))
        found[task.name] = {
            "group": task.group,
            "kind": task.kind,
            "description": task.description,
            "corpus": task.data.corpus,
            "config": task.data.config,
            "split": task.data.split,
            "prompt": task.prompt or "drawn for every row",
            "prompts": prompts[:SHOWN_PROMPTS],
            "rows": len(rows),
            "utterances": len({row["utterance"] for row in rows}),
            "systems": {
                system: figures_of(asked[task.name, system], answers[task.name, system]) for system in answered
            },
            "comparisons": compare(rows, {system: answers[task.name, system] for system in answered}),
        }
    about = {system.name: {"label": system.label, "hears": system.hear} for system in systems}
    packages = ("torch", "transformers", "jiwer", "sacrebleu", "whisper-normalizer")
    versions = {"python": platform.python_version(), **{package: version(package) for package in packages}}
    return {"systems": about, "tasks": found, "versions": versions}


def figures_of(rows: Sequence[dict], records: Sequence[dict]) -> dict:
    """Figures of one system's answers to one task, and of the parts of a task that asks several questions."""
    parts: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        parts.setdefault(row["task"], []).append(place)
    scored = {name: _part(rows, records, places) for name, places in sorted(parts.items())}
    report = {"rows": len(rows), "truncated": mean([not record["finished"] for record in records]).as_dict()}
    if all(record["seconds"] for record in records):  # seconds of audio for one of computing
        heard = [row["duration"] for row in rows]
        report["rtfx"] = bootstrap_ratio(heard, [record["seconds"] for record in records]).as_dict()
    if len(scored) == 1:
        (only,) = scored.values()
        return report | {"figures": only["figures"]}
    overall = score_pool(rows, [record["response"] for record in records])
    return report | {"figures": _as_dicts(overall), "parts": scored}


def _part(rows: Sequence[dict], records: Sequence[dict], places: Sequence[int]) -> dict:
    some, said = [rows[place] for place in places], [records[place] for place in places]
    if not all(row["references"] for row in some) and some[0]["kind"] != "constraints":
        return {"kind": some[0]["kind"], "rows": len(some), "figures": {}}
    responses = [record["response"] for record in said]
    scored = score(some, responses, [record["constrained"] for record in said])
    return {"kind": some[0]["kind"], "rows": len(some), "figures": _as_dicts(scored)}


def _as_dicts(scored: Mapping[str, Metric]) -> dict[str, dict]:
    return {name: metric.as_dict() for name, metric in scored.items()}


def compare(rows: Sequence[dict], answers: Mapping[str, Sequence[dict]]) -> dict:
    """Relative differences of the share right, with paired 95 % intervals (rows resampled for both alike):
    `forgetting`, the model against the text LLM; `text_kept`, the model that reads against the text LLM.
    """
    found, asked = {}, [place for place, row in enumerate(rows) if row["kind"] != "transcription"]
    for name, system in (("forgetting", "model"), ("text_kept", "model_reading")):
        if not asked or system not in answers or "text_llm" not in answers:
            continue
        hits = [
            [is_correct(rows[place], answers[one][place]["response"]) for place in asked]
            for one in (system, "text_llm")
        ]
        if None not in hits[0] and any(hits[1]):
            found[name] = relative(*hits, [rows[place]["task"] for place in asked])
    return found


def relative(hits: Sequence[bool], base: Sequence[bool], groups: Sequence[str], seed: int = 0) -> dict:
    """(share − base share) / base share, shares being means over the groups, and its 95 % interval."""
    rng, both = np.random.default_rng(seed), np.array([hits, base], dtype=float)
    labels = np.array(groups)
    values, drawn = [], []
    for group in sorted(set(groups)):
        some = both[:, labels == group]
        values.append(some.mean(1))
        weights = rng.multinomial(some.shape[1], np.full(some.shape[1], 1 / some.shape[1]), DRAWS) / some.shape[1]
        drawn.append(weights @ some.T)
    value, draws = np.mean(values, 0), np.mean(drawn, 0)
    change = (draws[:, 0] - draws[:, 1]) / np.maximum(draws[:, 1], 1e-9)
    low, high = np.quantile(change, [0.025, 0.975])
    return Metric(float((value[0] - value[1]) / value[1]), float(low), float(high)).as_dict()


def main_figure(figures: Mapping[str, dict]) -> str | None:
    """The name of the figure that stands for a task."""
    return next((name for name in MAIN if name in figures), None)


def show(name: str, figure: Mapping | None) -> str:
    """A figure and its interval in a cell."""
    if figure is None:
        return "–"
    scale, unit = (100, " %") if name in PERCENT else (1, "")
    value, low, high = (scale * figure[key] for key in ("value", "low", "high"))
    return f"{value:.1f}{unit} ({low:.1f}–{high:.1f})"


def summary(found: dict) -> tuple[list[str], list[list[str]]]:
    """One row for every task and part, one column for every system: the figure that stands for it."""
    systems = list(found["systems"])
    header, lines = ["task", "figure", *systems], []
    for name, task in found["tasks"].items():
        for part, by_system in _parts(task).items():
            figure = next(filter(None, (main_figure(figures) for figures in by_system.values())), None)
            if figure is None:
                continue
            cells = [show(figure, by_system.get(system, {}).get(figure)) for system in systems]
            label = f"{name}: {part}" if part else name
            arrow = "↓" if figure in LOWER_IS_BETTER else "↑"
            lines.append([label, f"{figure} {arrow}", *cells])
    return header, lines


def _parts(task: dict) -> dict[str, dict[str, dict]]:
    """Figures by part ("" is the whole) and system."""
    parts: dict[str, dict[str, dict]] = {"": {name: system["figures"] for name, system in task["systems"].items()}}
    for name, system in task["systems"].items():
        for part, scored in system.get("parts", {}).items():
            parts.setdefault(part, {})[name] = scored["figures"]
    return parts


def details(task: dict) -> tuple[list[str], list[list[str]]]:
    """Every figure of a task: one row for every system and part."""
    names = list(dict.fromkeys(n for by in _parts(task).values() for scored in by.values() for n in scored))
    lines = []
    for part, by_system in _parts(task).items():
        for system, scored in by_system.items():
            whole = task["systems"][system]
            last = [show("truncated", whole["truncated"]), show("rtfx", whole.get("rtfx"))] if not part else ["", ""]
            lines.append([system, part or "all", *(show(name, scored.get(name)) for name in names), *last])
    return ["system", "question", *names, "truncated", "× real time"], lines


def comparisons(found: dict) -> tuple[list[str], list[list[str]]]:
    """Forgetting and text kept, task by task, in per cent of the text LLM's share right."""
    lines = []
    for name, task in found["tasks"].items():
        if task["comparisons"]:
            cells = (task["comparisons"].get(key) for key in ("forgetting", "text_kept"))
            lines.append([name, *("–" if cell is None else _change(cell) for cell in cells)])
    return ["task", "speech against the text LLM", "reading against the text LLM"], lines


def _change(cell: Mapping) -> str:
    value, low, high = (100 * cell[key] for key in ("value", "low", "high"))
    return f"{value:+.1f} % ({low:+.1f} to {high:+.1f})"


def to_markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)


NOTE = (
    "In brackets 95 % intervals, rows resampled. ↑ higher is better, ↓ lower is. `shuffled`, `silence` and `swapped` "
    "are controls: a model that listens and does what it is told must fail there."
)


def markdown(found: dict) -> str:
    """`results.md`."""
    parts = [f"# {found['checkpoints']['model']}", NOTE, to_markdown(*summary(found))]
    if comparisons(found)[1]:
        parts += ["Relative change of the share of right answers:", to_markdown(*comparisons(found))]
    for name, task in found["tasks"].items():
        about = f"{task['description']} {task['rows']} questions about {task['utterances']} clips of {task['corpus']}."
        prompts = "\n\n".join("> " + prompt.replace("\n", "\n> ") for prompt in task["prompts"])
        parts += [f"## {name}", about, prompts, to_markdown(*details(task))]
    return "\n\n".join(parts) + "\n"


def model_index(found: dict) -> str:
    """The model's figures as YAML for the head of its card."""
    listed = [
        EvalResult(
            task_type=HUB_TASKS.get(task["group"], "text-generation"),
            dataset_type=Path(task["corpus"]).name if Path(task["corpus"]).exists() else task["corpus"],
            dataset_name=name,
            dataset_config=task["config"],
            dataset_split=task["split"],
            metric_type=figure,
            # The Hub has one name for all that is asked of one corpus: what tells the tasks apart stands here.
            metric_name=f"{name}, {part}: {figure}" if part else f"{name}: {figure}",
            metric_value=value["value"],
            metric_args={"low": value["low"], "high": value["high"]},
        )
        for name, task in found["tasks"].items()
        for part, by_system in _parts(task).items()
        for figure, value in by_system.get("model", {}).items()
    ]
    if not listed:
        return ""
    name = Path(found["checkpoints"]["model"]).name
    return ModelCardData(model_name=name, eval_results=listed).to_yaml() + "\n"


def draw(found: dict, folder: Path) -> list[Path]:
    """One picture of bars for every group of tasks: the figure that stands for each task, by system."""
    drawn = []
    for group in dict.fromkeys(task["group"] for task in found["tasks"].values()):
        scores: dict[str, dict[str, dict]] = {}
        of_group = {name: task for name, task in found["tasks"].items() if task["group"] == group}
        parts = Counter(part for task in of_group.values() for part in _parts(task))
        for name, task in of_group.items():
            for part, by_system in _parts(task).items():
                label = name if not part else part if parts[part] == 1 else f"{name}: {part}"
                for system, scored in by_system.items():
                    if figure := main_figure(scored):
                        scale = 0.01 if figure == "bleu" else 1
                        bar = {key: scale * scored[figure][key] for key in ("value", "low", "high")}
                        scores.setdefault(system, {})[f"{label}\n{figure}"] = bar
        if scores:
            order = list(dict.fromkeys(bar for bars in scores.values() for bar in bars))
            rows = sum(task["rows"] for task in of_group.values())
            title = f"{group}: answers to {rows} questions"
            figures.plot_bars(scores, folder / group, order, STYLES, "figure (BLEU: hundredths)", title)
            drawn.append(folder / group)
    return drawn


def write(output: Path, found: dict, asked: Mapping, answers: Mapping) -> None:
    """`results.json`, `results.md`, `model_index.yaml`, the pictures and `report.html`."""
    texts = {"results.json": json.dumps(found, indent=1) + "\n", "results.md": markdown(found)}
    for name, text in (texts | {"model_index.yaml": model_index(found)}).items():
        partial = output / f"{name}.partial"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, output / name)
    blocks: list = [Text(NOTE), Table("Summary", *summary(found))]
    if comparisons(found)[1]:
        blocks.append(Table("Relative change of the share of right answers", *comparisons(found)))
    for stem in draw(found, output):
        blocks.append(Picture(stem, f"Tasks of the group {stem.name}", f"Bars by task and system, group {stem.name}"))
    for name, task in found["tasks"].items():
        note = f"{task['description']} Asked: {task['prompt']}"
        blocks.append(Table(f"{name}: all figures", *details(task), note=note))
        shown = {
            system: dict(zip((row["id"] for row in asked[name, system]), answers[name, system], strict=True))
            for system in task["systems"]
        }
        rows = max((asked[name, system] for system in shown), key=len)
        blocks.append(Examples(examples(rows, shown)))
    blocks.append(Facts({**found["checkpoints"], **found["versions"]}))
    write_page(output / "report.html", f"Evaluation of {found['checkpoints']['model']}", "", blocks)


def examples(rows: Sequence[dict], answers: Mapping[str, Mapping[str, dict]]) -> list[dict]:
    """Some rows, of every question one, with their audio and what the systems answered (by system and id)."""
    first = {row["task"]: row for row in reversed(rows)}
    chosen = list(reversed(first.values())) if len(first) > 1 else rows[:3]
    return [
        {
            "instruction": row["instruction"],
            "transcript": row["transcript"],
            "audio": playable(row["audio"]),
            "answers": [
                (system, said[row["id"]]["response"], is_correct(row, said[row["id"]]["response"]))
                for system, said in answers.items()
                if row["id"] in said
            ],
        }
        for row in chosen[:EXAMPLES]
    ]


def playable(audio: dict) -> bytes:
    """A clip as every browser plays it: 16-bit WAV at 16 kHz."""
    wav = io.BytesIO()
    soundfile.write(wav, load_audio(audio), 16_000, format="WAV", subtype="PCM_16")
    return wav.getvalue()
