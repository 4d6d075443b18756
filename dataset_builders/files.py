"""Files as all commands read and write them: what they hold, as a fingerprint; YAML that loses no key; JSON lines;
written whole.

Whatever is kept and reused carries the fingerprint of what it was made from, since a path says nothing about what is
there by now.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import yaml
from huggingface_hub import snapshot_download
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

WHOLE, PIECE, PIECES, TAIL = 2**20, 2**12, 64, 2**16  # bytes, and pieces of larger files
ADAPTER = "adapter_config.json"
PARTIAL = ".partial"  # ends the name of what is not whole yet
# What loading a checkpoint reads; beside it, trainings write logs, cards and checkpoints.
MODEL_FILES = ("*.safetensors", "*model*.bin", "*config.json", "tokenizer*", "vocab*", "merges.txt", "*.model")
MODEL_FILES += ("*.jinja", "*tokens*.json")


def fingerprint(path: str | Path) -> str | None:
    """What a file or folder holds: `"sha256:"` and 16 hex digits of its files' names, sizes and content. None if there
    is nothing.

    Of files of more than 1 MiB pieces are read, of `.safetensors` some of every tensor: cheap for checkpoints on a
    network's disk, and no training leaves all of them as they were. Of a checkpoint those files count that loading
    reads, and what an adapter is for; elsewhere cards and hidden files do not.
    """
    if not os.path.exists(path):  # no error for a text that is too long to be a path
        return None
    path = Path(path)
    digest = hashlib.sha256()
    for file in _files(path):
        digest.update(f"{file.relative_to(path).as_posix()} {file.stat().st_size} ".encode("utf-8", "surrogateescape"))
        for piece in _pieces(file):
            digest.update(piece)
    if (path / ADAPTER).is_file():
        base = json.loads((path / ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path")
        digest.update(repr(base and content_of(base)).encode())
    return f"sha256:{digest.hexdigest()[:16]}"


def content_of(source: str | Path | None, revision: str | None = None, repo_type: str = "model") -> str | None:
    """The `fingerprint` of what is here, the commit of what is on the Hub; None of what is nowhere."""
    if source is None or os.path.exists(source):
        return source and fingerprint(source)
    try:
        found = snapshot_download(str(source), revision=revision, repo_type=repo_type, allow_patterns="config.json")
    except (OSError, ValueError):  # no such repository, no network, no Hub id
        return None
    return Path(found).name


def middle(file: Path) -> bytes:
    """A file's size and 4 KiB of it: tells one of very many small files from another in its place."""
    size = file.stat().st_size
    with file.open("rb") as content:
        content.seek(max(0, size // 2 - PIECE // 2))
        return b"%d " % size + content.read(PIECE)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if (path / "config.json").is_file() or (path / ADAPTER).is_file():
        return sorted({file for pattern in MODEL_FILES for file in path.glob(pattern) if file.is_file()})
    files = []
    for folder, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(folder, name) for name in names if not name.startswith(".") and name != "README.md"]
    return sorted(file for file in files if file.is_file())


def _pieces(file: Path) -> Iterator[bytes]:
    size = file.stat().st_size
    with file.open("rb") as content:
        if size <= WHOLE:
            yield content.read()
            return
        starts = _tensors(content, size) if file.suffix == ".safetensors" else []
        for start in starts or [size * place // PIECES for place in range(PIECES)]:
            content.seek(max(0, start))
            yield content.read(PIECE)
        content.seek(size - TAIL)
        yield content.read()


def _tensors(content: BinaryIO, size: int) -> list[int]:
    """Where tensors begin, are half over and end, in the format's own order; none of a file that is not of it."""
    length = int.from_bytes(content.read(8), "little")
    try:
        header = json.loads(content.read(min(length, size)))
        places = sorted(entry["data_offsets"] for name, entry in header.items() if name != "__metadata__")
    except (ValueError, TypeError, KeyError, AttributeError):  # whoever loads it will say so
        return []
    return [8 + length + place for start, end in places for place in (start, (start + end) // 2, end - PIECE)]


def differences(before: Mapping, now: Mapping) -> dict[str, tuple]:
    """What differs between two dictionaries of settings: names, with dots for those inside, and the values `(before,
    now)`, None for one that is missing."""
    found = {}
    for name in sorted(before.keys() | now.keys()):
        pair = before.get(name), now.get(name)
        if all(isinstance(value, Mapping) for value in pair):
            found |= {f"{name}.{inner}": values for inner, values in differences(*pair).items()}
        elif pair[0] != pair[1]:
            found[name] = pair
    return found


class _Loader(yaml.SafeLoader):
    """YAML in which no key may stand twice: the first would be lost in silence."""

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.composer.ComposerError(None, None, f"duplicate key {twice!r}", node.start_mark)
        return node


def read_yaml(path: str | Path, kind: str = "YAML") -> object:
    """What a YAML file says; `kind` is what it should be.

    Raises:
        ValueError: it cannot be read, is no YAML, or has a key twice; names the file, the line and the key.
    """
    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ValueError(f"{path} cannot be read as {kind}: {error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error


def read_template(path: Path, **filters: Callable) -> Template:
    """The Jinja template of an HTML page: what is filled in is escaped, and a variable that is missing is an error."""
    environment = Environment(
        loader=FileSystemLoader(path.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    return environment.get_template(path.name)


def partial_of(target: str | Path) -> Path:
    """Where `target` is written until it is whole."""
    target = Path(target)
    return target.with_name(target.name + PARTIAL)


@contextlib.contextmanager
def whole(target: str | Path, resume: bool = False) -> Iterator[Path]:
    """Write a file or a folder that is never seen half written: the block writes to the path that it is given, which
    becomes `target` when the block ends without an error.

    What an interrupted block wrote stays at that path (`partial_of`). The next one begins without it, or with it if
    `resume`.
    """
    partial = partial_of(target)
    if partial.is_dir() and not resume:
        shutil.rmtree(partial)
    elif not resume:
        partial.unlink(missing_ok=True)
    yield partial
    os.replace(partial, target)


def write_whole(file: str | Path, text: str) -> None:
    """Write a text file that is never seen half written; its folder is made.

    Half a surrogate pair, which an LLM's answer may hold and UTF-8 may not, is written as `?`.
    """
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    with whole(file) as partial:
        partial.write_text(text, encoding="utf-8", errors="replace")


def read_lines(file: Path) -> list[dict]:
    """The records of a file of JSON lines, none if it is not there. A last line without its end was torn by a kill and
    is no record."""
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]]  # texts may hold what `splitlines` splits


def append_lines(file: Path, records: Iterable[dict | list]) -> None:
    """Append records to a file of JSON lines, and have the disk hold them; its folder is made. A last line that a kill
    tore is cut off."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+b") as lines:
        if lines.tell():
            lines.seek(-1, os.SEEK_END)
            if lines.read() != b"\n":
                lines.seek(0)
                lines.truncate(lines.read().rfind(b"\n") + 1)
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        lines.write(text.encode("utf-8", "surrogatepass"))  # as `json.loads` reads it
        lines.flush()
        os.fsync(lines.fileno())
