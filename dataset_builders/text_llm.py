"""A causal LLM as an LSM has it: its tokenizer and room for speech, its prompts, and which LLM it is."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from tokenizers import AddedToken
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    WhisperFeatureExtractor,
)

from configuration_lsm import num_positions
from processing_lsm import AUDIO_TOKEN, LsmProcessor

WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The LLM's tokenizer with the audio placeholder, and with EOS as pad token if it has none.

    Raises:
        ValueError: if it has no EOS token.
    """
    # Batches are padded where generation wants it; a training collator pads on the right by asking for it.
    tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
    if tokenizer.eos_token is None:
        raise ValueError(f"The tokenizer of {source} has no EOS token, so no answer could end; set its `eos_token`.")
    tokenizer.add_tokens([AddedToken(AUDIO_TOKEN, special=True, normalized=False)], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def make_room(llm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Give the placeholder an embedding, a new one only if the LLM has no spare ones. Returns its id."""
    audio_token_id = tokenizer.convert_tokens_to_ids(AUDIO_TOKEN)
    if audio_token_id >= llm.get_input_embeddings().num_embeddings:
        llm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        # The new row is never read (speech replaces it) nor written (suppressed), but it has a share in every
        # likelihood: none that differs from one loading to the next.
        with torch.no_grad():
            for embeddings in (llm.get_input_embeddings(), llm.get_output_embeddings()):
                embeddings.weight[audio_token_id:].zero_()
    never_write(llm.generation_config, audio_token_id, tokenizer.pad_token_id)
    return audio_token_id


def never_write(generation_config: GenerationConfig, audio_token_id: int, pad_token_id: int | None) -> None:
    """Keep generation from writing the placeholder, and give it a pad token if it has none."""
    if generation_config.pad_token_id is None:
        generation_config.pad_token_id = pad_token_id
    generation_config._from_model_config = False  # it is now more than the LLM's config says
    generation_config.suppress_tokens = [*(generation_config.suppress_tokens or []), audio_token_id]


def identify(source: str) -> dict[str, str]:
    """Which checkpoint this is: `model`, its Hub id or the folder's name, and `revision`, its commit or the hash of
    its weights (`"sha256:"` and 16 hex digits)."""
    folder = Path(source)
    if not folder.is_dir():
        cached = try_to_load_from_cache(source, "config.json")
        if not isinstance(cached, str):
            raise ValueError(f"{source} is neither a folder nor in the Hub cache, so its commit cannot be told.")
        return {"model": source, "revision": Path(cached).parent.name}
    files = sorted(file for pattern in WEIGHT_PATTERNS for file in folder.glob(pattern))
    if not files:
        raise ValueError(f"{folder.name} holds no weights ({', '.join(WEIGHT_PATTERNS)}).")
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return {"model": folder.resolve().name, "revision": f"sha256:{digest.hexdigest()[:16]}"}


def load_identity(llm: str | Path, template_settings: dict | None = None) -> tuple[LsmProcessor, dict, AutoConfig]:
    """Processor, identity and configuration of an LLM or of the LLM in an LSM.

    The identity is `model`, `revision` and `template`, and `template_settings` where the template asks for some.

    Args:
        template_settings: as in [`LsmProcessor`], of an LLM; an LSM has its own.

    Raises:
        ValueError: an LSM that does not say which LLM is inside, or that is to have other template settings.
    """
    config = AutoConfig.from_pretrained(str(llm), trust_remote_code=True)
    if config.model_type != "lsm":
        processor = text_processor(llm, template_settings)
        return processor, identify(str(llm)) | _template_of(processor), config
    if template_settings is not None:
        raise ValueError(f"{llm} is an LSM, which has its own template settings: compose it with those that you want.")
    if config.responder is None:
        raise ValueError(f"{llm} does not say which LLM is inside; compose it with recipes/compose.py.")
    processor = AutoProcessor.from_pretrained(str(llm), trust_remote_code=True)
    return processor, config.responder | _template_of(processor), config


def _template_of(processor: LsmProcessor) -> dict:
    settings = {"template_settings": processor.template_settings} if processor.template_settings else {}
    return {"template": processor.template_hash, **settings}


def text_processor(llm: str | Path, template_settings: dict | None = None) -> LsmProcessor:
    """The processor that an LSM composed of this LLM would have: it lays out the very same prompts."""
    return LsmProcessor(WhisperFeatureExtractor(), load_tokenizer(str(llm)), template_settings=template_settings)


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


def context_of(config: AutoConfig) -> int | None:
    """Positions that the LLM has, None if its configuration does not say."""
    return num_positions(config.get_text_config())


def kv_bytes_per_token(config: AutoConfig, itemsize: int) -> int:
    """Bytes that keys and values of one token take in all layers."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * head_dim * itemsize


def changed_decoding(settings: GenerationConfig) -> dict:
    """What a checkpoint's generation settings change even in decoding without sampling."""
    neutral = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1, "length_penalty": 1.0}
    found = {name: getattr(settings, name, None) for name in neutral}
    return {name: value for name, value in found.items() if value not in (None, neutral[name])}
