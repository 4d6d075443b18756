"""Inspection of a set: counts, samples, and a page that is safe, self-contained and reproducible."""

import base64
import itertools
import json
import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Audio, Features, Value
from html_page import Page

from dataset_builders.inspection import (
    COLUMNS,
    Histogram,
    Survey,
    Tally,
    draw_samples,
    inspect_set,
    render_html,
    render_text,
    survey,
)

KINDS = {name: Value("string") for name in COLUMNS} | {"audio": Audio(16_000), "duration": Value("float32")}
SCHEMA = Features(KINDS).arrow_schema
RESPONDER = {"model": "org/llm", "revision": "0123abc", "template": "9f9f", "decoding": {"do_sample": False}}
FLAC = b"fLaC" + b"\0" * 60


def row(name, number, **fields):
    return {
        "id": f"u{number}/{name}",
        "audio": {"bytes": FLAC, "path": None},
        "transcript": "the cat sat",
        "task": name,
        "instruction": f"Do it, wording {number % 2}.",
        "response": "cat",
        "duration": 36.0,
        "source": "corpus/train",
        "responder": json.dumps(RESPONDER),
    } | fields


def write(folder, task, rows, split="train", schema=SCHEMA):
    path = folder / "data" / task / f"{split}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=5)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Make a set with twenty rows of `keyword`, in two files of two row groups each, and one row of `intent`."""
    folder = tmp_path_factory.mktemp("inspected") / "set"
    for part in (0, 1):
        write(folder, "keyword", [row("keyword", 10 * part + number) for number in range(10)], f"train-{part}")
    write(folder, "intent", [row("intent", 0, response="to say so", source="other/train")])
    return folder


# Counting


def test_a_task_is_counted_over_all_its_files(folder):
    found = survey(folder)
    assert list(found.tasks) == ["intent", "keyword"]
    assert found.tasks["keyword"].summary() == {
        "rows": 20,
        "hours": pytest.approx(0.2),
        "transcript_words_mean": 3,
        "transcript_words_max": 3,
        "response_words_mean": 1,
        "response_words_max": 1,
        "instructions": 2,
        "instructions_share": pytest.approx(0.1),
        "example": "Do it, wording 0.",
    }
    assert found.total.rows == 21
    assert found.total.response_words.mean == pytest.approx(23 / 21)
    assert found.total.response_words.largest == 3
    assert found.sources == {"corpus/train": 20, "other/train": 1}
    assert found.responders == {json.dumps(RESPONDER): 21}


def test_the_survey_does_not_read_the_audio(folder, monkeypatch):
    read, real = [], pq.ParquetFile.iter_batches
    spy = lambda self, columns, **kwargs: read.append(columns) or real(self, columns=columns, **kwargs)  # noqa: E731
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    survey(folder)
    assert len(read) == 3  # files
    assert not any("audio" in columns for columns in read)


def test_a_histogram_has_a_fixed_size_and_a_last_bin_for_what_is_longer():
    histogram = Histogram(start=0.0, width=0.5, limit=120)
    histogram.add(np.array([0.0, 0.49, 0.5, 59.9, 60.0, 1e30]))
    histogram.add(np.array([]))
    assert histogram.counts.shape == (121,)
    assert histogram.counts[[0, 1, 119, 120]].tolist() == [2, 1, 1, 2]
    assert histogram.largest == 1e30


@pytest.mark.parametrize(
    ("values", "edges", "counts"),
    [
        ([], [-0.5, 0.5], [0]),
        ([0, 1, 1, 3], [-0.5, 0.5, 1.5, 2.5, 3.5], [1, 2, 0, 1]),
        ([0, 9, 10, 29, 29], [-0.5, 4.5, 9.5, 14.5, 19.5, 24.5, 29.5], [1, 1, 1, 0, 0, 2]),
        ([399, 400], [*np.arange(-0.5, 400, 50)], [0] * 7 + [1]),
    ],
)
def test_few_bars_are_drawn_and_all_bins_fall_into_one(values, edges, counts):
    histogram = Histogram(start=-0.5, width=1.0, limit=400)
    histogram.add(np.array(values))
    drawn_edges, drawn_counts = histogram.bars()
    assert drawn_edges.tolist() == edges
    assert drawn_counts.tolist() == counts


def test_a_task_without_rows_is_shown_as_such(tmp_path):
    write(tmp_path, "intent", [])
    found = survey(tmp_path)
    assert found.tasks["intent"].summary()["response_words_mean"] == 0
    assert draw_samples(tmp_path, per_task=3, seed=0) == []
    assert "0.00" in render_html(found, [])


# What is refused


def test_a_folder_without_files_is_refused(tmp_path):
    for look in (survey, lambda folder: draw_samples(folder, 1, 0), inspect_set):
        with pytest.raises(ValueError, match=rf"{tmp_path.name} has no data/TASK/\*.parquet.*self_powered build"):
            look(tmp_path)


@pytest.mark.parametrize("column", COLUMNS)
def test_a_file_that_lacks_a_column_is_named(tmp_path, column):
    path = write(tmp_path, "keyword", [row("keyword", 0)], schema=pa.schema([f for f in SCHEMA if f.name != column]))
    for look in (survey, lambda folder: draw_samples(folder, 1, 0)):
        with pytest.raises(ValueError, match=f"{path.name} has no column '{column}'"):
            look(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a parquet file at all", None])
def test_a_file_that_cannot_be_read_is_named(tmp_path, content):
    path = write(tmp_path, "keyword", [row("keyword", 0)])
    path.write_bytes(path.read_bytes()[:-20] if content is None else content)
    for look in (survey, lambda folder: draw_samples(folder, 1, 0)):
        with pytest.raises(ValueError, match=f"cannot read .*keyword/{path.name}"):
            look(tmp_path)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"response": None}, "a row has no response"),
        ({"duration": -1.0}, "negative or not a number"),
        ({"duration": float("nan")}, "negative or not a number"),
        ({"duration": float("inf")}, "negative or not a number"),
        ({"task": "intent"}, "rows of task 'intent'; expected only 'keyword'"),
    ],
)
def test_an_invalid_row_is_refused(tmp_path, fields, complaint):
    path = write(tmp_path, "keyword", [row("keyword", 0, **fields)])
    with pytest.raises(ValueError, match=rf"{path.name}.*{complaint}"):
        survey(tmp_path)


def test_a_negative_number_of_samples_is_refused(folder):
    with pytest.raises(ValueError, match="samples per task is -1"):
        draw_samples(folder, per_task=-1, seed=0)


# Drawing samples


def test_samples_are_whole_rows_of_every_task(folder):
    samples = draw_samples(folder, per_task=3, seed=0)
    assert [sample["task"] for sample in samples] == ["intent"] + ["keyword"] * 3  # intent has no more
    assert len({sample["id"] for sample in samples}) == 4
    for sample in samples[1:]:
        assert sample == row("keyword", int(sample["id"][1:].split("/")[0]))


def test_samples_are_a_function_of_the_seed(folder):
    drawn = [[sample["id"] for sample in draw_samples(folder, 4, seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_every_row_can_be_drawn(folder):
    samples = draw_samples(folder, per_task=100, seed=0)
    assert [sample["id"] for sample in samples] == ["u0/intent", *(f"u{number}/keyword" for number in range(20))]


def test_only_the_row_groups_drawn_from_are_read(folder, monkeypatch):
    read, real = [], pq.ParquetFile.read_row_group
    spy = lambda self, group, **kwargs: read.append(group) or real(self, group, **kwargs)  # noqa: E731
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", spy)
    draw_samples(folder, per_task=1, seed=0)
    assert len(read) == 2  # of five


# The table for the terminal


def test_the_text_has_a_row_per_task_and_a_total(folder):
    lines = render_text(survey(folder)).splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.strip()}
    assert rows["keyword"] == ["20", "0.20", "3.0", "(3)", "1.0", "(1)", "2", "(10.0", "%)"]
    assert rows["total"] == ["21", "0.21", "3.0", "(3)", "1.1", "(3)", "2", "(9.5", "%)"]
    assert "  source corpus/train (20 rows)" in lines
    who = 'model org/llm, revision 0123abc, template 9f9f, decoding {"do_sample": false}'
    assert f"  answered by {who} (21 rows)" in lines


def test_the_name_of_a_task_is_not_markup(tmp_path):
    write(tmp_path, "[red]:cat:", [row("[red]:cat:", 0)])
    assert "[red]:cat:" in render_text(survey(tmp_path))


# The page


@pytest.fixture(scope="module")
def page(folder):
    return Page(render_html(survey(folder), draw_samples(folder, per_task=2, seed=0)))


def page_of(*rows):
    """Return the page of a set with these rows of `keyword`."""
    return Page(render_html(Survey("set", tasks={"keyword": Tally()}), list(rows)))


def test_the_page_is_well_formed_and_accessible(page):
    assert page.all("html") == [{"lang": "en"}]
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [attributes.get("href") or attributes.get("xlink:href") for _, attributes in page.tags]
    labels = [f"#{attributes['aria-labelledby']}" for _, attributes in page.tags if "aria-labelledby" in attributes]
    assert {link for link in links if link} | set(labels) <= {f"#{name}" for name in ids}
    levels = [int(tag[1]) for tag, _ in page.tags if tag in ("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_the_page_says_what_is_in_the_set_and_who_answered(page):
    for words in ("21", "0.21", "org/llm", "0123abc", "9f9f", '{"do_sample": false}', "other/train: 1 rows"):
        assert words in page.words
    for words in ("the cat sat", "to say so", "Do it, wording 0.", "u0/intent", "36.0 s"):
        assert words in page.words


def test_the_page_has_three_histograms_per_task_with_a_text_for_those_who_do_not_see_them(page):
    labels = [attributes["aria-label"] for attributes in page.all("svg")]
    assert len(labels) == 6
    assert labels[0] == "Histogram of the duration in seconds: mean 36.0, largest 36."
    assert page.all("svg")[0]["role"] == "img"
    for words in (*labels, "duration (seconds)", "transcript (words)", "response (words)", "rows"):
        assert words in page.words


def test_the_page_is_self_contained(page):
    assert "://" not in page.text
    assert page.all("script") == page.all("link") == []
    assert [attributes["src"][:16] for attributes in page.all("audio")] == ["data:audio/flac;"] * 3


def test_nothing_in_the_data_is_taken_for_html(tmp_path):
    folder, task = tmp_path / "<i>set", "<b>task"
    columns = ("id", "transcript", "instruction", "response", "source", "responder")
    evil = {column: f"{column}\"><script>alert(1)</script>'{{{{ 7 * 7 }}}}" for column in columns}
    write(folder, task, [row(task, 0, **evil)])
    page = Page(render_html(survey(folder), draw_samples(folder, per_task=1, seed=0)))
    assert page.all("script") == page.all("i") == page.all("b") == []
    for text in ("<i>set", "<b>task", *evil.values()):
        assert any(words.startswith(text) for words in page.words)


def test_a_clip_is_called_what_its_bytes_are():
    kinds = {
        b"fLaC": "audio/flac",
        b"RIFF\x24\0\0\0WAVEfmt ": "audio/wav",
        b"OggS": "audio/ogg",
        b"ID3\x04": "audio/mpeg",
        b"\xff\xfb\x90": "audio/mpeg",
        b"\xff\xe3\x18": "audio/mpeg",
        b"\xff\xf1\x50": "application/octet-stream",  # AAC
        b"RIFF\x24\0\0\0AVI ": "application/octet-stream",
        b"\xff": "application/octet-stream",
    }
    page = page_of(*(row("keyword", 0, audio={"bytes": start, "path": "clip.txt"}) for start in kinds))
    for audio, (start, kind) in zip(page.all("audio"), kinds.items(), strict=True):
        assert audio["src"] == f"data:{kind};base64,{base64.b64encode(start).decode()}"
        assert (audio["preload"], audio["controls"]) == ("none", None)


def test_a_clip_that_the_set_does_not_hold_is_said_to_be_missing():
    missing = (None, {"bytes": None, "path": "elsewhere.wav"}, {"bytes": b"", "path": None})
    page = page_of(*(row("keyword", 0, audio=audio) for audio in missing))
    assert page.all("audio") == []
    assert page.words.count("The set does not hold this clip.") == 3


def test_values_beyond_the_last_bin_are_hatched(tmp_path):
    write(tmp_path, "keyword", [row("keyword", 0), row("keyword", 1, duration=61.0)])
    page = Page(render_html(survey(tmp_path), []))
    assert "duration (seconds); hatched: 60 or more" in page.words


@pytest.mark.parametrize("responder", ["not JSON", "[1]", "3", "{}"])
def test_a_responder_that_is_not_known_is_shown_as_it_is(tmp_path, responder):
    write(tmp_path, "intent", [row("intent", 0, responder=responder)])
    (shown,) = inspect_set(tmp_path)["responders"]
    assert shown["model"] == ("unknown" if responder == "{}" else responder)
    assert shown["decoding"] == "unknown"


def test_a_wording_of_every_task_is_shown_in_text_and_page(tmp_path):
    write(tmp_path, "keyword", [row("keyword", number, instruction=f"List\n{number} words.") for number in (7, 8)])
    write(tmp_path, "reply", [row("reply", 0, instruction="")])
    text = render_text(survey(tmp_path))
    assert "  a wording of keyword: List 7 words.\n" in text
    assert "  a wording of reply: (no instruction)\n" in text
    page = Page(render_html(survey(tmp_path), []))
    assert "List 7 words." in page.words and "(no instruction)" in page.words


# All of it


def test_inspecting_gives_numbers_and_prints_nothing(folder, capsys):
    result = inspect_set(folder)
    assert json.loads(json.dumps(result)) == result
    assert list(result) == ["total", "tasks", "sources", "responders", "text", "html"]
    assert result["total"]["rows"] == 21
    assert result["tasks"]["keyword"]["hours"] == pytest.approx(0.2)
    assert result["text"] == render_text(survey(folder))
    assert result["html"] is None
    assert capsys.readouterr() == ("", "")


def test_the_same_set_gives_the_same_page(tmp_path, caplog):
    write(tmp_path / "set", "intent", [row("intent", number) for number in range(5)])
    pages = [tmp_path / "pages" / name for name in ("a.html", "b.html")]
    with caplog.at_level(logging.INFO, logger="dataset_builders.inspection"):
        for path in pages:
            assert inspect_set(tmp_path / "set", html=path, samples=2, seed=3)["html"] == str(path)
    assert pages[0].read_bytes() == pages[1].read_bytes()
    assert len(Page(pages[0].read_text(encoding="utf-8")).all("article")) == 2
    assert str(pages[0]) in caplog.text
