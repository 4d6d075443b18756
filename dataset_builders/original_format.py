"""Import and export sets in the original project's format, JSONL with `instruction`, `audio` and `text`.

`audio` is a path and `text` is the response. The transcripts are in another JSONL with `audio` and `text`, an ordinary
manifest (`corpora/opening.py`). Neither names the task or the responder, so imported rows say `unknown`, and
`recipes/sft.py` refuses them as rows of another LLM, unless `--allow_foreign_responses` is set.
"""

import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
from tqdm import tqdm

from dataset_builders.building import SHARD_ROWS, finish, my_shards, report, to_tables
from dataset_builders.corpora.corpus import RefusedRowError
from dataset_builders.corpora.local import ManifestCorpus
from dataset_builders.files import fingerprint, whole
from dataset_builders.shards import BuildFolder, Worker

logger = logging.getLogger(__name__)

COLUMNS = {"audio": "audio", "transcript": "text"}
UNKNOWN = {"model": "unknown", "revision": "unknown", "template": "unknown", "decoding": {}}


class OriginalRows(ManifestCorpus):
    """The original project's training JSONL as a corpus, whose rows also have `instruction` and `response`.

    Args:
        path: the JSONL.
        task: task of all rows, if they have the same one.
        split: name of the set's split.
        data_root: folder that the audio must be in; the JSONL's own by default.
        transcripts: JSONL with `audio` and `text`, the transcripts. Without it, the transcripts stay empty.
    """

    def __init__(
        self,
        path: str | Path,
        task: str = "unknown",
        split: str = "train",
        data_root: str | Path | None = None,
        transcripts: str | Path | None = None,
    ):
        super().__init__(Path(path), split, COLUMNS, "plain", data_root)
        self.task = task
        self.transcripts, self.transcribed = {}, None if transcripts is None else fingerprint(transcripts)
        if transcripts is not None:
            for where, line in ManifestCorpus(Path(transcripts), split, COLUMNS, "plain", data_root).lines(0):
                if isinstance(line, dict) and isinstance(line.get("text"), str) and isinstance(line.get("audio"), str):
                    self.transcripts[line["audio"]] = line["text"]
                else:
                    logger.warning("%s is not a transcript: %s; expected `audio` and `text`", where, line)

    def utterance(self, where: str, line: dict | RefusedRowError) -> dict:
        """Return a row of the set. Raises RefusedRowError as in `Corpus`, and if the row has no instruction or, where
        transcripts were given, its audio has none."""
        row = super().utterance(where, line)
        if not isinstance(line.get("instruction"), str) or not line["instruction"].strip():
            raise RefusedRowError(where, "no instruction", f"it is {line.get('instruction')!r}")
        if self.transcripts and line["audio"] not in self.transcripts:
            raise RefusedRowError(where, "no transcript", f"{line['audio']} is not among the transcripts")
        return row | {
            "id": f"{self.source}/{row['id']}/{self.task}/{where.rpartition(' ')[2]}",  # an utterance may come twice
            "task": self.task,
            "instruction": line["instruction"].strip(),
            "response": line["text"].strip(),
            "transcript": self.transcripts.get(line["audio"], ""),
            "responder": json.dumps(UNKNOWN),
        }


def import_original(rows: OriginalRows, output: str | Path, shard_size: int = SHARD_ROWS) -> Path:
    """Write the original project's rows as a set, or continue an import.

    Raises:
        ValueError: `output` was started with other settings, or no row can be used.
    """
    folder = BuildFolder(output, rows.split)
    folder.agree(
        {
            "corpus": {**rows.describe(), "task": rows.task, "transcripts": rows.transcribed},
            "draw": None,
            "responder": UNKNOWN,
            "limit": None,
            "shard_size": shard_size,
            "filters_off": [],
            "judge_below": None,
            "num_files": 1,
        }
    )
    folder.settle()
    for shard, lines, kept, refused in my_shards(rows, folder, Worker(), None, trust_headers=False):
        folder.commit(shard, to_tables(kept), report(lines, refused, kept, kept, {}))
    return finish(folder, pool={})


def export_original(folder: str | Path, output: str | Path, split: str = "train") -> Path:
    """Write a set in the original project's format: `OUTPUT/SPLIT.jsonl`, `OUTPUT/SPLIT_transcripts.jsonl` and the
    audio under `OUTPUT/audio/`, byte for byte. Returns the path of `SPLIT.jsonl`.

    Raises:
        ValueError: the set has no such split, or `output` exists.
    """
    files = sorted(Path(folder).glob(f"data/*/{split}-*.parquet"))
    if not files:
        raise ValueError(f"{folder} has no data/*/{split}-*.parquet; expected a folder that `build` wrote.")
    output = Path(output)
    if output.exists():
        raise ValueError(f"{output} exists; delete it or name another output.")
    with whole(output) as partial:
        (partial / "audio").mkdir(parents=True)
        _write_rows(stored_rows(files), partial, split)
    return output / f"{split}.jsonl"


def _write_rows(rows: Iterable[dict], folder: Path, split: str) -> None:
    with (
        open(folder / f"{split}.jsonl", "w", encoding="utf-8") as responses,
        open(folder / f"{split}_transcripts.jsonl", "w", encoding="utf-8") as transcripts,
    ):
        for row in tqdm(rows, unit="row", desc="export"):
            audio = _write_audio(folder, row)
            line = {"instruction": row["instruction"], "audio": audio, "text": row["response"]}
            responses.write(json.dumps(line, ensure_ascii=False) + "\n")
            transcripts.write(json.dumps({"audio": audio, "text": row["transcript"]}, ensure_ascii=False) + "\n")


def stored_rows(files: Iterable[str | Path]) -> Iterator[dict]:
    """Yield the rows of a set's Parquet files, with few of them in memory."""
    for file in files:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=100):
            yield from batch.to_pylist()


def _write_audio(folder: Path, row: dict) -> str:
    """Write a row's clip under the row's id, and return its path in the folder."""
    id = row["id"].rpartition(f"/{row['task']}")[0]
    parts = [part for part in id.split("/") if part not in ("", ".", "..")]
    file = Path("audio", *parts).with_name(parts[-1] + (Path(row["audio"]["path"] or "").suffix or ".audio"))
    target = folder / file
    if not target.exists():  # an utterance may have several rows
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(row["audio"]["bytes"])
    return str(file)
