"""A causal LLM as an LSM has it: its tokenizer and room for speech, its prompts, and which LLM it is."""

import contextlib
import hashlib
import json
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from tokenizers import AddedToken
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    WhisperFeatureExtractor,
)
from transformers.utils import (
    cached_file,
    find_adapter_config_file,
    is_protobuf_available,
    is_sentencepiece_available,
)

from configuration_lsm import num_positions
from processing_lsm import AUDIO_TOKEN, LsmProcessor

logger = logging.getLogger(__name__)

WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")
# One answer to a prompt, and that alone, whatever a checkpoint's generation settings are.
ONE_ANSWER = {"do_sample": False, "num_return_sequences": 1, "return_dict_in_generate": False}
GREEDY = {**ONE_ANSWER, "num_beams": 1}
# Generation settings that decide which others have a meaning.
DECIDING = ("do_sample", "num_beams", "return_dict_in_generate", "use_cache")


# Checkpoints: whole ones, and adapters with what they are for


def adapter_of(source: str | Path, revision: str | None = None) -> dict | None:
    """The `adapter_config.json` of an adapter, folder or Hub id; None for any other checkpoint."""
    file = find_adapter_config_file(str(source), revision=revision)
    return None if file is None else json.loads(Path(file).read_text(encoding="utf-8"))


def base_of(source: str | Path, revision: str | None = None) -> str:
    """What an adapter is for, folder or Hub id; any other checkpoint itself.

    A base that is not where the adapter says is looked for in and beside the adapter's folder, since folders are moved
    together.

    Raises:
        ValueError: the adapter names nothing, or a folder that is not here, or is of a type that cannot be merged.
    """
    adapter = adapter_of(source, revision)
    if adapter is None:
        return str(source)
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING  # takes seconds to import

    if not hasattr(PEFT_TYPE_TO_TUNER_MAPPING.get(adapter["peft_type"]), "merge_and_unload"):
        raise ValueError(f"{source} is an adapter of type {adapter['peft_type']}, which cannot be merged into its LLM.")
    base = adapter.get("base_model_name_or_path")
    if base is None:
        raise ValueError(f"{source} is an adapter whose adapter_config.json has no `base_model_name_or_path`.")
    folder = Path(source).resolve()
    moved = [near / Path(base).name for near in (folder, *folder.parents[:2]) if folder.is_dir()]
    found = [place for place in (Path(base), *moved) if place.is_dir()]
    if found:
        return str(found[0])
    try:
        validate_repo_id(base)
    except HFValidationError as error:
        raise ValueError(
            f"{source} is an adapter for {base}, which is no folder here: put that folder there or beside the adapter."
        ) from error
    return base


def open_model(
    source: str | Path, auto=AutoModelForCausalLM, *, revision: str | None = None, merge: bool = True, **settings
) -> PreTrainedModel:
    """The model of a checkpoint; an adapter is merged into what it is for.

    Args:
        source: folder or Hub id.
        auto: class of transformers whose `from_pretrained` opens what is no adapter.
        revision: of a Hub id.
        merge: False leaves the low-rank changes of an adapter out, and takes the modules that it saved whole.
        settings: of `from_pretrained`.

    Raises:
        ValueError: as in `base_of`, or weights are missing, or the adapter does not fit what it is for.
    """
    adapter = adapter_of(source, revision)
    if adapter is None:
        model, loaded = auto.from_pretrained(str(source), revision=revision, output_loading_info=True, **settings)
        refuse_missing(source, loaded["missing_keys"])
        return model
    from peft import PeftModel

    base = base_of(source, revision)
    model = open_model(base, auto, revision=adapter.get("revision"), **settings)
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with calling_peft():
        warnings.filterwarnings("error", "Found missing adapter keys")
        try:
            adapted = PeftModel.from_pretrained(model, str(source), revision=revision)
        except (RuntimeError, UserWarning) as error:
            raise ValueError(f"the adapter {source} does not fit {base}: {error}") from error
    model = adapted.merge_and_unload() if merge else adapted.unload()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in learns)
    model.name_or_path = base
    if "projector" in (adapter.get("modules_to_save") or ()):
        model.config.projector_trained = True
    return model


@contextlib.contextmanager
def calling_peft() -> Iterator[None]:
    """Without the warning of transformers for whoever reads a name that PEFT still reads."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def refuse_missing(source: str | Path, missing: set[str]) -> None:
    """Of a checkpoint, which would otherwise get random weights in their place."""
    if missing:
        raise ValueError(f"{source} lacks {len(missing)} of its weights, such as {sorted(missing)[:3]}.")


def where(file: str, source: str | Path, revision: str | None = None) -> tuple[str, str | None]:
    """The checkpoint that has this file, and its revision: `source`, or what that is an adapter for."""
    adapter = adapter_of(source, revision)
    if adapter is None or cached_file(
        str(source), file, revision=revision, _raise_exceptions_for_missing_entries=False
    ):
        return str(source), revision
    return where(file, base_of(source, revision), adapter.get("revision"))


def load_config(source: str | Path, revision: str | None = None, **settings):
    """The configuration of a checkpoint, or of what an adapter is for; `settings` of `AutoConfig.from_pretrained`."""
    source, revision = where("config.json", source, revision)
    return AutoConfig.from_pretrained(source, revision=revision, **settings)


def load_processor(source: str | Path, revision: str | None = None):
    """The processor of a speech LLM, or of what an adapter is for if it has none of its own."""
    source, revision = where("processor_config.json", source, revision)
    return AutoProcessor.from_pretrained(source, revision=revision, trust_remote_code=True)


# The LLM in it


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The LLM's tokenizer with the audio placeholder, and with EOS as pad token if it has none.

    Raises:
        ImportError: it is a sentencepiece model, which takes packages that are not installed.
        ValueError: if it has no EOS token.
    """
    # Batches are padded where generation wants it; a training collator pads on the right by asking for it.
    source, revision = where("tokenizer_config.json", source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, padding_side="left")
    except (ImportError, ValueError) as error:  # which would name tiktoken, whatever is missing
        model = cached_file(source, "tokenizer.model", revision=revision, _raise_exceptions_for_missing_entries=False)
        if model is None or (is_sentencepiece_available() and is_protobuf_available()):
            raise
        raise ImportError(
            f"the tokenizer of {source} is a sentencepiece model alone; pip install sentencepiece protobuf"
        ) from error
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


def non_text_token_ids(tokenizer: PreTrainedTokenizerBase, embeddings: int) -> list[int]:
    """The ids that stand for no text: those of special tokens, and those that no token has."""
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    text = set(tokenizer.get_vocab().values()) - special - set(tokenizer.all_special_ids)
    return [id for id in range(embeddings) if id not in text]


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
    source, revision = where("generation_config.json", llm)
    file = cached_file(source, "generation_config.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    if file is not None:
        given = json.loads(Path(file).read_text(encoding="utf-8"))
    else:  # an older checkpoint, whose settings are part of its configuration
        config = {"config_file_name": "config.json", "_from_model_config": True}
        given = GenerationConfig.from_pretrained(source, revision=revision, **config).to_diff_dict()
    return valid_settings(given, llm)


def identify(source: str) -> dict[str, str]:
    """Which checkpoint this is: `model`, its Hub id or the folder's name, and `revision`, its commit or the hash of
    its weights (`"sha256:"` and 16 hex digits)."""
    folder = Path(source)
    if not folder.is_dir():
        files = (try_to_load_from_cache(source, name) for name in ("config.json", "adapter_config.json"))
        cached = next((file for file in files if isinstance(file, str)), None)
        if cached is None:
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
    config = load_config(llm, trust_remote_code=True)
    if config.model_type != "lsm":
        processor = text_processor(llm, template_settings)
        return processor, identify(str(llm)) | _template_of(processor), config
    if template_settings is not None:
        raise ValueError(f"{llm} is an LSM, which has its own template settings: compose it with those that you want.")
    if config.responder is None:
        raise ValueError(f"{llm} does not say which LLM is inside; compose it with recipes/compose.py.")
    processor = load_processor(llm)
    return processor, config.responder | _template_of(processor), config


def parse_template_settings(text: str | None) -> dict | None:
    """The `template_settings` of [`LsmProcessor`] as a command line has them.

    Raises:
        ValueError: it is no JSON object.
    """
    try:
        found = None if text is None else json.loads(text)
    except json.JSONDecodeError:
        found = text
    if not isinstance(found, dict | None):
        example = '{"enable_thinking": true}'
        raise ValueError(f"--template-settings {text} is no JSON object; expected one such as '{example}'.")
    return found


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
