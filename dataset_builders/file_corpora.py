"""Corpora whose audio lies in files of their own: manifests and audio folders."""

import csv
import hashlib
import io
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path

from dataset_builders.corpus import Corpus, RefusedRowError, choose_columns

MANIFESTS = (".jsonl", ".json", ".csv", ".tsv")
AUDIO_FILES = (".flac", ".wav", ".mp3", ".ogg", ".opus")


class FileCorpus(Corpus):
    """Utterances whose audio lies in files of their own, under `data_root`."""

    def __init__(self, path: Path, split: str, columns: dict[str, str], normalizer: str, data_root: str | Path | None):
        self.path = path
        self.data_root = Path(os.path.abspath(data_root or (path if path.is_dir() else path.parent)))
        super().__init__(path.stem if path.is_file() else path.resolve().name, split, columns, normalizer)
        first = next((line for _, line in self.lines(0) if isinstance(line, dict)), None)
        if first is None:
            raise ValueError(f"{path} has no utterance; expected a line, or an audio file, for each.")
        self.columns = choose_columns(list(first), columns, str(path), optional=("id",))

    def audio(self, where: str, line: dict) -> dict:
        column = self.columns["audio"]
        given = line.get(column)
        if not isinstance(given, str) or not given:
            raise RefusedRowError(where, "no audio", f"{column!r} is {given!r}; expected the path of an audio file")
        if line.get("offset") not in (None, "", 0, "0", 0.0):
            raise RefusedRowError(
                where, "part of a file", f"offset is {line['offset']}; cut the audio into utterances first"
            )
        try:
            return {"bytes": self._resolve(where, given).read_bytes(), "path": os.path.basename(given)}
        except OSError as error:
            raise RefusedRowError(where, "unreadable audio", str(error)) from error

    def _resolve(self, where: str, given: str) -> Path:
        """The file, which must lie under the data root. Links are followed: whoever made them meant it."""
        file = Path(os.path.normpath(self.data_root / given))
        if not file.is_relative_to(self.data_root):
            raise RefusedRowError(
                where, "outside the data root", f"{given} is not under {self.data_root}; see --data-root"
            )
        return file

    def id_of(self, where: str, line: dict, audio: dict) -> str:
        given = line.get(self.columns.get("id", "")) or line[self.columns["audio"]]
        file = os.path.relpath(os.path.normpath(self.data_root / str(given)), self.data_root)
        return os.path.splitext(file)[0] if file.lower().endswith(AUDIO_FILES) else str(given)


class ManifestCorpus(FileCorpus):
    """A `.jsonl`, `.csv` or `.tsv` file with a line per utterance; one that cannot be read is refused by its number."""

    def __init__(self, path: Path, *settings):
        super().__init__(path, *settings)
        with open(path, "rb") as file:
            self.revision = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"

    def lines(self, file: int) -> Iterator[tuple[str, dict | RefusedRowError]]:
        with open(self.path, encoding="utf-8-sig", newline="") as text:
            yield from _table_lines(text, self.path.suffix, self.path.name)


class AudioFolder(FileCorpus):
    """A folder of audio files with their texts beside them, in any of the three customs."""

    def lines(self, file: int) -> Iterator[tuple[str, dict | RefusedRowError]]:
        tables = sorted(self.path.rglob("metadata.jsonl")) or sorted(self.path.rglob("metadata.csv"))
        if tables:
            return itertools.chain.from_iterable(map(self._metadata_lines, tables))
        transcripts = sorted(self.path.rglob("*.trans.txt"))
        if transcripts:
            return itertools.chain.from_iterable(map(self._chapter_lines, transcripts))
        return self._sidecar_lines()

    def _metadata_lines(self, table: Path) -> Iterator[tuple[str, dict | RefusedRowError]]:
        folder = table.parent.relative_to(self.path)
        with open(table, encoding="utf-8-sig", newline="") as text:
            for where, line in _table_lines(text, table.suffix, str(folder / table.name)):
                if isinstance(line, dict) and isinstance(line.get("file_name"), str):
                    line["file_name"] = str(folder / line["file_name"])
                yield where, line

    def _chapter_lines(self, transcripts: Path) -> Iterator[tuple[str, dict | RefusedRowError]]:
        """LibriSpeech's release: `84-121123.trans.txt` with lines `84-121123-0000 GO DO YOU HEAR`, beside the FLACs."""
        folder = transcripts.parent.relative_to(self.path)
        for number, line in enumerate(transcripts.read_text(encoding="utf-8").splitlines(), 1):
            id, _, text = line.partition(" ")
            yield (
                f"{transcripts.name} line {number}",
                {"id": id, "file_name": str(folder / f"{id}.flac"), "transcript": text},
            )

    def _sidecar_lines(self) -> Iterator[tuple[str, dict | RefusedRowError]]:
        for audio in sorted(file for file in self.path.rglob("*") if file.suffix.lower() in AUDIO_FILES):
            name, text = str(audio.relative_to(self.path)), audio.with_suffix(".txt")
            if text.is_file():
                yield name, {"file_name": name, "transcript": text.read_text(encoding="utf-8")}
            else:
                yield name, RefusedRowError(name, "no transcript", f"there is no {text.name} beside it")


def is_audio_folder(folder: Path) -> bool:
    names = ("metadata.jsonl", "metadata.csv")
    return any(
        file.name in names or file.name.endswith(".trans.txt") or file.suffix.lower() in AUDIO_FILES
        for file in folder.rglob("*")
    )


def _table_lines(text: io.TextIOBase, suffix: str, name: str) -> Iterator[tuple[str, dict | RefusedRowError]]:
    if suffix in (".csv", ".tsv"):
        quoting = csv.QUOTE_NONE if suffix == ".tsv" else csv.QUOTE_MINIMAL  # Common Voice's TSVs quote nothing
        table = csv.DictReader(text, delimiter="\t" if suffix == ".tsv" else ",", quoting=quoting)
        for line in table:
            where = f"{name} line {table.line_num}"
            broken = None in line or None in line.values()
            yield where, RefusedRowError(where, "not a table row", "too few or too many cells") if broken else line
        return
    for number, line in enumerate(text, 1):
        if line.strip():
            where = f"{name} line {number}"
            yield where, _json_line(where, line)


def _json_line(where: str, line: str) -> dict | RefusedRowError:
    try:
        row = json.loads(line)
    except ValueError as error:
        return RefusedRowError(where, "not JSON", str(error))
    return row if isinstance(row, dict) else RefusedRowError(where, "not JSON", "expected an object in braces")
