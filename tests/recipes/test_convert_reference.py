"""A tiny checkpoint of the original code, with what that code computed: ours computes the same."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoProcessor, WhisperFeatureExtractor

from modeling_lsm import LsmForConditionalGeneration
from processing_lsm import AUDIO_TOKEN
from recipes.convert_reference import convert, main

REFERENCE = Path(__file__).parents[1] / "reference"
CASES = json.loads((REFERENCE / "dims.json").read_text())["cases"]
VOCAB = 97


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    unused = convert(str(REFERENCE), str(folder), qformer_heads=4)
    return folder, unused


@pytest.fixture(scope="module")
def expected():
    return load_file(REFERENCE / "expected.safetensors")


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_the_logits_are_the_originals(converted, expected, case):
    model = LsmForConditionalGeneration.from_pretrained(converted[0])
    clips = [expected[f"{case}.audio.{i}"].numpy() for i in range(len(CASES[case]))]
    features = WhisperFeatureExtractor()(clips, sampling_rate=16_000, return_tensors="pt", return_attention_mask=True)
    frames = [(len(clip) + 319) // 320 for clip in clips]
    mask = (torch.arange(3000) < 2 * torch.tensor(frames)[:, None]).long()
    heard = model.get_audio_features(features["input_features"], mask)
    speech_tokens = int(expected[f"{case}.n_speech"])
    assert heard.num_tokens.tolist() == [speech_tokens] * len(clips)

    prefix, suffix = expected[f"{case}.prefix"], expected[f"{case}.suffix"]
    slot = torch.full((len(clips), speech_tokens), model.config.audio_token_id)
    output = model(
        input_ids=torch.cat([prefix, slot, suffix], dim=1),
        input_features=features["input_features"],
        input_features_mask=mask,
    )
    logits = output.logits[..., :VOCAB]  # the placeholder's own, 0, is one word more
    torch.testing.assert_close(logits, expected[f"{case}.logits"], atol=1e-5, rtol=0)
    ignored = torch.full((len(clips), prefix.shape[1] + speech_tokens), -100)
    labels = torch.cat([ignored, expected[f"{case}.labels"]], dim=1)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(loss, expected[f"{case}.loss"][0], atol=1e-5, rtol=0)


def test_what_the_original_never_uses_is_listed(converted):
    dropped = set(converted[1])
    original = torch.load(REFERENCE / "pytorch_model.bin", weights_only=True)
    assert dropped < set(original)
    assert "speech_Qformer.cls.predictions.bias" in dropped
    assert "speech_Qformer.bert.encoder.layer.1.output.dense.weight" in dropped
    kept = load_file(converted[0] / "model.safetensors")
    assert len(kept) == len(original) - len(dropped)


def test_without_a_tokenizer_the_placeholder_is_a_new_last_row(converted):
    model = AutoModelForCausalLM.from_pretrained(converted[0])
    assert model.config.audio_token_id == VOCAB
    assert model.lm_head.out_features == VOCAB + 1
    assert not (converted[0] / "processor_config.json").exists()
    assert {file.suffix for file in converted[0].iterdir()} == {".json", ".safetensors", ".py"}


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory, llm_dir):
    """A tokenizer of as many words as the checkpoint has embeddings."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(VOCAB - 3))]
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


def test_with_a_tokenizer_it_speaks_the_original_prompt(tokenizer_dir, tmp_path, monkeypatch, capsys, clip):
    options = ["--tokenizer", str(tokenizer_dir), "--qformer-heads", "4"]
    monkeypatch.setattr("sys.argv", ["convert", "--checkpoint", str(REFERENCE), "--output", str(tmp_path), *options])
    main()
    assert str(tmp_path) in capsys.readouterr().out
    processor = AutoProcessor.from_pretrained(tmp_path)
    student = processor.conversation("Transcribe.", audio=clip(1), response="Done")
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. \n\n"
    )
    expected = f"<s>{system}USER: Transcribe.\nSPEECH:{AUDIO_TOKEN}\nASSISTANT:Done</s>"
    assert processor.apply_chat_template(student) == expected
    teacher = processor.conversation("Transcribe.", transcript="hello", response="Done")
    assert processor.apply_chat_template(teacher) == expected.replace(AUDIO_TOKEN, "hello")

    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    inputs = processor.apply_chat_template(
        [processor.conversation("w1 w2", audio=clip(seconds)) for seconds in (2, 7.5)],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    assert (inputs["input_ids"] == processor.audio_token_id).sum(-1).tolist() == [93, 93]
    answer = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert answer.shape[1] == inputs["input_ids"].shape[1] + 3


def test_shards_are_read(tmp_path, converted):
    tensors = torch.load(REFERENCE / "pytorch_model.bin", weights_only=True)
    names = sorted(tensors)
    for shard, part in enumerate((names[:50], names[50:]), start=1):
        save_file({name: tensors[name].clone() for name in part}, tmp_path / f"model-0000{shard}-of-00002.safetensors")
    shutil.copy(REFERENCE / "config.json", tmp_path)
    convert(str(tmp_path), str(tmp_path / "out"), qformer_heads=4)
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, load_file(converted[0] / "model.safetensors")[name]), name


def change(tmp_path, tensors=None, **settings):
    folder = tmp_path / "changed"
    folder.mkdir()
    config = {**json.loads((REFERENCE / "config.json").read_text()), **settings}
    (folder / "config.json").write_text(json.dumps(config))
    original = torch.load(REFERENCE / "pytorch_model.bin", weights_only=True)
    torch.save({**original, **(tensors or {})}, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"second_stride": 0.1}, r"second_stride to 0\.1"),
        (
            {"tensors": {"llama_model.base_model.lora_A.weight": torch.zeros(1)}},
            "not belong to .* code.*lora_A",
        ),
    ],
)
def test_other_checkpoints_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        convert(str(change(tmp_path, **changes)), str(tmp_path / "out"), qformer_heads=4)
    assert not (tmp_path / "out").exists()


def test_folders_that_are_no_checkpoint_are_refused(tmp_path, lsm_dir):
    with pytest.raises(ValueError, match=r"no config\.json"):
        convert(str(tmp_path), str(tmp_path / "out"))
    with pytest.raises(ValueError, match="whisper_config"):
        convert(str(lsm_dir), str(tmp_path / "out"))
    shutil.copy(REFERENCE / "config.json", tmp_path)
    with pytest.raises(ValueError, match="no weights"):
        convert(str(tmp_path), str(tmp_path / "out"))


def test_a_pickle_that_runs_code_is_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    shutil.copy(REFERENCE / "config.json", tmp_path)
    torch.save({"ln_speech.weight": Payload()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Exception, match="[Ww]eights"):
        convert(str(tmp_path), str(tmp_path / "out"))
    assert not (tmp_path / "executed").exists()
