"""Open any ASR corpus as rows of one schema: `id`, `audio`, `transcript`, `duration`, `source`.

A corpus is one of

- the name of a preset (`PRESETS`), some of which are synthesised on the fly;
- a manifest: a `.jsonl`, `.csv` or `.tsv` file with an audio file and its text in each line (for example of NeMo, of
  Common Voice's releases or of the original project), or a folder with such a file for each split, such as
  `train.jsonl` and `test.jsonl`;
- an audio folder: audio files with a `metadata.jsonl` or `metadata.csv`, with LibriSpeech's `*.trans.txt`, or each with
  a `.txt` of the same name;
- a Hub id or a folder of Parquet files, which `load_dataset` opens.

Corpora are read as streams, one utterance at a time. Audio stays as the bytes of its file, without encoding it again.
An utterance that cannot be used gives a `RefusedRowError` that says where it is and why.
"""

import itertools
import os
import pkgutil
import reprlib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from datasets import Audio, Dataset, IterableDataset, load_dataset
from datasets.download.streaming_download_manager import xopen
from huggingface_hub import HfApi

from dataset_builders.corpora.corpus import FEATURES, Corpus, RefusedRowError, choose_columns
from dataset_builders.corpora.local import MANIFESTS, AudioFolder, ManifestCorpus, is_audio_folder
from dataset_builders.files import fingerprint

FILE_TYPES = ("string", "large_string", "binary", "large_binary")  # types of columns with paths or file contents


@dataclass(frozen=True)
class Preset:
    """Settings of a well-known corpus: Hub id, columns, rule for its transcripts, licence and more."""

    corpus: str | None
    columns: dict[str, str]
    normalizer: str
    license: str | None
    language: str | None = "en"
    config: str | None = None
    audio_folder: str | None = None  # folder of the audio, beside the manifest
    speaker: str | None = None  # `module:Class` of a corpus that is synthesised, called with the split


PRESETS = {
    "librispeech": Preset(
        "openslr/librispeech_asr",
        {"audio": "audio", "transcript": "text", "id": "id"},
        "librispeech",
        "cc-by-4.0",
        config="all",
    ),
    # A release has TSV files and a folder clips/. The path of a TSV file is passed as the corpus.
    "common_voice": Preset(
        None, {"transcript": "sentence", "id": "path"}, "common_voice", "cc0-1.0", language=None, audio_folder="clips"
    ),
    "gigaspeech": Preset(
        "speechcolab/gigaspeech", {"audio": "audio", "transcript": "text", "id": "segment_id"}, "gigaspeech", None
    ),
    "nano": Preset(None, {}, "plain", "apache-2.0", speaker="dataset_builders.nano.corpus:NanoCorpus"),
}
OF_FILES = [name for name, preset in PRESETS.items() if preset.speaker is None]  # not synthesised


class HubCorpus(Corpus):
    """A Hub id or a folder of data files, which `load_dataset` opens as a stream."""

    def __init__(
        self,
        corpus: str,
        split: str,
        columns: dict[str, str],
        normalizer: str,
        config: str | None = None,
        revision: str | None = None,
        data_root: str | Path | None = None,
    ):
        self.folder = Path(os.path.abspath(data_root or corpus)) if Path(corpus).is_dir() else None
        if self.folder is None:
            revision = _commit(corpus, revision)
        self._commit = revision
        stream: IterableDataset = load_dataset(corpus, config, split=split, streaming=True, revision=revision)
        name = Path(corpus).resolve().name if self.folder else corpus
        super().__init__(name, split, _columns_of(stream, columns, f"{corpus} ({split})"), normalizer)
        self.stream = stream.cast_column(self.columns["audio"], Audio(decode=False))
        self.num_files, self.config = self.stream.num_shards, config

    @cached_property
    def revision(self) -> str | None:
        return self._commit if self.folder is None else fingerprint(self.folder)

    def lines(self, file: int) -> Iterator[tuple[str, dict | RefusedRowError]]:
        part = f" of file {file}" if self.num_files > 1 else ""
        rows = self.stream.shard(num_shards=self.num_files, index=file) if self.num_files > 1 else self.stream
        for number, row in enumerate(rows):
            yield f"row {number}{part}", row

    def audio(self, where: str, line: dict) -> dict:
        column = self.columns["audio"]
        audio = line.get(column)
        content, path = (audio.get("bytes"), audio.get("path")) if isinstance(audio, dict) else (None, None)
        name = os.path.basename(path) if isinstance(path, str) else None
        if isinstance(content, bytes):
            return {"bytes": content, "path": name}
        if content is not None or not name:
            raise RefusedRowError(where, "no audio", f"{column!r} is {reprlib.repr(audio)}; expected an audio file")
        location = self._resolve(where, path)
        try:
            with xopen(location, "rb") as file:
                return {"bytes": file.read(), "path": name}
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            if self.folder is None and isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                raise  # a network error: the build can be continued later
            raise RefusedRowError(where, "unreadable audio", str(error)) from error

    def _resolve(self, where: str, path: str) -> str:
        """Return a file of the corpus, perhaps in an archive (`zip://a.wav::FILE`), as `xopen` takes it. Refuses files
        outside the corpus, because their content would be read and published."""
        *inside, file = path.split("::")
        if self.folder is not None:
            file = os.path.normpath(self.folder / file)
            is_inside = Path(file).is_relative_to(self.folder)
        else:
            is_inside = file.startswith((f"hf://datasets/{self.name}@", f"hf://datasets/{self.name}/"))
            is_inside = is_inside and ".." not in file.split("/")
        if not is_inside or not all(hop.startswith("zip://") for hop in inside):
            root = (
                f"under {self.folder}; put it there (a build also takes another --data-root)"
                if self.folder
                else f"a file of {self.name}"
            )
            raise RefusedRowError(where, "outside the data root", f"{path} is not {root}")
        return "::".join([*inside, file])


def _commit(corpus: str, revision: str | None) -> str:
    """Return the commit of a dataset on the Hub. Raises ValueError if it does not exist or the Hub is not reachable."""
    try:
        return HfApi().dataset_info(corpus, revision=revision).sha
    except (OSError, ValueError) as error:
        raise ValueError(f"{corpus} is not a local path, and cannot be opened on the Hub: {error}") from error


def _columns_of(stream: IterableDataset, columns: dict[str, str], corpus: str) -> dict[str, str]:
    """As `choose_columns`. Also raises ValueError if the audio column does not hold files or their paths."""
    if stream.features is None:
        raise ValueError(f"{corpus}: the first rows cannot be read; expected Parquet, JSON Lines, CSV or audio files.")
    chosen = choose_columns(stream.column_names, columns, corpus)
    kind = stream.features[chosen["audio"]]
    files = {"bytes", "path"} & set(kind) if isinstance(kind, dict) else getattr(kind, "dtype", None) in FILE_TYPES
    if not files and not isinstance(kind, Audio):
        raise ValueError(f"{corpus}: column {chosen['audio']!r} holds {kind}; expected audio files, or their paths.")
    return chosen


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
    corpus_name: str | None = None,
) -> Corpus:
    """Open one split of an ASR corpus, as a stream.

    Args:
        corpus: a manifest, a folder of manifests, an audio folder, a folder or Hub id that `load_dataset` opens, or a
            preset's name.
        split: split of the corpus, such as `train`. In an audio folder, this is a subfolder, if there is one of this
            name. Other audio folders and manifests have one split, which gets this name.
        config: configuration of the corpus, if it has several.
        preset: preset whose columns and transcript rule are used (`PRESETS`); by default the one with this Hub id.
        columns: names of the `audio`, `transcript` and `id` columns that differ from the preset and the common names.
        normalizer: rule for the transcripts (`transcripts.py`); by default the preset's, or `plain`.
        data_root: folder that relative paths start from and audio must be in; by default the manifest's, or the corpus.
        revision: branch, tag or commit on the Hub.
        corpus_name: name of the corpus in `source` and in ids; by default its Hub id, folder or file name.

    Raises:
        ValueError: the corpus, preset, normalizer or column does not exist. Lists the existing ones.
    """
    name = str(corpus)
    used = _preset(preset, name)
    if used.speaker is not None:
        opened: Corpus = pkgutil.resolve_name(used.speaker)(split)
    else:
        opened = _open(name, split, used, config, columns or {}, normalizer or used.normalizer, data_root, revision)
    opened.license, opened.language = used.license, used.language or opened.language
    opened.name = corpus_name or opened.origin
    return opened


def _open(name, split, preset: Preset, config, columns, normalizer, data_root, revision) -> Corpus:
    path, columns = Path(name), {**preset.columns, **columns}
    manifests = [file for file in (path / (split + suffix) for suffix in MANIFESTS) if file.is_file()]
    folder_name = path.resolve().name if manifests else None
    path = manifests[0] if manifests else path
    if path.is_file():
        if path.suffix not in MANIFESTS:
            raise ValueError(
                f"{path} is not a manifest; expected {', '.join(MANIFESTS)}, or a folder of Parquet or audio files."
            )
        if data_root is None and preset.audio_folder:
            data_root = path.parent / preset.audio_folder
        return ManifestCorpus(path, split, columns, normalizer, data_root, folder_name)
    if path.is_dir() and is_audio_folder(path):
        return AudioFolder(path, split, columns, normalizer, data_root)
    if path.is_dir():
        return HubCorpus(name, split, columns, normalizer, config, data_root=data_root)
    if path.suffix in MANIFESTS or path.is_absolute() or name.startswith("."):
        raise ValueError(f"{name} does not exist; expected a manifest, a folder or the id of a dataset on the Hub.")
    if data_root is not None:
        raise ValueError(f"{name} is on the Hub, so {data_root=} has no effect; leave it out.")
    hub_id = PRESETS[name].corpus if name in PRESETS else name
    config = config or (preset.config if hub_id == preset.corpus else None)
    return HubCorpus(hub_id, split, columns, normalizer, config, revision)


def load_corpus(corpus: str | Path, split: str, limit: int | None = None, **settings) -> Dataset:
    """Load the first `limit` utterances of a split into memory, for evaluation. `settings` as in `open_corpus`.

    Returns:
        A dataset with the columns `id` (string), `audio` (`{"bytes", "path"}`), `transcript` (string), `duration`
        (float32, seconds) and `source` (string, corpus and split).

    Raises:
        ValueError: as in `open_corpus`, or an utterance cannot be used, or there are none.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"{limit=} must be 1 or more.")
    opened = open_corpus(corpus, split, **settings)
    rows = list(itertools.islice(opened, opened.default_limit if limit is None else limit))
    if not rows:
        raise ValueError(f"{opened.source} has no utterances; choose another corpus or split.")
    dataset = Dataset.from_list(rows, features=FEATURES)
    return dataset.cast_column("audio", Audio(16_000, decode=False))


def _preset(preset: str | None, corpus: str) -> Preset:
    if preset is not None and preset not in OF_FILES:
        raise ValueError(f"unknown preset {preset!r}; expected one of {OF_FILES}")
    by_id = {settings.corpus: name for name, settings in PRESETS.items() if settings.corpus}
    name = preset or by_id.get(corpus) or (corpus if corpus in PRESETS else None)
    if name == corpus and PRESETS[name].corpus is None and PRESETS[name].speaker is None:
        raise ValueError(
            f"{name} is not on the Hub; pass its TSV file, or the Hub id of a copy; a build takes --preset {name}."
        )
    return PRESETS[name] if name else Preset(None, {}, "plain", None, None)
