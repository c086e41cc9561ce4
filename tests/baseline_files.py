"""Files of baselines/, which is no package, as modules."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest
from conftest import ROOT


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of baselines/NAME.py, until the test is over."""
    monkeypatch.syspath_prepend(str(ROOT / "baselines"))
    spec = importlib.util.spec_from_file_location(name, ROOT / "baselines" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module
