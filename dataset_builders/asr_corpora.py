"""Any ASR corpus as rows of one schema: `id`, `audio`, `transcript`, `duration`, `source`.

A corpus is one of

- `nano`: spoken on the fly (`nano_speech.py`);
- a manifest: a `.jsonl`, `.csv` or `.tsv` file with a line per utterance, naming an audio file and its text (NeMo's
  manifests, Common Voice's release and the original project's JSONL are such);
- an audio folder: files with a `metadata.jsonl` or `metadata.csv`, with LibriSpeech's `*.trans.txt`, or each with a
  `.txt` of its name;
- whatever `load_dataset` opens: a Hub id or a folder of Parquet files.

All are read as streams, one utterance at a time. Audio is passed on as the bytes of its file, never decoded and encoded
again. What cannot be used is a `RefusedRowError` that says where it stands and why.
"""

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from datasets import Audio, Dataset, IterableDataset, load_dataset
from datasets.download.streaming_download_manager import xopen
from huggingface_hub import HfApi

from dataset_builders import nano_speech
from dataset_builders.corpus import FEATURES, Corpus, RefusedRowError, choose_columns
from dataset_builders.file_corpora import MANIFESTS, AudioFolder, ManifestCorpus, is_audio_folder


@dataclass(frozen=True)
class Preset:
    """What is known of a well-known corpus: where it is, its columns, the rule for its transcripts, its licence."""

    corpus: str | None
    columns: dict[str, str]
    normalizer: str
    license: str | None
    language: str | None = "en"
    config: str | None = None
    audio_folder: str | None = None  # beside a manifest, where its audio is


PRESETS = {
    "librispeech": Preset(
        "openslr/librispeech_asr",
        {"audio": "audio", "transcript": "text", "id": "id"},
        "librispeech",
        "cc-by-4.0",
        config="all",
    ),
    # Its releases are folders of clips/ and TSV files: name the TSV as the corpus.
    "common_voice": Preset(
        None,
        {"transcript": "sentence", "id": "path"},
        "common_voice",
        "cc0-1.0",
        language=None,
        audio_folder="clips",
    ),
    "gigaspeech": Preset(
        "speechcolab/gigaspeech", {"audio": "audio", "transcript": "text", "id": "segment_id"}, "gigaspeech", None
    ),
}


class NanoCorpus(Corpus):
    """The nano corpus, spoken as it is read. It has no end: 6,000 utterances, unless a limit says otherwise."""

    default_limit = 6000

    def __init__(self, split: str, seed: int = 0):
        super().__init__("nano", split, columns={})
        self.seed, self.license, self.language = seed, "apache-2.0", "en"
        if split not in nano_speech.SPLITS:
            raise ValueError(f"the nano corpus has no split {split!r}; expected one of {nano_speech.SPLITS}.")

    def lines(self, file: int) -> Iterator[tuple[str, dict | RefusedRowError]]:
        for index in itertools.count():
            yield nano_speech.row_id(self.seed, self.split, index), {"index": index}

    def utterance(self, where: str, line: dict | RefusedRowError) -> dict:
        row = nano_speech.row(self.seed, self.split, line["index"])
        return {key: row[key] for key in FEATURES if key in row} | {"source": self.source}


class HubCorpus(Corpus):
    """What `load_dataset` opens, as a stream: a Hub id, or a folder of data files."""

    def __init__(
        self,
        corpus: str,
        split: str,
        columns: dict[str, str],
        normalizer: str,
        config: str | None = None,
        revision: str | None = None,
    ):
        self.folder = Path(os.path.abspath(corpus)) if Path(corpus).is_dir() else None
        if self.folder is None:
            revision = self.revision = HfApi().dataset_info(corpus, revision=revision).sha
        stream: IterableDataset = load_dataset(corpus, config, split=split, streaming=True, revision=revision)
        name = self.folder.name if self.folder else corpus
        super().__init__(name, split, choose_columns(stream.column_names, columns, f"{corpus} ({split})"), normalizer)
        self.stream = stream.cast_column(self.columns["audio"], Audio(decode=False))
        self.num_files, self.config = self.stream.num_shards, config

    def lines(self, file: int) -> Iterator[tuple[str, dict | RefusedRowError]]:
        part = f" of file {file}" if self.num_files > 1 else ""
        rows = self.stream.shard(num_shards=self.num_files, index=file) if self.num_files > 1 else self.stream
        for number, row in enumerate(rows):
            yield f"row {number}{part}", row

    def audio(self, where: str, line: dict) -> dict:
        audio = line[self.columns["audio"]]
        path = audio.get("path") if audio else None
        if not audio or (audio.get("bytes") is None and not path):
            raise RefusedRowError(where, "no audio", f"{self.columns['audio']!r} is empty")
        if audio.get("bytes") is not None:
            return {"bytes": audio["bytes"], "path": os.path.basename(path) if path else None}
        if not self._is_of_the_corpus(path):
            raise RefusedRowError(where, "outside the data root", f"{path} is not a file of {self.name}")
        try:
            with xopen(os.path.join(self.folder or "", path), "rb") as file:
                return {"bytes": file.read(), "path": os.path.basename(path)}
        except (OSError, ValueError) as error:
            raise RefusedRowError(where, "unreadable audio", str(error)) from error

    def _is_of_the_corpus(self, path: str) -> bool:
        """A corpus may name its own files alone: what it names is read here, and published."""
        if self.folder is not None:
            return Path(os.path.normpath(self.folder / path)).is_relative_to(self.folder)
        archive = path.rpartition("::")[2]
        return archive.startswith((f"hf://datasets/{self.name}@", f"hf://datasets/{self.name}/"))


def open_corpus(
    corpus: str | Path,
    split: str = "train",
    *,
    config: str | None = None,
    preset: str | None = None,
    columns: dict[str, str] | None = None,
    normalizer: str | None = None,
    data_root: str | Path | None = None,
    revision: str | None = None,
) -> Corpus:
    """Open one split of an ASR corpus, as a stream.

    Args:
        corpus: `nano`, a manifest, an audio folder, a folder or Hub id that `load_dataset` opens, or a preset's name.
        split: its split, such as `train`. Of manifests and audio folders, which have none, it is only the name.
        config: its configuration, if it has several.
        preset: whose columns and transcript rule are used (`PRESETS`); by default that of its Hub id, or none.
        columns: names of its `audio`, `transcript` and `id` columns, where neither preset nor custom has them.
        normalizer: the rule for its transcripts (`transcripts.py`); the preset's or `plain` by default.
        data_root: folder that a manifest's audio must be in; the manifest's own by default.
        revision: branch, tag or commit on the Hub.

    Raises:
        ValueError: no such corpus, preset, normalizer or column; names those there are.
    """
    name = str(corpus)
    if name == "nano":
        return NanoCorpus(split)
    known = _preset(preset, name)
    opened = _open(name, split, known, config, columns or {}, normalizer or known.normalizer, data_root, revision)
    opened.license, opened.language = known.license, known.language
    return opened


def _open(name, split, known: Preset, config, columns, normalizer, data_root, revision) -> Corpus:
    path, columns = Path(name), {**known.columns, **columns}
    if path.is_file():
        if path.suffix not in MANIFESTS:
            raise ValueError(f"{path} is no manifest; expected one of {', '.join(MANIFESTS)}.")
        if data_root is None and known.audio_folder:
            data_root = path.parent / known.audio_folder
        return ManifestCorpus(path, split, columns, normalizer, data_root)
    if path.is_dir():
        if is_audio_folder(path):
            return AudioFolder(path, split, columns, normalizer, data_root)
    elif path.suffix in MANIFESTS or path.is_absolute() or name.startswith("."):
        raise ValueError(f"{name} does not exist; expected a manifest, a folder or the id of a data set on the Hub.")
    hub_id = known.corpus if name in PRESETS and known.corpus else name
    return HubCorpus(hub_id, split, columns, normalizer, config or known.config, revision)


def load_corpus(corpus: str | Path, split: str, limit: int | None = None, **settings) -> Dataset:
    """The first `limit` utterances of a split, in memory: for evaluation. `settings` as in `open_corpus`.

    Returns:
        A dataset with the columns `id` (string), `audio` (`{"bytes", "path"}`), `transcript` (string), `duration`
        (float32, seconds) and `source` (string, corpus and split).

    Raises:
        ValueError: as in `open_corpus`, or an utterance that cannot be used.
    """
    opened = open_corpus(corpus, split, **settings)
    rows = list(itertools.islice(opened, opened.default_limit if limit is None else limit))
    dataset = Dataset.from_list(rows, features=FEATURES)
    return dataset.cast_column("audio", Audio(16_000, decode=False))


def _preset(preset: str | None, corpus: str) -> Preset:
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; there are {list(PRESETS)}")
    by_id = {known.corpus: name for name, known in PRESETS.items() if known.corpus}
    name = preset or by_id.get(corpus) or (corpus if corpus in PRESETS else None)
    if name == corpus and PRESETS[name].corpus is None:
        raise ValueError(f"{name} is not on the Hub: name its TSV file, or a mirror's id, and --preset {name}.")
    return PRESETS[name] if name else Preset(None, {}, "plain", None, None)
