"""`recipes/sft.py` under accelerate's real FSDP2, on CPUs: accelerate is made to take gloo for several GPUs, since it
would quietly not shard. Writes what it found sharded to `sharded-RANK` in the training's folder."""

import os
import runpy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import state
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, trainer


class Sharded(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        held = sum(parameter.to_local().numel() for parameter in model.parameters() if isinstance(parameter, DTensor))
        whole = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
        share = held / sum(parameter.numel() for parameter in model.parameters())
        (Path(args.output_dir) / f"sharded-{os.environ['RANK']}").write_text(f"{len(whole)} {share}")


state.PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
state.PartialState.wait_for_everyone = lambda self: dist.barrier()
state.PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
trainer.DEFAULT_CALLBACKS.append(Sharded)
sys.argv[0] = "sft.py"
runpy.run_module("recipes.sft", run_name="__main__")
