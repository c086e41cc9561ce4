"""Protocols: what they write and read, action by action, with numbers worked out by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from medseg_gym.datasets.phantoms.cue import cue_boxes
from medseg_gym.errors import InvalidActionError, MedSegError, UnknownNameError
from medseg_gym.frames import Grid
from medseg_gym.policies.protocols import IBIS, ChatProtocol, MedSAMAgent, Tiny, make
from medseg_gym.policies.protocols.base import MAX_TEXT
from medseg_gym.types import Action, Box, Click, Stop, Undo

SIZES = [
    (1, 1),
    (1, 37),
    (48, 64),
    (63, 65),
    (512, 300),
    (999, 1000),
    (1000, 1000),
    (1001, 7),
    (1365, 2048),
    (4000, 3001),
]
SQUARE = Grid(1000, 1000)  # here a grid position is a pixel


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def act(body: str, tail: str = "") -> str:
    return f"<think>\nhm\n</think>\n<action>\n{body}\n</action>{tail}"


# every snapped action formats and parses back to itself


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("protocol", [MedSAMAgent(), IBIS()], ids=lambda p: p.name)
def test_every_snapped_pixel_is_read_back_as_it_was_written(protocol: ChatProtocol, size: tuple[int, int]) -> None:
    """Axes are independent, so all columns and all rows are tried, not all their pairs."""
    height, width = size
    grid = Grid(height, width)
    pixels = [(i % width, i % height) for i in range(max(size))]
    for i, (x, y) in enumerate(pixels):
        click = grid.snap(Click(x, y, positive=i % 2 == 0))
        assert protocol.parse(protocol.format(click, grid), grid).action == click
        if max(size) <= 1000:
            assert click == Click(x, y, positive=i % 2 == 0)
    if "box" in protocol.verbs:
        for (x1, y1), (x2, y2) in zip(pixels, pixels[::-1], strict=True):
            box = grid.snap(Box(min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)))
            assert protocol.parse(protocol.format(box, grid), grid).action == box


@pytest.mark.parametrize("protocol", [MedSAMAgent(), IBIS()], ids=lambda p: p.name)
def test_every_grid_position_of_a_long_image_is_written_as_itself(protocol: ChatProtocol) -> None:
    grid = Grid(1700, 4096)
    for g in range(1000):
        x, y = grid.to_pixel(g, g)
        click = grid.snap(Click(x, y))
        assert protocol.parse(protocol.format(click, grid), grid).action == click
        assert grid.from_pixel(x, y)[0] == g


@pytest.mark.parametrize("protocol", [MedSAMAgent(), IBIS(), Tiny()], ids=lambda p: p.name)
def test_what_is_not_snapped_is_snapped_before_it_is_written(protocol: ChatProtocol) -> None:
    grid = Grid(1365, 2048)
    raw: Action = Box(101, 77, 1777, 1301) if "box" in protocol.verbs else Click(1777, 1301)
    text = protocol.format(raw, grid)
    assert text == protocol.format(grid.snap(raw), grid)
    if protocol.name != "tiny":
        assert protocol.parse(text, grid).action == grid.snap(raw) != raw
    outside: Action = Box(-9, 5, 9999, 20) if "box" in protocol.verbs else Click(-9, 9999)
    assert protocol.format(outside, grid) == protocol.format(grid.snap(outside), grid)


def test_the_written_words() -> None:
    grid = Grid(48, 64)  # side 64, 8 rows of padding above: (10, 20) is column 10.5/64, row 28.5/64 of the square
    assert (10.5 * 1000 // 64, 28.5 * 1000 // 64) == (164, 445)
    arguments = '{"point_2d": [164, 445], "point_type": "positive"}'
    point = f'<tool_call>\n{{"name": "add_point", "arguments": {arguments}}}\n</tool_call>'
    assert MedSAMAgent().format(Click(10, 20), grid) == point
    assert MedSAMAgent().format(Box(10, 20, 10, 20), grid) == call("add_bbox", bbox_2d=[164, 445, 164, 445])
    assert MedSAMAgent().format(Stop(), grid) == call("stop_action")
    assert MedSAMAgent().format(Undo(), grid, thought="No.") == "No.\n" + call("undo_action")
    click = IBIS().format(Click(10, 20, False), grid, thought="Too much.")
    assert click == "<think>\nToo much.\n</think>\n<action>\nNegative Point (0.1645, 0.4455)\n</action>"
    stop = "<action>\nTerminate\n</action>\n<answer>\nYes.\n</answer>"
    assert IBIS(thinking=False).format(Stop(), grid, answer="Yes.") == stop


def test_an_action_without_words_and_text_that_breaks_its_tags_are_refused() -> None:
    with pytest.raises(InvalidActionError, match="'box'; the protocol ibis has positive, negative, stop, undo"):
        IBIS().format(Box(0, 0, 1, 1), SQUARE)
    with pytest.raises(InvalidActionError, match="'undo'"):
        MedSAMAgent(("box", "stop")).format(Undo(), SQUARE)
    with pytest.raises(MedSegError, match="</think>"):
        IBIS().format(Undo(), SQUARE, thought="a </think> b")
    with pytest.raises(MedSegError, match="<tool_call>"):
        MedSAMAgent().format(Undo(), SQUARE, thought="I could say <tool_call>")
    with pytest.raises(MedSegError, match="</answer>"):
        IBIS().format(Stop(), SQUARE, answer="</answer>")


# what is read


@pytest.mark.parametrize(
    ("text", "action"),
    [
        (call("add_point", point_2d=[3, 999], point_type="negative"), Click(3, 999, False)),
        (call("add_bbox", bbox_2d=[9, 8, 3, 4]), Box(3, 4, 9, 8)),
        ('<tool_call>{"name":"stop_action"}</tool_call>', Stop()),
        ('<tool_call>{"arguments":null,"name":"undo_action"}</tool_call>', Undo()),
        ("Let me see. " + call("stop_action") + " and so on", Stop()),
        (call("undo_action") + call("stop_action"), Undo()),  # the first call counts
        ("<think>" + call("stop_action") + "</think>" + call("undo_action"), Undo()),  # but not one in a thought
        (call("stop_action") + "</think>" + call("undo_action"), Undo()),  # a template may have opened the thought
    ],
)
def test_medsam_agent_reads(text: str, action: Action) -> None:
    decision = MedSAMAgent().parse(text, SQUARE)
    assert (decision.action, decision.text, decision.reason) == (action, text, "")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no <tool_call> was found"),
        ('{"name": "stop_action", "arguments": {}}', "no <tool_call> was found"),
        ("<think>" + call("stop_action") + "</think> Done.", "no <tool_call> was found"),  # weighed, not said
        ('<tool_call>{"name": "stop_action"}', "not closed"),
        ("<tool_call>stop_action</tool_call>" + call("stop_action"), "no JSON"),  # the first, well formed or not
        ("<tool_call>[1]</tool_call>", '"name" and "arguments"'),
        ('<tool_call>{"name": "stop_action", "id": 1}</tool_call>', '"name" and "arguments"'),
        (call("add_box", bbox_2d=[1, 2, 3, 4]), "no function 'add_box' here; the functions are add_bbox, add_point"),
        ('<tool_call>{"name": ["add_point"], "arguments": {}}</tool_call>', "no function a list"),
        ('<tool_call>{"name": "stop_action", "name": "undo_action"}</tool_call>', "'name' stands twice"),
        (call("add_point", point_2d=[1, 2]), "add_point takes point_2d and point_type, nothing else"),
        (call("stop_action", sure=True), "stop_action takes no arguments"),
        (call("add_point", point_2d=[1, 2], point_type="maybe"), "'maybe'; wanted positive or negative"),
        (call("add_point", point_2d=[1, 2], point_type=["positive"]), "a list; wanted"),
        (call("add_point", point_2d=[1, 2, 3], point_type="positive"), "2 whole numbers"),
        (call("add_point", point_2d="[1, 2]", point_type="positive"), "2 whole numbers"),
        (call("add_point", point_2d=[1, 2.0], point_type="positive"), "2 whole numbers"),
        (call("add_point", point_2d=[1, True], point_type="positive"), "2 whole numbers"),
        (call("add_point", point_2d=[1, 1000], point_type="positive"), "outside 0 to 999"),
        (call("add_point", point_2d=[-1, 0], point_type="positive"), "outside 0 to 999"),
        (call("add_point", point_2d=[10**3000, 0], point_type="positive"), "outside 0 to 999"),
        (call("add_point", point_2d=[float("nan"), 0], point_type="positive"), "NaN is no position"),
        ('<tool_call>{"name": "add_point", "arguments": ' + "[" * 4000 + "</tool_call>", "no JSON"),
        ("<tool_call>" + " " * 5000 + "</tool_call>", "at most 4096"),
        ("<" * 1_000_000, f"1000000 characters; at most {MAX_TEXT}"),
    ],
)
def test_medsam_agent_says_why_it_cannot_read(text: str, reason: str) -> None:
    decision = MedSAMAgent().parse(text, SQUARE)
    assert decision.action is None
    assert reason in decision.reason
    assert decision.text == text


@pytest.mark.parametrize(
    ("text", "action"),
    [
        (act("Positive Point (0.5000, 0.2500)"), Click(500, 250)),
        (act("negative point(.25,1)"), Click(250, 999, False)),
        (act("Positive Point (0, 1.000)"), Click(0, 999)),
        (act("Positive Point (0.0009, 0.99999)"), Click(0, 999)),
        (act("Undo"), Undo()),
        (act("Terminate", "\n<answer>no</answer>"), Stop()),
        (act("Undo") + act("Terminate"), Undo()),
        ("so it was\n</think>" + act("Undo"), Undo()),
        ("<think><action>Terminate</action></think><action>Undo</action> and more", Undo()),
    ],
)
def test_ibis_reads(text: str, action: Action) -> None:
    decision = IBIS().parse(text, SQUARE)
    assert (decision.action, decision.text, decision.reason) == (action, text, "")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no <think> ... </think>"),
        ("<action>Undo</action>", "no <think> ... </think>"),
        ("<think></think>", "no <action>"),
        ("<think></think><action>Undo", "not closed"),
        (act(""), "0 lines"),
        (act("Undo\nUndo"), "2 lines stand in <action>; wanted one action"),
        (act("Terminate"), "Terminate wants <answer>"),
        (
            act("Box (0.1, 0.1, 0.2, 0.2)"),
            "'Box ?0.1, 0.1, 0.2, 0.2?' is no action here; wanted Positive Point (x, y) or",
        ),
        (act("liver: Undo"), "no action here"),
        (act("Positive Point (0.1, 0.2, 0.3)"), "no action here"),
        (act("Positive Point (nan, 0.2)"), "numbers from 0 to 1"),
        (act("Positive Point (., 0.2)"), "numbers from 0 to 1"),
        (act("Positive Point (-0.1, 0.2)"), "numbers from 0 to 1"),
        (act("Positive Point (1e-1, 0.2)"), "numbers from 0 to 1"),
        (act("Positive Point (٠.٥, 0.2)"), "numbers from 0 to 1"),  # Arabic digits
        (act("Positive Point (512, 0.2)"), "between 0 and 1"),
        (act("Positive Point (1.0001, 0.2)"), "between 0 and 1"),
        (act("Poſitive Point (0.1, 0.2)"), "no action here"),  # ſ folds to s outside ASCII
        (act("x" * 5000), "at most 4096"),
        ("<" * 1_000_000, f"1000000 characters; at most {MAX_TEXT}"),
    ],
)
def test_ibis_says_why_it_cannot_read(text: str, reason: str) -> None:
    decision = IBIS().parse(text, SQUARE)
    assert decision.action is None
    assert reason in decision.reason


def test_ibis_without_thinking_reads_an_action_with_or_without_a_thought() -> None:
    protocol = IBIS(thinking=False)
    assert protocol.parse("<action>Undo</action>", SQUARE).action == Undo()
    assert protocol.parse(act("Undo"), SQUARE).action == Undo()
    assert "<think>" not in protocol.system()


def test_a_position_in_the_padding_gives_the_nearest_pixel() -> None:
    wide = Grid(50, 100)  # 25 rows of padding above and below: rows 250 to 749 of the grid are the image's
    assert MedSAMAgent().parse(call("add_bbox", bbox_2d=[0, 0, 999, 999]), wide).action == Box(0, 0, 99, 49)
    assert IBIS().parse(act("Positive Point (0.5000, 0.1000)"), wide).action == Click(50, 0)
    assert IBIS().parse(act("Positive Point (0.5000, 0.2600)"), wide).action == Click(50, 1)


def test_only_verbs_of_the_env_are_spoken_of_and_read() -> None:
    points = MedSAMAgent(("stop", "positive"))
    assert points.verbs == ("positive", "stop")
    assert [f["name"] for f in points.schema()] == ["add_point", "stop_action"]
    assert points.schema()[0]["parameters"]["properties"]["point_type"]["enum"] == ["positive"]
    for word in ("add_bbox", "undo_action", "negative"):
        assert word not in points.system()
    assert (
        "the functions are add_point, stop_action"
        in points.parse(call("add_bbox", bbox_2d=[1, 2, 3, 4]), SQUARE).reason
    )
    negative = points.parse(call("add_point", point_2d=[1, 2], point_type="negative"), SQUARE)
    assert negative.action is None and "wanted positive" in negative.reason
    ibis = IBIS(("box", "positive", "negative", "stop"))  # the paper's set; it has no words for a box
    assert ibis.verbs == ("positive", "negative", "stop")
    assert "Undo" not in ibis.system()
    assert "'Undo' is no action here" in ibis.parse(act("Undo"), SQUARE).reason
    assert Tiny(("box",)).parse("S", SQUARE).action is None


def test_the_schema_in_the_prompt_is_json_a_line() -> None:
    lines = [line for line in MedSAMAgent().system().splitlines() if line.startswith('{"name": "')]
    assert [json.loads(line) for line in lines] == MedSAMAgent().schema()


def test_reasons_quote_nothing_a_template_acts_on() -> None:
    for word in ("<|im_end|>", "<tool_call>", "a\nb", "\ud800", "\0", "x" * 500, "<image>"):
        for reason in (
            MedSAMAgent().parse(call(word), SQUARE).reason,
            IBIS(thinking=False).parse(f"<action>{word}</action>", SQUARE).reason,
        ):
            assert reason and len(reason) < 250
            assert reason.isascii() and reason.isprintable()
            assert "|" not in reason and "<image>" not in reason


# several targets in one answer


def test_several_targets_are_routed_to_their_own_slots() -> None:
    protocol = IBIS(several=True)
    text = act("liver: Positive Point (0.5000, 0.2500)\nLeft Kidney : Negative Point (0.1, 0.2)")
    decisions = protocol.parse_many(text, SQUARE, ("liver", "left kidney", "spleen"))
    assert {target: d.action for target, d in decisions.items()} == {
        "liver": Click(500, 250),
        "left kidney": Click(100, 200, False),
    }
    assert all(d.text == text for d in decisions.values())
    done = protocol.parse_many(act("liver: Undo\nspleen: Terminate", "<answer></answer>"), SQUARE, ("liver", "spleen"))
    assert {target: d.action for target, d in done.items()} == {"liver": Undo(), "spleen": Stop()}
    everyone = protocol.parse_many(act("Terminate", "<answer>done</answer>"), SQUARE, ("liver", "spleen"))
    assert [d.action for d in everyone.values()] == [Stop(), Stop()]
    assert protocol.parse_many(act("Undo"), SQUARE, ("liver",))["liver"].action == Undo()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("liver: Undo\nliver: Undo", "liver has two actions"),
        ("liver: Undo\nheart: Undo", "no target 'heart'; the targets are liver, spleen"),
        ("Undo", "no target ''"),
        ("liver: Undo\nspleen: nothing", "'nothing' is no action here"),
        ("liver: Terminate", "Terminate wants <answer>"),
        ("", "nothing stands in <action>"),
    ],
)
def test_what_cannot_be_routed_is_unreadable_for_every_target(body: str, reason: str) -> None:
    decisions = IBIS().parse_many(act(body), SQUARE, ("liver", "spleen"))
    assert list(decisions) == ["liver", "spleen"]
    assert all(d.action is None and reason in d.reason for d in decisions.values())


def test_several_targets_are_read_back_as_they_were_written() -> None:
    protocol, grid = IBIS(several=True), Grid(300, 512)
    actions: dict[str, Action] = {"a: b": Click(511, 299), "Liver": Undo(), "liver": Stop(), "c": Click(0, 0, False)}
    text = protocol.format_many(actions, grid, thought="Four.", answer="One is done.")
    assert {t: d.action for t, d in protocol.parse_many(text, grid, tuple(actions)).items()} == actions
    assert protocol.answer(text) == "One is done."
    with pytest.raises(MedSegError, match="in one line"):
        protocol.format_many({"a\nb": Undo()}, grid)


def test_ibis_finds_the_answer_behind_the_action_only() -> None:
    protocol = IBIS()
    assert protocol.answer(act("Terminate", "<answer>\n benign \n</answer>")) == "benign"
    assert protocol.answer("<think><answer>no</answer></think><action>Undo</action>") is None
    assert protocol.answer("") is None


# tiny


def test_tiny_says_the_cue_tasks_boxes_in_five_letters() -> None:
    grid, protocol = Grid(64, 64), Tiny()
    said = [protocol.format(box, grid) for box in cue_boxes(64)]
    assert said[0] == "BKKVV"  # the first box is 10, 10, 21, 21; the letters K and V are the 10th and the 21st after A
    assert len(set(said)) == 4
    assert [protocol.parse(text, grid).action for text in said] == list(cue_boxes(64))
    for x in range(64):
        box = Box(0, x, x, 63)
        assert protocol.parse(protocol.format(box, grid), grid).action == box
    assert protocol.parse(" S\n", grid).action == Stop()
    assert protocol.parse("BVVKK", grid).action == cue_boxes(64)[0]
    for text in ("", "s", "B", "BKKV", "BKKVVV", "AKKVV", "BKK-V", "BÄÄÄÄ", "S S"):
        decision = protocol.parse(text, grid)
        assert decision.action is None and decision.reason == "wanted B and four letters, or S"


def test_tiny_is_coarse_beyond_64_pixels() -> None:
    grid = Grid(128, 100)  # two pixels a cell, the second is its centre; 14 columns of padding are 7 cells
    assert Tiny().parse(Tiny().format(Box(0, 0, 99, 127), grid), grid).action == Box(1, 1, 99, 127)


# by name


def test_protocols_are_found_by_name_with_their_options() -> None:
    assert make("medsam-agent").verbs == ("positive", "negative", "box", "stop", "undo")
    chosen = make("ibis", ("positive", "stop"), history=True)
    assert isinstance(chosen, ChatProtocol) and chosen.history and chosen.verbs == ("positive", "stop")
    assert make(chosen) is chosen
    assert (make("ibis").colour, make("ibis").alpha, make("ibis").history) == ((34, 139, 34), 0.4, False)
    assert make("ibis").settings == {"horizon": 20, "stop_after_repeats": 3}
    assert (make("medsam-agent").colour, make("medsam-agent").alpha) == ((0, 255, 0), 0.5)
    with pytest.raises(UnknownNameError, match="did you mean 'ibis'"):
        make("ibiss")
    with pytest.raises(UnknownNameError, match="did you mean 'history'"):
        make("ibis", histori=True)
    with pytest.raises(UnknownNameError, match="verb 'boxx'; did you mean 'box'"):
        make("tiny", ("boxx",))
    with pytest.raises(InvalidActionError, match="ibis has words for positive, negative; the env allows box, stop"):
        make("ibis", ("box", "stop"))
    with pytest.raises(MedSegError, match="thinking='no'; wanted true or false"):
        make("ibis", thinking="no")
