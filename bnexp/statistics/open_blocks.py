"""`with` and `try` blocks that a forward pass is in while a BN layer is called.

Such a block may have set something that it will put back. One pass after the other, nobody notices;
interleaved, each meets what the others have set, and the last to leave need not be the first that
came. Blocks of torch's own managers are known (`PassSettings` and `ModelState` see to them).
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import dis
import inspect
import os
import sys
import textwrap
import warnings
from types import CodeType, FrameType

import numpy as np
import torch

import bnexp

_OWN = tuple(os.path.dirname(str(module.__file__)) + os.sep for module in (torch, bnexp))
_KNOWN = (
    contextlib.nullcontext,
    contextlib.redirect_stderr,
    contextlib.redirect_stdout,
    contextlib.suppress,
    warnings.catch_warnings,
    np.errstate,
)


class OpenBlocks:
    """Finds the blocks between a call and the frame that runs `root`."""

    def __init__(self, root: CodeType) -> None:
        self._root = root
        # By id, as code objects are slow to hash; they are kept, so that ids stay theirs.
        self._guarded: dict[int, tuple[CodeType, list[tuple[int, int]]]] = {}

    def find(self) -> str | None:
        """Where the pass is in a block that is not known, None where it is in none."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code is not self._root:
            code = frame.f_code
            if id(code) not in self._guarded:
                self._guarded[id(code)] = code, _guarded(code)
            for start, end in self._guarded[id(code)][1]:
                if start <= frame.f_lasti < end and not _is_known(frame):
                    file = os.path.basename(code.co_filename)
                    return f"line {frame.f_lineno} of {file} is in a with or try block"
            frame = frame.f_back
        return None


def _guarded(code: CodeType) -> list[tuple[int, int]]:
    """The stretches of bytecode in `with` and `try` blocks; not those of inlined comprehensions."""
    if code.co_filename.startswith(_OWN):
        return []
    bytecode = dis.Bytecode(code)
    handlers = {instruction.offset for instruction in bytecode if "EXC_INFO" in instruction.opname}
    entries = bytecode.exception_entries  # type: ignore[attr-defined]  # not in the stubs
    return [(e.start, e.end) for e in entries if e.target in handlers]


def _is_known(frame: FrameType) -> bool:
    """Whether the source has the line in `with` blocks of known managers and in no `try` block."""
    try:
        lines, _ = inspect.getsourcelines(frame.f_code)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, SyntaxError):
        return False
    line = frame.f_lineno - frame.f_code.co_firstlineno + 1
    blocks = [
        node
        for node in ast.walk(tree)
        if isinstance(node, (ast.With, ast.AsyncWith, ast.Try, ast.TryStar))
        and node.lineno <= line <= (node.end_lineno or line)
    ]
    managers = [i.context_expr for b in blocks if isinstance(b, ast.With) for i in b.items]
    return (
        bool(blocks)
        and all(isinstance(block, ast.With) for block in blocks)
        and all(_manager_is_known(manager, frame) for manager in managers)
    )


def _manager_is_known(expression: ast.expr, frame: FrameType) -> bool:
    called = isinstance(expression, ast.Call)
    named = expression.func if isinstance(expression, ast.Call) else expression
    first, *names = ast.unparse(named).split(".")
    scopes = (frame.f_locals, frame.f_globals, vars(builtins))
    found = next((scope[first] for scope in scopes if first in scope), None)
    for name in names:
        found = getattr(found, name, None)
    maker = found if called else type(found)
    module = getattr(maker, "__module__", None) or ""
    return maker in _KNOWN or module.split(".")[0] == "torch"
