"""Compute the figures of a set of answers, with 95 % intervals.

Intervals are percentile bootstraps over rows (Efron & Tibshirani 1993): the rows are resampled with replacement, and
the interval contains the middle 95 % of the figures of all draws. They depend only on the rows and the seed. Shares and
error rates are fractions (0.05 is 5 %); BLEU and chrF go from 0 to 100, as in sacrebleu.

Arguments have an item for each row. It is a ValueError if there are no rows, or if arguments differ in length.
"""

import bisect
import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import cache, lru_cache

import jiwer
import numpy as np
from sacrebleu.metrics import BLEU, CHRF
from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer

DRAWS = 1000
CELLS = 10**6  # resampled rows in memory at the same time
OCCURRENCES, LEAST_OCCURRENCES = ("0", "1-4", "5-49", "50+"), (0, 1, 5, 50)  # of words in a training set
BLEU_CELLS = 5 * 10**6  # sacrebleu keeps all draws in memory, with up to 80 bytes for each of their rows

# Three-letter codes, as in FLEURS and FLORES, of the languages that need a special treatment.
_SHORT_CODES = {
    "eng": "en", "cmn": "zh", "zho": "zh", "jpn": "ja", "kor": "ko", "tha": "th", "lao": "lo", "mya": "my", "khm": "km",
}  # fmt: skip
UNSPACED = ("zh", "ja", "yue", "th", "lo", "my", "km")  # languages that are written without spaces between words
# The tokenizers that sacrebleu recommends, or characters where it only has a model to download.
_BLEU_TOKENIZERS = {"zh": "zh", "yue": "zh", "ja": "ja-mecab", "ko": "ko-mecab"} | dict.fromkeys(
    ("th", "lo", "my", "km"), "char"
)


@dataclass(frozen=True)
class Figure:
    """How a figure is shown."""

    is_main: bool = False  # whether it can represent a task in tables and pictures
    lower_is_better: bool = False
    is_fraction: bool = True  # whether it is shown in per cent
    most: float = 1.0  # the best value, of a figure that is not an error


FIGURES = {  # a task is represented by its first main figure in this order
    "ifeval": Figure(is_main=True),
    "following": Figure(is_main=True),
    "wer": Figure(is_main=True, lower_is_better=True),
    "cer": Figure(is_main=True, lower_is_better=True),
    "bleu": Figure(is_main=True, is_fraction=False, most=100),
    "accuracy": Figure(is_main=True),
    "refusals": Figure(is_main=True),
    "rating": Figure(is_main=True, is_fraction=False, most=5),  # from 1 to 5
    "f1": Figure(is_main=True),
    "exact_match": Figure(is_main=True),
    "right": Figure(is_main=True),
    "agreement": Figure(is_main=True, is_fraction=False, most=100),
    "likelihood_lost": Figure(lower_is_better=True, is_fraction=False),
    "form": Figure(),
    "suite": Figure(),
    "following_loose": Figure(),
    "accuracy_constrained": Figure(),
    "macro_f1": Figure(),
    "chrf": Figure(is_fraction=False),
    "unparsed": Figure(lower_is_better=True),
    "transcript_copy": Figure(lower_is_better=True),
    "truncated": Figure(lower_is_better=True),
    "rtfx": Figure(is_fraction=False),
}


def main_figure(figures: Collection[str]) -> str | None:
    """Return the name of the main figure, which represents a task; None if there is none."""
    others = {"agreement"} if "unparsed" in figures else set()  # it says nothing of what nobody could read
    return next((name for name in FIGURES if FIGURES[name].is_main and name in figures and name not in others), None)


@dataclass(frozen=True)
class Metric:
    """A figure, the ends of its 95 % interval, and sacrebleu's signature of its settings, if it has any."""

    value: float
    low: float
    high: float
    signature: str | None = None

    def as_dict(self) -> dict[str, float | str]:
        """Return the fields as values for JSON, rounded to 6 decimal places, without an empty signature."""
        figures = {name: round(float(getattr(self, name)), 6) for name in ("value", "low", "high")}
        return figures | ({} if self.signature is None else {"signature": self.signature})


def bootstrap_ratio(
    numerators: Sequence[float], denominators: Sequence[float] | np.ndarray, draws: int = DRAWS, seed: int = 0
) -> Metric:
    """Return `sum(numerators) / sum(denominators)` with its interval. Draws whose denominators are all 0 are ignored.
    Raises ValueError if the sum of the denominators is not above 0."""
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
    """Return the mean of the values with its interval. If `groups` has labels, it is the mean of the means of the
    groups, and rows are resampled within their group."""
    if groups is None:
        return bootstrap_ratio(values, np.ones(len(values)), draws, seed)
    _check_rows(values=values, groups=groups)
    members = defaultdict(list)
    for group, value in zip(groups, values, strict=True):
        members[group].append(value)
    rng = np.random.default_rng(seed)
    means = np.zeros(draws)
    for in_group in members.values():
        array = np.asarray(in_group, float)
        means += np.concatenate([array[rows].mean(axis=1) for rows in _resamples(len(array), draws, rng)])
    return _metric(float(np.mean([np.mean(in_group) for in_group in members.values()])), means / len(members))


def mean_of_tasks(tasks: Sequence[Mapping[str, Mapping]]) -> Metric:
    """Return the mean of the main figures of several tasks, each as a fraction of its best value. `tasks` are the
    figures of each task by name, with `value`, `low` and `high`.

    The interval is that of independent tasks: the distances of their ends from their values add up in squares.
    """
    names = [main_figure(figures) for figures in tasks]
    value, low, high = (
        np.array([figures[name][key] / FIGURES[name].most for name, figures in zip(names, tasks, strict=True)])
        for key in ("value", "low", "high")
    )
    center, below, above = value.mean(), np.linalg.norm(value - low), np.linalg.norm(high - value)
    return Metric(float(center), float(center - below / len(value)), float(center + above / len(value)))


# Transcripts


@lru_cache(maxsize=2**16)  # a call takes a millisecond, and every system is compared with the same references
def normalize_text(text: str, language: str = "en") -> str:
    """Normalise a text with Whisper's normalisers (Radford et al. 2022, appendix C): the English one for English, and
    the basic one for all other languages. The result has no spaces in the languages of `UNSPACED`.

    The basic normaliser removes combining marks, including the vowel signs of Thai and Hindi, as in the figures that
    were published for Whisper.
    """
    code = _code(language)
    normal = _normalizer(code == "en")(text)
    return "".join(normal.split()) if code in UNSPACED else " ".join(normal.split())


def error_rate(references: Sequence[str], hypotheses: Sequence[str], language: str = "en") -> tuple[str, Metric]:
    """Return `("wer", errors / reference words)` over all rows after `normalize_text`, or `("cer", errors / reference
    characters)` in the languages of `UNSPACED`. Hypotheses of empty references count as insertions.

    Raises:
        ValueError: all references are empty once normalised.
    """
    _check_rows(references=references, hypotheses=hypotheses)
    expected = [normalize_text(text, language) for text in references]
    actual = [normalize_text(text, language) for text in hypotheses]
    if not any(expected):
        raise ValueError(f"all {len(expected)} references are empty once normalised, such as {references[0]!r}")
    name = "cer" if _code(language) in UNSPACED else "wer"
    process = jiwer.process_characters if name == "cer" else jiwer.process_words
    errors, lengths = [], []
    for start in range(0, len(expected), 1000):  # in batches, so that not all alignments are in memory
        output = process(expected[start : start + 1000], actual[start : start + 1000])
        for reference, alignment in zip(output.references, output.alignments, strict=True):
            spans = ((c.ref_end_idx - c.ref_start_idx, c.hyp_end_idx - c.hyp_start_idx, c.type) for c in alignment)
            errors.append(sum(max(ref, hyp) for ref, hyp, kind in spans if kind != "equal"))
            lengths.append(len(reference))
    return name, bootstrap_ratio(errors, lengths)


def missed_by_occurrence(
    references: Sequence[str], hypotheses: Sequence[str], occurrences: Mapping[str, int]
) -> dict[str, dict]:
    """Return which reference words are not recognised (substituted or deleted), by how often they occur in a training
    set: `{"0": {"words": 1112, "missed": 0.94}, "1-4": ..., "5-49": ..., "50+": ...}`, without classes that have no
    words.

    Args:
        occurrences: number of occurrences of each word after `normalize_text`.
    """
    words, missed = Counter(), Counter()
    output = jiwer.process_words(
        *([normalize_text(text, "en") for text in texts] for texts in (references, hypotheses))
    )
    for reference, alignment in zip(output.references, output.alignments, strict=True):
        for chunk in alignment:
            for word in reference[chunk.ref_start_idx : chunk.ref_end_idx]:
                name = OCCURRENCES[bisect.bisect(LEAST_OCCURRENCES, occurrences.get(word, 0)) - 1]
                words[name] += 1
                missed[name] += chunk.type != "equal"
    return {name: {"words": words[name], "missed": missed[name] / words[name]} for name in OCCURRENCES if words[name]}


# Translations


def bleu(references: Sequence[Sequence[str]], hypotheses: Sequence[str], language: str) -> Metric:
    """Return the corpus BLEU (Papineni et al. 2002) of sacrebleu (Post 2018), from 0 to 100.

    The code of the target language determines the tokenizer: `zh` for Chinese and Cantonese, `ja-mecab` for Japanese,
    `ko-mecab` for Korean, `char` for Thai, Lao, Burmese and Khmer, otherwise `13a`. The signature contains its name.

    Raises:
        ValueError: a row has no references.
        ImportError: the package of the Japanese or Korean tokenizer is missing.
    """
    code = _code(language)
    try:
        metric = BLEU(tokenize=_BLEU_TOKENIZERS.get(code, "13a"))
    except RuntimeError as error:  # what sacrebleu raises if a package is missing
        raise ImportError(f'BLEU for {language!r} needs a tokenizer; pip install "sacrebleu[{code}]"') from error
    return _sacrebleu(metric, references, hypotheses)


def chrf(references: Sequence[Sequence[str]], hypotheses: Sequence[str], language: str = "") -> Metric:
    """Return the corpus chrF2 (Popović 2015) of sacrebleu, from 0 to 100. It needs no tokenizer, so `language` is
    ignored. Other arguments and errors are those of `bleu`."""
    return _sacrebleu(_FloatCHRF(), references, hypotheses)


class _FloatCHRF(CHRF):
    """Returns all scores as float. sacrebleu's are float32, or float if nothing matches, and it fails on mixtures."""

    def _compute_score_from_stats(self, stats):
        score = super()._compute_score_from_stats(stats)
        score.score = float(score.score)
        return score


def _sacrebleu(metric: BLEU | CHRF, references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> Metric:
    """Return the score with sacrebleu's own interval: the mean of the draws, plus and minus half the width of their
    middle 95 %. The seed is 12345 or that of the variable SACREBLEU_SEED; the signature contains seed and draws."""
    _check_rows(references=references, hypotheses=hypotheses)
    _check_references(references)
    most = max(map(len, references))
    streams = [[row[i] if i < len(row) else None for row in references] for i in range(most)]  # None: a row has fewer
    draws = min(DRAWS, max(100, BLEU_CELLS // len(hypotheses)))
    score = metric.corpus_score(list(hypotheses), streams, n_bootstrap=draws)
    low, high = float(score._mean - score._ci), float(score._mean + score._ci)  # the public attribute is rounded text
    # The mean of the draws differs slightly from the score, but the interval should contain the score.
    low, high = max(0.0, min(low, score.score)), min(100.0, max(high, score.score))
    return Metric(score.score, low, high, str(metric.get_signature()))


# Labels


def accuracy(gold: Sequence[str], predicted: Sequence[str | None]) -> Metric:
    """Return the share of rows whose predicted label is right. None, for an answer that could not be read, is wrong."""
    _check_rows(gold=gold, predicted=predicted)
    return mean([float(right == label) for right, label in zip(gold, predicted, strict=True)])


def macro_f1(gold: Sequence[str], predicted: Sequence[str | None]) -> Metric:
    """Return the mean F1 over the classes in `gold`. A prediction of None or of another label counts as a miss for the
    right class, and as a false alarm for no class. Draws without rows of a class are averaged over the other classes.
    """
    _check_rows(gold=gold, predicted=predicted)
    classes = sorted(set(gold))
    cells = Counter(zip(gold, predicted, strict=True))
    counts = np.array(list(cells.values()))
    is_gold = np.array([[right == name for name in classes] for right, _ in cells], float)
    is_predicted = np.array([[label == name for name in classes] for _, label in cells], float)

    def f1(table: np.ndarray) -> np.ndarray:  # (draws, cells) -> (draws,)
        in_gold, in_predicted = table @ is_gold, table @ is_predicted
        scores = 2 * (table @ (is_gold * is_predicted)) / np.maximum(in_gold + in_predicted, 1)
        return scores.sum(axis=1, where=in_gold > 0) / (in_gold > 0).sum(axis=1)

    # Resampling rows is the same as a multinomial draw of the cells of the confusion matrix.
    tables = np.random.default_rng(0).multinomial(len(gold), counts / len(gold), size=DRAWS)
    return _metric(float(f1(counts[None])[0]), f1(tables))


# Free text


def squad(references: Sequence[Sequence[str]], responses: Sequence[str]) -> dict[str, Metric]:
    """Return the exact match and the token F1 of SQuAD (Rajpurkar et al. 2016) as fractions.

    Texts are compared in lower case, without ASCII punctuation and the articles a, an, the. The best of a row's
    references counts. Two texts without any tokens are equal, as in the script of SQuAD 2.0. A row without references
    is a ValueError.
    """
    _check_rows(references=references, responses=responses)
    _check_references(references)
    pairs = list(zip(references, responses, strict=True))
    overlaps = [
        max(_overlap(_squad_tokens(reference), _squad_tokens(response)) for reference in row) for row, response in pairs
    ]
    return {"exact_match": mean([exact_match(*pair) for pair in pairs]), "f1": mean(overlaps)}


def exact_match(references: Sequence[str], response: str) -> bool:
    """Return whether a response equals one of its references after the normalisation of `squad`."""
    return _squad_tokens(response) in [_squad_tokens(reference) for reference in references]


def set_f1(references: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> Metric:
    """Return the mean F1 of two sets of strings per row, such as keywords. Case, order, and leading and trailing white
    space are ignored. Two empty sets are equal."""
    _check_rows(references=references, predicted=predicted)
    sets = [
        [sorted({text.strip().casefold() for text in texts} - {""}) for texts in pair]
        for pair in zip(references, predicted, strict=True)
    ]
    return mean([_overlap(*pair) for pair in sets])


def _overlap(expected: list[str], predicted: list[str]) -> float:
    """Return the F1 of two bags of tokens."""
    if not expected or not predicted:
        return float(expected == predicted)
    return 2 * (Counter(expected) & Counter(predicted)).total() / (len(expected) + len(predicted))


def _squad_tokens(text: str) -> list[str]:
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


# Helpers of all figures


def _resamples(rows: int, draws: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield `draws` resamples of row numbers, as arrays `(draws in this array, rows)`."""
    if draws < 1:
        raise ValueError(f"cannot make an interval of {draws} draws; expected 1 or more, such as {DRAWS}")
    step = max(1, CELLS // rows)
    for start in range(0, draws, step):
        yield rng.integers(rows, size=(min(step, draws - start), rows), dtype=np.int32)


def _metric(value: float, drawn: np.ndarray) -> Metric:
    low, high = np.quantile(drawn, [0.025, 0.975]) if len(drawn) else (value, value)
    return Metric(float(value), float(low), float(high))


def _check_rows(**columns: Sized) -> None:
    """Raise ValueError if columns are empty or differ in length."""
    lengths = {name: len(column) for name, column in columns.items()}
    if 0 in lengths.values() or len(set(lengths.values())) > 1:
        raise ValueError(f"expected one or more rows, and as many in every column; got {lengths}")


def _check_references(references: Sequence[Sequence[str]]) -> None:
    for row, texts in enumerate(references):
        if isinstance(texts, str) or not texts:
            raise ValueError(f"row {row} has the references {texts!r}; expected a list of one text or more")


def _code(language: str) -> str:
    """Return the short code of a language, such as `zh` for zh-CN, zho_Hans and cmn_hans_cn."""
    code = re.split(r"[-_]", language.strip().lower())[0]
    return _SHORT_CODES.get(code, code)


@cache
def _normalizer(english: bool) -> Callable[[str], str]:
    return EnglishTextNormalizer() if english else BasicTextNormalizer()
