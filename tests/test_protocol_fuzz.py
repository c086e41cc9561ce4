"""Hostile completions: whatever comes, parsing gives a Decision with an action that the env executes, or a reason.

`python tests/test_protocol_fuzz.py 1000000` tries a million in one process, and tells the slowest.
"""

from __future__ import annotations

import os
import random
import string
import sys
import time

import pytest

from medseg_gym.envs.spaces import ActionCodec
from medseg_gym.frames import Grid
from medseg_gym.policies import chat
from medseg_gym.policies.protocols import IBIS, ChatProtocol, MedSAMAgent, Tiny
from medseg_gym.types import Action, Box, Click, Decision, Stop, Undo

PROTOCOLS: tuple[ChatProtocol, ...] = (
    MedSAMAgent(),
    MedSAMAgent(("positive", "stop")),
    IBIS(),
    IBIS(("positive", "negative"), thinking=False),
    Tiny(),
)
GRIDS = (Grid(48, 64), Grid(1, 1), Grid(3000, 1701))
TARGETS = ("liver", "Left kidney", "a: b")
ACTIONS: tuple[Action, ...] = (Click(3, 4), Click(40, 9, False), Box(1, 2, 30, 40), Stop(), Undo())
PIECES = (
    *("<tool_call>", "</tool_call>", "<think>", "</think>", "<action>", "</action>", "<answer>", "</answer>"),
    *("add_point", "add_bbox", "stop_action", "undo_action", '"name"', '"arguments"', "point_2d", "bbox_2d"),
    *("Positive Point (0.5, 0.5)", "Negative Point (", "Terminate", "Undo", "liver:", "Left kidney: Undo", ": "),
    *("{", "}", "[", "]", "(", ")", ",", ":", '"', "\\", "\\u", "\\ud800", "null", "true", "NaN", "-Infinity", "1e999"),
    *("-1", "1000", "0.99999999999999999999", "9" * 400, "1" * 4500, "0x10", "1_000", "٣", "１", "½", "nan", "1."),
    *("\0", "\ud800", "\udfff\ud83d", "\u202e", "\ufeff", "\r\n", "\x85", "\u2028", "ß", "İ", "ſ", "K", "<|im_end|>"),
    *("[" * 300, '{"a":' * 300, "<" * 300, "(" * 300, " " * 300, "\n" * 300, "a" * 300),
)


def valid(rng: random.Random, protocol: ChatProtocol) -> str:
    """A completion that the protocol wrote itself."""
    grid = rng.choice(GRIDS)
    if isinstance(protocol, IBIS) and rng.random() < 0.3:
        spoken = [a for a in ACTIONS if ActionCodec.verb_of(a) in protocol.verbs]
        chosen = rng.sample(TARGETS, rng.randint(1, 3))
        return protocol.format_many({target: rng.choice(spoken) for target in chosen}, grid, thought="so")
    action = rng.choice([a for a in ACTIONS if ActionCodec.verb_of(a) in protocol.verbs])
    return protocol.format(action, grid, thought=rng.choice(("", "The upper edge is missed.")))


def hostile(rng: random.Random, protocol: ChatProtocol) -> str:
    """A text: random pieces, random characters, or a valid completion that was cut, spliced, swapped or repeated."""
    kind = rng.random()
    if kind < 0.2:
        return "".join(rng.choice(PIECES) for _ in range(rng.randint(0, 30)))
    if kind < 0.25:
        return "".join(chr(rng.randrange(0x11000)) for _ in range(rng.randint(0, 80)))
    if kind < 0.30:
        return "".join(rng.choice(string.printable) for _ in range(rng.randint(0, 80)))
    text = valid(rng, protocol if rng.random() < 0.9 else rng.choice(PROTOCOLS))
    for _ in range(rng.randint(1, 6)):
        i, j = sorted((rng.randint(0, len(text)), rng.randint(0, len(text))))
        j = min(j, i + rng.choice((1, 1, 2, 5, 1000)))
        match rng.randrange(8):
            case 0:
                text = text[:i] + text[j:]
            case 1:
                text = text[:j] + text[i:]
            case 2:
                text = text[i:] + text[:i]
            case 3:
                text = text[:i] + rng.choice(PIECES) + text[i:]
            case 4:
                text = text[:i] + rng.choice(PIECES) + text[j:]
            case 5:
                text = text[:i] + rng.choice(string.digits + ".,-+ ") + text[j:]
            case 6:
                text = text[:i] + chr(rng.randrange(0x11000)) + text[j:]
            case _:
                text = text + valid(rng, protocol)
    return text


def check(decision: Decision, protocol: ChatProtocol, grid: Grid, text: str) -> bool:
    """Holds a decision to what the env and the model need of it; whether it has an action."""
    assert decision.text == text
    if decision.action is None:
        assert decision.reason and len(decision.reason) < 300 and decision.reason.isprintable()
        assert chat.plain(decision.reason) == decision.reason
        return False
    assert decision.reason == ""
    assert ActionCodec(protocol.verbs).read(decision.action, grid) == decision.action  # allowed, and snapped already
    if not isinstance(protocol, Tiny) or max(grid.height, grid.width) <= 64:
        assert protocol.parse(protocol.format(decision.action, grid), grid).action == decision.action
    return True


COUNT = int(os.environ.get("MEDSEG_GYM_FUZZ", "20000"))


def fuzz(count: int, seed: int) -> tuple[int, int, float]:
    """(readable, unreadable, slowest parse in CPU seconds) of `count` completions, each read by one protocol."""
    rng, readable, slowest = random.Random(seed), 0, 0.0
    for _ in range(count):
        protocol, grid = rng.choice(PROTOCOLS), rng.choice(GRIDS)
        text = hostile(rng, protocol)
        begun = time.process_time()
        decision = protocol.parse(text, grid)
        slowest = max(slowest, time.process_time() - begun)
        read = check(decision, protocol, grid, text)
        if isinstance(protocol, IBIS):
            protocol.answer(text)
            decisions = protocol.parse_many(text, grid, TARGETS)
            assert decisions and decisions.keys() <= set(TARGETS)
            read = max([read, *[check(one, protocol, grid, text) for one in decisions.values()]])
        readable += read
    return readable, count - readable, slowest


@pytest.mark.timeout(0 if COUNT > 20_000 else 300)
def test_thousands_of_hostile_completions_give_decisions() -> None:
    """Both outcomes are common: the mutations reach beyond the first check. `make soak` asks a million."""
    readable, unreadable, _ = fuzz(COUNT, seed=7)
    assert readable + unreadable == COUNT
    assert min(readable, unreadable) > COUNT / 10


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda p: f"{p.name}-{len(p.verbs)}")
@pytest.mark.parametrize(
    "piece", [*"<{[(\"'\\ \n0a:,", "<think>", "<action>", "<tool_call>", "</think>", "</action>", "0."]
)
def test_a_long_run_of_one_piece_is_read_to_its_end(protocol: ChatProtocol, piece: str) -> None:
    """Just below the limits, bare and inside every tag: a quadratic reader would need minutes for all of these."""
    from medseg_gym.policies.protocols.base import MAX_BODY, MAX_TEXT

    grid = Grid(48, 64)
    run, body = piece * (MAX_TEXT // len(piece) - 50), piece * (MAX_BODY // len(piece) - 2)
    for text in (
        run,
        f"<tool_call>{body}</tool_call>",
        f'<tool_call>{{"name": "add_point", "arguments": {body}</tool_call>',
        f"<think></think><action>{body}</action>",
        f"<think></think><action>Positive Point (0.{body}, 0.5)</action>",
        f"<think></think><action>{body}</action>{run[: MAX_TEXT - 2 * MAX_BODY]}",
    ):
        check(protocol.parse(text, grid), protocol, grid, text)
        if isinstance(protocol, IBIS):
            protocol.parse_many(text, grid, TARGETS)
            protocol.answer(text)


def test_a_megabyte_is_not_read_at_all() -> None:
    for protocol in PROTOCOLS:
        for text in (
            ("<" * 1_000_000, protocol.format(ACTIONS[0], GRIDS[0]) + " " * 1_000_000)
            if protocol.name != "tiny"
            else ()
        ):
            assert "at most 65536 are read" in protocol.parse(text, GRIDS[0]).reason


if __name__ == "__main__":
    total = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    clock = time.perf_counter()
    good, bad, slow = fuzz(total, seed=int(sys.argv[2]) if len(sys.argv) > 2 else 1)
    print(f"{total} completions: {good} readable, {bad} not; slowest parse {slow * 1000:.1f} ms; ", end="")
    print(f"{time.perf_counter() - clock:.0f} s")
