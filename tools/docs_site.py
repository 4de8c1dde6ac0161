"""Hooks of MkDocs: pages from outside of docs/, and links that lead out of it.

README.md, CONTRIBUTING.md and a few others are where GitHub expects them, and become pages of the site. A link from
one page to another is rewritten to lead to the page; a link to another file of the repository becomes the file's path,
since the site does not have the file. A link to nothing is an error.
"""

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent

# file of the repository -> page of the site
PAGES = {
    "README.md": "readme.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "docker/README.md": "docker.md",
}
SOURCES = {page: source for source, page in PAGES.items()}

# Text and target of a link that is no image and leads neither to a host nor to a heading of the same page.
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])+)\]\((?!https?:|mailto:|#)([^)\s]+)\)")


def on_files(files: "Files", *, config: "MkDocsConfig") -> "Files":
    """Add the pages that are outside of docs/."""
    from mkdocs.structure.files import File

    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, *, page: "Page", **_: Any) -> str:
    """Rewrite the links of a page. FileNotFoundError if one leads to nothing."""
    return with_links(markdown, page.file.src_uri)


def with_links(markdown: str, page: str) -> str:
    """The text of a page of the site, with links that the site can follow."""
    source = SOURCES.get(page, f"docs/{page}")

    def rewritten(link: re.Match[str]) -> str:
        text, target = link[1], link[2]
        path, _, heading = target.partition("#")
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if not (ROOT / file).exists():
            raise FileNotFoundError(f"{source}: a link leads to {file}, which is not there")
        found = PAGES.get(file) or (file.removeprefix("docs/") if file.startswith("docs/") else None)
        if found is not None and not (ROOT / file).is_dir():
            relative = posixpath.relpath(found, posixpath.dirname(page) or ".")
            return f"[{text}]({relative}{'#' + heading if heading else ''})"
        named = text.strip("`").rstrip("/")
        return f"`{file}`" if file == named or file.endswith(f"/{named}") else f"{text} (`{file}`)"

    return LINK.sub(rewritten, markdown)
