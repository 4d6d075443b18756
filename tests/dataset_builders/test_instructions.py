"""What the instruction pool promises, and what a draw from it promises."""

import json
import math
import re
from collections import Counter

import pytest
import yaml

from dataset_builders.instructions import (
    POOL_PATH,
    SELF_POWERED_TASKS,
    Draw,
    draw_fraction,
    draw_instruction,
    draw_tasks,
    load_pool,
    parse_weights,
)
from dataset_builders.nano.tasks import UNSEEN_TASKS

POOL = load_pool()
TRAINED = ["continuation", "repetition", "keyword", "intent", "sentiment", "translation", "transcription"]
REPLY = "reply"  # the one task that asks nothing
ASKED = [*TRAINED, *UNSEEN_TASKS]
DECISIVE = {
    "continuation": r"next|continu",
    "repetition": r"other words|another form|new form|rephrase|restate|own way",
    "keyword": r"keywords",
    "intent": r"intent|purpose",
    "sentiment": r"sentiment|mood|feeling",
    "translation": r"spanish",
    "transcription": r"transcri|word for word|\bdown\b",
    "question_who": r"\bwho\b|\bperson\b",
    "question_what": r"\bthing\b|\bobject\b",
    "question_circumstance": r"\bwhere or when\b|\bplace or time\b",
    "question_deed": r"\bdeed\b",
    "spanish_who": r"\bcharacter\b",
    "numbered": r"\bnumber",
}
# It asks for an answer in Spanish, as a translation is asked for; what it asks for tells it apart.
DECISIVE_OF_OTHERS = {"spanish_who": {"translation"}}
STOPWORDS = set(
    re.findall(r"\w+", "a an the and or of in to at for with it its is are was do does did i you me that what")
)


def content_words(line):
    return set(re.findall(r"[a-z]+", line.lower())) - STOPWORDS


def lines_of(task):
    return POOL[task].seen + POOL[task].held_out


def test_the_pool_has_the_agreed_tasks_and_sizes():
    assert list(POOL) == [*ASKED, REPLY]
    for name in ASKED:
        task = POOL[name]
        assert (len(task.seen), len(task.held_out)) == ((6, 3) if name in UNSEEN_TASKS else (18, 6))
        assert task.held_out_task == (name in UNSEEN_TASKS)
    assert POOL[REPLY].seen == POOL[REPLY].held_out == ("",)
    assert not POOL[REPLY].held_out_task
    assert min(len(lines_of(task)) for task in TRAINED) >= 20


def test_the_switches_of_the_shipped_pool_are_the_ones_its_filters_need():
    assert [name for name, task in POOL.items() if task.may_copy_transcript] == ["repetition"]
    free = [name for name, task in POOL.items() if not task.ends_like_a_sentence]
    assert free == ["keyword", "intent", "sentiment", "numbered"]
    assert [name for name, task in POOL.items() if task.without_instruction] == [REPLY]
    assert {name: task.slots for name, task in POOL.items() if task.slots} == {
        "translation": (("language", ("Spanish",)),)
    }


@pytest.mark.parametrize("task", ASKED)
def test_a_line_is_one_short_sentence_about_the_speech(task):
    for line in lines_of(task):
        assert line[0].isupper() and line[-1] in ".?:", line
        assert 4 <= len(line.split()) <= 12, line
        assert re.search(r"the speech|the speaker|what is said|you hear", line), line


def test_seen_and_held_out_are_disjoint_and_no_line_is_shared_by_tasks():
    lines = [line.lower() for task in ASKED for line in lines_of(task)]
    assert len(lines) == len(set(lines))


@pytest.mark.parametrize("task", ASKED)
def test_a_held_out_line_has_no_new_content_word(task):
    seen = set().union(*map(content_words, POOL[task].seen))
    for line in POOL[task].held_out:
        assert content_words(line) <= seen, f"{line}: {content_words(line) - seen}"


@pytest.mark.parametrize("task", ASKED)
def test_every_line_holds_the_decisive_word_of_its_task_and_of_no_other(task):
    for line in lines_of(task):
        found = {name for name, words in DECISIVE.items() if re.search(words, line.lower())}
        assert found == {task, *DECISIVE_OF_OTHERS.get(task, ())}, line


def test_draws_are_the_same_everywhere_and_always():
    assert draw_fraction(0, "a", "b") == 0.47619746888297887
    assert draw_instruction(POOL, "translation", "utt-1", seed=7) == "Put what the speaker says into Spanish."


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
        ({"a": math.inf, "b": math.inf, "c": 1}, 1, "no more than that with an infinite one"),
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
    """Whatever else is drawn: weights and the number of tasks change which rows there are, not what they say."""
    some, all_of_them = Draw(POOL, {"intent": 5, "keyword": 1}), Draw(POOL, dict.fromkeys(TRAINED, 1), 7)
    assert all(some.of(id)[0] in all_of_them.of(id) for id in IDS[:100])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": {"singing": 1}}, "unknown task 'singing'; the pool has"),
        ({"weights": {"intent": 1, "singing": 0}}, "unknown task 'singing'"),  # also one that is never drawn
        ({"weights": {"intent": 1}, "tasks_per_utterance": 2}, "cannot draw 2 tasks"),
        ({"weights": {"intent": 1}, "paraphrases": "test"}, "unknown split 'test'"),
    ],
)
def test_a_draw_that_cannot_be_is_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        Draw(POOL, **settings)


def test_a_draw_says_what_it_is_as_json_takes_it():
    draw = Draw(POOL, {"translation": 1, "transcription": math.inf}, 2, seed=5)
    described = json.loads(json.dumps(draw.describe()))
    assert described == draw.describe()
    assert described["weights"] == {"translation": "1", "transcription": "inf"}
    assert described["languages"] == ["Spanish"]
    french = Draw(load_pool(slots={"language": ["French"]}), draw.weights, 2, seed=5).describe()
    assert french["pool"] != described["pool"] and french["languages"] == ["French"]


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
        ({"description": "d", "seen": ["Sing."]}, "missing key 'held_out'"),
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
        ({"description": "d", "without_instruction": False}, "missing key 'held_out'"),
        (None, "expected a mapping"),
        # Slots
        (GOOD | {"slots": {"key": ["C"]}}, "`seen` holds 'Sing.', which lacks the slot {key} of this task"),
        (
            {"description": "d", "seen": ["Sing in {key}."], "held_out": ["Sing."], "slots": {"key": ["C"]}},
            "`held_out` holds 'Sing.', which lacks the slot {key}",
        ),
        (GOOD | {"seen": ["Sing in {key}."]}, "'Sing in {key}.', whose slot {key} is none of []"),
        (GOOD | {"seen": ["Sing {}."]}, "'Sing {}.', whose slot {} is none of []"),
        (GOOD | {"seen": ["Sing in {key!r}."], "slots": {"key": ["C"]}}, "lacks the slot {key}"),
        (GOOD | {"seen": ["Sing in {key:{width}}."], "slots": {"key": ["C"]}}, "lacks the slot {key}"),
        (GOOD | {"seen": ["Sing in {key."]}, "'Sing in {key.', whose braces do not match"),
        (GOOD | {"seen": ["Sing }:"]}, "whose braces do not match"),
        (GOOD | {"slots": ["key"]}, "`slots` must be a mapping from names to lists of values, got ['key']"),
        (GOOD | {"slots": None}, "`slots` must be a mapping"),
        (GOOD | {"slots": {"a key": ["C"]}}, "`slots` must be a mapping from names"),
        (GOOD | {"slots": {"key": []}}, "slot 'key' must have a list of texts, got []"),
        (GOOD | {"slots": {"key": "C"}}, "slot 'key' must have a list of texts, got 'C'"),
        (GOOD | {"slots": {"key": ["da", False]}}, "got ['da', False]; quote those"),  # YAML's `no`
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
    pool = load_pool(tmp_path / "silent.yaml")  # two that ask nothing are no duplicates
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
    assert len(german["translation"].seen) == 36 and "Translate the speech into French." in german["translation"].seen
    assert german["intent"] == POOL["intent"]


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ({"langauge": ["German"]}, r"no task has the slot 'langauge'; there are \['language'\]"),
        ({"language": []}, r"slot 'language' must have a list of texts, got \[\]"),
        ({"language": "German"}, "slot 'language' must have a list of texts, got 'German'"),
        ({"language": ["German", "German"]}, "is a duplicate, in translation.seen and translation.seen"),
    ],
)
def test_values_that_no_pool_can_take_are_refused(slots, message):
    with pytest.raises(ValueError, match=f"{POOL_PATH.name}: .*{message}"):
        load_pool(slots=slots)


def test_the_self_powered_tasks_are_in_the_pool():
    assert [*SELF_POWERED_TASKS, "transcription"] == TRAINED


@pytest.mark.parametrize("name", ["all", "../up", "two words", "a/b", ""])
def test_a_task_is_named_as_a_folder_can_be(name, tmp_path):
    block = {"description": "Any.", "seen": ["Sing the speech."], "held_out": ["Hum the speech."]}
    (tmp_path / "pool.yaml").write_text(yaml.safe_dump({"tasks": {name: block}}))
    with pytest.raises(ValueError, match="expected a name of letters, digits"):
        load_pool(tmp_path / "pool.yaml")
