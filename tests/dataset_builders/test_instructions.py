"""The instruction pool, and draws from it."""

import json
import math
import re
from collections import Counter

import pytest
import yaml

from dataset_builders.building import TASKS
from dataset_builders.instructions import (
    POOL_PATH,
    SELF_POWERED_TASKS,
    Draw,
    digest_of,
    draw_fraction,
    draw_instruction,
    draw_tasks,
    load_pool,
    parse_weights,
)

POOL = load_pool()
TRAINED = ["continuation", "repetition", "keyword", "intent", "sentiment", "translation", "transcription"]
ASKED = [name for name, task in POOL.items() if not task.without_instruction]
WRITTEN = yaml.safe_load(POOL_PATH.read_text(encoding="utf-8"))["tasks"]  # with unfilled slots


def lines_of(task):
    return WRITTEN[task]["seen"] + WRITTEN[task]["held_out"]


# The pool of the package


def test_the_pool_has_the_tasks_of_the_paper_more_to_train_and_some_to_measure():
    assert list(POOL)[:7] == TRAINED == [*SELF_POWERED_TASKS, "transcription"]
    held_out = {name for name, task in POOL.items() if task.held_out_task}
    assert len(held_out) >= 4 and len(set(POOL) - held_out - set(TRAINED)) >= 15
    assert not held_out & set(TASKS)
    assert [name for name, task in POOL.items() if task.without_instruction] == ["reply"]


@pytest.mark.parametrize("task", ASKED)
def test_a_task_has_many_wordings_of_many_lengths_and_some_are_held_out(task):
    assert len(WRITTEN[task]["seen"]) >= 32 and len(WRITTEN[task]["held_out"]) >= 8
    lengths = {len(line.split()) for line in lines_of(task)}
    assert min(lengths) <= 4 and max(lengths) >= 10 and len(lengths) >= 7


def test_no_wording_occurs_twice_whatever_its_case_and_punctuation():
    bare = Counter(" ".join(re.findall(r"[\w{}]+", line.casefold())) for task in ASKED for line in lines_of(task))
    assert [line for line, count in bare.items() if count > 1] == []


@pytest.mark.parametrize("task", ASKED)
def test_a_wording_is_true_of_a_text_and_of_a_voice_before_it_and_after_it(task):
    voice = r"tone of voice|accent|pronounc|loud|whisper|listen to|you hear|pitch|microphone"
    text = r"\btext above\b|\bread the\b|spelling|paragraph above|this text\b"
    place = r"\b(above|below|following|preceding|underneath)\b"
    for line in lines_of(task):
        assert not re.search(f"{voice}|{text}|{place}", line.casefold()), line
        assert line == line.strip() and "  " not in line and not line.endswith(":")


def test_languages_and_numbers_are_slots():
    assert {name: list(dict(task.slots)) for name, task in POOL.items() if task.slots} == {
        "translation": ["language"],
        "other_language": ["language"],
        "word_limit": ["number"],
    }
    languages = dict(POOL["translation"].slots)["language"]
    assert languages == dict(POOL["other_language"].slots)["language"] == tuple(sorted(languages))
    assert len(POOL["translation"].seen) == len(languages) * len(WRITTEN["translation"]["seen"])


def test_only_a_restatement_may_be_the_transcript_and_labels_and_lists_need_no_full_stop():
    assert [name for name, task in POOL.items() if task.may_copy_transcript] == ["repetition"]
    free = {name for name, task in POOL.items() if not task.ends_like_a_sentence}
    assert free >= {"keyword", "intent", "sentiment", "title", "topic", "entities", "yes_no", "bullets", "json"}
    assert not free & {"continuation", "translation", "summary", "question", "formal", "explanation", "reply"}


# Draws


def test_draws_are_the_same_everywhere_and_always():
    assert draw_fraction(0, "a", "b") == 0.47619746888297887


def test_a_draw_does_not_depend_on_what_was_drawn_before():
    ids = [f"utt-{n}" for n in range(50)]
    forward = {id: draw_instruction(POOL, "keyword", id, seed=1) for id in ids}
    backward = {id: draw_instruction(POOL, "keyword", id, seed=1) for id in reversed(ids)}
    assert forward == backward


def test_seed_id_and_parts_each_matter():
    assert len({draw_fraction(0, "a"), draw_fraction(1, "a"), draw_fraction(0, "b"), draw_fraction(0, "a", "")}) == 4


def test_fractions_are_uniform_and_every_line_is_drawn():
    fractions = [draw_fraction(3, str(n)) for n in range(2000)]
    assert min(fractions) >= 0 and max(fractions) < 1
    assert math.isclose(sum(fractions) / 2000, 0.5, abs_tol=0.03)
    for split in ("seen", "held_out"):
        drawn = {draw_instruction(POOL, "intent", str(n), 0, split) for n in range(500)}
        assert drawn == set(getattr(POOL["intent"], split))


# Draws of tasks

WEIGHTS = {"a": 6, "b": 3, "c": 1, "never": 0}
IDS = [f"utt-{n}" for n in range(3000)]


@pytest.mark.parametrize("scale", [1, 0.001, 1e6])
def test_tasks_are_drawn_by_weight_on_any_scale(scale):
    weights = {task: weight * scale for task, weight in WEIGHTS.items()}
    counts = Counter(task for id in IDS for task in draw_tasks(weights, id, seed=0))
    assert {task: round(count / 300) for task, count in counts.items()} == {"a": 6, "b": 3, "c": 1}


def test_draws_of_tasks_are_the_same_everywhere_and_always():
    drawn = ["".join(draw_tasks(WEIGHTS, id, 7, 3)) for id in IDS[:8]]
    assert drawn == ["abc", "abc", "abc", "acb", "abc", "bac", "bac", "bca"]


def test_draws_of_tasks_do_not_depend_on_the_order_of_the_weights():
    turned = dict(reversed(WEIGHTS.items()))
    assert all(draw_tasks(WEIGHTS, id, 0, 2) == draw_tasks(turned, id, 0, 2) for id in IDS[:300])


def test_draws_of_tasks_depend_on_seed_and_id():
    assert len({tuple(draw_tasks(WEIGHTS, id, 0, 3)) for id in IDS[:300]}) == 6
    assert [draw_tasks(WEIGHTS, id, 0) for id in IDS[:300]] != [draw_tasks(WEIGHTS, id, 1) for id in IDS[:300]]


def test_a_task_is_drawn_once_and_all_of_them_in_the_end():
    for id in IDS[:300]:
        assert sorted(draw_tasks(WEIGHTS, id, 0, 3)) == ["a", "b", "c"]
        assert len(set(draw_tasks(WEIGHTS, id, 0, 2))) == 2


def test_more_tasks_per_utterance_are_added_to_those_drawn_before():
    for id in IDS[:300]:
        one, two, three = (draw_tasks(WEIGHTS, id, 0, count) for count in (1, 2, 3))
        assert (one, two) == (three[:1], three[:2])


def test_the_second_task_is_drawn_by_the_weights_that_are_left():
    seconds = Counter(second for first, second in (draw_tasks(WEIGHTS, id, 0, 2) for id in IDS) if first == "a")
    assert seconds["b"] / seconds.total() == pytest.approx(0.75, abs=0.03)


def test_a_task_of_infinite_weight_is_in_every_draw_and_comes_last():
    weights = WEIGHTS | {"always": math.inf, "also": math.inf}
    for id in IDS[:300]:
        assert draw_tasks(weights, id, 0, 2) == ["also", "always"]
        assert draw_tasks(weights, id, 0, 4) == [*draw_tasks(WEIGHTS, id, 0, 2), "also", "always"]


def test_an_unknown_task_or_split_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'singing'.*'continuation'"):
        draw_instruction(POOL, "singing", "x", 0)
    with pytest.raises(ValueError, match="'test'.*'held_out'"):
        draw_instruction(POOL, "intent", "x", 0, split="test")


@pytest.mark.parametrize(
    ("weights", "count", "message"),
    [
        ({}, 1, r"cannot draw 1 tasks per utterance from \{\}"),
        ({"a": 0}, 1, "at least as many tasks with a weight above 0"),
        ({"a": 1, "b": 0}, 2, "cannot draw 2 tasks"),
        ({"a": 1}, 0, "cannot draw 0 tasks .* expected 1 or more"),
        ({"a": math.inf, "b": math.inf, "c": 1}, 1, "at most as many with an infinite weight"),
        ({"a": -1, "b": 2}, 1, "weight of task 'a' is -1; expected a number, 0 or above"),
        ({"a": math.nan}, 1, "weight of task 'a' is nan"),
    ],
)
def test_weights_that_allow_no_draw_are_refused(weights, count, message):
    with pytest.raises(ValueError, match=message):
        draw_tasks(weights, "x", 0, count)


def test_a_draw_gives_tasks_with_their_wordings():
    draw = Draw(POOL, {"intent": 1, "keyword": 2, "transcription": math.inf}, 2, seed=3)
    for id in IDS[:50]:
        tasks = draw_tasks(draw.weights, id, 3, 2)
        assert draw.of(id) == [(task, draw_instruction(POOL, task, id, 3)) for task in tasks]
    held_out = Draw(POOL, {"intent": 1}, paraphrases="held_out")
    assert {line for id in IDS[:300] for _, line in held_out.of(id)} == set(POOL["intent"].held_out)


def test_a_wording_depends_on_the_utterance_and_its_task_alone():
    """Weights and the number of tasks change which rows are drawn, but not their instructions."""
    some, all_of_them = Draw(POOL, {"intent": 5, "keyword": 1}), Draw(POOL, dict.fromkeys(TRAINED, 1), 7)
    assert all(some.of(id)[0] in all_of_them.of(id) for id in IDS[:100])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": {"singing": 1}}, "unknown task 'singing'; the pool has"),
        ({"weights": {"intent": 1, "singing": 0}}, "unknown task 'singing'"),  # also for a task that is never drawn
        ({"weights": {"intent": 1}, "tasks_per_utterance": 2}, "cannot draw 2 tasks"),
        ({"weights": {"intent": 1}, "paraphrases": "test"}, "unknown split 'test'"),
    ],
)
def test_an_invalid_draw_is_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        Draw(POOL, **settings)


def test_the_description_of_a_draw_is_json():
    draw = Draw(load_pool(slots={"language": ["Spanish"]}), {"translation": 1, "transcription": math.inf}, 2, seed=5)
    described = json.loads(json.dumps(draw.describe()))
    assert described == draw.describe()
    assert described["weights"] == {"translation": "1", "transcription": "inf"}
    assert described["languages"] == ["Spanish"]
    french = Draw(load_pool(slots={"language": ["French"]}), draw.weights, 2, seed=5).describe()
    assert french["pool"] != described["pool"] and french["languages"] == ["French"]
    both = load_pool(slots={"language": ["German", "French"]})  # in this order, on which the draws depend
    assert Draw(both, draw.weights, 2).describe()["languages"] == ["German", "French"]


def test_weights_are_read_from_the_command_line():
    assert parse_weights(["intent", "keyword=2.5", "transcription=inf"]) == {
        "intent": 1.0,
        "keyword": 2.5,
        "transcription": math.inf,
    }


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (["intent=much"], "cannot read the weight in 'intent=much'; expected TASK=NUMBER or TASK=inf"),
        (["intent="], "cannot read the weight in 'intent='"),
        (["intent", "intent=2"], "task 'intent' is named twice"),
    ],
)
def test_weights_that_cannot_be_read_are_refused(tasks, message):
    with pytest.raises(ValueError, match=message):
        parse_weights(tasks)


# A user's pool

GOOD = {"description": "d", "seen": ["Sing."], "held_out": ["Do sing."]}


@pytest.mark.parametrize(
    ("block", "trouble"),
    [
        ({"description": "d", "held_out": ["Sing."]}, "missing key 'seen'"),
        (GOOD | {"held_out": []}, "`held_out` must be a list that is not empty"),
        (GOOD | {"heldout": []}, "unknown key 'heldout'"),
        (GOOD | {"seen": []}, "`seen` must be a list that is not empty"),
        (GOOD | {"seen": "Sing."}, "`seen` must be a list"),
        (GOOD | {"seen": [{"Sing": "now"}]}, "expected a sentence"),
        (GOOD | {"seen": ["Sing.", "sing."]}, "duplicate, in song.seen and song.seen"),
        (GOOD | {"held_out": ["Sing."]}, "duplicate, in song.seen and song.held_out"),
        (GOOD | {"held_out_task": "yes please"}, "`held_out_task` must be true or false"),
        (GOOD | {"may_copy_transcript": 1}, "`may_copy_transcript` must be true or false, got 1"),
        (GOOD | {"without_instruction": "no"}, "`without_instruction` must be true or false, got 'no'"),
        (GOOD | {"without_instruction": True}, "`without_instruction` is true, so `held_out` has no meaning"),
        (
            {"description": "d", "without_instruction": True, "slots": {"key": ["C"]}},
            "`without_instruction` is true, so `slots` has no meaning; leave one of them out",
        ),
        ({"without_instruction": True}, "missing key 'description'"),
        ({"description": "d", "without_instruction": False}, "missing key 'seen'"),
        (None, "expected a mapping"),
        # Slots
        (GOOD | {"slots": {"key": ["C"]}}, "`seen` holds 'Sing.', which lacks the slot {key} of this task"),
        (
            {"description": "d", "seen": ["Sing in {key}."], "held_out": ["Sing."], "slots": {"key": ["C"]}},
            "`held_out` holds 'Sing.', which lacks the slot {key}",
        ),
        (GOOD | {"seen": ["Sing in {key}."]}, "'Sing in {key}.', whose slot {key} is none of the task's slots []"),
        (GOOD | {"seen": ["Sing {}."]}, "'Sing {}.', whose slot {} is none of the task's slots []"),
        (GOOD | {"seen": ["Sing in {key!r}."], "slots": {"key": ["C"]}}, "lacks the slot {key}"),
        (GOOD | {"seen": ["Sing in {key:{width}}."], "slots": {"key": ["C"]}}, "lacks the slot {key}"),
        (GOOD | {"seen": ["Sing in {key."]}, "'Sing in {key.', whose braces do not match"),
        (GOOD | {"seen": ["Sing }:"]}, "whose braces do not match"),
        (GOOD | {"slots": ["key"]}, "`slots` must be a mapping from names to lists of values, got ['key']"),
        (GOOD | {"slots": None}, "`slots` must be a mapping"),
        (GOOD | {"slots": {"a key": ["C"]}}, "`slots` must be a mapping from names"),
        (GOOD | {"slots": {"key": []}}, "slot 'key' must have a list of texts, got []"),
        (GOOD | {"slots": {"key": "C"}}, "slot 'key' must have a list of texts, got 'C'"),
        (GOOD | {"slots": {"key": ["da", False]}}, "got ['da', False]; quote texts"),  # YAML's `no`
        (GOOD | {"slots": {"key": ["C", " "]}}, "slot 'key' must have a list of texts"),
        (
            {"description": "d", "seen": ["Sing {key}."], "held_out": ["Do {key}."], "slots": {"key": ["C", "C"]}},
            "'Sing C.' is a duplicate, in song.seen and song.seen",
        ),
    ],
)
def test_a_bad_task_is_refused_naming_file_task_and_trouble(tmp_path, block, trouble):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"tasks": {"song": block}}))
    with pytest.raises(ValueError, match=f"mine.yaml: task 'song': .*{re.escape(trouble)}"):
        load_pool(path)


@pytest.mark.parametrize("text", ["", "- a", "task: {}", "tasks: {}", "tasks: [unclosed"])
def test_a_file_that_is_no_pool_is_refused_by_name(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="mine.yaml"):
        load_pool(path)


SONGS = """
tasks:
  song:
    description: Sing it.
    ends_like_a_sentence: false
    slots:
      key: [C major, D minor]
      tempo: [slowly, fast]
    seen:
      - Sing the speech {tempo} in {key}.
      - In {key}, sing what is said {tempo}.
    held_out:
      - Please sing in {key} what you hear, {tempo}, as {{ and }} say.
"""


@pytest.fixture
def songs(tmp_path):
    path = tmp_path / "songs.yaml"
    path.write_text(SONGS)
    return path


def test_a_users_own_task_works_without_code(songs):
    pool = load_pool(songs)
    song = pool["song"]
    assert (song.ends_like_a_sentence, song.may_copy_transcript, song.held_out_task) == (False, False, False)
    asked = {line for id in IDS[:200] for _, line in Draw(pool, {"song": 1}).of(id)}
    assert asked == set(song.seen)


def test_a_task_without_an_instruction_asks_nothing_wherever_it_is_drawn(tmp_path):
    blocks = {name: {"description": "d", "without_instruction": True} for name in ("reply", "sigh")}
    (tmp_path / "silent.yaml").write_text(yaml.safe_dump({"tasks": {"song": GOOD, **blocks}}))
    pool = load_pool(tmp_path / "silent.yaml")  # two tasks without instructions are no duplicates
    for paraphrases in ("seen", "held_out"):
        draw = Draw(pool, {"reply": 1, "song": 1}, 2, paraphrases=paraphrases)
        for id in IDS[:50]:
            assert dict(draw.of(id)) == {"reply": "", "song": GOOD[paraphrases][0]}


def test_every_line_is_said_with_every_value_of_its_slots(songs):
    song = load_pool(songs)["song"]
    assert song.seen == (
        "Sing the speech slowly in C major.",
        "Sing the speech fast in C major.",
        "Sing the speech slowly in D minor.",
        "Sing the speech fast in D minor.",
        "In C major, sing what is said slowly.",
        "In C major, sing what is said fast.",
        "In D minor, sing what is said slowly.",
        "In D minor, sing what is said fast.",
    )
    assert song.held_out[0] == "Please sing in C major what you hear, slowly, as { and } say."
    assert song.slots == (("key", ("C major", "D minor")), ("tempo", ("slowly", "fast")))


def test_values_given_replace_those_of_the_file(songs):
    song = load_pool(songs, slots={"key": ["E"], "tempo": ("softly",)})["song"]
    assert song.seen == ("Sing the speech softly in E.", "In E, sing what is said softly.")
    german = load_pool(slots={"language": ["German", "French"]})
    assert len(german["translation"].seen) == 64 and "Translate the speech into French." in german["translation"].seen
    assert german["intent"] == POOL["intent"]


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ({"langauge": ["German"]}, r"no task has the slot 'langauge'; there are \['language', 'number'\]"),
        ({"language": []}, r"slot 'language' must have a list of texts, got \[\]"),
        ({"language": "German"}, "slot 'language' must have a list of texts, got 'German'"),
        ({"language": ["German", "German"]}, "is a duplicate, in translation.seen and translation.seen"),
    ],
)
def test_values_that_no_pool_can_take_are_refused(slots, message):
    with pytest.raises(ValueError, match=f"{POOL_PATH.name}: .*{message}"):
        load_pool(slots=slots)


PAPERS = """
tasks:
  continuation:
    description: Five wordings, as the authors of the paper had them; all are trained on.
    seen: [Continue., Go on., Write what follows., "What is next?", Carry on.]
"""


def test_a_pool_without_held_out_wordings_is_trained_on_and_cannot_measure(tmp_path):
    (tmp_path / "papers.yaml").write_text(PAPERS)
    pool = load_pool(tmp_path / "papers.yaml")
    asked = {line for id in IDS[:200] for _, line in Draw(pool, {"continuation": 1}).of(id)}
    assert asked == set(pool["continuation"].seen) and len(asked) == 5
    with pytest.raises(ValueError, match="'continuation' of the pool has no held_out wordings; add `held_out` to"):
        Draw(pool, {"continuation": 1}, paraphrases="held_out")


def test_the_digest_of_a_pool_depends_on_its_content_and_not_on_its_path(songs, tmp_path):
    (tmp_path / "copy.yaml").write_text(f"# The same.{SONGS}")
    (tmp_path / "other.yaml").write_text(SONGS.replace("Please sing", "Kindly sing"))
    same, other = (digest_of(load_pool(tmp_path / name)) for name in ("copy.yaml", "other.yaml"))
    assert digest_of(load_pool(songs)) == same != other


@pytest.mark.parametrize("name", ["all", "../up", "two words", "a/b", ""])
def test_a_task_is_named_as_a_folder_can_be(name, tmp_path):
    block = {"description": "Any.", "seen": ["Sing the speech."], "held_out": ["Hum the speech."]}
    (tmp_path / "pool.yaml").write_text(yaml.safe_dump({"tasks": {name: block}}))
    with pytest.raises(ValueError, match="expected a name of letters, digits"):
        load_pool(tmp_path / "pool.yaml")
