"""The vectors of word pieces that speech is compared with: those of Whisper's decoder, for the LLM's pieces."""

import pytest
import torch
from tiny_tokenizer import tiny_sentencepiece, tiny_tokenizer

from configuration_lsm import LsmConfig
from language_models.tokenizers import non_text_token_ids
from modeling_lsm import LsmForConditionalGeneration, reading_vectors
from recipes.listening.composing import compose

WIDTH = 16


@pytest.fixture
def heard():
    return tiny_tokenizer("and is what says the ear hears speech")


@pytest.fixture
def words(heard):
    torch.manual_seed(0)
    return torch.randn(len(heard), WIDTH, dtype=torch.float64)


def vectors_of(words, heard, tokenizer):
    config = LsmConfig(
        text_config={"model_type": "llama", "vocab_size": len(tokenizer)},
        non_text_token_ids=non_text_token_ids(tokenizer, len(tokenizer)),
    )
    return reading_vectors(words, heard, tokenizer, config)


def spelled(ids, words, heard):
    """The vector of a piece that Whisper divides into these pieces."""
    mean = words[[id for id in range(len(words)) if id not in heard.added_tokens_decoder]].mean(0)
    parts = words[ids] - mean
    total = parts.sum(0)
    return mean + total / total.norm() * parts.norm(dim=-1).mean()


def test_a_piece_that_whisper_has_too_has_its_vector(words, heard):
    tokenizer = tiny_tokenizer()
    vectors = vectors_of(words, heard, tokenizer)
    shared = sorted(set(tokenizer.get_vocab()) & set(heard.get_vocab()) - set(tokenizer.all_special_tokens))
    assert "Ġwhat" in shared
    ids, known = tokenizer.convert_tokens_to_ids(shared), heard.convert_tokens_to_ids(shared)
    torch.testing.assert_close(vectors[ids], words[known])


def test_a_piece_that_whisper_divides_has_the_direction_of_the_sum_of_its_parts(words, heard):
    tokenizer = tiny_tokenizer()
    ids = heard(" asked", add_special_tokens=False).input_ids
    assert len(ids) > 1
    vector = vectors_of(words, heard, tokenizer)[tokenizer.convert_tokens_to_ids("Ġasked")]
    torch.testing.assert_close(vector, spelled(ids, words, heard))


def test_what_is_no_text_is_like_no_word(words, heard):
    tokenizer = tiny_tokenizer()
    vectors = vectors_of(words, heard, tokenizer)
    without = [id for id in range(len(tokenizer)) if not vectors[id].any()]
    assert without == tokenizer.all_special_ids


def test_a_part_of_a_character_is_the_byte_that_whisper_has(words, heard):
    tokenizer = tiny_tokenizer()
    first = tokenizer("é", add_special_tokens=False).input_ids[0]
    assert tokenizer.decode([first]) == "\ufffd"
    vector = vectors_of(words, heard, tokenizer)[first]
    torch.testing.assert_close(vector, words[heard("é", add_special_tokens=False).input_ids[0]])


@pytest.mark.parametrize("prepend", ["first", "legacy"])
def test_the_spaces_and_bytes_of_sentencepiece_are_known(words, heard, prepend):
    tokenizer = tiny_sentencepiece(prepend)
    vectors = vectors_of(words, heard, tokenizer)

    def same(piece, ids):
        torch.testing.assert_close(vectors[tokenizer.convert_tokens_to_ids(piece)], spelled(ids, words, heard))

    same("▁the", heard(" the", add_special_tokens=False).input_ids)
    same("<0xC3>", [heard("é", add_special_tokens=False).input_ids[0]])


def test_they_never_learn(reading_whisper_dir, llm_dir, tmp_path):
    compose(str(reading_whisper_dir), str(llm_dir), str(tmp_path / "lsm"))
    model = LsmForConditionalGeneration.from_pretrained(tmp_path / "lsm")
    assert not model.train().model.reading_embeddings.weight.requires_grad
    assert model.model.projector.linear.weight.requires_grad
