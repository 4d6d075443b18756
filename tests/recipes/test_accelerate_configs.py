"""What `accelerate launch --config_file recipes/configs/accelerate/….yaml` makes of our configurations. Nothing is
trained here, and neither GPUs nor DeepSpeed are needed: accelerate's own code reads the file, prepares the environment
that each process finds, and builds its plugin from that environment."""

import os
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.commands import launch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from accelerate.utils.other import get_free_port
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, StateDictType

FOLDER = Path(__file__).parents[2] / "recipes" / "configs" / "accelerate"
FILES = {file.stem: file for file in FOLDER.glob("*.yaml")}
TYPES = {"ddp": DistributedType.MULTI_GPU, "fsdp2": DistributedType.FSDP}
TYPES |= dict.fromkeys(["zero1", "zero2", "zero3"], DistributedType.DEEPSPEED)


@pytest.fixture
def launched(monkeypatch):
    """`launched(name, *options)` is the launcher's arguments; the environment becomes that of a launched process."""
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        monkeypatch.delenv(name)

    def run(name, *options):
        taken = {}

        def take(args, prepare):
            environment = prepare(args)
            taken["args"] = args
            for variable, value in environment.items():
                monkeypatch.setenv(variable, value)

        monkeypatch.setattr(launch, "multi_gpu_launcher", lambda args: take(args, prepare_multi_gpu_env))
        monkeypatch.setattr(
            launch, "deepspeed_launcher", lambda args: take(args, lambda args: prepare_deepspeed_cmd_env(args)[1])
        )
        command = ["--config_file", str(FILES[name]), "--main_process_port", "0", *options, "recipes/sft.py"]
        launch.launch_command(launch.launch_command_parser().parse_args(command))
        return taken["args"]

    return run


# All of them


def test_there_is_one_for_each_way_to_share_a_model():
    assert FILES.keys() == TYPES.keys()


@pytest.mark.parametrize("name", TYPES)
def test_each_is_for_four_gpus_of_one_machine_in_bfloat16(name):
    config = load_config_from_file(str(FILES[name]))
    assert (config.num_machines, config.num_processes, config.use_cpu) == (1, 4, False)
    assert (config.distributed_type, config.mixed_precision) == (TYPES[name], "bf16")


@pytest.mark.parametrize("name", TYPES)
def test_each_setting_is_one_that_the_launcher_knows(name):
    """It takes any name within `fsdp_config` and `deepspeed_config`, and does nothing about a misspelt one."""
    known = vars(launch.launch_command_parser().parse_args(["recipes/sft.py"]))
    config = load_config_from_file(str(FILES[name]))
    assert {**config.fsdp_config, **config.deepspeed_config}.keys() <= known.keys()


@pytest.mark.parametrize("name", TYPES)
def test_another_number_of_gpus_is_an_option(name, launched):
    assert launched(name).nproc_per_node == "4"
    assert launched(name, "--num_processes", "2").nproc_per_node == "2"


@pytest.mark.parametrize("name", TYPES)
def test_float32_is_an_option_of_the_launcher(name, launched):
    """Of the launcher: in its environment the Trainer finds bfloat16, for all that `--bf16 false` says."""
    launched(name)
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16"
    launched(name, "--mixed_precision", "no")
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "no"


@pytest.mark.parametrize("name", TYPES)
def test_each_says_in_a_few_lines_how_it_is_used_and_how_it_was_checked(name):
    lines = FILES[name].read_text(encoding="utf-8").splitlines()
    comment = lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))]
    assert 2 <= len(comment) <= 4
    assert f"accelerate launch --config_file recipes/configs/accelerate/{name}.yaml" in "\n".join(comment)
    assert "Checked: " in "\n".join(comment)


# One by one


def test_ddp_shards_nothing(launched):
    launched("ddp")
    assert "ACCELERATE_USE_FSDP" not in os.environ and "ACCELERATE_USE_DEEPSPEED" not in os.environ


def test_fsdp2_shards_layer_by_layer_and_frees_layers_after_use(launched, lsm):
    launched("fsdp2")
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
    assert not isinstance(plugin.cpu_offload, CPUOffloadPolicy)
    assert plugin.transformer_cls_names_to_wrap is None  # none are listed: the model knows
    plugin.set_auto_wrap_policy(lsm)
    layers = plugin.auto_wrap_policy.keywords["transformer_layer_cls"]
    assert {layer.__name__ for layer in layers} == lsm._no_split_modules
    assert lsm._no_split_modules == {"WhisperEncoderLayer", "Blip2QFormerLayer", "LlamaDecoderLayer"}


def test_fsdp2_computes_in_bfloat16(launched):
    launched("fsdp2")
    plugin = FullyShardedDataParallelPlugin()
    plugin.set_mixed_precision(os.environ["ACCELERATE_MIXED_PRECISION"])
    assert isinstance(plugin.mixed_precision_policy, MixedPrecisionPolicy)
    assert plugin.mixed_precision_policy.param_dtype is torch.bfloat16


def test_fsdp2_saves_whole_models_and_leaves_checkpointing_to_the_trainer(launched):
    launched("fsdp2")
    plugin = FullyShardedDataParallelPlugin()
    # The Trainer's `save_model` does nothing at all for SHARDED_STATE_DICT.
    assert plugin.state_dict_type is StateDictType.FULL_STATE_DICT
    assert plugin.state_dict_config.rank0_only and plugin.state_dict_config.offload_to_cpu
    assert plugin.cpu_ram_efficient_loading and not plugin.activation_checkpointing


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_is_of_its_stage_and_the_trainer_fills_in_the_rest(stage, launched):
    launched(f"zero{stage}")
    assert os.environ["ACCELERATE_USE_DEEPSPEED"] == "true"
    plugin = DeepSpeedPlugin()
    plugin.set_mixed_precision(os.environ["ACCELERATE_MIXED_PRECISION"])
    config = plugin.deepspeed_config
    assert plugin.zero_stage == config["zero_optimization"]["stage"] == stage
    assert (config["bf16"], config["fp16"]) == ({"enabled": True}, {"enabled": False})
    assert {config["zero_optimization"][f"offload_{what}"]["device"] for what in ("optimizer", "param")} == {"none"}
    filled_in = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert {config[name] for name in (*filled_in, "gradient_clipping")} == {"auto"}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_only_stage_3_shards_weights_which_it_gathers_to_save_them(stage, launched):
    launched(f"zero{stage}")
    plugin = DeepSpeedPlugin()
    gathered = plugin.deepspeed_config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]
    assert plugin.zero3_init_flag is plugin.hf_ds_config.is_zero3() is gathered is (stage == 3)


# What a configuration cannot do


@pytest.fixture
def only_process(launched, monkeypatch):
    """Accelerate begins anew, in the only process of a group, and forgets it all again."""
    group = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
    for name, value in {**group, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": get_free_port()}.items():
        monkeypatch.setenv(name, str(value))
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here accelerate would shard")
@pytest.mark.parametrize(("cpu", "found"), [(True, DistributedType.MULTI_CPU), (False, DistributedType.NO)])
def test_fsdp_on_cpus_is_not_fsdp(cpu, found, launched, only_process):
    """Accelerate says no word of it: with `use_cpu` all processes keep whole copies, as in DDP; without it each trains
    by itself. The environment still says FSDP; the accelerator's state is what tells."""
    launched("fsdp2")
    state = Accelerator(cpu=cpu).state
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    assert state.distributed_type is found
    assert getattr(state, "fsdp_plugin", None) is None and not state.is_fsdp2
