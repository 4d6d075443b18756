"""Check a finished set, push it to the Hub, and load it."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from datasets import Audio, Dataset, IterableDataset, load_dataset
from huggingface_hub import HfApi

from dataset_builders.data_card import REPOSITORY
from dataset_builders.shards import BuildFolder


def check(folder: str | Path) -> int:
    """Check that a set is complete and its ids are unique. Returns its number of rows.

    Raises:
        ValueError: names what is missing, or the duplicate id.
    """
    folder = Path(folder)
    builds = BuildFolder.splits(folder)
    if not builds or not (folder / "README.md").is_file():
        raise ValueError(f"{folder} is not a finished set; expected a folder with README.md that `build` wrote.")
    for split in builds:
        if missing := list(split.missing()):
            raise ValueError(
                f"{folder} lacks {len(missing)} shards of split {split.split!r}, such as {missing[0]}; run its `build` "
                "again to finish it."
            )
        split.settle()
    # Hashes of 8 bytes instead of the ids, because a set may have millions of rows.
    hashes = np.fromiter((_hash(id) for _, id in _ids(folder)), np.uint64)
    values, counts = np.unique(hashes, return_counts=True)
    if twice := set(values[counts > 1].tolist()):
        file, id = next((file, id) for file, id in _ids(folder) if _hash(id) in twice)
        raise ValueError(f"{file} has the id {id!r}, which another row also has; the ids of a corpus must be unique.")
    return len(hashes)


def _ids(folder: Path) -> Iterator[tuple[Path, str]]:
    for file in sorted(folder.glob("data/*/*.parquet")):
        yield from ((file, id) for id in pq.read_table(file, columns=["id"])["id"].to_pylist())


def _hash(id: str) -> int:
    return int.from_bytes(hashlib.sha256(id.encode()).digest()[:8])


def push_to_hub(
    folder: str | Path, repo_id: str, revision: str | None = None, private: bool | None = None, token: str | None = None
) -> str:
    """Push a finished set to the Hub. Files under `data/` in the repository that the folder does not have are deleted.

    Args:
        folder: folder of the set.
        repo_id: `ORGANISATION/NAME` of the repository, created if it does not exist.
        revision: branch of the repository, created if it does not exist; `main` if None.
        private, token: as in `huggingface_hub`.

    Returns:
        The commit's URL.

    Raises:
        ValueError: as in `check`.
    """
    rows, api, card = check(folder), HfApi(token=token), Path(folder) / "README.md"
    card.write_text(card.read_text(encoding="utf-8").replace(REPOSITORY, repo_id), encoding="utf-8")
    api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    if revision is not None:
        api.create_branch(repo_id, repo_type="dataset", branch=revision, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        repo_type="dataset",
        revision=revision,
        allow_patterns=["README.md", "data/*/*.parquet"],
        delete_patterns=["data/**"],
        commit_message=f"Self-powered set of {rows} rows",
    )
    return commit.commit_url


def load_self_powered(
    name: str | Path, config: str = "all", split: str = "train", streaming: bool = False
) -> Dataset | IterableDataset:
    """Load a self-powered set from a folder or the Hub, without decoding its audio. `config` is a task, or `all`.

    Raises:
        ValueError: the folder is not a finished set, or the set has no such configuration or split.
    """
    if Path(name).is_dir() and not (Path(name) / "README.md").is_file():
        raise ValueError(f"{name} has no README.md; expected a folder that `build` has finished.")
    dataset = load_dataset(str(name), config, split=split, streaming=streaming)
    if "audio" not in (dataset.features or ()):
        raise ValueError(f"{name} has no column 'audio' but {list(dataset.features)}; expected a self-powered set.")
    return dataset.cast_column("audio", Audio(16_000, decode=False))
