"""The suites: which envs with which settings a leaderboard is made of, and what of them is missing on this machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from medseg_gym.datasets.cards import DATASETS, ibisagent, medsam_agent
from medseg_gym.datasets.cards.record import IBISAGENT, DatasetCard
from medseg_gym.errors import unknown
from medseg_gym.registration import env_id
from medseg_gym.tools.cards import TOOLS

# all that is built in; the oracles see the target, and are the ceiling that agents are held against
SCRIPTED = ("Random", "CentreClick", "BoxOnce", "OracleClicks", "OracleBoxThenClicks", "XuClicks")
TRAINED = ("PPO-SB3", "PPO-RLlib")  # small networks of the package that know ONE structure from its picture alone
ONE_STRUCTURE = "optic disc"
CLICKERS = ("Random", "CentreClick", "OracleClicks", "OracleClicks:keep_clicking=true", "XuClicks")
NOISY = (
    *("OracleClicks", "OracleClicks:jitter=5", "OracleClicks:jitter=15", "OracleClicks:miss=0.2"),
    *("OracleBoxThenClicks", "OracleBoxThenClicks:jitter=5", "OracleBoxThenClicks:jitter=15"),
    *("CentreClick", "CentreClick:jitter=15"),  # the hasty: one click, then stop
)
CLICKS_ONLY = {"verbs": ("positive", "negative", "stop")}
NO_UNDO = {"verbs": ("positive", "negative", "box", "stop")}  # the papers have none
CORRUPTIONS = ("noise", "blur", "lowres", "jpeg", "contrast", "brightness", "shading", "occlusion")
PAPER_TOOLS = ("SAM2.1BPlus", "MedSAM2", "IMISNet")
ALL_TOOLS = tuple(tool for tool in TOOLS if tool != "Stub")


@dataclass(frozen=True, slots=True)
class Entry:
    """One env with its settings, played by every policy of its suite."""

    dataset: str
    tool: str
    split: str = "test"
    horizon: int = 5
    seed: int = 0  # chooses the cases and drives the policies
    cases: int | None = 100  # the most cases; None takes the whole split
    options: Mapping[str, Any] = field(default_factory=dict)  # further keywords of the env
    variant: str = ""  # tells it from other entries of the same env: "refine", "noise-3"
    group: str = ""  # the table of the suite it counts in
    policies: tuple[str, ...] = ()  # where it has others than its suite

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))

    @property
    def env(self) -> str:
        return env_id(self.dataset, self.tool)

    @property
    def folder(self) -> str:
        """Its place below the suite's folder, unique within the suite."""
        seed = f"seed-{self.seed}" if self.seed else ""
        return "@".join(part for part in (self.env, self.variant, seed) if part)

    @property
    def title(self) -> str:
        """The dataset as tables name it."""
        card = DATASETS.get(self.dataset)
        title = card.title if card else self.dataset
        return f"{title} ({self.variant})" if self.variant and self.variant != self.group else title

    @property
    def modality(self) -> str:
        card = DATASETS.get(self.dataset)
        return (card.modality if card else "") or ("drawn" if self.dataset == "Phantom" else "several")

    def record(self) -> dict[str, Any]:
        """All that decides its episodes, as JSON holds it."""
        skipped = ("group", "policies")
        return {
            key: _plain(value)
            for key, value in ((f, getattr(self, f)) for f in self.__dataclass_fields__)
            if key not in skipped
        }


@dataclass(frozen=True, slots=True)
class Suite:
    """A named choice of entries, the policies that play them by default, and why they belong together."""

    name: str
    title: str
    about: str
    entries: tuple[Entry, ...]
    policies: tuple[str, ...] = SCRIPTED

    def policies_of(self, entry: Entry) -> tuple[str, ...]:
        return entry.policies or self.policies

    @property
    def groups(self) -> tuple[str, ...]:
        """The names of its tables, in order."""
        return tuple(dict.fromkeys(entry.group for entry in self.entries))


@dataclass(frozen=True, slots=True)
class Missing:
    """What an entry lacks on this machine, and the commands that get it."""

    what: str
    commands: tuple[str, ...]


def missing(entry: Entry) -> Missing | None:
    """What has to be got before an entry can be played here; None where all is there. Opens nothing."""
    from medseg_gym import datasets, tools

    return _missing(entry, datasets.available(entry.dataset), tools.available(entry.tool))


def needed(entry: Entry) -> Missing | None:
    """What an entry takes beyond the package, whatever is on this machine; None where it takes nothing."""
    return _missing(entry, entry.dataset == "Phantom", not TOOLS[entry.tool].weights)


def _missing(entry: Entry, data: bool, weights: bool) -> Missing | None:
    from medseg_gym.tools.weights import download_command

    what, commands = [], []
    if not data:
        what.append(f"{entry.dataset} prepared")
        commands.append(f"medseg-gym data prepare {entry.dataset} --from FOLDER")
    if not weights:
        what.append(f"{entry.tool}'s weights" if TOOLS[entry.tool].factory else f"a version that runs {entry.tool}")
        commands.append(download_command(entry.tool))
    return Missing(f"needs {' and '.join(what)}", tuple(commands)) if what else None


def suite(name: str) -> Suite:
    """The suite of a name; an unknown one raises with the nearest known."""
    if name not in SUITES:
        raise unknown("suite", name, SUITES)
    return SUITES[name]


def _pairs(data: Iterable[str], tools: Sequence[str], **settings: Any) -> tuple[Entry, ...]:
    return tuple(Entry(dataset, tool, **settings) for dataset in data for tool in tools)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, tuple | list) else value


def _drawn_from(cards: Iterable[DatasetCard]) -> tuple[str, ...]:
    """Ids of the datasets that IBISAgent's Table 11 counts."""
    return tuple(card.id for card in cards if any(e.source == IBISAGENT for e in card.expected))


_PAPER_21 = tuple(card.id for card in medsam_agent.CARDS)
_IBIS = (*_drawn_from(DATASETS.values()), ibisagent.MECOVQA.id)
_HERE = ("Nano", "GrabCut")
_KINDS = {kind: {"dataset_options": {"kinds": (kind,)}} for kind in ("scratch", "refine", "inconsistent", "absent")}
_ABSENT_PHANTOM = {"dataset_options": {"absent": 0.5}}


def _refine() -> tuple[Entry, ...]:
    """Phantom does not tell which structures share an image, so another's mask begins no case of it."""
    tools = ("Nano", "GrabCut", *PAPER_TOOLS)
    data = {"refine": ("Phantom", "BTCV"), "inconsistent": ("BTCV",)}
    return tuple(
        entry
        for kind, names in data.items()
        for entry in _pairs(names, tools, options=_KINDS[kind], variant=kind, group=kind)
    )


def _absent() -> tuple[Entry, ...]:
    """Present and absent count alike, or stopping at once would pay."""
    tools = ("Nano", "GrabCut", *PAPER_TOOLS)
    return (
        *_pairs(("Phantom",), tools, options=_ABSENT_PHANTOM, variant="half-absent"),
        *_pairs(("BTCV",), tools, options=_KINDS["scratch"], variant="present"),
        *_pairs(("BTCV",), tools, options=_KINDS["absent"], variant="absent"),
    )


def _robust() -> tuple[Entry, ...]:
    data, tools = ("Phantom", "BTCV"), ("Nano", "MedSAM2")
    corrupted = tuple(
        entry
        for spec in (f"{kind}-{severity}" for kind in CORRUPTIONS for severity in (3, 5))
        for entry in _pairs(
            data,
            tools,
            options={"dataset_options": {"corruption": spec}},
            variant=spec,
            group=spec,
            policies=("OracleClicks", "OracleBoxThenClicks", "BoxOnce"),
        )
    )
    clean = _pairs(data, tools, group="clean", policies=(*NOISY, "BoxOnce", "BoxOnce:jitter=15"))
    return (*clean, *corrupted)


_ALL = (
    Suite(
        "quick",
        "Quick",
        "Drawn phantoms with the tools that come with the package: minutes on a laptop, nothing to download.",
        (
            *_pairs(("Phantom",), _HERE, cases=100),
            # by itself, as a network on pixels is not told which structure is wanted
            *_pairs(
                ("Phantom",),
                ("Nano",),
                options={"structures": (ONE_STRUCTURE,)},
                variant="optic-disc",
                group=ONE_STRUCTURE,
                policies=(*SCRIPTED, *TRAINED),
            ),
        ),
    ),
    Suite(
        "btcv",
        "BTCV",
        "Abdominal organs in CT (BTCV), with every tool whose weights are there.",
        _pairs(("BTCV",), ("Nano", "GrabCut", *(t for t in ALL_TOOLS if t not in _HERE))),
    ),
    Suite(
        "medsam-agent-21",
        "MedSAM-Agent's 21 datasets",
        "The 21 datasets of MedSAM-Agent's Table 1 with its three tools, five actions; 200 cases drawn from each "
        "dataset's test split, where the paper takes all.",
        _pairs(_PAPER_21, PAPER_TOOLS, cases=200, options=NO_UNDO),
    ),
    Suite(
        "ibis-click",
        "IBISAgent's clicks",
        "Clicks alone, at most 20 of them: IBISAgent's datasets (its Table 11 and MeCOVQA-G+) with its tool, and "
        "Phantom and BTCV with Nano and GrabCut.",
        (
            *_pairs(("Phantom", "BTCV"), _HERE, horizon=20, options=CLICKS_ONLY, group="tools of the package"),
            *_pairs(_IBIS, ("MedSAM2",), horizon=20, options=CLICKS_ONLY, group="IBISAgent"),
        ),
        CLICKERS,
    ),
    Suite(
        "refine",
        "Refinement",
        "Cases that begin with a mask: a degraded one, or one of another structure that has to be discarded.",
        _refine(),
    ),
    Suite(
        "absent",
        "Absent structures",
        "Half of the cases ask for a structure that is not in the image: the empty mask, at once, is right.",
        _absent(),
    ),
    Suite(
        "robust",
        "Robustness",
        "The clean images under jittered, hasty and missing clicks, and corrupted images under the oracles.",
        _robust(),
        NOISY,
    ),
    Suite(
        "cross-tool",
        "Across tools",
        "One policy, every tool: the form of MedSAM-Agent's Table 2 and IBISAgent's Table 9.",
        _pairs(("BTCV", "PolypGen"), ALL_TOOLS),
    ),
)

SUITES: Mapping[str, Suite] = MappingProxyType({one.name: one for one in _ALL})
