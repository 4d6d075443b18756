"""Estimate the memory of a training on one device from shapes, before anything is downloaded."""

import os
from dataclasses import dataclass

import torch
from accelerate import PartialState

from modeling_lsm import LsmForConditionalGeneration
from recipes.training.arguments import LsmScriptArguments, LsmTrainingArguments
from recipes.training.costs import count
from recipes.training.objectives import CHUNK

GIB = 2**30
SHARDINGS = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
BYTES = {"float32": 4, "auto": 4, None: 4, "bfloat16": 2, "float16": 2}
OVERHEAD_GIB = 1.5  # for a CUDA context, libraries and fragmentation


@dataclass(frozen=True)
class Target:
    """The machines on which the training will run.

    Args:
        devices: number of GPUs.
        memory_gib: memory of one GPU.
        peak_tflops: peak rate of one GPU in the training's precision, to estimate the time.
        sharding: what the GPUs divide among themselves: nothing (ddp), the optimizer's state (zero1), also gradients
            (zero2), or also weights (zero3, fsdp2).
    """

    devices: int = 1
    memory_gib: float | None = None
    peak_tflops: float | None = None
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
    text, shards = model.config.text_config, target.devices
    llm = count(model.model.language_model) + count(model.lm_head)
    if model.config.tie_word_embeddings:
        llm -= count(model.lm_head)
    tower, projector = count(model.model.audio_tower), count(model.model.projector)
    stored = BYTES[model_args.dtype]
    learns, frozen = projector, tower * stored
    if script_args.llm == "full":
        learns += llm
    elif script_args.llm == "qlora":
        embedded = count(model.get_input_embeddings()) + count(model.lm_head)
        frozen += (llm - embedded) * 0.53 + embedded * stored  # 4 bits and their scales
    else:
        frozen += llm * stored
    if script_args.llm in ("lora", "qlora"):
        learns += adapter_weights(model, model_args.lora_r)
    half = 2 * learns if training_args.bf16 or training_args.fp16 else 0
    teacher = 2 * llm if training_args.objective == "distill" and script_args.llm == "full" else 0
    deep = target.sharding.startswith("zero")  # DeepSpeed keeps weights and gradients in half precision
    weights, gradients = (2 * learns, 2 * learns) if deep else (4 * learns + half, 4 * learns)
    moments = 12 * learns if deep else 8 * learns
    everything = shards if target.sharding in ("zero3", "fsdp2") else 1
    grads = shards if target.sharding in ("zero2", "zero3", "fsdp2") else 1
    optimizer = shards if target.sharding != "ddp" else 1

    batch, size = training_args.per_device_train_batch_size, 2 if training_args.bf16 or training_args.fp16 else 4
    tokens = batch * row["tokens"]
    layer = tokens * (12 * text.hidden_size + 5 * getattr(text, "intermediate_size", 4 * text.hidden_size)) * size
    kept = tokens * text.hidden_size * size
    layers = text.num_hidden_layers
    activations = layers * kept + layer if training_args.gradient_checkpointing else layers * layer
    heard = batch * row["frames"] * model.config.audio_config.d_model * 12 * size
    logits = batch * row["labels"] * text.vocab_size
    vocabulary = 3 * 4 * logits
    if training_args.objective == "distill":  # logits of both LLMs in their own dtype, and of a chunk in float32
        copies = 5 if training_args.distill_top_k is None else 4
        vocabulary = copies * size * logits + 6 * 4 * CHUNK * text.vocab_size
    found = {
        "weights": (weights + frozen + teacher) / everything,
        "gradients": gradients / grads,
        "optimizer": moments / optimizer,
        "activations": activations + heard + vocabulary,
    }
    return {name: value / GIB for name, value in found.items()} | {"overhead": OVERHEAD_GIB}
