"""A griffe extension: the comments by which this project documents fields and constants join the reference."""

from __future__ import annotations

import io
import tokenize
from functools import cache
from pathlib import Path
from typing import Any

import griffe


class FieldComments(griffe.Extension):
    """A class's fields become a table below its text; a constant's text is the comment at the end of its line."""

    def on_class_members(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        own = [a for a in cls.attributes.values() if a.docstring is None and "property" not in a.labels]
        told = {a.name: _comment(a).replace("|", "\\|") for a in own if not a.name.startswith("_")}
        rows = [f"| `{name}` | {text} |" for name, text in told.items() if text]
        if rows:
            text = cls.docstring.value if cls.docstring else ""
            table = "\n".join(["| field | |", "|---|---|", *rows])
            cls.docstring = griffe.Docstring(f"{text}\n\n{table}", lineno=cls.lineno, parent=cls)

    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        if attr.docstring is None and attr.parent is not None and attr.parent.is_module and (text := _comment(attr)):
            attr.docstring = griffe.Docstring(text, lineno=attr.endlineno, parent=attr)


def _comment(attr: griffe.Attribute) -> str:
    """The comment on an attribute's last line, or nothing."""
    if attr.endlineno is None or not isinstance(attr.filepath, Path):
        return ""
    text = _comments(attr.filepath).get(attr.endlineno, "")
    return "" if text.startswith(("noqa", "type:")) else text


@cache
def _comments(file: Path) -> dict[int, str]:
    """The comments behind code, by line."""
    tokens = tokenize.generate_tokens(io.StringIO(file.read_text(encoding="utf-8")).readline)
    found = (token for token in tokens if token.type == tokenize.COMMENT)
    return {t.start[0]: t.string.lstrip("# ") for t in found if t.line[: t.start[1]].strip()}
