"""The quickstart: its stages are atomic and resumable, and end with a report."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from transformers import AutoModel, AutoProcessor

from dataset_builders.files import append_lines
from dataset_builders.nano.tasks import UNSEEN_TASKS
from recipes import quickstart as command
from recipes.nano import quickstart
from recipes.nano.quickstart import CONFIGS, LiveTable, Quickstart, Stages, check_folder, run_trainings
from recipes.nano.report import COMPARED, LABELS, table
from recipes.reporting.markdown import percent
from recipes.training.callbacks import FOLLOWING, LOG


def test_a_failed_stage_leaves_no_complete_folder(tmp_path):
    def fail(folder: Path):
        folder.mkdir()
        (folder / "half").touch()
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        Stages(tmp_path).run("corpus", fail)
    assert not (tmp_path / "corpus").exists()
    target = Stages(tmp_path).run("corpus", lambda folder: folder.mkdir())
    assert list(target.iterdir()) == []


def test_a_complete_stage_is_not_repeated(tmp_path):
    Stages(tmp_path).run("corpus", lambda folder: folder.mkdir())
    Stages(tmp_path).run("corpus", lambda folder: pytest.fail("made twice"))


def test_a_stage_that_was_killed_before_its_record_is_repeated(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "from whom?").touch()
    target = Stages(tmp_path).run("corpus", lambda folder: folder.mkdir())
    assert list(target.iterdir()) == []


def test_a_folder_of_another_run_is_refused(tmp_path):
    check_folder(tmp_path, {"seed": 0})
    check_folder(tmp_path, {"seed": 0})
    with pytest.raises(ValueError, match="other settings"):
        check_folder(tmp_path, {"seed": 1})


def test_a_full_disk_is_an_error_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    with pytest.raises(OSError, match="free some space"):
        check_folder(tmp_path / "run", {})


def test_the_whole_story_on_tiny_random_models(tmp_path, whisper_dir, llm_dir):
    settings = yaml.safe_load((quickstart.CONFIGS / "quickstart.yaml").read_text())
    settings |= {"audio": str(whisper_dir), "text": str(llm_dir), "qformer_hidden": 16, "qformer_heads": 2}
    settings["window_frames"] = 1  # each piece, which is almost each letter, needs a window
    settings |= {"train_clips": 40, "validation_clips": 2, "test_clips": 12, "unseen_clips": 6}
    settings |= {"control_clips": 3, "bias_clips": 9, "max_new_tokens": 4, "following_steps": 2}
    run = Quickstart(tmp_path, settings, seed=0, steps=2)
    run.stages.run("corpus", run.speak)
    run.stages.run("base", run.compose)
    run.stages.run("self_powered", lambda folder: _answer_at_once(run, folder))
    report = run.run()

    assert report == json.loads((tmp_path / "report.json").read_text())
    assert report["steps"] == {"self_powered": 2, "alignment": 2, "paper": 2, "vanilla": 2}
    for name in LABELS:
        fields = {"following", "following_interval", "transcript_copy", "wer", "tasks"}
        assert fields == set(report[name]) == set(report["vanilla"])
    assert set(report["unseen"]) == set(COMPARED)
    for name, share in report["unseen"].items():
        assert 0 <= share <= 1
        assert report["unseen_tasks"][name]["right"] == share
    for name in ("text_llm", "vanilla", "paper", "self_powered"):
        bias = json.loads((tmp_path / "bias" / name / "bias.json").read_text())
        assert bias["following"] == report[name]["following"]
        assert [sum(layer.values()) for layer in bias["layers"]] == pytest.approx([1.0] * 2, abs=1e-4)
    import pandas

    answers = pandas.read_parquet(tmp_path / "predictions.parquet")
    assert set(answers["model"]) == set(LABELS)
    never = answers[answers["task"].isin(UNSEEN_TASKS)]
    assert set(never["model"]) == set(LABELS)
    for name in COMPARED:
        shares = never[never["model"] == name].groupby("task")["correct"].mean()
        assert report["unseen"][name] == pytest.approx(shares.mean(), abs=1e-6)
    assert {"id", "model", "task", "instruction", "transcript", "response", "correct"} <= set(answers.columns)
    assert all(
        (tmp_path / name).stat().st_size
        for name in ("report.md", "report.html", "following.png", "training.png", "layers.svg", "example.wav")
    )
    model = AutoModel.from_pretrained(tmp_path / "checkpoint", trust_remote_code=True)
    assert model.config.responder["model"] == llm_dir.name
    AutoProcessor.from_pretrained(tmp_path / "checkpoint", trust_remote_code=True)


def _answer_at_once(run: Quickstart, folder: Path) -> None:
    """Answer at once with texts that end. The answers of a random LLM never end, so all would be dropped."""
    from dataset_builders.responders.exchange import Reply
    from dataset_builders.responders.local import LocalResponder

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalResponder, "respond", lambda self, requests: [Reply("So be it.")] * len(requests))
        run.answer(folder)


def test_trainings_run_in_order_and_as_many_at_a_time_as_there_are_cores(tmp_path):
    processes, beside = [], []

    def start(name):
        beside.append(sum(process.poll() is None for process in processes))
        processes.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.3)"]))
        return processes[-1]

    run_trainings(start, 2, LiveTable(tmp_path, dict.fromkeys(["longest", "second", "third", "fourth"], 1)))
    assert len(processes) == 4
    assert max(beside) == 1


def test_the_live_table_shows_scores_once_and_counts_the_steps_of_an_alignment(tmp_path, capsys):
    live = LiveTable(tmp_path, {"ours": 5})
    live.show()  # no log exists yet
    append_lines(tmp_path / "ours" / "alignment" / LOG, [{"step": 2, "max_steps": 2, "reading_wer": 0.5}])
    live.show()
    append_lines(tmp_path / "ours" / LOG, [{"step": 1, "max_steps": 3}])
    append_lines(tmp_path / "ours" / FOLLOWING, [{"step": 1, "following": 0.75, "wer": 0.1}])
    live.show()
    assert (live.bars["ours"].n, live.bars["ours"].total) == (3, 5)
    live.close()
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert [" ".join(line) for line in lines] == [
        "step 2 ours, alignment reading_wer 50.0 %",
        "step 1 ours following 75.0 % wer 10.0 %",
    ]


def test_a_training_that_fails_says_where_and_stops_the_others(tmp_path):
    running = {}

    def start(name):
        code = "import time; time.sleep(60)" if name == "other" else "import sys; sys.exit('no memory')"
        with open(tmp_path / f"{name}.log", "w") as log:
            running[name] = subprocess.Popen([sys.executable, "-c", code], stderr=log)
        return running[name]

    with pytest.raises(RuntimeError, match=r"training mine failed \(exit 1, .*mine.log\):\nno memory"):
        run_trainings(start, 2, LiveTable(tmp_path, {"other": 1, "mine": 1}))
    assert running["other"].wait() != 0


def test_the_table_has_a_row_per_model_and_dashes_for_missing_figures():
    text = table({"text_llm": {"following": 0.5, "tasks": {}, "wer": 0.25}})
    assert "| 50.0 % | – | – | – | – | 25.0 % |" in text
    assert "vanilla" not in text
    assert percent(None) == "–"


def test_a_study_is_no_quickstart_and_the_error_names_its_command(tmp_path, monkeypatch, capsys):
    config = CONFIGS / "quickstart_real.yaml"
    monkeypatch.setattr(sys, "argv", ["quickstart", "--config", str(config), "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        command.main()
    assert f"is a study: run python -m recipes.study --config {config}" in " ".join(capsys.readouterr().err.split())
