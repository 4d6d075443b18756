"""Make the tables of an evaluation, its Markdown page, and the metadata for the model card."""

from collections.abc import Mapping
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml

from recipes.evaluation.metrics import FIGURES, main_figure
from recipes.reporting.markdown import to_markdown
from recipes.reporting.model_card import is_hub_id

# The names of the Hub for the groups of tasks.
HUB_TASKS = {"asr": "automatic-speech-recognition", "st": "translation", "slu": "text-classification"}
HUB_TASKS |= {"qa": "question-answering"}
NOTE = (
    "The brackets contain 95 % intervals, from resampled rows. ↑: higher is better, ↓: lower is better. Shuffled, "
    "silence and swapped are controls: a model that listens and follows instructions must fail there."
)


def show(name: str, figure: Mapping | None) -> str:
    """Return a figure with its interval as the text of a cell."""
    if figure is None:
        return "–"
    scale, unit = (100, " %") if FIGURES[name].is_fraction else (1, "")
    value, low, high = (scale * figure[key] for key in ("value", "low", "high"))
    return f"{value:.1f}{unit} ({low:.1f}–{high:.1f})"


def summary(report: dict) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the summary: the main figure, with a row for each task and part and a column for each
    system."""
    systems = list(report["systems"])
    header, lines = ["task", "figure", *systems], []
    for name, task in report["tasks"].items():
        for part, by_system in by_part(task).items():
            if (figure := next(filter(None, map(main_figure, by_system.values())), None)) is None:
                continue
            cells = [show(figure, by_system.get(system, {}).get(figure)) for system in systems]
            label = f"{name}: {part}" if part else name
            arrow = "↓" if FIGURES[figure].lower_is_better else "↑"
            lines.append([label, f"{figure} {arrow}", *cells])
    for name, suite in report["suites"].items():
        cells = [show("suite", suite["systems"].get(system)) for system in systems]
        lines.append([f"{name} (mean of {', '.join(suite['tasks'])})", "suite ↑", *cells])
    return header, lines


def by_part(task: dict) -> dict[str, dict[str, dict]]:
    """Return the figures of a task by part ("" for the whole task) and system."""
    parts: dict[str, dict[str, dict]] = {"": {name: system["figures"] for name, system in task["systems"].items()}}
    for name, system in task["systems"].items():
        for part, scored in system.get("parts", {}).items():
            parts.setdefault(part, {})[name] = scored["figures"]
    return parts


def details(task: dict) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the table of all figures of a task, with a row for each system and part."""
    names = list(dict.fromkeys(n for by in by_part(task).values() for scored in by.values() for n in scored))
    lines = []
    for part, by_system in by_part(task).items():
        for system, scored in by_system.items():
            whole = task["systems"][system]
            last = [show("truncated", whole["truncated"]), show("rtfx", whole.get("rtfx"))] if not part else ["", ""]
            lines.append([system, part or "all", *(show(name, scored.get(name)) for name in names), *last])
    return ["system", "question", *names, "truncated", "× real time"], lines


def comparisons(report: dict) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the table of `compare`'s changes, in per cent of the text LLM's share of right
    answers."""
    lines = []
    for name, task in {**report["tasks"], **report["suites"]}.items():
        if task["comparisons"]:
            cells = (task["comparisons"].get(key) for key in ("forgetting", "text_kept"))
            lines.append([name, *("–" if cell is None else _change(cell) for cell in cells)])
    return ["task", "speech against the text LLM", "reading against the text LLM"], lines


def _change(cell: Mapping) -> str:
    value, low, high = (100 * cell[key] for key in ("value", "low", "high"))
    return f"{value:+.1f} % ({low:+.1f} to {high:+.1f})"


def markdown(report: dict) -> str:
    """Return the content of `results.md`."""
    judge = [f"Some answers are judged by {report['judge']['model']}."] if "judge" in report else []
    parts = [f"# {report['checkpoints']['model']}", NOTE, *judge, to_markdown(*summary(report))]
    if comparisons(report)[1]:
        parts += ["Relative change of the share of right answers:", to_markdown(*comparisons(report))]
    for name, task in report["tasks"].items():
        about = f"{task['description']} {task['rows']} questions about {task['utterances']} clips of {task['corpus']}."
        prompts = "\n\n".join("> " + prompt.replace("\n", "\n> ") for prompt in task["prompts"])
        parts += [f"## {name}", about, prompts, to_markdown(*details(task))]
    return "\n\n".join(parts) + "\n"


def model_index(report: dict) -> str:
    """Return the model's figures as YAML for the metadata of its card."""
    listed = [
        EvalResult(
            task_type=HUB_TASKS.get(task["group"], "text-generation"),
            dataset_type=Path(task["corpus"]).name if Path(task["corpus"]).exists() else task["corpus"],
            dataset_name=name,
            dataset_config=task["config"],
            dataset_split=task["split"],
            metric_type=figure,
            # The Hub merges the results of a corpus, so the name of the metric contains the task.
            metric_name=f"{name}, {part}: {figure}" if part else f"{name}: {figure}",
            metric_value=value["value"],
            metric_args={"low": value["low"], "high": value["high"]},
        )
        for name, task in report["tasks"].items()
        for part, by_system in by_part(task).items()
        for figure, value in by_system.get("model", {}).items()
    ]
    if not listed:
        return ""
    name = Path(report["checkpoints"]["model"]).name
    return ModelCardData(model_name=name, eval_results=listed).to_yaml() + "\n"


def eval_results(report: dict) -> dict[str, str]:
    """Return the model's main figures in the format of the Hub's `.eval_results/*.yaml`, one file for each task, by
    name.

    Only whole tasks whose data set is on the Hub have one. The format is documented at huggingface.co/docs/hub/
    eval-results. There, `task_id` is a task of the data set's `eval.yaml`; here it is the name of the configuration.
    """
    files = {}
    for name, task in report["tasks"].items():
        figures = task["systems"].get("model", {}).get("figures", {})
        figure, corpus = main_figure(figures), str(task["corpus"])
        if figure is None or name in report.get("limits", ()) or "/" not in corpus or not is_hub_id(corpus):
            continue
        notes = [f"{figure}{' in per cent' if FIGURES[figure].is_fraction else ''}", f"split {task['split']}"]
        notes += [f"judged by {report['judge']['model']}"] if task["judged"] else []
        entry = EvalResultEntry(
            corpus,
            task["config"] or "default",
            round((100 if FIGURES[figure].is_fraction else 1) * figures[figure]["value"], 2),
            notes=", ".join([*notes, f"{task['rows']} rows"]),
        )
        files[f"{name}.yaml"] = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
    return files
