"""What a run leaves to look at: tables, pictures, and a page with clips to play."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import soundfile

from dataset_builders.files import write_whole
from processing_lsm import load_audio
from recipes.evaluation.scoring import is_correct
from recipes.evaluation.tables import NOTE, by_part, comparisons, details, main_figure, markdown, model_index, summary
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


def draw(found: dict, folder: Path) -> list[Path]:
    """Bars by system: a picture of every task that asks several questions, and one of every group's other tasks."""
    pictures: dict[str, dict[str, dict[str, dict]]] = {}
    for name, task in found["tasks"].items():
        several = len(by_part(task)) > 1
        for part, by_system in by_part(task).items():
            for system, scored in by_system.items():
                if figure := main_figure(scored):
                    scale = 0.01 if figure == "bleu" else 1
                    bar = {key: scale * scored[figure][key] for key in ("value", "low", "high")}
                    bars = pictures.setdefault(name if several else task["group"], {})
                    bars.setdefault(system, {})[f"{part or ('all' if several else name)}, {figure}"] = bar
    for name, scores in pictures.items():
        order = list(dict.fromkeys(label for bars in scores.values() for label in bars))
        figures.plot_bars(scores, folder / name, order, STYLES, "figure (BLEU/100)", name)
    return [folder / name for name in pictures]


def write(output: Path, found: dict, asked: Mapping, answers: Mapping) -> None:
    """`results.json`, `results.md`, `model_index.yaml`, the pictures and `report.html`."""
    texts = {"results.json": json.dumps(found, indent=1) + "\n", "results.md": markdown(found)}
    for name, text in (texts | {"model_index.yaml": model_index(found)}).items():
        write_whole(output / name, text)
    blocks: list = [Text(NOTE), Table("Summary", *summary(found))]
    if comparisons(found)[1]:
        blocks.append(Table("Relative change of the share of right answers", *comparisons(found)))
    for stem in draw(found, output):
        blocks.append(Picture(stem, f"{stem.name}: the figure that stands for each question.", "Bars by system"))
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
    name = Path(found["checkpoints"]["model"]).name
    write_page(output / "report.html", f"Evaluation of {name}", found["checkpoints"]["model"], blocks)


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
