"""Each recipe can read what any recipe writes: whole models and adapters, finished or not, from folders and the Hub."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from datasets import Dataset
from hub_clients import run
from local_hub import Repo
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoProcessor

from dataset_builders.responders.local import LocalResponder
from language_models.checkpoints import base_of, open_model
from modeling_lsm import LsmForConditionalGeneration
from recipes import align, analyze_bias, evaluate, store_features
from recipes.chat import Conversation
from recipes.listening.speech_llm import load

ROOT = Path(__file__).parents[3]
LAYER = "model.language_model.layers.0.self_attn.q_proj.weight"


def command(monkeypatch, recipe, **options):
    """Run a recipe with the arguments of its command line."""
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", *str(value).split())]
    monkeypatch.setattr(sys, "argv", [recipe.__name__, *words])
    recipe.main()


def layer(model) -> torch.Tensor:
    return model.state_dict()[LAYER]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture
def words(clip, tmp_path):
    """Make an ASR corpus of two clips that are long enough for the alignment, and a file with the first clip."""
    rows = []
    for seed, said in enumerate(("what is said", "so it is")):
        soundfile.write(tmp_path / f"{seed}.wav", clip(1.3, seed), 16_000)
        audio = {"bytes": (tmp_path / f"{seed}.wav").read_bytes(), "path": None}
        rows.append({"id": str(seed), "audio": audio, "transcript": said})
    (tmp_path / "words").mkdir()
    Dataset.from_list(rows).to_parquet(str(tmp_path / "words" / "train.parquet"))
    return tmp_path / "words", str(tmp_path / "0.wav")


def test_every_recipe_reads_what_any_recipe_writes(
    train,
    wide_lsm_dir,
    compose_tiny,
    whisper_dir,
    words,
    corpus_dir,
    set_dir,
    tmp_path,
    parts_of,
    defaults,
    monkeypatch,
):
    corpus, wav = words
    compose_tiny(str(whisper_dir), str(tmp_path / "llm"), str(tmp_path / "lsm"), window_frames=2)
    steps = {"save_strategy": "steps", "save_steps": 1, "allow_foreign_responses": True}
    start = {"model_name_or_path": str(tmp_path / "lsm"), **steps}
    written = {llm: train(**start, llm=llm, output_dir=str(tmp_path / llm)) for llm in ("full", "frozen", "lora")}
    written["qlora"] = train(**{**start, "max_steps": 1}, llm="qlora", output_dir=str(tmp_path / "qlora"))
    written |= {f"{llm} at step 1": written[llm] / "checkpoint-1" for llm in ("full", "lora")}
    open_model(written["lora"]).save_pretrained(tmp_path / "merged")
    AutoProcessor.from_pretrained(written["lora"], trust_remote_code=True).save_pretrained(tmp_path / "merged")
    written["merged"] = tmp_path / "merged"

    base = layer(AutoModelForCausalLM.from_pretrained(tmp_path / "lsm"))
    for kind, folder in written.items():
        out = tmp_path / "read" / kind.replace(" ", "_")
        chat = Conversation(str(folder), wav, max_new_tokens=3)
        assert torch.equal(layer(chat.model), base) == (kind == "frozen"), kind
        assert chat.model.config.projector_trained and isinstance(chat.ask("what"), str)

        command(
            monkeypatch, evaluate, model=folder, tasks="nano", data=f"nano={corpus_dir} nano.split=train",
            systems="model", limit=1, max_new_tokens=2, output=out / "evaluation",
        )  # fmt: skip
        command(
            monkeypatch, analyze_bias, model=folder, data=set_dir, split="train", limit=2, max_new_tokens=2,
            output=out / "bias",
        )  # fmt: skip
        command(monkeypatch, store_features, model=folder, corpus=corpus, splits="train", output=out / "features")
        assert LocalResponder(folder).identity == LocalResponder(tmp_path / "lsm").identity

        options = {**defaults, **steps, "model_name_or_path": str(folder), "align_batch_size": 2, "align_steps": 1}
        _, *arguments = parts_of({**options, "output_dir": str(out / "aligned"), "dataset_name": "-"})
        align.run(align.AlignArguments(corpus=str(corpus)), *arguments)
        torch.testing.assert_close(layer(load(out / "aligned").model), layer(chat.model))

        rest = {"model_name_or_path": str(folder), "learning_rate": 0.0, "max_steps": 1, "align_steps": None}
        again = train(**steps, **rest, llm="frozen", output_dir=str(out / "frozen"))
        torch.testing.assert_close(layer(load(again).model), layer(chat.model))
        assert not (again / "alignment").exists()  # its projector is already trained


# Training on from an adapter


@pytest.fixture
def adapter(train, tmp_path):
    return train(llm="lora", output_dir=str(tmp_path / "adapter"))


def test_an_adapter_learns_on_from_where_it_is(train, adapter, lsm_dir, tmp_path):
    on = {"model_name_or_path": str(adapter), "llm": "lora", "max_steps": 1, "align_steps": None}
    stopped, learned = (
        train(**on, learning_rate=rate, output_dir=str(tmp_path / f"rate {rate}")) for rate in (0.0, 1e-2)
    )
    before, still, after = (weights(folder) for folder in (adapter, stopped, learned))
    assert max(value.abs().max() for name, value in before.items() if "lora_B" in name) > 0.01
    for name, value in before.items():
        assert torch.equal(still[name], value), name
        assert "lora" not in name or not torch.equal(after[name], value), name
    named = json.loads((learned / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(lsm_dir) and f"adapter for the LSM `{lsm_dir.name}`" in (learned / "README.md").read_text()


@pytest.mark.parametrize("llm", ["full", "frozen"])
def test_an_adapter_is_merged_where_none_learns(train, adapter, lsm, llm, tmp_path):
    """The objective is distillation, so the merged LLM is also the teacher."""
    output = train(model_name_or_path=str(adapter), llm=llm, objective="distill", output_dir=str(tmp_path / llm))
    start, model = load(adapter).model, load(output).model
    assert not torch.equal(layer(start), layer(lsm))
    assert torch.equal(layer(start), layer(model)) == (llm == "frozen")
    assert not (output / "adapter_config.json").exists()


@pytest.mark.parametrize("setting", [{"lora_r": 4}, {"lora_alpha": 7}, {"use_dora": True}])
def test_another_adapter_than_the_one_that_is_there_is_refused(train, adapter, setting, tmp_path):
    (name, value) = setting.popitem()
    with pytest.raises(ValueError, match=rf"--{name} is {value}, but the adapter .* leave --{name} out"):
        train(model_name_or_path=str(adapter), llm="lora", output_dir=str(tmp_path / "other"), **{name: value})


# Where adapters are


def test_an_adapter_is_moved_together_with_what_it_is_for(train, whisper_dir, llm_dir, tmp_path):
    options = {"audio": str(whisper_dir), "text": str(llm_dir), "model_name_or_path": None, "llm": "lora"}
    options |= {"composition": {"qformer_hidden": 32, "qformer_heads": 4, "qformer_ffn": 64}, "max_steps": 1}
    output = train(**options, save_strategy="steps", save_steps=1, output_dir=str(tmp_path / "out.partial"))
    output.rename(tmp_path / "out")
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-1"):
        assert base_of(folder) == str(tmp_path / "out" / "base")
    load(tmp_path / "out" / "checkpoint-1")
    shutil.rmtree(tmp_path / "out" / "base")
    with pytest.raises(ValueError, match=r"is an adapter for .*base, which does not exist here; put that folder"):
        load(tmp_path / "out")


def test_an_adapter_that_lacks_weights_is_refused(adapter):
    kept = {name: value for name, value in weights(adapter).items() if "layers.1" not in name}
    save_file(kept, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"the adapter .* does not fit .*Found missing adapter keys"):
        open_model(adapter, LsmForConditionalGeneration)


READ = """
import json, sys
from recipes.chat import Conversation
from recipes.listening.speech_llm import load
from recipes.training.arguments import LsmScriptArguments
from recipes.training.models import load_model
from trl import ModelConfig

name, wav = sys.argv[1:]
answer = Conversation(name, wav, max_new_tokens=2).ask("what")
model, _ = load_model(LsmScriptArguments(dataset_name="any", llm="full"), ModelConfig(model_name_or_path=name))
learns = {part.split(".")[1] for part, parameter in model.named_parameters() if parameter.requires_grad}
print(json.dumps([isinstance(answer, str), sorted(learns), load(name).name]))
"""


def test_an_adapter_on_the_hub_finds_its_base_there(hub, adapter, lsm_dir, words, tmp_path):
    for name, folder in {"me/base": lsm_dir, "me/adapter": adapter}.items():
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        if name == "me/adapter":
            settings = json.loads(files["adapter_config.json"]) | {"base_model_name_or_path": "me/base"}
            files["adapter_config.json"] = json.dumps(settings).encode()
        repo = hub.repos["model", name] = Repo(name)
        repo.commit(files)
    found = run(READ, hub, tmp_path / "home", "me/adapter", words[1], PYTHONPATH=str(ROOT))
    assert found == [True, ["language_model", "projector", "weight"], "me/adapter"]
