"""Lets a CUDA build of torchvision be imported beside a CPU build of torch; `make test-parity` puts it into its venv.

torchvision describes its operators to torch when it is imported, and fails where its library, which declares them,
could not be loaded. Declared beforehand they can be described; calling them still fails. A .pth file imports this
module at the start of Python, so that subprocesses have it too. Transforms then work, `ops.nms` does not.
"""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[Any] = []  # a Library takes its operators back when it is freed


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Declares the operators at the first import of torchvision, and finds nothing itself."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "torchvision" and not _declared:
            import torch

            library = torch.library.Library("torchvision", "FRAGMENT")
            for schema in SCHEMAS:
                library.define(schema)
            _declared.append(library)
        return None


sys.meta_path.insert(0, _BeforeTorchvision())
