"""Declarative model surgery: a spec becomes an adapted model, a mapping and an inverse.

A spec says where and what: `match /q_proj|v_proj/ in layers[0:12] apply METHOD(r=8)`. A method is
one equation, from which forward, merge, inverse and checkpoint are derived.
"""

from surgery.errors import Diagnostic, SurgeryError
from surgery.language.parse import load, parse
from surgery.runtime import Compiled, attach, check, of, plan
from surgery.runtime import compile_model as compile
from surgery.verify import Verification, verify

__all__ = [
    "Compiled",
    "Diagnostic",
    "SurgeryError",
    "Verification",
    "attach",
    "check",
    "compile",
    "load",
    "of",
    "parse",
    "plan",
    "verify",
]

__version__ = "0.1.0"
