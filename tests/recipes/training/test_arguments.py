"""The arguments of the recipe, and errors that name invalid ones."""

import logging
import sys

import pytest
import torch
from trl import ModelConfig

from recipes import sft
from recipes.training.arguments import LsmScriptArguments, LsmTrainingArguments, non_defaults
from recipes.training.command_line import parse
from recipes.training.models import check_model, load_model


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"llm": "melted"}, "--llm 'melted' is unknown; expected one of full, lora, qlora, frozen"),
        ({"transcription_ratio": -1.0}, "--transcription_ratio -1.0 must be 0 or more"),
        ({"text_ratio": float("inf")}, "--text_ratio inf must be 0 or more, and finite"),
        ({"shuffle_buffer": 0}, "--shuffle_buffer 0 must be 1 or more"),
        ({"audio": "openai/whisper-base"}, "--audio is openai/whisper-base and --text is None; a new LSM needs both"),
        ({"dataset_name": None}, "--dataset_name is missing; expected a self-powered set"),
        ({"dataset_streaming": True, "audio_feature_store": "x"}, "--audio_feature_store needs all clips at once"),
    ],
)
def test_invalid_settings_of_the_script_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        LsmScriptArguments(**{"dataset_name": "any", **setting})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"objective": "guess"}, "--objective 'guess' is unknown; expected one of response, distill"),
        ({"temperature": 0.0}, "--temperature 0.0 must be more than 0"),
        ({"objective": "distill", "distill_top_k": 0}, "--distill_top_k 0 must be 1 or more; leave it out for all"),
        ({"objective": "response", "distill_top_k": 5}, "--distill_top_k 5 is for distillation, but"),
        ({"objective": "response", "response_tasks": ["quiz"]}, "but --objective is response; choose distill"),
    ],
)
def test_invalid_settings_of_the_training_are_refused(setting, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        LsmTrainingArguments(output_dir=str(tmp_path), **setting)


# Options of TRL's


@pytest.mark.parametrize(
    ("option", "way_out"),
    [
        ({"packing": True}, "--packing True has no effect here: .* puts rows of similar cost together. Leave it out"),
        ({"eval_packing": True}, "--eval_packing True"),
        ({"padding_free": True}, "--padding_free True"),
        ({"pad_to_multiple_of": 8}, "--pad_to_multiple_of 8"),
        ({"assistant_only_loss": True}, "--assistant_only_loss True has no effect here: .* the responses only"),
        ({"completion_only_loss": False}, "--completion_only_loss False has no effect here: .* the responses only"),
        ({"eval_strategy": "steps"}, "--eval_strategy steps has no effect here: .* --following_corpus"),
        ({"do_eval": True}, "--do_eval True"),
        ({"load_best_model_at_end": True}, "--load_best_model_at_end True"),
        ({"chat_template_path": "x"}, "--chat_template_path x .* compose the LSM again"),
        ({"eos_token": "x"}, "--eos_token x"),
        ({"pad_token": "x"}, "--pad_token x"),
        ({"dataset_text_field": "x"}, "--dataset_text_field x"),
        ({"model_init_kwargs": {"dtype": "float16"}}, "--model_init_kwargs .* --dtype and --attn_implementation"),
        ({"truncation_mode": "keep_end"}, "--truncation_mode keep_end .* rows are never truncated"),
        ({"shuffle_dataset": True}, "--shuffle_dataset True .* --train_sampling_strategy"),
        ({"dataset_num_proc": 2}, "--dataset_num_proc 2"),
        ({"router_aux_loss_coef": 0.1}, "--router_aux_loss_coef 0.1"),
        ({"loss_type": "dft"}, "--loss_type dft is for --objective response"),
        ({"label_smoothing_factor": 0.1}, "--label_smoothing_factor 0.1 is for --objective response"),
    ],
)
def test_options_that_cannot_work_or_change_nothing_are_refused_with_the_way_out(option, way_out, tmp_path):
    with pytest.raises(ValueError, match=way_out):
        LsmTrainingArguments(output_dir=str(tmp_path), **option)


def test_options_that_ask_for_the_only_behaviour_are_accepted(tmp_path):
    anyway = {"completion_only_loss": True, "packing": False, "eval_strategy": "no", "pad_to_multiple_of": None}
    LsmTrainingArguments(output_dir=str(tmp_path), **anyway)
    LsmTrainingArguments(output_dir=str(tmp_path), objective="response", loss_type="dft", label_smoothing_factor=0.1)


@pytest.mark.parametrize(
    ("option", "way_out"),
    [
        ({"load_in_4bit": True}, "--load_in_4bit True has no effect here: --llm qlora"),
        ({"load_in_8bit": True}, "--load_in_8bit True has no effect here: --llm qlora"),
        ({"use_peft": True}, "--use_peft True, but --llm is frozen; set lora or qlora"),
    ],
)
def test_options_of_the_model_too_before_it_is_looked_for(option, way_out):
    with pytest.raises(ValueError, match=way_out):
        check_model(LsmScriptArguments(dataset_name="any"), ModelConfig(model_name_or_path="nobody/has-this", **option))


def test_the_projector_learns_beside_modules_of_ones_own(lsm_dir):
    config = ModelConfig(model_name_or_path=str(lsm_dir), lora_modules_to_save=["lm_head"])
    load_model(LsmScriptArguments(dataset_name="any", llm="lora"), config)
    assert config.lora_modules_to_save == ["projector", "lm_head"]


@pytest.mark.parametrize("llm", ["frozen", "lora"])
def test_a_training_begins_without_noise(train, llm, recwarn, caplog, monkeypatch):
    """There are no warnings about deprecated names in our own arguments, or about expected behaviour."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr("recipes.sft.needs_alignment", lambda model, args: False)  # this model would, and says so
    train(llm=llm, max_steps=1, gradient_checkpointing=True)
    warned = [str(warning.message) for warning in recwarn if "torch.jit" not in str(warning.message)]
    assert not [message for message in warned if "deprecated" in message]
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_speech_is_never_cut_nor_its_columns_taken_away(tmp_path):
    args = LsmTrainingArguments(output_dir=str(tmp_path), max_length=64, remove_unused_columns=True)
    assert args.max_length is None and args.remove_unused_columns is False


@pytest.mark.parametrize("has", [True, False])
def test_half_precision_is_the_default_where_it_is_fast(tmp_path, monkeypatch, caplog, has):
    """TRL asks for it everywhere. A CPU may have it, too. Elsewhere it is used if it is asked for, with a warning."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr("recipes.training.arguments.has_fast_bf16", lambda: has)
    assert LsmTrainingArguments(output_dir=str(tmp_path)).bf16 is has
    assert LsmTrainingArguments(output_dir=str(tmp_path), bf16=not has).bf16 is not has
    assert ("--bf16 true: this CPU is faster without it" in caplog.text) is not has


@pytest.mark.parametrize("accelerator", [True, False])
def test_memory_is_pinned_for_an_accelerator_alone(tmp_path, monkeypatch, accelerator):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)
    args = LsmTrainingArguments(output_dir=str(tmp_path), bf16=False)
    assert args.dataloader_pin_memory is accelerator
    assert not LsmTrainingArguments(
        output_dir=str(tmp_path), bf16=False, dataloader_pin_memory=False
    ).dataloader_pin_memory


def test_a_card_has_only_the_settings_that_were_given(tmp_path):
    training = LsmTrainingArguments(output_dir=str(tmp_path), learning_rate=1e-3, use_cpu=True, max_steps=5)
    found = non_defaults(LsmScriptArguments(dataset_name="mine", llm="lora"), training, ModelConfig(lora_r=4))
    expected = {"dataset_name": "mine", "llm": "lora", "learning_rate": 1e-3, "max_steps": 5, "lora_r": 4}
    assert expected.items() <= found.items()
    assert not {"weight_decay", "seed", "max_length", "dataset_kwargs"} & set(found)


def test_a_configuration_with_a_key_twice_is_refused(tmp_path, monkeypatch):
    config = tmp_path / "sft.yaml"
    config.write_text("dataset_name: one\noutput_dir: out\ndataset_name: two\n")
    monkeypatch.setattr(sys, "argv", ["sft", "--seed", "1", "--config", str(config)])
    with pytest.raises(ValueError, match=r"sft.yaml: not valid YAML: duplicate key 'dataset_name'"):
        parse(LsmScriptArguments, LsmTrainingArguments, ModelConfig)
    config.write_text("dataset_name: one\noutput_dir: out\nuse_cpu: true\n")
    script, training, _ = parse(LsmScriptArguments, LsmTrainingArguments, ModelConfig)
    assert (script.dataset_name, training.seed) == ("one", 1)


def test_the_help_of_a_training_says_what_it_does_and_its_short_names(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sft", "--help"])
    with pytest.raises(SystemExit):
        parse(LsmScriptArguments, LsmTrainingArguments, ModelConfig, description=sft.__doc__)
    shown = capsys.readouterr().out
    assert sft.__doc__.strip().splitlines()[0] in shown
    assert "--config FILE" in shown and "`--model` for `--model_name_or_path`" in shown
