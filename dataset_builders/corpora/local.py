"""Corpora of local audio files: manifests and audio folders."""

import codecs
import csv
import hashlib
import io
import itertools
import json
import os
import re
import reprlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from dataset_builders.corpora.corpus import Corpus, RefusedRowError, UnusedFileError, choose_columns
from dataset_builders.files import middle

MANIFESTS = (".jsonl", ".json", ".csv", ".tsv")
AUDIO_FILES = (".flac", ".wav", ".mp3", ".ogg", ".oga", ".opus", ".aif", ".aiff", ".au", ".caf", ".sph", ".w64")
OTHER_AUDIO = (".m4a", ".aac", ".mp4", ".webm", ".wma", ".amr", ".3gp", ".mka")  # soundfile cannot read these
DOCUMENTS = ("readme", "license", "licence", "notice")  # text files that are not transcripts
FIRST_LINES = 100  # lines that are read to find the columns
CUT = "cut the audio into utterances first"


def open_text(path: Path, newline: str | None = None) -> io.TextIOWrapper:
    """Open a text file in UTF-8, or in UTF-16 with a byte order mark. Invalid bytes are kept, so that only the lines
    with them are refused."""
    with open(path, "rb") as file:
        utf16 = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    return open(path, encoding="utf-16" if utf16 else "utf-8-sig", errors="surrogateescape", newline=newline)


class FileCorpus(Corpus):
    """Utterances with one audio file each, under `data_root`."""

    expected: str  # the format, for errors

    def __init__(
        self,
        path: Path,
        split: str,
        columns: dict[str, str],
        normalizer: str,
        data_root: str | Path | None,
        name: str | None = None,
    ):
        self.path = path
        self.data_root = Path(os.path.abspath(data_root or (path if path.is_dir() else path.parent)))
        name = name or (path.stem if path.is_file() else path.resolve().name)
        super().__init__(name, split, columns, normalizer)
        lines = [line for _, line in itertools.islice(self.lines(0), FIRST_LINES)]
        names = list(dict.fromkeys(column for line in lines if isinstance(line, dict) for column in line))
        if not names:
            trouble = lines[0] if lines else "it is empty"
            raise ValueError(f"{path} has no readable utterance ({trouble}); expected {self.expected}.")
        self.columns = choose_columns(names, columns, str(path))
        languages = {str(line.get("language")) for line in lines if isinstance(line, dict)}
        if len(languages) == 1 and re.fullmatch("[a-z]{2,3}", language := languages.pop()):
            self.language = language

    @cached_property
    def revision(self) -> str:
        """A hash of all lines, and of the size and the middle of each audio file that they name."""
        digest = hashlib.sha256()
        for where, line in self.lines(0):
            digest.update(repr((where, line if isinstance(line, dict) else str(line))).encode())
            path = line.get(self.columns["audio"]) if isinstance(line, dict) else None
            if isinstance(path, str) and os.path.isfile(self.data_root / path):
                digest.update(middle(self.data_root / path))
        return f"sha256:{digest.hexdigest()[:16]}"

    def audio(self, where: str, line: dict) -> dict:
        column = self.columns["audio"]
        path = line.get(column)
        if not isinstance(path, str) or not path:
            details = f"{column!r} is {reprlib.repr(path)}; expected the path of an audio file"
            raise RefusedRowError(where, "no audio", details)
        offset = line.get("offset")
        if offset not in (None, "") and _number(offset) != 0:
            raise RefusedRowError(where, "part of a file", f"offset is {reprlib.repr(offset)}; {CUT}")
        file = self._resolve(where, path)
        try:
            return {"bytes": file.read_bytes(), "path": file.name}
        except (OSError, ValueError) as error:  # ValueError: an invalid name, such as one with a null byte
            raise RefusedRowError(where, "unreadable audio", str(error)) from error

    def utterance(self, where: str, line: dict | RefusedRowError) -> dict:
        """As in `Corpus`; also refuses a line with an `offset` whose `duration` is shorter than its file."""
        row = super().utterance(where, line)
        duration = _number(line.get("duration"))
        if "offset" in line and duration is not None and duration < row["duration"] - 0.5:
            details = f"duration is {duration} s, but the file has {row['duration']:.2f} s; {CUT}"
            raise RefusedRowError(where, "part of a file", details)
        return row

    def _resolve(self, where: str, path: str) -> Path:
        """Return the whole path of a file, which must be under the data root. Symbolic links may lead out of it."""
        file = Path(os.path.normpath(self.data_root / path))
        if not file.is_relative_to(self.data_root):
            raise RefusedRowError(
                where,
                "outside the data root",
                f"{path} is not under {self.data_root}; put the manifest into a folder above its audio (a build also "
                "takes another --data-root)",
            )
        return file

    def id_of(self, where: str, line: dict, audio: dict) -> str:
        id = line.get(self.columns.get("id", ""))
        if id in (None, ""):
            id = line[self.columns["audio"]]
        file = os.path.relpath(os.path.normpath(self.data_root / str(id)), self.data_root)
        return os.path.splitext(file)[0] if file.lower().endswith(AUDIO_FILES) else str(id)


class ManifestCorpus(FileCorpus):
    """A `.jsonl`, `.csv` or `.tsv` file with a line per utterance. Lines that cannot be read are refused."""

    expected = "a line of JSON, or a row below a header, for each utterance"

    def lines(self, file: int) -> Iterator[tuple[str, dict | RefusedRowError]]:
        with open_text(self.path, newline="") as text:
            yield from _table_lines(text, self.path.suffix, self.path.name)


class AudioFolder(FileCorpus):
    """A folder of audio files with their transcripts, in one of three formats: metadata.jsonl or metadata.csv,
    *.trans.txt, or a .txt file for each audio file.

    If the folder has a subfolder with the name of the split, only that is read. Clips that no line names, and texts
    without a clip, come last, as `UnusedFileError`s.
    """

    expected = (
        "metadata.jsonl, metadata.csv, *.trans.txt, a .txt beside each audio file, or a manifest with the name of the "
        "split, such as train.jsonl; if it has another name, pass the path of the manifest"
    )

    def lines(self, file: int) -> Iterator[tuple[str, dict | RefusedRowError]]:
        tables, read_lines = self._find("metadata.jsonl") or self._find("metadata.csv"), self._metadata_lines
        if not tables:
            tables, read_lines = self._find("*.trans.txt"), self._chapter_lines
        if not tables:
            yield from self._sidecar_lines()
            return
        named = set()
        for where, line in itertools.chain.from_iterable(map(read_lines, tables)):
            texts = line.values() if isinstance(line, dict) else ()
            named.update(os.path.normpath(self.data_root / text) for text in texts if _is_audio(text))
            yield where, line
        for file in filter(_is_audio, self._find("*")):
            if os.path.abspath(file) not in named:
                name = str(file.relative_to(self.path))
                yield name, UnusedFileError(name, "not listed", f"no line of {tables[0].name} or similar names it")

    def _find(self, pattern: str) -> list[Path]:
        part = self.path / self.split
        return sorted((part if part.is_dir() else self.path).rglob(pattern))

    def _metadata_lines(self, table: Path) -> Iterator[tuple[str, dict | RefusedRowError]]:
        folder = table.parent.relative_to(self.path)
        with open_text(table, newline="") as text:
            for where, line in _table_lines(text, table.suffix, str(folder / table.name)):
                if isinstance(line, dict) and isinstance(line.get("file_name"), str) and line["file_name"]:
                    line["file_name"] = str(folder / line["file_name"])
                yield where, line

    def _chapter_lines(self, transcripts: Path) -> Iterator[tuple[str, dict | RefusedRowError]]:
        """Read LibriSpeech's format: `84-121123.trans.txt` beside the FLACs, with lines `84-121123-0000 GO DO YOU`."""
        folder = transcripts.parent.relative_to(self.path)
        with open_text(transcripts) as file:
            lines = file.read().split("\n")
        for number, line in enumerate(lines, 1):
            id, _, text = line.partition(" ")
            if line.strip():  # the columns have their names in LibriSpeech on the Hub
                where = f"{transcripts.name} line {number}"
                yield where, {"id": id, "audio": str(folder / f"{id}.flac"), "text": text}

    def _sidecar_lines(self) -> Iterator[tuple[str, dict | RefusedRowError]]:
        files = self._find("*")
        clips = {file.with_suffix("") for file in filter(_is_audio, files)}
        for file in filter(_is_audio, files):
            name, text = str(file.relative_to(self.path)), file.with_suffix(".txt")
            if file.suffix.lower() in OTHER_AUDIO:
                details = f"{file.suffix} is not supported; convert it to one of {', '.join(AUDIO_FILES)}"
                yield name, RefusedRowError(name, "unreadable audio", details)
            elif text.is_file():
                with open_text(text) as opened:
                    yield name, {"file_name": name, "transcript": opened.read()}
            else:
                yield name, RefusedRowError(name, "no transcript", f"there is no {text.name} beside it")
        for file in files:
            of_clip = file.with_suffix("") in clips or file.stem.lower() in DOCUMENTS
            if file.suffix.lower() == ".txt" and not of_clip:
                name = str(file.relative_to(self.path))
                yield name, UnusedFileError(name, "no audio", "there is no audio file with its name beside it")


def _is_audio(path: object) -> bool:
    return isinstance(path, (str, Path)) and str(path).lower().endswith((*AUDIO_FILES, *OTHER_AUDIO))


def is_audio_folder(folder: Path) -> bool:
    names = ("metadata.jsonl", "metadata.csv")
    return any(file.name in names or file.name.endswith(".trans.txt") or _is_audio(file) for file in folder.rglob("*"))


def _table_lines(text: io.TextIOBase, suffix: str, name: str) -> Iterator[tuple[str, dict | RefusedRowError]]:
    if suffix in (".csv", ".tsv"):
        quoting = csv.QUOTE_NONE if suffix == ".tsv" else csv.QUOTE_MINIMAL  # Common Voice's TSVs quote nothing
        table = csv.DictReader(text, delimiter="\t" if suffix == ".tsv" else ",", quoting=quoting)
        yield from _table_rows(table, name)
        return
    for number, line in enumerate(text, 1):
        if line.strip():
            where = f"{name} line {number}"
            yield where, _json_line(where, line)


def _table_rows(table: csv.DictReader, name: str) -> Iterator[tuple[str, dict | RefusedRowError]]:
    while True:
        trouble = None
        try:
            line = next(table)
        except StopIteration:
            return
        except csv.Error as error:  # such as a quote that is never closed
            line, trouble = {}, str(error)
        if None in line or None in line.values():
            trouble = f"too few or too many cells; expected {len(table.fieldnames)}"
        where = f"{name} line {table.reader.line_num}"
        yield where, RefusedRowError(where, "not a table row", trouble) if trouble else line


def _number(value: object) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _json_line(where: str, line: str) -> dict | RefusedRowError:
    try:
        row = json.loads(line.rstrip())
    except json.JSONDecodeError as error:
        return RefusedRowError(where, "not JSON", f"{error.msg}, column {error.colno}")
    except (ValueError, RecursionError) as error:  # too many digits or too deep lists for Python
        return RefusedRowError(where, "not JSON", str(error))
    return row if isinstance(row, dict) else RefusedRowError(where, "not JSON", "expected an object in braces")
