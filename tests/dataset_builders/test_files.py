"""Files: fingerprints of their content, YAML, JSON lines, and atomic writes."""

import json
from pathlib import Path

import pytest
import torch
from hub_clients import run
from jinja2 import UndefinedError
from safetensors.torch import save_file

from dataset_builders import files
from dataset_builders.files import (
    append_lines,
    content_of,
    differences,
    fingerprint,
    partial_of,
    read_lines,
    read_template,
    read_yaml,
    whole,
    write_whole,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkpoint(tmp_path):
    """Make a checkpoint with two large tensors, a small one between them, and the other files that loading reads."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save(folder)
    return folder


def save(folder, **changed):
    tensors = {"a": torch.zeros(2**19), "small": torch.zeros(3), "z": torch.zeros(2**19)}
    save_file(tensors | changed, folder / "model.safetensors")


def test_a_checkpoint_that_changed_in_place_has_another_fingerprint(checkpoint):
    """The size stays the same. A change of only the small tensor is noticed, too; pieces at equal distances would miss
    it."""
    first, size = fingerprint(checkpoint), (checkpoint / "model.safetensors").stat().st_size
    save(checkpoint)
    assert fingerprint(checkpoint) == first
    for changed in ({"z": torch.ones(2**19)}, {"small": torch.ones(3)}):
        save(checkpoint, **changed)
        assert (checkpoint / "model.safetensors").stat().st_size == size
        assert fingerprint(checkpoint) != first


def test_the_fingerprint_of_a_checkpoint_is_cheap(checkpoint, monkeypatch):
    read = sum(len(piece) for piece in files._pieces(checkpoint / "model.safetensors"))
    assert read < 0.1 * (checkpoint / "model.safetensors").stat().st_size


def test_what_trainings_and_evaluations_write_beside_a_checkpoint_does_not_count(checkpoint, tmp_path):
    first = fingerprint(checkpoint)
    for name in ("README.md", "log.jsonl", "training_args.bin", "trainer_state.json", "checkpoint-3/model.safetensors"):
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_text("more")
    assert fingerprint(checkpoint) == first
    assert fingerprint(checkpoint.rename(tmp_path / "elsewhere")) == first
    (tmp_path / "elsewhere" / "tokenizer.json").write_text("{}")
    assert fingerprint(tmp_path / "elsewhere") != first


def test_the_fingerprint_of_an_adapter_depends_on_its_base(checkpoint, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / files.ADAPTER).write_text(json.dumps({"base_model_name_or_path": str(checkpoint)}))
    first = fingerprint(tmp_path / "adapter")
    save(checkpoint, small=torch.ones(3))
    assert fingerprint(tmp_path / "adapter") != first


def test_any_other_file_is_known_by_pieces_and_a_torn_checkpoint_is_no_error(tmp_path):
    for name in ("rows.parquet", "model.safetensors"):
        found = []
        for last in (b"a", b"b"):
            (tmp_path / name).write_bytes(b"\xff" * 2 * files.WHOLE + last)
            found.append(fingerprint(tmp_path / name))
        assert found[0] != found[1]


def test_cards_and_hidden_files_of_a_set_do_not_count(tmp_path):
    (tmp_path / ".build").mkdir()
    (tmp_path / "rows").write_text("rows")
    first = fingerprint(tmp_path)
    (tmp_path / ".build" / "lock").write_text("1")
    (tmp_path / "README.md").write_text("published")
    assert fingerprint(tmp_path) == first


def test_a_name_that_does_not_exist_has_no_content(tmp_path):
    assert fingerprint(tmp_path / "gone") is None
    assert fingerprint("") is None
    assert fingerprint("a" * 100_000) is None
    assert content_of(str(tmp_path / "gone")) is None
    assert content_of("no-such/repository") is None
    assert content_of(None) is None


def test_differences_have_names_inside_too():
    before = {"same": 1, "seed": 0, "draw": {"tasks": ["a"], "pool": "x"}}
    now = {"same": 1, "seed": 1, "draw": {"tasks": ["b"], "pool": "x"}, "new": 2}
    assert differences(before, now) == {"seed": (0, 1), "draw.tasks": (["a"], ["b"]), "new": (None, 2)}
    assert differences(before, dict(before)) == {}


# YAML


def test_a_key_that_stands_twice_is_refused_by_name(tmp_path):
    (tmp_path / "a.yaml").write_text("rows:\n  fast: {steps: 1}\n  fast: {steps: 2}\n")
    with pytest.raises(ValueError, match=r"a.yaml: not valid YAML: duplicate key 'fast'"):
        read_yaml(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("base: &b {x: 1, y: 2}\nmore: {<<: *b, y: 3}\n")  # a default is no duplicate
    assert read_yaml(tmp_path / "a.yaml")["more"] == {"x": 1, "y": 3}
    with pytest.raises(ValueError, match=r"b.yaml cannot be read as YAML"):
        read_yaml(tmp_path / "b.yaml")


def test_every_configuration_of_ours_can_be_read():
    from recipes.evaluation.tasks import TASKS_PATH

    configs = [*(TASKS_PATH.parents[1] / "configs").rglob("*.yaml"), TASKS_PATH]
    assert len(configs) > 15 and all(read_yaml(path) for path in configs)


# The Hub

COMMITS = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
from huggingface_hub import HfApi
from dataset_builders.files import content_of
api, found = HfApi(), []
for kind in ("model", "dataset"):
    api.create_repo("me/it", repo_type=kind)
    for content in (b"{}", b"[]"):
        api.upload_file(path_or_fileobj=content, path_in_repo="config.json", repo_id="me/it", repo_type=kind)
        found.append((content_of("me/it", repo_type=kind), api.repo_info("me/it", repo_type=kind).sha))
print(json.dumps(found))
"""
CACHED = """
import json, sys
sys.path.insert(0, sys.argv[1])
from dataset_builders.files import content_of
print(json.dumps(content_of("me/it")))
"""


def test_the_content_of_a_hub_repository_is_its_commit_also_offline(hub, tmp_path):
    found = run(COMMITS, hub, tmp_path / "home", str(ROOT))
    assert [content for content, _ in found] == [commit for _, commit in found]
    assert found[0] != found[1] and found[2] != found[3]
    assert run(CACHED, hub, tmp_path / "home", str(ROOT), HF_HUB_OFFLINE="1") == found[1][0]


# Atomic writes


def stop_halfway(target: Path, resume: bool = False) -> None:
    """Make a file in the folder `target`, and stop with an error."""
    with pytest.raises(KeyboardInterrupt), whole(target, resume=resume) as partial:
        partial.mkdir(exist_ok=True)
        (partial / f"part {len(list(partial.iterdir()))}").touch()
        raise KeyboardInterrupt


@pytest.mark.parametrize(("resume", "found"), [(False, ["last"]), (True, ["last", "part 0", "part 1"])])
def test_a_folder_has_its_name_when_it_is_whole(tmp_path, resume, found):
    target = tmp_path / "made"
    stop_halfway(target, resume)
    stop_halfway(target, resume)
    assert not target.exists() and partial_of(target).is_dir()
    with whole(target, resume=resume) as partial:
        partial.mkdir(exist_ok=True)
        (partial / "last").touch()
    assert sorted(file.name for file in target.iterdir()) == found
    assert not partial_of(target).exists()


def test_a_file_that_was_there_stays_until_the_next_one_is_whole(tmp_path):
    file = tmp_path / "new folder" / "page.html"
    write_whole(file, "before")
    with pytest.raises(OSError, match="disk"), whole(file) as partial:
        partial.write_text("half")
        raise OSError("the disk is full")
    assert file.read_text() == "before"
    write_whole(file, "after \ud800")
    assert file.read_text() == "after ?"
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("text", ["one\ntwo", "one\u2028two\x85\x1c", "ñandú", "half a pair \ud83d"])
@pytest.mark.parametrize("torn", [b"", b"{", b'{"text": "\xc3', b'{"text": "whole but for its end"}'])
def test_lines_are_read_as_they_were_written_and_a_torn_one_is_cut_off(tmp_path, text, torn):
    file = tmp_path / "new folder" / "log.jsonl"
    assert read_lines(file) == []
    append_lines(file, [{"text": text}, [text, 1]])
    with file.open("ab") as lines:
        lines.write(torn)
    assert read_lines(file) == [{"text": text}, [text, 1]]
    append_lines(file, [{"text": "next"}])
    assert read_lines(file) == [{"text": text}, [text, 1], {"text": "next"}]


def test_what_fills_a_template_is_escaped_and_must_be_there(tmp_path):
    (tmp_path / "page.html").write_text("<p>{{ text }}{{ '!' | often }}</p>")
    template = read_template(tmp_path / "page.html", often=lambda text: 3 * text)
    assert template.render(text="a < b") == "<p>a &lt; b!!!</p>"
    with pytest.raises(UndefinedError, match="text"):
        template.render()
