"""Draws docs/leaderboard.png, the quick leaderboard as a picture, from the frozen results."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from medseg_gym.bench.leaderboard_read import read_all
from medseg_gym.bench.leaderboard_records import Row
from medseg_gym.bench.leaderboard_svg import styles
from medseg_gym.bench.leaderboard_tables import results_of
from medseg_gym.bench.leaderboard_turns import Turns, turns_of
from medseg_gym.bench.suites import suite

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "leaderboard.png"
COLOURS = ("#0b62a4", "#c2500a", "#0b8a63", "#a8438a", "#a87400", "#1f83b8", "#6a6f78", "#7a5a3a")
MARKERS, DASHES = "osDv^", ("-", (0, (5, 3)), (0, (1.5, 1.8)), (0, (6, 2, 1.5, 2)), (0, (8, 3)), (0, (3, 1.5)))
INK, MUTED, LINE, CEILING = "#1c1e22", "#60666f", "#dfdbd2", "#815c08"


def main() -> None:
    quick = suite("quick")
    played, _ = read_all([ROOT / "benchmarks" / "results"])
    results = results_of(quick, played["quick"])
    table = results.tables[0]
    look = styles(row.policy for row in table.rows)
    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 9, "text.color": INK, "axes.edgecolor": LINE})
    tools = list(dict.fromkeys(row.tool for row in table.rows))
    most = max(sum(row.tool == tool for row in table.rows) for tool in tools)
    figure, axes = plt.subplots(
        len(tools), 2, figsize=(11, 0.6 + len(tools) * (0.9 + 0.24 * most)), width_ratios=(1, 1), squeeze=False
    )
    for (left, right), tool in zip(axes, tools, strict=True):
        dots(left, tool, [row for row in table.rows if row.tool == tool], look)
        curves(right, tool, [agent for agent in turns_of(results, table) if agent.tool == tool], look)
    figure.tight_layout(h_pad=1.6, w_pad=2.5)
    OUT.parent.mkdir(exist_ok=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, metadata={"Software": None})
    part = OUT.with_suffix(".part")
    part.write_bytes(buffer.getvalue())
    part.replace(OUT)
    print(OUT)


def dots(axis: Any, tool: str, rows: list[Row], look: dict[str, int]) -> None:
    """Final IoU with its interval, beside the tool's ceiling."""
    plain(axis, f"{tool}: final IoU, 95 % interval")
    for place, row in enumerate(reversed(rows)):
        found, n = row.iou.overall, look[row.policy]
        if found.low is not None and found.high is not None:
            axis.plot(
                (found.low, found.high), (place, place), color=COLOURS[n % 8], alpha=0.4, lw=4.5, solid_capstyle="butt"
            )
        axis.plot(found.mean, place, marker=MARKERS[n % 5], color=COLOURS[n % 8], ms=5.5)
        axis.text(1.03, place, f"{found.mean:.3f}", va="center")
    ceiling = next((row.ceiling_iou for row in rows if row.ceiling_iou is not None), None)
    if ceiling is not None:
        axis.axvline(ceiling, color=CEILING, lw=1.6, ls=(0, (4, 2.5)), zorder=0)
        axis.text(ceiling, len(rows) - 0.35, f"ceiling {ceiling:.3f}", color=CEILING, ha="center", va="bottom")
    axis.set_yticks(range(len(rows)), [row.policy + ("†" if row.sees_target else "") for row in reversed(rows)])
    axis.set_xlim(0, 1)
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.grid(axis="x", color=LINE, lw=0.8)


def curves(axis: Any, tool: str, agents: list[Turns], look: dict[str, int]) -> None:
    """Mean Dice after each action."""
    plain(axis, f"{tool}: Dice after k actions")
    for agent in agents:
        n = look[agent.policy]
        axis.plot(
            agent.dice_at,
            color=COLOURS[n % 8],
            ls=DASHES[n % 6],
            marker=MARKERS[n % 5],
            ms=4.5,
            lw=1.7,
            label=f"{agent.policy} {agent.dice_at[-1]:.2f}",
        )
    axis.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, handlelength=3, labelspacing=0.45)
    axis.set_ylim(0, 1)
    axis.set_xticks(range(len(agents[0].dice_at)))
    axis.grid(axis="y", color=LINE, lw=0.8)


def plain(axis: Any, title: str) -> None:
    axis.set_title(title, loc="left", fontsize=10, fontweight="bold", pad=16)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(length=0, colors=INK)
    axis.set_axisbelow(True)


if __name__ == "__main__":
    main()
