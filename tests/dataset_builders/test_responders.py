"""Who answers, what it reads, and how a row remembers it."""

import json

import pytest

from dataset_builders.responders import LocalResponder, foreign
from modeling_lsm import LsmForConditionalGeneration

REQUESTS = [
    ("What is said?", "the farmer sold the lamp yesterday"),
    ("Translate the speech.", "the nurse proudly repaired the old clock in the attic before breakfast"),
    ("What comes next?", "hi"),
]


@pytest.fixture(scope="module")
def responder(lsm_dir):
    return LocalResponder(lsm_dir, max_new_tokens=4, token_budget=150)


def end_at_once(responder, monkeypatch):
    """An LLM that ends its turn just before it would be cut."""
    config = responder.model.generation_config
    monkeypatch.setattr(config, "forced_eos_token_id", config.eos_token_id)


def test_a_finished_answer_is_text_and_an_unfinished_one_is_none(responder, monkeypatch):
    assert responder.respond(REQUESTS) == [None] * 3  # random weights know no end
    end_at_once(responder, monkeypatch)
    answers = responder.respond(REQUESTS)
    assert all(isinstance(answer, str) and answer and "</s>" not in answer for answer in answers)


def test_answers_come_in_the_order_of_the_requests_whatever_the_batches(responder, monkeypatch):
    end_at_once(responder, monkeypatch)
    together = responder.respond(REQUESTS)
    assert together == [responder.respond([request])[0] for request in REQUESTS]
    assert together != together[::-1]


def test_it_reads_the_lsms_prompt_with_the_transcript_in_the_slot(responder, processor, monkeypatch):
    seen = []
    monkeypatch.setattr(responder, "_generate", lambda rows: seen.extend(rows) or ["yes"] * len(rows))
    assert responder.respond(REQUESTS[:1]) == ["yes"]
    instruction, transcript = REQUESTS[0]
    with_audio = processor.apply_chat_template(
        processor.conversation(instruction, audio=True), add_generation_prompt=True
    )
    read = processor.tokenizer.decode(seen[0])
    assert read == with_audio.replace(processor.audio_token, transcript)
    assert read.count(processor.tokenizer.bos_token) == 1


def test_a_batch_stays_within_the_token_budget_and_the_longest_come_first(responder):
    lengths = [10, 50, 20, 40, 30, 45]
    batches = responder._batches(lengths)
    assert sorted(index for batch in batches for index in batch) == list(range(6))
    assert all(len(batch) * (max(lengths[i] for i in batch) + 4) <= 150 for batch in batches)
    assert batches[0] == [1, 5]


def test_a_request_over_the_budget_still_gets_a_batch(responder):
    assert responder._batches([1000, 3]) == [[0], [1]]


def test_provenance_says_who_and_how(responder, lsm):
    written = json.loads(responder.provenance)
    assert written == {**lsm.config.responder, "decoding": {"do_sample": False, "max_new_tokens": 4}}


def test_a_checkpoint_that_does_not_say_who_is_inside_is_refused(lsm_dir, processor, tmp_path):
    model = LsmForConditionalGeneration.from_pretrained(lsm_dir)
    model.config.responder = None
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not say which LLM is inside"):
        LocalResponder(tmp_path)


def test_a_responders_own_rows_are_not_foreign(responder, lsm):
    assert foreign(responder.provenance, lsm.config.responder) == []
    longer = json.dumps({**json.loads(responder.provenance), "decoding": {"max_new_tokens": 500}})
    assert foreign(longer, lsm.config.responder) == []


@pytest.mark.parametrize("key", ["model", "revision", "template"])
def test_foreign_names_what_differs(responder, lsm, key):
    other = {**lsm.config.responder, key: "another"}
    (difference,) = foreign(responder.provenance, other)
    assert difference == f"{key}: {lsm.config.responder[key]!r} wrote it, 'another' would learn it"


@pytest.mark.parametrize("provenance", ["", "gpt-4", "{}", "[]", "3", None])
def test_rows_that_do_not_say_who_wrote_them_are_foreign(provenance, lsm):
    assert len(foreign(provenance, lsm.config.responder)) == 3
    assert len(foreign(provenance, None)) == 3
