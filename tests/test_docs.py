"""README and documentation: every page runs from top to bottom, links lead somewhere, the site builds by itself."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import doc_commands
import pytest
from conftest import ROOT

DOCS = sorted(page.relative_to(ROOT).as_posix() for page in (ROOT / "docs").rglob("*.md"))
PAGES = ["README.md", *DOCS]
OTHERS = [  # their commands are recipes: they have to exist, results stand beside them
    name
    for name in ("CONTRIBUTING.md", "baselines/README.md", "benchmarks/README.md", "benchmarks/PROTOCOL.md")
    if (ROOT / name).exists()
]
LINKING = [*PAGES, *OTHERS, "CHANGELOG.md", "DECISIONS.md", "medseg_gym/tools/nano_weights/NANO.md"]
LINK = re.compile(r"!?\[[^\]\n]*\]\(([^)\s]+)\)")

pytestmark = pytest.mark.skipif(not (ROOT / "mkdocs.yml").exists(), reason="a source distribution has no docs/")


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs_from_top_to_bottom(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    modules = set(sys.modules)
    try:
        doc_commands.run_page(page)
    finally:
        for name in set(sys.modules) - modules:  # those that the page wrote
            if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
                del sys.modules[name]


@pytest.mark.parametrize("page", [*PAGES, *OTHERS])
def test_commands_in_sentences_exist(page: str) -> None:
    for command in doc_commands.spans(page):
        doc_commands.check(command, whole=False)


def test_a_command_is_run_marked_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "medseg-gym envs Nano\nvllm serve X  # needs a GPU\n# needs a server: both\nray stop\nmake x \\\n  y\n"
    found = list(doc_commands.commands(doc_commands.Block("page", 1, "", text)))
    assert [command.needs for command in found] == ["", "needs a GPU", "needs a server", "needs a server"]
    assert found[3].words == ("make", "x", "y")

    def command(line: str) -> doc_commands.Command:
        return next(doc_commands.commands(doc_commands.Block("page", 1, "", line)))

    for line, wrong in (
        ("medseg-gym evaluate --env MedSeg-Phantom-Nano-v0 --polcy Random --out x", "no option --polcy"),
        ("medseg-gym evaluate --env MedSeg-Phantom-Nano-v0 --policy Random", "Missing .*out"),
        ("medseg-gym tools downlod MedSAM2", "no command 'downlod'"),
        ("medseg-gym grpo --preset papr --set model=x --set env=y --out z", "papr"),
        ("medseg-gym grpo --preset paper --set modle=x --set env=y --out z", "modle"),
        ("python baselines/scripted.py --episods 3", "no --episods"),
        ("python baselines/no_such.py", "not there"),
        ("make coffee", "no target coffee"),
        ("pip install '.[no-such]'", "no extra no-such"),
        ("curl example.org", "nobody knows"),
    ):
        with pytest.raises((AssertionError, ValueError), match=wrong):
            doc_commands.check(command(line))
    with pytest.raises(AssertionError, match="neither run, nor marked"):
        doc_commands.run(command("curl example.org"))


@pytest.mark.parametrize("page", [page for page in LINKING if (ROOT / page).exists()])
def test_links_lead_somewhere(page: str) -> None:
    text = doc_commands.FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    for target in LINK.findall(re.sub(r"`[^`\n]*`", "", text)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if anchor and not anchor.startswith("medseg_gym."):  # of the reference, which the site's build checks
            assert anchor in anchors(file), f"{page}: {target} has no such heading; there are {sorted(anchors(file))}"


def anchors(file: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and Python-Markdown make them where they agree."""
    text = doc_commands.FENCE.sub("", file.read_text(encoding="utf-8"))
    titles = [re.sub(r"[`*_]|\[([^\]]*)\]\([^)]*\)", r"\1", t) for t in re.findall(r"^#+ +(.+)$", text, re.MULTILINE)]
    return {re.sub(r"[^\w\s-]", "", title).strip().lower().replace(" ", "-") for title in titles}


def test_examples_name_ids_that_exist() -> None:
    import gymnasium as gym

    import medseg_gym  # noqa: F401 - registers the ids

    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for name in re.findall(r"MedSeg-[A-Za-z0-9.]+-[A-Za-z0-9.]+-v0", text):
            assert name in gym.registry or name.startswith("MedSeg-My"), f"{page}: {name}"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mkdocs") is None, reason="needs pip install '.[docs]'")
def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    pages = {page.relative_to(tmp_path).as_posix(): page.read_text("utf-8") for page in tmp_path.rglob("*.html")}
    assert set(pages) >= {"index.html", "cluster.html", "reference/records.html", "benchmarks/PROTOCOL.html"}
    assert "unique, stable, sorts by patient" in html.unescape(pages["reference/records.html"])  # a field's comment
    for name, text in pages.items():
        loaded = re.findall(r'<(?:script|img|iframe|source)[^>]* src="([^"]*)"|<link[^>]* href="([^"]*)"', text)
        for address in (script or link for script, link in loaded):
            assert not re.match(r"(https?:)?//", address), f"{name} loads {address}"
    for sheet in tmp_path.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//|@import", sheet.read_text("utf-8")), sheet.name
