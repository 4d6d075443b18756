"""The registry of evaluation tasks: what it holds, what it refuses, how tasks are chosen and changed."""

import math

import pytest
import yaml
from corpus_files import clip, json_lines, write

from dataset_builders.building import draw_rows
from dataset_builders.corpora.opening import load_corpus
from dataset_builders.instructions import SELF_POWERED_TASKS, TRANSCRIPTION, Draw, load_pool
from dataset_builders.nano.tasks import POOL_PATH, UNSEEN_TASKS, answers, is_correct
from recipes.evaluation.constraints import draw_constraint
from recipes.evaluation.kinds import KINDS
from recipes.evaluation.questions import read_rows
from recipes.evaluation.tasks import GROUPS, POOL, choose_tasks, load_tasks, override

TASKS = load_tasks()
PLAIN = {
    "group": "asr",
    "kind": "transcription",
    "description": "Transcribe.",
    "data": {"corpus": "asr.jsonl"},
    "prompt": "Transcribe the speech.",
}


def tasks_file(folder, **tasks):
    path = folder / "tasks.yaml"
    path.write_text(yaml.safe_dump({"tasks": tasks}), encoding="utf-8")
    return path


def load_one(folder, **changes):
    fields = {key: value for key, value in {**PLAIN, **changes}.items() if value != "left out"}
    return load_tasks(tasks_file(folder, mine=fields))["mine"]


# The registry


def test_every_kind_and_group_but_text_has_a_task():
    assert {task.kind for task in TASKS.values()} == {*KINDS, POOL}
    assert {task.group for task in TASKS.values()} == set(GROUPS)


@pytest.mark.parametrize("name", TASKS)
def test_a_preset_fills_its_prompt_and_says_where_its_corpus_is(name):
    task = TASKS[name]
    assert task.data.corpus or "a manifest, a folder" not in task.data.give
    if task.prompt is not None:
        words = {slot: "something" for slot in task.slots}
        assert "{" not in task.prompt.format(**words, labels="a, b", choices="A. a")
    elif task.task is not None:
        assert load_pool(task.pool)[task.task].held_out


def test_a_pool_is_seen_from_the_file_of_tasks_and_from_here_where_it_is_said_here(tmp_path):
    assert load_one(tmp_path).pool is None
    task = load_one(tmp_path, pool="wordings/mine.yaml")
    assert task.pool == str(tmp_path / "wordings" / "mine.yaml")
    assert override(task, {"pool": "other.yaml"}).pool == "other.yaml"
    assert override(task, {"pool": ""}).pool is None


def test_the_nano_tasks_and_no_others_draw_from_the_nano_pool():
    pools = {name: task.pool for name, task in TASKS.items() if task.pool is not None}
    assert set(pools) == {name for name in TASKS if name.startswith("nano")}
    assert set(pools.values()) == {str(POOL_PATH)}


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": "x"}, "unknown key 'prompts'; known: .*'prompt'"),
        ({"kind": "left out"}, "missing key 'kind'; needed are"),
        ({"data": "librispeech"}, "`data` must be a mapping with keys of .*'corpus'"),
        ({"data": {"corpora": "x"}}, "unknown key of `data` 'corpora'; known: .*'corpus'"),
        ({"data": {"columns": {"text": "x"}}}, "unknown column in `data.columns`: 'text'; known: .*'transcript'"),
        (
            {"data": {"columns": {"audio": None}}},
            "`data.columns.audio` must be a text; only the transcript may be null",
        ),
        ({"data": {"columns": {"transcript": None}}}, "transcript` is null, so `data.columns.audio` must be named"),
        ({"data": {"columns": ["audio"]}}, r"`data.columns` must be a mapping from names to columns, got \['audio'\]"),
        ({"data": {"split": True}}, "`data.split` must be a text, got True; quote what YAML"),
        ({"data": {"normalizer": "libri"}}, r"unknown normalizer 'libri'; there are \['plain'"),
        ({"data": {"reader": "libri"}}, "unknown reader 'libri'; there are .*'slurp'"),
        ({"data": {"reader": "fleurs", "config": "en_us"}}, "'fleurs' needs `data.config` and `data.target_config`"),
        ({"language": False}, "`language` must be a text, got False; quote what YAML"),  # `language: no`
        ({"skip_unlabelled": "yes"}, "`skip_unlabelled` must be true or false, got 'yes'"),
        ({"kind": "asr"}, "unknown kind 'asr'; expected one of .*'transcription'"),
        ({"group": "vision"}, "unknown group 'vision'; expected one of .*'asr'"),
        ({"prompt": "left out"}, "missing key 'prompt'; or name a `task` of the instruction pool"),
        ({"prompt": "Do {this}."}, r"nothing fills the slot \{this\} of its prompt; there are \[\]"),
        ({"prompt": "Do {labels}."}, r"nothing fills the slot \{labels\}"),
        ({"prompt": "Do {this."}, "the braces of its prompt 'Do {this.' do not match"),
        ({"slots": {"question": "q"}}, r"its prompt lacks the slot \{question\}"),
        ({"kind": "translation"}, "kind 'translation' needs a `reference`, or `oracle` and `task`"),
        ({"kind": "classification", "reference": "x"}, "kind 'classification' needs `labels`: a list, or `column`"),
        ({"kind": "choice", "reference": "x"}, "kind 'choice' needs `labels`, or `choices`"),
        ({"kind": "translation", "reference": "x"}, "kind 'translation' needs a `target_language`"),
        ({"language": None}, "kind 'transcription' needs a `language`"),
        (
            {"kind": "pool", "prompt": None, "oracle": "a.module", "tasks": ["intent", "translation"]},
            "kind 'translation' needs a `target_language`",
        ),
        ({"kind": "constraints"}, "kind 'constraints' takes no `prompt`: its instructions are drawn"),
        ({"kind": "pool", "prompt": None}, "kind 'pool' needs `tasks`"),
        ({"oracle": "a.module"}, "`oracle` needs `task`, the task whose answers it gives"),
        ({"kind": "oracle"}, "kind 'oracle' needs `oracle` and `task`"),
        (
            {"kind": "keywords", "oracle": "a.module", "task": "intent"},
            "'keywords' is not how 'intent' is scored; that is",
        ),
        ({"answer": "The label."}, "`answer` is 'The label.'; expected a text with {} where the label stands"),
        ({"labels": ["yes", True]}, r"`labels` must be a text or a list of texts, got \['yes', True\]"),
        ({"labels": ["a", "a"]}, "`labels` names one twice"),
        ({"judge": "Is it right?"}, "kind 'transcription' takes no `judge`: its answers are scored by rule"),
        ({"kind": "verdict"}, "kind 'verdict' needs a `judge`, what the judge is asked"),
        ({"kind": "rating", "judge": "Rate {answer}."}, r"nothing fills the slot \{answer\} of its `judge`; there are"),
        ({"pool": ["a.yaml"]}, r"`pool` must be a text, got \['a.yaml'\]"),
    ],
)
def test_a_task_that_cannot_be_is_refused_with_file_and_name(tmp_path, changes, message):
    with pytest.raises(ValueError, match=rf"tasks.yaml: task 'mine': .*{message}"):
        load_one(tmp_path, **changes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("tasks: [", "not valid YAML"),
        ("task: {}", "expected one top-level key `tasks`"),
        ("tasks:\n  a: {}\n  a: {}\n", "not valid YAML: duplicate key 'a'"),
        ("tasks:\n  a: {kind: pool, kind: asr}\n", "not valid YAML: duplicate key 'kind'"),
        ("tasks:\n  a: pool\n", "task 'a': expected a mapping with the keys .*, got 'pool'"),
        ("tasks:\n  asr: {}\n", "task 'asr': expected a name of letters, .* none of .*'asr'"),
        ("tasks:\n  a/b: {}\n", "task 'a/b': expected a name of letters"),
    ],
)
def test_a_file_that_holds_no_tasks_is_refused(tmp_path, content, message):
    write(tmp_path, {"tasks.yaml": content})
    with pytest.raises(ValueError, match=rf"tasks.yaml: {message}"):
        load_tasks(tmp_path / "tasks.yaml")


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="gone.yaml cannot be read as a file of tasks"):
        load_tasks(more=tmp_path / "gone.yaml")


# Tasks of one's own, chosen and changed


def test_tasks_of_ones_own_are_added_or_replace(tmp_path):
    more = tasks_file(tmp_path, mine=PLAIN, boolq={**PLAIN, "description": "Another."})
    tasks = load_tasks(more=more)
    assert list(tasks) == [*TASKS, "mine"]
    assert tasks["boolq"].description == "Another."
    assert tasks["slue_sqa5"] == TASKS["slue_sqa5"]


def test_tasks_are_chosen_by_name_and_by_group_and_none_twice():
    names = [task.name for task in choose_tasks("boolq,librispeech_other asr", TASKS)]
    assert names[:3] == ["boolq", "librispeech_other", "librispeech_clean"]
    assert names[1:] == [names[1], *(n for n, t in TASKS.items() if t.group == "asr" and n != names[1])]
    assert [task.name for task in choose_tasks(["nano", "nano_format, nano"], TASKS)] == ["nano", "nano_format"]
    suite = [task.name for task in choose_tasks("voicebench", TASKS)]
    assert suite == [name for name, task in TASKS.items() if task.suite == "voicebench"] and len(suite) == 9


@pytest.mark.parametrize(
    ("names", "message"), [("boolq libri", "no task or group 'libri'"), (" ,", "no task is named")]
)
def test_what_is_no_task_is_refused_with_those_there_are(names, message):
    with pytest.raises(ValueError, match=rf"{message}; there are \['librispeech_clean', .* groups \['asr', 'st', "):
        choose_tasks(names, TASKS)


def test_a_task_can_be_asked_of_another_corpus():
    task = override(TASKS["librispeech_clean"], {"corpus": "clips/asr.jsonl"})
    assert task.data.corpus == "clips/asr.jsonl"
    assert override(task, {"corpus": TASKS["librispeech_clean"].data.corpus}) == TASKS["librispeech_clean"]


def test_settings_are_changed_one_by_one():
    settings = {"split": "dev", "config": "", "columns.audio": "wav", "language": "fr", "prompt": "Write it down."}
    task = override(TASKS["librispeech_clean"], settings)
    assert (task.data.split, task.data.config, task.language, task.prompt) == ("dev", None, "fr", "Write it down.")
    assert task.data.columns == {"audio": "wav", "transcript": "text", "id": "id"}
    assert override(TASKS["boolq"], {"slots.passage": "context"}).slots == {"passage": "context"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"colums.audio": "wav"}, "task 'boolq' has no setting 'colums.audio'; there are .*'split'.*'columns.audio'"),
        ({"columns": "wav"}, "has no setting 'columns'"),
        ({"normalizer": "libri"}, "task 'boolq' with {'normalizer': 'libri'}: unknown normalizer"),
        ({"prompt": "Do."}, r"its prompt lacks the slot \{passage\}"),
        ({"split": ""}, "`data.split` must be a text, got None"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        override(TASKS["boolq"], settings)


# Rows


def held_out_rows(corpus, tasks, seed):
    """What the quickstart asks: every clip one of the tasks and its transcription, in held-out wordings."""
    draw = Draw(load_pool(POOL_PATH), {**dict.fromkeys(tasks, 1.0), TRANSCRIPTION: math.inf}, 2, seed, "held_out")
    return draw_rows([utterance | {"row": row} for row, utterance in enumerate(corpus)], draw)


@pytest.mark.parametrize("name", ["nano", "nano_unseen"])
@pytest.mark.parametrize("seed", [0, 7])
def test_the_pool_is_asked_as_the_quickstart_asks_it(corpus_dir, name, seed):
    """Its published figures rest on these rows."""
    tasks = SELF_POWERED_TASKS if name == "nano" else UNSEEN_TASKS
    before = held_out_rows(load_corpus(corpus_dir, "train"), tasks, seed)
    if name == "nano_unseen":
        before = [row for row in before if row["task"] in UNSEEN_TASKS]
    rows = read_rows(override(TASKS[name], {"corpus": str(corpus_dir), "split": "train"}), seed=seed)
    same = ("id", "task", "instruction", "transcript", "audio", "source", "duration")
    assert [{key: getattr(row, key) for key in same} for row in rows] == [
        {key: row[key] for key in same} for row in before
    ]
    assert [row.utterance for row in rows] == [row["row"] for row in before]


@pytest.fixture
def nano(corpus_dir):
    """A task about eight clips of noise with sentences of the nano language."""
    return lambda name, **more: override(TASKS[name], {"corpus": str(corpus_dir), "split": "train", **more})


def test_rows_of_the_pool_are_scored_by_what_they_ask(nano):
    rows = [row for seed in range(6) for row in read_rows(nano("nano"), seed=seed)]
    assert {row.task: row.kind for row in rows} == {
        "transcription": "transcription",
        "translation": "translation",
        "intent": "classification",
        "sentiment": "classification",
        "keyword": "keywords",
        "continuation": "oracle",
        "repetition": "oracle",
    }
    assert {row.target_language for row in rows if row.kind == "translation"} == {"es"}
    assert {row.target_language for row in rows if row.kind != "translation"} == {None}


def test_references_of_the_pool_are_right(nano):
    for seed in range(6):
        for row in read_rows(nano("nano"), seed=seed):
            known = answers(row.task, row.transcript)
            if row.kind == "classification":
                assert row.answer.format(*row.references) == known[0]
                assert row.references[0] in row.labels
            elif row.kind == "keywords":
                assert f"Keywords: {', '.join(row.references)}." == known[0]
            else:
                assert row.references == known


def test_without_an_oracle_only_transcripts_are_known(nano):
    rows = read_rows(nano("nano", oracle=""))
    assert {row.task for row in rows if row.references} == {"transcription"}
    assert len(rows) == 16


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if name.startswith("nano_") and task.task])
def test_a_task_of_the_nano_language_is_asked_in_held_out_wordings(nano, name):
    task = nano(name)
    rows = read_rows(task, limit=3)
    assert [row.id.rpartition("/")[2] for row in rows] == [name] * 3
    assert {row.instruction for row in rows} <= set(load_pool(POOL_PATH)[task.task].held_out)
    assert {row.kind for row in rows} == {task.kind}
    for row in rows:
        said = row.answer.format(row.references[0])
        said = f"Keywords: {', '.join(row.references)}." if task.kind == "keywords" else said
        assert is_correct(task.task, row.transcript, said)


def test_the_nano_corpus_can_be_spoken_as_it_is_read():
    rows = read_rows(TASKS["nano_intent"], limit=2)
    assert [row.id for row in rows] == [f"nano/test/nano-test-0-{n:06d}/nano_intent" for n in (0, 1)]
    assert len(rows[0].labels) == 8


@pytest.mark.parametrize("name", ["format", "nano_format"])
def test_forms_of_answers_are_drawn_by_utterance(nano, name):
    rows = read_rows(nano(name, **({"columns.transcript": "transcript"} if name == "format" else {})), seed=3)
    for number, row in enumerate(rows):
        instruction, constraint = draw_constraint(f"utt-{number}", 3)
        assert (row.instruction, row.constraint) == (instruction, constraint.name)
        assert row.references == []


def test_the_oracle_must_know_the_language(tmp_path):
    lines = json_lines({"audio": "a.wav", "text": "hello there"})
    place = write(tmp_path, {"asr.jsonl": lines, "a.wav": clip(1)}) / "asr.jsonl"
    with pytest.raises(ValueError, match="task 'nano_intent', asr.jsonl line 1: 'hello there' is not a sentence of"):
        read_rows(override(TASKS["nano_intent"], {"corpus": str(place)}))
    with pytest.raises(ValueError, match=r"yaml has no answers\(task, transcript\); name a module that has"):
        read_rows(override(TASKS["nano_intent"], {"corpus": str(place), "oracle": "yaml"}))


def test_a_task_must_be_of_the_pool(nano):
    with pytest.raises(ValueError, match="task 'nano_asr', row 0: unknown task 'intents'; the pool has"):
        read_rows(nano("nano_asr", task="intents"))


def test_a_limit_counts_utterances(nano):
    assert len(read_rows(nano("nano"), limit=3)) == 6
    with pytest.raises(ValueError, match="limit=0 must be 1 or more"):
        read_rows(nano("nano"), limit=0)


def test_a_corpus_of_which_nothing_can_be_asked_is_refused(tmp_path):
    lines = json_lines({"audio": "a.wav", "transcript": "hello", "keywords": []})
    place = write(tmp_path, {"a.jsonl": lines, "a.wav": clip(1)}) / "a.jsonl"
    task = override(
        TASKS["slurp_keywords"],
        {"corpus": str(place), "reader": "", "columns.transcript": "transcript", "audio_folder": ""},
    )
    with pytest.raises(
        ValueError, match=r"task 'slurp_keywords': .*a.jsonl \(test\) has no utterance that can be used"
    ):
        read_rows(task)
