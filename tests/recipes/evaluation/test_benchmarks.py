"""VoiceBench, Speech-IFEval and Big Bench Audio in their published layouts, and the judge of some of their tasks."""

import json

import pyarrow.parquet as pq
import pytest
import yaml
from corpus_files import clip, json_lines, parquet, write
from huggingface_hub import parse_eval_result_entries
from misbehaving_server import MisbehavingServer

from dataset_builders.responders.exchange import Reply
from recipes import evaluate
from recipes.evaluation import evaluation as evaluation_module
from recipes.evaluation.evaluation import Evaluation
from recipes.evaluation.questions import read_rows
from recipes.evaluation.tasks import choose_tasks, load_tasks, override

TASKS = load_tasks()
KEY = "sk-of-the-judge"


def rows_of(name, place, **settings):
    return read_rows(override(TASKS[name], {"corpus": str(place), **settings}))


# Layouts


def voicebench(folder, config, **splits):
    """A configuration of hlt-lab/voicebench as the Hub has it, with its card; every row has a clip of its own."""
    for split, rows in splits.items():
        rows = [{"audio": clip(seed)} | row for seed, row in enumerate(rows)]
        parquet(folder / config, *rows, name=f"{split}-00000-of-00001.parquet")
    files = "".join(f"  - split: {split}\n    path: {config}/{split}-*\n" for split in splits)
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{files}---\n")
    return folder


@pytest.mark.parametrize("name", ["alpacaeval", "commoneval", "wildvoice", "advbench"])
def test_voicebench_sends_the_clip_alone(tmp_path, name):
    place = voicebench(tmp_path, TASKS[name].data.config, test=[{"prompt": "How is it?"}, {"prompt": "Why?"}])
    rows = rows_of(name, place)
    assert [(row.instruction, row.transcript, row.references) for row in rows] == [
        ("", "How is it?", []),
        ("", "Why?", []),
    ]
    assert {row.kind for row in rows} == {"refusal" if name == "advbench" else "rating"}


def test_references_of_voicebench_are_those_of_its_columns(tmp_path):
    place = voicebench(tmp_path, "sd-qa", usa=[{"prompt": "Who?", "reference": "Ada"}])
    assert rows_of("sd_qa", place)[0].references == ["Ada"]
    bbh = [{"prompt": "?", "reference": text, "id": f"{n}"} for n, text in enumerate(("(A)", "no", "Yes"))]
    assert [row.references for row in rows_of("bbh", voicebench(tmp_path, "bbh", test=bbh))] == [["A"], ["no"], ["yes"]]
    kwargs = [{"num_words": None, "relation": None}, {"num_words": 9, "relation": "at least"}]
    row = {
        "key": 1,
        "prompt": "Write.",
        "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
    }
    other = {
        "key": 2,
        "prompt": "Ecrivez.",
        "instruction_id_list": ["language:response_language"],
        "kwargs": kwargs[:1],
    }
    rows = rows_of("ifeval", voicebench(tmp_path, "ifeval", test=[row | {"kwargs": kwargs}, other]))
    assert len(rows) == 1  # nobody checks the other
    assert [json.loads(text) for text in rows[0].references] == [
        {"id": "punctuation:no_comma"},
        {"id": "length_constraints:number_words", "num_words": 9, "relation": "at least"},
    ]


def test_subjects_of_mmsu_are_splits_and_one_task(tmp_path):
    subjects = TASKS["mmsu"].data.split.split("+")
    splits = {subject: [{"prompt": subject, "reference": "ABCD"[n % 4]}] * 2 for n, subject in enumerate(subjects)}
    rows = rows_of("mmsu", voicebench(tmp_path, "mmsu", **splits))
    assert [row.transcript for row in rows] == [subject for subject in subjects for _ in range(2)]
    assert [row.references for row in rows[:6]] == [["A"], ["A"], ["B"], ["B"], ["C"], ["C"]]
    assert len({row.id for row in rows}) == 24


def test_big_bench_audio_has_four_kinds_of_short_answers_and_no_transcripts(tmp_path):
    answers = ["invalid", "Yes", "18", "No"]
    lines = [
        {"category": "x", "official_answer": text, "file_name": f"data/question_{n}.wav", "id": n}
        for n, text in enumerate(answers)
    ]
    clips = {f"data/question_{n}.wav": clip(n) for n in range(4)}
    place = write(tmp_path, {"metadata.jsonl": json_lines(*lines), **clips})
    rows = rows_of("big_bench_audio", place, **{"columns.audio": "file_name"})
    assert [row.references for row in rows] == [["invalid"], ["yes"], ["18"], ["no"]]
    assert {(row.instruction, row.transcript) for row in rows} == {("", "")}
    judged = rows_of("big_bench_audio_judged", place, **{"columns.audio": "file_name"})
    assert [row.references for row in judged] == [[text] for text in answers]


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("alpacaeval", {"text": "How?"}, "'prompt'"),
        ("sd_qa", {"prompt": "Who?"}, "no column 'reference'; there are"),
        ("bbh", {"prompt": "Who?", "reference": "perhaps"}, "'perhaps' is no short answer; expected a whole number or"),
        ("ifeval", {"prompt": "Write."}, "expected the columns"),
    ],
)
def test_a_corpus_in_another_layout_is_refused(tmp_path, name, row, message):
    task = TASKS[name]
    with pytest.raises(ValueError, match=rf"task '{name}'.*{message}"):
        rows_of(name, voicebench(tmp_path, task.data.config, **{task.data.split: [row]}))


SPOKEN = {"audio_filepath": "MMAU/a.wav", "textual_audio": "[00:00:00 - 00:00:01] so(Gender: Male, Emotion: sad)"}


def speech_ifeval(folder):
    """The three files of data/eval_data/ with audios/ beside them, two rows in each."""
    ways = {
        "closed_ended_questions": (
            "Who?\nUse capital letters.",
            {"instruction_id_list": ["change_case:english_capital"]},
        ),
        "creative_writing": ("Write.\nUse no comma.", {"instruction_id_list": ["punctuation:no_comma"]}),
        "chain-of-thought": ("Who?\nThink step by step.", {}),
    }
    files = {f"audios/MMAU/{name}.wav": clip(seed) for seed, name in enumerate("ab")}
    for name, (instruction, more) in ways.items():
        more = more and more | {"kwargs": [{}], "dataset": "MMAU"}
        lines = [
            SPOKEN
            | {"instruction": instruction, "audio_filepath": f"MMAU/{clip}.wav"}
            | more
            | ({"id": clip} if more else {})
            for clip in "ab"
        ]
        files[f"eval_data/{name}.jsonl"] = json_lines(*lines)
    return write(folder, files)


def chosen(names, **places):
    return [override(task, {"corpus": str(places[task.name])}) for task in choose_tasks(names, TASKS)]


def speech_ifeval_tasks(folder):
    files = ("closed_ended_questions", "creative_writing", "chain-of-thought")
    names = ("speech_ifeval_closed", "speech_ifeval_creative", "speech_ifeval_reasoning")
    places = {name: folder / "eval_data" / f"{file}.jsonl" for name, file in zip(names, files, strict=True)}
    return chosen("speech_ifeval", **places)


def test_speech_ifeval_as_its_repository_has_it(tmp_path):
    closed, _, reasoning = map(read_rows, speech_ifeval_tasks(speech_ifeval(tmp_path)))
    assert (closed[0].instruction, closed[0].transcript) == ("Who? Use capital letters.", SPOKEN["textual_audio"])
    assert json.loads(closed[0].references[0]) == {"id": "change_case:english_capital"}
    assert [row.id for row in reasoning] == [
        f"speech_ifeval_reasoning/test/MMAU/{n}/speech_ifeval_reasoning" for n in "ab"
    ]
    assert reasoning[0].references == []


# The judge


class Speaker:
    """A checkpoint that says its own name to everything, and counts what it was asked."""

    asked = 0

    def __init__(self, path, dtype="auto"):
        self.path = path

    def respond(self, rows, slot, store=None, **settings):
        Speaker.asked += len(rows)
        return [Reply(self.path) for _ in rows]

    def log_likelihoods(self, rows, *_):
        return [(None, None)] * len(rows)


@pytest.fixture(autouse=True)
def speaker(monkeypatch):
    monkeypatch.setattr(Speaker, "asked", 0)
    monkeypatch.setattr(evaluation_module, "load", Speaker)
    monkeypatch.setattr(evaluation_module.pages, "draw", lambda *_: [])
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-server")


def judged_by(answer, behaviours=(), models=("judge",)):
    return MisbehavingServer(behaviours, models, answer=answer)


PROMPTS = [f"Question {number}?" for number in range(6)]


@pytest.fixture
def evaluation(tmp_path):
    """`evaluation(server)`: one of the model's answers to six questions of alpacaeval, in the test's one folder."""
    place = voicebench(tmp_path, "alpacaeval_full", test=[{"prompt": prompt} for prompt in PROMPTS])

    def run(server, **judge):
        settings = {"systems": ["model"], "batch_size": 1, "judge": {"url": server.url, **judge}}
        return Evaluation(
            tmp_path / "out", {"model": "Hello {}."}, chosen("alpacaeval", alpacaeval=place), **settings
        ).run()

    return run


def rating(prompt):
    """What the judge replies: numbers for three questions, and nothing that can be read for the others."""
    number = next(number for number, text in enumerate(PROMPTS) if text in prompt)
    return ("5", "Score: 2/5", "2 or 3", "Good.", "", "2.")[number]


def predictions(folder):
    return pq.read_table(folder / "predictions.parquet").to_pylist()


def test_a_judge_rates_the_answers_and_its_replies_are_kept(evaluation, tmp_path):
    with judged_by(rating) as server:
        found = evaluation(server)
    figures = found["tasks"]["alpacaeval"]["systems"]["model"]["figures"]
    assert (figures["rating"]["value"], figures["unparsed"]["value"]) == (3.0, 0.5)
    assert {row["transcript"]: row["judgement"] for row in predictions(tmp_path / "out")} == {
        prompt: rating(prompt).strip() for prompt in PROMPTS
    }
    assert {row["correct"] for row in predictions(tmp_path / "out")} == {None}
    for body in server.bodies:
        assert (body["model"], body["temperature"]) == ("judge", 0.0)
        assert "Hello {}." in body["prompt"] and "{response}" not in body["prompt"]
    assert set(server.keys) == {f"Bearer {KEY}"}
    assert found["judge"] == {"model": "judge", "url": server.url}
    assert "Some answers are judged by judge." in (tmp_path / "out" / "results.md").read_text()


def test_verdicts_are_reused_from_the_same_judge_alone(evaluation, tmp_path):
    with judged_by(rating, models=("judge", "other")) as server:
        first = evaluation(server, name="judge")
        assert (evaluation(server, name="judge"), len(server.bodies)) == (first, 6)
        again = evaluation(server, name="other")
        assert [body["model"] for body in server.bodies] == ["judge"] * 6 + ["other"] * 6
        assert again["judge"]["model"] == "other"
        assert (evaluation(server, name="judge"), len(server.bodies)) == (first, 12)
    with judged_by(lambda prompt: "1") as elsewhere:
        found = evaluation(elsewhere)
    assert found["tasks"]["alpacaeval"]["systems"]["model"]["figures"]["rating"]["value"] == 1.0
    assert Speaker.asked == 6  # nobody judges other answers


def test_a_judge_that_stops_midway_goes_on_where_it_stopped(evaluation, tmp_path):
    stops = [True]
    first_chunk = PROMPTS[:4]

    def behaviour(number, body):
        return "400" if stops and not any(prompt in body["prompt"] for prompt in first_chunk) else "ok"

    with judged_by(rating, behaviour) as server:
        with pytest.raises(ValueError, match="refuses a request"):
            evaluation(server)
        assert not (tmp_path / "out" / "results.json").exists()
        stops.clear()
        found = evaluation(server)
    assert all(sum(prompt in body["prompt"] for body in server.bodies) == 1 for prompt in first_chunk)
    assert found["tasks"]["alpacaeval"]["systems"]["model"]["rows"] == Speaker.asked == 6


@pytest.mark.parametrize(
    ("behaviour", "error", "message"),
    [
        ("401", ValueError, "refuses a request: .*wrong key"),
        ("no JSON", ConnectionError, "sends '<html>.*no chat completion"),
        ("no choices", ConnectionError, "no chat completion"),
        ("empty choices", ConnectionError, "no chat completion"),
        ("no text", ConnectionError, "no chat completion"),
    ],
)
def test_a_judge_that_does_not_judge_ends_the_run_without_a_verdict(evaluation, tmp_path, behaviour, error, message):
    with judged_by(rating, lambda number, body: behaviour) as server, pytest.raises(error, match=message) as raised:
        evaluation(server)
    assert not (tmp_path / "out" / "judgements").exists()
    assert KEY not in str(raised.value)
    assert not [file for file in (tmp_path / "out").rglob("*") if file.is_file() and KEY.encode() in file.read_bytes()]


def test_a_judge_that_is_not_there_is_noticed_before_anybody_answers(evaluation):
    with judged_by(rating) as server:
        pass
    with pytest.raises(ConnectionError, match="cannot be reached"):
        evaluation(server)
    with (
        judged_by(rating, models=("one", "two")) as server,
        pytest.raises(ValueError, match="one of them with --judge-model"),
    ):
        evaluation(server)
    assert Speaker.asked == 0


def test_without_a_judge_such_a_task_is_refused(monkeypatch, tmp_path):
    arguments = ["--model", "mine", "--tasks", "voicebench", "--output", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["evaluate", *arguments])
    judged = "alpacaeval, commoneval, wildvoice, sd_qa"
    with pytest.raises(ValueError, match=f"judges the answers to {judged}: name .* with --judge URL"):
        evaluate.main()


def test_a_verdict_is_asked_with_the_right_answer(tmp_path):
    row = {"prompt": "Who wrote it?", "reference": "Ada"}
    place = voicebench(tmp_path, "sd-qa", usa=[row, row | {"reference": "Bob"}])
    with judged_by(lambda prompt: "Yes" if "[Right answer]\nAda" in prompt else "Result: NO") as server:
        settings = {"systems": ["model"], "judge": {"url": server.url}}
        found = Evaluation(tmp_path / "out", {"model": "Ada."}, chosen("sd_qa", sd_qa=place), **settings).run()
    figures = found["tasks"]["sd_qa"]["systems"]["model"]["figures"]
    assert (figures["accuracy"]["value"], figures["unparsed"]["value"]) == (0.5, 0.0)
    assert [row["correct"] for row in predictions(tmp_path / "out")] == [True, False]
    assert all("Who wrote it?" in body["prompt"] and "[Answer]\nAda." in body["prompt"] for body in server.bodies)


def test_the_mean_of_speech_ifeval_is_its_ifrate_and_its_change_is_the_forgetting_rate(tmp_path):
    """The model satisfies two of the three, the text LLM all: capital letters, no comma, and steps."""
    tasks = speech_ifeval_tasks(speech_ifeval(tmp_path))
    with judged_by(lambda prompt: "Yes") as server:
        settings = {"systems": ["model", "text_llm"], "judge": {"url": server.url}}
        found = Evaluation(tmp_path / "out", {"model": "Well.", "base": "WELL."}, tasks, **settings).run()
    suite = found["suites"]["speech_ifeval"]
    assert suite["tasks"] == ["speech_ifeval_closed", "speech_ifeval_creative", "speech_ifeval_reasoning"]
    assert suite["systems"]["text_llm"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert suite["systems"]["model"]["value"] == pytest.approx(2 / 3, abs=1e-6)
    assert suite["comparisons"]["forgetting"]["value"] == pytest.approx(-1 / 3, abs=1e-6)
    text = (tmp_path / "out" / "results.md").read_text()
    assert "| speech_ifeval | -33.3 % (-33.3 to -33.3) |" in text
    assert "| suite ↑ | 100.0 % (100.0–100.0) | 66.7 % (66.7–66.7) |" in text


# What the Hub reads


def results_of(tmp_path, monkeypatch, *options):
    """The files of `.eval_results/` of a run on sd_qa, whose corpus is on the Hub for all that the run knows."""
    place = voicebench(tmp_path / "local", "sd-qa", usa=[{"prompt": "Who?", "reference": "Ada"}])
    rows = rows_of("sd_qa", place)
    monkeypatch.setattr(evaluation_module, "read_rows", lambda task, limit, *_: rows[:limit])
    with judged_by(lambda prompt: "Yes") as server:
        arguments = ["--model", "Ada", "--tasks", "sd_qa", "--judge", server.url, "--output", str(tmp_path / "out")]
        monkeypatch.setattr("sys.argv", ["evaluate", *arguments, "--systems", "model", *options])
        evaluate.main()
    return {file.name: yaml.safe_load(file.read_text()) for file in (tmp_path / "out").glob(".eval_results/*")}


def test_the_hubs_own_library_reads_the_results(tmp_path, monkeypatch, capsys):
    files = results_of(tmp_path, monkeypatch)
    assert list(files) == ["sd_qa.yaml"]
    (entry,) = parse_eval_result_entries(files["sd_qa.yaml"])
    assert (entry.dataset_id, entry.task_id, entry.value) == ("hlt-lab/voicebench", "sd-qa", 100.0)
    assert entry.notes == "accuracy in per cent, split usa, judged by judge, 1 rows"
    assert entry.dataset_revision is None


@pytest.mark.parametrize("option", [("--limit", "1"), ("--data", "sd_qa={corpus}")])
def test_a_part_of_a_benchmark_or_a_corpus_of_ones_own_is_no_result_for_the_hub(tmp_path, monkeypatch, capsys, option):
    files = results_of(tmp_path, monkeypatch, *(text.format(corpus=tmp_path / "local") for text in option))
    assert files == {}
    assert (tmp_path / "out" / "model_index.yaml").is_file()
