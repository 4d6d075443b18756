import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer, WhisperConfig, WhisperFeatureExtractor, WhisperModel

from dataset_builders.text_llm import identify
from modeling_lsm import LsmForConditionalGeneration
from processing_lsm import AUDIO_TOKEN, LsmProcessor
from recipes.compose import compose, main


def test_no_second_copy_of_the_llm(compose_tiny, whisper_dir, llm_dir):
    model, _ = compose_tiny(str(whisper_dir), str(llm_dir))
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert model.config.text_config is model.model.language_model.config


def test_the_folder_names_no_machine(lsm_dir, llm_dir, whisper_dir):
    for file in lsm_dir.iterdir():
        if file.suffix in {".json", ".jinja"}:
            text = file.read_text()
            assert str(llm_dir.parent) not in text and str(whisper_dir.parent) not in text, file.name
    config = json.loads((lsm_dir / "config.json").read_text())
    assert config["responder"]["model"] == "tiny-llama"
    assert config["responder"]["revision"].startswith("sha256:")


def test_the_folder_has_a_card_that_names_its_parts_and_settings(whisper_dir, llm_dir, tmp_path):
    compose(str(whisper_dir), str(llm_dir), str(tmp_path), window_frames=25, qformer_hidden=32, qformer_heads=4)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model is None  # the Hub has neither
    for shown in ("**Not trained yet.**", "`tiny-whisper`", "`tiny-llama`", "25 encoder frames (0.50 s)"):
        assert shown in card.text
    assert str(llm_dir.parent) not in str(card) and str(whisper_dir.parent) not in str(card)


def test_the_responder_is_known_by_its_weights(llm_dir, lsm_dir, processor, tmp_path):
    responder = LsmForConditionalGeneration.from_pretrained(lsm_dir).config.responder
    assert responder == {**identify(str(llm_dir)), "template": processor.template_hash}
    copy = tmp_path / "elsewhere"
    shutil.copytree(llm_dir, copy)
    assert identify(str(copy))["revision"] == responder["revision"]
    llm = AutoModelForCausalLM.from_pretrained(copy)
    llm.lm_head.weight.data[0, 0] += 1
    llm.save_pretrained(copy)
    assert identify(str(copy))["revision"] != responder["revision"]


@pytest.mark.parametrize("source", ["org/never-downloaded", "empty folder"])
def test_a_responder_without_a_revision_is_refused(source, tmp_path):
    with pytest.raises(ValueError, match=r"commit|no weights"):
        identify(str(tmp_path) if source == "empty folder" else source)


def test_a_new_embedding_is_the_same_whenever_it_is_made(compose_tiny, whisper_dir, llm_dir):
    """It has a share in every likelihood; a random one would change figures from one loading to the next."""
    first, second = (compose_tiny(str(whisper_dir), str(llm_dir))[0] for _ in range(2))
    assert first.config.audio_token_id == first.lm_head.out_features - 1
    for model in (first, second):
        assert not model.lm_head.weight[-1].any()
        assert not model.get_input_embeddings().weight[-1].any()


def test_spare_embeddings_are_used_before_new_ones(compose_tiny, whisper_dir, llm_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(llm_dir)
    llm = AutoModelForCausalLM.from_pretrained(llm_dir)
    llm.resize_token_embeddings(len(tokenizer) + 20, mean_resizing=False)
    llm.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, processor = compose_tiny(str(whisper_dir), str(tmp_path))
    assert model.config.text_config.vocab_size == len(tokenizer) + 20
    assert processor.audio_token_id == len(tokenizer)
    assert processor.tokenizer.pad_token == "</s>"
    assert processor.tokenizer.tokenize(AUDIO_TOKEN) == [AUDIO_TOKEN]


def test_the_seed_decides(compose_tiny, whisper_dir, llm_dir):
    def queries(seed):
        return compose_tiny(str(whisper_dir), str(llm_dir), seed=seed)[0].model.projector.queries

    state = torch.random.get_rng_state()
    assert torch.equal(queries(3), queries(3))
    assert not torch.equal(queries(3), queries(4))
    assert torch.equal(state, torch.random.get_rng_state())


def test_dtype_is_of_the_whole_model(compose_tiny, whisper_dir, llm_dir, tmp_path):
    compose_tiny(str(whisper_dir), str(llm_dir), str(tmp_path), dtype="bfloat16")
    lsm = LsmForConditionalGeneration.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in lsm.parameters()} == {torch.bfloat16}


def test_parts_that_do_not_fit_are_refused(compose_tiny, whisper_dir, llm_dir, tmp_path):
    folder = tmp_path / "whisper"
    shutil.copytree(whisper_dir, folder)
    WhisperFeatureExtractor(feature_size=128).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"80 mels.*128"):
        compose_tiny(str(folder), str(llm_dir))
    WhisperFeatureExtractor(chunk_length=40).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"3000 frames.*4000"):
        compose_tiny(str(folder), str(llm_dir))
    with pytest.raises(ValueError, match="lacks"):
        compose_tiny(str(llm_dir), str(llm_dir))


def test_the_command_line(whisper_dir, llm_dir, tmp_path, monkeypatch, capsys):
    options = ["--qformer-hidden", "16", "--qformer-heads", "2", "--window-frames", "8", "--no-instruction-first"]
    paths = ["--audio", str(whisper_dir), "--text", str(llm_dir), "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["compose", *paths, *options])
    main()
    assert "new parameters" in capsys.readouterr().out
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["window_frames"], config["qformer_config"]["intermediate_size"]) == (8, 64)
    assert json.loads((tmp_path / "processor_config.json").read_text())["instruction_first"] is False


@torch.no_grad()
@pytest.mark.parametrize(("mels", "width", "layers", "heads"), [(80, 24, 1, 2), (128, 40, 3, 4)])
def test_whispers_of_any_size(compose_tiny, llm_dir, tmp_path, clip, mels, width, layers, heads):
    """80 mels as in tiny to large-v2, 128 as in large-v3."""
    config = WhisperConfig(
        num_mel_bins=mels, d_model=width, encoder_layers=layers, encoder_attention_heads=heads, encoder_ffn_dim=64,
        decoder_layers=1, decoder_attention_heads=heads, decoder_ffn_dim=16, vocab_size=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    whisper = WhisperModel(config).eval()
    whisper.save_pretrained(tmp_path / "whisper")
    WhisperFeatureExtractor(feature_size=mels).save_pretrained(tmp_path / "whisper")
    compose_tiny(str(tmp_path / "whisper"), str(llm_dir), str(tmp_path / "lsm"))
    lsm = LsmForConditionalGeneration.from_pretrained(tmp_path / "lsm")
    processor = LsmProcessor.from_pretrained(tmp_path / "lsm")
    inputs = processor(audio=clip(30), return_tensors="pt")
    assert inputs["input_features"].shape == (1, mels, 3000)
    heard = lsm.get_audio_features(**inputs)
    expected = whisper.encoder(inputs["input_features"]).last_hidden_state
    torch.testing.assert_close(heard.last_hidden_state, expected, atol=1e-5, rtol=0)
    assert heard.pooler_output.shape == (89, lsm.config.text_config.hidden_size)
