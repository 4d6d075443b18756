"""What FSDP2 needs besides accelerate, and what must not be taken for it."""

import contextlib
import os
from collections.abc import Iterator

import torch
from accelerate import Accelerator, DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy


def check_strategy(accelerator: Accelerator) -> None:
    """Stop where several processes would train alone, or whole copies would be taken for shards.

    Raises:
        ValueError: says what the launcher was told and what became of it.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise ValueError(
            f"{launched} processes were launched, but {accelerator.num_processes} would train together: on CPUs give "
            "--use_cpu true and launch with torchrun."
        )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and accelerator.distributed_type != DistributedType.FSDP:
        raise ValueError(
            f"FSDP was asked for, but accelerate does {accelerator.distributed_type.value} here and would shard "
            "nothing: it takes GPUs; launch without an FSDP configuration, or with DeepSpeed's."
        )


def prepare_for_fsdp2(model: nn.Module, accelerator: Accelerator) -> None:
    """Before accelerate shards the model.

    TRL's fused loss reads the head's weight without running the head, so its shards must be gathered first, or its
    gradient is never averaged. And gradients are averaged in float32, which accelerate's bf16 does not do.
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
    """Under FSDP2 a model is of a class made for it, by whose name and module it would be saved."""
    sharded = type(model)
    if isinstance(model, FSDPModule):
        model.__class__ = next(kind for kind in sharded.__mro__[1:] if not issubclass(kind, FSDPModule))
    try:
        yield
    finally:
        model.__class__ = sharded
