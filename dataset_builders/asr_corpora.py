"""Any ASR corpus as rows of one schema: `id`, `audio`, `transcript`, `duration`, `source`.

A corpus is whatever `load_dataset` opens: a Hub id or a folder, with an audio column and a text column. Audio is
passed on as the bytes of its file, never decoded and encoded again.
"""

import io
from pathlib import Path

import numpy as np
from datasets import Audio, Dataset, Value, load_dataset


def load_corpus(
    corpus: str | Path,
    split: str,
    config: str | None = None,
    audio_column: str = "audio",
    transcript_column: str = "transcript",
    id_column: str = "id",
    limit: int | None = None,
) -> Dataset:
    """Open one split of an ASR corpus.

    Args:
        corpus: Hub id, or a folder that `load_dataset` reads.
        split: its split, such as `train`.
        config: its configuration, if it has several.
        audio_column, transcript_column, id_column: the names of its columns.
        limit: the first so many rows only.

    Returns:
        A dataset with the columns `id` (string), `audio` (`{"bytes", "path"}`), `transcript` (string), `duration`
        (float32, seconds) and `source` (string, corpus and split).

    Raises:
        ValueError: a column is missing; names those there are. Or a row has no transcript, or audio of no length.
    """
    name = Path(corpus).name if Path(corpus).exists() else str(corpus)
    dataset = load_dataset(str(corpus), config, split=split)
    wanted = {id_column: "id", audio_column: "audio", transcript_column: "transcript"}
    missing = [column for column in wanted if column not in dataset.column_names]
    if missing:
        raise ValueError(
            f"{corpus} ({split}) has no column {missing[0]!r}; it has {dataset.column_names}. Name its columns with "
            "audio_column, transcript_column and id_column."
        )
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    kept = [*wanted, *(["duration"] if "duration" in dataset.column_names else [])]
    dataset = dataset.select_columns(kept).rename_columns({old: new for old, new in wanted.items() if old != new})
    for column, kind in {"id": Value("string"), "duration": Value("float32")}.items():
        if dataset.features.get(column, kind) != kind:
            dataset = dataset.cast_column(column, kind)
    dataset = dataset.cast_column("audio", Audio(16_000, decode=False))
    return dataset.map(_complete, fn_kwargs={"source": f"{name}/{split}"}, desc=f"reading {name}/{split}")


def duration_of(audio: dict) -> float:
    """Seconds of an audio file given as `{"bytes", "path"}`, from its header.

    Raises:
        ValueError: the file cannot be read or holds no samples.
    """
    import soundfile

    source = io.BytesIO(audio["bytes"]) if audio.get("bytes") is not None else audio["path"]
    try:
        info = soundfile.info(source)
    except (soundfile.LibsndfileError, OSError, TypeError) as error:
        raise ValueError(f"cannot read {audio.get('path') or 'the given bytes'} as audio: {error}") from error
    if info.frames == 0:
        raise ValueError(f"{audio.get('path') or 'the audio'} has no samples; expected speech.")
    return info.frames / info.samplerate


def _complete(row: dict, source: str) -> dict:
    if not row["transcript"] or not row["transcript"].strip():
        raise ValueError(f"row {row['id']!r} of {source} has no transcript; expected the text of its audio.")
    duration = row["duration"] if row.get("duration") is not None else duration_of(row["audio"])
    return {"transcript": row["transcript"].strip(), "duration": np.float32(duration), "source": source}
