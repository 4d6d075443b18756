"""One HTML page from blocks: text, tables, pictures, examples with their audio, and facts.

The page needs nothing else: no script, no network, no other file. Text of any origin is shown as text, never taken for
HTML. The same blocks give the same page, byte for byte.
"""

import base64
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from markupsafe import Markup

from dataset_builders.files import read_template, write_whole


@dataclass
class Text:
    """Paragraphs of plain text, under a heading if there is one. A heading also goes into the page's contents."""

    paragraphs: str | Sequence[str] = ()
    heading: str = ""

    def __post_init__(self):
        if isinstance(self.paragraphs, str):
            self.paragraphs = [self.paragraphs]


@dataclass
class Table:
    """Rows of cells under a header; the first cell names its row. None is shown as a dash."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence]
    note: str = ""

    def __post_init__(self):
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(f"{self.caption!r}: the row {row} has {len(row)} cells; expected {len(self.header)}.")


@dataclass
class Picture:
    """A figure: an SVG file, drawn into the page, or a PNG file. `path` may lack the suffix; SVG is then preferred."""

    path: str | Path
    caption: str
    alt: str


@dataclass
class Examples:
    """Clips and what models answered: dicts of `instruction`, `transcript`, `audio` and `answers`.

    `audio` holds the bytes of a WAV or FLAC file, or is None; an answer is (label, text, right or wrong or None).
    """

    items: Sequence[dict]

    def __post_init__(self):
        for item in self.items:
            if missing := [key for key in ("instruction", "transcript", "audio", "answers") if key not in item]:
                raise ValueError(f"an example has {', '.join(item)}; expected {missing[0]!r}, too.")


@dataclass
class Facts:
    """Settings, versions and the like: name to value."""

    facts: dict


Block = Text | Table | Picture | Examples | Facts


def write_page(path: str | Path, title: str, subtitle: str, blocks: Sequence[Block]) -> None:
    """Write the page, whole or not at all; its folder is made.

    Raises:
        ValueError: an unknown block, a picture that is not there or refers to something outside, or a clip that is
            neither WAV nor FLAC.
    """
    write_whole(path, render_page(title, subtitle, blocks))


def render_page(title: str, subtitle: str, blocks: Sequence[Block]) -> str:
    """The page as a string; raises ValueError as `write_page` does."""
    for block in blocks:
        if not isinstance(block, Block):
            raise ValueError(f"a block is {block!r}; expected Text, Table, Picture, Examples or Facts.")
    template = read_template(Path(__file__).with_name("page.html"), shown=_shown, audio_url=_audio_url)
    return template.render(
        title=title,
        subtitle=subtitle,
        blocks=[(type(block).__name__, block) for block in blocks],
        headings=[block.heading for block in blocks if isinstance(block, Text) and block.heading],
        numeric=_numeric,
        picture=_picture,
    )


def _shown(value) -> str:
    """A cell or fact as text: numbers in full, lists and dicts as JSON, None as a dash."""
    if value is None:
        return "–"
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, dict | list | tuple) else str(value)


def _numeric(table: Table) -> list[bool]:
    """Whether each column but the first holds numbers only (intervals and percentages are numbers)."""
    columns = [[_shown(row[i]) for row in table.rows] for i in range(len(table.header))]
    numbers = [all(re.fullmatch(r"[\d\s.,:%()\[\]–−±+/×-]*", cell) for cell in column) for column in columns]
    return [i > 0 and number for i, number in enumerate(numbers)]


def _audio_url(data: bytes) -> str:
    """A clip as a `data:` URL; raises ValueError."""
    if data.startswith(b"fLaC"):
        kind = "flac"
    elif data.startswith(b"RIFF") and data[8:12] == b"WAVE":
        kind = "wav"
    else:
        raise ValueError(f"a clip begins with {data[:12]!r}; expected the bytes of a WAV or FLAC file.")
    return f"data:audio/{kind};base64,{base64.b64encode(data).decode()}"


def _picture(picture: Picture, name: str) -> Markup:
    """A picture as an element of the page; `name` begins the ids in it, which must be unique there."""
    path = Path(picture.path)
    tried = [path] if path.suffix in (".svg", ".png") else [path.with_name(path.name + end) for end in (".svg", ".png")]
    path = next((path for path in tried if path.exists()), None)
    if path is None:
        raise ValueError(
            f"no picture {' or '.join(map(str, tried))}; expected a file that recipes.reporting.figures wrote."
        )
    if path.suffix == ".svg":
        return _svg(path, name, picture.alt)
    data = base64.b64encode(path.read_bytes()).decode()
    return Markup('<img src="data:image/png;base64,{}" alt="{}">').format(data, picture.alt)


def _svg(path: Path, name: str, alt: str) -> Markup:
    """An SVG file as an element, without namespaces (HTML knows them) and metadata; raises ValueError."""
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise ValueError(
            f"cannot read {path}: {error}; expected an SVG file that recipes.reporting.figures wrote."
        ) from error
    for child in root.findall("{*}metadata"):
        root.remove(child)
    for element in root.iter():
        element.tag = re.sub(r"\{.*\}", "", element.tag)
        attributes = {re.sub(r"\{.*\}", "", key): value for key, value in element.attrib.items()}
        if not attributes.get("href", "#").startswith(("#", "data:image/")):
            raise ValueError(f"{path} refers to {attributes['href']!r}; expected a picture that needs nothing else.")
        for key, value in attributes.items():
            if key == "id":
                value = f"{name}-{value}"
            elif key == "href":
                value = re.sub("^#", f"#{name}-", value)
            attributes[key] = value.replace("url(#", f"url(#{name}-")
        element.attrib.clear()
        element.attrib.update(attributes)
    root.attrib.update({"role": "img", "aria-label": alt})
    return Markup(ElementTree.tostring(root, encoding="unicode"))
