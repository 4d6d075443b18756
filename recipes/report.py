"""The quickstart's report: one table, bars per task, loss curves and answers side by side."""

import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from dataset_builders.instructions import SELF_POWERED_TASKS

# Dark to light with hatching: told apart in grey, too.
STYLES = {
    "text_llm": ("text LLM (reads the transcript)", "#1b3a4b", ""),
    "self_powered": ("self-powered LSM", "#2a9d8f", "//"),
    "vanilla": ("vanilla LSM (transcription only)", "#e9a23b", ".."),
    "shuffled": ("self-powered, another sentence's clip", "#cccccc", "xx"),
    "silence": ("self-powered, silence", "#eeeeee", ""),
}


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def table(report: dict) -> str:
    """The scores of every model as a Markdown table."""
    lines = ["| | following | 95 % interval | transcript copies | WER |", "|---|---|---|---|---|"]
    for name, (label, _, _) in STYLES.items():
        if scores := report.get(name):
            interval = "–".join(percent(bound) for bound in scores.get("following_interval", ())) or "–"
            cells = [label, percent(scores["following"]), interval]
            cells += [percent(scores.get("transcript_copy")), percent(scores.get("wer"))]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def task_table(report: dict) -> str:
    """Share right per task and model as a Markdown table."""
    names = [name for name in STYLES if name in report]
    tasks = list(dict.fromkeys(task for name in names for task in report[name]["tasks"]))
    lines = ["| task | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for task in tasks:
        shares = [percent(report[name]["tasks"].get(task)) for name in names]
        lines.append(f"| {task} | {' | '.join(shares)} |")
    return "\n".join(lines)


def unseen_table(unseen: dict) -> str:
    """Tasks that no training row had: share right per question, and transcript copies, as a Markdown table."""
    tasks = list(dict.fromkeys(task for scores in unseen.values() for task in scores["tasks"]))
    lines = [f"| | {' | '.join(tasks)} | transcript copies |", "|---" * (len(tasks) + 2) + "|"]
    for name, scores in unseen.items():
        shares = [percent(scores["tasks"].get(task)) for task in tasks] + [percent(scores["transcript_copy"])]
        lines.append(f"| {STYLES[name][0]} | {' | '.join(shares)} |")
    return "\n".join(lines)


def bootstrap_interval(records: Sequence[dict], draws: int = 1000, seed: int = 0) -> list[float]:
    """95 % interval of the following rate: rows resampled within each task, 1000 times."""
    rng = np.random.default_rng(seed)
    means = []
    for task in SELF_POWERED_TASKS:
        if hits := [record["correct"] for record in records if record["task"] == task]:
            means.append(rng.choice(np.array(hits, dtype=float), (draws, len(hits))).mean(axis=1))
    return np.quantile(np.mean(means, axis=0), [0.025, 0.975]).round(4).tolist()


def plot_following(report: dict, path: Path) -> None:
    """Bars: following rate per task, and transcript copies, for text LLM, vanilla and self-powered."""
    names = ["text_llm", "self_powered", "vanilla"]
    groups = [*SELF_POWERED_TASKS, "transcript copies"]
    figure, axes = plt.subplots(figsize=(9, 3.8), layout="constrained")
    for offset, name in enumerate(names):
        label, color, hatch = STYLES[name]
        heights = [report[name]["tasks"].get(task, 0) for task in SELF_POWERED_TASKS]
        heights.append(report[name]["transcript_copy"])
        places = np.arange(len(groups)) + (offset - 1) * 0.27
        axes.bar(places, heights, 0.25, label=label, color=color, hatch=hatch, edgecolor="black", linewidth=0.5)
    axes.set_xticks(range(len(groups)), groups)
    axes.axvline(len(groups) - 1.5, color="black", linewidth=0.5)
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("share of answers")
    axes.set_title("Asked six different things about unseen speech: who does what is asked, who copies the transcript?")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def read_lines(path: Path) -> list[dict]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def plot_training(training: Path, path: Path) -> None:
    """Loss and following rate over the steps of both trainings."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name, line in (("self_powered", "-"), ("vanilla", "--")):
        label, color, _ = STYLES[name]
        losses = [(row["step"], row["loss"]) for row in read_lines(training / name / "log.jsonl") if "loss" in row]
        left.plot(*zip(*losses, strict=True), line, color=color, label=label)
        looks = [(row["step"], row["following"]) for row in read_lines(training / name / "following.jsonl")]
        if looks:
            right.plot(*zip(*looks, strict=True), line, marker="o", color=color, label=label)
    left.set(xlabel="step", ylabel="loss per response token", yscale="log", title="Training loss")
    right.set(xlabel="step", ylabel="following rate", ylim=(-0.02, 1.02), title="Following rate on validation clips")
    left.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def examples(records: Sequence[dict]) -> str:
    """One clip per task: what the three models answered."""
    answers = {(record["model"], record["id"]): record for record in records}
    lines = []
    for task in SELF_POWERED_TASKS:
        record = next((row for row in records if row["model"] == "self_powered" and row["task"] == task), None)
        if record is None:
            continue
        lines.append(f"**{record['instruction']}** — *{record['transcript']}*\n")
        for name in ("text_llm", "vanilla", "self_powered"):
            if answer := answers.get((name, record["id"])):
                lines.append(f"- {name} {'✓' if answer['correct'] else '✗'}: {answer['response']}")
        lines.append("")
    return "\n".join(lines)


def write_report(folder: Path, report: dict, records: Sequence[dict]) -> None:
    """Write `report.json`, `report.md` and the plots into `folder`."""
    plot_following(report, folder / "following.png")
    plot_training(folder / "training", folder / "training.png")
    stages = "\n".join(f"| {name} | {seconds:.0f} |" for name, seconds in report["stages"].items())
    text = f"""# Quickstart report

The same LLM, encoder, clips and number of steps ({report["steps"]["self_powered"]}); only the training rows differ.
Scored on {report["rows"]} (sentence, voice, instruction) triples: sentences, voices and wordings unseen in training.

{table(report)}

*Following*: mean over the six tasks of the share of right answers. *Transcript copies*: answers to tasks other than
repetition whose word error rate against the transcript is below 0.2. *WER*: of the plain transcription prompt
(nano's text LLM was never taught to transcribe). The last two rows are controls: a model that listens must fail there.

![Following rate per task](following.png)

{task_table(report)}

Plain questions, which the text LLM answers and no training row asked (not counted above):

{unseen_table(report["unseen_tasks"])}

![Training](training.png)

## Answers to the same clips

{examples(records)}
## Time

{report["seconds"]:.0f} s in all.

| stage | seconds |
|---|---|
{stages}
"""
    (folder / "report.md").write_text(text, encoding="utf-8")
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
