"""Builds: the tasks of utterances, the rows that are kept, and the files that are written."""

import json
import time
from collections import Counter

import pytest
from corpus_files import clip, json_lines, parquet, write
from datasets import Audio, load_dataset

from dataset_builders.building import FEATURES, TASKS, ahead, answer, build, draw_rows
from dataset_builders.corpora.opening import load_corpus, open_corpus
from dataset_builders.data_card import Summary
from dataset_builders.instructions import TRANSCRIPTION, Draw, load_pool
from dataset_builders.responders.exchange import Reply
from dataset_builders.responders.local import LocalResponder
from dataset_builders.shards import BuildFolder, Worker
from processing_lsm import load_audio

COLUMNS = ["id", "audio", "transcript", "task", "instruction", "response", "duration", "source", "responder"]


@pytest.fixture(scope="module")
def utterances(corpus_dir):
    return list(load_corpus(corpus_dir, "train"))


def rows_of(folder, config="all", split="train"):
    return load_dataset(str(folder), config, split=split).cast_column("audio", Audio(16_000, decode=False)).to_list()


def summary_of(folder, split="train"):
    return Summary.of(BuildFolder(folder, split).reports())


# Tasks and instructions


def test_an_utterance_gets_one_task_by_default(utterances):
    rows = draw_rows(utterances, Draw(load_pool(), dict.fromkeys(TASKS, 1.0)))
    assert [row["transcript"] for row in rows] == [utterance["transcript"] for utterance in utterances]
    assert {row["task"] for row in rows} <= set(TASKS)


def test_an_id_is_source_utterance_and_task(utterances, both):
    for row, utterance in zip(draw_rows(utterances, both)[::2], utterances, strict=True):
        assert row["id"] == f"noise/train/{utterance['id']}/{row['task']}"
        assert row["instruction"] in both.pool[row["task"]].seen


def test_rows_are_a_function_of_seed_and_utterance(utterances, both):
    rows = {row["id"]: row for row in draw_rows(utterances, both)}
    assert all(rows[row["id"]] == row for row in draw_rows([utterances[5], utterances[2]], both))
    other = Draw(both.pool, both.weights, 2, seed=1)
    assert {row["id"] for row in draw_rows(utterances, other)} != set(rows)


# Rows that are kept


def test_responses_are_the_llms_and_a_transcription_is_the_transcript(utterances, both, backwards):
    kept, dropped = answer(draw_rows(utterances, both), backwards, both, filters_off=(), judge_below=None)
    assert len(kept) == 16 and not dropped
    assert TRANSCRIPTION not in {request.task for request in backwards.asked}
    for row in kept:
        said = row["transcript"]
        assert row["response"] == (said if row["task"] == TRANSCRIPTION else " ".join(said.split()[::-1]) + ".")
        assert json.loads(row["responder"])["model"] == "backwards"


def test_what_is_dropped_is_counted_by_reason(utterances, scripted):
    draw = Draw(load_pool(), {"continuation": 1.0})
    said = utterances[2]["transcript"]
    replies = [Reply("cut", "length"), Reply(""), Reply(f"{said}."), Reply("", "prompt_too_long"), Reply("no end")]
    replies += [Reply("I'm sorry, but I cannot do this.")]
    kept, dropped = answer(draw_rows(utterances, draw), scripted(replies), draw, (), None)
    reasons = ("truncated", "empty", "copy", "prompt_too_long", "unfinished", "refusal")
    assert dropped == {("continuation", reason): 1 for reason in reasons}
    assert len(kept) == 2


def test_a_filter_that_is_off_drops_nothing(utterances, scripted):
    draw = Draw(load_pool(), {"continuation": 1.0})
    off = ("truncated", "unfinished")
    kept, dropped = answer(draw_rows(utterances, draw), scripted([Reply("cut", "length")]), draw, off, None)
    assert not dropped
    assert kept[0]["response"] == "cut"


def test_the_same_row_again_is_a_duplicate_and_another_clip_of_it_too(utterances, scripted):
    draw = Draw(load_pool(), {"continuation": 1.0})
    (row,) = draw_rows(utterances[:1], draw)
    kept, dropped = answer([row, {**row, "id": "again"}], scripted([Reply("Yes."), Reply("Yes.")]), draw, (), None)
    assert [row["id"] for row in kept] == [row["id"]]
    assert dropped == {("continuation", "duplicate"): 1}
    assert not answer([row, row], scripted([Reply("Yes."), Reply("Yes.")]), draw, ("duplicate",), None)[1]


def test_the_llm_may_judge_its_own_answers(utterances, scripted):
    draw = Draw(load_pool(), {"continuation": 1.0})
    answers = [Reply(f"Answer {index}.") for index in range(8)]
    scores = [Reply(text) for text in ("5", "Score: 4.", "3", "perfect", "1", "2", "4", "5")]
    responder = scripted(answers + scores)
    kept, dropped = answer(draw_rows(utterances, draw), responder, draw, (), judge_below=4)
    assert [row["response"] for row in kept] == ["Answer 0.", "Answer 1.", "Answer 6.", "Answer 7."]
    assert dropped == {("continuation", "judged"): 4}
    question = responder.asked[8]
    assert question.transcript == utterances[0]["transcript"]
    assert "Answer 0." in question.instruction


# Files


@pytest.fixture
def built(backwards, both, corpus_dir, tmp_path):
    return build(open_corpus(corpus_dir), backwards, tmp_path / "set", both, shard_size=3)


def test_load_dataset_reads_all_and_every_task(built):
    everything = rows_of(built)
    assert len(everything) == 16
    counts = Counter(row["task"] for row in everything)
    assert counts[TRANSCRIPTION] == 8
    for task, count in counts.items():
        part = rows_of(built, task)
        assert (len(part), {row["task"] for row in part}) == (count, {task})


@pytest.mark.parametrize("streaming", [True, False])
def test_rows_are_read_as_they_come_without_torchcodec(built, streaming):
    """As in README: `load_audio` takes the audio of a row."""
    rows = load_dataset(str(built), "all", split="train", streaming=streaming)
    assert list(rows) == rows_of(built)
    row = next(iter(rows))
    assert len(load_audio(row["audio"])) == round(16_000 * row["duration"])
    assert next(iter(rows.map(lambda row: {"id": "x"})))["audio"] == row["audio"]


def test_the_columns_are_the_contract(built):
    dataset = load_dataset(str(built), "all", split="train")
    assert dataset.column_names == COLUMNS == list(FEATURES)
    assert dataset.features == FEATURES


def test_data_has_parquet_files_by_task_and_nothing_else(built):
    files = [file.relative_to(built).parts for file in (built / "data").rglob("*") if file.is_file()]
    tasks = {row["task"] for row in rows_of(built)}
    assert {(top, task) for top, task, _ in files} == {("data", task) for task in tasks}
    assert all(name.startswith("train-0000") and name.endswith(".parquet") for _, _, name in files)


def test_audio_is_the_corpus_bytes(built, utterances):
    clips = {utterance["id"]: utterance for utterance in utterances}
    for row in rows_of(built):
        utterance = clips[row["id"].split("/")[2]]
        assert row["audio"]["bytes"] == utterance["audio"]["bytes"]
        assert (row["duration"], row["source"]) == (utterance["duration"], "noise/train")


def test_the_rows_do_not_depend_on_shards_or_processes(built, backwards, both, corpus_dir, tmp_path):
    for rank in (1, 0, 2):
        shared = build(
            open_corpus(corpus_dir), backwards, tmp_path / "shared", both, shard_size=2, worker=Worker(rank, 3)
        )
        assert (shared / "README.md").exists() == (rank == 2)  # the last process writes it
    by_id = [sorted(rows_of(folder), key=lambda row: row["id"]) for folder in (built, shared)]
    assert by_id[0] == by_id[1]


@pytest.mark.parametrize(("limit", "size"), [(None, 500), (10, 50), (1600, 100), (4000, 250), (10**6, 500)])
def test_few_rows_are_cut_small_enough_to_share(limit, size, backwards, both, corpus_dir, tmp_path):
    build(open_corpus(corpus_dir), backwards, tmp_path / "set", both, limit=limit)
    assert BuildFolder(tmp_path / "set", "train").settings["shard_size"] == size


def test_reading_is_a_shard_ahead_of_answering():
    made = []
    items = ahead(made.append(index) or (index,) for index in range(4))
    assert next(items) == (0,)
    while len(made) < 2:  # the thread's part
        time.sleep(0.001)
    assert list(items) == [(1,), (2,), (3,)]


def test_an_error_while_reading_ahead_is_raised_at_its_own_shard():
    def break_down():
        yield (0,)
        raise OSError("the cable")

    items = ahead(break_down())
    assert next(items) == (0,)
    with pytest.raises(OSError, match="the cable"):
        next(items)


def test_a_finished_build_asks_nothing_again(built, backwards, both, corpus_dir):
    asked = len(backwards.asked)
    before = {file: file.stat().st_mtime_ns for file in built.rglob("*.parquet")}
    build(open_corpus(corpus_dir), backwards, built, both, shard_size=3)
    assert len(backwards.asked) == asked
    assert {file: file.stat().st_mtime_ns for file in built.rglob("*.parquet")} == before


@pytest.mark.parametrize(("limit", "rows"), [(1, 1), (5, 5), (6, 6), (16, 16), (99, 16)])
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_limit_counts_rows(limit, rows, world_size, backwards, both, corpus_dir, tmp_path):
    for rank in range(world_size):
        folder = build(
            open_corpus(corpus_dir),
            backwards,
            tmp_path / "set",
            both,
            limit=limit,
            shard_size=2,
            worker=Worker(rank, world_size),
        )
    assert len(rows_of(folder)) == rows


def test_two_splits_share_a_folder(built, backwards, both, corpus_dir):
    corpus = open_corpus(corpus_dir)
    corpus.split = "validation"
    build(corpus, backwards, built, both, limit=4)
    assert len(rows_of(built)) == 16
    assert len(rows_of(built, split="validation")) == 4


def test_the_llm_inside_answers(lsm_dir, corpus_dir, both, tmp_path):
    """The LLM is real here. With random weights, it never ends its answers, so only transcriptions are kept."""
    folder = build(open_corpus(corpus_dir), LocalResponder(lsm_dir, max_new_tokens=2), tmp_path / "set", both, limit=4)
    assert [row["task"] for row in rows_of(folder)] == [TRANSCRIPTION] * 2
    assert "× truncated" in (folder / "README.md").read_text()


# Utterances that cannot be used


def test_utterances_that_cannot_be_used_are_told_and_counted(manifest, backwards, tmp_path, caplog):
    lines = ["first words", "", b'{"audio": "0.wav", "text": "cut off', b'{"audio": "../secret.wav", "text": "hi"}']
    corpus = open_corpus(manifest([*lines, b'{"audio": "nowhere.wav", "text": "hi"}', "last words"]))
    folder = build(corpus, backwards, tmp_path / "set", Draw(load_pool(), {"continuation": 1.0}))
    assert summary_of(folder).refused == {
        "no transcript": 1,
        "not JSON": 1,
        "outside the data root": 1,
        "unreadable audio": 1,
    }
    for told in ("line 2: no transcript", "line 3: not JSON", "line 4: outside", "line 5: unreadable audio"):
        assert f"speech.jsonl {told}" in caplog.text
    card = (folder / "README.md").read_text()
    assert "utterances refused: 1 × not JSON" in card
    assert "Utterances read: 6." in card
    assert len(rows_of(folder)) == 2


@pytest.mark.parametrize(("trust_headers", "kept"), [(False, 1), (True, 3)])
def test_what_is_cut_off_is_refused_unless_headers_are_trusted(trust_headers, kept, backwards, tmp_path, caplog):
    """The header of a WAV shows that it is cut off; FLAC and MP3 must be decoded."""
    rows = [{"audio": f"{kind}.{kind}", "text": f"words of {kind}"} for kind in ("wav", "flac", "mp3", "ogg")]
    files = {row["audio"]: clip(0, row["audio"][-4:].strip(".").upper(), seconds=3.0) for row in rows}
    cut = {name: content[: len(content) // 3] for name, content in files.items() if name != "ogg.ogg"}
    write(tmp_path, {"asr.jsonl": json_lines(*rows), **files, **cut})
    draw = Draw(load_pool(), {"continuation": 1.0})
    folder = build(open_corpus(tmp_path / "asr.jsonl"), backwards, tmp_path / "set", draw, trust_headers=trust_headers)
    assert len(rows_of(folder)) == kept
    assert summary_of(folder).refused == {"unreadable audio": 4 - kept}
    assert "asr.jsonl line 1: unreadable audio: wav.wav is cut off: it has 1.00 of the 3.00 s" in caplog.text
    assert ("line 3: unreadable audio: mp3.mp3 is cut off" in caplog.text) != trust_headers
    assert (" --trust-headers" in (folder / "README.md").read_text()) == trust_headers


def test_an_id_that_comes_twice_is_refused(manifest, backwards, tmp_path):
    lines = [json.dumps({"audio": "0.wav", "text": f"text {index}", "id": "same"}).encode() for index in range(2)]
    folder = build(open_corpus(manifest(lines)), backwards, tmp_path / "set")
    assert summary_of(folder).refused == {"id used twice": 1}


def test_a_build_with_no_row_left_says_why(manifest, backwards, tmp_path):
    corpus = open_corpus(manifest([b'{"audio": "gone.wav", "text": "hi"}']))
    with pytest.raises(ValueError, match=r"no row is left \(utterances refused: 1 × unreadable audio\)"):
        build(corpus, backwards, tmp_path / "set")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limit": 0}, "limit=0"),
        ({"shard_size": 0}, "shard_size=0"),
        ({"filters_off": ["politeness"]}, r"unknown filter 'politeness'; expected one of \['prompt_too_long'"),
        ({"judge_below": 6}, "judge_below=6 must be 1 to 5"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(settings, message, corpus_dir, backwards, tmp_path):
    with pytest.raises(ValueError, match=message):
        build(open_corpus(corpus_dir), backwards, tmp_path / "set", **settings)
    assert not (tmp_path / "set").exists()


def test_a_task_that_measures_generalisation_is_not_trained_on(corpus_dir, backwards, tmp_path):
    with pytest.raises(ValueError, match="'haiku' is held out of training"):
        build(open_corpus(corpus_dir), backwards, tmp_path / "set", Draw(load_pool(), {"haiku": 1.0}))


def test_a_build_with_other_settings_is_refused(built, backwards, both, corpus_dir):
    with pytest.raises(ValueError, match=r"started with other settings: shard_size was 3, now 500"):
        build(open_corpus(corpus_dir), backwards, built, both)


def test_a_build_is_not_continued_with_an_edited_corpus(backwards, both, tmp_path):
    folder = write(tmp_path / "corpus", {"a.wav": clip(1), "a.txt": "one", "b.wav": clip(2), "b.txt": "two"})
    build(open_corpus(folder), backwards, tmp_path / "set", both)
    asked = len(backwards.asked)
    build(open_corpus(folder), backwards, tmp_path / "set", both)
    (folder / "a.txt").write_text("ten")
    with pytest.raises(
        ValueError, match=r"other settings: corpus.revision was 'sha256:\w+', now 'sha256:\w+'. Use those"
    ):
        build(open_corpus(folder), backwards, tmp_path / "set", both)
    assert len(backwards.asked) == asked


def test_the_revision_of_parquet_files_depends_on_their_content(tmp_path):
    row = {"id": "u", "audio": clip(1), "text": "one"}
    first = open_corpus(parquet(tmp_path / "corpus", row)).describe()["revision"]
    assert open_corpus(parquet(tmp_path / "corpus", row)).describe()["revision"] == first
    assert open_corpus(parquet(tmp_path / "corpus", row | {"text": "two"})).describe()["revision"] != first


# The card


def test_the_card_has_what_is_needed_to_judge_and_rebuild_the_set(built, backwards):
    card = (built / "README.md").read_text()
    for said in (
        "| transcription | 8 | 8 |",
        "`backwards`, revision `1`",
        "prompt template `none`",
        "seed 0",
        "Source: `noise`",
        "see the corpus, whose terms hold",
        "- `refusal`: the response begins with a refusal",
        "Transcribe the speech.",
        "python -m dataset_builders.self_powered build --corpus noise --split train",
        "--tasks-per-utterance 2",
        "transcription=inf",
        "- nothing",
    ):
        assert said in card


def test_an_example_is_no_markup_in_the_card(manifest, backwards, tmp_path):
    corpus = open_corpus(manifest(["so | they <b>said</b> `it`"]))
    card = (build(corpus, backwards, tmp_path / "set") / "README.md").read_text()
    assert r"so \| they \<b\>said\</b\> \`it\`" in card
