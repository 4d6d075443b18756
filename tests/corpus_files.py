"""Corpora in small, as tests write and read them."""

import functools
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile

from dataset_builders.corpora.corpus import RefusedRowError


@functools.cache
def clip(seed=0, kind="WAV", seconds=0.5, rate=16_000, channels=1) -> bytes:
    """An audio file of noise."""
    noise = np.random.default_rng(seed).normal(0, 0.1, (int(seconds * rate), channels))
    file = io.BytesIO()
    soundfile.write(file, noise, rate, format=kind)
    return file.getvalue()


def write(folder, files):
    """Write files by their paths, from bytes or text; returns the folder."""
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def json_lines(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def parquet(folder, *rows, name="train.parquet"):
    """Write a Parquet file as the Hub has them; audio as bytes, or as `{"bytes", "path"}`."""
    rows = [row | {"audio": {"bytes": row["audio"], "path": None}} if is_bytes(row) else row for row in rows]
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / name)
    return folder


def is_bytes(row):
    return isinstance(row.get("audio"), bytes)


def read(corpus):
    """The rows of a corpus, and the errors of those that are refused."""
    rows, refused = [], []
    for file in range(corpus.num_files):
        for where, line in corpus.lines(file):
            try:
                rows.append(corpus.utterance(where, line))
            except RefusedRowError as error:
                refused.append(error)
    return rows, refused


def spoken(corpus):
    """`{id: (transcript, bytes of the audio file)}` of a corpus where nothing is refused."""
    rows, refused = read(corpus)
    assert not refused
    found = {row["id"]: (row["transcript"], row["audio"]["bytes"]) for row in rows}
    assert len(found) == len(rows)
    return found


def places(refused):
    return [(error.where, error.reason) for error in refused]
