"""A study: rows are overrides of a base, what they have in common is made once, and one table holds them all."""

import argparse
import importlib
import json
import sys
from pathlib import Path

import pytest
import yaml
from trl import ModelConfig, TrlParser

from recipes import align
from recipes import study as command
from recipes.studies import stages, study
from recipes.studies.stages import Stage
from recipes.studies.study import Job, cell, jobs_of, metrics_of, overrides, read, record_of, summary
from recipes.training.arguments import LsmScriptArguments, LsmTrainingArguments

CONFIG = Path(study.__file__).parents[1] / "configs" / "study.yaml"
REAL = CONFIG.with_name("quickstart_real.yaml")


def metric(value, spread=0.1):
    return {"value": value, "low": value - spread, "high": value + spread}


def results(following=0.9, questions=0.8, wer=0.02, text_llm=1.0) -> dict:
    """`results.json` as `recipes.evaluate` writes it, as far as a study reads it."""

    def system(figure, value, **parts):
        figures = {figure: metric(value), "transcript_copy": metric(0.1)}
        return {"figures": figures, "parts": {kind: {"figures": scored} for kind, scored in parts.items()}}

    transcription = {"wer": metric(wer, 0.01), "right": metric(0.5)}
    heard = system("following", following, intent={"right": metric(0.95)}, transcription=transcription)
    nano = {"model": heard, "text_llm": system("following", text_llm), "silence": system("following", 0.06)}
    unseen = {"model": system("right", questions, who={"right": metric(0.7)}), "text_llm": system("right", 0.99)}
    tasks = {
        "nano": {"systems": nano, "comparisons": {"text_kept": metric(-0.003, 0.002)}},
        "nano_unseen": {"systems": unseen, "comparisons": {}},
    }
    return {"tasks": tasks}


def test_agreement_stands_in_where_nobody_knows_what_is_right():
    def system(chrf):
        figures = {"agreement": {"value": chrf, "low": chrf - 1, "high": chrf + 1}}
        return {"figures": figures | {"transcript_copy": metric(0.1)}}

    task = {"systems": {"model": system(62.0), "model_reading": system(97.0)}, "comparisons": {}}
    figures = metrics_of(task, task)
    assert figures["trained"] == {"value": 0.62, "low": 0.61, "high": 0.63}
    assert figures["text_kept"]["value"] == pytest.approx(-0.03)


@pytest.fixture
def job(tmp_path) -> Job:
    """A row that is whole: its evaluation, its training and its bias."""
    found = {key: Stage(f"{key}-0", (), ()) for key in ("corpus", "sft", "evaluate", "bias")}
    for stage in found.values():
        (tmp_path / stage.name).mkdir()
    (tmp_path / "evaluate-0" / "results.json").write_text(json.dumps(results()))
    looks = [{"step": 50, "following": 0.4}, {"step": 100, "following": 0.91}, {"step": 150, "following": 0.95}]
    (tmp_path / "sft-0" / "following.jsonl").write_text("".join(json.dumps(look) + "\n" for look in looks))
    (tmp_path / "sft-0" / "log.jsonl").touch()
    layers = [{"instruction": 0.2, "speech": 0.5, "template": 0.3}, {"instruction": 0.4, "speech": 0.1}]
    (tmp_path / "bias-0" / "bias.json").write_text(json.dumps({"layers": layers}))
    (tmp_path / "seconds.json").write_text(json.dumps({"corpus-0": 50, "sft-0": 120.5, "evaluate-0": 30}))
    return Job("ours", 0, found)


# Rows

ROWS = {
    "ours": None,
    "paper": {"sft": {"llm": "full", "objective": "response"}, "also": ["bias"], "seeds": [0, 1]},
    "vanilla": {"of": "paper", "sft": {"tasks": ["transcription"], "llm": "lora"}},
    "noisy": {"of": "ours", "noise": {"run": "python -m speak"}},
}


def test_a_row_changes_what_it_says_and_takes_the_rest_from_the_row_it_is_of():
    assert overrides(ROWS, "ours") == {}
    paper = {"llm": "full", "objective": "response"}
    assert overrides(ROWS, "paper") == {"sft": paper, "also": ["bias"]}
    assert overrides(ROWS, "vanilla") == {"sft": {**paper, "llm": "lora", "tasks": ["transcription"]}, "also": ["bias"]}
    assert overrides(ROWS, "noisy") == {"noise": {"run": "python -m speak"}}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"a": {"of": "b"}}, "no row 'b'; the rows are a"),
        ({"a": {"of": "b"}, "b": {"of": "a"}}, "a → b → a name each other in `of`"),
    ],
)
def test_rows_of_no_row_or_of_each_other_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        overrides(rows, "a")


def test_a_configuration_with_other_keys_is_refused(tmp_path):
    (tmp_path / "study.yaml").write_text("base: {}\nrow: {}\n")
    with pytest.raises(ValueError, match=r"has base, row; expected the keys base, rows, seeds, trained, unseen"):
        read(tmp_path / "study.yaml")


def test_values_are_named_in_the_configuration_and_replaced_on_the_command_line(tmp_path):
    content = {**STUDY, "values": {"llm": "hub/llm", "clips": 400}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
    assert read(tmp_path / "study.yaml")["values"] == {"llm": "hub/llm", "clips": 400}
    assert read(tmp_path / "study.yaml", {"llm": "here"})["values"] == {"llm": "here", "clips": 400}
    with pytest.raises(ValueError, match=r"has no value 'lm'; its values are clips, llm"):
        read(tmp_path / "study.yaml", {"lm": "here"})
    base = {**BASE, "compose": {"run": "python -m compose", "text": "{llm}", "seed": "{seed}"}}
    jobs = jobs_of({**content, "base": base}, ["ours"], (), Path("out"))
    assert jobs[0].stages["compose"].command[3:7] == ("--text", "hub/llm", "--seed", "0")
    with pytest.raises(ValueError, match="'compose' is the name of a stage and of a value"):
        jobs_of({**content, "values": {"compose": "x"}}, ["ours"], (), Path("out"))


BASE = {
    "compose": {"run": "python -m compose", "seed": "{seed}"},
    "sft": {"run": "python -m sft", "model": "{compose}"},
    "evaluate": {"run": "python -m evaluate", "model": "{sft}"},
    "bias": {"run": "python -m bias", "model": "{sft}"},
}
STUDY = {"base": BASE, "rows": ROWS, "seeds": [0], "trained": "nano", "unseen": "nano_unseen", "values": {}}


def test_the_first_seed_of_all_rows_comes_before_the_second_of_any():
    order = [(job.row, job.seed) for job in jobs_of(STUDY, (), (), Path("out"))]
    assert order == [("ours", 0), ("paper", 0), ("vanilla", 0), ("noisy", 0), ("paper", 1)]
    order = [(job.row, job.seed) for job in jobs_of(STUDY, ["vanilla", "ours"], [3, 1], Path("out"))]
    assert order == [("vanilla", 3), ("ours", 3), ("vanilla", 1), ("ours", 1)]


def test_a_row_needs_its_evaluation_and_what_it_wants_besides_and_shares_what_is_the_same():
    ours, paper, *_ = jobs_of(STUDY, (), (), Path("out"))
    assert list(ours.stages) == ["compose", "sft", "evaluate"]
    assert list(paper.stages) == ["compose", "sft", "evaluate", "bias"]
    assert ours.stages["compose"] == paper.stages["compose"]
    assert ours.stages["sft"] != paper.stages["sft"]


def test_a_row_that_cannot_be_planned_is_named():
    rows = {"odd": {"evaluate": {"model": "{adapt}"}}}
    with pytest.raises(ValueError, match=r"row 'odd': {adapt} in evaluate is not a stage"):
        jobs_of({**STUDY, "rows": rows}, (), (), Path("out"))


# The configurations that come with the package


def configured_commands() -> dict[str, tuple[str, ...]]:
    """One command for each set of options that the stages have; outputs and inputs count for nothing."""
    found: dict[str, tuple[str, ...]] = {}
    jobs = [job for config in (CONFIG, REAL) for job in jobs_of(read(config), (), [0], Path("out"))]
    for job in jobs:
        for stage in job.stages.values():
            found[" ".join(word for word in stage.command if not word.startswith("out/"))] = stage.command
    return found


@pytest.mark.parametrize("command", configured_commands().values(), ids=lambda command: command[2])
def test_every_option_of_the_study_is_known_to_its_recipe(command, monkeypatch):
    python, dash_m, module, *words = command
    assert (python, dash_m) == ("python", "-m")
    if module in ("recipes.sft", "recipes.align"):
        script = LsmScriptArguments if module == "recipes.sft" else align.AlignArguments
        arguments = TrlParser((script, LsmTrainingArguments, ModelConfig)).parse_args_and_config(words)
        if module == "recipes.align":
            align.refuse_without_effect(*arguments)
        return

    class ParsedError(Exception):
        pass

    def parse(parser, args=None, namespace=None, known=argparse.ArgumentParser.parse_args):
        known(parser, args, namespace)
        raise ParsedError

    monkeypatch.setattr(sys, "argv", [module, *words])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    with pytest.raises(ParsedError):
        importlib.import_module(module).main()


def test_the_study_of_real_checkpoints_has_nothing_of_nano_and_encodes_and_answers_once():
    assert "nano" not in REAL.read_text()
    jobs = {job.row: job.stages for job in jobs_of(read(REAL), (), (), Path("out"))}
    assert len({(stages["features"], stages["base"]) for stages in jobs.values()}) == 1
    assert jobs["ours"]["set"] == jobs["paper"]["set"] == jobs["vanilla"]["set"]
    assert jobs["ours"]["align"] == jobs["aligned"]["align"] and "align" not in jobs["paper"]


def test_the_nano_study_makes_what_its_rows_have_in_common_once():
    jobs = {(job.row, job.seed): job.stages for job in jobs_of(read(CONFIG), (), (), Path("out"))}
    assert {seed for row, seed in jobs if row == "align_distill_frozen"} == {0, 1, 2}
    ours, paper = jobs["align_distill_frozen", 0], jobs["paper_full", 0]
    assert all(ours[key] == paper[key] for key in ("corpus", "features", "set"))
    assert ours["compose"] != paper["compose"]  # a plain map
    assert "align" not in paper and "sft" not in jobs["align_alone", 0]
    for row in ("window_17", "audio_first", "tasks_1", "queries_2"):  # of the encoder and the clips alone
        assert jobs[row, 0]["features"] == ours["features"]
    assert jobs["tasks_1", 0]["align"] == jobs["align_alone", 0]["align"] == ours["align"]
    assert jobs["window_17", 0]["set"] == ours["set"] != jobs["audio_first", 0]["set"]
    assert jobs["noise_10", 0]["sft"] == ours["sft"] != jobs["align_distill_frozen", 1]["sft"]


# Figures


def test_the_figures_of_a_row_are_those_of_its_evaluation_training_and_bias(job, tmp_path):
    record = record_of(job, tmp_path, "nano", "nano_unseen")
    expected = {"name": "ours", "seed": 0, "trained": 0.9, "unseen": 0.8, "text_kept": -0.003, "wer": 0.02}
    expected |= {"steps": 100, "seconds": 120.5, "copies": 0.1, "silence": 0.06, "shuffled": None, "text_llm": 1.0}
    assert {name: record[name] for name in expected} == expected
    assert (record["unseen_text_llm"], record["cascade"], record["cascade_wer"]) == (0.99, None, None)
    assert record["instruction_share"] == pytest.approx(0.3) and record["speech_share"] == pytest.approx(0.3)
    assert record["intervals"]["trained"] == pytest.approx([0.8, 1.0])
    assert record["parts"] == {"intent": 0.95, "transcription": 0.5, "who": 0.7}
    assert record["layers"] == [{"instruction": 0.2, "speech": 0.5}, {"instruction": 0.4, "speech": 0.1}]
    assert record["folders"]["sft"] == "sft-0"


@pytest.mark.parametrize("text_llm", [1.0, 0.0])
def test_steps_that_never_came_to_90_per_cent_are_none(job, tmp_path, text_llm):
    (tmp_path / "evaluate-0" / "results.json").write_text(json.dumps(results(text_llm=text_llm)))
    (tmp_path / "sft-0" / "following.jsonl").write_text('{"step": 50, "following": 0.89}\n')
    assert record_of(job, tmp_path, "nano", "nano_unseen")["steps"] is None


def test_a_row_without_training_has_no_steps_and_took_no_time(job, tmp_path):
    untrained = Job("alone", 0, {key: stage for key, stage in job.stages.items() if key in ("corpus", "evaluate")})
    record = record_of(untrained, tmp_path, "nano", "nano_unseen")
    assert (record["steps"], record["seconds"], record["layers"]) == (None, 0, [])


def test_a_task_that_was_not_evaluated_is_named(job, tmp_path):
    with pytest.raises(ValueError, match="no task 'nano_questions'; it has nano, nano_unseen"):
        record_of(job, tmp_path, "nano", "nano_questions")


# The table


def records(*rows):
    return [{"trained": a, "steps": b, "intervals": {"trained": [a - 0.1, a + 0.1]}} for a, b in rows]


def test_seeds_are_averaged_and_the_interval_goes_from_the_lowest_end_to_the_highest():
    some = records((0.5, 100), (0.7, 300))
    assert summary(some, "trained") == pytest.approx({"value": 0.6, "low": 0.4, "high": 0.8, "seeds": 2})
    assert cell(some, "trained") == "60.0 % (40.0 to 80.0)"
    assert cell(some, "steps") == "200 (100 to 300)"


def test_one_seed_has_its_own_interval_and_what_was_not_measured_is_a_dash():
    assert cell(records((0.5, 100)), "trained") == "50.0 % (40.0 to 60.0)"
    assert cell(records((0.5, 100)), "steps") == "100"
    assert cell(records((0.5, None)), "steps") == "–"
    assert cell(records((0.5, 100), (0.5, None)), "steps") == "100, 1 of 2"


# All of it, with recipes that take no time

RECIPE = """
import json, pathlib, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if options.get("--llm") == "broken":
    sys.exit("no such llm")
folder = pathlib.Path(options["--output"])
folder.mkdir(exist_ok=True)
(folder / "results.json").write_text(options.get("--write", ""))
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Writes a configuration with these rows, and the arguments to run it."""
    monkeypatch.setattr(command.signal, "signal", lambda *args: None)
    (tmp_path / "recipe.py").write_text(RECIPE)
    run = {"run": f"python {tmp_path / 'recipe.py'}"}
    base = {"sft": run, "evaluate": run | {"model": "{sft}", "write": json.dumps(results()), "seed": "{seed}"}}

    def write(rows: dict, *more: str) -> None:
        content = {**STUDY, "base": base, "rows": rows}
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        arguments = ["--config", str(tmp_path / "study.yaml"), "--output", str(tmp_path / "out"), *more]
        monkeypatch.setattr(sys, "argv", ["study", *arguments])

    return write


def run_study(folder: Path) -> tuple[int, dict, str]:
    with pytest.raises(SystemExit) as ended:
        command.main()
    return ended.value.code, json.loads((folder / "study.json").read_text()), (folder / "study.md").read_text()


def test_a_row_that_fails_is_told_and_the_others_go_on(config, tmp_path, capsys):
    better = json.dumps(results(following=0.97))
    rows = {"broken": {"sft": {"llm": "broken"}}, "ours": None, "better": {"evaluate": {"write": better}}}
    config(rows, "--seeds", "0", "1", "--workers", "2")
    code, found, table = run_study(tmp_path / "out")
    assert code == 1
    assert [(row["name"], row["seed"], row["trained"]) for row in found["rows"]] == [
        ("ours", 0, 0.9),
        ("better", 0, 0.97),
        ("ours", 1, 0.9),
        ("better", 1, 0.97),
    ]
    assert {"unseen", "text_kept", "wer", "steps"} <= set(found["rows"][0])
    assert list(found["failed"]) == ["broken, seed 0", "broken, seed 1"]
    assert "| better | 97.0 % (87.0 to 107.0) | 80.0 % (70.0 to 90.0) | -0.3 % (-0.5 to -0.1) |" in table
    assert "**broken, seed 0 failed.**" in table and "no such llm" in table
    assert "failed: broken, seed 0; broken, seed 1" in capsys.readouterr().out
    assert (tmp_path / "out" / "study.png").stat().st_size and (tmp_path / "out" / "study.svg").stat().st_size


def test_the_same_command_makes_nothing_again_and_a_changed_row_leaves_the_old_folders_alone(config, tmp_path):
    config({"ours": None})
    run_study(tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*-*")}
    code, found, _ = run_study(tmp_path / "out")
    assert code == 0 and len(found["rows"]) == 1
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*-*")} == before

    config({"ours": {"sft": {"llm": "full"}}})
    run_study(tmp_path / "out")
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*-*")}
    assert {path: after[path] for path in before} == before
    assert sorted(path.name.partition("-")[0] for path in after.keys() - before.keys() if path.is_dir()) == [
        "evaluate",
        "sft",
    ]


def test_rows_that_were_made_before_stay_in_the_table_of_one_row(config, tmp_path):
    rows = {"ours": None, "theirs": {"sft": {"llm": "full"}}}
    config(rows)
    run_study(tmp_path / "out")
    config({**rows, "more": {"sft": {"llm": "lora"}}}, "--rows", "more")
    _, found, _ = run_study(tmp_path / "out")
    assert [row["name"] for row in found["rows"]] == ["ours", "theirs", "more"]


def test_the_table_is_there_as_soon_as_one_row_is_whole(config, tmp_path, monkeypatch):
    config({"ours": None, "theirs": {"sft": {"llm": "full"}}}, "--workers", "1")
    seen, real = [], study.write
    monkeypatch.setattr(study, "write", lambda config, rows, *more: (seen.append(len(rows)), real(config, rows, *more)))
    run_study(tmp_path / "out")
    assert seen == [1, 2]


def test_a_second_study_in_the_same_folder_is_refused(config, tmp_path):
    config({"ours": None})
    with stages.alone_in(tmp_path / "out"), pytest.raises(ValueError, match="another process is using"):
        command.main()


def test_a_row_that_stands_twice_is_refused(tmp_path):
    (tmp_path / "study.yaml").write_text("rows:\n  vanilla: {}\n  vanilla: {of: other}\n")
    with pytest.raises(ValueError, match="duplicate key 'vanilla'"):
        read(tmp_path / "study.yaml")
