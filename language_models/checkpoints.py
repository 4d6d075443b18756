"""Load checkpoints of any model, and adapters merged into their base models."""

import contextlib
import functools
import json
import logging
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, PreTrainedModel
from transformers.utils import cached_file, find_adapter_config_file

import modeling_lsm  # noqa: F401  registers this package's LSM, or transformers takes the code in the first checkpoint for all
from language_models.attention import attend_fast
from language_models.extras import extra

logger = logging.getLogger(__name__)


def adapter_of(source: str | Path, revision: str | None = None) -> dict | None:
    """Return the `adapter_config.json` of an adapter (folder or Hub id); None for any other checkpoint."""
    file = find_adapter_config_file(str(source), revision=revision)
    return None if file is None else json.loads(Path(file).read_text(encoding="utf-8"))


def base_of(source: str | Path, revision: str | None = None) -> str:
    """Return the folder or Hub id of an adapter's base model; for any other checkpoint, return the checkpoint itself.

    If the base is not at the path that the adapter names, it is searched in and beside the adapter's folder, because
    both are often moved together.

    Raises:
        ValueError: the adapter names no base, the named folder does not exist, or its type cannot be merged.
    """
    adapter = adapter_of(source, revision)
    if adapter is None:
        return str(source)
    with extra("train"):
        from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING  # takes seconds to import

    if not hasattr(PEFT_TYPE_TO_TUNER_MAPPING.get(adapter["peft_type"]), "merge_and_unload"):
        raise ValueError(f"{source} is an adapter of type {adapter['peft_type']}, which cannot be merged into its LLM.")
    base = adapter.get("base_model_name_or_path")
    if base is None:
        raise ValueError(f"{source} is an adapter whose adapter_config.json has no `base_model_name_or_path`.")
    folder = Path(source).resolve()
    moved = [near / Path(base).name for near in (folder, *folder.parents[:2]) if folder.is_dir()]
    if existing := next((place for place in (Path(base), *moved) if place.is_dir()), None):
        return str(existing)
    try:
        validate_repo_id(base)
    except HFValidationError as error:
        raise ValueError(
            f"{source} is an adapter for {base}, which does not exist here; put that folder beside the adapter."
        ) from error
    return base


def open_model(
    source: str | Path,
    auto=AutoModelForCausalLM,
    *,
    revision: str | None = None,
    merge: bool = True,
    run: bool = True,
    **settings,
) -> PreTrainedModel:
    """Load the model of a checkpoint. An adapter is merged into its base model.

    Args:
        source: folder or Hub id.
        auto: class of transformers whose `from_pretrained` loads the model or the base model.
        revision: branch, tag or commit on the Hub.
        merge: False leaves out the low-rank weights of an adapter, but takes its `modules_to_save`.
        run: False leaves the data type and the attention as they are in the checkpoint, for a model that is only
            written. Otherwise `dtype="auto"`, the default, is float32 where the checkpoint's is slow.
        settings: further arguments of `from_pretrained`.

    Raises:
        ValueError: as in `base_of`, or weights are missing, or the adapter does not fit its base model.
    """
    adapter = adapter_of(source, revision)
    if adapter is None:
        model, loaded = auto.from_pretrained(str(source), revision=revision, output_loading_info=True, **settings)
        refuse_missing(source, loaded["missing_keys"])
        if not run:
            return model
        if settings.get("dtype", "auto") == "auto":
            leave_slow_dtype(model)
        elif model.dtype in slow_dtypes():
            logger.warning(
                "%s is loaded in %s, which is slow on this CPU; float32 is faster (--dtype float32, or auto).",
                source,
                str(model.dtype).removeprefix("torch."),
            )
        if settings.get("attn_implementation") is None:
            attend_fast(model)
        return model
    base = base_of(source, revision)
    from peft import PeftModel  # `base_of` has checked that it is installed

    model = open_model(base, auto, revision=adapter.get("revision"), run=run, **settings)
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


@functools.cache
def has_fast_bf16() -> bool:
    """Whether matrix products in bfloat16 are faster here than in float32, or about as fast. On a CPU this is measured
    in some milliseconds, because some have the instructions and are still slower with them (`docs/speed.md`)."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    instructions = "avx512_bf16", "amx_bf16", "bf16"  # the last is that of ARM
    if not any(torch.cpu.get_capabilities().get(name) for name in instructions):
        return False
    matrices = [torch.ones(512, 512, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    rounds = [[_product_seconds(matrix) for matrix in matrices] for _ in range(5)]
    float32, bfloat16 = (min(seconds) for seconds in zip(*rounds, strict=True))
    return bfloat16 < 1.2 * float32


def _product_seconds(matrix: torch.Tensor) -> float:
    start = time.perf_counter()
    matrix @ matrix
    return time.perf_counter() - start


def slow_dtypes() -> set[torch.dtype]:
    """Return the data types that are slower than float32 here: on a CPU, float16, and bfloat16 too unless
    `has_fast_bf16`."""
    if torch.accelerator.is_available():
        return set()
    return {torch.float16} if has_fast_bf16() else {torch.float16, torch.bfloat16}


def leave_slow_dtype(model: PreTrainedModel) -> None:
    """Convert a model to float32 if its data type is slow here."""
    if model.dtype in slow_dtypes():
        model.float()


@contextlib.contextmanager
def calling_peft() -> Iterator[None]:
    """Suppress the deprecation warning of transformers that PEFT causes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def refuse_missing(source: str | Path, missing: set[str]) -> None:
    """Raise ValueError if a checkpoint lacks weights, because they would be initialised at random."""
    if missing:
        raise ValueError(f"{source} lacks {len(missing)} of its weights, such as {sorted(missing)[:3]}.")


def checkpoint_with(file: str, source: str | Path, revision: str | None = None) -> tuple[str, str | None]:
    """Return the checkpoint that has this file, and its revision: `source`, or the base model of the adapter."""
    adapter = adapter_of(source, revision)
    if adapter is None or cached_file(
        str(source), file, revision=revision, _raise_exceptions_for_missing_entries=False
    ):
        return str(source), revision
    return checkpoint_with(file, base_of(source, revision), adapter.get("revision"))


def load_config(source: str | Path, revision: str | None = None, **settings):
    """Load the configuration of a checkpoint or of an adapter's base. `settings` go to `AutoConfig.from_pretrained`."""
    source, revision = checkpoint_with("config.json", source, revision)
    return AutoConfig.from_pretrained(source, revision=revision, **settings)


def load_processor(source: str | Path, revision: str | None = None):
    """Load the processor of a speech LLM or an adapter; an adapter without a processor uses its base model's."""
    source, revision = checkpoint_with("processor_config.json", source, revision)
    return AutoProcessor.from_pretrained(source, revision=revision, trust_remote_code=True)
