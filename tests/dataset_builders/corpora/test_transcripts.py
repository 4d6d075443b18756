"""Each rule changes transcripts as described, and no rule ever changes a word."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset_builders.corpora import transcripts
from dataset_builders.corpora.transcripts import NORMALIZERS, common_voice, gigaspeech, plain, sentence_case


def test_the_docstring_has_a_row_for_every_rule():
    assert re.findall(r"^\| `(\w+)`", transcripts.__doc__, re.MULTILINE) == list(NORMALIZERS)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("  he \t said\nno ", "he said no"),
        ("non\u00a0breaking\u2003and wide", "non breaking and wide"),
        ('AS IT IS, <COMMA> and "so"', 'AS IT IS, <COMMA> and "so"'),
        (" \n", ""),
    ],
)
def test_plain_joins_white_space_and_changes_nothing_else(given, expected):
    assert plain(given) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("ARE YOU HURT SHE ASKED", "Are you hurt she asked"),
        ("I THINK I'M LATE AND SO AM I", "I think I'm late and so am I"),
        ("HE SAID 'I AM HERE'", "He said 'I am here'"),
        ("SHE LEFT HAWAI'I, I.E., HER HOME", "She left hawai'i, i.e., her home"),  # no pronoun in a word
        ("IT ENDS. A NEW ONE? YES", "It ends. A new one? Yes"),
        ('"WHO?" HE ASKED', '"Who?" he asked'),
        ("ÉTÉ À LA MER", "Été à la mer"),
        ("A", "A"),
    ],
)
def test_librispeech_is_given_sentence_case(given, expected):
    assert NORMALIZERS["librispeech"](given) == expected


@pytest.mark.parametrize("text", ["Mr. Hurst went to NATO", "already lower", "我们走吧", "1984", ""])
def test_text_that_is_not_in_capitals_only_is_left_alone(text):
    assert sentence_case(text) == text


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ('"""Hello."""', "Hello."),
        ('"Hello."', "Hello."),
        ('"He said ""no""."', 'He said "no".'),
        ('"""No"" was all he said."', '"No" was all he said.'),
        ("“Guten Tag.”", "Guten Tag."),
        ("„Guten Tag.“", "Guten Tag."),
        ("« Bonjour. »", "Bonjour."),
    ],
)
def test_common_voice_loses_the_quotes_around_the_whole_sentence(given, expected):
    assert common_voice(given) == expected


@pytest.mark.parametrize(
    "text", ['"Yes" and "no".', '"Yes," he said, "no"', "“A” said “B”", "„A“ sagte „B“", 'He said "no".', "'Tis", '"']
)
def test_common_voice_keeps_quotes_that_belong_to_a_part(text):
    assert common_voice(text) == text


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("YES <COMMA> SIR <PERIOD>", "Yes, sir."),
        ("WHO <QUESTIONMARK> I <EXCLAMATIONPOINT> NO ONE <PERIOD>", "Who? I! No one."),
        ("yes <COMMA> sir <PERIOD>", "yes, sir."),
        ("A <LAUGH> B", "A <laugh> b"),  # an unknown tag is kept
        ("<MUSIC>", ""),
        ("<SIL>", ""),
        ("<NOISE>", ""),
        ("<OTHER>", ""),
        ("SO IT <NOISE> ENDS", ""),  # this tag means that the clip is garbage
    ],
)
def test_gigaspeech_has_marks_for_tags_and_nothing_where_noise_is_tagged(given, expected):
    assert gigaspeech(given) == expected


def words(text: str) -> str:
    """Return the case-folded letters and digits of a text, without punctuation, quotes and tags."""
    text = re.sub(r"<(COMMA|PERIOD|QUESTIONMARK|EXCLAMATIONPOINT)>", " ", text)
    return " ".join(re.sub(r"[\W_]+", " ", text.casefold()).split())


LETTERS = st.sampled_from([*"abcIiTtÉéßØжΣσñ我。", "'", '"', "“", "”", ".", "?", ",", "-", " ", "\n", "3"])
TEXTS = st.text(LETTERS, max_size=30) | st.text(LETTERS, max_size=30).map(str.upper)


@pytest.mark.parametrize("rule", NORMALIZERS)
@settings(max_examples=100, derandomize=True, deadline=None)
@given(text=TEXTS)
def test_no_rule_changes_a_word(rule, text):
    assert words(NORMALIZERS[rule](text)) == words(text)


@pytest.mark.parametrize("rule", NORMALIZERS)
@settings(max_examples=100, derandomize=True, deadline=None)
@given(text=TEXTS)
def test_a_rule_applied_twice_does_what_it_does_once(rule, text):
    once = NORMALIZERS[rule](text)
    assert NORMALIZERS[rule](once) == once


@settings(max_examples=100, derandomize=True, deadline=None)
@given(parts=st.lists(st.sampled_from(["YES", "I", "<COMMA>", "<PERIOD>", "<QUESTIONMARK>", "<EXCLAMATIONPOINT>"])))
def test_gigaspeech_tags_become_marks_and_words_stay(parts):
    text = gigaspeech(" ".join(parts))
    assert "<" not in text and words(text) == words(" ".join(parts))
    assert gigaspeech(text) == text


@pytest.mark.parametrize("rule", NORMALIZERS)
@settings(max_examples=100, derandomize=True, deadline=None)
@given(text=st.text(max_size=30))
def test_no_text_makes_a_rule_fail_or_grow_white_space(rule, text):
    result = NORMALIZERS[rule](text)
    assert result == " ".join(result.split())
