"""The leaderboard's page in a browser: what its script sorts, filters and keeps in the address, and no errors.

Runs where a Chromium is installed (`$MEDSEG_GYM_CHROMIUM` names another one) and is skipped elsewhere. With
`$MEDSEG_GYM_AXE` naming an axe.min.js (npm package axe-core) its accessibility rules are tried too.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from conftest import ROOT
from page_tree import Node, tree

PAGE = ROOT / "benchmarks" / "leaderboard.html"
CHROMIUM = os.environ.get("MEDSEG_GYM_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
AXE = os.environ.get("MEDSEG_GYM_AXE", "")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PAGE.is_file(), reason="no published page beside the tests"),
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium here; install one, or name it by $MEDSEG_GYM_CHROMIUM"),
]

# Told by a script that a copy of the page is given: what happens to controls that are used.
USE = """
const all = s => [...document.querySelectorAll(s)], told = {};
const order = id => all("#" + id + " tbody tr").map(r => r.dataset.policy + " " + r.dataset.tool);
const head = (id, key) => document.querySelector("#" + id + " th[data-sort=" + key + "]");
const press = key => { head("t-quick", key).querySelector("button").click(); return order("t-quick"); };
told.rank = order("t-quick");
const way = () => head("t-quick", "iou").getAttribute("aria-sort");
told.once = press("iou"); told.onceSort = way(); told.address = location.hash;
told.twice = press("iou"); told.twiceSort = way();
told.thrice = press("iou"); told.thriceSort = way();
told.missing = press("noc80").slice(-2);
const tool = document.querySelector("select[name=tool]");
tool.value = "GrabCut"; tool.dispatchEvent(new Event("change"));
const seen = all("tr[data-tool], .strip[data-tool], .gains figure, .pair").filter(e => e.checkVisibility());
told.tools = [...new Set(seen.map(e => e.dataset.tool))];
told.said = document.querySelector("output").textContent;
told.filtered = location.hash;
document.querySelector("button[type=reset]").click();
setTimeout(() => {
  told.reset = order("t-quick"); told.clean = location.hash;
  told.hidden = all("main [hidden]:not(.empty)").length;
  location.hash = "#modality=CT&at=btcv";
  setTimeout(() => {
    told.sections = all("main > section:not([hidden])").map(e => e.id);
    told.focusable = all(".wide").every(e => e.tabIndex === 0);
    told.wide = document.documentElement.scrollWidth <= innerWidth;
    const note = document.createElement("pre");
    note.id = "told"; note.textContent = JSON.stringify(told); document.body.append(note);
  }, 200);
}, 50);
"""


def shown(file: Path, state: str = "", width: int = 1400) -> Node:
    """The page as the browser has it once its scripts have run; an uncaught error of theirs fails."""
    with TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        done = subprocess.run(
            [
                *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"),
                *(f"--user-data-dir={profile}", "--virtual-time-budget=4000"),
                *(f"--window-size={width},900", "--dump-dom", f"{file.as_uri()}{state}"),
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-2000:]
    assert not re.findall(r"CONSOLE.*(?:Uncaught|Refused|Error).*", done.stderr)
    return tree(done.stdout)


def patched(folder: Path, script: str, *, policy: bool = False) -> Path:
    """A copy of the page that runs one more script; without the policy that would forbid it."""
    text = PAGE.read_text(encoding="utf-8")
    bare, count = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    assert count == 1
    file = folder / "page.html"
    file.write_text(
        (text if policy else bare).replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8"
    )
    return file


def rows(root: Node, table: str) -> list[Node]:
    return root.one("table", id=table).one("tbody").all("tr")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copy(PAGE, tmp_path / "leaderboard.html"))


def test_the_state_in_the_address_is_applied_when_the_page_is_opened(copy: Path) -> None:
    root = shown(copy, "#tool=Nano&policy=sees:yes&sort=t-quick.iou.ascending")
    assert root.one("html")["class"] == "js"
    assert "hidden" not in root.one("form").attrs
    quick = rows(root, "t-quick")
    values = [float(row.one(data_k="iou")["data-v"]) for row in quick]
    assert values == sorted(values)
    head = root.one("table", id="t-quick").one("th", data_sort="iou")
    assert head["aria-sort"] == "ascending" and "disabled" not in head.one("button").attrs
    visible = [row for row in quick if "hidden" not in row.attrs]
    assert visible and {row["data-tool"] for row in visible} == {"Nano"}
    assert {row["data-sees"] for row in visible} == {"yes"}
    assert root.one("select", name="tool")
    dimmed = {group["data-policy"] for group in root.all("g", "dim")}
    assert "Random" in dimmed and "BoxOnce" not in dimmed


def test_controls_sort_filter_reset_and_keep_the_address(tmp_path: Path) -> None:
    told = json.loads(shown(patched(tmp_path, USE)).one(id="told").text)
    best = shown(PAGE)  # the order that is written
    assert told["rank"] == [f"{row['data-policy']} {row['data-tool']}" for row in rows(best, "t-quick")]
    ious = {
        f"{row['data-policy']} {row['data-tool']}": float(row.one(data_k="iou")["data-v"])
        for row in rows(best, "t-quick")
    }
    assert told["onceSort"] == "descending" and told["once"] == sorted(ious, key=lambda name: -ious[name])
    assert told["address"] == "#sort=t-quick.iou.descending"
    assert told["twiceSort"] == "ascending" and told["twice"] == told["once"][::-1]
    assert told["thriceSort"] is None and told["thrice"] == told["rank"]
    assert all(name.startswith("Random") for name in told["missing"]), "what never reaches .8 has no NoC, and goes last"
    assert told["tools"] == ["GrabCut"] and "tool=GrabCut" in told["filtered"]
    assert re.fullmatch(r"\d+ of \d+ agents' rows shown", told["said"])
    assert (told["reset"], told["clean"], told["hidden"]) == (told["rank"], "", 0)
    assert "btcv" in told["sections"] and "quick" not in told["sections"]
    assert told["focusable"] and told["wide"]


def test_the_policy_of_the_page_lets_no_other_script_run(tmp_path: Path) -> None:
    file = patched(tmp_path, "document.title = 'taken'", policy=True)
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", file.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert tree(done.stdout).one("title").text == "Leaderboard · MedSeg Gym"


@pytest.mark.skipif(not AXE, reason="$MEDSEG_GYM_AXE names no axe.min.js")
@pytest.mark.parametrize("width", [1400, 420])
def test_axe_finds_nothing(tmp_path: Path, width: int) -> None:
    engine = Path(AXE).read_text(encoding="utf-8").replace("</script", "<\\/script")
    ask = (
        "document.querySelectorAll('details').forEach(d => d.open = true);"
        "axe.run({resultTypes: ['violations']}).then(r => { const p = document.createElement('pre'); p.id = 'told';"
        "p.textContent = JSON.stringify(r.violations.map(v => [v.id, v.nodes.slice(0, 3).map(n => n.html)]));"
        "document.body.append(p); });"
    )
    found = json.loads(shown(patched(tmp_path, f"{engine};{ask}"), width=width).one(id="told").text)
    assert found == []
