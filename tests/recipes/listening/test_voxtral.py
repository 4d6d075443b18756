"""Voxtral, which is asked in tokens that no text stands for. Run where mistral-common is installed."""

import base64
from itertools import groupby

import numpy as np
import pytest
import torch

from processing_lsm import load_audio
from recipes.bias.roles import ROLES, teacher_forced
from recipes.listening.speech_llm import Voxtral, load

pytest.importorskip("mistral_common", reason="mistral-common is not installed")
from peers import write_voxtral

HEARD = ("audio", "silence", "transcript")


@pytest.fixture(scope="module")
def voxtral(tmp_path_factory):
    return load(write_voxtral(tmp_path_factory.mktemp("peers") / "voxtral"))


def pieces(llm, row, slot):
    """The prompt cut where roles change: `[(role, text), ...]`."""
    runs = groupby(llm.spans(row, slot), key=lambda span: span[1])
    return [(role, llm.tokenizer.decode([token for token, _ in run])) for role, run in runs]


def test_it_is_opened_as_what_it_is_with_one_place_for_the_clip(voxtral, spoken):
    assert type(voxtral) is Voxtral and voxtral.name == "voxtral"
    for slot in ("audio", "silence"):
        assert voxtral.prompt(spoken[0], slot) == "<s>[INST][BEGIN_AUDIO][AUDIO]Repeat it.[/INST]"
    transcript = spoken[0]["transcript"]
    assert voxtral.prompt(spoken[0], "transcript") == f"<s>[INST]Repeat it.\n{transcript}[/INST]"


def test_without_its_tokenizer_it_says_what_to_install(voxtral, monkeypatch):
    monkeypatch.setattr("recipes.listening.speech_llm.is_mistral_common_available", lambda: False)
    with pytest.raises(ImportError, match="tiny is a Voxtral.*pip install mistral-common"):
        Voxtral(voxtral.model, voxtral.processor, "tiny")


def test_it_is_asked_as_its_documentation_does(voxtral, spoken):
    messages = []
    for row in spoken:
        audio = {"type": "audio", "base64": base64.b64encode(row["audio"]["bytes"]).decode()}
        messages.append([{"role": "user", "content": [audio, {"type": "text", "text": row["instruction"]}]}])
    expected, inputs = voxtral.processor.apply_chat_template(messages), voxtral.inputs(spoken)
    assert inputs.keys() == expected.keys() == {"input_ids", "attention_mask", "input_features"}
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    torch.testing.assert_close(inputs["input_features"], expected["input_features"], atol=1e-5, rtol=0)
    assert not inputs["attention_mask"][:, 0].all() and inputs["attention_mask"][:, -1].all()


def test_silence_is_as_long_as_the_clip_and_nothing_is_heard_in_it(voxtral, spoken):
    long = [spoken[0] | {"audio": np.tile(load_audio(spoken[0]["audio"]), 12)}, *spoken[1:]]
    zeros = [row | {"audio": np.zeros_like(load_audio(row["audio"]))} for row in long]
    audio, silence, expected = (
        voxtral.inputs(rows, slot) for rows, slot in [(long, "audio"), (long, "silence"), (zeros, "audio")]
    )
    assert len(audio["input_features"]) == len(long) + 1  # the first takes more than 30 s
    assert torch.equal(audio["input_ids"], silence["input_ids"])
    assert not torch.equal(audio["input_features"], silence["input_features"])
    assert all(torch.equal(silence[name], expected[name]) for name in expected)


@torch.no_grad()
@pytest.mark.parametrize("slot", HEARD)
def test_what_it_says_does_not_depend_on_the_batch(voxtral, spoken, slot):
    together = voxtral.model(**voxtral.inputs(spoken, slot)).logits[:, -1]
    alone = torch.cat([voxtral.model(**voxtral.inputs([row], slot)).logits[:, -1] for row in spoken])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    assert not torch.allclose(alone[0], alone[1], atol=1e-2)
    replies = voxtral.respond(spoken, slot, max_new_tokens=8, progress=False)
    assert replies == voxtral.respond(spoken, slot, max_new_tokens=8, batch_size=1, progress=False)


def test_every_row_gives_one_of_its_own_answers(voxtral, spoken):
    allowed = [["yes"], ["no"], ["what is said"], ["é"]]
    replies = voxtral.respond(spoken, allowed=allowed, progress=False)
    assert [(reply.text, reply.finish) for reply in replies] == [(text, "stop") for [text] in allowed]


# What every token is


def test_a_heard_prompt_is_template_clip_and_instruction(voxtral, spoken):
    assert pieces(voxtral, spoken[0], "audio") == [
        ("template", "<s>[INST][BEGIN_AUDIO]"),
        ("speech", "[AUDIO]"),
        ("instruction", "Repeat it."),
        ("template", "[/INST]"),
    ]


@pytest.mark.parametrize(
    ("instruction", "transcript"),
    [
        ("Repeat what is said", "what is said"),
        ("said", "what said is said"),  # the instruction in the transcript
        ("Say no twice: no", "no"),  # the transcript in the instruction
        ("INST", "/INST"),  # both in the template
        ("[INST]", "[/INST]"),
        ("Übersetze «é»", "日本語"),  # characters of several bytes
    ],
)
def test_texts_are_found_where_they_stand(voxtral, instruction, transcript):
    row = {"instruction": instruction, "transcript": transcript}
    assert pieces(voxtral, row, "transcript") == [
        ("template", "<s>[INST]"),
        ("instruction", instruction),
        ("template", "\n"),
        ("speech", transcript),
        ("template", "[/INST]"),
    ]


def test_a_token_across_a_border_belongs_to_what_it_ends_in(voxtral):
    found = pieces(voxtral, {"instruction": "Repeat.", "transcript": "what"}, "transcript")
    assert found[1:3] == [("instruction", "Repeat"), ("template", ".\n")]


@pytest.mark.parametrize("slot", HEARD)
def test_a_prompt_and_its_answer_are_told_apart_to_the_token(voxtral, answered, slot):
    batch, inputs = teacher_forced(voxtral, answered, slot), voxtral.inputs(answered, slot)
    decode = voxtral.tokenizer.decode
    for place, row in enumerate(answered):
        ids, start, end = batch.inputs["input_ids"][place], batch.starts[place], batch.lengths[place]
        assert ids[:start].tolist() == inputs["input_ids"][place][inputs["attention_mask"][place].bool()].tolist()
        assert decode(ids[start:end]) == row["response"] + "</s>"
        assert ids[end - 1] == voxtral.model.generation_config.eos_token_id
        roles = np.array(ROLES)[batch.roles[place, :end]]
        assert list(roles[start:]) == ["response"] * (end - start)
        speech = ids[:end][roles == "speech"]
        if slot == "transcript":
            assert decode(speech) == row["transcript"]
        else:
            assert speech.tolist() == [voxtral.audio_token_id] * 375  # of 30 s
            assert decode(ids[:end][roles == "instruction"]) == row["instruction"]
