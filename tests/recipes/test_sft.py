"""Fine-tuning: which rows are learned, which weights move, and that what is saved can be loaded again."""

import json
from collections import Counter

import pytest
import torch
import transformers
from datasets import Dataset, load_dataset
from packaging import version
from transformers import AutoModelForCausalLM, AutoProcessor
from trl import ModelConfig, SFTConfig

from recipes.sft import LsmScriptArguments, load_rows, main, refuse_foreign, select_rows
from recipes.speech_llm import Lsm

TASKS = ["intent"] * 4 + ["keyword"] * 6 + ["transcription"] * 10
SET = Dataset.from_dict({"id": [f"u{i}" for i in range(20)], "task": TASKS})


# Rows


@pytest.mark.parametrize(
    ("tasks", "ratio", "counts"),
    [
        (None, None, {"intent": 4, "keyword": 6, "transcription": 10}),
        (["intent", "transcription"], None, {"intent": 4, "transcription": 10}),
        (None, 0.0, {"intent": 4, "keyword": 6}),
        (None, 0.5, {"intent": 4, "keyword": 6, "transcription": 5}),
        (["intent", "transcription"], 1.0, {"intent": 4, "transcription": 4}),
        (["intent"], 1.0, {"intent": 4}),
        (None, 100.0, {"intent": 4, "keyword": 6, "transcription": 10}),  # there are no more
    ],
)
def test_tasks_and_transcription_ratio(tasks, ratio, counts):
    assert Counter(select_rows(SET, tasks, ratio, seed=0)["task"]) == counts


def test_which_transcriptions_stay_is_a_function_of_seed_and_id():
    def kept(dataset, seed):
        return set(select_rows(dataset, None, 0.5, seed)["id"])

    assert kept(SET, 0) == kept(SET.select(range(19, -1, -1)), 0)
    assert kept(SET, 0) != kept(SET, 1)


@pytest.mark.parametrize(("tasks", "ratio"), [(["singing"], None), (["transcription"], 1.0)])
def test_nothing_left_is_refused_with_what_there_was(tasks, ratio):
    with pytest.raises(ValueError, match=r"no row of \['intent', 'keyword', 'transcription'\] is left"):
        select_rows(SET, tasks, ratio, seed=0)


@pytest.mark.parametrize("setting", [{"llm": "melted"}, {"transcription_ratio": -1.0}])
def test_settings_that_cannot_be_are_refused_by_name(setting):
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=f"--{name} '?{value}"):
        LsmScriptArguments(dataset_name="any", **setting)


# Self-powered or not


def test_rows_of_this_llm_and_template_are_taken(set_dir, lsm):
    refuse_foreign(load_dataset(str(set_dir), "all", split="train"), lsm.config.responder)


@pytest.mark.parametrize("key", ["model", "revision", "template"])
def test_rows_that_another_llm_or_template_wrote_are_refused(set_dir, lsm, key):
    responder = {**lsm.config.responder, key: "mine"}
    message = rf"foreign to this LSM \({key}: .* wrote it, 'mine' would learn it\).*--allow_foreign_responses true"
    with pytest.raises(ValueError, match=message):
        load_rows(LsmScriptArguments(dataset_name=str(set_dir)), 0, responder)


def test_foreign_rows_are_taken_when_asked_for(set_dir):
    arguments = LsmScriptArguments(dataset_name=str(set_dir), allow_foreign_responses=True)
    assert len(load_rows(arguments, 0, None)) == 16


# Training


@pytest.fixture
def train(lsm_dir, set_dir, tmp_path):
    """`train(llm=…)` makes two steps and returns the output folder."""

    def run(checkpointing=False, **options):
        training = SFTConfig(
            output_dir=str(tmp_path / "out"),
            max_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=checkpointing,
            save_strategy="no",
            report_to="none",
            logging_steps=1,
            disable_tqdm=True,
        )
        arguments = LsmScriptArguments(dataset_name=str(set_dir), **options)
        main(arguments, training, ModelConfig(model_name_or_path=str(lsm_dir)))
        return tmp_path / "out"

    return run


def moved(before, after):
    """The parts of the model that have a parameter that is not what it was, and the parts that have none."""
    parts = {"audio_tower", "projector", "language_model", "lm_head"}
    old, new = dict(before.named_parameters()), dict(after.named_parameters())
    changed = {part for part in parts for name in old if part in name and not torch.equal(old[name], new[name])}
    return changed, parts - changed


def read_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize(
    ("llm", "trained"),
    [("full", {"projector", "language_model", "lm_head"}), ("frozen", {"projector"})],
)
def test_what_moves_and_that_it_loads_again(llm, trained, train, lsm, rows):
    output = train(llm=llm)
    model = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True).eval()
    assert moved(lsm, model)[0] == trained
    processor = AutoProcessor.from_pretrained(output, trust_remote_code=True)
    assert model.config.responder == lsm.config.responder
    assert processor.template_hash == lsm.config.responder["template"]
    assert len(Lsm(model, processor).respond(rows[:1], max_new_tokens=2, progress=False)) == 1
    assert [line["step"] for line in read_lines(output / "log.jsonl") if "loss" in line] == [1, 2]


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


def test_stored_features_give_the_training_of_the_audio(train, tmp_path):
    def losses(**options):
        output = train(**options)
        lines = [line["loss"] for line in read_lines(output / "log.jsonl") if "loss" in line]
        (output / "log.jsonl").unlink()
        return lines

    assert losses(audio_feature_store=str(tmp_path / "features")) == pytest.approx(losses(), abs=2e-3)


def test_a_store_of_other_clips_is_refused_before_training(train, lsm, processor, rows, tmp_path):
    from recipes.audio_features import AudioFeatureStore

    AudioFeatureStore.build(tmp_path / "features", lsm, processor, [rows[0]["audio"]])
    with pytest.raises(ValueError, match=r"made for other clips: it lacks 14 of 16"):
        train(audio_feature_store=str(tmp_path / "features"))


def test_the_projector_may_learn_faster(train, lsm):
    """Adam's first steps are as long as its rate: they show which rate a parameter learns at."""
    model = AutoModelForCausalLM.from_pretrained(train(projector_learning_rate=1e-4), trust_remote_code=True)

    def way(part):
        return (part(model) - part(lsm)).abs().max().item()

    assert way(lambda lsm: lsm.model.projector.queries) == pytest.approx(1e-4, rel=0.7)
    assert way(lambda lsm: lsm.lm_head.weight) == pytest.approx(1e-2, rel=0.7)


@pytest.mark.parametrize("llm", ["full", "frozen", "lora"])
def test_checkpointing_changes_memory_not_the_training(train, llm):
    """It is TRL's default. With a frozen LLM the gradient must still reach the projector through it."""
    losses = []
    for checkpointing in (False, True):
        log = train(checkpointing, llm=llm) / "log.jsonl"
        losses.append([(line["loss"], line["grad_norm"]) for line in read_lines(log) if "loss" in line])
        log.unlink()
    for plain, checkpointed in zip(*losses, strict=True):
        assert checkpointed == pytest.approx(plain, rel=1e-3)
        assert checkpointed[1] > 0


def test_following_is_measured_while_training(train, corpus_dir):
    corpus = {"following_corpus": str(corpus_dir), "following_split": "train", "following_limit": 2}
    output = train(following_steps=1, **corpus)
    looks = read_lines(output / "following.jsonl")
    assert [look["step"] for look in looks] == [1, 2]
    assert all({"following", "transcript_copy", "wer"} <= set(look) for look in looks)
