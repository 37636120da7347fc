"""What a caller's own code gives: functions named by a text, run only where that is allowed."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

from surgery.errors import SurgeryError, refuse

PYTHON = "python:"
_NAMED = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_IN_FILE = re.compile(r"(?P<file>.+\.py):(?P<name>[A-Za-z_]\w*)")
_EXAMPLE = "such as python:my_models.small:make, or make.py:make"


def given_by(reference: str, gives: str, *, trust: bool) -> object:
    """What a function gives that is called without arguments: of a module, or of a file.

    reference: `python:package.module:function`, or `file.py:function`. gives: what the function
    gives, to be said where it fails.

    Raises ArtifactError: E501 if the reference is neither, or there is no such file; E503 if the
    function fails; E505 without `trust`.

    >>> given_by("python:builtins:dict", "a dict", trust=True)
    {}
    """
    found = _IN_FILE.fullmatch(reference)
    if not found and not _NAMED.fullmatch(reference.removeprefix(PYTHON)):
        message = f"`{reference}` is not python:package.module:function, or file.py:function"
        refuse("E501", message, hint=_EXAMPLE)
    if found and not os.path.isfile(found["file"]):
        refuse("E501", f"there is no file `{found['file']}`", hint=_EXAMPLE)
    if not trust:
        hint = "add --trust (in Python: trust=True) if you know what it does"
        refuse("E505", f"`{reference}` would run code", hint=hint)
    try:
        return _function(reference, found.groupdict() if found else None)()
    except SurgeryError:
        raise
    except Exception as error:  # whatever a stranger's function raises
        hint = _where(
            error, f"name a function that is called without arguments and returns {gives}"
        )
        refuse("E503", f"`{reference}` failed: {said(error)}", hint=hint)


def _function(reference: str, in_file: Mapping[str, str] | None) -> Callable[[], object]:
    if in_file is None:
        module, _, name = reference.removeprefix(PYTHON).partition(":")
        return cast("Callable[[], object]", getattr(importlib.import_module(module), name))
    path = Path(in_file["file"]).resolve()
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None  # its name ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return cast("Callable[[], object]", getattr(module, in_file["name"]))


def said(error: Exception) -> str:
    """The first line of an error, after its type."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _where(error: Exception, otherwise: str) -> str:
    """The place in the code that failed; `otherwise` for the call itself, and for the import."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return otherwise if last.filename == __file__ else f"raised in {last.filename}:{last.lineno}"
