"""Pages of the site that lie outside docs/: brought in as they are, and their links with them.

A hook of mkdocs. In the repository a link is relative to the file it stands in. On the site the
README is the first page, other files of the root lie beside those of docs/, and examples/ below.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
# Place in the repository -> place on the site.
OUTSIDE = {
    "README.md": "index.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "CITATION.cff": "CITATION.cff",
    "CODE_OF_CONDUCT.md": "CODE_OF_CONDUCT.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "LICENSE": "LICENSE",
    "SECURITY.md": "SECURITY.md",
}
OUTSIDE |= {
    place: place
    for folder in ("examples", "examples/jobs")
    for place in (f"{folder}/{path.name}" for path in (ROOT / folder).glob("*.*"))
}
SOURCES = {site: source for source, site in OUTSIDE.items()}
FENCED = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(?<=\]\()(?!https?:|#)([^)#\s]+)")


def on_files(files: Files, config) -> Files:
    for source, site in OUTSIDE.items():
        files.append(File.generated(config, site, content=(ROOT / source).read_text("utf-8")))
    return files


def on_page_markdown(markdown: str, page, config, files) -> str:
    here = page.file.src_uri
    folder = posixpath.dirname(SOURCES.get(here, f"docs/{here}"))

    def moved(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, link[1]))
        site = OUTSIDE.get(target, target.removeprefix("docs/"))
        return posixpath.relpath(site, posixpath.dirname(here) or ".")

    # Code stands in every second part; `names[0](first)` in it is no link.
    parts = FENCED.split(markdown)
    parts[::2] = [LINK.sub(moved, text) for text in parts[::2]]
    return "".join(parts)
