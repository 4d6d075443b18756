"""The reports' page: whole, safe, readable by all, and in need of nothing else."""

import base64
import io
import re

import numpy as np
import pytest
import soundfile
from html_page import Page

from recipes.reporting.figures import plot_composition
from recipes.reporting.page import Examples, Facts, Picture, Table, Text, render_markdown, render_page, write_page

EVIL = "\"><script>alert(1)</script><img src=x onerror=alert(2)>'{{ 7 * 7 }}"


def page_of(*blocks):
    return Page(render_page("Title", "Subtitle", blocks))


def clip(kind):
    data = io.BytesIO()
    soundfile.write(data, np.zeros(160), 16_000, format=kind)
    return data.getvalue()


def item(audio=None, answers=()):
    return {"instruction": "Name the animal.", "transcript": "the cat sat", "audio": audio, "answers": list(answers)}


@pytest.fixture(scope="module")
def figure(tmp_path_factory):
    """The stem of a figure, as PNG and as SVG."""
    shares = {"instruction": 0.2, "speech": 0.4, "template": 0.2, "response": 0.1, "first": 0.1}
    stem = tmp_path_factory.mktemp("figures") / "composition.v1"
    plot_composition({"layers": [shares] * 2}, stem, "vanilla <LSM>")
    return stem


@pytest.fixture(scope="module")
def blocks(figure):
    answers = [("text LLM", "cat", True), ("vanilla LSM", "the cat sat", False), ("self-powered LSM", "a cat", None)]
    return [
        Text(["One.", "Two."], "What was measured"),
        Table("Scores", ["", "following", "model"], [["text LLM", "90.0 %", "a"], ["vanilla", None, "b"]], "A note."),
        Picture(figure, "Shares.", "Bars of five shares."),
        Picture(figure, "Again.", "The same bars."),
        Text("Hear them.", "Answers"),
        Examples([item(clip("WAV"), answers), item(clip("FLAC"), answers), item()]),
        Text(heading="Settings"),
        Facts({"seed": 0, "decoding": {"do_sample": False}, "revision": None}),
    ]


@pytest.fixture(scope="module")
def page(blocks):
    return page_of(*blocks)


# The whole


def test_all_that_a_block_says_is_on_the_page(page):
    said = ("Title", "Subtitle", "One.", "Two.", "Scores", "A note.", "Shares.", "Hear them.", "Name the animal.")
    for words in (*said, "90.0 %", "the cat sat", "a cat", "seed", "0", '{"do_sample": false}', "–"):
        assert words in page.words


def test_the_page_needs_nothing_else(page):
    assert page.all("script") == page.all("link") == page.all("iframe") == []
    assert re.search(r'(src|href)="(?!data:|#)|url\((?!#)|@import|://', page.text) is None
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:"


def test_the_same_blocks_give_the_same_page_in_a_folder_that_is_made(tmp_path, blocks):
    paths = [tmp_path / "new" / name for name in ("a.html", "b.html")]
    for path in paths:
        write_page(path, "Title", "Subtitle", blocks)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"a.html", "b.html"}


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    write_page(path, "Old", "", [])
    with pytest.raises(ValueError):
        write_page(path, "New", "", [Picture(tmp_path / "none", "", "")])

    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_page(path, "New", "", [])
    assert "<h1>Old</h1>" in path.read_text(encoding="utf-8")


def test_headings_are_listed_when_there_are_three(page):
    links = [attributes["href"] for attributes in page.all("a")]
    assert links == ["#section-1", "#section-2", "#section-3"]
    assert [attributes["id"] for attributes in page.all("h2")] == ["section-1", "section-2", "section-3"]
    assert page_of(Text("", "One"), Text("", "Two")).all("nav") == []


def test_something_that_is_no_block_is_refused():
    with pytest.raises(ValueError, match="a block is 'text'; expected Text, Table, Picture, Examples or Facts"):
        page_of("text")


# Safe


def test_nothing_is_taken_for_html():
    answers = [(EVIL, EVIL, False)]
    evil = {"instruction": EVIL, "transcript": EVIL, "audio": None, "answers": answers}
    blocks = [Text(EVIL, EVIL), Table(EVIL, [EVIL], [[EVIL]], EVIL), Examples([evil]), Facts({EVIL: EVIL})]
    page = Page(render_page(EVIL, EVIL, blocks))
    assert page.all("script") == page.all("img") == []
    assert page.words.count(EVIL) == 15


def test_nothing_about_a_picture_is_taken_for_html(figure):
    for path in (figure, f"{figure}.png"):
        page = page_of(Picture(path, EVIL, EVIL))
        assert page.all("script") == []
        (shown,) = page.all("svg") or page.all("img")
        assert EVIL in (shown.get("aria-label"), shown.get("alt"))


def test_half_a_surrogate_pair_does_not_lose_the_page(tmp_path):
    write_page(tmp_path / "a.html", "Title", "", [Examples([item(answers=[("model", "cat \ud83d", True)])])])
    assert "cat ?" in (tmp_path / "a.html").read_text(encoding="utf-8")


# Readable by all


def test_ids_are_unique_and_every_reference_has_its_target(page):
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)|aria-labelledby="([^"]*)"', page.text)
    assert {one or two or three for one, two, three in targets} <= set(ids)
    assert any(two for _, two, _ in targets)  # the hatches of the figures


def test_a_picture_has_a_text_for_those_who_do_not_see_it(page, figure):
    assert [(svg["role"], svg["aria-label"]) for svg in page.all("svg")] == [
        ("img", "Bars of five shares."),
        ("img", "The same bars."),
    ]
    assert "vanilla <LSM>" in page.words  # text of the figure is text of the page
    (image,) = page_of(Picture(f"{figure}.png", "", "Bars.")).all("img")
    assert image["alt"] == "Bars."
    assert base64.b64decode(image["src"].removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")


def test_a_table_says_which_row_and_column_a_number_is_of(page):
    assert len(page.all("caption")) == 1
    assert [th.get("scope") for th in page.all("th")] == ["col", "col", "row", "row"]
    assert [td.get("class") for td in page.all("td")] == [None, "number", None, "number", None]
    (box,) = [div for div in page.all("div") if div.get("class") == "scroll"]
    assert box["tabindex"] == "0"


def test_right_and_wrong_are_said_by_sign_and_word(page):
    assert page.words.count("✓ right") == page.words.count("✗ wrong") == 2
    assert len([span for span in page.all("span") if "verdict" in span.get("class", "")]) == 4  # none for None


def test_the_page_fits_a_phone_a_dark_room_and_paper(page):
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    for words in ("overflow-wrap: anywhere", "prefers-color-scheme: dark", "@media print", "overflow-x: auto"):
        assert words in page.text


# Clips, pictures and tables


def test_a_clip_is_called_what_its_bytes_are(page):
    urls = [audio["src"] for audio in page.all("audio")]  # the third example has none
    assert [url.split(";")[0] for url in urls] == ["data:audio/wav", "data:audio/flac"]
    assert base64.b64decode(urls[1].split(",")[1]) == clip("FLAC")
    assert [audio["aria-label"] for audio in page.all("audio")] == ["speech of example 1", "speech of example 2"]


@pytest.mark.parametrize("data", [b"", b"OggS", b"RIFF\x24\0\0\0AVI "])
def test_a_clip_of_another_format_is_refused(data):
    with pytest.raises(ValueError, match="a clip begins with .*expected the bytes of a WAV or FLAC"):
        page_of(Examples([item(data)]))


def test_an_example_that_lacks_something_is_refused():
    with pytest.raises(ValueError, match="an example has instruction, transcript, audio; expected also 'answers'"):
        Examples([{"instruction": "", "transcript": "", "audio": None}])


def test_a_picture_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"none\.v1\.svg or .*none\.v1\.png does not exist; expected a file"):
        page_of(Picture(tmp_path / "none.v1", "", ""))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("<svg", "cannot read .*expected an SVG file"),
        ('<svg><image href="http://a.test/b.png"/></svg>', "refers to 'http://a.test/b.png'"),
        ('<svg xmlns:x="http://www.w3.org/1999/xlink"><image x:href="b.png"/></svg>', "refers to 'b.png'"),
    ],
)
def test_a_picture_that_is_broken_or_needs_something_else_is_refused(tmp_path, content, complaint):
    (tmp_path / "a.svg").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=complaint):
        page_of(Picture(tmp_path / "a", "", ""))


def test_a_row_of_another_length_than_the_header_is_refused():
    with pytest.raises(ValueError, match=r"'Scores': the row \[1\] has 1 cells; expected 2"):
        Table("Scores", ["a", "b"], [[1]])


def test_the_same_blocks_are_markdown(blocks):
    text = render_markdown("Report", blocks)
    assert text.startswith("# Report\n\n## What was measured\n\nOne.\n\nTwo.\n\n|  | following | model |\n")
    assert "| vanilla | – | b |" in text
    assert "\n\n![Bars of five shares.](composition.v1.png)\n\nShares.\n\n" in text
    answers = "- text LLM ✓: cat\n- vanilla LSM ✗: the cat sat\n- self-powered LSM: a cat\n"
    assert f"**Name the animal.** — *the cat sat*\n\n{answers}" in text
    assert text.endswith(
        '## Settings\n\n|  |  |\n| --- | --- |\n| seed | 0 |\n| decoding | {"do_sample": false} |\n| revision | – |\n'
    )
