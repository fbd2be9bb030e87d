"""Hooks of the documentation site: pages from the top of the repository, and links and lists as GitHub reads them.

``mkdocs.yml`` names this file. The README is the home page of the site, and ``documentation/index.md`` its list of all pages.
The pages are the files of the repository; the site has no second copy of any text.
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
"""Place in the site by place in the repository, for the files that are not at the same place below ``documentation/``."""
SOURCE = {place: source for source, place in MOVED.items()}
LINK = re.compile(r"(?P<image>!?)\[(?P<words>[^\]]*)\]\((?P<target>[^)\s]+)\)")
BLOCK = re.compile(r"(^ *```.*?^ *```)", flags=re.MULTILINE | re.DOTALL)


def place_in_site(source: str) -> str | None:
    """Return the place in the site of a file of the repository, None if the site does not have it."""
    if source in MOVED:
        return MOVED[source]
    return source.removeprefix("documentation/") if source.startswith("documentation/") else None


def place_in_repository(place: str) -> str:
    """Return the place in the repository of a file of the site."""
    return SOURCE.get(place, f"documentation/{place}")


def links_of_site(markdown: str, source: str) -> str:
    """Return the Markdown of a file of the repository with its links as they are in the site.

    A link to a file that the site does not have, such as source code, becomes its words; a link to a file that does not
    exist stays, so that a strict build fails.

    Args:
        markdown: the content of the file.
        source: its place in the repository.
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
    """Takes what is indented by two or three spaces below an entry of a list as its content, as GitHub does."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802
        """Build the parser again with this indentation; other extensions must come later."""
        md.tab_length = 2
        md.build_parser()


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Make anchors and lists as GitHub does."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = slug
    config.markdown_extensions.insert(0, ListsOfGitHub())
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files of the repository that lie outside the folder of the documentation."""
    contents = files.get_file_from_path("index.md")
    assert contents is not None
    files.remove(contents)
    for source, place in MOVED.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Rewrite the links of a page."""
    return links_of_site(markdown, place_in_repository(page.file.src_uri))
