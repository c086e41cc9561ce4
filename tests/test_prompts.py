"""Prompts as goldens, so that no word changes unnoticed: models that were trained on a prompt depend on all of it.

The goldens, tests/goldens/prompts.txt, are made anew by `python tests/test_prompts.py`.
"""

from __future__ import annotations

from pathlib import Path

from medseg_gym.policies.protocols import IBIS, ChatProtocol, MedSAMAgent, Moment, Tiny
from medseg_gym.types import Click, Undo, Unreadable

GOLDEN = Path(__file__).parent / "goldens" / "prompts.txt"
PHRASE = "right kidney in abdomen CT"


def prompts() -> str:
    moments = {
        "first": Moment(PHRASE, 0, False),
        "first, a mask given": Moment(PHRASE, 0, True),
        "later": Moment(PHRASE, 1, True, Click(1, 2)),
        "later, no mask": Moment(PHRASE, 1, False, Click(1, 2, False)),
        "after an undo": Moment(PHRASE, 2, False, Undo()),
        "after an unreadable answer": Moment(PHRASE, 2, True, Unreadable("no <action> was found")),
    }
    protocols: dict[str, ChatProtocol] = {
        "medsam-agent": MedSAMAgent(),
        "medsam-agent, the paper's verbs": MedSAMAgent(("positive", "negative", "box", "stop")),
        "medsam-agent, one click": MedSAMAgent(("positive",)),
        "ibis": IBIS(),
        "ibis, the released verbs": IBIS(("positive", "negative", "stop")),
        "ibis, no thought": IBIS(thinking=False),
        "ibis, several targets": IBIS(several=True),
        "tiny": Tiny(),
    }
    parts = []
    for name, protocol in protocols.items():
        parts.append(f"######## {name}\n{protocol.system()}")
        parts += [f"#### {name}: {when}\n{protocol.user(moment)}" for when, moment in moments.items()]
    return "\n\n".join(parts) + "\n"


def test_no_word_of_a_prompt_has_changed() -> None:
    assert prompts() == GOLDEN.read_text(encoding="utf-8")


if __name__ == "__main__":
    GOLDEN.write_text(prompts(), encoding="utf-8")
    print(f"wrote {GOLDEN}")
