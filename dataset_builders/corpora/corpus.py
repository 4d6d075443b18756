"""A corpus as a stream of utterances, with errors that name the line of a bad utterance."""

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
# Common names of the columns. If no column is named by the user or a preset, the first of these that exists is used.
COLUMNS = {
    "audio": ("audio", "audio_filepath", "audio_path", "file_name", "path", "file", "wav"),
    "transcript": ("transcript", "text", "sentence", "transcription", "normalized_text"),
    "id": ("id", "utterance_id", "segment_id", "utt_id"),
}


class RefusedRowError(ValueError):
    """An utterance that cannot be used. `where` names its line or file; `reason` is a short text from a fixed set."""

    def __init__(self, where: str, reason: str, details: str = ""):
        self.where, self.reason = _printable(where), reason
        super().__init__(_printable(f"{where}: {reason}{': ' if details else ''}{details}"))


class UnusedFileError(RefusedRowError):
    """A file that belongs to no utterance. A build counts it; reading all utterances skips it with a warning."""


class Corpus:
    """A split of a corpus, which is read file by file.

    The `num_files` files can be read independently. Their number, and the order and the ids of their utterances, depend
    only on the corpus.
    """

    num_files = 1
    default_limit: int | None = None  # utterances; for a corpus without an end
    revision: str | None = None  # commit, or fingerprint of the files; None if unknown
    config: str | None = None
    license: str | None = None
    language: str | None = None

    def __init__(self, name: str, split: str, columns: dict[str, str], normalizer: str = "plain"):
        if normalizer not in NORMALIZERS:
            raise ValueError(f"unknown normalizer {normalizer!r}; expected one of {list(NORMALIZERS)}")
        self.name, self.split, self.columns, self.normalizer = name, split, columns, normalizer
        self.origin = name  # the Hub id, or the folder's or file's name; `name` is used in the rows

    @property
    def source(self) -> str:
        return f"{self.name}/{self.split}"

    def describe(self) -> dict:
        """Return a description of the corpus for JSON."""
        names = ("origin", "name", "split", "config", "revision", "columns", "normalizer", "license", "language")
        return {"kind": type(self).__name__, **{name: getattr(self, name) for name in names}}

    def lines(self, file: int) -> Iterator[tuple[str, dict | RefusedRowError]]:
        """Yield the place of each utterance and its line, in the corpus's own columns. Cheap: no audio is decoded."""
        raise NotImplementedError

    def audio(self, where: str, line: dict) -> dict:
        """Return the audio file of an utterance as `{"bytes", "path"}`.

        Raises:
            RefusedRowError: the file cannot be read.
        """
        raise NotImplementedError

    def utterance(self, where: str, line: dict | RefusedRowError) -> dict:
        """Return one of the `lines` as a row of `FEATURES`.

        Raises:
            RefusedRowError: the audio cannot be read, the transcript is missing, or a text is not UTF-8.
        """
        if isinstance(line, RefusedRowError):
            raise line
        column = self.columns["transcript"]
        if column not in line:
            raise RefusedRowError(where, "no column", f"{column!r} is missing; the columns are {sorted(line)}")
        text = NORMALIZERS[self.normalizer](line[column]) if isinstance(line[column], str) else ""
        if not text:
            value = reprlib.repr(line[column])
            raise RefusedRowError(where, "no transcript", f"{column!r} is {value}; expected the spoken text")
        audio = self.audio(where, line)
        try:
            duration = duration_of(audio)
        except ValueError as error:
            raise RefusedRowError(where, "unreadable audio", str(error)) from error
        id = self.id_of(where, line, audio)
        for value in (id, text, audio["path"] or ""):
            if value != _printable(value):
                raise RefusedRowError(where, "not UTF-8", f"{value!r}; convert the text to UTF-8")
        return {"id": id, "audio": audio, "transcript": text, "duration": np.float32(duration), "source": self.source}

    def id_of(self, where: str, line: dict, audio: dict) -> str:
        """Return the corpus's id of the utterance, or its place if there is none."""
        value = line.get(self.columns.get("id", ""))
        return where if value in (None, "") else str(value)

    def __iter__(self) -> Iterator[dict]:
        """Yield all utterances. Raises RefusedRowError at the first that cannot be used."""
        for where, line in self.all_lines():
            yield self.utterance(where, line)

    def all_lines(self) -> Iterator[tuple[str, dict | RefusedRowError]]:
        """Yield the lines of all files. Logs a warning for each file that belongs to no utterance."""
        for file in range(self.num_files):
            for where, line in self.lines(file):
                if isinstance(line, UnusedFileError):
                    logger.warning("file not used: %s", line)
                else:
                    yield where, line


def choose_columns(columns: list[str], names: dict[str, str], corpus: str) -> dict[str, str]:
    """Return the names of the `audio` column, the `transcript` column and, if there is one, the `id` column. `names`
    are those given by the user or a preset, by role; common names (`COLUMNS`) are tried for the other roles.

    Raises:
        ValueError: a given column does not exist, or no column has a common name. Lists the columns.
    """
    chosen = {}
    for role, common_names in COLUMNS.items():
        candidates = [names[role]] if role in names else common_names
        column = next((name for name in candidates if name in columns), None)
        if column is not None:
            chosen[role] = column
        elif role in names or role != "id":
            tried = " or ".join(map(repr, candidates))
            raise ValueError(
                f"{corpus} has no column {tried} for the {role}; it has {columns}. Name the right ones; a build "
                "takes --audio-column, --transcript-column and --id-column."
            )
    return chosen


def _printable(text: str) -> str:
    """Return the text with characters that UTF-8 cannot encode written as `\\udc..`."""
    return text.encode("utf-8", "backslashreplace").decode()
