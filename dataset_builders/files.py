"""Fingerprints of files, YAML without duplicate keys, JSON lines, and atomic writes, for all commands.

A result that is kept and reused carries the fingerprint of its inputs, because the content at a path may change.
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

# Files of up to WHOLE bytes are hashed completely; of others, PIECES pieces of PIECE bytes and the last TAIL bytes.
WHOLE, PIECE, PIECES, TAIL = 2**20, 2**12, 64, 2**16
ADAPTER = "adapter_config.json"
PARTIAL = ".partial"  # suffix of a file or folder that is not whole yet
# The files that loading a checkpoint reads. Trainings write logs, cards and checkpoints beside them.
MODEL_FILES = ("*.safetensors", "*model*.bin", "*config.json", "tokenizer*", "vocab*", "merges.txt", "*.model")
MODEL_FILES += ("*.jinja", "*tokens*.json")


def fingerprint(path: str | Path) -> str | None:
    """Return `"sha256:"` and 16 hex digits of the names, sizes and content of the files at `path`; None if it does not
    exist.

    Only some pieces of files over 1 MiB are read, and some of every tensor of `.safetensors` files: this is cheap for
    checkpoints on a network disk, and every training changes some of them. For a checkpoint, only the files that
    loading reads count, and the base model of an adapter. In other folders, README.md and hidden files do not count.
    """
    if not os.path.exists(path):  # Path.exists would raise if the text is too long for a path
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
    """Return the `fingerprint` of a local path or the commit of a Hub repository; None if neither exists."""
    if source is None or os.path.exists(source):
        return source and fingerprint(source)
    try:
        snapshot = snapshot_download(str(source), revision=revision, repo_type=repo_type, allow_patterns="config.json")
    except (OSError, ValueError):  # the repository or the network is missing, or it is not a Hub id
        return None
    return Path(snapshot).name  # the commit


def middle(file: Path) -> bytes:
    """Return a file's size and 4 KiB from its middle: a cheap check that none of very many small files has changed."""
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
    """Return the positions of each tensor's start, middle and end, in order; empty if the file is not safetensors."""
    length = int.from_bytes(content.read(8), "little")
    try:
        header = json.loads(content.read(min(length, size)))
        places = sorted(entry["data_offsets"] for name, entry in header.items() if name != "__metadata__")
    except (ValueError, TypeError, KeyError, AttributeError):  # loading the file will raise
        return []
    return [8 + length + place for start, end in places for place in (start, (start + end) // 2, end - PIECE)]


def differences(before: Mapping, now: Mapping) -> dict[str, tuple]:
    """Return the settings that differ, as `{name: (before, now)}`. Nested names are joined with dots, and a missing
    value is None."""
    differing = {}
    for name in sorted(before.keys() | now.keys()):
        pair = before.get(name), now.get(name)
        if all(isinstance(value, Mapping) for value in pair):
            differing |= {f"{name}.{inner}": values for inner, values in differences(*pair).items()}
        elif pair[0] != pair[1]:
            differing[name] = pair
    return differing


class _Loader(yaml.SafeLoader):
    """A YAML loader that refuses duplicate keys; the standard one silently drops the first."""

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.composer.ComposerError(None, None, f"duplicate key {twice!r}", node.start_mark)
        return node


def read_yaml(path: str | Path, kind: str = "YAML") -> object:
    """Return the content of a YAML file. `kind` describes the file in errors.

    Raises:
        ValueError: the file cannot be read, is not valid YAML, or has a duplicate key. Names the file, line and key.
    """
    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ValueError(f"{path} cannot be read as {kind}: {error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error


def read_template(path: Path, **filters: Callable) -> Template:
    """Read the Jinja template of an HTML page. Filled-in text is escaped, and a missing variable is an error."""
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
    """Return the path at which `target` is written until it is whole."""
    target = Path(target)
    return target.with_name(target.name + PARTIAL)


@contextlib.contextmanager
def whole(target: str | Path, resume: bool = False) -> Iterator[Path]:
    """Write a file or a folder atomically: the block writes to the path that it gets, which is renamed to `target` when
    the block ends without an error.

    If the block is interrupted, its files stay at that path (`partial_of`). The next block finds them there if `resume`
    is true; otherwise they are deleted first.
    """
    partial = partial_of(target)
    if partial.is_dir() and not resume:
        shutil.rmtree(partial)
    elif not resume:
        partial.unlink(missing_ok=True)
    yield partial
    os.replace(partial, target)


def write_whole(file: str | Path, text: str) -> None:
    """Write a text file atomically, creating its folder if necessary.

    Half a surrogate pair, which an LLM may write but UTF-8 cannot encode, becomes `?`.
    """
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    with whole(file) as partial:
        partial.write_text(text, encoding="utf-8", errors="replace")


def read_lines(file: Path) -> list[dict]:
    """Return the records of a file of JSON lines; none if the file does not exist. A last line without a newline is
    ignored, because its writer was killed."""
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]]  # `splitlines` would also split texts


def append_lines(file: Path, records: Iterable[dict | list]) -> None:
    """Append records to a file of JSON lines and flush it to disk, creating its folder if necessary. A last line
    without a newline is removed, because its writer was killed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+b") as lines:
        if lines.tell():
            lines.seek(-1, os.SEEK_END)
            if lines.read() != b"\n":
                lines.seek(0)
                lines.truncate(lines.read().rfind(b"\n") + 1)
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        lines.write(text.encode("utf-8", "surrogatepass"))  # `json.loads` can read this
        lines.flush()
        os.fsync(lines.fileno())
