"""Scratch folders: those of killed processes are removed by the next, those of living ones never."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from medseg_gym.rl.scratch import make_scratch, remove_scratch

pytest.importorskip("fcntl")


def test_a_killed_processs_folder_is_removed_when_another_is_made(tmp_path: Path) -> None:
    code = (
        "import sys; from medseg_gym.rl.scratch import make_scratch; "
        "folder = make_scratch(sys.argv[1]); (folder / 'weights').write_text('many'); "
        "print(folder, flush=True); input()"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=-1, stdin=-1, text=True)
    assert process.stdout is not None and process.stdin is not None
    theirs = Path(process.stdout.readline().strip())
    mine = make_scratch(tmp_path)
    assert (theirs / "weights").exists() and mine.is_dir() and mine != theirs
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    process.stdin.close()
    make_scratch(tmp_path)
    assert not theirs.exists() and mine.is_dir()
    assert len(list(tmp_path.iterdir())) == 4


def test_a_folder_that_is_removed_leaves_nothing(tmp_path: Path) -> None:
    folder = make_scratch(tmp_path)
    (folder / "weights").write_text("many")
    remove_scratch(folder)
    assert not list(tmp_path.iterdir())
