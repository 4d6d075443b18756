"""The card of an LSM: what the Hub must know of it, and what whoever loads it should. It names no path of a machine.

`write_base_card` is for what `recipes/compose.py` puts together, `write_trained_card` for what `recipes/sft.py` makes
of it. The latter must come last, after every `save_pretrained` of PEFT, which writes the local path of the base into a
`README.md`, and every `create_model_card` of a trainer: both change or replace what is there.
"""

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from configuration_lsm import LsmConfig
from recipes.reporting.markdown import to_markdown

METHOD = "[Self-Powered LLM Modality Expansion for Large Speech-Text Models](https://arxiv.org/abs/2410.03798)"
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
# `custom_code` makes the Hub add `trust_remote_code=True` to the code that it offers.
TAGS = ["lsm", "speech", "custom_code"]
LOAD = """\
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained({name}, trust_remote_code=True)
processor = AutoProcessor.from_pretrained({name}, trust_remote_code=True)
"""
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
TRAIN = """\
# The LLM inside answers instructions over the transcripts of an ASR corpus ...
python -m dataset_builders.self_powered build --llm {name} --corpus librispeech --split train.clean.100 \\
    --tasks continuation repetition keyword intent sentiment translation transcription=inf --tasks-per-utterance 2 \\
    --output data/self_powered
# ... and the LSM learns to give those answers from speech.
accelerate launch recipes/sft.py --model_name_or_path {name} --dataset_name data/self_powered \\
    --dataset_train_split train.clean.100 --output_dir checkpoints/lsm
"""
SECRETS = ("hub_token", "push_to_hub_token")
FIGURES = {"following": "following rate", "transcript_copy": "transcript copies", "wer": "word error rate"}


def write_base_card(folder: str | Path, audio: str, text: str, config: LsmConfig) -> None:
    """Write `FOLDER/README.md` of a freshly composed LSM.

    Args:
        folder: of the LSM.
        audio: Hub id or folder of the Whisper whose encoder it has.
        text: Hub id or folder of its LLM.
        config: of the LSM.
    """
    name = _name_of(folder)
    data = ModelCardData(
        base_model=list(filter(_is_hub_id, (audio, text))) or None,
        library_name="transformers",
        pipeline_tag="audio-text-to-text",
        tags=TAGS,
    )
    lines = [
        f"# {name}\n",
        f"**Not trained yet.** An LSM: the encoder of {_mention(audio)} and the LLM {_mention(text)}, joined by a "
        "window-level Q-Former. This projector has its initial, random weights, so the LLM can make nothing of what it "
        f"hears: train it first, for example as in {METHOD}.\n",
        "## How it was composed\n",
        to_markdown(*_composition(audio, text, config)) + "\n",
        "The licences of both models hold for it.\n",
        "## How to load it\n",
        f"```python\n{LOAD.format(name=json.dumps(name))}```\n",
        "## How to train it\n",
        f"With the recipes of LSM:\n\n```bash\n{TRAIN.format(name=shlex.quote(name))}```\n",
    ]
    _save(folder, data, lines)


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
    """Write `FOLDER/README.md` of a trained LSM or of an adapter, and `training.png` and `.svg` if there is a curve.

    Args:
        folder: of the checkpoint.
        base_models: Hub ids or folders of what the LSM was made of; see `base_models_of`.
        datasets: Hub ids or folders of what it learned from.
        rows: task to the number of rows in the mix.
        settings: name to value as in a config of `recipes/sft.py`. Local files are written by their names alone, and
            Hub tokens not at all.
        log: lines of `log.jsonl`, as they were written.
        following: lines of `following.jsonl`, as they were written.
        adapter_of: Hub id or folder of the LSM that an adapter is for; None if the checkpoint is a whole model.
        title: heading of the card, without a path.
    """
    from recipes.reporting.curves import plot_curves  # matplotlib, which a card without a picture does not need

    adapted = adapter_of is not None
    # What an adapter is loaded onto is its base on the Hub; what that was made of, its own card says.
    bases = [adapter_of] if adapted and _is_hub_id(adapter_of) else list(filter(_is_hub_id, base_models))
    data = ModelCardData(
        base_model=bases or None,
        base_model_relation=("adapter" if adapted else "finetune") if bases else None,
        datasets=list(filter(_is_hub_id, datasets)) or None,
        library_name="peft" if adapted else "transformers",
        pipeline_tag="audio-text-to-text",
        tags=TAGS,
    )
    lines = [
        f"# {title}\n",
        _about(base_models, adapter_of),
        *_usage(_name_of(folder), adapter_of),
        *_data(datasets, rows),
        *_settings(settings),
        *_results(log, following),
        *_picture(plot_curves(log, following, Path(folder) / "training")),
        f"## Citation\n\n{CITATION}",
    ]
    _save(folder, data, lines)


def base_models_of(folder_or_repo: str | Path) -> list[str]:
    """What a checkpoint's card says that it was made of.

    Args:
        folder_or_repo: folder or Hub id of a checkpoint.

    Returns:
        Hub ids in the order of the card; none if there is no card, or none that can be reached.

    Raises:
        ValueError: the head of the card cannot be read, or this is neither a folder nor a Hub id.
    """
    folder = Path(folder_or_repo)
    card = folder / "README.md"
    if folder.is_dir() and not card.is_file():
        return []
    try:
        source = card if folder.is_dir() else str(folder_or_repo)
        data = ModelCard.load(source, ignore_metadata_errors=True).data
    except EntryNotFoundError:
        return []
    except yaml.YAMLError as error:
        raise ValueError(f"the head of the card of {folder_or_repo} is no YAML: {error}") from error
    listed = data.base_model or []
    # PEFT and TRL write the local path that a model was loaded from.
    return [name for name in ([listed] if isinstance(listed, str) else listed) if _is_hub_id(name)]


def _save(folder: str | Path, data: ModelCardData, lines: Sequence[str]) -> None:
    text = "\n".join([f"---\n{data.to_yaml()}\n---\n", *lines])
    partial = Path(folder) / "README.md.partial"
    ModelCard(text).save(partial)
    partial.replace(partial.with_name("README.md"))


# Names


def _is_hub_id(source: str) -> bool:
    """Whether this names something on the Hub. What is here comes first, as it does for `from_pretrained`."""
    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return not Path(source).exists()


def _name_of(folder: str | Path) -> str:
    """A folder's name when it is done: until then some are called `NAME.partial`."""
    return Path(folder).resolve().name.removesuffix(".partial")


def _named(source: str) -> str:
    """A Hub id, or the name of what lies in a folder."""
    return source if _is_hub_id(source) else _name_of(source)


def _mention(source: str) -> str:
    return f"`{source}`" if _is_hub_id(source) else f"`{_name_of(source)}` (a local folder)"


def _and(sources: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(map(_mention, sources[:-1])), *map(_mention, sources[-1:])]))


def _without_paths(value: object) -> object:
    """A setting in which files and folders are named by their names alone."""
    if isinstance(value, Mapping):
        return {name: _without_paths(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(inner) for inner in value]
    if isinstance(value, Path):
        return _name_of(value)
    if not isinstance(value, str) or "/" not in value or "://" in value or _is_hub_id(value):
        return value
    is_prose = any(map(str.isspace, value)) and not os.path.isabs(value) and not os.path.exists(value)
    return value if is_prose else _name_of(value)


# Parts of the cards


def _composition(audio: str, text: str, config: LsmConfig) -> tuple[list[str], list[list[str]]]:
    windows = {
        "fixed": f"{config.window_frames} encoder frames ({0.02 * config.window_frames:.2f} s)",
        "proportional": "a 90th of the longest clip in the batch",
    }
    qformer, responder = config.qformer_config, config.responder
    revision = f", revision `{responder['revision']}`" if responder else ""
    lines = [
        ["encoder", f"{_mention(audio)}, frozen"],
        ["LLM", f"{_mention(text)}{revision}"],
        ["window", f"{windows[config.window_mode]}, `{config.window_mode}`"],
        ["queries (speech tokens) per window", str(config.queries_per_window)],
        ["padding of audio", f"`{config.audio_padding}`"],
        [
            "Q-Former",
            f"{qformer.num_hidden_layers} layers, hidden size {qformer.hidden_size}, {qformer.num_attention_heads} "
            f"heads, feed-forward {qformer.intermediate_size}",
        ],
    ]
    return ["part", "setting"], lines


def _about(base_models: Sequence[str], adapter_of: str | None) -> str:
    kind = "An LSM" if adapter_of is None else f"An adapter for the LSM {_mention(adapter_of)}"
    origin = f" Made of {_and(base_models)}, it" if base_models else " It"
    return (
        f"{kind}: a frozen Whisper encoder, a window-level Q-Former and a causal LLM, which together answer "
        f"instructions about speech.{origin} was trained on the data below, after {METHOD}.\n"
    )


def _usage(name: str, adapter_of: str | None) -> list[str]:
    if adapter_of is None:
        return ["## How to use it\n", f"```python\n{LOAD.format(name=json.dumps(name))}{ASK}```\n"]
    load = LOAD_ADAPTER.format(name=json.dumps(name), base=json.dumps(_named(adapter_of)))
    return [
        "## How to use it\n",
        "This folder holds an adapter alone; PEFT puts it onto the LSM that it was trained on.\n",
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
    about = "What `recipes/sft.py` was told, local files by their names alone; for all else its defaults held.\n"
    return ["## Settings\n", about, f"```yaml\n{text}```\n"]


def _results(log: Sequence[Mapping], following: Sequence[Mapping]) -> list[str]:
    lines, losses = ["## Results\n"], curve_of(log, "loss")
    if following:
        look = following[-1]
        cells = [[label, _percent(look[name])] for name, label in FIGURES.items() if name in look]
        cells += [[f"{task}, right", _percent(share)] for task, share in sorted(look.get("tasks", {}).items())]
        lines.append(f"Held-out instructions, asked while it was trained, at step {look['step']}:\n")
        lines.append(to_markdown(["figure", "value"], cells) + "\n")
    if losses:
        step, loss = losses[-1]
        lines.append(f"Loss per response token: {loss:.4g} at step {step} of {log[-1]['max_steps']}.\n")
    if len(lines) == 1:
        lines.append("None were measured while it was trained; `recipes/evaluate.py` measures them.\n")
    return lines


def _picture(files: Sequence[Path]) -> list[str]:
    # Not every page that shows a card shows SVG.
    return ["[![Loss and following rate over the steps](training.png)](training.svg)\n"] if files else []


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def curve_of(lines: Sequence[Mapping], figure: str) -> list[tuple[int, float]]:
    """Steps and values. A training that was killed and went on wrote some steps twice: only the later ones count."""
    points: list[tuple[int, float]] = []
    for line in lines:
        if figure in line:
            while points and points[-1][0] >= line["step"]:
                points.pop()
            points.append((line["step"], line[figure]))
    return points
