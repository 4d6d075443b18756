"""Estimate the memory of a training on one device from shapes, before anything is downloaded."""

import os
from dataclasses import dataclass

import torch
from accelerate import PartialState

from configuration_lsm import LsmConfig
from modeling_lsm import LsmForConditionalGeneration
from recipes.training.arguments import LsmScriptArguments, LsmTrainingArguments
from recipes.training.costs import count, count_frozen_audio
from recipes.training.objectives import CHUNK

GIB = 2**30
SHARDINGS = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
BYTES = {"float32": 4, "auto": 4, None: 4, "bfloat16": 2, "float16": 2}
OVERHEAD_GIB = 1.5  # for a CUDA context, libraries and fragmentation


@dataclass(frozen=True)
class Target:
    """The machines on which the training will run."""

    devices: int = 1  # number of GPUs
    memory_gib: float | None = None  # of one GPU
    peak_tflops: float | None = None  # peak rate of one GPU in the training's precision, to estimate the time
    # What the GPUs divide among themselves: nothing (ddp), the optimizer's state (zero1), also gradients (zero2), or
    # also weights (zero3, fsdp2).
    sharding: str = "ddp"

    def __post_init__(self):
        if self.sharding not in SHARDINGS:
            raise ValueError(f"target: sharding {self.sharding!r} is unknown; expected one of {', '.join(SHARDINGS)}.")
        if self.devices < 1:
            raise ValueError(f"target: devices {self.devices} must be 1 or more.")

    @classmethod
    def here(cls, training_args: LsmTrainingArguments) -> "Target":
        """Return this machine, with the processes and the sharding that were launched."""
        sharding = "ddp"
        if training_args.deepspeed_plugin is not None and training_args.deepspeed_plugin.zero_stage:
            sharding = f"zero{training_args.deepspeed_plugin.zero_stage}"
        elif os.environ.get("ACCELERATE_USE_FSDP", "false") == "true" and torch.cuda.is_available():
            sharding = "fsdp2"  # without GPUs accelerate does not shard
        return cls(PartialState().num_processes, None, training_args.peak_tflops, sharding)


def adapter_weights(model: LsmForConditionalGeneration, rank: int) -> int:
    """Return the number of LoRA weights for all attention and feed-forward matrices of the LLM."""
    layers = model.model.language_model.named_modules()
    matrices = (module for name, module in layers if name.endswith("_proj") and hasattr(module, "in_features"))
    return sum(rank * (matrix.in_features + matrix.out_features) for matrix in matrices)


def estimate(
    model: LsmForConditionalGeneration,
    script_args: LsmScriptArguments,
    training_args: LsmTrainingArguments,
    model_args,
    target: Target,
    row: dict[str, int],
) -> dict[str, float]:
    """Return the GiB on one device for weights, gradients and so on.

    With AdamW in mixed precision, a weight that learns takes 16 bytes (float32 weight, gradient and two moments) and,
    during a step, 2 more for its copy in half precision; a frozen weight takes its own size. Activations are those of
    decoder layers with a gated feed-forward block; with checkpointing, one hidden state per layer, and one layer.

    Args:
        model: the LSM; it may be on the meta device.
        script_args, training_args, model_args: arguments of the recipe.
        target: the machines on which the training will run.
        row: `frames`, `tokens`, `labels` of the largest row; all rows of the batch are assumed to be so large.
    """
    learning, frozen = _weights(model, script_args.llm, model_args)
    if training_args.objective == "distill" and script_args.llm == "full":
        frozen += 2 * _llm_weights(model)  # the teacher
    if target.sharding.startswith("zero"):  # DeepSpeed keeps weights and gradients in half precision
        weights, gradients, moments = 2 * learning, 2 * learning, 12 * learning
    else:
        copies = 2 * learning if training_args.bf16 or training_args.fp16 else 0
        weights, gradients, moments = 4 * learning + copies, 4 * learning, 8 * learning
    parts = {
        "weights": (weights + frozen) / (target.devices if target.sharding in ("zero3", "fsdp2") else 1),
        "gradients": gradients / (target.devices if target.sharding in ("zero2", "zero3", "fsdp2") else 1),
        "optimizer": moments / (target.devices if target.sharding != "ddp" else 1),
        "activations": _activations(model.config, training_args, row),
    }
    return {name: value / GIB for name, value in parts.items()} | {"overhead": OVERHEAD_GIB}


def _llm_weights(model: LsmForConditionalGeneration) -> int:
    head = 0 if model.config.tie_word_embeddings else count(model.lm_head)
    return count(model.model.language_model) + head


def _weights(model: LsmForConditionalGeneration, mode: str, model_args) -> tuple[int, float]:
    """Return the number of weights that learn, and the bytes of the frozen weights."""
    llm, size = _llm_weights(model), BYTES[model_args.dtype]
    learning, frozen = count(model.model.projector), count_frozen_audio(model) * size
    if mode == "full":
        learning += llm
    elif mode == "qlora":
        embedded = count(model.get_input_embeddings()) + count(model.lm_head)
        frozen += (llm - embedded) * 0.53 + embedded * size  # 4 bits and their scales
    else:
        frozen += llm * size
    if mode in ("lora", "qlora"):
        learning += adapter_weights(model, model_args.lora_r)
    return learning, frozen


def _activations(config: LsmConfig, training_args: LsmTrainingArguments, row: dict[str, int]) -> float:
    """Return the bytes of the activations and logits of a batch."""
    text, size = config.text_config, 2 if training_args.bf16 or training_args.fp16 else 4
    frames, tokens, labels = (
        training_args.per_device_train_batch_size * row[name] for name in ("frames", "tokens", "labels")
    )
    layer = tokens * (12 * text.hidden_size + 5 * getattr(text, "intermediate_size", 4 * text.hidden_size)) * size
    hidden, layers = tokens * text.hidden_size * size, text.num_hidden_layers
    decoder = layers * hidden + layer if training_args.gradient_checkpointing else layers * layer
    audio = frames * config.audio_config.d_model * 12 * size
    logits = 3 * 4 * labels * text.vocab_size
    if training_args.objective == "distill":  # logits of both LLMs in their own dtype, and of a chunk in float32
        copies = 5 if training_args.distill_top_k is None else 4
        logits = copies * size * labels * text.vocab_size + 6 * 4 * CHUNK * text.vocab_size
    return decoder + audio + logits
