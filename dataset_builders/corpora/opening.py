"""Any ASR corpus as rows of one schema: `id`, `audio`, `transcript`, `duration`, `source`.

A corpus is one of

- the name of a preset (`PRESETS`), some of which are spoken on the fly;
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

FILE_TYPES = ("string", "large_string", "binary", "large_binary")  # columns of paths, or of the files themselves


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
    speaker: str | None = None  # `module:Class` of a corpus that no files hold, made with the split


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
    "nano": Preset(None, {}, "plain", "apache-2.0", speaker="dataset_builders.nano.corpus:NanoCorpus"),
}
OF_FILES = [name for name, known in PRESETS.items() if known.speaker is None]  # whose columns and rules are known


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
                raise  # the network's fault: the build can go on later
            raise RefusedRowError(where, "unreadable audio", str(error)) from error

    def _resolve(self, where: str, path: str) -> str:
        """A file of the corpus as `xopen` takes it, perhaps in an archive (`zip://a.wav::FILE`). It may name no
        other: what it names is read here, and published."""
        *inside, file = path.split("::")
        if self.folder is not None:
            file = os.path.normpath(self.folder / file)
            own = Path(file).is_relative_to(self.folder)
        else:
            own = file.startswith((f"hf://datasets/{self.name}@", f"hf://datasets/{self.name}/"))
            own = own and ".." not in file.split("/")
        if not own or not all(hop.startswith("zip://") for hop in inside):
            root = f"under {self.folder}; see --data-root of a build" if self.folder else f"a file of {self.name}"
            raise RefusedRowError(where, "outside the data root", f"{path} is not {root}")
        return "::".join([*inside, file])


def _commit(corpus: str, revision: str | None) -> str:
    """The commit of a data set on the Hub. Raises ValueError if there is none, or the Hub cannot be asked."""
    try:
        return HfApi().dataset_info(corpus, revision=revision).sha
    except (OSError, ValueError) as error:
        raise ValueError(f"{corpus} does not exist here, and cannot be opened on the Hub: {error}") from error


def _columns_of(stream: IterableDataset, columns: dict[str, str], corpus: str) -> dict[str, str]:
    """As `choose_columns`; raises ValueError also if the audio is not in files."""
    if stream.features is None:
        raise ValueError(f"{corpus}: its first rows cannot be read; expected Parquet, JSON Lines, CSV or audio files.")
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
        corpus: a manifest, an audio folder, a folder or Hub id that `load_dataset` opens, or a preset's name.
        split: its split, such as `train`: of an audio folder, the folder of that name in it if there is one. Other
            audio folders and manifests are one split, which gets this name.
        config: its configuration, if it has several.
        preset: whose columns and transcript rule are used (`PRESETS`); by default that of its Hub id, or none.
        columns: names of its `audio`, `transcript` and `id` columns, where neither preset nor custom has them.
        normalizer: the rule for its transcripts (`transcripts.py`); the preset's or `plain` by default.
        data_root: folder that audio must be in and paths start from; the manifest's own, or the folder, by default.
        revision: branch, tag or commit on the Hub.
        corpus_name: what rows call it in `source` and in ids, where its own name (Hub id, folder or file) says little.

    Raises:
        ValueError: no such corpus, preset, normalizer or column; names those there are.
    """
    name = str(corpus)
    known = _preset(preset, name)
    if known.speaker is not None:
        opened: Corpus = pkgutil.resolve_name(known.speaker)(split)
    else:
        opened = _open(name, split, known, config, columns or {}, normalizer or known.normalizer, data_root, revision)
    opened.license, opened.language = known.license, known.language
    opened.name = corpus_name or opened.origin
    return opened


def _open(name, split, known: Preset, config, columns, normalizer, data_root, revision) -> Corpus:
    path, columns = Path(name), {**known.columns, **columns}
    if path.is_file():
        if path.suffix not in MANIFESTS:
            raise ValueError(
                f"{path} is no manifest; expected one of {', '.join(MANIFESTS)}, or a folder of Parquet or audio files."
            )
        if data_root is None and known.audio_folder:
            data_root = path.parent / known.audio_folder
        return ManifestCorpus(path, split, columns, normalizer, data_root)
    if path.is_dir() and is_audio_folder(path):
        return AudioFolder(path, split, columns, normalizer, data_root)
    if path.is_dir():
        return HubCorpus(name, split, columns, normalizer, config, data_root=data_root)
    if path.suffix in MANIFESTS or path.is_absolute() or name.startswith("."):
        raise ValueError(f"{name} does not exist; expected a manifest, a folder or the id of a data set on the Hub.")
    if data_root is not None:
        raise ValueError(f"{name} is on the Hub, where audio is not under a {data_root=}; leave that out.")
    hub_id = PRESETS[name].corpus if name in PRESETS else name
    config = config or (known.config if hub_id == known.corpus else None)
    return HubCorpus(hub_id, split, columns, normalizer, config, revision)


def load_corpus(corpus: str | Path, split: str, limit: int | None = None, **settings) -> Dataset:
    """The first `limit` utterances of a split, in memory: for evaluation. `settings` as in `open_corpus`.

    Returns:
        A dataset with the columns `id` (string), `audio` (`{"bytes", "path"}`), `transcript` (string), `duration`
        (float32, seconds) and `source` (string, corpus and split).

    Raises:
        ValueError: as in `open_corpus`, an utterance that cannot be used, or none at all.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"{limit=} must be 1 or more.")
    opened = open_corpus(corpus, split, **settings)
    rows = list(itertools.islice(opened, opened.default_limit if limit is None else limit))
    if not rows:
        raise ValueError(f"{opened.source} has no utterance.")
    dataset = Dataset.from_list(rows, features=FEATURES)
    return dataset.cast_column("audio", Audio(16_000, decode=False))


def _preset(preset: str | None, corpus: str) -> Preset:
    if preset is not None and preset not in OF_FILES:
        raise ValueError(f"unknown preset {preset!r}; there are {OF_FILES}")
    by_id = {known.corpus: name for name, known in PRESETS.items() if known.corpus}
    name = preset or by_id.get(corpus) or (corpus if corpus in PRESETS else None)
    if name == corpus and PRESETS[name].corpus is None and PRESETS[name].speaker is None:
        raise ValueError(
            f"{name} is not on the Hub: name its TSV file, or a mirror's id, and --preset {name} of a build."
        )
    return PRESETS[name] if name else Preset(None, {}, "plain", None, None)
