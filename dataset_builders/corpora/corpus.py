"""What a corpus is to those who read it: a stream of utterances, and errors that say where they stand."""

import logging
import reprlib
from collections.abc import Iterator

import numpy as np
from datasets import Features, Value

from dataset_builders.corpora.audio import duration_of
from dataset_builders.corpora.transcripts import NORMALIZERS

logger = logging.getLogger(__name__)

FEATURES = Features(
    {
        "id": Value("string"),
        "audio": {"bytes": Value("binary"), "path": Value("string")},
        "transcript": Value("string"),
        "duration": Value("float32"),  # seconds
        "source": Value("string"),  # corpus and split
    }
)
# Where a corpus names its columns otherwise than it is told, the first of these that it has is taken.
COLUMNS = {
    "audio": ("audio", "audio_filepath", "audio_path", "file_name", "path", "file", "wav"),
    "transcript": ("transcript", "text", "sentence", "transcription", "normalized_text"),
    "id": ("id", "utterance_id", "segment_id", "utt_id"),
}


class RefusedRowError(ValueError):
    """An utterance that cannot be used: `where` it stands, and the `reason`, few words that can be counted."""

    def __init__(self, where: str, reason: str, details: str = ""):
        self.where, self.reason = _printable(where), reason
        super().__init__(_printable(f"{where}: {reason}{': ' if details else ''}{details}"))


class UnusedFileError(RefusedRowError):
    """A file of a corpus that no utterance is of. Builds count it; whoever reads all utterances goes on."""


class Corpus:
    """A split of a corpus, to be read file by file.

    `num_files` files can be read apart; their number, the order of the utterances in them and their ids depend on the
    corpus alone.
    """

    num_files = 1
    default_limit: int | None = None  # utterances, of a corpus that has no end
    revision: str | None = None  # commit, or the fingerprint of what its files hold, where there is one
    config: str | None = None
    license: str | None = None
    language: str | None = None

    def __init__(self, name: str, split: str, columns: dict[str, str], normalizer: str = "plain"):
        if normalizer not in NORMALIZERS:
            raise ValueError(f"unknown normalizer {normalizer!r}; there are {list(NORMALIZERS)}")
        self.name, self.split, self.columns, self.normalizer = name, split, columns, normalizer
        self.origin = name  # its Hub id, or its folder's or file's name; `name` is what rows call it

    @property
    def source(self) -> str:
        return f"{self.name}/{self.split}"

    def describe(self) -> dict:
        """Which corpus this is, as JSON takes it."""
        names = ("origin", "name", "split", "config", "revision", "columns", "normalizer", "license", "language")
        return {"kind": type(self).__name__, **{name: getattr(self, name) for name in names}}

    def lines(self, file: int) -> Iterator[tuple[str, dict | RefusedRowError]]:
        """Where an utterance stands, and what stands there in the corpus's own columns: cheap, nothing is decoded."""
        raise NotImplementedError

    def audio(self, where: str, line: dict) -> dict:
        """The `{"bytes", "path"}` of an utterance.

        Raises:
            RefusedRowError: the file cannot be read.
        """
        raise NotImplementedError

    def utterance(self, where: str, line: dict | RefusedRowError) -> dict:
        """The row of `FEATURES` for one of the `lines`.

        Raises:
            RefusedRowError: its audio cannot be read, it has no transcript, or its texts are not UTF-8.
        """
        if isinstance(line, RefusedRowError):
            raise line
        column = self.columns["transcript"]
        if column not in line:
            raise RefusedRowError(where, "no column", f"{column!r} is missing, there are {sorted(line)}")
        text = NORMALIZERS[self.normalizer](line[column]) if isinstance(line[column], str) else ""
        if not text:
            given = reprlib.repr(line[column])
            raise RefusedRowError(where, "no transcript", f"{column!r} is {given}; expected what is said")
        audio = self.audio(where, line)
        try:
            duration = duration_of(audio)
        except ValueError as error:
            raise RefusedRowError(where, "unreadable audio", str(error)) from error
        id = self.id_of(where, line, audio)
        for value in (id, text, audio["path"] or ""):
            if value != _printable(value):
                raise RefusedRowError(where, "not UTF-8", f"{value!r}; expected text in that encoding")
        return {
            "id": id,
            "audio": audio,
            "transcript": text,
            "duration": np.float32(duration),
            "source": self.source,
        }

    def id_of(self, where: str, line: dict, audio: dict) -> str:
        """The corpus's own id, or else where the utterance stands."""
        value = line.get(self.columns.get("id", ""))
        return where if value in (None, "") else str(value)

    def __iter__(self) -> Iterator[dict]:
        """All utterances; the first that cannot be used ends it with a `RefusedRowError`."""
        for where, line in self.all_lines():
            yield self.utterance(where, line)

    def all_lines(self) -> Iterator[tuple[str, dict | RefusedRowError]]:
        """The lines of all files, for those who read a corpus as a whole. Files that no utterance is of are told."""
        for file in range(self.num_files):
            for where, line in self.lines(file):
                if isinstance(line, UnusedFileError):
                    logger.warning("not used: %s", line)
                else:
                    yield where, line


def choose_columns(there: list[str], told: dict[str, str], corpus: str) -> dict[str, str]:
    """Which column of a corpus is its `audio`, its `transcript` and, if it has one, its `id`.

    Raises:
        ValueError: a column that it was told of is not there, or none that could be it; names those there are.
    """
    chosen = {}
    for role, customary in COLUMNS.items():
        candidates = [told[role]] if role in told else customary
        found = next((column for column in candidates if column in there), None)
        if found is not None:
            chosen[role] = found
        elif role in told or role != "id":
            names = " or ".join(map(repr, candidates))
            raise ValueError(
                f"{corpus} has no column {names} for the {role}; it has {there}. Name its columns: by "
                "--audio-column, --transcript-column and --id-column of a build."
            )
    return chosen


def _printable(text: str) -> str:
    """With what could not be decoded, or not be encoded again, as `\\udc..`."""
    return text.encode("utf-8", "backslashreplace").decode()
