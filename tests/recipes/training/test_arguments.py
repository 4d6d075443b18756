"""What can be said to the recipe, and what is refused by its name."""

import sys

import pytest
import torch
from trl import ModelConfig

from recipes.training.arguments import LsmScriptArguments, LsmTrainingArguments, given
from recipes.training.command_line import parse


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"llm": "melted"}, "--llm 'melted' is unknown; expected one of full, lora, qlora, frozen"),
        ({"transcription_ratio": -1.0}, "--transcription_ratio -1.0 must be 0 or more"),
        ({"text_ratio": float("inf")}, "--text_ratio inf must be 0 or more, and finite"),
        ({"shuffle_buffer": 0}, "--shuffle_buffer 0 must be 1 or more"),
        ({"audio": "openai/whisper-base"}, "--audio openai/whisper-base and --text None make an LSM together"),
        ({"dataset_name": None}, "--dataset_name is missing; expected a self-powered set"),
        ({"dataset_streaming": True, "audio_feature_store": "x"}, "--audio_feature_store needs all clips at once"),
    ],
)
def test_settings_of_the_script_that_cannot_be(setting, message):
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
def test_settings_of_the_training_that_cannot_be(setting, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        LsmTrainingArguments(output_dir=str(tmp_path), **setting)


def test_speech_is_never_cut_nor_its_columns_taken_away(tmp_path):
    args = LsmTrainingArguments(output_dir=str(tmp_path), max_length=64, remove_unused_columns=True)
    assert args.max_length is None and args.remove_unused_columns is False


def test_half_precision_is_asked_for_where_it_can_be_had(tmp_path):
    """TRL asks for it everywhere, and so needs `--use_cpu --bf16 false` on a machine without a GPU."""
    assert LsmTrainingArguments(output_dir=str(tmp_path)).bf16 == torch.cuda.is_available()


def test_a_card_has_what_was_said_and_no_more(tmp_path):
    training = LsmTrainingArguments(output_dir=str(tmp_path), learning_rate=1e-3, use_cpu=True, max_steps=5)
    found = given(LsmScriptArguments(dataset_name="mine", llm="lora"), training, ModelConfig(lora_r=4))
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
