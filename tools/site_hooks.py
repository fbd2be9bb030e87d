"""Hooks of the documentation site: pages from the root of the repository, and links, anchors and lists as on GitHub.

``mkdocs.yml`` names this file. The README is the home page of the site, and ``documentation/index.md`` its list of pages. The
site is built from the files of the repository without copying any text.
"""

import html
import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

from markdown import Extension, Markdown
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
MOVED = {
    "README.md": "index.md",
    "documentation/index.md": "contents.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "LICENSE": "licence.txt",
}
"""Path in the site by path in the repository, for files whose path below ``documentation/`` differs."""
SOURCE = {place: source for source, place in MOVED.items()}
LINK = re.compile(r"(?P<image>!?)\[(?P<words>[^\]]*)\]\((?P<target>[^)\s]+)\)")
BLOCK = re.compile(r"(^ *```.*?^ *```)", flags=re.MULTILINE | re.DOTALL)


def place_in_site(source: str) -> str | None:
    """Return the path in the site of a file in the repository; None if the file is not part of the site."""
    if source in MOVED:
        return MOVED[source]
    return source.removeprefix("documentation/") if source.startswith("documentation/") else None


def place_in_repository(place: str) -> str:
    """Return the path in the repository of a file in the site."""
    return SOURCE.get(place, f"documentation/{place}")


def links_of_site(markdown: str, source: str) -> str:
    """Return the Markdown of a file with its links rewritten for the site.

    A link to a file outside the site, such as source code, is replaced by its text. A link to a file that does not exist is
    kept, so that a strict build fails.

    Args:
        markdown: Content of the file.
        source: Path of the file in the repository.
    """
    place = place_in_site(source)
    assert place is not None

    def link_of_site(match: re.Match[str]) -> str:
        target, hash_sign, anchor = match["target"].partition("#")
        if not target or re.match(r"[a-z]+:", target):
            return match[0]
        wanted = normpath(str(PurePosixPath(source).parent / target))
        there = place_in_site(wanted)
        if there is None:
            return match["words"] if (ROOT / wanted).exists() else match[0]
        link = relpath(there, str(PurePosixPath(place).parent))
        return f"{match['image']}[{match['words']}]({link}{hash_sign}{anchor})"

    parts = BLOCK.split(markdown)
    return "".join(part if index % 2 else LINK.sub(link_of_site, part) for index, part in enumerate(parts))


def slug(heading: str, separator: str) -> str:
    """Return the anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", html.unescape(heading).strip().lower()).replace(" ", separator)


class ListsOfGitHub(Extension):
    """Markdown extension that accepts list content indented by two or three spaces, as GitHub does."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802
        """Rebuild the parser with this indentation; other extensions must be added later."""
        md.tab_length = 2
        md.build_parser()


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Configure anchors and lists as on GitHub."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = slug
    config.markdown_extensions.insert(0, ListsOfGitHub())
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files that lie outside the documentation folder."""
    contents = files.get_file_from_path("index.md")
    assert contents is not None
    files.remove(contents)
    for source, place in MOVED.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Rewrite the links of a page."""
    return links_of_site(markdown, place_in_repository(page.file.src_uri))
