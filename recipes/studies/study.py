"""The rows of a study as jobs, their results, and the table of all rows."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dataset_builders.files import read_lines, read_yaml, write_whole
from recipes.evaluation.metrics import FIGURES, main_figure
from recipes.reporting.figures import plot_study
from recipes.reporting.markdown import to_markdown
from recipes.studies.stages import Stage, make, plan, seconds
from recipes.training.callbacks import FOLLOWING, LOG

logger = logging.getLogger(__name__)

KEYS = {"base", "rows", "seeds", "trained", "unseen", "values"}
SHARE = 0.9  # `steps` is when the following rate reaches this share of the text LLM's
RESULTS = {
    "trained": "trained kinds",
    "unseen": "never-trained kinds",
    "text_kept": "text kept",
    "wer": "WER",
    "steps": "steps to 90 %",
}
BESIDE = {
    "seconds": "training (s)",
    "copies": "copies",
    "unseen_copies": "copies, never-trained",
    "silence": "silence",
    "shuffled": "other clip",
    "swapped": "other instruction",
    "text_llm": "text LLM",
    "unseen_text_llm": "text LLM, never-trained",
    "cascade": "cascade",
    "unseen_cascade": "cascade, never-trained",
    "cascade_wer": "cascade WER",
    "instruction_share": "saliency on the instruction",
    "speech_share": "saliency on the speech",
}
COUNTS = ("steps", "seconds")  # all others are shares
NOTE = (
    "The figures are means over seeds. The brackets go from the lowest to the highest end of the seeds' 95 % intervals "
    "(resampling questions), or from the lowest to the highest number of steps or seconds. Text kept is the change of "
    "the share of right answers from the transcript, relative to the text LLM. Where nobody knows the right answers, "
    "the agreement with the text LLM's answers (chrF) stands for the share of right ones. Steps to 90 % are steps of "
    "the last training until the following rate on the validation clips reached 90 % of the text LLM's; `k of n` means "
    "that only k of n seeds did. Training is the seconds of all trainings, with {workers} commands at the same time. "
    "Silence, other clip and other instruction are controls, where a model that listens and follows must fail."
)


@dataclass(frozen=True)
class Job:
    """A row with a seed, and the stages that it needs, by key."""

    row: str
    seed: int
    stages: dict[str, Stage]

    def is_whole(self, folder: Path) -> bool:
        return all((folder / stage.name).exists() for stage in self.stages.values())


def overrides(rows: Mapping[str, Mapping | None], name: str, above: tuple[str, ...] = ()) -> dict:
    """Return a row's changes to the base, including those of the row that it names in `of`.

    Raises:
        ValueError: a row does not exist, or rows name each other in `of`.
    """
    if name not in rows:
        raise ValueError(f"no row {name!r}; the rows are {', '.join(rows)}.")
    if name in above:
        raise ValueError(f"the rows {' → '.join((*above, name))} name each other in `of`; remove one of these.")
    own = {key: value for key, value in (rows[name] or {}).items() if key not in ("of", "seeds")}
    other = (rows[name] or {}).get("of")
    return merge(overrides(rows, other, (*above, name)), own) if other else own


def merge(settings: Mapping, changes: Mapping) -> dict:
    """Return the settings with the changes; the options of a stage are changed one by one."""
    changed = {
        key: {**(settings.get(key) or {}), **value} if isinstance(value, dict) else value
        for key, value in changes.items()
    }
    return {**settings, **changed}


def read(config: str | Path, values: Mapping[str, str] | None = None) -> dict:
    """Read a study's configuration, a YAML file with the keys `base`, `rows`, `trained`, `unseen` and `seeds`, and
    perhaps `values`, some of which the argument replaces.

    Raises:
        ValueError: the file has other keys, or a value that replaces none.
    """
    content = read_yaml(config)
    if not isinstance(content, dict) or {*content, "values"} != KEYS:
        keys = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(
            f"{config} has {keys}; expected the keys {', '.join(sorted(KEYS))}, of which `values` is optional."
        )
    defaults = content.get("values") or {}
    if unknown := sorted(set(values or ()) - set(defaults)):
        raise ValueError(f"{config} has no value {unknown[0]!r}; its values are {', '.join(defaults) or 'none'}.")
    return {**content, "values": {**defaults, **(values or {})}}


def jobs_of(config: Mapping, names: Sequence[str], seeds: Sequence[int], folder: Path) -> list[Job]:
    """Return the jobs of a study, in order: of all rows if there are no names, and with the seeds of the row or of the
    configuration if there are no seeds.

    Raises:
        ValueError: as in `overrides` and `plan`. Names the row.
    """
    jobs = []
    for name in names or config["rows"]:
        changes = overrides(config["rows"], name)
        wanted = ["evaluate", *changes.pop("also", [])]
        settings = merge(config["base"], changes)
        for place, seed in enumerate(seeds or (config["rows"][name] or {}).get("seeds", config["seeds"])):
            try:
                values = {**config["values"], "seed": seed}
                jobs.append((place, Job(name, seed, plan(settings, wanted, values, folder))))
            except ValueError as error:
                raise ValueError(f"row {name!r}: {error}") from error
    return [job for _, job in sorted(jobs, key=lambda pair: pair[0])]


def record_of(job: Job, folder: Path, trained: str, unseen: str) -> dict:
    """Return the figures of a row with one seed: `name`, `seed`, those of `RESULTS` and `BESIDE` (None if missing),
    `intervals`, `parts` (the share of right answers of each kind), `layers` and `folders`.

    Raises:
        ValueError: the evaluation lacks the task `trained` or `unseen`.
    """
    folders = {key: folder / stage.name for key, stage in job.stages.items()}
    tasks = json.loads((folders["evaluate"] / "results.json").read_text(encoding="utf-8"))["tasks"]
    if missing := {trained, unseen} - set(tasks):
        raise ValueError(f"{folders['evaluate']} has no task {missing.pop()!r}; it has {', '.join(tasks)}.")
    metrics = metrics_of(tasks[trained], tasks[unseen])
    log = next(filter(None, (read_lines(path / FOLLOWING) for path in reversed(folders.values()))), [])
    ceiling = metrics["text_llm"]["value"] if metrics["text_llm"] else 0.0
    bias = folders["bias"] / "bias.json" if "bias" in folders else None
    layers = json.loads(bias.read_text(encoding="utf-8"))["layers"] if bias else []
    spent = seconds(folder)
    values = {name: metric and metric["value"] for name, metric in metrics.items()} | {
        f"{part}_share": sum(layer[part] for layer in layers) / len(layers) if layers else None
        for part in ("instruction", "speech")
    }
    values["steps"] = next((line["step"] for line in log if line.get("following", 0) >= SHARE * ceiling > 0), None)
    values["seconds"] = sum(spent.get(path.name, 0) for path in folders.values() if any(path.rglob(LOG)))
    systems = [task["systems"]["model"] for task in (tasks[trained], tasks[unseen])]
    return {
        "name": job.row,
        "seed": job.seed,
        **{name: values[name] for name in (*RESULTS, *BESIDE)},
        "intervals": {name: [metric["low"], metric["high"]] for name, metric in metrics.items() if metric},
        "parts": {
            kind: (share(part["figures"], "right") or share(part["figures"], "agreement") or {}).get("value")
            for system in systems
            for kind, part in system.get("parts", {}).items()
        },
        "layers": [{part: layer[part] for part in ("instruction", "speech")} for layer in layers],
        "folders": {key: path.name for key, path in folders.items()},
    }


def metrics_of(trained: Mapping, unseen: Mapping) -> dict[str, dict | None]:
    """Return the figures of two tasks of `results.json` with their intervals; None for those that are missing."""

    def figure(task: Mapping, system: str, name: str | None = None, part: str | None = None) -> dict | None:
        scored = task["systems"].get(system, {})
        figures = (scored.get("parts", {}).get(part, scored) if part else scored).get("figures", {})
        return share(figures, name or main_figure(figures))

    def both(name: str, system: str, which: str | None = None) -> dict[str, dict | None]:
        return {name: figure(trained, system, which), f"unseen_{name}": figure(unseen, system, which)}

    controls = {control: figure(trained, control) for control in ("silence", "shuffled", "swapped")}
    return {
        "trained": figure(trained, "model"),
        "unseen": figure(unseen, "model"),
        "text_kept": trained["comparisons"].get("text_kept")
        or _less_than_all(figure(trained, "model_reading", "agreement")),
        "wer": figure(trained, "model", "wer", "transcription"),
        "cascade_wer": figure(trained, "cascade", "wer", "transcription"),
        **both("copies", "model", "transcript_copy"),
        **both("text_llm", "text_llm"),
        **both("cascade", "cascade"),
        **controls,
    }


def share(figures: Mapping, name: str | None) -> dict[str, float] | None:
    """Return a figure with its interval as a share of 1, also if it goes to 100; None if it is missing."""
    if name is None or name not in figures:
        return None
    scale = 1.0 if FIGURES[name].is_fraction else 0.01
    return {key: scale * figures[name][key] for key in ("value", "low", "high")}


def _less_than_all(agreement: dict | None) -> dict | None:
    """Return an agreement with the text LLM as a change: 0 is the same answers. None stays None."""
    return agreement and {key: value - 1 for key, value in agreement.items()}


def summary(records: Sequence[dict], name: str) -> dict | None:
    """Return a figure over a row's seeds: `value` (the mean), `low`, `high`, and `seeds`, the number of seeds that have
    it. None if no seed has it."""
    having = [record for record in records if record[name] is not None]
    if not having:
        return None
    bounds = [bound for record in having for bound in record["intervals"].get(name, [record[name]])]
    value = sum(record[name] for record in having) / len(having)
    return {"value": value, "low": min(bounds), "high": max(bounds), "seeds": len(having)}


def cell(records: Sequence[dict], name: str) -> str:
    figure = summary(records, name)
    if figure is None:
        return "–"
    if name not in COUNTS:
        return f"{100 * figure['value']:.1f} % ({100 * figure['low']:.1f} to {100 * figure['high']:.1f})"
    spread = f" ({figure['low']:.0f} to {figure['high']:.0f})" if figure["seeds"] > 1 else ""
    count = f", {figure['seeds']} of {len(records)}" if figure["seeds"] < len(records) else ""
    return f"{figure['value']:.0f}{spread}{count}"


def write(config: Mapping, records: Sequence[dict], failed: Mapping[str, str], workers: int, folder: Path) -> None:
    """Write `study.json`, `study.md` and the picture."""
    by_row = {name: [record for record in records if record["name"] == name] for name in config["rows"]}
    by_row = {name: group for name, group in by_row.items() if group}

    def table(columns: Mapping[str, str], cell_of: Callable[[Sequence[dict], str], str]) -> str:
        lines = [[name, *(cell_of(group, column) for column in columns)] for name, group in by_row.items()]
        return to_markdown(["row", *columns.values()], lines)

    def share(group: Sequence[dict], kind: str) -> str:
        shares = [record["parts"][kind] for record in group if record["parts"].get(kind) is not None]
        return f"{100 * sum(shares) / len(shares):.1f} %" if shares else "–"

    kinds = {kind: kind for record in records for kind in record["parts"]}
    seeds = {name: ", ".join(str(record["seed"]) for record in group) for name, group in by_row.items()}
    changes = [[name, seeds[name], json.dumps(overrides(config["rows"], name))] for name in by_row]
    parts = ["# Study", NOTE.format(workers=workers), table(RESULTS, cell), "Share of right answers by kind:"]
    parts += [table(kinds, share), "Controls and other systems:", table(BESIDE, cell)]
    parts += ["Changes of each row to the base:", to_markdown(["row", "seeds", "changes"], changes)]
    parts += [f"**{name} failed.**\n\n```\n{reason}\n```" for name, reason in failed.items()]
    write_whole(folder / "study.json", json.dumps({"rows": records, "failed": failed}, indent=1) + "\n")
    write_whole(folder / "study.md", "\n\n".join(parts) + "\n")
    if records:
        summaries = {name: {column: summary(group, column) for column in RESULTS} for name, group in by_row.items()}
        layers = {name: next((r["layers"] for r in group if r["layers"]), []) for name, group in by_row.items()}
        ceilings = {"trained": summary(records, "text_llm"), "unseen": summary(records, "unseen_text_llm")}
        plot_study(summaries, RESULTS, folder / "study", COUNTS, ceilings, layers)


def study(config: Mapping, names: Sequence[str], seeds: Sequence[int], workers: int, folder: Path) -> dict[str, str]:
    """Run the missing stages, and write the table whenever a row is complete; it also has rows of earlier runs.

    Returns:
        The reasons of failure by row and seed.
    """
    jobs = jobs_of(config, names, seeds, folder)
    by_key = {(job.row, job.seed): job for job in (*jobs_of(config, (), (), folder), *jobs)}
    whole: dict[tuple[str, int], dict] = {}
    failed: dict[str, str] = {}

    def update(*_) -> None:
        fresh = [key for key, job in by_key.items() if key not in whole and job.is_whole(folder)]
        for key in fresh:
            whole[key] = record_of(by_key[key], folder, config["trained"], config["unseen"])
            logger.info("%s with seed %d is complete", *key)
        if fresh or failed:
            write(config, [whole[key] for key in by_key if key in whole], failed, workers, folder)

    update()
    reasons = make((stage for job in jobs for stage in job.stages.values()), folder, workers, update)
    for job in jobs:
        if why := [reasons[stage.name] for stage in job.stages.values() if stage.name in reasons]:
            failed[f"{job.row}, seed {job.seed}"] = why[0]
    update()
    return failed
