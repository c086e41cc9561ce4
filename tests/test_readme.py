"""Every Python block of the README runs, in order, in one namespace; every medseg-gym command it names exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT

README = ROOT / "README.md"
SHORTER = {"256": "24", "steps=100": "steps=2", "iterations=20": "iterations=1"}  # what the training commands count
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    if not README.exists():
        pytest.skip("no README.md beside the tests")
    return [text for kind, text in FENCE.findall(README.read_text(encoding="utf-8")) if kind == language]


def test_python_blocks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    code = blocks("python")
    assert len(code) >= 4
    for i, text in enumerate(code):
        exec(compile(text, f"README.md, python block {i}", "exec"), namespace)


def test_medseg_gym_commands_run_or_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    from typer.testing import CliRunner

    from medseg_gym.cli import app

    monkeypatch.chdir(tmp_path)
    lines = [line.partition("  #")[0].strip() for text in blocks("") for line in text.splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("medseg-gym ")]
    assert len(commands) >= 4
    for words in commands:
        if {"FOLDER", "run", "build", "embed", "serve", "rescore"} & set(words) or "vlm" in " ".join(words):
            words = [*words[: 1 if words[0] in ("evaluate", "rescore") else 2], "--help"]  # only that it is there
        elif "evaluate" in words:
            words = [*words[: words.index("--cases")], "--cases", "2", "--out", "runs/first"]
        words = [SHORTER.get(word, word) for word in words]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, f"medseg-gym {' '.join(words)}: {result.output}"


def test_links_lead_to_files_that_are_there() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), target
