"""Speech in the LLM's own words: what a speech token is read as, what becomes of it, and where it stands."""

import pytest
import torch

import modeling_lsm
from configuration_lsm import LsmConfig
from modeling_lsm import LsmForConditionalGeneration, LsmReader

WIDTH, VOCABULARY, NEVER = 16, 40, [0, 7]


def make_reader(**settings):
    torch.manual_seed(0)
    config = LsmConfig(
        text_config={"model_type": "llama", "hidden_size": WIDTH, "num_attention_heads": 4, "vocab_size": VOCABULARY},
        **{"pieces_per_token": 3, "non_text_token_ids": NEVER, **settings},
    )
    reader = LsmReader(config)
    with torch.no_grad():
        reader.blank.normal_()
        reader.blank_bias.fill_(modeling_lsm.BLANK_BIAS)
        reader.scale.fill_(30.0)
    return reader


@pytest.fixture
def embeddings():
    torch.manual_seed(1)
    return torch.nn.Embedding(VOCABULARY, WIDTH)


def near(vectors, length=1.0):
    """Speech in nearly the direction of `vectors`."""
    vectors = torch.nn.functional.normalize(vectors.detach(), dim=-1)
    return length * torch.nn.functional.normalize(vectors + 0.02 * torch.randn_like(vectors), dim=-1)


def test_what_is_like_an_embedding_is_read_as_its_piece_whatever_the_lengths():
    reader, pieces = make_reader(), torch.randn(5, WIDTH)
    speech = torch.stack([7.0 * pieces[3], 0.1 * pieces[1], reader.blank.detach()])
    assert reader.logits(speech, pieces).argmax(-1).tolist() == [4, 2, 0]
    assert reader.logits(torch.zeros(1, WIDTH), pieces).argmax(-1).tolist() == [0]  # what is like nothing is blank
    torch.testing.assert_close(reader.logits(speech, pieces), reader.logits(3 * speech, 0.5 * pieces))
    own = torch.tensor([[3, 1], [1, 3], [0, 2]])  # of every token others
    among_own = reader.logits(speech, pieces[own])[:, 1:]
    torch.testing.assert_close(among_own, reader.logits(speech, pieces)[:, 1:].gather(1, own))


def test_words_become_the_llms_embeddings_and_blanks_say_nothing(embeddings):
    reader, said = make_reader(), near(embeddings.weight[[3, 9, 5]])
    found = reader(torch.cat([said, near(reader.blank[None], 2.0)]), embeddings, embeddings, [4])
    torch.testing.assert_close(found[:3], embeddings.weight[[3, 9, 5]], atol=0.05, rtol=0)
    assert not found[3].any()


def test_a_piece_that_the_token_before_has_too_is_said_once(embeddings):
    """As CTC decodes: it was heard in two windows. With a blank between, it was said twice, and so in another chunk."""
    reader = make_reader()
    heard = near(embeddings.weight[[3, 3, 3, 9]])
    output = reader(heard, embeddings, embeddings, [4])
    torch.testing.assert_close(output[:2], embeddings.weight[[3, 9]], atol=0.05, rtol=0)
    assert not output[2:].any()
    twice = torch.cat([heard[:1], near(reader.blank[None]), heard[:1]])
    torch.testing.assert_close(
        reader(twice, embeddings, embeddings, [3])[:2], embeddings.weight[[3, 3]], atol=0.05, rtol=0
    )
    torch.testing.assert_close(
        reader(heard[:2], embeddings, embeddings, [1, 1]), embeddings.weight[[3, 3]], atol=0.05, rtol=0
    )


def toward(*weighted):
    """Speech between vectors: `(share, vector)`."""
    parts = [share * torch.nn.functional.normalize(vector.detach(), dim=0) for share, vector in weighted]
    return torch.nn.functional.normalize(sum(parts), dim=0)[None]


def test_what_nothing_is_likelier_than_the_blank_says_nothing(embeddings):
    """As in the greedy decoding of CTC, also if several pieces together are likelier than it."""
    reader = make_reader()
    with torch.no_grad():
        reader.scale.fill_(3.0)
        reader.blank_bias.zero_()
    unsure = toward((1.4, reader.blank), (0.7, embeddings.weight[3]), (0.7, embeddings.weight[9]))
    probabilities = reader.logits(unsure, embeddings(reader._search(unsure, embeddings))).softmax(-1)[0]
    assert probabilities.argmax() == 0 and probabilities[0] < 0.5
    assert not reader(unsure, embeddings, embeddings, [1]).any()


def test_an_unsure_word_is_as_long_as_a_sure_one(embeddings):
    """What the LLM gets is a mean of its embeddings, whatever the share of the blank."""
    reader = make_reader(pieces_per_token=1)
    with torch.no_grad():
        reader.scale.fill_(5.0)
        reader.blank_bias.zero_()
    unsure = toward((0.6, reader.blank), (0.8, embeddings.weight[3]))
    blank = reader.logits(unsure, embeddings(reader._search(unsure, embeddings))).softmax(-1)[0, 0]
    assert 0.1 < blank < 0.5
    torch.testing.assert_close(reader(unsure, embeddings, embeddings, [1]), embeddings.weight[[3]])


def test_the_words_of_each_chunk_come_first_in_their_order(embeddings):
    reader = make_reader()
    word, blank = near(embeddings.weight[[3, 9, 5, 4]]), near(reader.blank.expand(3, -1))
    time = torch.stack([blank[0], word[0], blank[1], word[1], word[2], blank[2], word[3]])
    found = reader(time, embeddings, embeddings, [4, 3])
    order = [1, 3, 0, 2, 4, 6, 5]
    torch.testing.assert_close(
        found, torch.cat([reader(token[None], embeddings, embeddings, [1]) for token in time[order]])
    )


def test_speech_is_never_read_as_what_is_no_text(embeddings):
    reader = make_reader()
    found = reader._search(near(embeddings.weight[[7, 3]]), embeddings)
    assert not set(found.flatten().tolist()) & set(NEVER) and found[1, 0] == 3
    assert found.shape == (2, 3)


def test_a_vocabulary_is_searched_in_parts(embeddings, monkeypatch):
    reader, speech = make_reader(), torch.randn(6, WIDTH)
    ids = reader._search(speech, embeddings)
    cosines = torch.nn.functional.normalize(speech) @ torch.nn.functional.normalize(embeddings.weight).T
    cosines[:, NEVER] = -torch.inf
    assert torch.equal(ids, cosines.topk(3).indices)
    monkeypatch.setattr(modeling_lsm, "VOCABULARY_CHUNK", 7)
    assert torch.equal(reader._search(speech, embeddings), ids)
    assert make_reader(pieces_per_token=99)._search(speech, embeddings).shape == (6, VOCABULARY)


def test_the_scaling_of_embeddings_is_in_the_words():
    class Scaled(torch.nn.Embedding):  # as Gemma 3's
        def forward(self, ids):
            return super().forward(ids) * 5

    reader, embeddings = make_reader(), Scaled(VOCABULARY, WIDTH)
    found = reader(near(embeddings.weight[[3]]), embeddings, embeddings, [1])
    torch.testing.assert_close(found, 5 * embeddings.weight[[3]], atol=0.25, rtol=0)


def test_all_of_the_projector_but_the_blank_learns_from_what_the_llm_gets(lsm_dir, processor, clip):
    lsm = LsmForConditionalGeneration.from_pretrained(lsm_dir)
    speech = lsm.get_audio_features(**processor(audio=clip(1.0), return_tensors="pt")).pooler_output
    (speech * torch.randn_like(speech)).sum().backward()
    gradients = {name: value.grad for name, value in lsm.model.projector.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None] == []  # DDP needs all
    assert {name for name, gradient in gradients.items() if not gradient.any()} == {"reader.blank", "reader.blank_bias"}


@torch.no_grad()
def test_reading_changes_neither_how_many_tokens_there_are_nor_other_clips(lsm, processor, clip):
    clips = [clip(1.0), clip(2.0, 1)]
    inputs = processor(audio=clips, return_tensors="pt")
    read, unread = lsm.get_audio_features(**inputs), lsm.model.projector(*lsm.model.encode_audio(**inputs))
    assert read.pooler_output.shape == unread.shape and int(read.num_tokens.sum()) == len(unread)
    assert not torch.allclose(read.pooler_output, unread)
    alone = lsm.get_audio_features(**processor(audio=clips[1], return_tensors="pt")).pooler_output
    torch.testing.assert_close(read.pooler_output[-len(alone) :], alone, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_plain_map_has_no_reader(compose_tiny, whisper_dir, llm_dir, processor, clip):
    lsm, _ = compose_tiny(str(whisper_dir), str(llm_dir), pieces_per_token=0)
    assert not hasattr(lsm.model.projector, "reader")
    inputs = processor(audio=clip(1.0), return_tensors="pt")
    unread = lsm.model.projector(*lsm.model.encode_audio(**inputs))
    assert torch.equal(lsm.get_audio_features(**inputs).pooler_output, unread)


@torch.no_grad()
def test_it_reads_the_same_after_a_reload(lsm_dir, processor, clip, tmp_path):
    lsm = LsmForConditionalGeneration.from_pretrained(lsm_dir)
    lsm.model.projector.reader.scale.fill_(12.5)
    lsm.save_pretrained(tmp_path)
    inputs = processor(audio=clip(1.0), return_tensors="pt")
    again = LsmForConditionalGeneration.from_pretrained(tmp_path)
    assert again.config.non_text_token_ids == lsm.config.non_text_token_ids
    expected = lsm.get_audio_features(**inputs).pooler_output
    assert torch.equal(again.get_audio_features(**inputs).pooler_output, expected)


@pytest.mark.parametrize("value", [-1, 1.5, True, "8"])
def test_a_number_of_pieces_that_cannot_be_is_refused(value):
    with pytest.raises(ValueError, match=rf"`pieces_per_token` must be an integer of 0 or more, got {value!r}"):
        LsmConfig(pieces_per_token=value)
