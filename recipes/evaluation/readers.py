"""Read the corpora of evaluation tasks: all that `open_corpus` opens, and four with formats of their own.

| reader | reads | one line for each | added columns |
|---|---|---|---|
| `slurp` | SLURP's `test.jsonl`, sentences with a list of recordings | recording | `keywords` |
| `snips` | Audio SNIPS's `all.iob.snips.txt`, words, tags and intents | clip | `intent`, `keywords` |
| `covost` | CoVoST 2's TSV files, which have backslashes before quotes | clip | |
| `fleurs` | FLEURS in two languages, joined by sentence id | clip | `translation` |
"""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Audio, ClassLabel

from dataset_builders.corpora.corpus import Corpus, RefusedRowError
from dataset_builders.corpora.local import FileCorpus, ManifestCorpus, open_text
from dataset_builders.corpora.opening import HubCorpus, open_corpus

Line = tuple[str, dict | RefusedRowError]  # file and line, and the columns
UNKNOWN = "unknown transcript"  # replaces the transcript column if a corpus has none


@dataclass(frozen=True)
class Data:
    """The corpus of a task and its columns. The fields that have no comment are as in `open_corpus`."""

    corpus: str | None = None
    split: str = "test"
    config: str | None = None
    columns: Mapping[str, str | None] = field(default_factory=dict)  # `transcript` is None if the corpus has none
    normalizer: str | None = None
    data_root: str | None = None
    revision: str | None = None
    name: str | None = None  # name of the corpus in the rows' `source`
    give: str = "a manifest, a folder or a Hub id"  # what the user must name if `corpus` is None
    audio_folder: str | None = None  # folder of the audio relative to the manifest, if there is no `data_root`
    reader: str | None = None  # a name in `READERS`; None for corpora that `open_corpus` opens
    target_config: str | None = None  # configuration with the translations, for the reader `fleurs`


class SlurpCorpus(ManifestCorpus):
    """Reads SLURP's annotations (github.com/pswietojanski/slurp, `dataset/slurp`); each recording is an utterance."""

    def lines(self, file: int) -> Iterator[Line]:
        for where, line in super().lines(file):
            if isinstance(line, RefusedRowError):
                yield where, line
                continue
            try:
                words = [token["surface"] for token in line["tokens"]]
                keywords = [" ".join(words[index] for index in entity["span"]) for entity in line["entities"]]
                recordings = [recording["file"] for recording in line["recordings"]]
            except (KeyError, IndexError, TypeError) as error:
                yield where, RefusedRowError(where, "not a line of SLURP", repr(error))
                continue
            for recording in recordings:
                yield f"{where} ({recording})", {**line, "audio": recording, "keywords": keywords}


class SnipsCorpus(FileCorpus):
    """Reads a split of Audio SNIPS as S3PRL prepares it for SUPERB's slot filling."""

    expected = "lines `SPEAKER-snips-SPLIT-NUMBER BOS words EOS`, a tab, tags and intent"

    def lines(self, file: int) -> Iterator[Line]:
        with open_text(self.path) as text:
            for number, line in enumerate(text, 1):
                id, _, rest = line.strip().partition(" ")
                if f"-{self.split}-" in id:
                    where = f"{self.path.name} line {number}"
                    yield where, self._columns(where, id, rest)

    def _columns(self, where: str, id: str, rest: str) -> dict | RefusedRowError:
        sentence, _, tagged = rest.partition("\t")
        words, tags = sentence.split()[1:-1], tagged.split()  # BOS also has a tag; the tag of EOS is the intent
        if len(tags) != len(words) + 2:
            return RefusedRowError(where, "not a line of SNIPS", f"{len(words)} words and {len(tags)} tags")
        audio = f"{self.split}/{id}.wav"
        if not (self.data_root / audio).is_file():
            audio = f"{self.split}/{id}.mp3"
        keywords = _chunks(words, tags[1:-1])
        return {"id": id, "audio": audio, "transcript": " ".join(words), "intent": tags[-1], "keywords": keywords}


def _chunks(words: list[str], tags: list[str]) -> list[str]:
    """Return the chunks of words with the tags `B-` and the following `I-`, joined with spaces."""
    chunks: list[list[str]] = []
    for word, tag in zip(words, tags, strict=True):
        if tag.startswith("B-"):
            chunks.append([word])
        elif tag.startswith("I-") and chunks:
            chunks[-1].append(word)
    return [" ".join(chunk) for chunk in chunks]


class CovostCorpus(ManifestCorpus):
    """Reads the output of `get_covost_splits.py` of github.com/facebookresearch/covost, in which quotes are escaped as
    in `\\"`."""

    def lines(self, file: int) -> Iterator[Line]:
        for where, line in super().lines(file):
            if isinstance(line, dict):
                line = {column: re.sub(r"\\(.)", r"\1", text) for column, text in line.items()}
            yield where, line


FILE_READERS: dict[str, type[FileCorpus]] = {"slurp": SlurpCorpus, "snips": SnipsCorpus, "covost": CovostCorpus}
READERS = (*FILE_READERS, "fleurs")


class Source:
    """A corpus whose lines have the names of class labels, undecoded audio in every column, and optional translations
    by sentence id (the column `id`), as the column `translation`. Transcripts that it does not have are empty."""

    def __init__(self, corpus: Corpus, has_transcript: bool = True, translations: Mapping[str, str] | None = None):
        self.corpus, self.has_transcript, self.translations = corpus, has_transcript, translations
        self.names: dict[str, list[str]] = {}
        if isinstance(corpus, HubCorpus):
            for column, kind in (corpus.stream.features or {}).items():
                if isinstance(kind, ClassLabel):
                    self.names[column] = kind.names
                elif isinstance(kind, Audio):  # other audio, such as a spoken question, is not needed
                    corpus.stream = corpus.stream.cast_column(column, Audio(decode=False))
        if not has_transcript:
            corpus.columns = {**corpus.columns, "transcript": UNKNOWN}

    def lines(self) -> Iterator[tuple[str, dict]]:
        """Yield the lines of all files, each after its position. Raises `RefusedRowError` if a line cannot be read."""
        for where, line in self.corpus.all_lines():
            if isinstance(line, RefusedRowError):
                raise line
            yield where, self._complete(line)

    def _complete(self, line: dict) -> dict:
        named = {
            column: names[line[column]] for column, names in self.names.items() if isinstance(line.get(column), int)
        }
        if self.translations is not None:
            named["translation"] = self.translations.get(str(line.get("id")))
        if not self.has_transcript:
            named[UNKNOWN] = "?"
        return {**line, **named}

    def utterance(self, where: str, line: dict) -> dict:
        """Return the utterance as in `Corpus.utterance`. Raises `RefusedRowError` if the line cannot be used."""
        row = self.corpus.utterance(where, line)
        return row if self.has_transcript else row | {"transcript": ""}


def open_data(data: Data) -> Source:
    """Open the corpus of a task.

    If the corpus is a folder that contains a folder with the name of the configuration, as the Hub's Parquet exports
    do, that folder is opened, unless a README.md says where the configuration's splits are.

    Raises:
        ValueError: no corpus is named, it does not exist, or a column is missing.
    """
    if data.corpus is None:
        raise ValueError(f"no corpus is named; expected {data.give}.")
    has_transcript = "transcript" not in data.columns or data.columns["transcript"] is not None
    columns = {role: column or data.columns["audio"] for role, column in data.columns.items()}
    if data.reader in FILE_READERS:
        path = Path(data.corpus)
        if not path.is_file():
            raise ValueError(f"{path} is not a file; expected {data.give}.")
        settings = (data.split, columns, data.normalizer or "plain", _data_root(data))
        corpus: Corpus = FILE_READERS[data.reader](path, *settings)
        corpus.name = data.name or corpus.name
        return Source(corpus, has_transcript)
    corpus = _open(data, data.config, columns)
    if data.reader != "fleurs":
        return Source(corpus, has_transcript)
    target = _open(data, data.target_config, columns)
    return Source(corpus, has_transcript, _texts(target))


def _open(data: Data, config: str | None, columns: dict[str, str]) -> Corpus:
    path = Path(data.corpus)
    if config is not None and path.is_dir():
        inside, card = path / config, path / "README.md"
        says = card.is_file() and f"config_name: {config}\n" in card.read_text(encoding="utf-8")
        if inside.is_dir() and not says:
            path, config = inside, None
        elif not card.is_file():  # only a README.md can define configurations
            config = None
    place = str(path) if path.exists() else data.corpus
    settings = {"normalizer": data.normalizer, "data_root": _data_root(data), "revision": data.revision}
    return open_corpus(place, data.split, config=config, columns=columns, corpus_name=data.name, **settings)


def _data_root(data: Data) -> str | None:
    if data.data_root is None and data.audio_folder is not None and Path(data.corpus).is_file():
        return os.path.normpath(Path(data.corpus).parent / data.audio_folder)
    return data.data_root


def _texts(corpus: Corpus) -> dict[str, str]:
    """Return the transcripts of a corpus by sentence id, without reading its audio."""
    column, texts = corpus.columns["transcript"], {}
    for where, line in corpus.all_lines():
        if isinstance(line, dict) and "id" not in line:
            raise ValueError(f"{corpus.source} {where} has no sentence 'id'; there are {sorted(line)}.")
        if isinstance(line, dict) and line.get(column):
            texts.setdefault(str(line["id"]), " ".join(line[column].split()))
    return texts
