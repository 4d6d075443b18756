"""FSDP2 with two processes on a CPU, by the model's own units and by the recipe with accelerate's configuration."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoProcessor

from recipes.listening.collator import SpeechResponseCollator

ROOT = Path(__file__).parents[3]

# Each of two processes learns from half of a batch; sharded and whole models must have the same losses.
SCRIPT = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from modeling_lsm import LsmForConditionalGeneration
from recipes.training.models import prepare
from trl import ModelConfig

folder, batches, llm, dtype = sys.argv[1:]
dist.init_process_group("gloo")
rank = dist.get_rank()
batches = torch.load(batches)


def train(model, step_of):
    # What a random reader reads changes with larger steps, and rounding to bfloat16 swallows smaller ones.
    rate = {("full", "float32"): 3e-4, ("frozen", "float32"): 3e-5, ("frozen", "bfloat16"): 1e-3}[llm, dtype]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, foreach=False)
    losses = []
    for halves in batches:
        losses.append(step_of(model, halves))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def whole(model, halves):
    total = sum(model(**half, use_cache=False).loss for half in halves) / len(halves)
    total.backward()
    return total.item()


def sharded(model, halves):
    loss = model(**halves[rank], use_cache=False).loss
    loss.backward()
    loss = loss.detach()
    dist.all_reduce(loss, dist.ReduceOp.AVG)
    return loss.item()


def load():
    model = LsmForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype))
    prepare(model, llm, ModelConfig())
    return model.train()


expected = train(load(), whole)
model = load()
mesh = init_device_mesh("cpu", (2,))
for module in list(model.modules()):
    if type(module).__name__ in model._no_split_modules:
        fully_shard(module, mesh=mesh)
fully_shard(model, mesh=mesh)
assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
local = sum(parameter.to_local().numel() for parameter in model.parameters())
assert local < 0.6 * sum(parameter.numel() for parameter in model.parameters()), "nothing is shared out"
found = train(model, sharded)
for one, two in zip(expected, found, strict=True):
    assert abs(one - two) < float(dtype == "bfloat16") * 5e-3 + 1e-4, (expected, found)
assert expected[4] < expected[0], expected  # of the same batch
if (llm, dtype) != ("frozen", "float32"):  # the last batch is another, which a projector that reads begins worse on
    assert expected[-1] < expected[0]
if rank == 0:
    print("sharded", found)
dist.destroy_process_group()
"""


@pytest.mark.parametrize(("llm", "projector"), [("full", "reader"), ("frozen", "reader"), ("frozen", "plain")])
def test_sharded_over_two_processes_the_losses_are_those_of_one(
    lsm_dir, plain_lsm_dir, processor, answered, tmp_path, llm, projector
):
    """A frozen LLM is in bfloat16 only if the projector has no reader, because the output of a random reader would
    change with rounding."""
    folder, dtype = {"reader": (lsm_dir, "float32"), "plain": (plain_lsm_dir, "bfloat16")}[projector]
    collate = SpeechResponseCollator(processor)
    heard, read = answered, [row | {"audio": None} for row in answered]
    # in the second batch, one process has no clip
    halves = [(collate(heard[:2]), collate(heard[2:])), (collate(heard[:2]), collate(read[2:]))] * 3
    torch.save(halves, tmp_path / "batches.pt")
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "script.py"), str(folder), str(tmp_path / "batches.pt"), llm, dtype],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "sharded" in done.stdout


@pytest.mark.parametrize(
    "mode",
    [
        {"llm": "full"},
        {
            "llm": "lora",
            "objective": "distill",
            "text_ratio": 1.0,
            "response_tasks": ["transcription"],
            "distill_top_k": 20,
        },
    ],
)
def test_the_recipe_under_accelerates_fsdp2(train, losses, defaults, tmp_path, mode, lsm):
    mode = {**mode, "max_steps": 3, "learning_rate": 3e-3, "save_strategy": "steps", "save_steps": 2}
    expected = losses(train(**mode, per_device_train_batch_size=4, output_dir=str(tmp_path / "one")))
    options = {**defaults, **mode, "per_device_train_batch_size": 2, "output_dir": str(tmp_path / "two")}
    options["bf16"] = False
    options = {name: value if isinstance(value, list) else [value] for name, value in options.items()}
    flags = [part for name, value in options.items() if name != "use_cpu" for part in (f"--{name}", *map(str, value))]
    launch = ["accelerate.commands.launch", "--config_file", "recipes/configs/accelerate/fsdp2.yaml"]
    launch += ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_TORCH_DEVICE": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", *launch, str(Path(__file__).with_name("fsdp_on_cpu.py")), *flags],
        cwd=ROOT, env=environment | {"HF_DATASETS_CACHE": str(tmp_path / "cache")}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    output = tmp_path / "two"
    for rank in (0, 1):
        whole, share = (output / f"sharded-{rank}").read_text().split()
        assert int(whole) == 0 and float(share) < 0.6
    assert losses(output) == pytest.approx(expected, abs=1e-4)
    if mode["llm"] == "full":
        model = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True)
        assert type(model).__name__ == "LsmForConditionalGeneration" and (output / "modeling_lsm.py").is_file()
        assert not torch.equal(model.lm_head.weight, lsm.lm_head.weight)
    AutoProcessor.from_pretrained(output, trust_remote_code=True)
