"""The quickstart's report: the paper's four claims on the nano setting, as a page, as Markdown and as JSON."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from dataset_builders.asr_corpora import load_corpus
from dataset_builders.instructions import SELF_POWERED_TASKS
from recipes import figures
from recipes.evaluation.pages import STYLES, playable
from recipes.evaluation.tables import NOTE, comparisons, summary, to_markdown
from recipes.page import Examples, Facts, Picture, Table, Text, write_page
from recipes.training.callbacks import FOLLOWING, LOG, read_lines

# Names that this report has of its own for systems of `recipes.evaluate`.
NAMES = {"model": "self_powered", "model_reading": "self_powered_reading"}
LABELS = {
    "text_llm": "text LLM (reads the transcript)",
    "cascade": "cascade: the self-powered LSM transcribes, the text LLM reads",
    "self_powered": "self-powered LSM",
    "vanilla": "vanilla LSM (transcription only)",
    "self_powered_reading": "self-powered LSM, reads the transcript",
    "shuffled": "self-powered, another sentence's clip",
    "silence": "self-powered, silence",
    "swapped": "self-powered, another task's instruction",
}
COMPARED = ("text_llm", "self_powered", "vanilla")


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def scores_of(found: Mapping) -> dict:
    """What the report keeps of a system's results (`evaluation/results.py`): `tasks`, the share right of each;
    `following` and its `following_interval`; `transcript_copy`; `wer`. A figure that was not measured is left out."""
    whole, parts = found["figures"], found.get("parts", {})
    scores: dict = {"tasks": {name: part["figures"]["right"]["value"] for name, part in parts.items()}}
    for name in ("following", "transcript_copy"):
        if name in whole:
            scores[name] = whole[name]["value"]
    if "following" in whole:
        scores["following_interval"] = [round(whole["following"][side], 4) for side in ("low", "high")]
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
            interval = "–".join(percent(bound) for bound in scores.get("following_interval", ())) or "–"
            figures_ = [percent(scores["following"]), interval]
            lines.append([label, *figures_, percent(scores.get("transcript_copy")), percent(scores.get("wer"))])
    return ["", "following", "95 % interval", "transcript copies", "WER"], lines


def _questions(unseen: dict) -> tuple[list[str], list[list[str]]]:
    """Tasks that no training row had: share right per question, and transcript copies."""
    tasks = list(dict.fromkeys(task for scores in unseen.values() for task in scores["tasks"]))
    lines = []
    for name in COMPARED:
        if scores := unseen.get(name):
            shares = [percent(scores["tasks"].get(task)) for task in tasks]
            lines.append([LABELS[name], *shares, percent(scores.get("transcript_copy"))])
    return ["", *tasks, "transcript copies"], lines


def _attention(biases: Mapping[str, dict]) -> tuple[list[str], list[list[str]]]:
    """Shares of the saliency and of the attention, means over the layers."""
    lines = []
    for name, bias in biases.items():
        cells = [LABELS[name]]
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
    """Bars: share right per task, and transcript copies, for text LLM, vanilla and self-powered."""
    systems, scores = results["tasks"]["nano"]["systems"], {}
    for system, name in ((system, NAMES.get(system, system)) for system in ("text_llm", "model", "vanilla")):
        parts = systems[system]["parts"]
        scores[name] = {task: parts[task]["figures"]["right"] for task in SELF_POWERED_TASKS if task in parts}
        if "transcript_copy" in systems[system]["figures"]:
            scores[name]["transcript copies"] = systems[system]["figures"]["transcript_copy"]
    styles = {NAMES.get(system, system): style for system, style in STYLES.items()}
    styles = {name: (LABELS[name], *styles[name][1:]) for name in COMPARED}
    title = "Who does what is asked, who copies the transcript?"
    order = [*SELF_POWERED_TASKS, "transcript copies"]
    figures.plot_bars(scores, folder / "following", order, styles, "share of answers", title)


@matplotlib.rc_context(figures.PAPER)
def plot_training(training: Path, stem: Path) -> None:
    """Loss and following rate over the steps of both trainings."""
    figure = Figure(figsize=(figures.WIDTH, 2.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for system, line in (("model", "-"), ("vanilla", "--")):
        name, color = NAMES.get(system, system), STYLES[system][1]
        label = LABELS[name]
        losses = [(row["step"], row["loss"]) for row in read_lines(training / name / LOG) if "loss" in row]
        left.plot(*zip(*losses, strict=True), line, color=color, label=label)
        looks = [(row["step"], row["following"]) for row in read_lines(training / name / FOLLOWING)]
        if looks:
            right.plot(*zip(*looks, strict=True), line, marker="o", color=color, label=label)
    left.set(xlabel="step", ylabel="loss per response token", yscale="log")
    left.yaxis.set_major_formatter("{x:g}")
    right.set(xlabel="step", ylabel="following, validation clips", ylim=(-0.02, 1.02))
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", frameon=False)
    figures.save(figure, stem)


def examples(folder: Path, records: Sequence[dict]) -> list[dict]:
    """One clip per task: what the three models answered."""
    answers = {(record["model"], record["id"]): record for record in records}
    clips = {f"{clip['source']}/{clip['id']}": clip["audio"] for clip in load_corpus(folder / "corpus", "test")}
    items = []
    for task in SELF_POWERED_TASKS:
        record = next((row for row in records if row["model"] == "self_powered" and row["task"] == task), None)
        if record is None:
            continue
        said = {name: answers[name, record["id"]] for name in COMPARED if (name, record["id"]) in answers}
        items.append(
            {
                "instruction": record["instruction"],
                "transcript": record["transcript"],
                "audio": playable(clips[record["id"].removesuffix(f"/{task}")]),
                "answers": [(LABELS[name], said[name]["response"], said[name]["correct"]) for name in said],
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
    "The same LLM, encoder, clips and number of steps ({steps}) for both LSMs; only the training rows differ. Scored "
    "on {rows} (sentence, voice, instruction) triples: sentences, voices and wordings unseen in training. The text LLM "
    "was never taught to transcribe, so its WER says nothing. The last rows are controls: a model that listens, and "
    "does what it is told, must fail there."
)
TRACED_ABOUT = (
    "Saliency |Σ A ⊙ ∂L/∂A| of the text LLM's answers, traced in all three models, in the rows that predict the "
    "answer; means over layers in the table. Speech stands where the text LLM has the transcript. Per token: 1 is the "
    "average token that the answer can see. Definitions, intervals and every layer are in bias/*/report.html."
)


def write_report(
    folder: Path, report: dict, records: Sequence[dict], results: dict, biases: Mapping[str, dict]
) -> None:
    """Write `report.json`, `report.md`, `report.html` and the pictures into `folder`.

    Args:
        report: scores by model, `steps`, `rows`, `stages`, `seconds`, `unseen_tasks`.
        records: answers by model.
        results: of `recipes.evaluate`.
        biases: a bias.json for each of text_llm, vanilla and self_powered.
    """
    plot_following(results, folder)
    plot_training(folder / "training", folder / "training")
    figures.plot_layers({LABELS[name]: bias for name, bias in biases.items()}, folder / "layers")
    if biases["self_powered"]["similarity"]:
        figures.plot_similarity(biases["self_powered"]["similarity"], folder / "similarity")
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    about = ABOUT.format(steps=report["steps"]["self_powered"], rows=report["rows"])
    shown = examples(folder, records)
    (folder / "report.md").write_text(_markdown(report, results, biases, about, shown), encoding="utf-8")
    pictures = {
        "following": Picture(folder / "following", "Share right by task.", "Bars by task and model"),
        "layers": Picture(folder / "layers", "What the answer draws on, by layer.", "Lines over layers, three models"),
        "training": Picture(folder / "training", "Both trainings.", "Loss and following rate over steps"),
    }
    blocks = [
        Text(about, "In short"),
        Table("Scores", *_overview(report)),
        Text(NOTE, CLAIMS["tasks"]),
        Table("The figure that stands for each task", *summary(results)),
        Text("Following is the mean over six tasks of the share right.", CLAIMS["following"]),
        pictures["following"],
        Table("Plain questions, which no training row asked", *_questions(report["unseen_tasks"])),
        Text("The self-powered LSM reads the same prompts as the text LLM it came from.", CLAIMS["text"]),
        Table("Change of the share right against the text LLM", *comparisons(results)),
        Text(TRACED_ABOUT, CLAIMS["attention"]),
        pictures["layers"],
        Table("Means over layers", *_attention(biases)),
    ]
    if biases["self_powered"]["similarity"]:
        caption = "Speech and transcript inside the self-powered LSM: CKA, and cosine of the token most alike."
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

*Following*: mean over the six tasks of the share of right answers. *Transcript copies*: answers to tasks other than
repetition whose word error rate against the transcript is below 0.2. *WER*: of the plain transcription prompt.

![Share right per task](following.png)

Plain questions, which the text LLM answers and no training row asked (not counted above):

{to_markdown(*_questions(report["unseen_tasks"]))}

## {CLAIMS["text"]}

The self-powered LSM reads the same prompts, with the transcript in the slot, as the text LLM it came from:

{to_markdown(*comparisons(results))}

## {CLAIMS["attention"]}

{TRACED_ABOUT}

![Layers](layers.png)

{to_markdown(*_attention(biases))}

## Training

![Training](training.png)

## Answers to the same clips

{answers}

## Time

{report["seconds"]:.0f} s in all.

| stage | seconds |
|---|---|
{stages}
"""
