"""Every family of causal LLM inside an LSM: what it reads and writes as text stays its own, and it hears."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from language_models.templates import DEFAULT_CHAT_TEMPLATE
from language_models.tokenizers import speech_processor
from modeling_lsm import LsmForConditionalGeneration
from processing_lsm import AUDIO_TOKEN, LsmProcessor

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SIZES, "num_key_value_heads": 2}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
GPT2 |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}  # or no two trainings are the same
# Larger weights than the default's make what should be equal but is not visible.
LOUD = {"initializer_range": 0.2}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
FAMILIES = {
    "llama": LlamaConfig(**SIZES, **LOUD),
    "llama, grouped queries, tied": LlamaConfig(**GROUPED, **LOUD, tie_word_embeddings=True),
    "qwen2, tied": Qwen2Config(**GROUPED, **LOUD, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**GROUPED, **LOUD, head_dim=8),
    "mistral, sliding window": MistralConfig(**GROUPED, **LOUD, sliding_window=16),
    "gemma2, tied, capped": Gemma2Config(**GROUPED, **LOUD, head_dim=8, final_logit_softcapping=0.5, sliding_window=16),
    "gemma3": Gemma3TextConfig(**GROUPED, **LOUD, head_dim=8, sliding_window=16),
    "gemma3 with vision": Gemma3Config(text_config={**GROUPED, **LOUD, "head_dim": 8}, vision_config=VISION),
    "phi, head with a bias": PhiConfig(**SIZES, **LOUD),
    "phi3": Phi3Config(**GROUPED, **LOUD, pad_token_id=1),
    "smollm3": SmolLM3Config(**GROUPED, **LOUD, pad_token_id=1),
    "gpt2, tied, other names": GPT2Config(**GPT2, **LOUD),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, compose_tiny, whisper_dir, llm_dir, tmp_path_factory):
    """An LLM, and the LSM and processor that were composed of it, saved and loaded."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("family")
    tokenizer = AutoTokenizer.from_pretrained(llm_dir)
    config = FAMILIES[request.param]
    ids = {"vocab_size": len(tokenizer), "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1}
    config.get_text_config().update(ids)
    llm = AutoModelForCausalLM.from_config(config).eval()
    if llm.get_output_embeddings().bias is not None:
        torch.nn.init.normal_(llm.get_output_embeddings().bias)
    llm.save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    compose_tiny(str(whisper_dir), str(folder / "llm"), str(folder / "lsm"))
    lsm = LsmForConditionalGeneration.from_pretrained(folder / "lsm").eval()
    return llm, lsm, LsmProcessor.from_pretrained(folder / "lsm")


@torch.no_grad()
def test_text_is_read_as_the_llm_reads_it(family):
    llm, lsm, _ = family
    ids = torch.arange(2, 40)[None]
    vocab = llm.config.get_text_config().vocab_size
    torch.testing.assert_close(lsm(ids).logits[..., :vocab], llm(ids).logits, atol=1e-5, rtol=0)
    tied = lsm.lm_head.weight is lsm.get_input_embeddings().weight
    assert tied == lsm.config.text_config.tie_word_embeddings == lsm.config.tie_word_embeddings
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 1}
    assert torch.equal(lsm.generate(ids, **settings), llm.generate(ids, **settings))


def ask(processor, clips, **kwargs):
    texts = [f"{AUDIO_TOKEN} what is said?" + " and asked" * row for row in range(len(clips))]
    return processor(text=texts, audio=clips, return_tensors="pt", **kwargs)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_clip_among_others_is_that_clip_alone(family, clip, side):
    _, lsm, processor = family
    clips = [clip(0.3, 1), clip(7, 2), clip(2.6, 3)]
    inputs = ask(processor, clips, padding_side=side)
    mask = inputs["attention_mask"]
    together = lsm(**inputs).logits
    for row, audio in enumerate(clips):
        text = f"{AUDIO_TOKEN} what is said?" + " and asked" * row
        alone = lsm(**processor(text=text, audio=audio, return_tensors="pt")).logits[0]
        torch.testing.assert_close(together[row][mask[row] == 1], alone, atol=1e-5, rtol=0)


@torch.no_grad()
def test_answers_do_not_depend_on_cache_or_batch(family, clip):
    llm, lsm, processor = family
    clips = [clip(0.3, 1), clip(7, 2)]
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    together = lsm.generate(**ask(processor, clips), **settings)[:, -6:]
    for row, audio in enumerate(clips):
        text = f"{AUDIO_TOKEN} what is said?" + " and asked" * row
        alone = processor(text=text, audio=audio, return_tensors="pt")
        assert torch.equal(lsm.generate(**alone, **settings)[0, -6:], together[row])
    if llm._supports_sdpa and not isinstance(llm.config, GPT2Config):
        static = {"cache_implementation": "static", "disable_compile": True}
        assert torch.equal(lsm.generate(**ask(processor, clips), **settings, **static)[:, -6:], together)


@torch.no_grad()
def test_what_is_heard_is_answered(family, clip):
    """Other speech, other logits: no family drops the embeddings on the way."""
    _, lsm, processor = family
    first, second = (lsm(**ask(processor, [clip(4, seed)])).logits[0, -1] for seed in (1, 2))
    assert (first - second).abs().max() > 1e-3


# What tokenizers lack

GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}"
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] | trim + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<model>' }}{% endif %}"
)
SILENT = "{% for m in messages if m['role'] != 'system' %}[{{ m['content'] }}]{% endfor %}"


@pytest.mark.parametrize("template", [GEMMA, SILENT], ids=["refuses", "drops"])
def test_a_system_message_opens_the_first_question_of_llms_that_take_none(processor, llm_dir, template):
    tokenizer = AutoTokenizer.from_pretrained(llm_dir, extra_special_tokens=[AUDIO_TOKEN])
    tokenizer.chat_template = template
    own = speech_processor(processor.feature_extractor, tokenizer)
    system = {"role": "system", "content": "Be brief."}
    chat = own.conversation("What is said?", audio=True, response="Hello.")
    as_one = [{"role": "user", "content": f"Be brief.\n\nWhat is said?\n{AUDIO_TOKEN}"}, chat[1]]
    expected = tokenizer.apply_chat_template(as_one, chat_template=template, tokenize=False)
    assert own.apply_chat_template([system, *chat]) == expected
    assert own.apply_chat_template(chat) == expected.replace("Be brief.\n\n", "")


def test_a_tokenizer_without_template_and_pad_token_gets_the_defaults(compose_tiny, whisper_dir, llm_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(llm_dir)
    tokenizer.chat_template = None
    AutoModelForCausalLM.from_pretrained(llm_dir).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, processor = compose_tiny(str(whisper_dir), str(tmp_path))
    assert processor.chat_template.endswith(DEFAULT_CHAT_TEMPLATE)
    assert processor.tokenizer.pad_token == processor.tokenizer.eos_token == "</s>"
    assert model.generation_config.pad_token_id == processor.tokenizer.pad_token_id
    messages = [{"role": "system", "content": "Be brief."}, *processor.conversation("What is said?", audio=True)]
    rendered = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert rendered == f"<s>Be brief. USER: What is said?\n{AUDIO_TOKEN} ASSISTANT:"


def test_a_tokenizer_without_eos_is_refused(compose_tiny, whisper_dir, llm_dir, processor, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(llm_dir, extra_special_tokens=[AUDIO_TOKEN])
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        speech_processor(processor.feature_extractor, tokenizer)
    AutoModelForCausalLM.from_pretrained(llm_dir).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no EOS token"):
        compose_tiny(str(whisper_dir), str(tmp_path))
