"""The model card of a trained LSM or adapter: its data, settings and results.

Call `write_trained_card` last, because `save_pretrained` of PEFT (which writes the local path of the base model) and
`create_model_card` of a trainer change or replace the `README.md`.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import yaml
from huggingface_hub import ModelCardData
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from recipes.reporting import figures
from recipes.reporting.markdown import percent, to_markdown
from recipes.reporting.model_card import LOAD, METHOD, TAGS, is_hub_id, mention, name_of, named, save_card

CITATION = """\
```bibtex
@inproceedings{yu2024selfpowered,
  title = {Self-Powered {LLM} Modality Expansion for Large Speech-Text Models},
  author = {Yu, Tengfei and others},
  booktitle = {Proceedings of EMNLP},
  year = {2024},
  eprint = {2410.03798},
  archivePrefix = {arXiv},
  url = {https://arxiv.org/abs/2410.03798}
}
```
"""
PROJECTOR_ONLY = (
    "This folder contains only the projector. Loading joins it to the encoder and the LLM that it was trained with, "
    "and refuses others. If they are not found, name their folders: `audio_model=FOLDER` and `text_model=FOLDER`.\n"
)
LOAD_ADAPTER = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoProcessor

lsm = AutoModelForCausalLM.from_pretrained({base}, trust_remote_code=True)
model = PeftModel.from_pretrained(lsm, {name})
processor = AutoProcessor.from_pretrained({name}, trust_remote_code=True)
"""
ASK = """\

messages = processor.conversation("List the keywords of the speech.", audio="speech.wav")
inputs = processor.apply_chat_template(
    messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
)
answer = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""
SECRETS = ("hub_token", "push_to_hub_token")
FIGURES = {"following": "following rate", "transcript_copy": "transcript copies", "wer": "word error rate"}


def write_trained_card(
    folder: str | Path,
    *,
    base_models: Sequence[str],
    datasets: Sequence[str],
    rows: Mapping[str, int],
    settings: Mapping[str, object],
    log: Sequence[Mapping],
    following: Sequence[Mapping],
    adapter_of: str | None,
    title: str,
) -> None:
    """Write `FOLDER/README.md` of a trained LSM or adapter, and `training.png` and `.svg` if there is a curve.

    Args:
        folder: folder of the checkpoint.
        base_models: Hub ids or folders of the encoder and the LLM; see `base_models_of`.
        datasets: Hub ids or folders of the training data.
        rows: number of rows in the mix by task.
        settings: values by name, as in a config of `recipes/sft.py`. Local files are written without their folders, and
            Hub tokens are left out.
        log: records of `log.jsonl`, in order.
        following: records of `following.jsonl`, in order.
        adapter_of: Hub id or folder of the LSM that an adapter is for; None if the checkpoint is a whole model.
        title: heading of the card, without a path.
    """
    adapted = adapter_of is not None
    # The base of an adapter on the Hub is the LSM that it is for, whose own card names encoder and LLM.
    bases = [adapter_of] if adapted and is_hub_id(adapter_of) else list(filter(is_hub_id, base_models))
    data = ModelCardData(
        base_model=bases or None,
        base_model_relation=("adapter" if adapted else "finetune") if bases else None,
        datasets=list(filter(is_hub_id, datasets)) or None,
        library_name="peft" if adapted else "transformers",
        pipeline_tag="audio-text-to-text",
        tags=TAGS,
    )
    lines = [
        f"# {title}\n",
        _about(base_models, adapter_of),
        *_usage(name_of(folder), adapter_of, bool(settings.get("projector_only"))),
        *_data(datasets, rows),
        *_settings(settings),
        *_results(log, following),
        *_picture(plot_curves(log, following, Path(folder) / "training")),
        f"## Citation\n\n{CITATION}",
    ]
    save_card(folder, data, lines)


@matplotlib.rc_context(figures.PAPER)
def plot_curves(log: Sequence[Mapping], following: Sequence[Mapping], stem: str | Path) -> list[Path]:
    """Plot the loss over the steps of a training and, if it was measured, the following rate. Returns the files that
    were written; an empty list if there is nothing to draw."""
    panels = {"loss per response token": _curve(log, "loss"), "following rate": _curve(following, "following")}
    panels = {label: points for label, points in panels.items() if points}
    if not panels:
        return []
    figure = Figure(figsize=(figures.WIDTH, 2), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False, sharex=True)[0]
    for axes, (label, points) in zip(grid, panels.items(), strict=True):
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, color="#1b3a4b", marker="o", markevery=max(1, len(points) // 8))
        axes.set(xlabel="step", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        if label == "following rate":
            axes.set_ylim(-0.02, 1.02)
        else:
            _scale(axes, values)
    return figures.save(figure, stem)


def _and(sources: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(map(mention, sources[:-1])), *map(mention, sources[-1:])]))


def _without_paths(value: object) -> object:
    """Return a setting with local files and folders shortened to their names."""
    if isinstance(value, Mapping):
        return {name: _without_paths(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(inner) for inner in value]
    if isinstance(value, Path):
        return name_of(value)
    if not isinstance(value, str) or "/" not in value or "://" in value or is_hub_id(value):
        return value
    is_prose = any(map(str.isspace, value)) and not os.path.isabs(value) and not os.path.exists(value)
    return value if is_prose else name_of(value)


def _about(base_models: Sequence[str], adapter_of: str | None) -> str:
    kind = "An LSM" if adapter_of is None else f"An adapter for the LSM {mention(adapter_of)}"
    origin = f" Made of {_and(base_models)}, it" if base_models else " It"
    return (
        f"{kind}: a frozen Whisper encoder, a window-level Q-Former and a causal LLM, which together answer "
        f"instructions about speech.{origin} was trained on the data below, after {METHOD}.\n"
    )


def _usage(name: str, adapter_of: str | None, projector_only: bool) -> list[str]:
    if adapter_of is None:
        alone = [PROJECTOR_ONLY] if projector_only else []
        return ["## How to use it\n", *alone, f"```python\n{LOAD.format(name=json.dumps(name))}{ASK}```\n"]
    load = LOAD_ADAPTER.format(name=json.dumps(name), base=json.dumps(named(adapter_of)))
    return [
        "## How to use it\n",
        "This folder contains only an adapter, which PEFT adds to the LSM that it was trained on.\n",
        f"```python\n{load}{ASK}```\n",
    ]


def _data(datasets: Sequence[str], rows: Mapping[str, int]) -> list[str]:
    lines = ["## Data\n", f"Trained on {_and(datasets)}.\n" if datasets else "The data set was not recorded.\n"]
    if rows:
        counts = [[task, str(count)] for task, count in sorted(rows.items())]
        lines.append(to_markdown(["task", "rows"], [*counts, ["all", str(sum(rows.values()))]]) + "\n")
    return lines


def _settings(settings: Mapping[str, object]) -> list[str]:
    kept = {name: value for name, value in settings.items() if name not in SECRETS}
    if not kept:
        return []
    text = yaml.safe_dump(_without_paths(kept), sort_keys=False, allow_unicode=True)
    about = "Settings of `recipes/sft.py` that differ from the defaults; local files appear without their folders.\n"
    return ["## Settings\n", about, f"```yaml\n{text}```\n"]


def _results(log: Sequence[Mapping], following: Sequence[Mapping]) -> list[str]:
    lines, losses = ["## Results\n"], _curve(log, "loss")
    if following:
        last = following[-1]
        cells = [[label, percent(last[name])] for name, label in FIGURES.items() if name in last]
        cells += [[f"{task}, right", percent(share)] for task, share in sorted(last.get("tasks", {}).items())]
        lines.append(f"Held-out instructions during the training, at step {last['step']}:\n")
        lines.append(to_markdown(["figure", "value"], cells) + "\n")
    if losses:
        step, loss = losses[-1]
        lines.append(f"Loss per response token: {loss:.4g} at step {step} of {log[-1]['max_steps']}.\n")
    if len(lines) == 1:
        lines.append("None were measured during the training; `recipes/evaluate.py` measures them.\n")
    return lines


def _picture(files: Sequence[Path]) -> list[str]:
    # Not every page that shows a card can show SVG.
    return ["[![Loss and following rate over the steps](training.png)](training.svg)\n"] if files else []


def _curve(lines: Sequence[Mapping], figure: str) -> list[tuple[int, float]]:
    """Return steps and values. A resumed training wrote some steps twice, of which only the later ones count."""
    points: list[tuple[int, float]] = []
    for line in lines:
        if figure in line:
            while points and points[-1][0] >= line["step"]:
                points.pop()
            points.append((line["step"], line[figure]))
    return points


def _scale(axes: Axes, values: Sequence[float]) -> None:
    """Make the axis logarithmic if its range is sure to contain a tick at 1, 2 or 5 of a decade."""
    positive = [value for value in values if value > 0 and math.isfinite(value)]
    if positive and max(positive) > 5 * min(positive):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter("{x:g}")
