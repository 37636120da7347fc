"""Declarative model surgery: a spec becomes an adapted model, a mapping and an inverse.

A spec says where and what: `match /q_proj|v_proj/ in layers[0:12] apply METHOD(r=8)`. A method is
one equation, from which forward, merge, inverse and checkpoint are derived.
"""

import gc

# What an import makes is there to stay, so a collection in the middle of it, over all that torch
# has made before, would find nothing and take as long as the import itself.
_collecting = gc.isenabled()
gc.disable()
try:
    from surgery.errors import Diagnostic, SurgeryError
    from surgery.explain import explain
    from surgery.include import load
    from surgery.language.parse import parse
    from surgery.runtime import Compiled, attach, check, of, plan
    from surgery.runtime import compile_model as compile
    from surgery.verify import Verification, verify
finally:
    if _collecting:
        gc.enable()

__all__ = [
    "Compiled",
    "Diagnostic",
    "SurgeryError",
    "Verification",
    "attach",
    "check",
    "compile",
    "explain",
    "load",
    "of",
    "parse",
    "plan",
    "verify",
]

__version__ = "0.1.0"
