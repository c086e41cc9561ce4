"""MkDocs hooks: pages of the repository outside docs/ join the site, and links between files join pages."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = (  # in the site under the path that they have in the repository
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "DECISIONS.md",
    "baselines/README.md",
    "benchmarks/LEADERBOARD.md",
    "benchmarks/PROTOCOL.md",
    "benchmarks/README.md",
    "benchmarks/leaderboard.html",
    "benchmarks/results/learn_cue.png",
    "medseg_gym/tools/nano_weights/NANO.md",
)
LINK = re.compile(r"(\]\()([^)#\s]+)([^)]*\))")


def on_files(files: Files, *, config: Any) -> Files:
    """Adds what lies outside."""
    for path in OUTSIDE:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Links as GitHub reads them, relative to the file, become links as the site has it, where docs/ is the top."""
    here = page.file.src_uri
    inside = here not in OUTSIDE
    folder = PurePosixPath("docs", here).parent if inside else PurePosixPath(here).parent

    def link(match: re.Match[str]) -> str:
        before, target, after = match.groups()
        if ":" in target:
            return match.group()
        path = normpath(str(folder / target))
        there = path.removeprefix("docs/")
        return f"{before}{relpath(there, str(PurePosixPath(here).parent))}{after}"

    return LINK.sub(link, markdown)
