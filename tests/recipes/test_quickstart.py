"""The quickstart: stages appear whole or not at all, go on where they stopped, and end in a report."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from transformers import AutoModel, AutoProcessor

from recipes import quickstart
from recipes.quickstart import Quickstart, Stages, check_folder
from recipes.report import percent, table


def test_a_stage_that_fails_leaves_nothing_that_looks_whole(tmp_path):
    def fail(folder: Path):
        folder.mkdir()
        (folder / "half").touch()
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        Stages(tmp_path).run("corpus", fail)
    assert not (tmp_path / "corpus").exists()
    target = Stages(tmp_path).run("corpus", lambda folder: folder.mkdir())
    assert list(target.iterdir()) == []


def test_a_whole_stage_is_not_made_again(tmp_path):
    Stages(tmp_path).run("corpus", lambda folder: folder.mkdir())
    Stages(tmp_path).run("corpus", lambda folder: pytest.fail("made twice"))


def test_a_stage_that_was_killed_before_it_was_noted_is_made_again(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "from whom?").touch()
    target = Stages(tmp_path).run("corpus", lambda folder: folder.mkdir())
    assert list(target.iterdir()) == []


def test_a_folder_of_another_run_is_refused(tmp_path):
    check_folder(tmp_path, {"seed": 0})
    check_folder(tmp_path, {"seed": 0})
    with pytest.raises(ValueError, match="other settings"):
        check_folder(tmp_path, {"seed": 1})


def test_a_full_disk_is_said_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    with pytest.raises(OSError, match="free some space"):
        check_folder(tmp_path / "run", {})


def test_a_killed_quickstart_takes_its_trainings_with_it():
    if sys.platform != "linux":
        pytest.skip("only Linux tells a child of its parent's death")
    child = "import time; time.sleep(60)"
    parent = (
        "import subprocess, sys, time; from recipes.quickstart import _die_with_parent\n"
        f"print(subprocess.Popen([sys.executable, '-c', {child!r}], preexec_fn=_die_with_parent).pid, flush=True)\n"
        "time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    pid = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.wait()
    for _ in range(100):
        if not _is_running(pid):
            return
        time.sleep(0.05)
    pytest.fail("the training outlived the quickstart")


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_the_whole_story_on_tiny_random_models(tmp_path, whisper_dir, llm_dir):
    settings = yaml.safe_load((quickstart.CONFIGS / "quickstart.yaml").read_text())
    settings |= {"audio": str(whisper_dir), "text": str(llm_dir), "qformer_hidden": 16, "qformer_heads": 2}
    settings |= {"train_clips": 40, "validation_clips": 2, "test_clips": 12, "question_clips": 3}
    settings |= {"control_clips": 3, "bias_clips": 9, "max_new_tokens": 4, "following_steps": 2}
    run = Quickstart(tmp_path, settings, seed=0, steps=2)
    run.stages.run("corpus", run.speak)
    run.stages.run("base", run.compose)
    run.stages.run("self_powered", lambda folder: _answer_at_once(run, folder))
    report = run.run()

    assert report == json.loads((tmp_path / "report.json").read_text())
    assert report["steps"] == {"vanilla": 2, "self_powered": 2}
    for name in ("vanilla", "self_powered", "shuffled"):
        assert {"following", "transcript_copy", "wer", "tasks"} <= set(report[name])
    assert {"following", "tasks"} <= set(report["text_llm"])
    for name in ("text_llm", "vanilla", "self_powered"):
        bias = json.loads((tmp_path / "bias" / name / "bias.json").read_text())
        assert bias["following"] == report[name]["following"]
        assert [sum(layer.values()) for layer in bias["layers"]] == pytest.approx([1.0] * 2, abs=1e-4)
    import pandas

    answers = pandas.read_parquet(tmp_path / "predictions.parquet")
    controls = {"shuffled", "silence", "swapped"}
    assert (
        set(answers["model"]) == {"text_llm", "cascade", "vanilla", "self_powered", "self_powered_reading"} | controls
    )
    assert {"id", "model", "task", "instruction", "transcript", "response", "correct"} <= set(answers.columns)
    assert all(
        (tmp_path / name).stat().st_size
        for name in ("report.md", "report.html", "following.png", "training.png", "layers.svg", "example.wav")
    )
    model = AutoModel.from_pretrained(tmp_path / "checkpoint", trust_remote_code=True)
    assert model.config.responder["model"] == llm_dir.name
    AutoProcessor.from_pretrained(tmp_path / "checkpoint", trust_remote_code=True)


def _answer_at_once(run: Quickstart, folder: Path) -> None:
    """The random LLM's answers never end, so all would be dropped; these end."""
    from dataset_builders.exchange import Reply
    from dataset_builders.responders import LocalResponder

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalResponder, "respond", lambda self, requests: [Reply("So be it.")] * len(requests))
        run.answer(folder)


def test_the_table_has_a_row_per_model_and_leaves_out_what_was_not_measured():
    text = table({"text_llm": {"following": 0.5, "tasks": {}, "wer": 0.25}})
    assert "| 50.0 % | – | – | 25.0 % |" in text
    assert "vanilla" not in text
    assert percent(None) == "–"
