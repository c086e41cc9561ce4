"""Where a result comes from: commit, command and weights' checksum, none of which may name a folder of this machine."""

from __future__ import annotations

import hashlib
import shlex
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import medseg_gym


def commit() -> dict[str, Any]:
    """{"commit": hash, "changed": whether the package differs from it}; None and False outside a checkout."""
    root = Path(medseg_gym.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return {"commit": None, "changed": False}
    head = _git(root, "rev-parse", "HEAD")
    return {"commit": head or None, "changed": bool(_git(root, "status", "--porcelain", "--", "medseg_gym"))}


def command_of(suite: str, policy: str, cases: int | None) -> str:
    """The command that plays one policy of a suite again."""
    words = ["medseg-gym", "leaderboard", "run", "--suite", suite, "--policy", policy]
    return shlex.join(words + ([] if cases is None else ["--cases", str(cases)]))


def weights_sha256(tool: str) -> str | None:
    """The checksum of a tool's weight file; None where it has none."""
    from medseg_gym.tools import TOOLS, weights

    if tool == "Nano":
        from medseg_gym.tools.nano import SHA256

        return SHA256
    if tool not in TOOLS or not TOOLS[tool].weights:
        return None
    path = weights.find_weights(tool)
    file = path / "model.safetensors" if path.is_dir() else path
    state = file.stat()
    return _sha256(file, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=32)
def _sha256(file: Path, _changed: int, _size: int) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _git(root: Path, *words: str) -> str:
    """What git says; "" where it cannot."""
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
