"""Write the report of an evaluation: tables, pictures, and a page with clips to play."""

import json
from collections.abc import Mapping
from pathlib import Path

from dataset_builders.corpora.audio import encode
from dataset_builders.files import write_whole
from processing_lsm import load_audio
from recipes.evaluation.metrics import FIGURES, main_figure
from recipes.evaluation.results import SystemResult
from recipes.evaluation.tables import NOTE, by_part, comparisons, details, eval_results, markdown, model_index, summary
from recipes.reporting import figures
from recipes.reporting.page import Examples, Facts, Picture, Table, Text, write_page

EXAMPLES = 8
STYLES = {
    "text_llm": ("text LLM (reads the transcript)", "#1b3a4b", ""),
    "cascade": ("cascade", "#5b7c8d", "\\\\"),
    "model": ("the model", "#2a9d8f", "//"),
    "vanilla": ("vanilla LSM (transcription only)", "#e9a23b", ".."),
    "paper": ("LSM trained as in the paper", "#a8323e", "||"),
    "model_reading": ("the model reads", "#8ecfc5", "--"),
    "shuffled": ("another sentence's clip", "#cccccc", "xx"),
    "silence": ("silence", "#eeeeee", ""),
    "swapped": ("another task's instruction", "#f5e6cc", "++"),
}


def draw(report: dict, folder: Path) -> list[Path]:
    """Draw bars by system: one picture for each task that asks several questions, and one for all other tasks of each
    group. Returns the paths without suffix."""
    pictures: dict[str, dict[str, dict[str, dict]]] = {}
    for name, task in report["tasks"].items():
        several = len(by_part(task)) > 1
        for part, by_system in by_part(task).items():
            for system, scored in by_system.items():
                if figure := main_figure(scored):
                    bar = {key: scored[figure][key] / FIGURES[figure].most for key in ("value", "low", "high")}
                    bars = pictures.setdefault(name if several else task["group"], {})
                    bars.setdefault(system, {})[f"{part or ('all' if several else name)}, {figure}"] = bar
    for name, scores in pictures.items():
        order = list(dict.fromkeys(label for bars in scores.values() for label in bars))
        figures.plot_bars(scores, folder / name, order, STYLES, "figure, of its best", name)
    return [folder / name for name in pictures]


def write(output: Path, report: dict, results: Mapping[tuple[str, str], SystemResult]) -> None:
    """Write `results.json`, `results.md`, `model_index.yaml`, `.eval_results/`, the pictures and `report.html`."""
    texts = {"results.json": json.dumps(report, indent=1) + "\n", "results.md": markdown(report)}
    texts |= {f".eval_results/{name}": text for name, text in eval_results(report).items()}
    for name, text in (texts | {"model_index.yaml": model_index(report)}).items():
        write_whole(output / name, text)
    blocks: list = [Text(NOTE), Table("Summary", *summary(report))]
    if comparisons(report)[1]:
        blocks.append(Table("Relative change of the share of right answers", *comparisons(report)))
    for stem in draw(report, output):
        blocks.append(Picture(stem, f"{stem.name}: the main figure of each question.", "Bars by system"))
    for name, task in report["tasks"].items():
        note = f"{task['description']} Asked: {task['prompt']}"
        blocks.append(Table(f"{name}: all figures", *details(task), note=note))
        blocks.append(Examples(examples({system: results[name, system] for system in task["systems"]})))
    blocks.append(Facts({**report["checkpoints"], **report["versions"]}))
    name = Path(report["checkpoints"]["model"]).name
    write_page(output / "report.html", f"Evaluation of {name}", report["checkpoints"]["model"], blocks)


def examples(results: Mapping[str, SystemResult]) -> list[dict]:
    """Return some questions of a task with their audio and the answers of all systems: one question of each part, or
    the first three if the task has no parts."""
    rows = max((result.questions for result in results.values()), key=len)
    first = {row.task: row for row in reversed(rows)}
    chosen = list(reversed(first.values())) if len(first) > 1 else rows[:3]
    answers: dict[str, list[tuple]] = {row.id: [] for row in chosen}
    for system, result in results.items():
        for answer, hit in zip(result.answers, result.hits, strict=True):
            if answer.id in answers:
                answers[answer.id].append((system, answer.response, hit))
    return [
        {
            "instruction": row.instruction,
            "transcript": row.transcript,
            "audio": playable(row.audio),
            "answers": answers[row.id],
        }
        for row in chosen[:EXAMPLES]
    ]


def playable(audio: dict) -> bytes:
    """Return a clip as a 16-bit WAV file at 16 kHz, which every browser can play."""
    return encode(load_audio(audio), subtype="PCM_16")
