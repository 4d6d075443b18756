"""What figures are, on rows small enough to count by hand, and how wide their intervals are."""

import json
import math

import numpy as np
import pytest

from recipes.evaluation import metrics
from recipes.evaluation.metrics import (
    Metric,
    accuracy,
    bleu,
    bootstrap_ratio,
    chrf,
    error_rate,
    macro_f1,
    mean,
    missed_by_occurrence,
    normalize_text,
    set_f1,
    squad,
)

ENGLISH = ["the cat sat on the mat", "a farmer sold the old lamp yesterday", "she opened the door for him"]
HEARD = ["the cat sat on a mat", "a farmer sold his old lamp yesterday", "she opened the door for him"]


# Intervals


def test_a_figure_as_json_takes_it_has_six_digits_and_a_signature_if_there_is_one():
    assert Metric(1 / 3, 0, 1).as_dict() == {"value": 0.333333, "low": 0, "high": 1}
    assert Metric(np.float64(2), np.float32(1), 3, "v:2").as_dict()["signature"] == "v:2"
    assert json.loads(json.dumps(Metric(2, np.float32(1), 3).as_dict()))["low"] == 1.0


def test_a_ratio_is_that_of_the_sums_not_the_mean_of_the_ratios():
    assert bootstrap_ratio([1, 0], [1, 9]).value == pytest.approx(0.1)


def test_the_interval_is_that_of_the_textbook():
    """A share of 0.3 among 400 rows: 0.3 ± 1.96 √(0.3 · 0.7 / 400)."""
    metric = mean([1.0] * 120 + [0.0] * 280, draws=4000)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 400)
    assert metric.value == pytest.approx(0.3)
    assert (metric.low, metric.high) == (pytest.approx(0.3 - half, abs=0.005), pytest.approx(0.3 + half, abs=0.005))


def test_the_seed_decides_the_interval_and_nothing_else():
    rows = list(range(50))
    assert mean(rows, seed=1) == mean(rows, seed=1)
    assert mean(rows, seed=1) != mean(rows, seed=2)
    assert mean(rows, seed=1).value == mean(rows, seed=2).value


def test_equal_rows_leave_nothing_to_chance():
    assert mean([2.0] * 9) == Metric(2, 2, 2)


def test_draws_come_in_pieces_where_there_are_many_rows(monkeypatch):
    monkeypatch.setattr(metrics, "CELLS", 100)
    sizes = [rows.shape for rows in metrics._resamples(40, 5, np.random.default_rng(0))]
    assert sizes == [(2, 40), (2, 40), (1, 40)]
    assert 0 < bootstrap_ratio([1, 0] * 20, [1] * 40, draws=5).value < 1


def test_draws_without_a_denominator_do_not_count():
    metric = bootstrap_ratio([1, 0, 0], [2, 0, 0])
    assert metric == Metric(0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_ratio([], []), "'numerators': 0, 'denominators': 0"),
        (lambda: bootstrap_ratio([1, 2], [1]), "'numerators': 2, 'denominators': 1"),
        (lambda: bootstrap_ratio([1, 2], [0, 0]), "denominators of 2 rows sum to 0"),
        (lambda: bootstrap_ratio([1], [1], draws=0), "interval of 0 draws"),
        (lambda: mean([]), "one or more rows"),
        (lambda: mean([1.0], groups=["a", "b"]), "'values': 1, 'groups': 2"),
        (lambda: error_rate(["a"], []), "'references': 1, 'hypotheses': 0"),
        (lambda: error_rate(["(hm)", ""], ["a", "b"]), r"all 2 references are empty once normalised, such as '\(hm\)'"),
        (lambda: bleu([["a"]], ["a", "b"], "de"), "'references': 1, 'hypotheses': 2"),
        (lambda: bleu([["a"], []], ["a", "b"], "de"), r"row 1 has the references \[\]"),
        (lambda: chrf(["a"], ["a"]), "row 0 has the references 'a'; expected a list"),
        (lambda: accuracy([], []), "one or more rows"),
        (lambda: macro_f1(["a"], []), "'gold': 1, 'predicted': 0"),
        (lambda: squad([[]], ["a"]), r"row 0 has the references \[\]"),
        (lambda: set_f1([["a"]], []), "'references': 1, 'predicted': 0"),
    ],
)
def test_rows_that_cannot_be_scored_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_groups_weigh_alike_whatever_their_number_of_rows():
    metric = mean([1.0, 1.0, 1.0, 0.0], groups=["a", "a", "a", "b"])
    assert metric == Metric(0.5, 0.5, 0.5)  # within a group all rows are alike
    assert mean([1.0, 1.0, 1.0, 0.0]).value == 0.75


def test_rows_are_drawn_within_their_group():
    values, groups = [0.0, 1.0] * 50 + [5.0] * 100, ["a"] * 100 + ["b"] * 100
    metric = mean(values, groups)
    half = 1.96 * 0.5 / math.sqrt(100) / 2  # of group a alone, which is half of the figure
    assert metric.value == 2.75
    assert metric.high - metric.low == pytest.approx(2 * half, rel=0.15)


# Transcripts


def test_words_are_compared_as_whisper_does():
    name, metric = error_rate(["Mr. Smith's colour, twenty-five!"], ["mister smith's color 25"])
    assert (name, metric.value) == ("wer", 0.0)


def test_errors_are_counted_over_all_reference_words():
    name, metric = error_rate(ENGLISH, HEARD)
    assert (name, metric.value) == ("wer", pytest.approx(2 / 19))
    assert 0 == metric.low < metric.value < metric.high
    _, metric = error_rate(["the old red lamp"], ["old red x lamp here"])  # a deletion and two insertions
    assert metric.value == pytest.approx(3 / 4)


@pytest.mark.parametrize("language", ["de", "de-DE", "es_419", "fra"])
def test_other_languages_keep_their_spelling(language):
    assert error_rate(["Straße, bitte!"], ["strasse bitte"], language)[1].value == 0.5


@pytest.mark.parametrize(
    "language", ["zh", "zh-CN", "cmn_hans_cn", "zho_Hans", "ja_jp", "yue_hant_hk", "th_th", "lo_la", "my", "km_kh"]
)
def test_languages_without_spaces_are_compared_by_character(language):
    name, metric = error_rate(["我 在 这里。"], ["我在那里"], language)
    assert (name, metric.value) == ("cer", 0.25)


def test_english_has_many_codes():
    assert {normalize_text("Colour, isn't it?", code) for code in ("en", "en_us", "EN-GB", "eng")} == {
        "color is not it"
    }


def test_what_is_said_where_the_reference_is_silent_counts():
    assert error_rate(["uh", "old lamp"], ["well then", "old lamp"])[1].value == 1.0
    assert error_rate(["", "你好"], ["好", "你好"], "zh")[1].value == 0.5
    assert error_rate(["", "old lamp"], ["", "old lamp"])[1].value == 0.0


def test_no_answer_misses_every_word():
    assert error_rate(ENGLISH, [""] * 3)[1] == Metric(1, 1, 1)


def test_missed_words_are_counted_by_their_occurrences_in_a_training():
    """Of the words of "the cat sat on the mat", one "the" is heard as "a"."""
    assert missed_by_occurrence(ENGLISH[:1], HEARD[:1], {"the": 50, "cat": 49, "sat": 1, "a": 9}) == {
        "0": {"words": 2, "missed": 0.0},
        "1-4": {"words": 1, "missed": 0.0},
        "5-49": {"words": 1, "missed": 0.0},
        "50+": {"words": 2, "missed": 0.5},
    }
    assert missed_by_occurrence(["", "old"], ["said more", ""], {}) == {"0": {"words": 1, "missed": 1.0}}


def test_rows_beyond_one_batch_count_like_the_others():
    assert error_rate(["old lamp"] * 2001, ["old lamp"] * 2000 + ["old clock"])[1].value == pytest.approx(1 / 4002)


# Translations


def test_a_perfect_translation_scores_100():
    references = [[text] for text in ENGLISH]
    assert bleu(references, ENGLISH, "en").value == pytest.approx(100)
    assert chrf(references, ENGLISH).value == pytest.approx(100)


def test_scores_are_sacrebleus_own_and_lie_within_their_interval():
    import sacrebleu

    references = [[text] for text in ENGLISH]
    for metric, theirs in (
        (bleu(references, HEARD, "en"), sacrebleu.corpus_bleu(HEARD, [ENGLISH])),
        (chrf(references, HEARD), sacrebleu.corpus_chrf(HEARD, [ENGLISH])),
    ):
        assert metric.value == pytest.approx(theirs.score)
        assert 0 <= metric.low < metric.value < metric.high <= 100
    assert bleu(references, HEARD, "en") == bleu(references, HEARD, "en")


def test_nothing_right_scores_0():
    assert bleu([["eins zwei"]], ["three"], "de").value == 0
    assert chrf([["eins zwei"]], [""]).value == 0


def test_the_signature_says_how():
    signature = bleu([["a b"]], ["a b"], "de").signature
    assert {"nrefs:1", "bs:1000", "seed:12345", "tok:13a", "case:mixed"} <= set(signature.split("|"))
    assert "nc:6" in chrf([["a b"]], ["a b"]).signature


@pytest.mark.parametrize(
    ("language", "tokenizer"),
    [("zh-CN", "zh"), ("cmn_hans_cn", "zh"), ("yue", "zh"), ("th", "char"), ("km_kh", "char"), ("ca", "13a")],
)
def test_the_target_language_decides_the_tokenizer(language, tokenizer):
    assert f"|tok:{tokenizer}|" in bleu([["我在这里"]], ["我在这里"], language).signature


@pytest.mark.parametrize(("language", "module"), [("ja", "ja"), ("jpn_Jpan", "ja"), ("ko-KR", "ko")])
def test_a_tokenizer_that_is_not_installed_is_named(monkeypatch, language, module):
    monkeypatch.setattr(f"sacrebleu.tokenizers.tokenizer_{module}_mecab.MeCab", None)
    with pytest.raises(ImportError, match=rf'pip install "sacrebleu\[{module}\]"'):
        bleu([["a"]], ["a"], language)


def test_rows_may_have_different_numbers_of_references():
    references = [[ENGLISH[0], "the cat is on a mat"], [ENGLISH[1]], [ENGLISH[2]]]
    hypotheses = ["the cat is on a mat", *ENGLISH[1:]]
    metric = bleu(references, hypotheses, "en")
    assert metric.value == pytest.approx(100)
    assert metric.signature.startswith("nrefs:var|")
    assert chrf(references, hypotheses).value == pytest.approx(100)


def test_many_rows_are_drawn_less_often_and_the_signature_says_so(monkeypatch):
    monkeypatch.setattr(metrics, "BLEU_CELLS", 1000)
    assert "|bs:250|" in bleu([["a b"]] * 4, ["a b"] * 4, "de").signature


# Labels


def test_no_readable_answer_is_a_wrong_one():
    metric = accuracy(["a", "b", "a", "b"], ["a", None, "c", "b"])
    assert (metric.value, metric.low, metric.high) == (0.5, 0.0, 1.0)


def test_macro_f1_weighs_classes_alike():
    assert macro_f1(["a"] * 9 + ["b"], ["a"] * 10).value == pytest.approx((18 / 19 + 0) / 2)
    assert macro_f1(["a", "b"], ["a", "b"]) == Metric(1, 1, 1)


def test_a_label_outside_the_classes_is_a_miss_and_no_class():
    gold = ["a", "a", "b", "b"]
    assert macro_f1(gold, ["a", "c", "b", "b"]).value == pytest.approx((2 / 3 + 1) / 2)
    assert macro_f1(gold, ["a", None, "b", "b"]) == macro_f1(gold, ["a", "c", "b", "b"])
    assert macro_f1(gold, [None] * 4) == Metric(0, 0, 0)


def test_macro_f1_is_scikit_learns_and_its_interval_holds_it():
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    gold = rng.choice(["a", "b", "c"], 300, p=[0.6, 0.3, 0.1])
    said = np.where(rng.random(300) < 0.7, gold, rng.choice(["a", "b", "c"], 300))
    metric = macro_f1(gold.tolist(), said.tolist())
    assert metric.value == pytest.approx(sklearn.f1_score(gold, said, average="macro"))
    again = []
    for _ in range(100):
        rows = rng.integers(300, size=300)
        again.append(sklearn.f1_score(gold[rows], said[rows], average="macro"))
    assert [metric.low, metric.high] == pytest.approx(np.quantile(again, [0.025, 0.975]), abs=0.03)


# Free text


@pytest.mark.parametrize(
    ("references", "response", "exact", "f1"),
    [
        (["the old lamp"], "Old lamp.", 1, 1),
        (["lamp", "old lamp"], "an old lamp", 1, 1),
        (["lamp"], "the old lamp", 0, 2 / 3),
        (["old lamp"], "The answer is the old lamp", 0, 2 * 0.5 * 1 / 1.5),
        (["lamp"], "attic", 0, 0),
        (["lamp"], "", 0, 0),
        (["lamp lamp"], "lamp", 0, 2 / 3),
        (["A"], "the", 1, 1),
        (["U.S."], "us", 1, 1),
    ],
)
def test_answers_are_compared_without_case_punctuation_and_articles(references, response, exact, f1):
    scores = squad([references], [response])
    assert (scores["exact_match"].value, scores["f1"].value) == (exact, pytest.approx(f1))


def test_answers_are_averaged_over_rows():
    scores = squad([["lamp"], ["attic"]], ["lamp", "cellar"])
    assert (scores["exact_match"].value, scores["f1"].value) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("right", "said", "f1"),
    [
        (["lamp", "Farmer"], ["farmer ", "LAMP"], 1),
        (["lamp", "farmer"], ["lamp", "attic"], 0.5),
        (["lamp", "farmer"], ["lamp"], 2 / 3),
        (["lamp"], ["lamp", "Lamp", " lamp"], 1),
        (["Straße"], ["STRASSE"], 1),
        ([], [], 1),
        ([], ["lamp"], 0),
        (["lamp"], [], 0),
        (["lamp"], [" "], 0),
    ],
)
def test_sets_are_compared_whatever_their_case_order_and_white_space(right, said, f1):
    assert set_f1([right], [said]).value == pytest.approx(f1)


def test_sets_are_averaged_over_rows():
    assert set_f1([["a"], ["b"]], [["a"], ["c"]]).value == 0.5


def test_answers_without_a_character_in_common_are_scored_too():
    figure = chrf([["abc"], ["def"], ["some words"]], ["xyz", "", "some word"])
    assert 0 <= figure.low <= figure.value <= figure.high
