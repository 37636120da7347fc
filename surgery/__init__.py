"""Declarative model surgery: a spec becomes an adapted model, a mapping and an inverse.

A spec says where and what: `match /q_proj|v_proj/ in layers[0:12] apply METHOD(r=8)`. A method is
one equation, from which forward, merge, inverse and checkpoint are derived.
"""

import gc
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from surgery.allocation import allocate
    from surgery.composing import compose, compose_on
    from surgery.conversion import convert
    from surgery.explanation import explain
    from surgery.extraction import extract
    from surgery.file_merge import merge_files, plan_files
    from surgery.file_unmerge import unmerge_files
    from surgery.grouping import groups
    from surgery.include import load
    from surgery.inspection import inspect
    from surgery.integrations.imported import import_config
    from surgery.tensor_diff import diff
    from surgery.verification import Verification, verify

# What an import makes is there to stay, so a collection in the middle of it, over all that torch
# has made before, would find nothing and take as long as the import itself.
_collecting = gc.isenabled()
gc.disable()
try:
    from surgery.compiling import attach, check, of, plan
    from surgery.compiling import compile_model as compile
    from surgery.errors import Diagnostic, SurgeryError
    from surgery.language.parse import parse
    from surgery.recomputing import repeating
    from surgery.runtime import Compiled
finally:
    if _collecting:
        gc.enable()

__all__ = [
    "Compiled",
    "Diagnostic",
    "SurgeryError",
    "Verification",
    "allocate",
    "attach",
    "check",
    "compile",
    "compose",
    "compose_on",
    "convert",
    "diff",
    "explain",
    "extract",
    "groups",
    "import_config",
    "inspect",
    "load",
    "merge_files",
    "of",
    "parse",
    "plan",
    "plan_files",
    "repeating",
    "unmerge_files",
    "verify",
]

__version__ = "0.1.0"

_LATER = {
    "allocate": "surgery.allocation",
    "compose": "surgery.composing",
    "compose_on": "surgery.composing",
    "convert": "surgery.conversion",
    "diff": "surgery.tensor_diff",
    "explain": "surgery.explanation",
    "extract": "surgery.extraction",
    "groups": "surgery.grouping",
    "import_config": "surgery.integrations.imported",
    "inspect": "surgery.inspection",
    "load": "surgery.include",
    "merge_files": "surgery.file_merge",
    "plan_files": "surgery.file_merge",
    "unmerge_files": "surgery.file_unmerge",
    "Verification": "surgery.verification",
    "verify": "surgery.verification",
}
"""What is imported when it is first asked for."""


def __getattr__(name: str) -> object:
    """The public names that take a module of their own."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)
