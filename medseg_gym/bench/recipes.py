"""The papers' experiments as recipes: which policies play which envs, what of a paper that is, and how it differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from medseg_gym.bench.exploits import EXPLOITS, ORACLES
from medseg_gym.bench.recipe_policies import HERE as POLICIES
from medseg_gym.bench.recipe_records import Arm, Printed, Recipe
from medseg_gym.bench.reported import reported
from medseg_gym.bench.suites import CLICKS_ONLY, NO_UNDO, PAPER_TOOLS, Entry, suite
from medseg_gym.errors import unknown

CASES = 40  # of each dataset, where a recipe runs on a laptop; from 40 patients on intervals are bootstrapped
TOOLS = ("Nano", "GrabCut")  # those that come with the package
DATA = ("Phantom", "BTCV")
MEDSAM, IBIS = "MedSAM-Agent", "IBISAgent"


def recipe(name: str) -> Recipe:
    """The recipe of a name; an unknown one raises with the nearest known."""
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name]


def _arms(settings: Mapping[str, str], entries: Sequence[Entry], **more: Any) -> tuple[Arm, ...]:
    return tuple(Arm(setting, entry, policy, **more) for entry in entries for setting, policy in settings.items())


def _entries(data: Sequence[str] = DATA, tools: Sequence[str] = TOOLS, **settings: Any) -> tuple[Entry, ...]:
    settings = {"cases": CASES, "options": NO_UNDO, **settings}
    return tuple(Entry(dataset, tool, **settings) for dataset in data for tool in tools)


_ABLATION = (
    "+ Cold-start SFT + RL (Full)",
    "- w/o improvement bonus",
    "- w/o overshoot penalty",
    "- w/o tool cost",
)
_POINT_BOX = {"box": "BoxOnce", "point": "CentreClick"}
_PAPERS_21 = suite("medsam-agent-21").entries
_TOOL_ROWS = ("SAM2-Point", "SAM2-Box", "MedSAM-Point", "MedSAM-Box", "IMISNet-Point", "IMISNet-Box")
_STRATEGIES = {"box, then clicks": "OracleBoxThenClicks", "clicks only": "OracleClicks", "box only": "BoxOnce"}
_XU = {
    "box, then clicks": f"{POLICIES}:BoxThenXuClicks",
    "clicks, no box": "XuClicks",
    "the tool's answer to the box": "BoxOnce",
}
_LONG: dict[str, Any] = {"horizon": 20}  # IBISAgent's most
_CROSS = ("BTCV", "PolypGen")
_UNTRAINED = tuple(row.setting for row in reported() if (row.source, row.table, row.kind) == (MEDSAM, "2", "prompted"))


def _across(entries: Sequence[Entry], tools: Sequence[str], policy: str = "OracleBoxThenClicks") -> tuple[Arm, ...]:
    """A policy that watches tool A acts on tool B, for all pairs; first the one that watches what it acts on."""
    return tuple(
        Arm(f"{seen} / {entry.tool}", entry, policy, watches="" if seen == entry.tool else seen)
        for entry in entries
        for seen in (entry.tool, *(tool for tool in tools if tool != entry.tool))
    )


def _spoken(tools: Sequence[str]) -> tuple[Arm, ...]:
    """Each protocol with its own turns and verbs: an agent, and the oracles that speak it."""
    medsam, ibis = _entries(tools=tools), _entries(tools=tools, options=CLICKS_ONLY, **_LONG)
    oracles = {
        "medsam-agent": ("oracle, medsam-agent protocol", "TextOracle:policy=OracleBoxThenClicks"),
        "ibis": ("oracle, ibis protocol", "TextOracle:protocol=ibis,policy=XuClicks"),
    }
    return tuple(
        arm
        for protocol, entries in (("medsam-agent", medsam), ("ibis", ibis))
        for entry in entries
        for arm in (
            Arm(oracles[protocol][0], entry, oracles[protocol][1]),
            Arm(f"agent, {protocol} protocol", entry, "", protocol=protocol),
        )
    )


_ALL = (
    Recipe(
        "single-turn",
        "One prompt: point against box, tool by tool",
        "The centre of the target's largest region, or the target's box, in one turn: the box is one turn's ceiling.",
        "Other data and tools where the papers' are not here. CentreClick clicks the pixel deepest in the largest "
        "region, which is inside the target; the paper's centre may not be.",
        (
            Printed(MEDSAM, "1", _TOOL_ROWS),
            Printed(MEDSAM, "5", _TOOL_ROWS, ("BTCV",)),
        ),
        (*_arms(_POINT_BOX, _entries()), *_arms(_POINT_BOX, _PAPERS_21)),
    ),
    Recipe(
        "hybrid",
        "Box and clicks against clicks alone and the box alone",
        "The oracle with a box first and clicks after it, with clicks alone, and with the box alone.",
        "The paper trains an agent on each kind of trajectories and compares the agents; its hybrid is trained on both "
        "kinds, each of which begins with a box or with a click. Here the strategies themselves play, seeing the "
        "target: it is what there is to imitate.",
        (
            Printed(
                MEDSAM,
                "3",
                ("+ Cold-start SFT only (Hybrid)", "- only Sequential-Click", "- only Box-to-Point"),
            ),
        ),
        (*_arms(_STRATEGIES, _entries()), *_arms(_STRATEGIES, _PAPERS_21)),
    ),
    Recipe(
        "reward-terms",
        "Each term of a reward off: what it pays then",
        "Oracles and exploits play once; every reward, whole and with each term off, is worked out from their "
        "episodes. A learner is drawn to what a reward pays most: the table names it, and what it would score.",
        "The papers train an agent without the term and score the agent; the recipe reward-training does that in "
        "small. Here nothing is trained: it shows what each reward asks for.",
        (
            Printed(
                MEDSAM,
                "3",
                _ABLATION,
            ),
            Printed(IBIS, "5"),
        ),
        _arms(
            {name: name for name in ORACLES} | {name: f"{POLICIES}:exploit:kind={name}" for name in EXPLOITS},
            _entries(tools=("Nano",), cases=24, options={}),
        ),
        kind="rewards",
    ),
    Recipe(
        "reward-training",
        "Each term of a reward off: what a model learns then",
        "A random model of 0.2 million parameters is taught three ways to outline a block, in equal parts: direct (its "
        "box, stop), lingering (its box twice, stop), and a detour (a wrong box, its box, stop). GRPO under a reward "
        "then shifts it to the ways which that reward pays.",
        "One seed, a tiny model, drawn images with nothing to see: it shows the direction in which a term pulls, not "
        "by how much it would change an agent like the paper's. With this tool a detour ends with a mask that is about "
        ".01 better in IoU, so that a reward of quality alone favours it a little.",
        (Printed(MEDSAM, "3", _ABLATION),),
        kind="training",
        columns=("iou", "boxes", "direct", "linger", "detour", "other"),
    ),
    Recipe(
        "cross-tool",
        "A policy of one tool acts on another",
        "The oracle watches one tool's masks and acts; the same actions are then given to the other tool. "
        "A / B: watched A, acted on B.",
        "The papers' agents see the masks of the tool they act on, and were trained with another. Here the actions "
        "are those for the other tool's mistakes, which is harder: nothing can be corrected.",
        (Printed(MEDSAM, "2"), Printed(IBIS, "9")),
        (
            *_across(_entries(), TOOLS),
            *_across(_entries(data=_CROSS, tools=PAPER_TOOLS), PAPER_TOOLS),
        ),
    ),
    Recipe(
        "target-box",
        "With and without the target's box",
        "IBISAgent's greedy clicks, at most 20, from nothing and after the target's box, beside the tool's own answer "
        "to that box.",
        "The paper's agent does not see the target beyond the box; the clicks here do.",
        (Printed(IBIS, "10"),),
        (*_arms(_XU, _entries(**_LONG)), *_arms(_XU, _entries(data=("MeCOVQAGPlus",), tools=("MedSAM2",), **_LONG))),
    ),
    Recipe(
        "efficiency",
        "Seconds and actions a case",
        "Every policy with an empty cache, one case at a time: the image's encoding, the tool's answers, the env.",
        "The papers' seconds hold a language model of 7 or 8 billion parameters on a GPU; here there is none, and "
        "the tools are small. Actions compare, seconds do not.",
        (
            Printed(IBIS, "2"),
            Printed(IBIS, "5", ("format + answer", "+ click + gain + length")),
            Printed(MEDSAM, "3"),
        ),
        (
            *_arms({**_STRATEGIES, "one click": "CentreClick"}, _entries(cases=24)),
            *_arms({"greedy clicks": "XuClicks"}, _entries(cases=24, **_LONG)),
            *_arms(_STRATEGIES, _entries(data=("BTCV",), tools=PAPER_TOOLS, cases=24)),
        ),
        columns=("iou", "actions", "tool_calls", "seconds"),
        cold=True,
    ),
    Recipe(
        "prompting",
        "Language models that are only prompted",
        "A model that was never trained for it operates the tool through each protocol. Beside it an oracle speaks the "
        "same protocol, clicks and boxes as text and back: what a perfect agent would score.",
        "Needs a served model (--agent 'vlm:model=NAME,base_url=URL') or one in this process (--agent "
        "'vlm-local:model=FOLDER'); without one only the oracles play.",
        (
            Printed(MEDSAM, "2", _UNTRAINED),
            Printed(MEDSAM, "3", ("Qwen3-VL-8B base",)),
            Printed(IBIS, "3"),
        ),
        (*_spoken(("Nano",)), *_spoken(("MedSAM2",))),
    ),
)

RECIPES: Mapping[str, Recipe] = MappingProxyType({one.name: one for one in _ALL})


def with_agent(one: Recipe, agent: str) -> Recipe:
    """The recipe with an agent's spec in the place it leaves open, speaking the protocol of each arm."""
    joint = "," if "=" in agent else ":"
    return replace(
        one,
        arms=tuple(
            arm if arm.policy else replace(arm, policy=f"{agent}{joint}protocol={arm.protocol}") for arm in one.arms
        ),
    )
