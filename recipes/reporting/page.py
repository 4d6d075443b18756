"""Write an HTML page from blocks: text, tables, pictures, examples with their audio, and facts.

The page is self-contained: it needs no scripts, network or other files. All text is escaped. The same blocks give the
same page, byte for byte. They can also be written as Markdown, without the audio.
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
from recipes.reporting.markdown import to_markdown


@dataclass
class Text:
    """Paragraphs of plain text, with an optional heading that also appears in the page's contents."""

    paragraphs: str | Sequence[str] = ()
    heading: str = ""

    def __post_init__(self):
        if isinstance(self.paragraphs, str):
            self.paragraphs = [self.paragraphs]


@dataclass
class Table:
    """Rows of cells below a header. The first cell is the name of its row. None is shown as a dash."""

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
    """A figure: an SVG file, which is inlined, or a PNG file. If `path` has no suffix, SVG is preferred."""

    path: str | Path
    caption: str
    alt: str


@dataclass
class Examples:
    """Clips with answers of models: dicts with `instruction`, `transcript`, `audio` and `answers`.

    `audio` is the bytes of a WAV or FLAC file, or None. An answer is (label, text, whether it is right or None).
    """

    items: Sequence[dict]

    def __post_init__(self):
        for item in self.items:
            if missing := [key for key in ("instruction", "transcript", "audio", "answers") if key not in item]:
                raise ValueError(f"an example has {', '.join(item)}; expected also {missing[0]!r}.")


@dataclass
class Facts:
    """Settings, versions and similar facts: values by name."""

    facts: dict


Block = Text | Table | Picture | Examples | Facts
VERDICTS = {True: " ✓", False: " ✗", None: ""}  # of an answer


def write_page(path: str | Path, title: str, subtitle: str, blocks: Sequence[Block]) -> None:
    """Write the page atomically, creating its folder if necessary.

    Raises:
        ValueError: a block is unknown, a picture does not exist or refers to another file, or a clip is neither WAV nor
            FLAC.
    """
    write_whole(path, render_page(title, subtitle, blocks))


def render_page(title: str, subtitle: str, blocks: Sequence[Block]) -> str:
    """Return the page as a string. Raises ValueError as `write_page` does."""
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


def render_markdown(title: str, blocks: Sequence[Block]) -> str:
    """Return the blocks as Markdown, for a file in the folder of the pictures."""
    return "\n\n".join([f"# {title}", *filter(None, map(_markdown, blocks))]) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Text():
            return "\n\n".join([*([f"## {block.heading}"] if block.heading else []), *block.paragraphs])
        case Table():
            return to_markdown(block.header, [[_shown(cell) for cell in row] for row in block.rows])
        case Picture():
            return f"![{block.alt}]({Path(block.path).name}.png)\n\n{block.caption}"
        case Facts():
            return to_markdown(["", ""], [[name, _shown(value)] for name, value in block.facts.items()])
    return "\n\n".join(
        f"**{item['instruction']}** — *{item['transcript']}*\n\n"
        + "\n".join(f"- {label}{VERDICTS[right]}: {text}" for label, text, right in item["answers"])
        for item in block.items
    )


def _shown(value) -> str:
    """Return a cell or fact as text: numbers in full, lists and dicts as JSON, None as a dash."""
    if value is None:
        return "–"
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, dict | list | tuple) else str(value)


def _numeric(table: Table) -> list[bool]:
    """Return for each column whether it has only numbers, intervals or percentages; False for the first column."""
    columns = [[_shown(row[i]) for row in table.rows] for i in range(len(table.header))]
    numbers = [all(re.fullmatch(r"[\d\s.,:%()\[\]–−±+/×-]*", cell) for cell in column) for column in columns]
    return [i > 0 and number for i, number in enumerate(numbers)]


def _audio_url(data: bytes) -> str:
    """Return a clip as a `data:` URL. Raises ValueError if it is neither WAV nor FLAC."""
    if data.startswith(b"fLaC"):
        kind = "flac"
    elif data.startswith(b"RIFF") and data[8:12] == b"WAVE":
        kind = "wav"
    else:
        raise ValueError(f"a clip begins with {data[:12]!r}; expected the bytes of a WAV or FLAC file.")
    return f"data:audio/{kind};base64,{base64.b64encode(data).decode()}"


def _picture(picture: Picture, name: str) -> Markup:
    """Return a picture as an HTML element. `name` is the prefix of the ids in it, to be unique on the page."""
    path = Path(picture.path)
    tried = [path] if path.suffix in (".svg", ".png") else [path.with_name(path.name + end) for end in (".svg", ".png")]
    path = next((path for path in tried if path.exists()), None)
    if path is None:
        raise ValueError(
            f"{' or '.join(map(str, tried))} does not exist; expected a file that recipes.reporting.figures wrote."
        )
    if path.suffix == ".svg":
        return _svg(path, name, picture.alt)
    data = base64.b64encode(path.read_bytes()).decode()
    return Markup('<img src="data:image/png;base64,{}" alt="{}">').format(data, picture.alt)


def _svg(path: Path, name: str, alt: str) -> Markup:
    """Return an SVG file as an HTML element without namespaces and metadata. Raises ValueError if it is invalid."""
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
            raise ValueError(f"{path} refers to {attributes['href']!r}; expected a picture without external files.")
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
