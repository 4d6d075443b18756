"""Building a set from an ASR corpus on the Hub, publishing it there, and loading it."""

import json
import shutil
from pathlib import Path

import pytest
from hub_clients import run, start

from dataset_builders.building import build
from dataset_builders.corpora.opening import open_corpus
from dataset_builders.publishing import check, load_self_powered, push_to_hub

ROOT = Path(__file__).parents[2]
CORPUS, SET = "openslr/librispeech_asr", "org/self-powered-librispeech"

PUBLISH_CORPUS = """
import io, json, sys
import numpy as np, soundfile
from datasets import Audio, Dataset
rows = []
for index, text in enumerate(json.loads(sys.argv[1])):
    flac = io.BytesIO()
    soundfile.write(flac, np.random.default_rng(index).normal(0, 0.1, 8000), 16_000, format="FLAC")
    audio = {"bytes": flac.getvalue(), "path": f"1-2-{index:04d}.flac"}
    rows.append({"file": audio["path"], "audio": audio, "text": text, "speaker_id": 1, "id": f"1-2-{index:04d}"})
Dataset.from_list(rows).cast_column("audio", Audio(16_000)).push_to_hub(
    "openslr/librispeech_asr", "all", split="train.clean.100", num_shards=2
)
print(json.dumps([row["audio"]["bytes"].hex() for row in rows]))
"""

READ = """
import json, sys
from datasets import Audio, get_dataset_config_names, load_dataset
name, split, *revisions = sys.argv[1:]
answer = []
for revision in revisions:
    found = {"configs": get_dataset_config_names(name, revision=revision)}
    for config in ("all", "transcription"):
        for streaming in (False, True):
            rows = load_dataset(name, config, split=split, streaming=streaming, revision=revision)
            rows = rows.cast_column("audio", Audio(16_000, decode=False))
            found[f"{config} {streaming}"] = [{**row, "audio": row["audio"]["bytes"].hex()} for row in rows]
    answer.append(found)
print(json.dumps(answer))
"""

PUSH = """
import json, sys
from dataset_builders.publishing import push_to_hub
for arguments in json.loads(sys.argv[1]):
    push_to_hub(*arguments)
print("{}")
"""

COMMAND = "from dataset_builders.self_powered import main; main(); print('{}')"
SENTENCES = [f"THE FARMER SOLD THE {thing} I SAID" for thing in ("LAMP", "CLOCK", "HORSE", "DESK", "BOAT", "CHAIR")]


@pytest.fixture(scope="module")
def clips(hub, tmp_path_factory) -> list[str]:
    """Return the files of a corpus on the Hub, in hexadecimal."""
    return run(PUBLISH_CORPUS, hub, tmp_path_factory.mktemp("corpus") / "home", json.dumps(SENTENCES))


def test_from_a_corpus_on_the_hub_to_a_set_on_the_hub(hub, clips, llm_dir, tmp_path):
    folder, home = tmp_path / "set", tmp_path / "home"
    options = ["--tasks", "transcription=inf", "intent", "--tasks-per-utterance", "2", "--filters-off", "truncated"]
    options += ["--split", "train.clean.100", "--max-new-tokens", "3"]
    build_it = ["build", "--corpus", "librispeech", "--llm", str(llm_dir), "--output", str(folder), *options]
    run(COMMAND, hub, home, *build_it, PYTHONPATH=str(ROOT))
    asked = len(hub.requests)
    run(COMMAND, hub, home, "publish", str(folder), "--repo", SET, PYTHONPATH=str(ROOT))
    assert len(hub.requests) > asked

    (found,) = run(READ, hub, tmp_path / "user", SET, "train.clean.100", "main")
    assert found["configs"] == ["all", "intent", "transcription"]
    assert found["all False"] == found["all True"]
    assert len(found["all True"]) == 12
    rows = found["transcription True"]
    assert rows == found["transcription False"]
    assert [row["audio"] for row in rows] == clips
    assert [row["transcript"] for row in rows] == [
        sentence.capitalize().replace(" i ", " I ") for sentence in SENTENCES
    ]
    assert rows[0]["id"] == f"{CORPUS}/train.clean.100/1-2-0000/transcription"

    files = hub.repos["dataset", SET].files()
    assert set(files) == {".gitattributes", "README.md"} | {
        f"data/{task}/train.clean.100-0000{file}-00000.parquet"
        for task in ("intent", "transcription")
        for file in (0, 1)
    }
    card = files["README.md"].content.decode()
    assert f'load_dataset("{SET}", "all"' in card
    assert "license: cc-by-4.0" in card
    sha = hub.repos["dataset", CORPUS].sha("main")
    assert f"Source: `{CORPUS}`, split `train.clean.100` at revision `{sha}`" in card


def test_publishing_again_replaces_what_was_there_and_a_revision_stands_beside_it(
    hub, backwards, both, corpus_dir, tmp_path
):
    first = build(open_corpus(corpus_dir), backwards, tmp_path / "first", both, shard_size=2)
    second = build(open_corpus(corpus_dir), backwards, tmp_path / "second", both, shard_size=8, limit=4)
    pushes = [[str(first), "org/again"], [str(first), "org/again", "v1"], [str(second), "org/again"]]
    run(PUSH, hub, tmp_path / "home", json.dumps(pushes), PYTHONPATH=str(ROOT))
    found = run(READ, hub, tmp_path / "user", "org/again", "train", "main", "v1")
    assert [len(rows["all False"]) for rows in found] == [len(rows["all True"]) for rows in found] == [4, 16]


def test_an_unfinished_set_creates_no_repository(hub, tmp_path):
    result = start(PUSH, hub, tmp_path / "home", json.dumps([[str(tmp_path), "org/x"]]), PYTHONPATH=str(ROOT))
    assert "is not a finished set" in result.stderr
    assert ("dataset", "org/x") not in hub.repos


# Sets that cannot be published


@pytest.fixture
def folder(backwards, both, corpus_dir, tmp_path):
    return build(open_corpus(corpus_dir), backwards, tmp_path / "set", both, shard_size=2)


def test_a_finished_set_can_be_published(folder):
    assert check(folder) == 16


def test_an_unfinished_set_cannot_be_published(folder):
    shutil.rmtree(folder / ".build/train/shards/00000-00001")
    with pytest.raises(ValueError, match="lacks 1 shards of split 'train', such as 00000-00001; run its `build`"):
        push_to_hub(folder, "org/half")


def test_a_folder_without_a_set_cannot_be_published(tmp_path):
    with pytest.raises(ValueError, match="is not a finished set"):
        check(tmp_path)


def test_a_set_with_a_duplicate_id_cannot_be_published(folder):
    file = next((folder / "data/transcription").iterdir())
    shutil.copy(file, file.with_name("train-00000-00009.parquet"))
    with pytest.raises(ValueError, match="which another row also has"):
        check(folder)


# Reading


def test_a_set_is_opened_with_its_audio_undecoded(folder):
    assert len(load_self_powered(folder)) == 16
    assert load_self_powered(folder, "transcription")[0]["audio"]["bytes"][:4] == b"RIFF"


def test_two_folders_of_one_name_are_not_mixed_up(folder, backwards, both, corpus_dir, tmp_path):
    """`datasets` names its cache after the folder; the content hash in the card distinguishes the sets."""
    other = build(open_corpus(corpus_dir), backwards, tmp_path / "elsewhere" / "set", both, limit=3)
    assert (len(load_self_powered(folder)), len(load_self_powered(other))) == (16, 3)


def test_an_unfinished_folder_is_refused(folder):
    (folder / "README.md").unlink()
    with pytest.raises(ValueError, match=r"has no README\.md"):
        load_self_powered(folder)
