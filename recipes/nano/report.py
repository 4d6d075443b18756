"""Write the quickstart's report on the paper's four claims, as a page, as Markdown and as JSON."""

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
from recipes.reporting.markdown import percent, to_markdown
from recipes.reporting.page import Examples, Facts, Picture, Table, Text, render_markdown, write_page
from recipes.training.alignment import FOLDER as ALIGNMENT
from recipes.training.callbacks import FOLLOWING, LOG

# Systems of `recipes.evaluate` that have another name in this report.
NAMES = {"model": "self_powered", "model_reading": "self_powered_reading"}
LABELS = {
    "text_llm": "text LLM: reads the transcript",
    "cascade": "cascade: ours transcribes, and the text LLM reads the result",
    "self_powered": "self-powered (ours): a frozen LLM, and a projector that is aligned and distilled",
    "paper": "paper: self-powered rows, the whole LLM trained, cross-entropy",
    "vanilla": "vanilla: only transcription rows, the whole LLM trained, cross-entropy",
    "self_powered_reading": "ours reads: the transcript in place of the clip",
    "shuffled": "other clip: ours hears another sentence",
    "silence": "silence: ours hears nothing",
    "swapped": "other task: ours gets the instruction of another task",
}
SHORT = {name: label.partition(":")[0] for name, label in LABELS.items()}
COMPARED = ("text_llm", "cascade", "self_powered", "paper", "vanilla")
LSMS = COMPARED[2:]


def scores_of(scored: Mapping) -> dict:
    """Return the figures of a system's results (`evaluation/results.py`) that the report shows: `tasks`, the share of
    right answers to each; `following` (or `right`, for never-trained kinds) and its `_interval`; `transcript_copy`; and
    `wer`. Figures that were not measured are left out."""
    measured, parts = scored["figures"], scored.get("parts", {})
    scores: dict = {"tasks": {name: part["figures"]["right"]["value"] for name, part in parts.items()}}
    for name in ("following", "right", "transcript_copy"):
        if name in measured:
            scores[name] = measured[name]["value"]
    for name in {"following", "right"} & set(measured):
        scores[f"{name}_interval"] = [round(measured[name][side], 4) for side in ("low", "high")]
    if "transcription" in parts:
        scores["wer"] = parts["transcription"]["figures"]["wer"]["value"]
    return scores


def table(report: dict) -> str:
    """Return the scores of all models as a Markdown table."""
    return to_markdown(*_overview(report))


def _overview(report: dict) -> tuple[list[str], list[list[str]]]:
    lines = []
    for name, label in LABELS.items():
        if scores := report.get(name):
            unseen = report.get("unseen_tasks", {}).get(name, {})
            shares = [*_share(scores, "following"), *_share(unseen, "right")]
            lines.append([label, *shares, percent(scores.get("transcript_copy")), percent(scores.get("wer"))])
    interval = "95 % interval"
    return ["", "trained kinds", interval, "never-trained kinds", interval, "transcript copies", "WER"], lines


def _share(scores: Mapping, name: str) -> list[str]:
    """Return the cells of a share and its interval."""
    return [percent(scores.get(name)), "–".join(map(percent, scores.get(f"{name}_interval", ()))) or "–"]


def _kinds(report: dict) -> tuple[list[str], list[list[str]]]:
    """Return a table of the share of right answers to each kind of task, by model."""
    lines = []
    for trained, scores in (("yes", report), ("no", report["unseen_tasks"])):
        for kind in dict.fromkeys(kind for name in COMPARED for kind in scores[name]["tasks"]):
            shares = [percent(scores[name]["tasks"].get(kind)) for name in COMPARED]
            lines.append([kind, trained, *shares])
    return ["kind", "trained", *(SHORT[name] for name in COMPARED)], lines


def _attention(biases: Mapping[str, dict]) -> tuple[list[str], list[list[str]]]:
    """Return a table of the shares of saliency and attention, means over the layers."""
    keys = {"saliency": "layers", "attention": "attention", "per token": "per_token"}
    columns = [(title, role) for title in keys for role in ("instruction", "speech")]
    lines = []
    for name, bias in biases.items():
        means = [float(np.mean([layer[role] for layer in bias[keys[title]]])) for title, role in columns]
        lines.append([SHORT[name], *map(percent, means[:4]), *(f"{mean:.2f}" for mean in means[4:])])
    return ["", *(f"{title}, {role}" for title, role in columns)], lines


def plot_following(results: Mapping, folder: Path) -> None:
    """Plot for all systems the shares of right answers to trained and never-trained kinds, and of transcript copies."""
    trained, unseen = (results["tasks"][task]["systems"] for task in ("nano", "nano_unseen"))
    scores, systems = {}, {NAMES.get(system, system): system for system in trained}
    for name, system in systems.items():
        measured = trained[system]["figures"]
        scores[name] = {
            "trained kinds": measured.get("following"),
            "never trained": unseen[system]["figures"].get("right"),
            "copies": measured.get("transcript_copy"),
        }
    styles = {name: (SHORT[name], *STYLES[systems[name]][1:]) for name in LABELS if name in systems}
    title = "Following instructions, and copying the transcript"
    figures.plot_bars(scores, folder / "following", list(scores["text_llm"]), styles, "share of answers", title)


@matplotlib.rc_context(figures.PAPER)
def plot_training(training: Path, stem: Path) -> None:
    """Plot loss and following rate over the steps of all trainings, after those of their alignment."""
    figure = Figure(figsize=(figures.WIDTH, 2.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, system, line in (("self_powered", "model", "-"), ("paper", "paper", "-."), ("vanilla", "vanilla", "--")):
        style = {"color": STYLES[system][1], "label": SHORT[name]}
        logs = [read_lines(training / name / part / LOG) for part in (ALIGNMENT, "")]
        aligned = logs[0][-1]["step"] if logs[0] else 0
        for rows, first, linestyle in zip(logs, (0, aligned), (":", line), strict=True):
            losses = [(first + row["step"], row["loss"]) for row in rows if "loss" in row]
            left.plot(*zip(*losses, strict=True), linestyle, **style)
        rates = [(aligned + row["step"], row["following"]) for row in read_lines(training / name / FOLLOWING)]
        right.plot(*zip(*rates, strict=True), line, marker="o", **style)
    left.set(xlabel="step", ylabel="loss", yscale="log")
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter("")
    right.set(xlabel="step", ylabel="trained kinds, validation", ylim=(-0.02, 1.02))
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figures.save(figure, stem)


def examples(folder: Path, records: Sequence[dict]) -> list[dict]:
    """Return a clip for each kind of task, with the answers of the models."""
    answers = {(record["model"], record["id"]): record for record in records}
    clips = {f"{clip['source']}/{clip['id']}": clip["audio"] for clip in load_corpus(folder / "corpus", "test")}
    items = []
    for task in (*SELF_POWERED_TASKS, *UNSEEN_TASKS):
        record = next((row for row in records if row["model"] == "self_powered" and row["task"] == task), None)
        if record is None:
            continue
        shown = {name: answers[name, record["id"]] for name in COMPARED if (name, record["id"]) in answers}
        items.append(
            {
                "instruction": record["instruction"],
                "transcript": record["transcript"],
                "audio": playable(clips[record["id"].removesuffix(f"/{task}")]),
                "answers": [(SHORT[name], answer["response"], answer["correct"]) for name, answer in shown.items()],
            }
        )
    return items


CLAIMS = {
    "tasks": "1. What can it do? Recognition, translation, understanding, answering",
    "following": "2. Does it follow instructions?",
    "text": "3. Is it still as good with text as the text LLM?",
    "attention": "4. Does attention to the instruction recover?",
}
ABOUT = (
    "All models have the same text LLM, the same encoder and the same clips. Vanilla learns to transcribe ({vanilla} "
    "steps), and the paper's LSM to transcribe and to give the LLM's own answers ({paper} steps). Both train the whole "
    "LLM with cross-entropy. Ours first aligns its projector with the LLM's embeddings ({alignment} steps, without "
    "running the LLM). Then it learns from the paper's rows what the LLM would answer to the transcript "
    "({self_powered} steps), while its own LLM is frozen. All are scored on {rows} (sentence, voice, instruction) "
    "triples of six trained kinds of task, and on {unseen_rows} of six never-trained kinds, with sentences, voices and "
    "wordings that no training row has. The last three lines are controls, in which a model that listens and follows "
    "instructions must fail."
)
FOLLOWING_ABOUT = (
    "A share is the mean over the six kinds of the share of right answers. Transcript copies are answers to trained "
    "kinds other than repetition whose word error rate against the transcript is below 0.2. The WER is measured with "
    "the plain transcription prompt."
)
READING = "Ours reads the same prompts as the text LLM, with the transcript in the place of the clip."
TRAINING = (
    "The loss of each training (for ours, CTC of the alignment, dotted, then KL to the LLM that reads the transcript; "
    "for the others, cross-entropy), and the share of right answers to trained kinds on validation clips."
)
TRACED_ABOUT = (
    "Saliency |Σ A ⊙ ∂L/∂A| of the text LLM's answers in all models, for the positions that predict the answer; the "
    "table has means over layers. The speech is in the place of the text LLM's transcript. Per token: 1 is the average "
    "token that the answer can see. Definitions, intervals and all layers are in bias/*/report.html."
)


def _against_text(report: dict) -> str:
    """Return sentences that compare the shares of the LSMs with those of the text LLM."""
    sentences = []
    for kinds, scores, figure in (("trained", report, "following"), ("never-trained", report["unseen_tasks"], "right")):
        best = scores["text_llm"][figure]
        shares = (f"{SHORT[name]} {percent(scores[name][figure] / best if best else None)}" for name in LSMS)
        sentences.append(
            f"Right answers to {kinds} kinds, relative to the text LLM's share of {percent(best)}: {', '.join(shares)}."
        )
    return " ".join(sentences)


def write_report(
    folder: Path, report: dict, records: Sequence[dict], results: dict, biases: Mapping[str, dict]
) -> None:
    """Write `report.json`, `report.md`, `report.html` and the figures into `folder`.

    Args:
        report: scores by model, `unseen_tasks` (the same for never-trained kinds), `steps`, `rows`, `unseen_rows`,
            `stages` and `seconds`.
        records: answers of all models.
        results: results of `recipes.evaluate`.
        biases: contents of bias.json for the text LLM and each LSM.
    """
    plot_following(results, folder)
    plot_training(folder / "training", folder / "training")
    figures.plot_layers({SHORT[name]: bias for name, bias in biases.items()}, folder / "layers")
    write_whole(folder / "report.json", json.dumps(report, indent=2) + "\n")
    about = ABOUT.format(**report["steps"], rows=report["rows"], unseen_rows=report["unseen_rows"])
    blocks = [
        Text(about, "In short"),
        Table("Scores", *_overview(report)),
        Text(NOTE, CLAIMS["tasks"]),
        Table("The main figure of each task", *summary(results)),
        Text([FOLLOWING_ABOUT, _against_text(report)], CLAIMS["following"]),
        Picture(folder / "following", "Right answers, and copies.", "Bars by kind of task and model"),
        Table("Share of right answers to each kind", *_kinds(report)),
        Text(READING, CLAIMS["text"]),
        Table("Change of the share of right answers from the text LLM", *comparisons(results)),
        Text(TRACED_ABOUT, CLAIMS["attention"]),
        Picture(folder / "layers", "Saliency in each layer.", "Lines over layers, four models"),
        Table("Means over layers", *_attention(biases)),
    ]
    if similarity := biases["self_powered"]["similarity"]:
        figures.plot_similarity(similarity, folder / "similarity")
        caption = "Similarity of speech and transcript inside ours: CKA, and cosine of the most similar token."
        blocks.append(Picture(folder / "similarity", caption, "Lines over layers and maps of tokens"))
    blocks += [
        Text((), "Training"),
        Picture(folder / "training", TRAINING, "Loss and following rate over steps"),
        Text((), "The same clips"),
        Examples(examples(folder, records)),
        Facts({**report["stages"], "seconds in all": report["seconds"], "seed": report.get("seed")}),
    ]
    write_whole(folder / "report.md", render_markdown("Quickstart report", blocks))
    write_page(
        folder / "report.html", "Quickstart: who listens?", "The paper's four claims, on the nano setting", blocks
    )
