"""Prompts and audio in, model inputs out."""

import copy
import datetime
import functools
import hashlib
import json

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_tokenizer import CHAT_TEMPLATE, DATED_TEMPLATE, THINKING_TEMPLATE, tiny_sentencepiece, tiny_tokenizer
from tokenizers import AddedToken
from transformers import AutoTokenizer, ByT5Tokenizer, WhisperFeatureExtractor

from language_models.templates import DEFAULT_CHAT_TEMPLATE
from language_models.tokenizers import speech_processor
from processing_lsm import AUDIO_TOKEN, BREAK, LsmProcessor, load_audio


@given(
    prompts=st.lists(st.lists(st.sampled_from(["what", " is said", AUDIO_TOKEN, "<s>"]), max_size=5), max_size=3),
    clips=st.lists(st.integers(0, 3000), max_size=4),
)
@settings(
    max_examples=100, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
def test_the_processor_takes_matching_prompts_and_refuses_the_others(processor, clip, prompts, clips):
    texts = ["".join(pieces) for pieces in prompts]
    slots = sum(text.count(AUDIO_TOKEN) for text in texts)
    audio = [clip(samples / 16_000) for samples in clips]
    if not texts or slots != len(clips) or 0 in clips:
        with pytest.raises(ValueError, match="empty|placeholders"):
            processor(text=texts, audio=audio or None)
        return
    inputs = processor(text=texts, audio=audio or None)
    found = sum(row.count(processor.audio_token_id) for row in inputs["input_ids"])
    assert found == sum(processor.num_audio_tokens(clips)) if clips else found == 0
    assert ("input_features" in inputs) == bool(clips)


def test_a_conversation_of_nothing_is_refused(processor):
    with pytest.raises(ValueError, match="empty"):
        processor.apply_chat_template([])


def test_audio_alone_gives_features_alone(processor, clip):
    inputs = processor(audio=[clip(0.5), clip(1)], return_tensors="pt")
    assert set(inputs) == {"input_features", "input_features_mask"}
    assert inputs["input_features_mask"].sum(-1).tolist() == [50, 100]
    with pytest.raises(ValueError, match="Neither `text` nor `audio` is given"):
        processor()


# Keywords


def chat(processor, audio, **kwargs):
    settings = {"tokenize": True, "return_dict": True, "return_tensors": "pt"} | kwargs
    return processor.apply_chat_template(processor.conversation("What is said?", audio=audio), **settings)


def test_the_rate_is_obeyed_wherever_it_is_given(processor, clip):
    audio = clip(0.5)
    ways = [{"sampling_rate": 8_000}, {"audio_kwargs": {"sampling_rate": 8_000}}]
    ways += [{"common_kwargs": {"sampling_rate": 8_000}}]
    for way in ways:
        text = processor(text=AUDIO_TOKEN, audio=audio, return_tensors="pt", **way)
        alone = processor(audio=audio, return_tensors="pt", **way)
        inputs = [text, alone, chat(processor, audio, **way), chat(processor, audio, processor_kwargs=way)]
        assert [each["input_features_mask"].sum().item() for each in inputs] == [100] * 4, way
    assert chat(processor, load_audio(audio, 8_000))["input_features_mask"].sum() == 100


def test_what_the_tokenizer_takes_is_obeyed_wherever_it_is_given(processor, clip):
    batch = {"text": [AUDIO_TOKEN, AUDIO_TOKEN + " and more"], "audio": [clip(0.5)] * 2}
    for way in ({"padding_side": "right"}, {"text_kwargs": {"padding_side": "right"}}):
        assert processor(**batch, return_tensors="pt", **way)["attention_mask"][0].tolist()[-1] == 0
    tensors = {"common_kwargs": {"return_tensors": "pt"}}
    assert torch.is_tensor(processor(**batch, **tensors)["input_ids"])
    assert torch.is_tensor(processor(audio=clip(0.5), **tensors)["input_features"])
    own = "{% for m in messages %}{{ m['content'] }}{% endfor %}{{ mood }}"
    assert processor.apply_chat_template(processor.conversation("Hi."), chat_template=own, mood="glad").endswith("glad")


@pytest.mark.parametrize(
    ("keywords", "named"),
    [
        ({"sample_rate": 8_000}, "`sample_rate`"),
        ({"audio_kwargs": {"max_length": 10, "padding": True}}, "`max_length`, `padding`"),
        ({"text_kwargs": {"pading": True}}, "`pading`"),
        ({"common_kwargs": {"device": "cpu"}}, "`device`"),
        ({"load_audio_backend": "soundfile"}, "`load_audio_backend`"),
        ({"images": [np.zeros((3, 4, 4))]}, "`images`"),
        ({"images_kwargs": {"do_resize": True}}, "`images_kwargs`"),
        ({"sampling_rate": 8_000, "audio_kwargs": {"sampling_rate": 16_000}}, "`sampling_rate` has two values"),
    ],
)
def test_keywords_without_effect_are_refused_by_name(processor, clip, keywords, named):
    audio = clip(0.1)
    for call in (
        lambda: processor(text=AUDIO_TOKEN, audio=audio, **keywords),
        lambda: processor(audio=audio, **keywords),
        lambda: chat(processor, audio, processor_kwargs=keywords),
        lambda: chat(processor, audio, **keywords),
        lambda: chat(processor, audio, tokenize=False, **keywords),
    ):
        with pytest.raises(ValueError, match=named):
            call()


def test_keywords_of_text_need_text_and_tools_a_template_that_names_them(processor, clip):
    with pytest.raises(ValueError, match="Without text, `padding_side`"):
        processor(audio=clip(0.1), padding_side="left")
    with pytest.raises(ValueError, match="`tools`"):
        chat(processor, clip(0.1), tools=[{"name": "f"}])


# Features


def test_features_are_whispers_own(processor, clip):
    audio = clip(1.234)
    ours = processor.audio_features([audio])
    whispers = WhisperFeatureExtractor()(audio, sampling_rate=16_000, return_tensors="np")["input_features"][0]
    length = ours["input_features"].shape[-1]
    assert length == 124
    np.testing.assert_allclose(ours["input_features"][0], whispers[:, :length], atol=1e-6)


def test_features_do_not_depend_on_the_batch(processor, clip):
    clips = [clip(0.7, 1), clip(3.1, 2) * 3, clip(0.05, 3)]
    together = processor.audio_features(clips)
    for row, audio in enumerate(clips):
        alone = processor.audio_features([audio])
        length = alone["input_features"].shape[-1]
        np.testing.assert_array_equal(together["input_features"][row, :, :length], alone["input_features"][0])
        assert together["input_features_mask"][row].sum() == length
        assert not together["input_features"][row, :, length:].any()


def test_long_audio_becomes_rows(processor, clip):
    inputs = processor(text=AUDIO_TOKEN, audio=clip(70), return_tensors="pt")
    assert inputs["input_features"].shape == (3, 80, 3000)
    assert inputs["input_features_mask"].sum(-1).tolist() == [3000, 3000, 1000]
    assert (inputs["input_ids"] == processor.audio_token_id).sum() == 89 + 89 + 30


def test_one_sample_is_one_token(processor):
    inputs = processor(text=AUDIO_TOKEN, audio=[np.array([0.1])], return_tensors="pt")
    assert inputs["input_features"].shape == (1, 80, 1)
    assert (inputs["input_ids"] == processor.audio_token_id).sum() == 1


def test_max_length_pads_to_whispers_30_seconds(lsm_dir, clip):
    processor = LsmProcessor.from_pretrained(lsm_dir, audio_padding="max_length")
    inputs = processor(text=AUDIO_TOKEN, audio=clip(1), return_tensors="pt")
    assert inputs["input_features"].shape == (1, 80, 3000)
    assert inputs["input_features_mask"].sum() == 100
    assert (inputs["input_ids"] == processor.audio_token_id).sum() == 3


@pytest.mark.parametrize("side", ["left", "right"])
def test_text_padding_leaves_the_audio_alone(processor, clip, side):
    inputs = processor(
        text=[AUDIO_TOKEN, AUDIO_TOKEN + " and more"],
        audio=[clip(0.5), clip(2)],
        return_tensors="pt",
        padding_side=side,
    )
    assert inputs["attention_mask"][0, -1 if side == "left" else 0] == 1
    assert inputs["attention_mask"][0].sum() < inputs["attention_mask"].shape[1]
    assert inputs["input_features_mask"][0].tolist() == [1] * 50 + [0] * 150


# Prompts


@pytest.mark.parametrize("instruction_first", [True, False])
def test_teacher_and_student_read_the_same_prompt(lsm_dir, clip, instruction_first):
    processor = LsmProcessor.from_pretrained(lsm_dir, instruction_first=instruction_first)
    transcript = "the cat sat on the mat"
    for response in (None, "An answer."):
        teacher = processor.conversation("Say it again.", transcript=transcript, response=response)
        student = processor.conversation("Say it again.", audio=clip(1), response=response)
        render = {"add_generation_prompt": response is None}
        teacher = processor.apply_chat_template(teacher, **render)
        student = processor.apply_chat_template(student, **render)
        assert teacher.replace(transcript, AUDIO_TOKEN) == student
        assert (student.index("Say it") < student.index(AUDIO_TOKEN)) == instruction_first


def test_the_llms_own_template_follows_untouched(processor, llm_dir):
    llm = AutoTokenizer.from_pretrained(llm_dir)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Bye."},
    ]
    expected = llm.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == expected
    as_parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    assert processor.apply_chat_template(as_parts, add_generation_prompt=True) == expected


# How LLMs in use treat `messages`: cut off the system prompt, look back from the end, call macros, trim, ask for types.
TEMPLATES = [
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set messages = messages[1:] %}"
    "{% else %}{% set system = 'S' %}{% endif %}{{ system }}"
    "{% for m in messages %}[{{ m['content'] | trim }}]{% endfor %}",
    "{%- set ns = namespace(last=0) -%}{%- for m in messages[::-1] -%}"
    "{%- if m.content is string and m.role == 'user' -%}{%- set ns.last = m.content -%}{%- endif -%}{%- endfor -%}"
    "{{ ns.last }}",
    "{% macro show(m) %}<{{ m.role }}>{{ m.content }}{% endmacro %}{% for m in messages %}{{ show(m) }}{% endfor %}",
    "\n  {% if messages[0]['role'] == 'system' %}{{ raise_exception('none') }}{% endif %}"
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}\n{% endfor %}",
    "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endif %}{% endfor %}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_of_all_kinds_see_plain_messages(processor, template, clip):
    llm = processor.tokenizer
    own = speech_processor(processor.feature_extractor, copy.deepcopy(llm), chat_template=template)
    messages = [{"role": "user", "content": "Do this.\nhello"}, {"role": "assistant", "content": "Done."}]
    expected = llm.apply_chat_template(messages, chat_template=template, tokenize=False)
    teacher = own.conversation("Do this.", transcript="hello", response="Done.")
    assert own.apply_chat_template(teacher) == expected
    student = own.conversation("Do this.", audio=clip(1), response="Done.")
    assert own.apply_chat_template(student) == expected.replace("hello", AUDIO_TOKEN)


def test_an_instruction_may_stand_alone(processor):
    messages = processor.conversation("Hello.")
    assert messages == [{"role": "user", "content": [{"type": "text", "text": "Hello."}]}]


@pytest.mark.parametrize("instruction_first", [True, False])
def test_without_an_instruction_the_speech_stands_alone(lsm_dir, clip, instruction_first):
    own, waveform = LsmProcessor.from_pretrained(lsm_dir, instruction_first=instruction_first), clip(1)
    assert own.conversation("", audio=waveform) == [{"role": "user", "content": [{"type": "audio", "audio": waveform}]}]
    student, teacher = own.conversation("", audio=True), own.conversation("", transcript="hello")
    alone = own.conversation("hello")  # no line is left for what is not asked
    assert own.apply_chat_template(teacher) == own.apply_chat_template(alone)
    assert own.apply_chat_template(student) == own.apply_chat_template(alone).replace("hello", AUDIO_TOKEN)


def test_one_slot_holds_one_thing(processor, clip):
    with pytest.raises(ValueError, match="not both"):
        processor.conversation("Hello.", audio=clip(1), transcript="hello")


TOKENIZERS = {
    "bytes": tiny_tokenizer,
    **{f"pieces, {kind}": functools.partial(tiny_sentencepiece, kind) for kind in ("first", "always", "legacy")},
    "slow": lambda: ByT5Tokenizer(chat_template=CHAT_TEMPLATE),
}


@pytest.fixture(params=TOKENIZERS)
def any_processor(request):
    """Of tokenizers that make tokens in different ways; the last one without the Rust library."""
    tokenizer = TOKENIZERS[request.param]()
    tokenizer.add_tokens([AddedToken(AUDIO_TOKEN, special=True, normalized=False)], special_tokens=True)
    tokenizer.pad_token = tokenizer.eos_token
    return speech_processor(WhisperFeatureExtractor(), tokenizer)


def test_a_text_that_names_special_tokens_is_read_as_text(any_processor, clip, tmp_path):
    """Whoever reads it, and after saving: the special tokens are those of the template, and the text says the same."""
    any_processor.save_pretrained(tmp_path)
    end, text = any_processor.tokenizer.eos_token, f"Say {AUDIO_TOKEN}</s> and</s></s>."
    for own in (any_processor, LsmProcessor.from_pretrained(tmp_path)):
        special = set(own.tokenizer.all_special_ids) | {own.audio_token_id}

        def render(instruction, own=own, **slot):
            messages = own.conversation(instruction, response=instruction, **slot)
            return own.tokenizer(own.apply_chat_template(messages), add_special_tokens=False).input_ids

        for slot in ({"audio": True}, {"transcript": text}):
            plain = render("word", **{name: True if value is True else "word" for name, value in slot.items()})
            ids = render(text, **slot)
            assert [id for id in ids if id in special] == [id for id in plain if id in special]
            said = own.tokenizer.decode(ids).replace(BREAK, "")
            assert said.count(text) == 2 + ("transcript" in slot)
            assert BREAK not in own.tokenizer.decode(ids) or not own.tokenizer.is_fast
        inputs = own.apply_chat_template(
            [{"role": "user", "content": [{"type": "text", "text": text}, {"type": "audio", "audio": clip(0.5)}]}],
            tokenize=True,
            return_dict=True,
        )
        assert inputs["input_ids"][0].count(own.audio_token_id) == 2 and end == "</s>"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_any_other_text_keeps_its_tokens(name):
    text = "  It is said: <b>é</b>\n\n日本語 and  <| more |></s> the"
    tokenizer = TOKENIZERS[name]()
    before = tokenizer(text).input_ids
    tokenizer.add_tokens([AUDIO_TOKEN], special_tokens=True)
    assert speech_processor(WhisperFeatureExtractor(), tokenizer).tokenizer(text).input_ids == before


def test_parts_of_another_kind_are_refused(processor):
    with pytest.raises(Exception, match="not image"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}])


def test_the_template_hash_names_the_layout(processor, lsm_dir):
    other = LsmProcessor.from_pretrained(lsm_dir, instruction_first=False)
    assert processor.template_hash == LsmProcessor.from_pretrained(lsm_dir).template_hash
    assert processor.template_hash != other.template_hash
    assert len(processor.template_hash) == 16


def with_template(template, **settings):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AUDIO_TOKEN], special_tokens=True)
    tokenizer.pad_token = tokenizer.eos_token
    return speech_processor(WhisperFeatureExtractor(), tokenizer, chat_template=template, **settings)


def ask(own, **settings):
    return own.apply_chat_template(own.conversation("Hi.", audio=True), add_generation_prompt=True, **settings)


class Tomorrow(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return super().now(tz) + datetime.timedelta(days=40)


def test_a_template_with_todays_date_has_one_day_for_all(tmp_path, monkeypatch):
    """Building, training and use are on different days; the prompt, and its hash, are the same."""
    own = with_template(DATED_TEMPLATE)
    prompt, name = ask(own), own.template_hash
    assert prompt.startswith("<s>Today is 26 Jul 2024.\n")
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
    again = with_template(DATED_TEMPLATE)
    assert (ask(again), again.template_hash) == (prompt, name)
    assert ask(own, date_string="1 May 2026").startswith("<s>Today is 1 May 2026.\n")


def test_a_day_and_switches_of_the_template_are_settings_that_are_kept_and_hashed(tmp_path):
    for template, told, seen in [
        (DATED_TEMPLATE, {"date": "2026-11-28"}, "Today is 28 Nov 2026."),
        (THINKING_TEMPLATE, {"enable_thinking": True}, "<|im_start|>assistant\n"),
        ("{{ tools }}" + THINKING_TEMPLATE, {"tools": [{"name": "f", "x": None}]}, "[{'name': 'f', 'x': None}]"),
    ]:
        usual, own = with_template(template), with_template(template, template_settings=told)
        assert seen in ask(own) and usual.template_hash != own.template_hash
        own.save_pretrained(tmp_path)
        loaded = LsmProcessor.from_pretrained(tmp_path)
        assert told.items() <= loaded.template_settings.items()
        assert (ask(loaded), loaded.template_hash) == (ask(own), own.template_hash)
        # Whoever renders the template by itself has them, too.
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        messages = loaded.conversation("Hi.", audio=True)
        assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == ask(own)
        changed = LsmProcessor.from_pretrained(tmp_path, template_settings=usual.template_settings)
        assert (ask(changed), changed.template_hash) == (ask(usual), usual.template_hash)


def test_by_default_no_thought_is_asked_for():
    own = with_template(THINKING_TEMPLATE)
    assert own.template_settings == {"enable_thinking": False}
    assert ask(own).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert ask(own, enable_thinking=True).endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("template", "settings", "message"),
    [
        (THINKING_TEMPLATE, {"enable_thinkin": True}, "does not use 'enable_thinkin'"),
        (DATED_TEMPLATE, {"enable_thinking": True}, "does not use 'enable_thinking'"),
        (DATED_TEMPLATE, {"date": "today"}, "is 'today'; expected a day such as '2026-11-28'"),
    ],
)
def test_settings_that_a_template_does_not_ask_for_are_refused(template, settings, message):
    with pytest.raises(ValueError, match=message):
        with_template(template, template_settings=settings)


def test_a_template_that_asks_for_nothing_is_left_as_it_is_and_keeps_its_hash(processor, lsm_dir):
    """Sets and checkpoints of before there were settings are named by the hash of the template itself."""
    assert processor.template_settings == {}
    source = processor.chat_template.replace(AUDIO_TOKEN, "<slot>") + "\ninstruction_first=True"
    assert processor.template_hash == hashlib.sha256(source.encode()).hexdigest()[:16]


def test_the_default_template_serves_tokenizers_without_one(processor, llm_dir):
    tokenizer = AutoTokenizer.from_pretrained(llm_dir)
    tokenizer.chat_template = None
    tokenizer.add_tokens([AUDIO_TOKEN], special_tokens=True)
    plain = speech_processor(processor.feature_extractor, tokenizer)
    assert plain.chat_template.endswith(DEFAULT_CHAT_TEMPLATE)
    messages = plain.conversation("What is said?", transcript="hello", response="Hello.")
    assert plain.apply_chat_template(messages).endswith("USER: What is said?\nhello ASSISTANT: Hello.</s>")


def test_a_tokenizer_without_the_placeholder_is_refused(processor, llm_dir):
    with pytest.raises(ValueError, match="no token"):
        LsmProcessor(processor.feature_extractor, AutoTokenizer.from_pretrained(llm_dir))


def test_a_chat_template_that_has_no_place_for_audio_is_refused(processor):
    with pytest.raises(ValueError, match=r"does not contain <\|audio\|>.*speech_processor"):
        LsmProcessor(processor.feature_extractor, copy.deepcopy(processor.tokenizer), DEFAULT_CHAT_TEMPLATE)


def test_audio_parts_are_read_by_every_name(processor, clip, tmp_path):
    path = tmp_path / "clip.wav"
    soundfile.write(path, clip(0.5), 8_000)  # half a second of samples, one second at 8 kHz
    array = load_audio(path)
    parts = [
        {"type": "audio", "audio": array},
        {"type": "audio", "path": str(path)},
        {"type": "audio", "url": str(path)},
        {"type": "audio", "audio": soundfile.read(path)[0], "sampling_rate": 8_000},
    ]
    messages = [{"role": "user", "content": [{"type": "text", "text": "Compare."}, *parts]}]
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    )
    assert inputs["input_features_mask"].tolist() == [[1] * 100] * 4
    features = inputs["input_features"]
    torch.testing.assert_close(features, features[:1].expand(4, -1, -1), atol=1e-4, rtol=0)
    assert (inputs["input_ids"] == processor.tokenizer.bos_token_id).sum() == 1


@pytest.mark.parametrize(
    ("text", "count"), [(AUDIO_TOKEN, 0), ("no slot", 1), (AUDIO_TOKEN * 2, 1), ([AUDIO_TOKEN, "x"], 2)]
)
def test_placeholders_and_clips_must_match(processor, clip, text, count):
    with pytest.raises(ValueError, match=f"placeholders for {count} clips"):
        processor(text=text, audio=[clip(0.1)] * count or None)


def test_clips_may_be_anywhere_in_the_batch(processor, clip):
    inputs = processor(
        text=["text only", f"{AUDIO_TOKEN} or {AUDIO_TOKEN}?"], audio=[clip(1), clip(2)], return_tensors="pt"
    )
    assert (inputs["input_ids"] == processor.audio_token_id).sum(-1).tolist() == [0, 3 + 6]


def test_expansion_by_length_is_that_of_the_processor(processor, clip):
    texts = [f"a {AUDIO_TOKEN} b {AUDIO_TOKEN}", "plain", f"{AUDIO_TOKEN} c"]
    clips = [clip(0.3), clip(31), clip(2.2)]
    expected = processor(text=texts, audio=clips)["input_ids"]
    expanded = processor.expand_audio_tokens(texts, [len(audio) for audio in clips])
    assert processor(text=[text.replace(AUDIO_TOKEN, "~") for text in texts])["input_ids"] != expected
    assert processor.tokenizer(expanded, padding=True)["input_ids"] == expected
    with pytest.raises(ValueError, match=r"3 .* placeholders for 1 clips"):
        processor.expand_audio_tokens(texts, [100])


def test_what_is_loaded_and_saved_again_names_no_machine(lsm_dir, tmp_path):
    LsmProcessor.from_pretrained(lsm_dir).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert not {"is_local", "local_files_only", "name_or_path"} & set(saved)


def test_settings_survive_saving(lsm_dir, tmp_path):
    settings = {"window_frames": 5, "queries_per_window": 2, "instruction_first": False, "audio_padding": "max_length"}
    LsmProcessor.from_pretrained(lsm_dir, **settings).save_pretrained(tmp_path)
    loaded = LsmProcessor.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in settings} == settings
    assert loaded.chat_template == loaded.tokenizer.chat_template
