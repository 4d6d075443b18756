"""The evaluation as one command: who is given what, what is written, and that a killed run goes on."""

import collections
import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from tiny_tokenizer import THINKING_TEMPLATE
from transformers import AutoTokenizer, GenerationMixin

from dataset_builders.instructions import SELF_POWERED_TASKS, TRANSCRIPTION, load_pool
from dataset_builders.nano.tasks import POOL_PATH, answers
from dataset_builders.responders.exchange import Reply
from modeling_lsm import LsmForConditionalGeneration
from processing_lsm import load_audio
from recipes import evaluate
from recipes.evaluate import parse_overrides
from recipes.evaluation import evaluation as evaluation_module
from recipes.evaluation.answers import FEATURES
from recipes.evaluation.evaluation import Evaluation
from recipes.evaluation.questions import read_rows
from recipes.evaluation.systems import SYSTEMS
from recipes.evaluation.tasks import load_tasks, override
from recipes.listening.features import AudioFeatureStore
from recipes.listening.speech_llm import Lsm, SpeechLLM

ROOT = Path(__file__).parents[3]
TASKS = load_tasks()
TASK_OF = {wording: task.name for task in load_pool(POOL_PATH).values() for wording in (*task.seen, *task.held_out)}
AUDIO_SYSTEMS = ("model", "shuffled", "silence")


@pytest.fixture(scope="session")
def nano(corpus_dir):
    """`nano(name)`: a task about eight clips of noise with sentences of the nano language."""
    return lambda name: override(TASKS[name], {"corpus": str(corpus_dir), "split": "train"})


@pytest.fixture(scope="session")
def heard(nano):
    """What is said in each clip, by its bytes."""
    return {row.audio["bytes"]: row.transcript for row in read_rows(nano("nano_asr"))}


def command(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["evaluate", *map(str, arguments)])
    evaluate.main()


def predictions(folder):
    return pq.read_table(folder / "predictions.parquet").to_pylist()


def figure(found, task, system, name):
    return found["tasks"][task]["systems"][system]["figures"][name]["value"]


# Everything at once, with real models


@pytest.fixture(scope="module")
def whole(lsm_dir, llm_dir, corpus_dir, tmp_path_factory):
    """The folder of one run of the command over two tasks and all systems, each in a few words."""
    folder = tmp_path_factory.mktemp("evaluation") / "out"
    checkpoints = ["--model", lsm_dir, "--base", llm_dir, "--vanilla", lsm_dir, "--paper", lsm_dir]
    data = [f"{task}{setting}" for task in ("nano", "nano_unseen") for setting in (f"={corpus_dir}", ".split=train")]
    amount = ["--limit", 4, "--control-limit", 2, "--max-new-tokens", 3, "--batch-size", 4]
    with pytest.MonkeyPatch.context() as patch:
        command(patch, *checkpoints, "--tasks", "nano", "nano_unseen", "--data", *data, *amount, "--output", folder)
    return folder


def test_a_run_leaves_answers_figures_a_card_and_a_page(whole):
    assert {file.name for file in whole.iterdir()} == {
        "answers",
        "model_index.yaml",
        *(f"{task}.{kind}" for task in ("nano", "nano_unseen") for kind in ("png", "svg")),
        "predictions.parquet",
        "report.html",
        "results.json",
        "results.md",
        "settings.json",
    }
    assert {file.stem for file in (whole / "answers" / "nano").iterdir()} == {*SYSTEMS, "asr"}


def test_every_system_answered_every_question(whole):
    found = json.loads((whole / "results.json").read_text())
    assert list(found["systems"]) == list(SYSTEMS)
    tasks = found["tasks"].items()
    counts = {name: {key: one["rows"] for key, one in task["systems"].items()} for name, task in tasks}
    controls = [name for name, system in SYSTEMS.items() if system.is_control]
    assert counts["nano"] == dict.fromkeys(SYSTEMS, 8) | dict.fromkeys(controls, 4)
    assert counts["nano_unseen"] == dict.fromkeys(SYSTEMS, 4) | dict.fromkeys(controls, 2)


def test_predictions_hold_every_answer_and_what_was_asked(whole, nano):
    rows = {row.id: row for name in ("nano", "nano_unseen") for row in read_rows(nano(name), limit=4)}
    records = predictions(whole)
    assert list(records[0]) == list(FEATURES)
    assert len(records) == 6 * 12 + 3 * 6
    for record in records:
        row = rows[record["id"]]
        assert (record["part"], record["transcript"]) == (row.task, row.transcript)
        assert record["references"] == row.references
        assert (record["instruction"] == row.instruction) == (record["system"] != "swapped")
    said = {record["response"] for record in records if record["system"] == "model"}
    assert len(said) > 1


def test_closed_questions_are_also_answered_among_the_allowed_answers(whole):
    closed = [record for record in predictions(whole) if record["constrained"] is not None]
    assert {record["part"] for record in closed} <= {"intent", "sentiment"}
    assert {record["part"] for record in predictions(whole)} & {"intent", "sentiment"} == {r["part"] for r in closed}
    for record in closed:
        assert record["constrained"].startswith(f"The {record['part']} is ")


def test_the_card_and_the_tables_are_of_these_figures(whole, lsm_dir):
    found = json.loads((whole / "results.json").read_text())
    index = yaml.safe_load((whole / "model_index.yaml").read_text())["model-index"]
    metrics = {metric["name"]: metric["value"] for result in index[0]["results"] for metric in result["metrics"]}
    assert metrics["nano: following"] == figure(found, "nano", "model", "following")
    text = (whole / "results.md").read_text()
    assert f"# {lsm_dir}" in text and "## nano_unseen" in text
    assert all(f"| {name} |" in text for name in SYSTEMS)


# What a system is given


@pytest.fixture
def given(nano, lsm_dir, llm_dir, tmp_path, monkeypatch):
    """`given(system)`: for every row of three clips, by its id, the row and what the model's `generate` gets."""
    settings = {"batch_size": 1, "constrained": False}
    checkpoints = {"model": str(lsm_dir), "base": str(llm_dir), "vanilla": str(lsm_dir), "paper": str(lsm_dir)}
    task = nano("nano")
    evaluation = Evaluation(tmp_path / "out", checkpoints, [task], **settings)
    taken, asked = [], []
    inputs_of = Lsm.inputs

    def inputs(self, rows, *arguments):
        asked.extend((self.name, row) for row in rows)
        return inputs_of(self, rows, *arguments)

    def generate(self, **inputs):
        """Ends at once, and says what the tokenizer has for the first token of the prompt: nothing."""
        taken.append(inputs | {"text": None})
        return torch.cat([inputs["input_ids"], inputs["input_ids"][:, :1]], dim=1)

    monkeypatch.setattr(Lsm, "inputs", inputs)
    for model in (GenerationMixin, LsmForConditionalGeneration):
        monkeypatch.setattr(model, "generate", generate)

    def run(name, system=None):
        taken.clear(), asked.clear()
        evaluation.ask(task, system or SYSTEMS[name], read_rows(task, limit=3))
        return {(who, row["id"]): (row, inputs) for (who, row), inputs in zip(asked, taken, strict=True)}

    return run


def test_the_text_llm_reads_the_transcript(given, processor, llm_dir):
    seen = given("text_llm")
    assert len(seen) == 6
    for (who, _), (row, inputs) in seen.items():
        assert who == llm_dir.name
        assert "input_features" not in inputs
        text = processor.tokenizer.decode(inputs["input_ids"][0])
        assert row["transcript"] in text and row["instruction"] in text


def test_the_text_llm_is_asked_with_the_models_template_settings(llm_dir, whisper_dir, compose_tiny, nano, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(llm_dir)
    tokenizer.chat_template = THINKING_TEMPLATE
    tokenizer.save_pretrained(shutil.copytree(llm_dir, tmp_path / "llm"))
    wish = {"enable_thinking": True}
    compose_tiny(str(whisper_dir), str(tmp_path / "llm"), str(tmp_path / "lsm"), template_settings=wish)
    checkpoints = {"model": tmp_path / "lsm", "base": tmp_path / "llm"}
    evaluation = Evaluation(tmp_path / "out", checkpoints, [nano("nano")])
    row = {"instruction": "Say it.", "transcript": "hello"}
    prompts = {evaluation.llm(name).prompt(row, "transcript") for name in checkpoints}
    assert prompts == {"<|im_start|>user\nSay it.\nhello</s>\n<|im_start|>assistant\n"}


def test_the_model_reads_as_the_text_llm_does(given, lsm_dir):
    reading, text = given("model_reading"), given("text_llm")
    ids = {id: inputs["input_ids"].tolist() for (_, id), (_, inputs) in text.items()}
    assert {who for who, _ in reading} == {lsm_dir.name}
    assert {id: inputs["input_ids"].tolist() for (_, id), (_, inputs) in reading.items()} == ids


def test_the_model_hears_the_clip_and_reads_no_transcript(given, processor):
    for row, inputs in given("model").values():
        own = processor.audio_features([load_audio(row["audio"])])["input_features"]
        assert torch.equal(inputs["input_features"], torch.from_numpy(own))
        text = processor.tokenizer.decode(inputs["input_ids"][0])
        assert row["instruction"] in text and row["transcript"] not in text


@pytest.mark.parametrize("name", ["vanilla", "paper"])
def test_the_lsms_beside_the_model_are_given_what_it_is_given(given, name):
    model, other = given("model"), given(name)
    assert set(model) == set(other)
    for key, (row, inputs) in model.items():
        assert other[key][0] == row
        assert torch.equal(other[key][1]["input_features"], inputs["input_features"])


def test_audio_shuffled_and_silence_differ_in_the_clip_alone(given, processor):
    seen = {name: given(name) for name in AUDIO_SYSTEMS}
    clips = {row["audio"]["bytes"] for row, _ in seen["model"].values()}
    for key, (row, _) in seen["model"].items():
        for name in ("shuffled", "silence"):
            assert {**seen[name][key][0], "audio": None} == {**row, "audio": None}
        other = seen["shuffled"][key][0]["audio"]
        assert other["bytes"] != row["audio"]["bytes"] and other["bytes"] in clips
        heard = {name: seen[name][key][1]["input_features"] for name in AUDIO_SYSTEMS}
        expected = [load_audio(row["audio"]), load_audio(other), np.zeros_like(load_audio(row["audio"]))]
        for name, clip in zip(AUDIO_SYSTEMS, expected, strict=True):
            assert torch.equal(heard[name], torch.from_numpy(processor.audio_features([clip])["input_features"]))
        texts = {name: prompt_of(seen[name][key][1], processor) for name in AUDIO_SYSTEMS}
        assert len(set(texts.values())) == 1


def prompt_of(inputs, processor):
    """The text of a prompt, without the placeholders, of which there are as many as the clip is long."""
    ids = inputs["input_ids"][0]
    return processor.tokenizer.decode(ids[ids != processor.audio_token_id])


def test_a_swapped_instruction_is_of_another_task_about_the_same_clip(given, processor):
    model, swapped = given("model"), given("swapped")
    for key, (row, inputs) in model.items():
        other, heard = swapped[key]
        assert TASK_OF[other["instruction"]] != row["task"]
        assert other["instruction"] in processor.tokenizer.decode(heard["input_ids"][0])
        assert torch.equal(heard["input_features"], inputs["input_features"])


def test_a_cascade_has_every_clip_transcribed_and_the_text_llm_reads_that(given, lsm_dir, llm_dir, monkeypatch):
    hypothesis = {}

    def generate(self, rows, slot, *_, **__):
        if slot == "audio":
            for row in rows:
                hypothesis[row["utterance"]] = f"heard {row['utterance']}"
                assert TASK_OF[row["instruction"]] == TRANSCRIPTION
            return [Reply(hypothesis[row["utterance"]]) for row in rows]
        assert self.name == llm_dir.name
        assert [row["transcript"] for row in rows] == [hypothesis[row["utterance"]] for row in rows]
        return [Reply("read") for _ in rows]

    monkeypatch.setattr(SpeechLLM, "respond", generate)
    given("cascade")
    assert len(hypothesis) == 3


# What is right, with checkpoints that answer by rule


class Scripted:
    """A checkpoint that knows the nano language: it answers what it hears, and is asked, as its folder's name says.

    `good` does as it is told, `parrot` transcribes whatever it is told, and `drilled` does so unless it is told one of
    the tasks that LSMs are trained on; silence is nothing to any.
    """

    heard = None  # transcripts by clip
    asked = None  # (checkpoint, slot, id) of every row that anybody was asked freely
    closed = None  # (slot, id) of every row with its allowed answers
    until = None  # how many calls may be made before one dies

    def __init__(self, path, dtype="auto"):
        self.path = path

    def respond(self, rows, slot, store=None, allowed=None, **settings):
        if Scripted.until is not None:
            Scripted.until -= 1
            if Scripted.until < 0:
                raise KeyboardInterrupt
        if allowed is not None:
            Scripted.closed += [(slot, row["id"]) for row in rows]
            return [Reply(answers[0]) for answers in allowed]
        Scripted.asked += [(self.path, slot, row["id"], TASK_OF[row["instruction"]]) for row in rows]
        return [Reply(self.say(row, slot)) for row in rows]

    def log_likelihoods(self, rows, slot, store=None, batch_size=16):
        """An answer that it gives itself is likely, and any other is not."""
        own = [self.say(row, slot) == row["response"] for row in rows]
        return [
            (-len(row["response"].split()) * (0.1 if same else 2.0), len(row["response"].split()))
            for row, same in zip(rows, own, strict=True)
        ]

    def say(self, row, slot):
        if slot == "silence":
            return "I hear nothing."
        said = row["transcript"] if slot == "transcript" else self.heard[row["audio"]["bytes"]]
        task = TASK_OF[row["instruction"]]
        if self.path == "parrot" or (self.path == "drilled" and task not in SELF_POWERED_TASKS):
            task = TRANSCRIPTION
        return answers(task, said)[0]


@pytest.fixture
def scripted(heard, monkeypatch):
    monkeypatch.setattr(Scripted, "heard", heard)
    monkeypatch.setattr(Scripted, "asked", [])
    monkeypatch.setattr(Scripted, "closed", [])
    monkeypatch.setattr(evaluation_module, "load", Scripted)
    monkeypatch.setattr(evaluation_module, "load_recogniser", Scripted)
    monkeypatch.setattr(evaluation_module.pages, "draw", lambda *_: [])  # it takes longest
    return Scripted


@pytest.fixture
def evaluation(scripted, nano, tmp_path):
    """`evaluation(task, …)`: one of scripted checkpoints, in the test's one folder."""

    def make(*names, model="good", base="good", vanilla="parrot", paper="drilled", **settings):
        checkpoints = {"model": model, "base": base, "vanilla": vanilla, "paper": paper}
        given = {name: path for name, path in checkpoints.items() if path}
        return Evaluation(tmp_path / "out", given, [nano(name) for name in names or ("nano",)], **settings)

    return make


def test_who_listens_and_obeys_gets_all_right_and_nothing_where_that_is_taken_away(evaluation):
    found = evaluation().run()
    following = {name: figure(found, "nano", name, "following") for name in SYSTEMS}
    obedient = ("text_llm", "cascade", "model", "paper", "model_reading")
    assert {name: following[name] for name in obedient} == dict.fromkeys(obedient, 1.0)
    assert following["vanilla"] == following["silence"] == following["swapped"] == 0.0
    assert following["shuffled"] < 0.5  # the sentiment of another sentence may be the same
    assert figure(found, "nano", "vanilla", "transcript_copy") == 1.0
    assert found["tasks"]["nano"]["comparisons"]["forgetting"]["value"] == 0.0


def test_kinds_that_were_never_trained_tell_who_was_drilled_from_who_does_as_it_is_told(evaluation):
    found = evaluation("nano_unseen", systems=["text_llm", "model", "paper"]).run()
    systems = found["tasks"]["nano_unseen"]["systems"]
    rates = {name: {key: one["value"] for key, one in systems[name]["figures"].items()} for name in systems}
    same = {"agreement": 100.0, "likelihood_lost": 0.0}
    assert rates["text_llm"] == rates["model"] == {"right": 1.0, "transcript_copy": 0.0, **same}
    assert rates["paper"].items() >= {"right": 0.0, "transcript_copy": 1.0}.items()
    assert rates["paper"]["agreement"] < 50
    assert rates["paper"]["likelihood_lost"] == pytest.approx(1.9)


def test_the_figures_are_those_of_the_predictions(evaluation, tmp_path):
    """Whoever reads the answers alone comes to the same figures."""
    found = evaluation(model="good", base="parrot").run()
    records = predictions(tmp_path / "out")
    for system in SYSTEMS:
        mine = [record for record in records if record["system"] == system and record["part"] != TRANSCRIPTION]
        parts = {part: [r["correct"] for r in mine if r["part"] == part] for part in {r["part"] for r in mine}}
        shares = [np.mean(hits) for hits in parts.values()]
        assert figure(found, "nano", system, "following") == pytest.approx(np.mean(shares), abs=1e-6)
        for part, hits in parts.items():
            figures = found["tasks"]["nano"]["systems"][system]["parts"][part]["figures"]
            assert figures["right"]["value"] == pytest.approx(np.mean(hits), abs=1e-6)
    assert {record["correct"] for record in records} == {True, False}


def test_a_cascade_is_as_good_as_what_it_hears(evaluation, scripted, monkeypatch):
    """Every clip sounds the same to this one, so the text LLM answers about that sentence."""
    monkeypatch.setattr(scripted, "heard", dict.fromkeys(scripted.heard, next(iter(scripted.heard.values()))))
    found = evaluation(systems=["cascade", "text_llm"]).run()
    assert figure(found, "nano", "text_llm", "following") == 1.0
    assert 0 < figure(found, "nano", "cascade", "following") < 0.5


def test_a_cascade_transcribes_by_its_asr_alone(evaluation, scripted):
    found = evaluation("nano_asr", systems=["cascade"]).run()
    assert figure(found, "nano_asr", "cascade", "wer") == 0.0
    assert {(slot, task) for _, slot, _, task in scripted.asked} == {("audio", TRANSCRIPTION)}


def test_an_asr_model_of_ones_own_hears_for_the_cascade(scripted, nano, tmp_path):
    checkpoints = {"model": "good", "asr": "parrot"}
    Evaluation(tmp_path / "out", checkpoints, [nano("nano")], ["cascade"]).run()
    assert {(path, slot) for path, slot, *_ in scripted.asked} == {("parrot", "audio"), ("good", "transcript")}


def test_controls_are_asked_about_as_many_clips_as_they_are_granted(evaluation):
    found = evaluation(systems=["model", "shuffled", "silence", "swapped"], control_limit=3).run()
    rows = {name: report["rows"] for name, report in found["tasks"]["nano"]["systems"].items()}
    assert rows == {"model": 16, "shuffled": 6, "silence": 6, "swapped": 6}


def test_without_a_base_the_model_is_its_own_text_llm(evaluation, scripted):
    found = evaluation(base=None, vanilla=None, paper=None).run()
    assert list(found["systems"]) == ["text_llm", "cascade", "model", "shuffled", "silence", "swapped"]
    assert {path for path, *_ in scripted.asked} == {"good"}


def test_who_may_choose_hears_what_it_hears_when_it_answers_freely(evaluation, scripted):
    evaluation("nano_intent", systems=["text_llm", "model", "silence"]).run()
    assert len(scripted.closed) == 3 * 8
    assert sorted(scripted.closed) == sorted((slot, id) for _, slot, id, _ in scripted.asked)


def test_free_answers_alone_may_be_asked_for(evaluation, tmp_path):
    evaluation("nano_intent", systems=["model"], constrained=False).run()
    assert {record["constrained"] for record in predictions(tmp_path / "out")} == {None}


def test_where_nobody_knows_what_is_said_nobody_can_read_it(scripted, corpus_dir, tmp_path, monkeypatch, caplog):
    task = override(TASKS["format"], {"corpus": str(corpus_dir), "split": "train", "columns.transcript": ""})
    monkeypatch.setattr(scripted, "say", lambda self, row, slot: "WELL.")
    monkeypatch.setattr(sys.modules[__name__], "TASK_OF", collections.defaultdict(str))
    found = Evaluation(tmp_path / "out", {"model": "good"}, [task], ["text_llm", "model"]).run()
    assert list(found["tasks"]["format"]["systems"]) == ["model"]
    assert "format has rows without a transcript, so text_llm is left out" in caplog.text
    with pytest.raises(ValueError, match="no system could be asked"):
        Evaluation(tmp_path / "other", {"model": "good"}, [task], ["text_llm"]).run()
    found = Evaluation(tmp_path / "cascade", {"model": "good"}, [task], ["cascade"]).run()
    assert list(found["tasks"]["format"]["systems"]) == ["cascade"]  # it reads what its recogniser heard


# A run that is killed, and one that is added to


def test_a_killed_run_goes_on_where_it_stopped(evaluation, scripted, tmp_path, monkeypatch):
    kept = ("task", "system", "id", "part", "instruction", "response", "constrained", "correct", "finished")

    def answered():
        return [{key: record[key] for key in kept} for record in predictions(tmp_path / "out")]

    settings = {"batch_size": 1, "constrained": False, "systems": ["text_llm", "cascade", "model", "swapped"]}
    for calls in (3, 4, 2):
        monkeypatch.setattr(scripted, "until", calls)
        with pytest.raises(KeyboardInterrupt):
            evaluation(**settings).run()
        assert not (tmp_path / "out" / "results.json").exists()
    monkeypatch.setattr(scripted, "until", None)
    found = evaluation(**settings).run()
    # Every row once by each system; the cascade hears every clip and reads what is no transcription.
    assert len(scripted.asked) == 3 * 16 + 8 + 8
    before, seen = answered(), list(scripted.asked)
    assert evaluation(**settings).run() == found
    assert answered() == before
    assert scripted.asked == seen  # a whole run asks nobody


def test_systems_may_be_added(evaluation, scripted):
    evaluation(systems=["model"]).run()
    asked = len(scripted.asked)
    found = evaluation(systems=["model", "silence"]).run()
    assert list(found["tasks"]["nano"]["systems"]) == ["model", "silence"]
    assert {slot for _, slot, *_ in scripted.asked[asked:]} == {"silence"}


def test_a_checkpoint_may_be_added_with_its_systems(evaluation, scripted):
    evaluation(systems=["model"], vanilla=None).run()
    asked = len(scripted.asked)
    found = evaluation(systems=["model", "vanilla"]).run()
    assert list(found["tasks"]["nano"]["systems"]) == ["model", "vanilla"]
    assert {path for path, *_ in scripted.asked[asked:]} == {"parrot"}
    evaluation(systems=["model"], vanilla=None).run()  # and left out again


def test_tasks_may_be_added(evaluation, scripted):
    evaluation("nano", systems=["model"]).run()
    asked = len(scripted.asked)
    found = evaluation("nano", "nano_intent", systems=["model"]).run()
    assert list(found["tasks"]) == ["nano", "nano_intent"]
    assert len(scripted.asked) == asked + 8
    assert list(evaluation("nano_intent", systems=["model"]).run()["tasks"]) == ["nano_intent"]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"model": "parrot"}, "asr, model"),  # the one is the other if none is named
        ({"base": "parrot"}, "base"),
        ({"limit": 3}, "limit"),
        ({"control_limit": 1}, "control_limit"),
        ({"max_new_tokens": 7}, "max_new_tokens"),
        ({"constrained": False}, "constrained"),
        ({"seed": 1}, "seed"),
        ({"dtype": "float32", "seed": 1}, "seed, dtype"),
    ],
)
def test_answers_given_with_another_setting_are_refused_by_its_name(evaluation, scripted, changes, name):
    evaluation(systems=["model"]).run()
    asked = list(scripted.asked)
    with pytest.raises(ValueError, match=f"out holds answers with another {name} .*: delete it or name another"):
        evaluation(**{"systems": ["model"], **changes}).run()
    assert scripted.asked == asked


def test_a_checkpoint_that_changed_in_place_does_not_go_on_with_the_old_answers(lsm, lsm_dir, nano, tmp_path):
    """Its size and its path are the same; a card or log beside it is no change, and neither is another path."""
    shutil.copytree(lsm_dir, tmp_path / "lsm")
    settings = {"batch_size": 8, "constrained": False, "systems": ["model"], "max_new_tokens": 1}

    def run(folder):
        return Evaluation(tmp_path / "out", {"model": str(folder)}, [nano("nano")], limit=1, **settings).run()

    first = run(tmp_path / "lsm")
    (tmp_path / "lsm" / "README.md").write_text("with scores")
    (tmp_path / "lsm").rename(tmp_path / "moved")
    assert run(tmp_path / "moved")["tasks"] == first["tasks"]
    changed = copy.deepcopy(lsm)
    changed.model.projector.linear.weight.data.zero_()
    changed.save_pretrained(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"out holds answers with another base, asr, model .*: delete it"):
        run(tmp_path / "moved")


def test_a_feature_store_of_another_encoder_is_refused(lsm, lsm_dir, processor, nano, heard, tmp_path):
    other = copy.deepcopy(lsm)
    other.model.audio_tower.conv1.bias.data += 1
    store = AudioFeatureStore.build(
        tmp_path / "features", other, processor, [{"bytes": next(iter(heard)), "path": None}]
    )
    settings = {"constrained": False, "systems": ["model"], "limit": 1, "store": store}
    with pytest.raises(ValueError, match=r"features was built with another model \(encoder"):
        Evaluation(tmp_path / "out", {"model": str(lsm_dir)}, [nano("nano")], **settings).run()


def test_answers_to_another_form_of_a_task_are_refused(evaluation, nano):
    evaluation(systems=["model"]).run()
    run = evaluation(systems=["model"])
    run.tasks = [override(nano("nano"), {"target_language": "fr"})]
    with pytest.raises(ValueError, match="answers with another task nano"):
        run.run()


def test_answers_to_another_pool_are_refused_and_its_place_is_no_matter(evaluation, nano, tmp_path):
    def run(pool):
        run = evaluation(systems=["model"])
        run.tasks = [override(nano("nano"), {"pool": str(pool)})]
        return run.run()

    wordings = POOL_PATH.read_text(encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(wordings, encoding="utf-8")
    first = run(tmp_path / "mine.yaml")
    (tmp_path / "mine.yaml").rename(tmp_path / "moved.yaml")
    assert run(tmp_path / "moved.yaml")["tasks"] == first["tasks"]
    (tmp_path / "moved.yaml").write_text(wordings.replace("Continue from where", "Go on from where"), encoding="utf-8")
    with pytest.raises(ValueError, match="answers with another task nano"):
        run(tmp_path / "moved.yaml")


def test_how_many_are_asked_at_once_is_no_matter(evaluation, scripted):
    evaluation(systems=["model"]).run()
    asked = len(scripted.asked)
    evaluation(systems=["model"], batch_size=3).run()
    assert len(scripted.asked) == asked


# The command line


def test_the_tasks_are_listed(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, "--list")
    assert not stop.value.code
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(TASKS)
    by_name = {line.split()[1]: line for line in lines}
    for name, task in TASKS.items():
        assert by_name[name].startswith(task.group) and by_name[name].endswith(task.description)


def test_tasks_of_ones_own_are_listed_too(monkeypatch, capsys, tmp_path):
    block = {"group": "asr", "kind": "transcription", "description": "My own.", "prompt": "Transcribe."}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"tasks": {"mine": block | {"data": {"corpus": "a.jsonl"}}}}))
    with pytest.raises(SystemExit):
        command(monkeypatch, "--list", "--task-file", tmp_path / "mine.yaml")
    assert "My own." in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [["--output", "out", "--tasks", "nano"], ["--model", "mine", "--output", "out"], ["--tasks", "nano"], []],
)
def test_a_model_tasks_and_a_folder_are_needed(monkeypatch, capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, *arguments)
    assert stop.value.code == 2
    assert "--model, --tasks and --output are needed; --list shows the tasks." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--systems", "modell"], "unknown system 'modell'; there are .*'text_llm', .*'swapped'"),
        (["--systems", "model", "vanilla"], "the system 'vanilla' needs --vanilla"),
        (["--systems", "model", "paper"], "the system 'paper' needs --paper"),
        (["--tasks", "nanno"], "no task or group 'nanno'; there are"),
        (["--data", "nano"], "cannot read --data 'nano'; expected TASK=PATH or TASK.SETTING=VALUE"),
        (["--data", "=clips"], "cannot read --data '=clips'"),
        (["--data", "nanno=clips"], "no task or group 'nanno'; there are"),
        (["--data", "nano.splitt=train"], "task 'nano' has no setting 'splitt'; there are"),
        (["--data", "nano=nowhere.jsonl"], "task 'nano': .*nowhere.jsonl"),
        (["--limit", "0"], "limit=0 must be 1 or more"),
    ],
)
def test_what_cannot_be_is_refused_before_any_checkpoint_is_loaded(
    corpus_dir, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.setattr(evaluation_module, "load", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=message):
        command(monkeypatch, "--model", "mine", "--tasks", "nano", "--output", tmp_path / "out", *arguments)


def test_corpora_and_their_settings_are_given_by_task():
    entries = ["nano=clips=2.jsonl", "nano.split=dev", "asr.columns.audio=wav", "st.config="]
    assert parse_overrides(entries) == {
        "nano": {"corpus": "clips=2.jsonl", "split": "dev"},
        "asr": {"columns.audio": "wav"},
        "st": {"config": ""},
    }


def test_the_command_asks_what_it_is_told_and_prints_the_tables(scripted, corpus_dir, tmp_path, monkeypatch, capsys):
    paths = ["--model", "good", "--vanilla", "parrot", "--output", tmp_path / "out"]
    data = [f"slu={corpus_dir}", "slu.split=train", "nano_intent.prompt=Name the intent of the speech."]
    monkeypatch.setitem(TASK_OF, "Name the intent of the speech.", "intent")
    systems = ["--systems", "model", "vanilla"]
    command(monkeypatch, *paths, "--tasks", "nano_intent", "nano_sentiment", "--data", *data, *systems, "--limit", 3)
    out = capsys.readouterr().out
    assert out == (tmp_path / "out" / "results.md").read_text() + "\n"
    assert "| nano_intent | accuracy ↑ | 100.0 % (100.0–100.0) | 0.0 % (0.0–0.0) |" in out
    asked = {record["instruction"] for record in predictions(tmp_path / "out") if record["task"] == "nano_intent"}
    assert asked == {"Name the intent of the speech."}
    assert len(scripted.asked) == 2 * 2 * 3


# Speech LLMs of transformers


def peer_arguments(model, corpus_dir, output, *systems):
    paths = [
        "--model",
        model,
        "--tasks",
        "nano",
        "--output",
        output,
        "--data",
        f"nano={corpus_dir}",
        "nano.split=train",
    ]
    amount = ["--limit", "2", "--max-new-tokens", "2", "--dtype", "float32"]
    return [*map(str, paths), *amount, *(["--systems", *systems] if systems else [])]


def check_peer(output, systems):
    records = predictions(output)
    answered = {system: [r["response"] for r in records if r["system"] == system] for system in systems}
    assert len(records) == 4 * len(systems)
    found = json.loads((output / "results.json").read_text())
    assert set(found["tasks"]["nano"]["systems"]) == set(systems)
    assert (output / "report.html").read_text().count("<audio") >= 2
    assert answered["model"] != answered["text_llm"]


def test_another_speech_llm_is_evaluated_by_the_same_command(checkpoints, corpus_dir, tmp_path, monkeypatch):
    command(monkeypatch, *peer_arguments(checkpoints["qwen2_audio"], corpus_dir, tmp_path / "out"))
    check_peer(tmp_path / "out", set(SYSTEMS) - {"vanilla", "paper", "model_reading"})


def test_granite_speech_too(corpus_dir, tmp_path):
    """In a process of its own: transformers looks for torchaudio as it starts."""
    model, output, systems = tmp_path / "granite-speech", tmp_path / "out", ("text_llm", "model", "silence")
    program = (
        "import sys; from pathlib import Path; from peers import write_granite_speech; from recipes import evaluate\n"
        "write_granite_speech(Path(sys.argv[2])); evaluate.main()"
    )
    paths = [ROOT / "tests" / "stand_ins", ROOT, ROOT / "tests"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "HF_DATASETS_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program, *peer_arguments(model, corpus_dir, output, *systems)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    check_peer(output, systems)
