"""How an LLM answers: its generation settings, how long it can read, and its answer without thought and marks."""

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from transformers import (
    AutoConfig,
    GenerationConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import (
    cached_file,
)

from configuration_lsm import num_positions
from language_models.checkpoints import checkpoint_with

logger = logging.getLogger(__name__)


# One answer to a prompt, and that alone, whatever a checkpoint's generation settings are.
ONE_ANSWER = {"do_sample": False, "num_return_sequences": 1, "return_dict_in_generate": False}


GREEDY = {**ONE_ANSWER, "num_beams": 1}


# Generation settings that decide which others have a meaning.
DECIDING = ("do_sample", "num_beams", "return_dict_in_generate", "use_cache")


def never_write(generation_config: GenerationConfig, audio_token_id: int, pad_token_id: int | None) -> None:
    """Keep generation from writing the placeholder, and give it a pad token if it has none."""
    if generation_config.pad_token_id is None:
        generation_config.pad_token_id = pad_token_id
    generation_config._from_model_config = False  # it is now more than the LLM's config says
    generation_config.suppress_tokens = [*(generation_config.suppress_tokens or []), audio_token_id]


def valid_settings(given: dict, name: str) -> GenerationConfig:
    """Generation settings without those that have no effect beside the others (a temperature where nothing is
    sampled), or cannot be: transformers would refuse to save a model that has them. What is left out is logged.

    Args:
        given: the content of a `generation_config.json`.
        name: of the checkpoint, for the log.
    """
    kept, refused = {}, {}
    for setting in sorted(given, key=lambda setting: setting not in DECIDING):
        try:
            GenerationConfig(**kept, **{setting: given[setting]}).validate(strict=True)
            kept[setting] = given[setting]
        except (TypeError, ValueError):
            refused[setting] = given[setting]
    if refused:
        listed = ", ".join(f"{setting}={value}" for setting, value in refused.items())
        logger.warning("%s: these generation settings cannot be or have no effect, and are left out: %s", name, listed)
    return GenerationConfig(**kept)


def generation_settings(llm: str) -> GenerationConfig:
    """The `valid_settings` of an LLM, or of what an adapter is for."""
    source, revision = checkpoint_with("generation_config.json", llm)
    file = cached_file(source, "generation_config.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    if file is not None:
        given = json.loads(Path(file).read_text(encoding="utf-8"))
    else:  # an older checkpoint, whose settings are part of its configuration
        config = {"config_file_name": "config.json", "_from_model_config": True}
        given = GenerationConfig.from_pretrained(source, revision=revision, **config).to_diff_dict()
    return valid_settings(given, llm)


def changed_decoding(settings: GenerationConfig) -> dict:
    """What a checkpoint's generation settings change even in decoding without sampling."""
    neutral = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1, "length_penalty": 1.0}
    found = {name: getattr(settings, name, None) for name in neutral}
    return {name: value for name, value in found.items() if value not in (None, neutral[name])}


def context_of(config: AutoConfig) -> int | None:
    """Positions that the LLM has, None if its configuration does not say."""
    return num_positions(config.get_text_config())


def kv_bytes_per_token(config: AutoConfig, itemsize: int) -> int:
    """Bytes that keys and values of one token take in all layers."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * head_dim * itemsize


def read_answers(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]]) -> list[str]:
    """What was written, without special tokens, the white space around and the thought before it."""
    added = getattr(tokenizer, "added_tokens_encoder", {})
    marks = [added.get(mark) for mark in ("<think>", "</think>")]
    texts = tokenizer.batch_decode([_behind_thought(list(row), *marks) for row in rows], skip_special_tokens=True)
    return [without_thought(text) for text in texts]


def without_thought(text: str) -> str:
    """The answer that stands behind `<think>...</think>`; none behind a thought that was cut off."""
    return re.sub(r".*</think>|<think>.*", "", text, flags=re.DOTALL).strip()


def _behind_thought(ids: list[int], start: int | None, end: int | None) -> list[int]:
    """As `without_thought`, of tokens: in some vocabularies the marks are special tokens, of which no text tells."""
    if end in ids:
        return ids[len(ids) - ids[::-1].index(end) :]
    return ids[: ids.index(start)] if start in ids else ids
