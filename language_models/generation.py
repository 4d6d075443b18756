"""Generation settings of an LLM, the length of its context, and the text of its answers."""

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import cached_file

from configuration_lsm import num_positions
from language_models.checkpoints import checkpoint_with

logger = logging.getLogger(__name__)

# One answer per prompt, whatever the generation settings of the checkpoint are.
ONE_ANSWER = {"do_sample": False, "num_return_sequences": 1, "return_dict_in_generate": False}
GREEDY = {**ONE_ANSWER, "num_beams": 1}
# Generation settings that decide which of the others have an effect.
DECIDING = ("do_sample", "num_beams", "return_dict_in_generate", "use_cache")


def never_write(generation_config: GenerationConfig, audio_token_id: int, pad_token_id: int | None) -> None:
    """Suppress the audio placeholder in generation, and set a pad token if there is none."""
    if generation_config.pad_token_id is None:
        generation_config.pad_token_id = pad_token_id
    generation_config._from_model_config = False  # it now differs from the LLM's config
    generation_config.suppress_tokens = [*(generation_config.suppress_tokens or []), audio_token_id]


def valid_settings(settings: dict, name: str) -> GenerationConfig:
    """Return generation settings without the invalid ones and those without effect (such as a temperature without
    sampling), because transformers refuses to save a model with them. The removed settings are logged, with the name of
    the checkpoint."""
    kept, refused = {}, {}
    for setting, value in sorted(settings.items(), key=lambda item: item[0] not in DECIDING):
        try:
            GenerationConfig(**kept, **{setting: value}).validate(strict=True)
            kept[setting] = value
        except (TypeError, ValueError):
            refused[setting] = value
    if refused:
        listed = ", ".join(f"{setting}={value}" for setting, value in refused.items())
        logger.warning("%s: generation settings that are invalid or have no effect are left out: %s", name, listed)
    return GenerationConfig(**kept)


def generation_settings(llm: str) -> GenerationConfig:
    """Return the `valid_settings` of an LLM or of an adapter's base model."""
    source, revision = checkpoint_with("generation_config.json", llm)
    file = cached_file(source, "generation_config.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    if file is not None:
        settings = json.loads(Path(file).read_text(encoding="utf-8"))
    else:  # an older checkpoint, with the settings in its config.json
        config = {"config_file_name": "config.json", "_from_model_config": True}
        settings = GenerationConfig.from_pretrained(source, revision=revision, **config).to_diff_dict()
    return valid_settings(settings, llm)


def changed_decoding(settings: GenerationConfig) -> dict:
    """Return the generation settings of a checkpoint that change decoding even without sampling."""
    neutral = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1, "length_penalty": 1.0}
    values = {name: getattr(settings, name, None) for name in neutral}
    return {name: value for name, value in values.items() if value not in (None, neutral[name])}


def context_of(config: AutoConfig) -> int | None:
    """Return the number of positions of the LLM, None if its configuration does not say."""
    return num_positions(config.get_text_config())


def kv_bytes_per_token(config: AutoConfig, itemsize: int) -> int:
    """Return the bytes that the keys and values of one token take in all layers."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * head_dim * itemsize


def read_answers(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]]) -> list[str]:
    """Decode answers without special tokens, without surrounding white space, and without `<think>...</think>`."""
    added = getattr(tokenizer, "added_tokens_encoder", {})
    marks = [added.get(mark) for mark in ("<think>", "</think>")]
    texts = tokenizer.batch_decode([_behind_thought(list(row), *marks) for row in rows], skip_special_tokens=True)
    return [without_thought(text) for text in texts]


def without_thought(text: str) -> str:
    """Return the answer after `<think>...</think>`; empty if the thought was cut off."""
    return re.sub(r".*</think>|<think>.*", "", text, flags=re.DOTALL).strip()


def _behind_thought(ids: list[int], start: int | None, end: int | None) -> list[int]:
    """As `without_thought`, for token ids: in some vocabularies the marks are special tokens, which decoding skips."""
    if end in ids:
        return ids[len(ids) - ids[::-1].index(end) :]
    return ids[: ids.index(start)] if start in ids else ids
