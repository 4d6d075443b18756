"""What the site needs beyond docs/: the pages and pictures of the repository's root, and links that lead to them."""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
HEAD = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)  # of the README, for the Hub
LINK = re.compile(r"\[([^\[\]]*)\]\(([^)#:\s]+)([^)\s]*)\)")
NAMED = re.compile(r"\[<code>([\w.]+)</code>\]")  # how docstrings name a class


def on_files(files, config):
    for source, target in PAGES.items():
        text = HEAD.sub("", (ROOT / source).read_text(encoding="utf-8"))
        files.append(File.generated(config, target, content=text))
    for picture in (ROOT / "assets").glob("*.png"):
        files.append(File.generated(config, f"assets/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links lead to where the site has a file of the repository; what it does not have is named without a link."""
    sources = {target: source for source, target in PAGES.items()}
    own = sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def mend(link: re.Match) -> str:
        text, target, anchor = link.groups()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(own), target))
        path = PAGES.get(path, path.removeprefix("docs/"))
        return f"[{text}]({path}{anchor})" if files.get_file_from_path(path) else text

    return LINK.sub(mend, markdown)


def on_page_content(html, page, config, files):
    """The names of classes in docstrings become links, where the page describes the class."""
    places = {place.rpartition(".")[2]: place for place in re.findall(r'id="([\w.]+)"', html)}

    def link(name: re.Match) -> str:
        code = f"<code>{name[1]}</code>"
        return f'<a href="#{places[name[1]]}">{code}</a>' if name[1] in places else code

    return NAMED.sub(link, html)
