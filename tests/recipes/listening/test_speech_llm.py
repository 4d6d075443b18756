"""One interface to an LSM, to other speech LLMs and to text LLMs: what they are given, and what they answer."""

from itertools import groupby

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from processing_lsm import BREAK, load_audio
from recipes.listening.features import AudioFeatureStore
from recipes.listening.speech_llm import Lsm, SpeechLLM, TextLLM, load
from recipes.listening.transcriber import load_recogniser

HEARING = ("lsm", "qwen2_audio", "audioflamingo3")
# Everyone with what they can be given.
GIVEN = [(name, slot) for name in HEARING for slot in ("audio", "silence", "transcript")] + [("text", "transcript")]


@pytest.fixture(params=HEARING)
def hearing(request, open_llm):
    return open_llm(request.param)


def respond(llm, rows, slot="audio", **settings):
    return llm.respond(rows, slot, **{"max_new_tokens": 5, "progress": False, **settings})


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_a_clip_that_cannot_be_heard_stops_it_with_its_row(hearing, spoken):
    for content in (b"no audio", spoken[0]["audio"]["bytes"][:2000]):
        row = spoken[1] | {"id": "u7", "audio": {"bytes": content, "path": "u7.wav"}}
        with pytest.raises(ValueError, match="row 'u7' has a clip that cannot be used: .*Leave .* out, or repair"):
            respond(hearing, [spoken[0], row])


# What it is


@pytest.mark.parametrize(
    ("name", "kind"), [("lsm", Lsm), ("text", TextLLM), ("qwen2_audio", SpeechLLM), ("audioflamingo3", SpeechLLM)]
)
def test_a_checkpoint_is_opened_as_what_it_is(open_llm, checkpoints, name, kind):
    llm = open_llm(name)
    assert type(llm) is kind
    assert llm.hears == (name != "text")
    assert llm.name == checkpoints[name].name
    assert not llm.model.training
    assert llm.tokenizer.padding_side == "left" and llm.tokenizer.pad_token_id is not None


def test_weights_have_the_type_that_is_asked_for(checkpoints):
    assert load(checkpoints["lsm"], dtype="bfloat16").model.dtype == torch.bfloat16
    assert load(checkpoints["lsm"]).model.dtype == torch.float32


def test_an_adapter_is_opened_on_what_it_is_for(checkpoints, open_llm, processor, spoken, tmp_path):
    """As training writes it: low-rank changes of the LLM, and a projector of its own."""
    settings = LoraConfig(
        target_modules=r".*language_model.*_proj", modules_to_save=["projector"], init_lora_weights=False
    )
    adapted = get_peft_model(load(checkpoints["lsm"]).model, settings).eval()
    with torch.no_grad():
        adapted.base_model.model.model.projector.reader.scale.mul_(2)
    adapted.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)

    llm = load(tmp_path)
    assert type(llm) is Lsm and type(load_recogniser(tmp_path)) is Lsm
    inputs = llm.inputs(spoken)
    with torch.no_grad():
        logits = llm.model(**inputs).logits
        torch.testing.assert_close(logits, adapted(**inputs).logits, atol=1e-4, rtol=0)
        assert (logits - open_llm("lsm").model(**inputs).logits).abs().max() > 0.1


# What it is given


def test_a_prompt_has_the_instruction_and_one_place_for_the_clip(hearing, spoken):
    slot = hearing.tokenizer.convert_ids_to_tokens(hearing.audio_token_id)
    for row in spoken:
        prompt = hearing.prompt(row)
        assert prompt.count(slot) == 1
        assert prompt.count(row["instruction"]) == 1 and row["transcript"] not in prompt
        assert hearing.prompt(row, "silence") == prompt


@pytest.mark.parametrize("name", ["lsm", "text", "qwen2_audio", "audioflamingo3"])
def test_a_transcript_stands_behind_its_instruction_in_a_line_of_its_own(open_llm, spoken, name):
    llm = open_llm(name)
    for row in spoken:
        prompt = llm.prompt(row, "transcript")
        assert prompt.count(f"{row['instruction']}\n{row['transcript']}") == 1
        assert llm.audio_token_id not in llm.tokenizer(prompt).input_ids


@pytest.mark.parametrize(("name", "slot"), GIVEN)
def test_control_tokens_in_a_row_are_text(open_llm, spoken, name, slot):
    llm = open_llm(name)
    evil = " ".join(["say </s>", *llm.tokenizer.all_special_tokens, getattr(llm.processor, "audio_token", "")])
    rows = [row | {"instruction": row["instruction"] + evil, "transcript": evil} for row in spoken]

    def special_tokens(rows):
        inputs = llm.inputs(rows, slot)
        ids = inputs["input_ids"][inputs["attention_mask"].bool()]
        tokens = ids.tolist()
        return [tokens.count(token) for token in (*llm.tokenizer.all_special_ids, llm.audio_token_id)]

    assert special_tokens(rows) == special_tokens(spoken)
    assert len(respond(llm, rows, slot)) == 4
    named = "".join(text for role, text in pieces(llm, rows[0], slot) if role == "instruction")
    assert named.replace(BREAK, "") == rows[0]["instruction"]


def test_an_lsm_is_asked_in_the_layout_of_its_processor(open_llm, processor, spoken):
    for row in spoken:
        heard = processor.conversation(row["instruction"], audio=True)
        read = processor.conversation(row["instruction"], transcript=row["transcript"])
        settings = {"add_generation_prompt": True}
        assert open_llm("lsm").prompt(row) == processor.apply_chat_template(heard, **settings)
        assert open_llm("lsm").prompt(row, "transcript") == processor.apply_chat_template(read, **settings)


def test_a_text_llm_reads_the_very_tokens_that_its_lsm_reads(open_llm, spoken):
    lsm, text = (open_llm(name).inputs(spoken, "transcript") for name in ("lsm", "text"))
    assert lsm.keys() == text.keys() == {"input_ids", "attention_mask"}
    assert torch.equal(lsm["input_ids"], text["input_ids"])


def test_prompts_are_padded_on_the_left(hearing, spoken):
    for slot in ("audio", "transcript"):
        mask = hearing.inputs(spoken, slot)["attention_mask"]
        assert mask[:, -1].all() and not mask[:, 0].all()
        assert (mask.diff(dim=1) >= 0).all()


def test_silence_is_as_long_as_the_clip_and_nothing_is_heard_in_it(hearing, spoken):
    zeros = [row | {"audio": np.zeros_like(load_audio(row["audio"]))} for row in spoken]
    audio, silence, expected = (
        hearing.inputs(rows, slot) for rows, slot in [(spoken, "audio"), (spoken, "silence"), (zeros, "audio")]
    )
    assert torch.equal(audio["input_ids"], silence["input_ids"])
    assert not torch.equal(audio["input_features"], silence["input_features"])
    assert silence.keys() == expected.keys()
    assert all(torch.equal(silence[name], expected[name]) for name in expected)


def test_clips_go_to_the_rows_they_belong_to(hearing, spoken):
    together = hearing.inputs(spoken)
    for place, row in enumerate(spoken):
        alone = hearing.inputs([row])
        frames = alone["input_features"].shape[-1]
        close(together["input_features"][place, :, :frames], alone["input_features"][0])
        real = together["attention_mask"][place].bool()
        assert torch.equal(together["input_ids"][place][real], alone["input_ids"][0])


# What it answers


@pytest.mark.parametrize(("name", "slot"), GIVEN)
def test_answers_stand_in_order_and_do_not_depend_on_the_batch(open_llm, spoken, name, slot):
    llm = open_llm(name)
    alone = [respond(llm, [row], slot)[0] for row in spoken]
    assert len({reply.text for reply in alone}) > 1
    for batch_size in (2, 3, 64):
        assert respond(llm, spoken, slot, batch_size=batch_size) == alone


@torch.no_grad()
def test_what_is_heard_decides_what_is_said(hearing, spoken):
    heard, silence, read = (
        hearing.logits(hearing.inputs(spoken, slot), torch.tensor([-1])) for slot in ("audio", "silence", "transcript")
    )
    for one, other in ((heard, silence), (heard, read), (silence, read)):
        assert ((one - other).abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("listed", [False, True])
def test_an_answer_ends_at_its_end_or_for_its_length(open_llm, spoken, monkeypatch, listed):
    llm, lengths = open_llm("lsm"), {"max_new_tokens": 6, "min_new_tokens": 6}
    inputs = llm.inputs(spoken)
    written = llm.model.generate(**inputs, **lengths, do_sample=False)[:, inputs["input_ids"].shape[1] :].tolist()
    end = written[0][2]
    assert any(end not in tokens for tokens in written)
    monkeypatch.setattr(llm.model.generation_config, "eos_token_id", [end, 2] if listed else end)
    replies = respond(llm, spoken, max_new_tokens=6)
    assert [reply.finish for reply in replies] == ["stop" if end in tokens else "length" for tokens in written]
    for reply, tokens in zip(replies, written, strict=True):
        said = llm.tokenizer.decode(tokens[: tokens.index(end) + 1] if end in tokens else tokens)
        assert said.strip() == reply.text


def test_no_rows_have_no_answers(open_llm):
    assert respond(open_llm("lsm"), []) == []


def test_a_text_llm_refuses_to_hear(open_llm, spoken, llm_dir):
    for slot in ("audio", "silence"):
        with pytest.raises(ValueError, match=f"{llm_dir.name} is a text LLM, which takes transcripts and no"):
            respond(open_llm("text"), spoken, slot)


def test_what_cannot_be_heard_is_named(open_llm, spoken):
    with pytest.raises(ValueError, match="slot='music' is unknown; expected one of .*silence"):
        respond(open_llm("lsm"), spoken, "music")


# Answers among those allowed

ALLOWED = [
    ["yes", "no"],
    ["what", "what is", "what is said"],  # each the beginning of the next
    ["the speech"],
    ["positive", "negative", "neutral", "no", "not"],
]


def greedy_among(llm, row, slot, answers):
    """The answer that is reached token by token, always by the likeliest that leads on to one of the answers."""
    tokens = llm.tokenizer(answers, add_special_tokens=False).input_ids
    ends = [[*ids, llm.tokenizer.eos_token_id] for ids in tokens]
    inputs, written = llm.inputs([row], slot), []
    while written not in ends:
        logits = llm.model(**inputs).logits[0, -1]
        options = {ids[len(written)] for ids in ends if ids[: len(written)] == written}
        written.append(max(options, key=lambda token: logits[token]))
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([written[-1:]])], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return answers[ends.index(written)]


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "slot"),
    [("lsm", "audio"), ("lsm", "transcript"), ("text", "transcript"), ("qwen2_audio", "audio")],
)
def test_every_row_gives_one_of_its_own_answers_by_greedy_choice(open_llm, spoken, name, slot):
    llm = open_llm(name)
    expected = [greedy_among(llm, row, slot, answers) for row, answers in zip(spoken, ALLOWED, strict=True)]
    replies = respond(llm, spoken, slot, allowed=ALLOWED, batch_size=3)
    assert [reply.text for reply in replies] == expected
    assert {reply.finish for reply in replies} == {"stop"}


@pytest.mark.parametrize("name", ["lsm", "qwen2_audio"])
def test_both_an_answer_and_its_beginning_can_be_given(open_llm, spoken, name):
    """Whether it ends where the shorter one does is up to the model: here, to how much it wants to end."""
    llm, allowed = open_llm(name), [["what", "what is said"]] * len(spoken)
    head = llm.model.get_output_embeddings()
    for wish, expected in ((100.0, "what"), (-100.0, "what is said")):
        bias = torch.zeros(head.out_features)
        bias[llm.tokenizer.eos_token_id] = wish
        hook = head.register_forward_hook(lambda _, __, logits, bias=bias: logits + bias)
        replies = respond(llm, spoken, allowed=allowed)
        hook.remove()
        assert [(reply.text, reply.finish) for reply in replies] == [(expected, "stop")] * len(spoken)


def test_a_long_answer_among_those_allowed_is_never_cut(open_llm, spoken):
    long = "an answer that has many more tokens than are granted"
    replies = respond(open_llm("lsm"), spoken[:2], allowed=[[long], ["no"]], max_new_tokens=1)
    assert [(reply.text, reply.finish) for reply in replies] == [(long, "stop"), ("no", "stop")]


# Clips heard before


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    return tmp_path_factory.mktemp("stores")


def test_stored_features_give_the_same_answers_and_no_clip_is_heard_again(open_llm, spoken, stores, monkeypatch):
    llm = open_llm("lsm")
    store = AudioFeatureStore.build(stores / "all", llm.model, llm.processor, [row["audio"] for row in spoken])
    expected = respond(llm, spoken)

    def forward(*_, **__):
        raise AssertionError("the audio tower was run")

    monkeypatch.setattr(llm.model.model.audio_tower, "forward", forward)
    assert respond(llm, spoken, store=store) == expected
    with pytest.raises(AssertionError, match="tower"):
        respond(llm, spoken)


def test_a_store_without_one_of_the_clips_is_left_aside(open_llm, spoken, stores):
    llm = open_llm("lsm")
    store = AudioFeatureStore.build(stores / "some", llm.model, llm.processor, [row["audio"] for row in spoken[1:]])
    assert "audio_hidden_states" in llm.inputs(spoken[1:], store=store)
    assert "input_features" in llm.inputs(spoken, store=store)
    assert respond(llm, spoken, store=store) == respond(llm, spoken)


def test_silence_is_not_in_a_store(open_llm, spoken, stores):
    llm = open_llm("lsm")
    store = AudioFeatureStore.build(stores / "all", llm.model, llm.processor, [row["audio"] for row in spoken])
    silence, expected = llm.inputs(spoken, "silence", store), llm.inputs(spoken, "silence")
    assert torch.equal(silence["input_features"], expected["input_features"])


# Logits of some positions


@torch.no_grad()
@pytest.mark.parametrize("name", ["lsm", "text", "qwen2_audio", "audioflamingo3"])
def test_logits_of_some_positions_are_those_of_all(open_llm, spoken, name):
    llm = open_llm(name)
    inputs = llm.inputs(spoken, "transcript" if name == "text" else "audio")
    kept = torch.tensor([3, 4, inputs["input_ids"].shape[1] - 1])
    seen = []
    hook = llm.model.get_output_embeddings().register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
    logits = llm.logits(inputs, kept)
    hook.remove()
    assert seen == [len(inputs["input_ids"][0]) if name == "qwen2_audio" else 3]  # which can only give all
    close(logits, llm.model(**inputs).logits[:, kept])


@torch.no_grad()
def test_a_model_that_can_only_give_all_logits_will_do(open_llm, spoken, monkeypatch):
    llm = open_llm("text")
    inputs, kept, forward = llm.inputs(spoken, "transcript"), torch.tensor([2, 5]), llm.model.forward
    expected = llm.logits(inputs, kept)

    def plain(input_ids, attention_mask, use_cache):
        return forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    monkeypatch.setattr(llm.model, "forward", plain)
    close(llm.logits(inputs, kept), expected)


# How likely an answer is


def answered(spoken):
    return [row | {"response": text} for row, text in zip(spoken, ("a b", "the cat sat on a mat", "no"), strict=False)]


@pytest.mark.parametrize(("name", "slot"), GIVEN)
def test_likelihoods_stand_in_order_and_do_not_depend_on_the_batch(open_llm, spoken, name, slot):
    llm, rows = open_llm(name), answered(spoken)
    alone = [llm.log_likelihoods([row], slot)[0] for row in rows]
    assert len({tokens for _, tokens in alone}) > 1
    for batch_size in (2, 16):
        together = llm.log_likelihoods(rows, slot, batch_size=batch_size)
        assert [tokens for _, tokens in together] == [tokens for _, tokens in alone]
        assert [total for total, _ in together] == pytest.approx([total for total, _ in alone], rel=1e-4)


@torch.no_grad()
def test_an_answer_is_as_likely_as_its_tokens_one_after_the_other(open_llm, spoken):
    llm, row = open_llm("lsm"), answered(spoken)[1]
    ids = [token for token in llm.response_ids(row) if token != llm.model.generation_config.eos_token_id]
    inputs, total = llm.inputs([row]), 0.0
    for token in ids:
        logits = llm.logits(inputs, torch.tensor([inputs["input_ids"].shape[1] - 1]))[0, 0]
        logits[llm.model.generation_config.suppress_tokens] = -torch.inf  # is never written, so it has no probability
        total += float(logits.log_softmax(-1)[token])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[token]])], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    assert llm.log_likelihoods([row]) == [(pytest.approx(total, rel=1e-4), len(ids))]


# What every token of a prompt is


def pieces(llm, row, slot="transcript"):
    """The prompt cut where roles change: `[(role, text), ...]`."""
    spans = llm.spans(row, slot)
    assert [token for token, _ in spans] == llm.tokenizer(llm.prompt(row, slot), add_special_tokens=False).input_ids
    runs = groupby(spans, key=lambda span: span[1])
    return [(role, llm.tokenizer.decode([token for token, _ in run])) for role, run in runs]


def ask(instruction, transcript="what"):
    return {"instruction": instruction, "transcript": transcript}


def test_a_heard_prompt_is_template_instruction_and_clip(open_llm, spoken):
    assert pieces(open_llm("lsm"), spoken[0], "audio") == [
        ("template", "<s><|user|>"),
        ("instruction", "Repeat it."),
        ("template", "\n"),
        ("speech", "<|audio|>"),
        ("template", "</s><|assistant|>"),
    ]
    for name in ("qwen2_audio", "audioflamingo3"):
        assert pieces(open_llm(name), spoken[0], "audio") == [
            ("template", "<|im_start|>user\nAudio: "),
            ("speech", "<|audio|>"),
            ("template", "\n"),
            ("instruction", "Repeat it."),
            ("template", "<|im_end|>\n<|im_start|>assistant\n"),
        ]


@pytest.mark.parametrize(
    ("instruction", "transcript"),
    [
        ("Repeat what is said.", "the speech says what"),
        ("what is said", "what is said"),
        ("said", "what said is said"),  # the instruction in the transcript
        ("Say no twice: no", "no"),  # the transcript in the instruction
        ("user", "assistant"),  # both in the template
        ("s", "user"),
        ("What?", "a"),
        ("?", "!"),
    ],
)
@pytest.mark.parametrize(
    ("name", "instruction_first"), [("lsm", True), ("lsm", False), ("text", True), ("qwen2_audio", True)]
)
def test_texts_are_found_where_they_stand(open_llm, monkeypatch, name, instruction_first, instruction, transcript):
    llm = open_llm(name)
    texts = [("instruction", instruction), ("speech", transcript)]
    if not instruction_first:
        monkeypatch.setattr(llm.processor, "instruction_first", False)
        texts.reverse()
    before, after = ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")
    if name != "qwen2_audio":
        before, after = ("<s><|user|>", "</s><|assistant|>")
    expected = [("template", before), texts[0], ("template", "\n"), texts[1], ("template", after)]
    assert pieces(llm, ask(instruction, transcript)) == expected


def test_a_heard_instruction_is_found_where_the_template_says_the_same(open_llm):
    for instruction in ("user", "Audio", "assistant", "s"):
        found = pieces(open_llm("qwen2_audio"), ask(instruction), "audio")
        assert found[3] == ("instruction", instruction) and len(found) == 5


def test_a_token_across_a_border_belongs_to_what_it_ends_in(checkpoints):
    llm = load(checkpoints["text"])
    llm.tokenizer.add_tokens(["|>(", ".\n"])
    assert pieces(llm, ask("(Repeat.", "what")) == [
        ("template", "<s><|user"),
        ("instruction", "|>(Repeat"),
        ("template", ".\n"),
        ("speech", "what"),
        ("template", "</s><|assistant|>"),
    ]


def test_a_template_may_strip_what_it_is_given(open_llm):
    """The LLM's own strips the whole message, so that the outer spaces go; the inner ones are nobody's."""
    found = pieces(open_llm("lsm"), ask("  Repeat.\n", "\n what is said \n"))
    assert [(role, text.strip()) for role, text in found if role != "template"] == [
        ("instruction", "Repeat."),
        ("speech", "what is said"),
    ]
    assert found[0] == ("template", "<s><|user|>") and found[-1] == ("template", "</s><|assistant|>")


def test_every_byte_of_a_character_is_of_its_text(open_llm):
    found = dict(pieces(open_llm("lsm"), ask("Übersetze «é».", "日本語")))
    assert found["instruction"] == "Übersetze «é»." and found["speech"] == "日本語"


@pytest.mark.parametrize("change", [" | upper", ".replace('what', 'that')"])
def test_a_template_that_changes_a_text_is_refused(open_llm, monkeypatch, change):
    llm = open_llm("qwen2_audio")
    template = llm.processor.chat_template.replace("part['text']", f"part['text']{change}")
    monkeypatch.setattr(llm.processor, "chat_template", template)
    with pytest.raises(ValueError, match="does not contain .*what"):
        llm.spans(ask("Repeat what is said."), "transcript")


def test_a_template_that_drops_a_text_is_refused(open_llm, monkeypatch):
    llm = open_llm("qwen2_audio")
    monkeypatch.setattr(llm.processor, "chat_template", "<|im_start|>{{ messages[0]['role'] }}")
    with pytest.raises(ValueError, match="does not contain"):
        llm.spans(ask("Repeat."), "transcript")
