"""Batches of prompts with their responses: the tokens of training, and the role of each token."""

import pytest
import torch

from recipes.bias.roles import ROLES, expand, teacher_forced
from recipes.listening.collator import SpeechResponseCollator
from recipes.listening.features import AudioFeatureStore

NAMES = ("lsm", "qwen2_audio", "audioflamingo3")


def tokens_of(batch, row, role):
    """Return the token ids of one role in a row."""
    return batch.inputs["input_ids"][row][batch.roles[row] == ROLES.index(role)].tolist()


def test_the_tokens_are_those_of_training(open_llm, processor, answered):
    batch, trained = teacher_forced(open_llm("lsm"), answered), SpeechResponseCollator(processor)(answered)
    assert "attention_mask" not in batch.inputs
    assert batch.inputs.keys() == trained.keys() - {"attention_mask", "labels"}
    for name, value in batch.inputs.items():
        assert torch.equal(value, trained[name]), name
    assert batch.lengths == trained["attention_mask"].sum(1).tolist()
    assert torch.equal(batch.roles == -1, trained["attention_mask"] == 0)
    assert torch.equal(batch.roles == ROLES.index("response"), trained["labels"] != -100)


def test_stored_features_are_read_as_clips_are(open_llm, answered, tmp_path):
    llm = open_llm("lsm")
    store = AudioFeatureStore.build(tmp_path / "store", llm.model, llm.processor, [row["audio"] for row in answered])
    stored, heard = teacher_forced(llm, answered, store=store), teacher_forced(llm, answered)
    assert torch.equal(stored.inputs["input_ids"], heard.inputs["input_ids"])
    assert torch.equal(stored.roles, heard.roles)
    assert "audio_hidden_states" in stored.inputs and "input_features" not in stored.inputs


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_is_that_of_inference_and_its_response_follows(open_llm, answered, name):
    llm = open_llm(name)
    batch = teacher_forced(llm, answered)
    for row, asked in enumerate(answered):
        ids = batch.inputs["input_ids"][row]
        assert torch.equal(ids[: batch.starts[row]], llm.inputs([asked])["input_ids"][0])
        rest = llm.tokenizer.decode(ids[batch.starts[row] : batch.lengths[row]])
        assert rest == asked["response"] + llm.tokenizer.eos_token
        assert (ids[batch.lengths[row] :] == llm.tokenizer.pad_token_id).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_the_same_alone_as_in_a_batch(open_llm, answered, name):
    llm = open_llm(name)
    batch = teacher_forced(llm, answered)
    for row, asked in enumerate(answered):
        alone = teacher_forced(llm, [asked])
        assert (alone.starts, alone.lengths) == ([batch.starts[row]], [batch.lengths[row]])
        assert torch.equal(alone.inputs["input_ids"][0], batch.inputs["input_ids"][row, : batch.lengths[row]])
        assert torch.equal(alone.roles[0], batch.roles[row, : batch.lengths[row]])


@pytest.mark.parametrize("name", NAMES)
def test_the_queries_are_the_positions_that_predict_the_response(open_llm, answered, name):
    batch = teacher_forced(open_llm(name), answered)
    for row in range(len(answered)):
        queries = batch.queries(row)
        predicted = batch.inputs["input_ids"][row, queries.start + 1 : queries.stop + 1].tolist()
        assert predicted == tokens_of(batch, row, "response")
        assert batch.roles[row, queries.start] == ROLES.index("template")


@pytest.mark.parametrize("name", NAMES)
def test_every_token_of_a_clip_is_speech(open_llm, answered, name):
    llm = open_llm(name)
    batch = teacher_forced(llm, answered)
    for row in range(len(answered)):
        speech = tokens_of(batch, row, "speech")
        assert set(speech) == {llm.audio_token_id}
        assert len(speech) == (batch.inputs["input_ids"][row] == llm.audio_token_id).sum()
    lengths = [len(tokens_of(batch, row, "speech")) for row in range(len(answered))]
    assert lengths[0] == max(lengths) > lengths[2] > lengths[3] > lengths[1]  # according to the lengths of the clips


@pytest.mark.parametrize("name", [*NAMES, "text"])
def test_a_transcript_is_speech_too(open_llm, answered, name):
    llm = open_llm(name)
    batch = teacher_forced(llm, answered, "transcript")
    assert batch.inputs.keys() == {"input_ids"}
    for row, asked in enumerate(answered):
        assert llm.tokenizer.decode(tokens_of(batch, row, "speech")) == asked["transcript"]
        assert llm.tokenizer.decode(tokens_of(batch, row, "instruction")) == asked["instruction"]


def test_the_first_token_is_first_whatever_it_says(open_llm, answered, monkeypatch):
    batch = teacher_forced(open_llm("lsm"), answered)
    assert (batch.roles[:, 0] == ROLES.index("first")).all()
    assert ((batch.roles == ROLES.index("first")).sum(1) == 1).all()
    llm = open_llm("qwen2_audio")
    bare = "{% for part in messages[0]['content'] %}{{ part['text'] }}{% endfor %}"
    monkeypatch.setattr(llm.processor, "chat_template", bare)
    row = answered[0] | {"instruction": "say it"}
    batch = teacher_forced(llm, [row], "transcript")
    assert batch.roles[0, 0] == ROLES.index("first")
    assert llm.tokenizer.decode([*tokens_of(batch, 0, "first"), *tokens_of(batch, 0, "instruction")]) == "say it"


def test_an_empty_response_is_refused(open_llm, answered):
    for name in ("lsm", "qwen2_audio"):
        with pytest.raises(ValueError, match="row '1' has an empty response"):
            teacher_forced(open_llm(name), [answered[0], answered[1] | {"response": " \n"}])


# The clip's tokens in a prompt

TEXT = [(5, "template"), (9, "speech"), (6, "instruction"), (7, "template")]


def names(roles):
    return [ROLES[role] for role in roles]


def test_a_clip_has_as_many_placeholders_as_speech_tokens():
    assert names(expand([5, 9, 9, 9, 6, 7], TEXT, 9)) == ["template", *["speech"] * 3, "instruction", "template"]
    assert names(expand([5, 6], [(5, "speech"), (6, "template")], None)) == ["speech", "template"]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([5, 9, 8, 7], "token 2 of the prompt is 8, but 6 in its text"),
        ([1, 5, 9, 6, 7], "token 0 of the prompt is 1, but 5 in its text"),  # a second BOS
        ([5, 9, 6, 7, 7], "token 4 of the prompt is 7, but None in its text"),
        ([5, 9, 6], "the prompt ends after 3 tokens, but its text is longer"),
    ],
)
def test_a_prompt_with_other_tokens_than_its_text_is_refused(prompt, message):
    with pytest.raises(ValueError, match=message):
        expand(prompt, TEXT, 9)
