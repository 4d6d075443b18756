"""The quickstart's report: the paper's four claims on the nano setting, as a page, as Markdown and as JSON."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from dataset_builders.corpora.opening import load_corpus
from dataset_builders.files import read_lines, write_whole
from dataset_builders.instructions import SELF_POWERED_TASKS
from dataset_builders.nano.tasks import UNSEEN_TASKS
from recipes.evaluation.pages import STYLES, playable
from recipes.evaluation.tables import NOTE, comparisons, summary
from recipes.reporting import figures
from recipes.reporting.markdown import to_markdown
from recipes.reporting.page import Examples, Facts, Picture, Table, Text, write_page
from recipes.training.alignment import FOLDER as ALIGNMENT
from recipes.training.callbacks import FOLLOWING, LOG

# Names that this report has of its own for systems of `recipes.evaluate`.
NAMES = {"model": "self_powered", "model_reading": "self_powered_reading"}
LABELS = {
    "text_llm": "text LLM: reads the transcript",
    "cascade": "cascade: ours transcribes, the text LLM reads that",
    "self_powered": "self-powered (ours): the LLM as it was, the projector aligned and distilled",
    "paper": "paper: self-powered rows, the LLM in full, cross-entropy",
    "vanilla": "vanilla: transcription rows alone, the LLM in full",
    "self_powered_reading": "ours reads: the transcript in place of the clip",
    "shuffled": "other clip: ours hears another sentence",
    "silence": "silence: ours hears nothing",
    "swapped": "other task: ours is given the instruction of another task",
}
SHORT = {name: label.partition(":")[0] for name, label in LABELS.items()}
COMPARED = ("text_llm", "cascade", "self_powered", "paper", "vanilla")
LSMS = COMPARED[2:]


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def scores_of(scored: Mapping) -> dict:
    """What the report keeps of a system's results (`evaluation/results.py`): `tasks`, the share right of each;
    `following` (of kinds that were never trained, `right`) and its `_interval`; `transcript_copy`; `wer`. A figure
    that was not measured is left out."""
    whole, parts = scored["figures"], scored.get("parts", {})
    scores: dict = {"tasks": {name: part["figures"]["right"]["value"] for name, part in parts.items()}}
    for name in ("following", "right", "transcript_copy"):
        if name in whole:
            scores[name] = whole[name]["value"]
    for name in {"following", "right"} & set(whole):
        scores[f"{name}_interval"] = [round(whole[name][side], 4) for side in ("low", "high")]
    if "transcription" in parts:
        scores["wer"] = parts["transcription"]["figures"]["wer"]["value"]
    return scores


def table(report: dict) -> str:
    """The scores of every model as a Markdown table."""
    return to_markdown(*_overview(report))


def _overview(report: dict) -> tuple[list[str], list[list[str]]]:
    lines = []
    for name, label in LABELS.items():
        if scores := report.get(name):
            never = report.get("unseen_tasks", {}).get(name, {})
            shares = [*_share(scores, "following"), *_share(never, "right")]
            lines.append([label, *shares, percent(scores.get("transcript_copy")), percent(scores.get("wer"))])
    interval = "95 % interval"
    return ["", "trained kinds", interval, "never-trained kinds", interval, "transcript copies", "WER"], lines


def _share(scores: Mapping, name: str) -> list[str]:
    """A share and its interval."""
    return [percent(scores.get(name)), "–".join(map(percent, scores.get(f"{name}_interval", ()))) or "–"]


def _kinds(report: dict) -> tuple[list[str], list[list[str]]]:
    """Share right of every kind of task, by model."""
    lines = []
    for trained, scores in (("yes", report), ("no", report["unseen_tasks"])):
        for kind in dict.fromkeys(kind for name in COMPARED for kind in scores[name]["tasks"]):
            shares = [percent(scores[name]["tasks"].get(kind)) for name in COMPARED]
            lines.append([kind, trained, *shares])
    return ["kind", "trained", *(SHORT[name] for name in COMPARED)], lines


def _attention(biases: Mapping[str, dict]) -> tuple[list[str], list[list[str]]]:
    """Shares of the saliency and of the attention, means over the layers."""
    lines = []
    for name, bias in biases.items():
        cells = [SHORT[name]]
        for figure in ("layers", "attention"):
            for role in ("instruction", "speech"):
                cells.append(percent(float(np.mean([layer[role] for layer in bias[figure]]))))
        for role in ("instruction", "speech"):
            cells.append(f"{np.mean([layer[role] for layer in bias['per_token']]):.2f}")
        lines.append(cells)
    roles = ("instruction", "speech")
    header = [f"{figure}, {role}" for figure in ("saliency", "attention", "per token") for role in roles]
    return ["", *header], lines


def plot_following(results: Mapping, folder: Path) -> None:
    """Bars for all systems: share right of trained and of never-trained kinds, and transcript copies."""
    trained, never = (results["tasks"][task]["systems"] for task in ("nano", "nano_unseen"))
    scores, systems = {}, {NAMES.get(system, system): system for system in trained}
    for name, system in systems.items():
        measured = trained[system]["figures"]
        scores[name] = {
            "trained kinds": measured.get("following"),
            "never trained": never[system]["figures"].get("right"),
            "copies": measured.get("transcript_copy"),
        }
    styles = {name: (SHORT[name], *STYLES[systems[name]][1:]) for name in LABELS if name in systems}
    title = "Who does what is asked, who copies the transcript?"
    figures.plot_bars(scores, folder / "following", list(scores["text_llm"]), styles, "share of answers", title)


@matplotlib.rc_context(figures.PAPER)
def plot_training(training: Path, stem: Path) -> None:
    """Loss and following rate over the steps of all trainings; those of an alignment come first."""
    figure = Figure(figsize=(figures.WIDTH, 2.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, system, line in (("self_powered", "model", "-"), ("paper", "paper", "-."), ("vanilla", "vanilla", "--")):
        style = {"color": STYLES[system][1], "label": SHORT[name]}
        aligned, learned = (read_lines(training / name / part / LOG) for part in (ALIGNMENT, ""))
        before = aligned[-1]["step"] if aligned else 0
        for rows, first, drawn in ((aligned, 0, ":"), (learned, before, line)):
            losses = [(first + row["step"], row["loss"]) for row in rows if "loss" in row]
            left.plot(*zip(*losses, strict=True), drawn, **style)
        looks = [(before + row["step"], row["following"]) for row in read_lines(training / name / FOLLOWING)]
        right.plot(*zip(*looks, strict=True), line, marker="o", **style)
    left.set(xlabel="step", ylabel="loss", yscale="log")
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter("")
    right.set(xlabel="step", ylabel="trained kinds, validation", ylim=(-0.02, 1.02))
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figures.save(figure, stem)


def examples(folder: Path, records: Sequence[dict]) -> list[dict]:
    """One clip per kind of task: what the models answered."""
    answers = {(record["model"], record["id"]): record for record in records}
    clips = {f"{clip['source']}/{clip['id']}": clip["audio"] for clip in load_corpus(folder / "corpus", "test")}
    items = []
    for task in (*SELF_POWERED_TASKS, *UNSEEN_TASKS):
        record = next((row for row in records if row["model"] == "self_powered" and row["task"] == task), None)
        if record is None:
            continue
        said = {name: answers[name, record["id"]] for name in COMPARED if (name, record["id"]) in answers}
        items.append(
            {
                "instruction": record["instruction"],
                "transcript": record["transcript"],
                "audio": playable(clips[record["id"].removesuffix(f"/{task}")]),
                "answers": [(SHORT[name], said[name]["response"], said[name]["correct"]) for name in said],
            }
        )
    return items


CLAIMS = {
    "tasks": "1. What can it do? Recognition, translation, understanding, answering",
    "following": "2. Does it follow instructions?",
    "text": "3. Can it still do with text what it could?",
    "attention": "4. Does attention to the instruction recover?",
}
ABOUT = (
    "One text LLM, one encoder, the same clips. Vanilla learns to transcribe ({vanilla} steps), and the paper's LSM "
    "to transcribe and to give the LLM's own answers ({paper} steps), both by cross-entropy with the LLM in full. "
    "Ours first aligns its projector with the LLM's embeddings ({alignment} steps, in which the LLM is not run), then "
    "learns from the paper's rows what the LLM would say if it read ({self_powered} steps), and leaves the LLM as it "
    "is. Scored on {rows} (sentence, voice, instruction) triples of six trained kinds of task and on {unseen_rows} of "
    "six kinds that no training row asks: sentences, voices and wordings unseen in training. The last three lines are "
    "controls: a model that listens, and does what it is told, must fail there."
)
FOLLOWING_ABOUT = (
    "A share is the mean over the six kinds of the share of right answers. Transcript copies are answers to trained "
    "kinds other than repetition whose word error rate against the transcript is below 0.2. WER is that of the plain "
    "transcription prompt."
)
READING = "Ours reads the same prompts as the text LLM that it came from, with the transcript in the place of the clip."
TRAINING = (
    "Each training's own loss (ours: CTC of the alignment, dotted, then KL to the LLM that reads; the others: "
    "cross-entropy), and the share right of trained kinds on validation clips."
)
TRACED_ABOUT = (
    "Saliency |Σ A ⊙ ∂L/∂A| of the text LLM's answers, traced in all models, in the rows that predict the answer; "
    "means over layers in the table. Speech stands where the text LLM has the transcript. Per token: 1 is the average "
    "token that the answer can see. Definitions, intervals and every layer are in bias/*/report.html."
)


def _against_text(report: dict) -> str:
    """What the LSMs reach of the text LLM's shares."""
    sentences = []
    for kinds, scores, figure in (("trained", report, "following"), ("never-trained", report["unseen_tasks"], "right")):
        whole = scores["text_llm"][figure]
        shares = (f"{SHORT[name]} {percent(scores[name][figure] / whole if whole else None)}" for name in LSMS)
        sentences.append(f"Share right of {kinds} kinds over the text LLM's, {percent(whole)}: {', '.join(shares)}.")
    return " ".join(sentences)


def write_report(
    folder: Path, report: dict, records: Sequence[dict], results: dict, biases: Mapping[str, dict]
) -> None:
    """Write `report.json`, `report.md`, `report.html` and the pictures into `folder`.

    Args:
        report: scores by model, `unseen_tasks` (the same of kinds never trained), `steps`, `rows`, `unseen_rows`,
            `stages`, `seconds`.
        records: answers by model.
        results: of `recipes.evaluate`.
        biases: a bias.json for the text LLM and each LSM.
    """
    plot_following(results, folder)
    plot_training(folder / "training", folder / "training")
    figures.plot_layers({SHORT[name]: bias for name, bias in biases.items()}, folder / "layers")
    if biases["self_powered"]["similarity"]:
        figures.plot_similarity(biases["self_powered"]["similarity"], folder / "similarity")
    write_whole(folder / "report.json", json.dumps(report, indent=2) + "\n")
    about = ABOUT.format(**report["steps"], rows=report["rows"], unseen_rows=report["unseen_rows"])
    shown = examples(folder, records)
    write_whole(folder / "report.md", _markdown(report, results, biases, about, shown))
    pictures = {
        "following": Picture(folder / "following", "Share right, and copies.", "Bars by kind of task and model"),
        "layers": Picture(folder / "layers", "What the answer draws on, by layer.", "Lines over layers, four models"),
        "training": Picture(folder / "training", TRAINING, "Loss and following rate over steps"),
    }
    blocks = [
        Text(about, "In short"),
        Table("Scores", *_overview(report)),
        Text(NOTE, CLAIMS["tasks"]),
        Table("The figure that stands for each task", *summary(results)),
        Text([FOLLOWING_ABOUT, _against_text(report)], CLAIMS["following"]),
        pictures["following"],
        Table("Share right of every kind", *_kinds(report)),
        Text(READING, CLAIMS["text"]),
        Table("Change of the share right against the text LLM", *comparisons(results)),
        Text(TRACED_ABOUT, CLAIMS["attention"]),
        pictures["layers"],
        Table("Means over layers", *_attention(biases)),
    ]
    if biases["self_powered"]["similarity"]:
        caption = "Speech and transcript inside ours: CKA, and cosine of the token most alike."
        blocks.append(Picture(folder / "similarity", caption, "Lines over layers and maps of tokens"))
    blocks += [Text((), "Training"), pictures["training"], Text((), "The same clips"), Examples(shown)]
    blocks += [Facts({**report["stages"], "seconds in all": report["seconds"], "seed": report.get("seed")})]
    write_page(
        folder / "report.html", "Quickstart: who listens?", "The paper's four claims, on the nano setting", blocks
    )


def _markdown(report: dict, results: dict, biases: Mapping[str, dict], about: str, shown: Sequence[dict]) -> str:
    stages = "\n".join(f"| {name} | {seconds:.0f} |" for name, seconds in report["stages"].items())
    answers = "\n\n".join(
        f"**{item['instruction']}** — *{item['transcript']}*\n\n"
        + "\n".join(f"- {label} {'✓' if right else '✗'}: {text}" for label, text, right in item["answers"])
        for item in shown
    )
    return f"""# Quickstart report

{about}

{table(report)}

## {CLAIMS["tasks"]}

{NOTE}

{to_markdown(*summary(results))}

## {CLAIMS["following"]}

{FOLLOWING_ABOUT}

{_against_text(report)}

![Share right of trained and never-trained kinds](following.png)

{to_markdown(*_kinds(report))}

## {CLAIMS["text"]}

{READING}

{to_markdown(*comparisons(results))}

## {CLAIMS["attention"]}

{TRACED_ABOUT}

![Layers](layers.png)

{to_markdown(*_attention(biases))}

## Training

![Training](training.png)

{TRAINING}

## Answers to the same clips

{answers}

## Time

{report["seconds"]:.0f} s in all.

| stage | seconds |
|---|---|
{stages}
"""
