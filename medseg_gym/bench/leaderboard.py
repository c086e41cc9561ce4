"""`build`: from folders of results to LEADERBOARD.md and leaderboard.html; equal results give equal bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from medseg_gym.bench.leaderboard_cross import cross_tables
from medseg_gym.bench.leaderboard_gallery import galleries
from medseg_gym.bench.leaderboard_page import page
from medseg_gym.bench.leaderboard_read import Skipped, read_all
from medseg_gym.bench.leaderboard_records import Results
from medseg_gym.bench.leaderboard_tables import results_of
from medseg_gym.bench.leaderboard_text import gaps_by_reason, grid, markdown
from medseg_gym.bench.reported import reported
from medseg_gym.bench.rundir import write_whole
from medseg_gym.bench.suites import suite
from medseg_gym.errors import MedSegError


@dataclass(frozen=True, slots=True)
class Built:
    """What `build` wrote, and what it left out."""

    results: tuple[Results, ...]
    skipped: tuple[Skipped, ...]
    files: tuple[Path, ...]


def build(directories: Sequence[str | Path], *, out: str | Path | None = None, baseline: str | None = None) -> Built:
    """Writes both pages into `out`, else into the first folder. A folder without a finished run raises MedSegError.

    Differences are taken to a table's first agent, or to the policy `baseline` on the same tool.
    """
    if not directories:
        raise MedSegError("no folder of results; wanted at least one")
    played, skipped = read_all(directories)
    if not played:
        why = f" ({skipped[0].folder}: {skipped[0].why})" if skipped else ""
        raise MedSegError(
            f"no finished run in {', '.join(map(str, directories))}{why}; play one: "
            "medseg-gym leaderboard run --suite quick"
        )
    policies = {run.policy for runs in played.values() for run in runs}
    if baseline is not None and baseline not in policies:
        raise MedSegError(f"baseline={baseline!r} has not played; those that have: {', '.join(sorted(policies))}")
    results = tuple(results_of(suite(name), runs, baseline=baseline) for name, runs in played.items())
    place = Path(directories[0] if out is None else out)
    place.mkdir(parents=True, exist_ok=True)
    files = (place / "LEADERBOARD.md", place / "leaderboard.html")
    write_whole(files[0], markdown(results, skipped))
    write_whole(files[1], page(results, skipped, galleries=galleries(results), reported=reported()))
    return Built(results, tuple(skipped), files)


def write_cross_tool(directory: str | Path) -> str:
    """Writes cross-tool.md, the papers' tables, into the suite's folder of a results folder; gives its text."""
    root = Path(directory) / "cross-tool"
    played, _ = read_all([Path(directory)])
    if "cross-tool" not in played:
        raise MedSegError(
            f"no finished run of the suite in {root}; play it: medseg-gym leaderboard run --suite cross-tool"
        )
    results = results_of(suite("cross-tool"), played["cross-tool"])
    parts = [f"## {title}\n\n{grid(head, body)}" for title, head, body in cross_tables(results)]
    lines = [
        f"- {', '.join(names)}: {why}" + "".join(f"; `{command}`" for command in commands)
        for why, commands, names in gaps_by_reason(results.gaps)
    ]
    if lines:
        parts.append("Not played:\n\n" + "\n".join(lines))
    text = "\n\n".join(parts) + "\n"
    write_whole(root / "cross-tool.md", text)
    return text
