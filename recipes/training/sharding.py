"""Support for FSDP2 beyond accelerate, and checks that processes really train together."""

import contextlib
import os
from collections.abc import Iterator

import torch
from accelerate import Accelerator, DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy


def check_strategy(accelerator: Accelerator) -> None:
    """Check that all launched processes train together, and that FSDP really shards.

    Raises:
        ValueError: the processes do not do what the launcher was told.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise ValueError(
            f"{launched} processes were launched, but {accelerator.num_processes} would train together; on CPUs, set "
            "--use_cpu true and launch with torchrun."
        )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and accelerator.distributed_type != DistributedType.FSDP:
        raise ValueError(
            f"FSDP was asked for, but accelerate uses {accelerator.distributed_type.value} here and would shard "
            "nothing, because FSDP needs GPUs; launch without an FSDP configuration, or with DeepSpeed's."
        )


def prepare_for_fsdp2(model: nn.Module, accelerator: Accelerator) -> None:
    """Prepare the model before accelerate shards it.

    TRL's fused loss reads the head's weight without running the head, so a hook gathers its shards first; otherwise its
    gradient would not be averaged. Gradients are averaged in float32, unlike with accelerate's bf16.
    """
    model.register_forward_pre_hook(_gather_head)
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    if half is not None:
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy


def _gather_head(model: nn.Module, arguments) -> None:
    head = model.get_output_embeddings()
    if isinstance(head, FSDPModule):
        head.unshard()


@contextlib.contextmanager
def as_before_sharding(model: nn.Module) -> Iterator[None]:
    """Restore the original class of a model for saving, because FSDP2 replaces it by a class of its own."""
    sharded = type(model)
    if isinstance(model, FSDPModule):
        model.__class__ = next(kind for kind in sharded.__mro__[1:] if not issubclass(kind, FSDPModule))
    try:
        yield
    finally:
        model.__class__ = sharded
