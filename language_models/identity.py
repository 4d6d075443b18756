"""The identity of an LLM: its name, the commit or hash of its weights, and its chat template."""

import hashlib
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig

from language_models.checkpoints import load_config, load_processor
from language_models.tokenizers import text_processor
from processing_lsm import LsmProcessor

WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")


def identify(source: str) -> dict[str, str]:
    """Return `model`, the checkpoint's Hub id or folder name, and `revision`, its commit or the hash of its weights
    (`"sha256:"` and 16 hex digits)."""
    folder = Path(source)
    if not folder.is_dir():
        cached_files = (try_to_load_from_cache(source, name) for name in ("config.json", "adapter_config.json"))
        cached = next((file for file in cached_files if isinstance(file, str)), None)
        if cached is None:
            raise ValueError(f"{source} is neither a folder nor in the Hub cache, so its commit is unknown.")
        return {"model": source, "revision": Path(cached).parent.name}
    files = sorted(file for pattern in WEIGHT_PATTERNS for file in folder.glob(pattern))
    if not files:
        raise ValueError(f"{folder.name} holds no weights; expected {' or '.join(WEIGHT_PATTERNS)}.")
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return {"model": folder.resolve().name, "revision": f"sha256:{digest.hexdigest()[:16]}"}


def load_identity(llm: str | Path, template_settings: dict | None = None) -> tuple[LsmProcessor, dict, AutoConfig]:
    """Load processor, identity and configuration of an LLM or of the LLM in an LSM.

    The identity has `model`, `revision` and `template`, and `template_settings` if there are any. Those that are given
    are as in [`LsmProcessor`], for an LLM; an LSM has its own.

    Raises:
        ValueError: an LSM does not name the LLM inside, or template settings were given for an LSM.
    """
    config = load_config(llm, trust_remote_code=True)
    if config.model_type != "lsm":
        processor = text_processor(llm, template_settings)
        return processor, identify(str(llm)) | _template_of(processor), config
    if template_settings is not None:
        raise ValueError(f"{llm} is an LSM, which has its own template settings; compose it again to change them.")
    if config.responder is None:
        raise ValueError(f"{llm} does not name the LLM inside; compose it again with recipes/compose.py.")
    processor = load_processor(llm)
    return processor, config.responder | _template_of(processor), config


def _template_of(processor: LsmProcessor) -> dict:
    settings = {"template_settings": processor.template_settings} if processor.template_settings else {}
    return {"template": processor.template_hash, **settings}
