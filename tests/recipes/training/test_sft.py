"""Fine-tuning: which weights change with which objective, and that saved models can be loaded."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from hub_clients import start
from packaging import version
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoProcessor, LlamaForCausalLM
from trl import ModelConfig

from dataset_builders.files import read_lines
from dataset_builders.instructions import digest_of, load_pool
from dataset_builders.nano.tasks import POOL_PATH
from processing_lsm import LsmProcessor
from recipes.listening.features import AudioFeatureStore, audio_key
from recipes.listening.speech_llm import Lsm
from recipes.training import models
from recipes.training.arguments import LsmScriptArguments
from recipes.training.models import load_model


def moved(before, after):
    """Return the parts of the model that have a changed parameter, and the parts that have none."""
    parts = {"audio_tower", "projector", "language_model", "lm_head"}
    old, new = dict(before.named_parameters()), dict(after.named_parameters())
    changed = {part for part in parts for name in old if part in name and not torch.equal(old[name], new[name])}
    return changed, parts - changed


@pytest.mark.parametrize(
    ("llm", "trained"), [("full", {"projector", "language_model", "lm_head"}), ("frozen", {"projector"})]
)
def test_the_right_parts_change_and_the_result_can_be_loaded(llm, trained, train, lsm, rows):
    output = train(llm=llm)
    model = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True).eval()
    assert moved(lsm, model)[0] == trained
    processor = AutoProcessor.from_pretrained(output, trust_remote_code=True)
    assert model.config.responder == lsm.config.responder
    assert processor.template_hash == lsm.config.responder["template"]
    assert len(Lsm(model, processor).respond(rows[:1], max_new_tokens=2, progress=False)) == 1
    assert [line["step"] for line in read_lines(output / "log.jsonl") if "loss" in line] == [1, 2]


def test_the_projector_is_saved_alone_if_that_is_asked_for(train, lsm, whisper_dir, llm_dir):
    output = train(llm="frozen", projector_only=True)
    assert {name.split(".")[1] for name in load_file(output / "model.safetensors")} == {"projector"}
    parts = {"audio_model": str(whisper_dir), "text_model": str(llm_dir)}
    model = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True, **parts)
    assert moved(lsm, model)[0] == {"projector"}
    assert "contains only the projector" in (output / "README.md").read_text()


def test_checkpoints_are_whole_so_that_the_training_can_be_resumed(train):
    output = train(llm="frozen", projector_only=True, save_strategy="steps", save_steps=1)
    kept = {name.split(".")[1] for name in load_file(output / "checkpoint-1" / "model.safetensors")}
    assert {"audio_tower", "language_model", "projector"} <= kept
    train(llm="frozen", projector_only=True, save_strategy="steps", save_steps=1)  # goes on, and saves it alone again
    assert {name.split(".")[1] for name in load_file(output / "model.safetensors")} == {"projector"}


def test_an_lsm_that_names_no_parts_is_refused_before_the_training(train, lsm_dir, tmp_path):
    folder = shutil.copytree(lsm_dir, tmp_path / "older")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sources": None}))
    with pytest.raises(ValueError, match="--projector_only: .*older does not name the encoder and the LLM"):
        train(llm="frozen", projector_only=True, model_name_or_path=str(folder))
    assert not list((tmp_path / "out").glob("log.jsonl"))


@pytest.mark.parametrize("llm", ["full", "lora", "qlora"])
def test_an_llm_that_learns_is_not_left_out(train, llm):
    with pytest.raises(ValueError, match=f"--projector_only needs an LLM that stays as it is, but --llm is {llm}"):
        train(llm=llm, projector_only=True)


def test_rows_are_of_the_prompts_that_the_processor_lays_out_now(lsm_dir, train, tmp_path):
    """The order of instruction and speech was changed after the LSM was composed."""
    folder = shutil.copytree(lsm_dir, tmp_path / "turned")
    LsmProcessor.from_pretrained(lsm_dir, instruction_first=False).save_pretrained(folder)
    with pytest.raises(ValueError, match="foreign to this LSM .*template: "):
        train(model_name_or_path=str(folder))


def test_lora_saves_an_adapter_with_the_projector(train, lsm, rows):
    output = train(llm="lora")
    assert not (output / "model.safetensors").exists()
    if version.parse(transformers.__version__) < version.parse("5.23"):
        # Its adapters come without `modules_to_save`: the projector would stay as it was, so this must not go on.
        with pytest.raises(ValueError, match=r"missing_keys.*projector"):
            AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True)
        return
    model = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(output, trust_remote_code=True)
    adapters = [parameter for name, parameter in model.named_parameters() if "lora_B" in name]
    assert adapters and any(parameter.any() for parameter in adapters)
    projector = lsm.model.projector.queries
    trained = [value for name, value in model.named_parameters() if name.endswith("default.queries")]
    assert trained and not torch.equal(trained[0], projector)
    for name, _ in model.named_parameters():
        assert "lora" not in name or ("language_model" in name and "audio_tower" not in name)
    assert len(Lsm(model, processor).respond(rows[:1], max_new_tokens=2, progress=False)) == 1


def test_stored_features_give_the_training_of_the_audio(train, losses, tmp_path):
    order = {"train_sampling_strategy": "random"}  # grouped, rows without a tower are of another cost
    plain = losses(train(output_dir=str(tmp_path / "plain"), **order))
    store = str(tmp_path / "features")
    stored = losses(train(output_dir=str(tmp_path / "stored"), audio_feature_store=store, **order))
    assert stored == pytest.approx(plain, abs=2e-3)


def test_a_training_adds_the_clips_that_its_store_lacks(train, lsm, processor, rows, tmp_path):
    AudioFeatureStore.build(tmp_path / "features", lsm, processor, [rows[0]["audio"]])
    train(audio_feature_store=str(tmp_path / "features"))
    assert {audio_key(row["audio"]) for row in rows} <= AudioFeatureStore(tmp_path / "features").clips.keys()


def test_the_projector_may_learn_faster(train, lsm):
    """The first steps of Adam are as large as the learning rate, so they show the rate of each parameter."""
    model = AutoModelForCausalLM.from_pretrained(train(projector_learning_rate=1e-4), trust_remote_code=True)

    def way(part):
        return (part(model) - part(lsm)).abs().max().item()

    assert way(lambda lsm: lsm.model.projector.queries) == pytest.approx(1e-4, rel=0.7)
    assert way(lambda lsm: lsm.lm_head.weight) == pytest.approx(1e-2, rel=0.7)


@pytest.mark.parametrize("llm", ["full", "frozen", "lora"])
def test_checkpointing_changes_memory_not_the_training(train, llm, tmp_path):
    """Checkpointing is TRL's default. With a frozen LLM, the gradient must still reach the projector."""
    logs = []
    for checkpointing in (False, True):
        output = train(llm=llm, gradient_checkpointing=checkpointing, output_dir=str(tmp_path / str(checkpointing)))
        logs.append([(line["loss"], line["grad_norm"]) for line in read_lines(output / "log.jsonl") if "loss" in line])
    for plain, checkpointed in zip(*logs, strict=True):
        assert checkpointed == pytest.approx(plain, rel=1e-3)
        assert checkpointed[1] > 0


def test_following_is_measured_while_training(train, corpus_dir):
    corpus = {"following_corpus": str(corpus_dir), "following_split": "train", "following_limit": 2}
    output = train(following_steps=1, **corpus)
    looks = read_lines(output / "following.jsonl")
    assert [look["step"] for look in looks] == [1, 2]
    assert all({"following", "transcript_copy", "wer"} <= set(look) for look in looks)
    logged = [line for line in read_lines(output / "log.jsonl") if "loss" in line]  # and so what `report_to` names
    assert [line["following"] for line in logged] == [look["following"] for look in looks]


def test_following_is_asked_from_the_pool_that_is_named_and_says_which(train, corpus_dir, tmp_path):
    corpus = {"following_corpus": str(corpus_dir), "following_split": "train", "following_limit": 1}
    looks = read_lines(train(pool=str(POOL_PATH), **corpus) / "following.jsonl")
    assert {look["pool"] for look in looks} == {digest_of(load_pool(POOL_PATH))}
    (tmp_path / "mine.yaml").write_text("tasks:\n  intent: {description: d, seen: [Go on.]}\n")
    with pytest.raises(ValueError, match="unknown task 'continuation'; the pool has"):
        train(pool=str(tmp_path / "mine.yaml"), model_name_or_path="not-looked-at", **corpus)


def test_clips_decoded_in_workers_give_the_same_training(train, losses, tmp_path):
    alone, helped = (
        losses(train(dataloader_num_workers=workers, output_dir=str(tmp_path / str(workers)))) for workers in (0, 1)
    )
    assert helped == pytest.approx(alone, abs=1e-6)


def test_an_adapter_on_an_llm_in_four_bits(train, wide_lsm_dir):
    output = train(model_name_or_path=str(wide_lsm_dir), llm="qlora", allow_foreign_responses=True)
    assert (output / "adapter_model.safetensors").exists() and not (output / "model.safetensors").exists()


def test_weights_that_learn_are_in_float32_and_others_in_the_given_dtype(lsm_dir):
    for llm in ("full", "frozen"):
        config = ModelConfig(model_name_or_path=str(lsm_dir), dtype="bfloat16")
        model, _ = load_model(LsmScriptArguments(dataset_name="any", llm=llm), config)
        for name, parameter in model.named_parameters():
            assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name


def test_two_checkpoints_are_composed_once(train, whisper_dir, llm_dir, tmp_path):
    options = {"audio": str(whisper_dir), "text": str(llm_dir), "model_name_or_path": None}
    options |= {"composition": {"qformer_hidden": 32, "qformer_heads": 4, "qformer_ffn": 64}}
    output = train(**options)
    written = (output / "base" / "model.safetensors").stat().st_mtime_ns
    train(**options, llm="frozen", resume_from_checkpoint="false")
    assert (output / "base" / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="are two models; name either an LSM, or --audio and --text"):
        train(**{**options, "model_name_or_path": "other"})


def test_a_base_that_was_composed_of_something_else_is_refused(
    parts_of, defaults, whisper_dir, llm_dir, tmp_path, monkeypatch
):
    """This holds for other settings and for an LLM that changed in place; the path of the LLM does not matter."""
    shutil.copytree(llm_dir, tmp_path / "llm")
    monkeypatch.setattr(models, "compose", lambda audio, text, output, **composition: Path(output).mkdir(parents=True))

    def base(text, **composition):
        named = {"audio": str(whisper_dir), "text": str(text), "model_name_or_path": None, "composition": composition}
        return models.compose_base(*parts_of({**defaults, **named}))

    assert base(tmp_path / "llm", window_frames=8) == base(llm_dir, window_frames=8)
    with pytest.raises(ValueError, match=r"other parts \(composition.window_frames was 8, now 17\); delete it"):
        base(llm_dir, window_frames=17)
    other = LlamaForCausalLM.from_pretrained(llm_dir)
    other.lm_head.weight.data += 1
    other.save_pretrained(tmp_path / "llm")
    with pytest.raises(ValueError, match=r"other parts \(text was sha256:\w+, now sha256:\w+\)"):
        base(tmp_path / "llm", window_frames=8)


def test_every_checkpoint_can_be_loaded_as_it_is(train):
    output = train(save_strategy="steps", save_steps=1)
    for folder in (output / "checkpoint-1", output):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def test_the_card_has_data_settings_and_losses(train):
    card = (train(llm="frozen") / "README.md").read_text()
    assert "llm: frozen" in card and "| transcription | 8 |" in card and "training.png" in card


PUSH = """
import runpy, sys
sys.argv = ["sft.py", *sys.argv[1:]]
runpy.run_module("recipes.sft", run_name="__main__")
"""


def test_a_trained_model_is_pushed_with_its_card(hub, defaults, tmp_path):
    options = {**defaults, "push_to_hub": True, "hub_model_id": "me/trained", "max_steps": 1}
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    done = start(PUSH, hub, tmp_path / "home", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    files = hub.repos["model", "me/trained"].files()
    assert {"README.md", "model.safetensors", "processor_config.json", "modeling_lsm.py"} <= set(files)
    assert "me/trained" in files["README.md"].content.decode() or "# trained" in files["README.md"].content.decode()
    assert not any(name.startswith("checkpoint-") for name in files)
