"""Markdown pages as programs: their blocks in order, Python run as it stands, commands run, or marked and checked.

A command of a block is run, unless a comment says what it needs: `# needs weights`, `# needs a GPU`, `# needs a
server`, `# needs data`, `# needs the network`; or that it `# runs until it is stopped`. A comment on a line of its own
counts to the end of its block. Marked commands are read by their own parser, so that a misspelt option is found all the
same. A Python block whose first line is such a comment is compiled; a block of `py` is a script that another test runs.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conftest import ROOT

MARK = re.compile(r"#\s.*\b(needs (?:weights|a GPU|a server|data|the network)|runs until it is stopped)\b")
FENCE = re.compile(
    r'^```([\w-]*)(?: title="([^"\n]+)")?\n(.*?)^```$|(?<=\n\n)((?: {4}[^\n]*\n)+)', re.MULTILINE | re.DOTALL
)
SHOWN = ("text", "toml", "yaml", "json")  # blocks to read, not to run

# What a run of a page makes of numbers that are for people: the most, behind these words of a command.
MOST = {
    ("evaluate", "--cases"): 2,
    ("evaluate-vqa", "--cases"): 4,
    ("trajectories", "--cases"): 24,
    ("sft", "steps"): 2,
    ("grpo", "iterations"): 1,
    ("baselines/scripted.py", "--episodes"): 1,
}
SCRIPTS = {"GRPOTrainer": "tests/test_adapter_trl.py"}  # what a block of `py` has in it, and who runs it
MORE = {  # words that are added
    ("leaderboard", "run"): ["--cases", "1"],
    ("recipe", "run"): ["--cases", "1"],
    ("sft",): ["--set", "validate_cases=2"],
    ("grpo",): ["--set", "validate_cases=2", "--set", "prompts=2"],
}

# Commands that are run by another part of continuous integration: what must stand in which file for that to be so.
ELSEWHERE = {
    "git clone": (".ci/run", "make test"),  # a checkout is where continuous integration begins
    "cd": (".ci/run", 'cd "$(dirname "$0")/.."'),
    ". .venv/bin/activate": ("Makefile", "BIN := $(VENV)/bin"),
    "pip install": ("Makefile", "PIP_INSTALL = "),  # its extras are looked up in pyproject.toml
    "make demo": (".ci/run", "make demo"),
    "make test": (".ci/run", "make test"),
    "make check": (".ci/run", "make check"),
    "make test-parity": (".ci/run", "make test-parity"),
    "make test-vllm": (".ci/run", "make test-vllm"),
    "make docs": ("tests/test_docs.py", "mkdocs"),
}


@dataclass(frozen=True)
class Block:
    """A fenced block, or an indented one, of a page."""

    page: str
    line: int  # of its first line
    language: str
    text: str
    title: str = ""  # the file that it is, too

    @property
    def where(self) -> str:
        return f"{self.page}, line {self.line}"


@dataclass(frozen=True)
class Command:
    """One command of a block: its words, and what it needs that is not here."""

    where: str
    words: tuple[str, ...]
    needs: str = ""

    @property
    def program(self) -> str:
        """What runs it: "medseg-gym", or of a script its path in the repository."""
        return self.words[1] if self.words[0] == "python" and len(self.words) > 1 else self.words[0]


def blocks(page: str) -> list[Block]:
    """The blocks of a page, in order; `page` is its path in the repository."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        language, title, body, indented = match.groups()
        if indented is not None:
            body = re.sub(r"^ {4}", "", indented, flags=re.MULTILINE)
        found.append(Block(page, text.count("\n", 0, match.start()) + 2, language or "", body, title or ""))
    return found


def commands(block: Block) -> Iterator[Command]:
    """The commands of a block that holds such."""
    needs = ""
    lines = block.text.replace("\\\n", " ").splitlines()
    for number, line in enumerate(lines):
        mark = MARK.search(line)
        words = shlex.split(line, comments=True)
        if not words:
            needs = mark.group(1) if mark else needs
            continue
        yield Command(f"{block.where} + {number}", tuple(words), mark.group(1) if mark else needs)


def spans(page: str) -> list[Command]:
    """The commands in a page's sentences, between backticks."""
    text = FENCE.sub(lambda match: "\n" * match.group().count("\n"), (ROOT / page).read_text(encoding="utf-8"))
    found = []
    for match in re.finditer(r"`([^`\n]+)`", text):
        said = match.group(1)
        if re.match(r"(medseg-gym|make|python (baselines|benchmarks)/\S+\.py)( |$)", said):
            where = f"{page}, line {text.count(chr(10), 0, match.start()) + 1}"
            found.append(Command(where, tuple(shlex.split(said, comments=True))))
    return found


# What is asked of a command


def run(command: Command) -> None:
    """Runs a command in the current folder, with less of what takes long."""
    if command.words[0] == "medseg-gym":
        from typer.testing import CliRunner

        from medseg_gym.cli import app

        words = shortened(command.words[1:])
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, f"{command.where}: medseg-gym {' '.join(words)}: {result.output}"
    elif (ROOT / command.program).is_file():
        _script(command, shortened(command.words[1:])[1:])
    else:
        elsewhere(command)


def shortened(words: tuple[str, ...]) -> list[str]:
    """The words with MOST and MORE applied."""
    said = list(words)
    for (first, option), most in MOST.items():
        for i, word in enumerate(said if said[0] == first else ()):
            if word == option:
                said[i + 1] = str(min(int(said[i + 1]), most))
            elif word.startswith(f"{option}="):
                said[i] = f"{option}={min(int(word.partition('=')[2]), most)}"
    for start, more in MORE.items():
        if tuple(said[: len(start)]) == start:
            said += more
    return said


def elsewhere(command: Command) -> None:
    """Holds a command that other stages run to ELSEWHERE."""
    line = " ".join(command.words)
    known = [start for start in ELSEWHERE if line == start or line.startswith(f"{start} ")]
    assert known, f"{command.where}: {line!r} is neither run, nor marked with what it needs, nor in ELSEWHERE"
    file, text = ELSEWHERE[max(known, key=len)]
    if (ROOT / file).exists():  # a source distribution has no .ci
        assert text in (ROOT / file).read_text(encoding="utf-8"), f"{command.where}: {file} does not run {line!r}"
    if command.words[0] == "pip":
        check_extras(command)


def check_extras(command: Command) -> None:
    """Extras and constraints that `pip install` names are there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for names in re.findall(r"\[([\w,-]+)\]", " ".join(command.words)):
        unknown = set(names.split(",")) - set(project["optional-dependencies"])
        assert not unknown, f"{command.where}: no extra {', '.join(unknown)}"
    for option, file in zip(command.words, command.words[1:], strict=False):
        assert option != "-c" or (ROOT / file).is_file(), f"{command.where}: {file} is not there"


def check(command: Command, *, whole: bool = True) -> None:
    """Reads a command by its own parser without running it; not `whole`: a name in a sentence, so no more than that."""
    if command.words[0] == "medseg-gym":
        _check_cli(command, whole)
    elif command.program.endswith(".py"):
        _check_script(command, whole)
    elif command.words[0] == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        targets = [word for word in command.words[1:] if "=" not in word]
        for target in targets:
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{command.where}: no target {target}"
    elif command.words[0] == "pip":
        check_extras(command)
    else:
        assert command.words[0] in ("ray", "vllm"), f"{command.where}: nobody knows {command.words[0]!r}"


def _check_cli(command: Command, whole: bool) -> None:
    import typer

    from medseg_gym.cli import app

    level: Any = typer.main.get_command(app)
    context = level.make_context("medseg-gym", [], resilient_parsing=True)
    words = list(command.words[1:])
    while words and not words[0].startswith("-") and words[0] in getattr(level, "commands", {}):
        level = level.commands[words[0]]
        context = level.make_context(words.pop(0), [], parent=context, resilient_parsing=True)
    if hasattr(level, "commands") and words:
        assert words[0].startswith("-"), f"{command.where}: no command {words[0]!r}"
    options = {name for parameter in level.params for name in (*parameter.opts, *parameter.secondary_opts)}
    for word in words:
        assert not word.startswith("--") or word in {*options, "--help"}, f"{command.where}: no option {word}"
    if not whole:
        return
    try:
        given = level.make_context(level.name, words, parent=context.parent or context).params
    except Exception as error:  # click's UsageError, of whichever click typer brings along
        raise AssertionError(f"{command.where}: {' '.join(command.words)}: {error}") from None
    if level.name in ("sft", "grpo") and given["config"] is None:
        _check_settings(level.name, given)
    for spec in given.get("policy") or ():
        if isinstance(spec, str) and spec.startswith("vlm:"):
            from medseg_gym import policies

            policies.make(spec).close()  # type: ignore[attr-defined]


def _check_settings(name: str, given: dict[str, Any]) -> None:
    """The settings of a training command are such that a run would begin."""
    from medseg_gym.cli_train import given as said
    from medseg_gym.rl.config import GRPOConfig, SFTConfig, read

    kind = {"sft": SFTConfig, "grpo": GRPOConfig}[name]
    read(kind, None, **said(None, given["preset"], given["setting"], given["out"]))


def _check_script(command: Command, whole: bool) -> None:
    file = ROOT / command.program
    assert file.is_file(), f"{command.where}: {command.program} is not there"
    source = "".join(script.read_text(encoding="utf-8") for script in file.parent.glob("*.py"))  # some share a parser
    for word in command.words[2:]:
        assert not word.startswith("--") or f'"{word}"' in source, f"{command.where}: {command.program} has no {word}"
    own = file.read_text(encoding="utf-8")
    for option in re.findall(r'add_argument\(\s*"(--[\w-]+)"[^)]*required=True', own) if whole else ():
        assert option in command.words, f"{command.where}: {command.program} needs {option}"


def _script(command: Command, arguments: list[str]) -> None:
    import runpy
    import sys

    before = sys.argv
    sys.argv = [command.program, *arguments]
    try:
        runpy.run_path(str(ROOT / command.program), run_name="__main__")
    except SystemExit as end:
        assert not end.code, f"{command.where}: {' '.join(command.words)}: {end.code}"
    finally:
        sys.argv = before


def run_page(page: str) -> None:
    """Runs a page in the current folder: Python blocks in one namespace, commands, each in its place."""
    namespace: dict[str, object] = {"__name__": "__page__"}
    for block in blocks(page):
        if block.title:
            Path(block.title).write_text(block.text, encoding="utf-8")
        if block.language in ("python", "py"):
            code = compile("\n" * (block.line - 1) + block.text, str(ROOT / page), "exec")
            if block.language == "py":
                runs = [test for text, test in SCRIPTS.items() if text in block.text]
                assert runs and (ROOT / runs[0]).is_file(), f"{block.where}: no test in SCRIPTS runs this script"
            elif not MARK.match(block.text.splitlines()[0]):
                exec(code, namespace)
        elif block.language in ("", "sh"):
            for command in commands(block):
                (check if command.needs else run)(command)
        else:
            assert block.language in SHOWN, f"{block.where}: a block of {block.language!r}; wanted python, sh or text"
