"""The whole bias analysis, from a checkpoint and data to numbers, figures and a page."""

import json
import os
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from recipes import analyze_bias
from recipes.bias import saliency
from recipes.bias.analysis import FIGURES, analyze, behave, bootstrap
from recipes.bias.roles import ROLES, teacher_forced
from recipes.evaluation.following import BY_FORM

ROOT = Path(__file__).parents[3]


def run(monkeypatch, model, data, output, *options) -> dict:
    settings = ["--split", "train", "--max-new-tokens", "6", "--batch-size", "3"]
    words = ["--model", model, "--data", data, "--output", output, *settings, *options]
    monkeypatch.setattr(sys, "argv", ["analyze_bias", *map(str, words)])
    analyze_bias.main()
    return json.loads((Path(output) / "bias.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def analyzed(checkpoints, set_dir, tmp_path_factory):
    """Return `analyzed(name, slot)`, which gives the folder and the bias.json of a run on the self-powered set."""

    @cache
    def make(name: str, slot: str) -> tuple[Path, dict]:
        output = tmp_path_factory.mktemp("bias") / name
        with pytest.MonkeyPatch.context() as patch:
            return output, run(patch, checkpoints[name], set_dir, output, "--slot", slot)

    return make


def check(bias: dict, layers: int, rows: int = 8) -> None:
    """Check what readers of a bias.json rely on."""
    assert bias["rows"] == rows and bias["tokens"].keys() == set(ROLES)
    for figure in FIGURES:
        assert len(bias[figure]) == len(bias["intervals"][figure]) == layers
        for means, bounds in zip(bias[figure], bias["intervals"][figure], strict=True):
            assert means.keys() == bounds.keys() == {"instruction", "speech", "template", "response", "first"}
            for role, (low, high) in bounds.items():
                assert low - 1e-6 <= means[role] <= high + 1e-6
            if figure != "per_token":
                assert sum(means.values()) == pytest.approx(1, abs=1e-5)
    for name in ("following", "transcript_copy"):
        assert bias[name] is None or 0 <= bias[name] <= 1


# The whole command

RUNS = {("lsm", "audio"): 2, ("lsm", "transcript"): 2, ("text", "transcript"): 2, ("qwen2_audio", "audio"): 3}


@pytest.mark.parametrize(("name", "slot"), RUNS)
def test_a_run_writes_numbers_pictures_and_a_page(analyzed, checkpoints, set_dir, name, slot):
    output, bias = analyzed(name, slot)
    check(bias, RUNS[name, slot])
    assert bias["following"] is not None and bias["checker"] == BY_FORM
    about = {"model": checkpoints[name].name, "data": str(set_dir), "source": "noise/train", "hear": slot}
    assert about.items() <= bias.items() and bias["target"] == "response"
    pictures = ["layers", "composition"] + ["similarity"] * (slot == "audio")
    written = {f"{picture}.{kind}" for picture in pictures for kind in ("png", "svg")}
    assert {path.name for path in output.iterdir()} == written | {"bias.json", "report.html"}
    page = (output / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == len(pictures) and checkpoints[name].name in page


def test_speech_is_compared_with_text_only_where_both_are_read(analyzed):
    heard, read = analyzed("lsm", "audio")[1], analyzed("lsm", "transcript")[1]
    assert heard["similarity"]["levels"] == ["input", "layer 1", "layer 2"]
    assert read["similarity"] is None


def test_an_lsm_that_reads_is_its_text_llm(analyzed):
    """The LLM is the same, and so are the prompts."""
    lsm, text = analyzed("lsm", "transcript")[1], analyzed("text", "transcript")[1]
    for figure in FIGURES:
        for one, other in zip(lsm[figure], text[figure], strict=True):
            assert one == pytest.approx(other, abs=1e-4)
    assert (lsm["following"], lsm["tokens"]) == (text["following"], text["tokens"])


def test_other_models_are_drawn_in_the_same_figure(analyzed, checkpoints, set_dir, tmp_path, monkeypatch):
    beside = f"text LLM={analyzed('text', 'transcript')[0] / 'bias.json'}"
    bias = run(
        monkeypatch, checkpoints["text"], set_dir, tmp_path, "--slot", "transcript", "--label", "vanilla",
        "--beside", beside, f"a=b={beside.partition('=')[2]}", "--limit", "3",
    )  # fmt: skip
    check(bias, 2, rows=3)
    drawn, page = ((tmp_path / file).read_text(encoding="utf-8") for file in ("layers.svg", "report.html"))
    for label in ("text LLM", "a=b", "vanilla"):
        assert label in drawn and label in page
    assert "text LLM" not in (tmp_path / "composition.svg").read_text(encoding="utf-8")


def test_a_corpus_is_answered_from_the_transcripts(checkpoints, corpus_dir, tmp_path, monkeypatch):
    bias = run(monkeypatch, checkpoints["lsm"], corpus_dir, tmp_path, "--limit", "4")
    check(bias, 2, rows=4)
    assert bias["similarity"] is None  # four rows are too few
    own = run(monkeypatch, checkpoints["lsm"], corpus_dir, tmp_path, "--limit", "4", "--target", "own")
    check(own, 2, rows=4)
    assert own["target"] == "own" and own["layers"] != bias["layers"]


GRANITE = """
import sys
from pathlib import Path

from peers import write_granite_speech

from recipes import analyze_bias
from recipes.listening.speech_llm import GraniteSpeech, load

model, data, output = sys.argv[1:]
llm = load(write_granite_speech(Path(model)))
assert type(llm) is GraniteSpeech, type(llm)
row = {"instruction": "Go on.", "transcript": "what"}
assert llm.prompt(row).count("<|audio|>Go on.") == 1
assert llm.prompt(row, "transcript").count("Go on.\\nwhat") == 1
assert [role for _, role in llm.spans(row, "audio")].count("speech") == 1
options = ["--split", "train", "--max-new-tokens", "4", "--batch-size", "3"]
sys.argv = ["analyze_bias", "--model", model, "--data", data, "--output", output, *options]
analyze_bias.main()
"""


def test_granite_speech_in_a_process_of_its_own(set_dir, tmp_path):
    """Without torchaudio, a stand-in must be importable before transformers is imported."""
    paths = os.pathsep.join(map(str, (ROOT / "tests" / "stand_ins", ROOT / "tests", ROOT)))
    command = [sys.executable, "-c", GRANITE, *map(str, (tmp_path / "model", set_dir, tmp_path / "bias"))]
    settings = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    bias = json.loads((tmp_path / "bias" / "bias.json").read_text(encoding="utf-8"))
    check(bias, 3)
    assert len(bias["similarity"]["levels"]) == 4
    assert (tmp_path / "bias" / "report.html").is_file()


@pytest.mark.parametrize("entry", ["text LLM", "text LLM=missing.json"])
def test_a_bias_json_that_cannot_be_drawn_is_refused_at_once(set_dir, tmp_path, monkeypatch, capsys, entry):
    with pytest.raises(SystemExit):
        run(monkeypatch, "no model", set_dir, tmp_path, "--beside", entry)
    assert f"--beside '{entry}': expected LABEL=FILE" in capsys.readouterr().err


def test_data_without_rows_is_refused_before_a_model_is_opened(set_dir, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"has no row of \['question_who'\]"):
        run(monkeypatch, "no model", set_dir, tmp_path, "--tasks", "question_who")
    assert not list(tmp_path.iterdir())


def test_a_text_llm_with_the_slot_audio_is_refused(checkpoints, set_dir, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="is a text LLM"):
        run(monkeypatch, checkpoints["text"], set_dir, tmp_path)


# Means and intervals


def test_figures_are_means_over_the_rows_whatever_the_batches(open_llm, answered):
    llm = open_llm("lsm")
    alone = [saliency.measure(llm, teacher_forced(llm, [row]))[0] for row in answered]
    for batch_size in (1, 3):
        found = analyze(llm, answered, batch_size=batch_size)
        assert found["rows"] == 4
        for figure in FIGURES:
            for layer, means in enumerate(found[figure]):
                expected = {role: np.mean([row[layer][figure][role] for row in alone]) for role in ROLES}
                assert means == pytest.approx(expected, abs=1e-5)


def test_tokens_are_counted_by_role_without_padding(open_llm, answered):
    llm = open_llm("text")
    found = analyze(llm, answered, "transcript", batch_size=2)
    roles = [role for row in answered for role in teacher_forced(llm, [row], "transcript").roles[0].tolist()]
    expected = {ROLES[role]: number / 4 for role, number in Counter(roles).items()}
    assert found["tokens"] == pytest.approx(expected, abs=0.005)
    assert found["tokens"]["first"] == 1


def test_whether_to_compare_can_be_said(open_llm, answered):
    assert analyze(open_llm("lsm"), answered)["similarity"] is None
    assert analyze(open_llm("lsm"), [*answered, *answered])["similarity"] is not None
    assert analyze(open_llm("lsm"), [*answered, *answered], compare=False)["similarity"] is None


def test_intervals_are_those_of_means_of_resampled_rows():
    values = np.random.default_rng(0).normal(3, 2, (400, 2, 3))
    low, high = bootstrap(values)
    error = 1.96 * values.std(0) / 400**0.5
    np.testing.assert_allclose(low, values.mean(0) - error, atol=0.03)
    np.testing.assert_allclose(high, values.mean(0) + error, atol=0.03)
    assert all(np.array_equal(*pair) for pair in zip(bootstrap(values), (low, high), strict=True))


def test_the_interval_of_one_row_is_its_value():
    values = np.arange(6.0).reshape(1, 2, 3)
    for bound in bootstrap(values):
        np.testing.assert_allclose(bound, values[0])


# Behaviour

SPOKEN = "the farmer proudly repaired the old clock in the attic"
HELD = {"id": "u", "task": "intent", "instruction": "Do.", "transcript": SPOKEN}


@pytest.mark.parametrize("checker", ["dataset_builders.nano.tasks", BY_FORM])
def test_answers_are_judged_by_the_checker_that_is_named(checker):
    found = behave([HELD, HELD], ["The intent is repair.", SPOKEN], checker)
    assert found == {"following": 0.5, "transcript_copy": 0.5, "checker": checker}


def test_without_a_checker_the_form_of_the_answer_is_judged():
    assert behave([HELD], ["The intent is to cook."]) == {"following": 1.0, "transcript_copy": 0.0, "checker": BY_FORM}
    by_oracle = behave([HELD], ["The intent is to cook."], "dataset_builders.nano.tasks")
    assert by_oracle["following"] == 0.0


def test_figures_that_no_row_measures_are_none():
    assert behave([HELD | {"task": "repetition"}], ["So."])["transcript_copy"] is None


def test_a_checker_without_is_correct_is_refused():
    with pytest.raises(ValueError, match="json has no is_correct"):
        behave([HELD], ["x"], "json")
