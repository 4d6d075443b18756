"""The model card of an LSM composed by `recipes/compose.py`. It contains no local paths.

`training_card.py` writes the card of a trained checkpoint.
"""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from configuration_lsm import LsmConfig
from dataset_builders.files import PARTIAL, write_whole
from recipes.reporting.markdown import to_markdown

METHOD = "[Self-Powered LLM Modality Expansion for Large Speech-Text Models](https://arxiv.org/abs/2410.03798)"
# `custom_code` makes the Hub add `trust_remote_code=True` to the code that it offers.
TAGS = ["lsm", "speech", "custom_code"]
LOAD = """\
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained({name}, trust_remote_code=True)
processor = AutoProcessor.from_pretrained({name}, trust_remote_code=True)
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


def write_base_card(folder: str | Path, audio: str, text: str, config: LsmConfig) -> None:
    """Write `FOLDER/README.md` of an LSM that was newly composed of the Whisper `audio` and the LLM `text`."""
    name = name_of(folder)
    data = ModelCardData(
        base_model=list(filter(is_hub_id, (audio, text))) or None,
        library_name="transformers",
        pipeline_tag="audio-text-to-text",
        tags=TAGS,
    )
    lines = [
        f"# {name}\n",
        f"**Not trained yet.** An LSM: the encoder of {mention(audio)} and the LLM {mention(text)}, joined by a "
        "window-level Q-Former. This projector has its initial, random weights, so the LLM cannot understand speech "
        f"yet: train it first, for example as in {METHOD}.\n",
        "## How it was composed\n",
        to_markdown(*_composition(audio, text, config)) + "\n",
        "The licences of both models apply.\n",
        "## How to load it\n",
        f"```python\n{LOAD.format(name=json.dumps(name))}```\n",
        "## How to train it\n",
        f"With the recipes of LSM:\n\n```bash\n{TRAIN.format(name=shlex.quote(name))}```\n",
    ]
    save_card(folder, data, lines)


def base_models_of(folder_or_repo: str | Path) -> list[str]:
    """Return the base models in a checkpoint's card: Hub ids in its order; an empty list if there is no card, or if it
    cannot be reached.

    Raises:
        ValueError: the metadata of the card is not valid YAML, or the argument is neither a folder nor a Hub id.
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
        raise ValueError(f"the metadata in the card of {folder_or_repo} is not valid YAML: {error}") from error
    listed = data.base_model or []
    # PEFT and TRL write local paths into the card, which are skipped here.
    return [name for name in ([listed] if isinstance(listed, str) else listed) if is_hub_id(name)]


def save_card(folder: str | Path, data: ModelCardData, lines: Sequence[str]) -> None:
    text = "\n".join([f"---\n{data.to_yaml()}\n---\n", *lines])
    write_whole(Path(folder) / "README.md", text)


def is_hub_id(source: str) -> bool:
    """Return whether this is a Hub id. A local path has priority, as in `from_pretrained`."""
    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return not Path(source).exists()


def name_of(folder: str | Path) -> str:
    """Return a folder's name without the suffix `.partial`, which it has while it is being written."""
    return Path(folder).resolve().name.removesuffix(PARTIAL)


def named(source: str) -> str:
    """Return a Hub id, or the name of a folder."""
    return source if is_hub_id(source) else name_of(source)


def mention(source: str) -> str:
    return f"`{source}`" if is_hub_id(source) else f"`{name_of(source)}` (a local folder)"


def _composition(audio: str, text: str, config: LsmConfig) -> tuple[list[str], list[list[str]]]:
    windows = {
        "fixed": f"{config.window_frames} encoder frames ({0.02 * config.window_frames:.2f} s)",
        "proportional": "a 90th of the longest clip in the batch",
    }
    qformer, responder = config.qformer_config, config.responder
    revision = f", revision `{responder['revision']}`" if responder else ""
    lines = [
        ["encoder", f"{mention(audio)}, frozen"],
        ["LLM", f"{mention(text)}{revision}"],
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
