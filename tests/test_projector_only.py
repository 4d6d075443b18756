"""A projector that is saved alone, and joined to the encoder and the LLM that it belongs to."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_clients import run, start
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from configuration_lsm import LsmConfig
from language_models.checkpoints import load_processor, open_model
from modeling_lsm import LsmForConditionalGeneration, content_of
from recipes.listening.composing import compose
from recipes.listening.speech_llm import load

ROOT = Path(__file__).parents[1]
SMALL = {"qformer_hidden": 16, "qformer_heads": 2, "window_frames": 8}


@pytest.fixture
def parts(whisper_dir, llm_dir, tmp_path) -> dict[str, str]:
    """A Whisper and an LLM in `tmp_path`, so that a test may move and change them."""
    folders = {"audio": tmp_path / "parts" / "whisper", "text": tmp_path / "parts" / "llm"}
    for source, target in zip((whisper_dir, llm_dir), folders.values(), strict=True):
        shutil.copytree(source, target)
    return {name: str(folder) for name, folder in folders.items()}


def save(parts: dict[str, str], folder: Path, **settings) -> LsmForConditionalGeneration:
    """Compose an LSM and save its projector alone."""
    model, processor = compose(**parts, **SMALL, **settings)
    model.save_pretrained(folder, projector_only=True)
    processor.save_pretrained(folder)
    return model


def change(llm: str) -> str:
    """Train an LLM a little, in its folder."""
    model = AutoModelForCausalLM.from_pretrained(llm)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.01)
    model.save_pretrained(llm)
    return llm


def equal(one: LsmForConditionalGeneration, other: LsmForConditionalGeneration) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    same = (mine[name].dtype == theirs[name].dtype and torch.equal(mine[name], theirs[name]) for name in mine)
    return mine.keys() == theirs.keys() and all(same)


@pytest.fixture(params=["LLM's words", "Whisper's words"])
def any_parts(request, parts, reading_whisper_dir):
    """Parts of an LSM that compares speech with the embeddings of its LLM, or of its Whisper's decoder."""
    if request.param == "LLM's words":
        return parts
    return {**parts, "audio": str(shutil.move(reading_whisper_dir, Path(parts["audio"]).parent))}


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_projector_is_saved_alone_and_joined_to_the_same_model(any_parts, tmp_path, dtype):
    model = save(any_parts, tmp_path / "parts" / "ears", dtype=dtype)
    processor = load_processor(tmp_path / "parts" / "ears")
    weights = load_file(tmp_path / "parts" / "ears" / "model.safetensors")
    assert weights and all(name.startswith("model.projector.") for name in weights)
    joined = LsmForConditionalGeneration.from_pretrained(tmp_path / "parts" / "ears")
    assert equal(joined, model) and not joined.training
    assert joined.generation_config.to_dict() == model.generation_config.to_dict()
    inputs = processor(text="Repeat: <|audio|>", audio=np.sin(np.arange(9000) / 20), return_tensors="pt")
    # Equal weights, but a product may round otherwise where they lie elsewhere in memory.
    torch.testing.assert_close(joined(**inputs).logits, model.eval()(**inputs).logits)


@pytest.mark.parametrize("dtype, asked", [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "float32")])
def test_a_projector_is_joined_in_any_data_type(any_parts, tmp_path, dtype, asked):
    """`AutoModel` loads the configuration first, and writes into it the data type that it is asked for."""
    save(any_parts, tmp_path / "parts" / "ears", dtype=dtype)
    asked = getattr(torch, asked)
    config = LsmConfig.from_pretrained(tmp_path / "parts" / "ears")
    config.dtype = asked
    joined = LsmForConditionalGeneration.from_pretrained(tmp_path / "parts" / "ears", config=config, dtype=asked)
    assert {weight.dtype for weight in joined.parameters()} == {asked}


@pytest.mark.parametrize("dtype, asked", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_projector_that_was_joined_in_another_data_type_is_saved_alone_again(any_parts, tmp_path, dtype, asked):
    save(any_parts, tmp_path / "parts" / "ears", dtype=dtype)
    joined = LsmForConditionalGeneration.from_pretrained(tmp_path / "parts" / "ears", dtype=getattr(torch, asked))
    joined.save_pretrained(tmp_path / "parts" / "again", projector_only=True)
    load_processor(tmp_path / "parts" / "ears").save_pretrained(tmp_path / "parts" / "again")
    assert equal(LsmForConditionalGeneration.from_pretrained(tmp_path / "parts" / "again"), joined)


def test_everything_of_a_projector_comes_from_its_own_subfolder(parts, tmp_path):
    model = save(parts, tmp_path / "parts" / "ears")
    model.generation_config.max_new_tokens = 7
    model.generation_config.save_pretrained(tmp_path / "parts" / "ears")
    joined = LsmForConditionalGeneration.from_pretrained(tmp_path / "parts", subfolder="ears")
    assert equal(joined, model) and joined.generation_config.max_new_tokens == 7


def test_a_joined_model_is_an_lsm_like_any_other(parts, tmp_path):
    model = save(parts, tmp_path / "parts" / "ears")
    joined = LsmForConditionalGeneration.from_pretrained(tmp_path / "parts" / "ears")
    joined.save_pretrained(tmp_path / "whole")
    assert equal(LsmForConditionalGeneration.from_pretrained(tmp_path / "whole"), model)
    joined.save_pretrained(tmp_path / "parts" / "again", projector_only=True)
    assert equal(LsmForConditionalGeneration.from_pretrained(tmp_path / "parts" / "again"), model)
    half = LsmForConditionalGeneration.from_pretrained(tmp_path / "parts" / "ears", dtype=torch.bfloat16)
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("settings", [{"tie_word_embeddings": True}, {"tie_word_embeddings": False}])
def test_the_row_of_the_placeholder_is_made_again(parts, tmp_path, settings):
    """The vocabulary of this LLM is full, so composing adds a row to its embeddings."""
    vocabulary = LlamaConfig.from_pretrained(parts["text"]).vocab_size
    config = LlamaConfig.from_pretrained(parts["text"], **settings)
    AutoModelForCausalLM.from_config(config).save_pretrained(parts["text"])
    model = save(parts, tmp_path / "parts" / "ears")
    assert model.config.text_config.vocab_size > vocabulary
    assert equal(LsmForConditionalGeneration.from_pretrained(tmp_path / "parts" / "ears"), model)


def test_folders_that_were_moved_are_named(parts, tmp_path):
    model = save(parts, tmp_path / "ears")
    moved = {name: shutil.move(folder, tmp_path / "far" / "away" / name) for name, folder in parts.items()}
    with pytest.raises(
        OSError,
        match=r"for whisper \(sha256:\w+\), which cannot be loaded: there is no folder whisper.*audio_model=",
    ):
        LsmForConditionalGeneration.from_pretrained(tmp_path / "ears")
    with pytest.raises(
        OSError, match=r"for llm \(sha256:\w+\), which cannot be loaded: there is no folder llm.*text_model="
    ):
        LsmForConditionalGeneration.from_pretrained(tmp_path / "ears", audio_model=moved["audio"])
    options = {f"{name}_model": folder for name, folder in moved.items()}
    assert equal(LsmForConditionalGeneration.from_pretrained(tmp_path / "ears", **options), model)


def test_an_llm_with_other_weights_is_refused_unless_told(parts, tmp_path):
    ears = tmp_path / "parts" / "ears"
    model = save(parts, ears)
    change(parts["text"])
    with pytest.raises(ValueError, match=r"is a projector for llm .*, but .*llm has other weights \(sha256:\w+\)"):
        LsmForConditionalGeneration.from_pretrained(ears)
    other = LsmForConditionalGeneration.from_pretrained(ears, allow_other_weights=True)
    assert torch.equal(other.model.projector.linear.weight, model.model.projector.linear.weight)
    assert not torch.equal(other.lm_head.weight, model.lm_head.weight)


def test_an_llm_that_lacks_weights_is_refused_even_if_others_are_allowed(parts, tmp_path):
    save(parts, tmp_path / "parts" / "ears")
    file = Path(parts["audio"]) / "model.safetensors"
    weights = load_file(file)
    weights.pop(next(name for name in weights if "encoder.conv1.weight" in name))
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"whisper lacks weights, which would be random: 1, such as .*conv1"):
        LsmForConditionalGeneration.from_pretrained(tmp_path / "parts" / "ears", allow_other_weights=True)


def test_a_trained_llm_is_never_left_out(parts, tmp_path):
    model, _ = compose(**parts, **SMALL)
    with torch.no_grad():
        model.lm_head.weight.add_(0.01)
    with pytest.raises(ValueError, match="The text model is not .* any more, so the projector alone"):
        model.save_pretrained(tmp_path / "ears", projector_only=True)
    model.config.sources = None
    with pytest.raises(ValueError, match="The audio model is not named in the configuration"):
        model.save_pretrained(tmp_path / "ears", projector_only=True)
    assert not (tmp_path / "ears").exists()


def test_a_whole_lsm_takes_no_other_parts(parts, tmp_path):
    compose(**parts, **SMALL, output=str(tmp_path / "whole"))
    with pytest.raises(ValueError, match="has its own encoder and LLM, so .*llm' has no effect"):
        LsmForConditionalGeneration.from_pretrained(tmp_path / "whole", text_model=parts["text"])


def test_the_hash_of_an_llm_is_the_same_in_other_data_types(parts):
    model, _ = compose(**parts, **SMALL)
    weights = model.state_dict()
    half = {name: value.bfloat16() for name, value in weights.items()}
    assert content_of(weights, "text", torch.float32) == content_of(half, "text", torch.bfloat16)
    assert content_of(weights, "text", torch.float32) != content_of(weights, "audio", torch.float32)


def test_recipes_open_such_a_folder_like_any_lsm(parts, tmp_path):
    ears = tmp_path / "parts" / "ears"
    model = save(parts, ears)
    assert equal(load(ears).model, model)
    assert equal(open_model(ears, LsmForConditionalGeneration), model)


# Over the Hub

PUBLISH = """
import sys
from huggingface_hub import HfApi
import torch
from recipes.listening.composing import compose
whisper, llm = sys.argv[1:]
for name, folder in {"org/whisper": whisper, "org/llm": llm}.items():
    HfApi().create_repo(name)
    HfApi().upload_folder(repo_id=name, folder_path=folder)
model, processor = compose("org/whisper", "org/llm", window_frames=8, qformer_hidden=16, qformer_heads=2)
model.save_pretrained("ears", projector_only=True, push_to_hub=True, repo_id="org/ears")
processor.push_to_hub("org/ears")
model.save_pretrained("whole"), processor.save_pretrained("whole")
from transformers import AutoModelForCausalLM
other = AutoModelForCausalLM.from_pretrained("org/llm")
other.lm_head.weight.data.mul_(2)
other.push_to_hub("org/llm")
import os, json
print(json.dumps(os.path.abspath("whole")))
"""

USE = """
import json, sys
sys.modules.update(dict.fromkeys(("configuration_lsm", "modeling_lsm", "processing_lsm")))  # users have no checkout
import numpy as np, torch
from transformers import AutoModel, AutoProcessor
name, options = sys.argv[1], json.loads(sys.argv[2])
model = AutoModel.from_pretrained(name, trust_remote_code=True, **options).eval()
processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
inputs = processor(text="Repeat: <|audio|>", audio=np.sin(np.arange(9000) / 20), return_tensors="pt")
with torch.no_grad():
    print(json.dumps(model(**inputs).logits[0].tolist()))
"""


@pytest.fixture(scope="module")
def whole(hub, whisper_dir, llm_dir, tmp_path_factory) -> str:
    """The whole LSM, of which the Hub has the projector `org/ears`; the LLM there has been trained since."""
    home = tmp_path_factory.mktemp("publisher") / "home"
    return run(PUBLISH, hub, home, str(whisper_dir), str(llm_dir), PYTHONPATH=str(ROOT))


def test_a_projector_on_the_hub_is_joined_to_the_commits_that_it_names(hub, whole, tmp_path):
    expected = run(USE, hub, tmp_path / "home", whole, "{}")
    joined = run(USE, hub, tmp_path / "home", "org/ears", "{}")
    offline = run(USE, hub, tmp_path / "home", "org/ears", "{}", HF_HUB_OFFLINE="1")
    for logits in (joined, offline):
        torch.testing.assert_close(torch.tensor(logits), torch.tensor(expected))
    files = hub.repos["model", "org/ears"].files()
    assert len(files["model.safetensors"].content) < 10_000_000
    sources = json.loads(files["config.json"].content)["sources"]
    assert {part: source["model"] for part, source in sources.items()} == {"audio": "org/whisper", "text": "org/llm"}


def test_another_revision_of_the_llm_is_refused_and_both_are_named(hub, whole, tmp_path):
    ended = start(USE, hub, tmp_path / "home", "org/ears", json.dumps({"text_model": "org/llm"}))
    assert ended.returncode != 0
    assert "org/ears is a projector for org/llm (" in ended.stderr and "but org/llm has other weights" in ended.stderr


def test_without_a_network_the_missing_part_is_named(hub, whole, tmp_path):
    home = tmp_path / "home"
    run("from huggingface_hub import snapshot_download as get; print(len(get('org/ears')))", hub, home)
    ended = start(USE, hub, home, "org/ears", "{}", HF_HUB_OFFLINE="1")
    assert ended.returncode != 0
    assert "org/ears is a projector for org/whisper (" in ended.stderr and "audio_model=FOLDER" in ended.stderr


def test_a_user_gets_any_data_type_and_is_not_asked_whether_to_run_code(hub, any_parts, tmp_path):
    ears = tmp_path / "parts" / "ears"
    save(any_parts, ears)
    ended = start(USE, hub, tmp_path / "home", str(ears), json.dumps({"dtype": "bfloat16"}))
    assert ended.returncode == 0, ended.stderr
    assert "run the custom code" not in ended.stdout + ended.stderr
