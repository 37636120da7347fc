"""One run reports every mistake of a file: each once, in the order of their places."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import surgery
from surgery.errors import Diagnostic, SurgeryError


def found(text: str) -> list[tuple[str, int]]:
    """The code and line of every finding."""
    return [_placed(one) for one in surgery.check(text)]


def _placed(one: Diagnostic) -> tuple[str, int]:
    assert one.span is not None, one
    assert one.label or one.hint, one
    return one.code, one.span.source.position(one.span.start)[0]


def marked(text: str) -> tuple[str, list[tuple[str, int]]]:
    """A text without the comments that name what is wrong with their lines, and those."""
    wanted = [
        (code, at)
        for at, line in enumerate(text.splitlines(), 1)
        for code in line.partition("#")[2].split()
    ]
    return "\n".join(line.partition("#")[0] for line in text.splitlines()), wanted


SYNTAX = """\
match q aply m()                        # E003
let stack = 3                           # E003
let a = 1 +                             # E003
param b: itn = 3                        # E003
match q apply m(8)                      # E008
match /q apply m()                      # E006
match q apply m(side = 'in')            # E003
let good = 3
method n() on matrix { trian A[r] = 0 } # E003
adapter other {
  match q apply m(3)                    # E008
  match v apply m(r = 8 8)              # E003
  match k apply m(r = 8)
  match o apply m(r = 8, 4)             # E008
}
format peft m { tensr A = "a" }         # E003
match v apply m() expct 6               # E003
activate 0.5 other                      # E003
let = 3                                 # E003
"""

DEFINITIONS = """\
param rank: int = 2.5                   # E119
param layer: int = 3                    # E106
let a = rnak                            # E101
let b = a + 1
let c = 1 / 0                           # E105
let a = 2                               # E107
match /q(/ apply ia3()                  # E007
match /k/ except {a apply ia3()         # E007
match /v/ in /l(/[0] apply ia3()        # E007
match /q/ apply lorra(r = unknown_5)    # E121 E101
match /q/ apply lora(
  rr = 3,                               # E122
  r = "x",                              # E119
  alpha = unknown_1,                    # E101
  dropout = 1 / 0,                      # E105
)
match /q/ in layers[unknown_2] apply ia3() expect unknown_3 # E101 E101
match /q/ where nam == 3 apply ia3()    # E101
method m(
  W: int = 3,                           # E106
  s: text = 3,                          # E119
) on tensor {                            # E112
  train A[r, in] = 0                    # E101
  train B[out, 0] = 0                   # E111
  train C[out, in] = unknown_4          # E101
  let d = A + B
  let e = W @ W                         # E108
  if e == "x" { train F[in] = 0 }
  W' = W + d + F
  W' = W + Z                            # E101
  b' = W                                # E108
  q' = W                                # E101
}
match /q/ apply bone(r = 0)             # E111
"""


def test_every_syntax_error_is_reported_once_in_order() -> None:
    text, wanted = marked(SYNTAX)
    assert found(text) == wanted
    assert len(wanted) > 12


def test_every_wrong_definition_is_reported_once_in_order() -> None:
    text, wanted = marked(DEFINITIONS)
    assert found(text) == wanted


ON_A_MODEL = """\
match /q_porj|up/ in layers[*] apply lora()                     # E201
match up in layrs[0] apply lora()                               # E203
match up in layers[2] apply lora()                              # E204
match up in layers[0:3] apply lora() expect 3                   # E205 E206
match up in layers[1:1] apply lora()                            # E214
match * in layers[*] except head apply lora()                   # E202
match pair apply lora()                                         # E208
match * in layers[*] where in == 9 apply lora()                 # E211
match @quary apply lora()                                       # E213
match @router apply lora()                                      # E212
match down apply bat(r = 5)                                     # E301
match head apply lora(r = layer + 1)                            # E303
match down apply lora() match * in layers[0] apply lora()       # E302
match down apply lora(r = 3 - 3 * layer)                        # E111
"""


def test_all_that_does_not_fit_a_model_is_reported_once_in_order() -> None:
    text, wanted = marked(ON_A_MODEL)
    adapters = [f"adapter a{at} {{ {line} }}" for at, line in enumerate(text.splitlines())]
    layers = [nn.ModuleDict({"up": nn.Linear(7, 11), "down": nn.Linear(11, 7)}) for _ in range(2)]
    parts = {"layers": nn.ModuleList(layers), "pair": nn.Bilinear(3, 5, 7), "head": nn.Linear(7, 2)}
    with pytest.raises(SurgeryError) as caught:
        surgery.plan("\n".join(adapters), nn.ModuleDict(parts))
    assert [_placed(one) for one in caught.value.diagnostics] == wanted


# Statements that stand alone, each with one mistake; NUMBER makes the names of each its own.
WRONG = {
    "let aNUMBER = unknown_NUMBER": "E101",
    "let aNUMBER = 1 / 0": "E105",
    "let aNUMBER = aNUMBER": "E115",
    "param pNUMBER: int = 0.5": "E119",
    "param pNUMBER: int": "E118",
    "match /q(NUMBER/ apply ia3()": "E007",
    "match /q/ apply lora(r = NUMBER, alpha = unknown_NUMBER)": "E101",
    "match /q/ apply method_NUMBER()": "E121",
    "adapter aNUMBER { match /q/ apply lora(argument_NUMBER = 3) }": "E122",
    "match /q/ where unknown_NUMBER == 3 apply ia3()": "E101",
    "method mNUMBER() on matrix { W' = W @ transpose(W) + NUMBER }": "E108",
    "method mNUMBER() on matrix { }": "E120",
}
RIGHT = ["match /q/ apply lora(r = 7)", "let aNUMBER = 3", "method mNUMBER() on matrix { W' = W }"]


@given(st.lists(st.sampled_from([*WRONG, *RIGHT]), min_size=1, max_size=12))
def test_mistakes_do_not_hide_each_other(lines: list[str]) -> None:
    text = "\n".join(line.replace("NUMBER", str(at)) for at, line in enumerate(lines, 1))
    wanted = [(WRONG[line], at) for at, line in enumerate(lines, 1) if line in WRONG]
    assert found(f"{text}\nmatch /q/ apply ia3()") == wanted
