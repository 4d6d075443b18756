"""A corpus as a stream of utterances, with errors that name the line of a bad utterance."""

import io
import logging
import re
import reprlib
from collections.abc import Iterator

import numpy as np
from datasets import Features, Value

from dataset_builders.corpora.transcripts import NORMALIZERS
from processing_lsm import load_audio

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
_UNKNOWN_LENGTH = 2**63 - 1  # frames that libsndfile reports for FLAC that was written to a pipe
_STREAMED = 0x7FFF0000  # a WAV that was written to a pipe states at least this many bytes in its header
# In libsndfile's log: the bytes of samples that a WAV, AIFF or AU header states, and those that the file has.
_PROMISE = re.compile(r"(?:data|SSND|Data Size)\s*: (\d+) \(should be (\d+)\)")
_LOST = 0.1  # seconds that may be missing from an audio file: too short for a word


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
            given = reprlib.repr(line[column])
            raise RefusedRowError(where, "no transcript", f"{column!r} is {given}; expected the spoken text")
        audio = self.audio(where, line)
        try:
            duration = duration_of(audio)
        except ValueError as error:
            raise RefusedRowError(where, "unreadable audio", str(error)) from error
        id = self.id_of(where, line, audio)
        for value in (id, text, audio["path"] or ""):
            if value != _printable(value):
                raise RefusedRowError(where, "not UTF-8", f"{value!r}; convert the text to UTF-8")
        return {
            "id": id,
            "audio": audio,
            "transcript": text,
            "duration": np.float32(duration),
            "source": self.source,
        }

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


def choose_columns(there: list[str], told: dict[str, str], corpus: str) -> dict[str, str]:
    """Return the names of the `audio` column, the `transcript` column and, if there is one, the `id` column.

    Args:
        there: names of the corpus's columns.
        told: names given by the user or a preset, by role; common names (`COLUMNS`) are tried for the other roles.
        corpus: name of the corpus, for errors.

    Raises:
        ValueError: a given column does not exist, or no column has a common name. Lists the columns.
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
                f"{corpus} has no column {names} for the {role}; it has {there}. Name the right ones; a build "
                "takes --audio-column, --transcript-column and --id-column."
            )
    return chosen


def duration_of(audio: dict) -> float:
    """Return the duration in seconds of an audio file, given as `{"bytes", "path"}`, from its header.

    Raises:
        ValueError: the file cannot be read or has no samples, its header states no length, or the file is shorter.
    """
    import soundfile

    source = io.BytesIO(audio["bytes"]) if audio.get("bytes") is not None else audio["path"]
    try:
        info = soundfile.info(source)
    except (soundfile.LibsndfileError, OSError, TypeError) as error:
        reason = getattr(error, "error_string", error)
        raise ValueError(f"cannot read {audio.get('path') or 'the given bytes'} as audio: {reason}") from error
    if info.frames == 0:
        raise ValueError(f"{audio.get('path') or 'the audio'} has no samples; expected a clip of speech.")
    if info.frames == _UNKNOWN_LENGTH:
        raise ValueError(f"{audio.get('path') or 'the audio'} has no length in its header; convert the file again.")
    seconds = info.frames / info.samplerate
    if promise := _PROMISE.search(info.extra_info):
        said, there = map(int, promise.groups())
        if said < _STREAMED:
            _check_whole(audio, seconds, seconds * said / max(there, 1))
    return seconds


def decode(audio: dict, rate: int = 16_000) -> np.ndarray:
    """Return the waveform `(samples,)` float32 at `rate` Hz of an audio file, given as `{"bytes", "path"}`.

    Raises:
        ValueError: as in `load_audio`, or the file is shorter than its header states.
    """
    waveform = load_audio(audio, target_rate=rate)
    _check_whole(audio, len(waveform) / rate, duration_of(audio))
    return waveform


def _check_whole(audio: dict, seconds: float, promised: float) -> None:
    if seconds < promised - _LOST:
        name = audio.get("path") or "the audio"
        raise ValueError(f"{name} is cut off: it has {seconds:.2f} of the {promised:.2f} s that its header states.")


def _printable(text: str) -> str:
    """Return the text with characters that UTF-8 cannot encode written as `\\udc..`."""
    return text.encode("utf-8", "backslashreplace").decode()
