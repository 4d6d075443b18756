import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    TextStreamer,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

from language_models.identity import identify
from modeling_lsm import LsmForConditionalGeneration
from processing_lsm import AUDIO_TOKEN, LsmProcessor
from recipes.chat import Conversation
from recipes.compose import main
from recipes.listening.composing import compose

SMALL = {"qformer_hidden": 16, "qformer_heads": 2}


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


def test_the_llm_keeps_its_data_type_where_it_is_slow(compose_tiny, whisper_dir, llm_dir, tmp_path, monkeypatch):
    """The machine that composes is not the one that trains."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    AutoModelForCausalLM.from_pretrained(llm_dir, dtype="float16").save_pretrained(tmp_path / "llm")
    AutoTokenizer.from_pretrained(llm_dir).save_pretrained(tmp_path / "llm")
    assert compose_tiny(str(whisper_dir), str(tmp_path / "llm"))[0].dtype == torch.float16


def test_the_qformer_starts_from_the_last_layers_of_whispers_decoder(reading_whisper_dir, llm_dir):
    model, _ = compose(str(reading_whisper_dir), str(llm_dir))
    decoder, frames = WhisperModel.from_pretrained(reading_whisper_dir).decoder, torch.randn(5, 24, 32)
    hidden = torch.randn(5, 1, 32)
    for layer, known in zip(model.model.projector.qformer.encoder.layer, decoder.layers[1:], strict=True):
        cross = layer.crossattention
        cross.attention.query.load_state_dict(known.encoder_attn.q_proj.state_dict())
        read = cross.output.dense(cross.attention(hidden, encoder_hidden_states=frames)[0])
        torch.testing.assert_close(read, known.encoder_attn(hidden, key_value_states=frames)[0])
        through = layer.output_query.dense(layer.intermediate_query(cross.output.LayerNorm(hidden)))
        expected = known.fc2(known.activation_fn(known.fc1(known.final_layer_norm(hidden))))
        torch.testing.assert_close(through, expected, rtol=1e-4, atol=1e-4)  # their norms have another epsilon


def test_the_papers_qformer_starts_with_random_weights(reading_whisper_dir, llm_dir):
    def first_keys(init):
        model, _ = compose(str(reading_whisper_dir), str(llm_dir), qformer_init=init)
        return model.model.projector.qformer.encoder.layer[0].crossattention.attention.key.weight

    assert torch.equal(first_keys("auto"), first_keys("decoder"))
    assert not torch.equal(first_keys("auto"), first_keys("random"))


def test_a_decoder_of_other_sizes_is_left_or_refused(reading_whisper_dir, llm_dir):
    def keys(**settings):
        model, _ = compose(str(reading_whisper_dir), str(llm_dir), **settings)
        return model.model.projector.qformer.encoder.layer[0].crossattention.attention.key.weight

    for sizes, unlike in (
        ({"qformer_hidden": 48, "qformer_ffn": 128}, "--qformer-hidden is 48, not 32"),
        ({"qformer_heads": 2, "qformer_ffn": 64}, "--qformer-heads is 2, not 4; --qformer-ffn is 64, not 128"),
        ({"qformer_layers": 4}, "--qformer-layers is 4, not at most 3"),
    ):
        assert torch.equal(keys(**sizes), keys(**sizes, qformer_init="random"))
        with pytest.raises(ValueError, match=f"cannot start from Whisper's decoder: {unlike}. Give it these sizes"):
            keys(**sizes, qformer_init="decoder")
    with pytest.raises(ValueError, match="qformer_init 'bert' is unknown; expected one of auto, decoder, random"):
        keys(qformer_init="bert")


def test_a_decoder_without_weights_is_not_copied(reading_whisper_dir, llm_dir):
    """transformers would fill it with random numbers, which no seed of ours decides."""
    file = reading_whisper_dir / "model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if "decoder" not in name}, file, {"format": "pt"})
    first, second = (compose(str(reading_whisper_dir), str(llm_dir))[0].state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(ValueError, match="--qformer-layers is 2, not at most 0"):
        compose(str(reading_whisper_dir), str(llm_dir), qformer_init="decoder")
    with pytest.raises(ValueError, match="reading-whisper has no decoder, which --reading-embeddings audio needs"):
        compose(str(reading_whisper_dir), str(llm_dir), reading_embeddings="audio")


def test_speech_is_compared_with_whispers_words_if_it_has_a_decoder_and_a_tokenizer(reading_whisper_dir, llm_dir):
    def reading(**settings):
        return compose(str(reading_whisper_dir), str(llm_dir), **settings)[0].config.reading_embeddings

    assert (reading(), reading(weights=False), reading(reading_embeddings="audio")) == ("audio",) * 3
    assert reading(reading_embeddings="text") == reading(pieces_per_token=0) == "text"
    (reading_whisper_dir / "tokenizer.json").unlink()
    assert reading() == "text"
    with pytest.raises(
        ValueError, match="has no tokenizer, which --reading-embeddings audio needs; give --reading-embeddings text"
    ):
        reading(reading_embeddings="audio")
    with pytest.raises(ValueError, match="reading_embeddings 'whisper' is unknown; expected one of auto, text, audio"):
        reading(reading_embeddings="whisper")


@torch.no_grad()
def test_a_state_of_whispers_decoder_is_read_as_the_word_that_it_says(reading_whisper_dir, llm_dir):
    """The Q-Former's last norm and the linear map are the decoder's last norm, and the scale makes a word likely."""
    model, processor = compose(str(reading_whisper_dir), str(llm_dir))
    decoder, states = WhisperModel.from_pretrained(reading_whisper_dir).decoder, torch.randn(6, 32)
    divided = torch.nn.functional.layer_norm(states, (32,))
    torch.testing.assert_close(model.model.projector.linear(divided), decoder.layer_norm(states))
    frames = torch.nn.functional.layer_norm(torch.randn(500, 32), (32,))
    heard = WhisperModel.from_pretrained(reading_whisper_dir).encoder.layer_norm(frames)
    torch.testing.assert_close(model.model.projector.layer_norm(heard).std(), heard.std(), rtol=0.05, atol=0)
    vectors, reader = model.model.reading_embeddings.weight, model.model.projector.reader
    said = processor.tokenizer("what", add_special_tokens=False).input_ids
    likely = reader.logits(vectors[said], vectors).softmax(-1)
    assert likely.argmax(-1).tolist() == [id + 1 for id in said] and likely.amax(-1).min() > 0.5


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


# Generation settings of others


@pytest.fixture
def compose_with(llm_dir, whisper_dir, tmp_path):
    """`compose_with(temperature=0.9, ...)`: the generation settings of an LSM of an LLM that has these."""

    def go(**given) -> GenerationConfig:
        shutil.copytree(llm_dir, tmp_path / "llm")
        file = tmp_path / "llm" / "generation_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | given))
        compose(str(whisper_dir), str(tmp_path / "llm"), weights=False, **SMALL)  # as a preflight does
        compose(str(whisper_dir), str(tmp_path / "llm"), str(tmp_path / "lsm"), **SMALL)
        return LsmForConditionalGeneration.from_pretrained(tmp_path / "lsm").generation_config

    return go


@pytest.mark.parametrize(
    "given",
    [
        {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05},
        {"num_beams": 4, "early_stopping": True, "length_penalty": 2.0},
        {"max_length": 4096},
        {"forced_eos_token_id": 1},
        {"suppress_tokens": [7, 9]},
        {"num_beams": 2, "num_return_sequences": 2},
        {"return_dict_in_generate": True, "output_scores": True},
    ],
)
def test_generation_settings_of_the_llm_are_kept(compose_with, processor, given, caplog):
    found = compose_with(**given)
    for name, value in given.items():
        expected = [*value, processor.audio_token_id] if name == "suppress_tokens" else value
        assert getattr(found, name) == expected, name
    assert "left out" not in caplog.text


@pytest.mark.parametrize(
    ("given", "left_out"),
    [
        ({"temperature": 0.9, "top_p": 0.6, "max_length": 4096}, "temperature=0.9, top_p=0.6"),  # Vicuna's
        ({"typical_p": 0.5}, "typical_p=0.5"),
        ({"early_stopping": True, "length_penalty": 2.0}, "early_stopping=True, length_penalty=2.0"),
        ({"num_return_sequences": 2}, "num_return_sequences=2"),
        ({"output_scores": True}, "output_scores=True"),
        ({"use_cache": False, "cache_implementation": "static"}, "cache_implementation=static"),
        ({"pad_token_id": -1}, "pad_token_id=-1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
    ],
)
def test_generation_settings_that_cannot_be_are_left_out_and_said(compose_with, given, left_out, caplog):
    found = compose_with(**given)
    found.validate(strict=True)
    assert f"invalid or have no effect are left out: {left_out}\n" in caplog.text
    assert found.max_length == given.get("max_length", GenerationConfig().max_length)


def test_an_lsm_answers_greedily_whatever_its_settings_are(compose_with, tmp_path):
    compose_with(num_beams=2, num_return_sequences=2, return_dict_in_generate=True)
    chat = Conversation(str(tmp_path / "lsm"), max_new_tokens=2)
    assert isinstance(chat.ask("what", TextStreamer(chat.processor.tokenizer)), str)  # beams cannot be streamed


# What fails leaves nothing behind, and what is written can be loaded


def test_a_compose_that_fails_leaves_nothing_behind(whisper_dir, llm_dir, tmp_path, monkeypatch):
    def card(*_):
        raise OSError("disk full")

    monkeypatch.setattr("recipes.listening.composing.write_base_card", card)
    with pytest.raises(OSError, match="disk full"):
        compose(str(whisper_dir), str(llm_dir), str(tmp_path / "lsm"), **SMALL)
    assert not list(tmp_path.iterdir())


def test_what_could_not_be_loaded_is_not_said_to_be_written(whisper_dir, llm_dir, tmp_path, monkeypatch):
    def without_its_head(self, folder, save=LsmForConditionalGeneration.save_pretrained):
        save(self, folder, state_dict={k: v for k, v in self.state_dict().items() if "lm_head" not in k})

    monkeypatch.setattr(LsmForConditionalGeneration, "save_pretrained", without_its_head)
    with pytest.raises(ValueError, match=r"1 missing_keys: \['lm_head.weight'\]"):
        compose(str(whisper_dir), str(llm_dir), str(tmp_path / "lsm"), **SMALL)
    assert not list(tmp_path.iterdir())


def test_an_lsm_takes_the_place_of_another_and_leaves_other_files_alone(whisper_dir, llm_dir, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "model-00001-of-00002.safetensors").write_text("of an older LSM")
    for frames in (8, 9):
        compose(str(whisper_dir), str(llm_dir), str(tmp_path), window_frames=frames, **SMALL)
    assert LsmForConditionalGeneration.from_pretrained(tmp_path).config.window_frames == 9
    assert (tmp_path / "notes.txt").exists() and not list(tmp_path.glob("model-*"))


@torch.no_grad()
@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_an_adapter_is_merged_into_its_llm(whisper_dir, llm_dir, tmp_path, with_tokenizer):
    llm = AutoModelForCausalLM.from_pretrained(llm_dir)
    adapted = get_peft_model(llm, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "lora")
    if with_tokenizer:
        AutoTokenizer.from_pretrained(llm_dir).save_pretrained(tmp_path / "lora")
    compose(str(whisper_dir), str(tmp_path / "lora"), str(tmp_path / "lsm"), **SMALL)
    lsm = LsmForConditionalGeneration.from_pretrained(tmp_path / "lsm").eval()
    ids = torch.tensor([[0, 9, 8, 7]])
    expected = adapted.eval()(ids).logits
    assert (expected - AutoModelForCausalLM.from_pretrained(llm_dir)(ids).logits).abs().max() > 0.01
    torch.testing.assert_close(lsm(ids).logits[..., : expected.shape[-1]], expected, atol=1e-4, rtol=0)
    assert lsm.config.responder["model"] == "lora"


@pytest.mark.parametrize("weights", [True, False])
def test_llms_that_cannot_become_part_of_an_lsm_are_refused_by_name(whisper_dir, lsm_dir, wide_lsm_dir, weights):
    """A preflight, which reads no weights, knows it too."""
    folder = wide_lsm_dir.parent
    llm, bits = AutoModelForCausalLM.from_pretrained(folder / "llm"), BitsAndBytesConfig(load_in_4bit=True)
    tuned = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(llm, tuned).save_pretrained(folder / "prompt")
    llm = AutoModelForCausalLM.from_pretrained(folder / "llm", quantization_config=bits)
    llm.save_pretrained(folder / "bits")
    refusals = {
        folder / "prompt": "prompt is an adapter of type PROMPT_TUNING, which cannot be merged",
        folder / "bits": r"bits is quantised \(bitsandbytes\).* --llm qlora",
        lsm_dir: f"{lsm_dir.name} is already an LSM",
    }
    for text, message in refusals.items():
        with pytest.raises(ValueError, match=message):
            compose(str(whisper_dir), str(text), weights=weights, **SMALL)


@pytest.fixture
def sentencepiece_llm_dir(llm_dir, tmp_path):
    """An LLM as Vicuna v1.5 is published: its tokenizer is a `tokenizer.model` alone."""
    (tmp_path / "vicuna").mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(llm_dir / name, tmp_path / "vicuna")
    tokens = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "vicuna" / "tokenizer_config.json").write_text(json.dumps(tokens))
    (tmp_path / "vicuna" / "tokenizer.model").touch()
    return tmp_path / "vicuna"


def test_a_tokenizer_that_is_a_sentencepiece_model_alone(whisper_dir, sentencepiece_llm_dir, tmp_path):
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer  # declared; not in older environments
    pytest.importorskip("google.protobuf")
    with (sentencepiece_llm_dir / "tokenizer.model").open("wb") as file:
        said = iter(["the speech says what is said and what is asked"] * 20)
        settings = {"model_type": "bpe", "byte_fallback": True, "hard_vocab_limit": False, "minloglevel": 2}
        trainer.train(sentence_iterator=said, model_writer=file, vocab_size=284, **settings)
    compose(str(whisper_dir), str(sentencepiece_llm_dir), str(tmp_path / "lsm"), **SMALL)
    tokenizer = LsmProcessor.from_pretrained(tmp_path / "lsm").tokenizer
    assert tokenizer.decode(tokenizer("what is said").input_ids, skip_special_tokens=True) == "what is said"


@pytest.mark.parametrize("missing", ["sentencepiece", "protobuf"])
def test_packages_that_a_tokenizer_needs_are_named(whisper_dir, sentencepiece_llm_dir, monkeypatch, missing):
    def from_pretrained(*_, **__):
        raise ValueError("`tiktoken` is required to read a `tiktoken` file.")  # as transformers says then

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    monkeypatch.setattr(f"language_models.tokenizers.is_{missing}_available", lambda: False)
    with pytest.raises(ImportError, match=r"vicuna is a sentencepiece model; pip install sentencepiece protobuf"):
        compose(str(whisper_dir), str(sentencepiece_llm_dir), **SMALL)


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


@torch.no_grad()
def test_a_token_in_the_direction_of_a_piece_is_read_as_it_whatever_the_embeddings_have_in_common(
    whisper_dir, llm_dir, tmp_path
):
    """Embeddings of LLMs share a direction. A fixed scale of their cosines would make no piece likely."""
    llm = AutoModelForCausalLM.from_pretrained(llm_dir)
    scales = []
    for shared in (0.0, 0.3):
        llm.get_input_embeddings().weight.data += shared
        llm.save_pretrained(tmp_path / "llm")
        AutoTokenizer.from_pretrained(llm_dir).save_pretrained(tmp_path / "llm")
        model, _ = compose(str(whisper_dir), str(tmp_path / "llm"), **SMALL)
        reader, pieces = model.model.projector.reader, llm.get_input_embeddings().weight
        directions = torch.nn.functional.normalize(pieces, dim=-1)
        directions = directions - directions.mean(0)  # what tells a piece from the others
        chances = reader.logits(directions, pieces).softmax(-1)[:, 1:].diagonal()
        assert chances.median() > 0.9
        scales.append(float(reader.scale))
    assert scales[1] > 1.2 * scales[0]
