"""Figures with 95 % intervals: what a set of answers scores, and how far chance alone could move it.

Intervals are percentile bootstraps over rows (Efron & Tibshirani 1993): the rows are drawn anew with replacement, and
the middle 95 % of the draws is the interval. They are functions of the rows and the seed. Shares and error rates are
fractions (0.05 is 5 %), BLEU and chrF go from 0 to 100 as sacrebleu writes them.
"""

import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence, Sized
from dataclasses import dataclass
from functools import cache, lru_cache

import jiwer
import numpy as np
from sacrebleu.metrics import BLEU, CHRF
from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer

DRAWS = 1000
CELLS = 10**6  # drawn rows in memory at a time
BLEU_CELLS = 5 * 10**6  # sacrebleu holds all of its draws in memory, up to 80 bytes for each of their rows

# Three-letter codes, as FLEURS and FLORES write them, of the languages that are treated in a way of their own.
_SHORT_CODES = {
    "eng": "en", "cmn": "zh", "zho": "zh", "jpn": "ja", "kor": "ko", "tha": "th", "lao": "lo", "mya": "my", "khm": "km",
}  # fmt: skip
UNSPACED = ("zh", "ja", "yue", "th", "lo", "my", "km")  # written without spaces between words
# sacrebleu's own choices, and by character where it has none but a model to download.
_BLEU_TOKENIZERS = {"zh": "zh", "yue": "zh", "ja": "ja-mecab", "ko": "ko-mecab"} | dict.fromkeys(
    ("th", "lo", "my", "km"), "char"
)


@dataclass(frozen=True)
class Figure:
    """What readers are told of a figure."""

    is_main: bool = False  # it can stand for a task in tables and pictures
    lower_is_better: bool = False
    is_fraction: bool = True  # shown in per cent


FIGURES = {  # of several main ones, the first that was measured stands for the task
    "following": Figure(is_main=True),
    "wer": Figure(is_main=True, lower_is_better=True),
    "cer": Figure(is_main=True, lower_is_better=True),
    "bleu": Figure(is_main=True, is_fraction=False),
    "accuracy": Figure(is_main=True),
    "f1": Figure(is_main=True),
    "exact_match": Figure(is_main=True),
    "right": Figure(is_main=True),
    "agreement": Figure(is_main=True, is_fraction=False),
    "likelihood_lost": Figure(lower_is_better=True, is_fraction=False),
    "form": Figure(),
    "accuracy_constrained": Figure(),
    "macro_f1": Figure(),
    "chrf": Figure(is_fraction=False),
    "unparsed": Figure(lower_is_better=True),
    "transcript_copy": Figure(lower_is_better=True),
    "truncated": Figure(lower_is_better=True),
    "rtfx": Figure(is_fraction=False),
}


@dataclass(frozen=True)
class Metric:
    """A figure, the ends of its 95 % interval, and, where the figure has settings, the signature that names them."""

    value: float
    low: float
    high: float
    signature: str | None = None

    def as_dict(self) -> dict[str, float | str]:
        """As JSON takes it, rounded to 6 digits after the point."""
        figures = {name: round(float(getattr(self, name)), 6) for name in ("value", "low", "high")}
        return figures | ({} if self.signature is None else {"signature": self.signature})


def bootstrap_ratio(
    numerators: Sequence[float], denominators: Sequence[float] | np.ndarray, draws: int = DRAWS, seed: int = 0
) -> Metric:
    """`sum(numerators) / sum(denominators)`, one of each per row. Draws whose denominators are all 0 do not count.

    Raises:
        ValueError: no rows, more of one than of the other, or denominators whose sum is not above 0.
    """
    _check_rows(numerators=numerators, denominators=denominators)
    above, below = np.asarray(numerators, float), np.asarray(denominators, float)
    if not below.sum() > 0:
        raise ValueError(f"the denominators of {len(below)} rows sum to {below.sum()}; expected a sum above 0")
    ratios = []
    for rows in _resamples(len(below), draws, np.random.default_rng(seed)):
        sums = below[rows].sum(axis=1)
        ratios.append(above[rows].sum(axis=1)[sums > 0] / sums[sums > 0])
    return _metric(above.sum() / below.sum(), np.concatenate(ratios))


def mean(
    values: Sequence[float], groups: Sequence[Hashable] | None = None, draws: int = DRAWS, seed: int = 0
) -> Metric:
    """The mean of the rows' values. With `groups`, a label per row, the mean over groups of each group's mean, whose
    rows are drawn anew within their group.

    Raises ValueError for no rows, or not one label per row.
    """
    if groups is None:
        return bootstrap_ratio(values, np.ones(len(values)), draws, seed)
    _check_rows(values=values, groups=groups)
    members = defaultdict(list)
    for group, value in zip(groups, values, strict=True):
        members[group].append(value)
    rng = np.random.default_rng(seed)
    means = np.zeros(draws)
    for some in members.values():
        held = np.asarray(some, float)
        means += np.concatenate([held[rows].mean(axis=1) for rows in _resamples(len(held), draws, rng)])
    return _metric(float(np.mean([np.mean(some) for some in members.values()])), means / len(members))


# Transcripts


@lru_cache(maxsize=2**16)  # a millisecond each, and every system is compared with the same references
def normalize_text(text: str, language: str = "en") -> str:
    """What `error_rate` compares: `text` as Whisper's normalisers leave it (Radford et al. 2022, appendix C): the
    English one for English, the basic one otherwise; without spaces for a language of `UNSPACED`.

    The basic one drops combining marks, vowel signs of Thai or Hindi among them, as in Whisper's published figures.
    """
    code = _code(language)
    normal = _normalizer(code == "en")(text)
    return "".join(normal.split()) if code in UNSPACED else " ".join(normal.split())


def error_rate(references: Sequence[str], hypotheses: Sequence[str], language: str = "en") -> tuple[str, Metric]:
    """`("wer", errors / reference words)` over all rows, after `normalize_text`; for a language of `UNSPACED`
    `("cer", errors / reference characters)`. `language` is a code such as `en`, `zh-CN` or `cmn_hans_cn`.

    What is said where the reference is silent counts as insertions.

    Raises:
        ValueError: no rows, not one hypothesis per reference, or references that are all empty once normalised.
    """
    _check_rows(references=references, hypotheses=hypotheses)
    said = [normalize_text(text, language) for text in references]
    heard = [normalize_text(text, language) for text in hypotheses]
    if not any(said):
        raise ValueError(f"all {len(said)} references are empty once normalised, such as {references[0]!r}")
    name = "cer" if _code(language) in UNSPACED else "wer"
    process = jiwer.process_characters if name == "cer" else jiwer.process_words
    errors, lengths = [], []
    for start in range(0, len(said), 1000):  # alignments of a batch alone are in memory
        output = process(said[start : start + 1000], heard[start : start + 1000])
        for reference, alignment in zip(output.references, output.alignments, strict=True):
            spans = ((c.ref_end_idx - c.ref_start_idx, c.hyp_end_idx - c.hyp_start_idx, c.type) for c in alignment)
            errors.append(sum(max(there, here) for there, here, kind in spans if kind != "equal"))
            lengths.append(len(reference))
    return name, bootstrap_ratio(errors, lengths)


# Translations


def bleu(references: Sequence[Sequence[str]], hypotheses: Sequence[str], language: str) -> Metric:
    """Corpus BLEU (Papineni et al. 2002) by sacrebleu (Post 2018), 0 to 100; rows may have different numbers of
    references, one or more.

    Args:
        language: code of the target language, which decides the tokenizer: `zh` for Chinese and Cantonese, `ja-mecab`,
            `ko-mecab`, `char` for Thai, Lao, Burmese and Khmer, else `13a`. The signature names it.

    Raises:
        ValueError: no rows, not one list of references per hypothesis, or an empty one.
        ImportError: Japanese or Korean without the tokenizer's package.
    """
    code = _code(language)
    try:
        metric = BLEU(tokenize=_BLEU_TOKENIZERS.get(code, "13a"))
    except RuntimeError as error:  # sacrebleu's word for a missing package
        raise ImportError(f'BLEU for {language!r} needs a tokenizer; pip install "sacrebleu[{code}]"') from error
    return _sacrebleu(metric, references, hypotheses)


def chrf(references: Sequence[Sequence[str]], hypotheses: Sequence[str], language: str = "") -> Metric:
    """Corpus chrF2 (Popović 2015) by sacrebleu, 0 to 100. It needs no tokenizer, so every `language` is treated alike.

    Raises ValueError as `bleu` does.
    """
    return _sacrebleu(_FloatCHRF(), references, hypotheses)


class _FloatCHRF(CHRF):
    """sacrebleu's draws are float32, or float where nothing matches, and its mean takes no mixture of the two."""

    def _compute_score_from_stats(self, stats):
        score = super()._compute_score_from_stats(stats)
        score.score = float(score.score)
        return score


def _sacrebleu(metric: BLEU | CHRF, references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> Metric:
    """The score and sacrebleu's own interval, the mean of its draws plus and minus half the width of their middle 95 %.
    Its seed is 12345 or the variable SACREBLEU_SEED; the signature says which, and how many draws."""
    _check_rows(references=references, hypotheses=hypotheses)
    _check_references(references)
    most = max(map(len, references))
    streams = [[row[i] if i < len(row) else None for row in references] for i in range(most)]  # None: no reference
    draws = min(DRAWS, max(100, BLEU_CELLS // len(hypotheses)))
    score = metric.corpus_score(list(hypotheses), streams, n_bootstrap=draws)
    low, high = float(score._mean - score._ci), float(score._mean + score._ci)  # public only as rounded text
    # The draws' mean is a little off the score, which the interval still has to hold.
    low, high = max(0.0, min(low, score.score)), min(100.0, max(high, score.score))
    return Metric(score.score, low, high, str(metric.get_signature()))


# Labels


def accuracy(gold: Sequence[str], predicted: Sequence[str | None]) -> Metric:
    """The share of rows whose predicted label is the right one; None, for no readable answer, is wrong.

    Raises ValueError for no rows, or not one prediction per row.
    """
    _check_rows(gold=gold, predicted=predicted)
    return mean([float(right == said) for right, said in zip(gold, predicted, strict=True)])


def macro_f1(gold: Sequence[str], predicted: Sequence[str | None]) -> Metric:
    """The mean over the classes in `gold` of their F1. None, or a label outside those, is wrong: it is a miss for the
    right class and a false alarm for none. A draw without any row of a class is averaged over the others.

    Raises ValueError for no rows, or not one prediction per row.
    """
    _check_rows(gold=gold, predicted=predicted)
    classes = sorted(set(gold))
    cells = Counter(zip(gold, predicted, strict=True))
    counts = np.array(list(cells.values()))
    is_gold = np.array([[right == name for name in classes] for right, _ in cells], float)
    is_said = np.array([[said == name for name in classes] for _, said in cells], float)

    def f1(table: np.ndarray) -> np.ndarray:  # (draws, cells) -> (draws,)
        right, said = table @ is_gold, table @ is_said
        both = 2 * (table @ (is_gold * is_said))
        return (both / np.maximum(right + said, 1)).sum(axis=1, where=right > 0) / (right > 0).sum(axis=1)

    # Rows drawn with replacement are a multinomial draw of the confusion table's cells.
    tables = np.random.default_rng(0).multinomial(len(gold), counts / len(gold), size=DRAWS)
    return _metric(float(f1(counts[None])[0]), f1(tables))


# Free text


def squad(references: Sequence[Sequence[str]], responses: Sequence[str]) -> dict[str, Metric]:
    """Exact match and token F1 of SQuAD (Rajpurkar et al. 2016), as fractions: lower case, without ASCII punctuation
    and the articles a, an, the; the best of a row's references. Two answers without any token are equal, as in the
    script of SQuAD 2.0.

    Raises ValueError for no rows, not one list of references per response, or an empty one.
    """
    _check_rows(references=references, responses=responses)
    _check_references(references)
    pairs = list(zip(references, responses, strict=True))
    overlaps = [
        max(_overlap(_squad_tokens(reference), _squad_tokens(response)) for reference in row) for row, response in pairs
    ]
    return {"exact_match": mean([exact_match(*pair) for pair in pairs]), "f1": mean(overlaps)}


def exact_match(references: Sequence[str], response: str) -> bool:
    """Whether one answer is one of its references, as `squad` compares them."""
    return _squad_tokens(response) in [_squad_tokens(reference) for reference in references]


def set_f1(references: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> Metric:
    """The mean of the rows' F1 between two sets of strings, such as keywords, whatever their case, order and outer
    white space. Two empty sets are equal.

    Raises ValueError for no rows, or not one prediction per row.
    """
    _check_rows(references=references, predicted=predicted)
    sets = [
        [sorted({text.strip().casefold() for text in texts} - {""}) for texts in pair]
        for pair in zip(references, predicted, strict=True)
    ]
    return mean([_overlap(right, said) for right, said in sets])


def _overlap(right: list[str], said: list[str]) -> float:
    """F1 of two bags of tokens."""
    if not right or not said:
        return float(right == said)
    return 2 * (Counter(right) & Counter(said)).total() / (len(right) + len(said))


def _squad_tokens(text: str) -> list[str]:
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


# What they share


def _resamples(rows: int, draws: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Row numbers drawn with replacement, (some draws, rows) at a time, `draws` in all."""
    if draws < 1:
        raise ValueError(f"cannot make an interval of {draws} draws; expected 1 or more, such as {DRAWS}")
    step = max(1, CELLS // rows)
    for start in range(0, draws, step):
        yield rng.integers(rows, size=(min(step, draws - start), rows), dtype=np.int32)


def _metric(value: float, drawn: np.ndarray) -> Metric:
    low, high = np.quantile(drawn, [0.025, 0.975]) if len(drawn) else (value, value)
    return Metric(float(value), float(low), float(high))


def _check_rows(**columns: Sized) -> None:
    """Raises ValueError for columns that are empty, or differ in length."""
    lengths = {name: len(column) for name, column in columns.items()}
    if 0 in lengths.values() or len(set(lengths.values())) > 1:
        raise ValueError(f"expected one or more rows, and as many in every column; got {lengths}")


def _check_references(references: Sequence[Sequence[str]]) -> None:
    for row, texts in enumerate(references):
        if isinstance(texts, str) or not texts:
            raise ValueError(f"row {row} has the references {texts!r}; expected a list of one text or more")


def _code(language: str) -> str:
    """The short code of a language: `zh` for zh-CN, zho_Hans and cmn_hans_cn."""
    code = re.split(r"[-_]", language.strip().lower())[0]
    return _SHORT_CODES.get(code, code)


@cache
def _normalizer(english: bool) -> Callable[[str], str]:
    return EnglishTextNormalizer() if english else BasicTextNormalizer()
