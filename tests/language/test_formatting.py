"""The one layout: what is kept as it was written, what is not, and where comments go."""

from __future__ import annotations

import re
from textwrap import dedent

import pytest

from surgery.errors import Source, Span, SpecSyntaxError
from surgery.language import syntax as ast
from surgery.language.formatting import formatted
from surgery.language.parse import parse
from surgery.language.printer import to_text

SPAN = Span(Source("", ""), 0, 0)  # of trees that nothing was read for


# ------------------------------------------------------------------------------------- layout


def value(text: str) -> str:
    made = formatted(f"let v = {text}")
    return made.removeprefix("let v = ").removesuffix("\n")


@pytest.mark.parametrize(
    "text",
    [
        *("-a ** b", "(-a) ** -b", "a ** b ** c", "(a ** b) ** c", "-not_a", "-(not a)", "--a"),
        *("not a == b", "not not a", "(a == b) == c", "a == (b == c)", "(not a) == b"),
        *("a - (b - c)", "a - b - c", "(a - b) - c", "a * b @ c", "(a * b) @ c", "a @ (b * c)"),
        *("a or b and c", "(a or b) and c", "a or (b and c)", "a or (b or c)"),
        *(
            "a if b else c if d else e",
            "(a if b else c) if d else e",
            "a if (b if c else d) else e",
        ),
        *("(a + b)[:, 1:]", "f(x)[::2]", "A[:][a if b else c:]", "(-A)[:]", "A[:]ᵀ", "Aᵀ[:]"),
        *("Aᵀ", "Aᵀᵀ", "(A + B)ᵀ", "f(A)ᵀ", "transpose(A)", "transpose(Aᵀ)", "transpose(A, k = 1)"),
        *("8", "8.0", "007", "1e-4", "1E+5", ".5", "2.", "1e999", "1e-05", "9" * 3999, "true"),
        *('"a # b / (c"', "f()", "f(a, b, c = -1)"),
    ],
)
def test_what_is_kept_as_it_is_written(text: str) -> None:
    assert value(text) == text


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        *(("+a", "a"), ("(a)", "a"), ("((a+b))*c", "(a + b) * c"), ("not(a)", "not a")),
        *(("f(a,b,)", "f(a, b)"), ("f(k=1, a)", "f(a, k = 1)"), ("A [ : , 1 : ]", "A[:, 1:]")),
        *(("((f(x)))ᵀ", "f(x)ᵀ"), ("transpose( A )", "transpose(A)"), ("A[::]", "A[:]")),
    ],
)
def test_what_means_nothing_is_left_out(text: str, wanted: str) -> None:
    assert value(text) == wanted


def test_numbers_of_trees_that_were_not_read() -> None:
    def shown(number: float) -> str:
        let = ast.Let("v", ast.Number(number, span=SPAN), span=SPAN)
        return to_text(ast.Spec((let,), span=SPAN))

    assert [*map(shown, (8, 8.0, 1e-5, 10**30, float("inf")))] == [
        f"let v = {text}\n" for text in ("8", "8.0", "1e-05", "1" + "0" * 30, "1e999")
    ]


LAYOUTS = {
    "separators and space": (
        'let a=1;;let b = 2 ;\nmatch  q apply\n m( r = 8,side = "in" , k=-a)',
        'let a = 1\nlet b = 2\nmatch q apply m(r=8, side="in", k=-a)\n',
    ),
    "one blank line": (
        "\n\nlet a = 1\n\n \n\nlet b = 2\nlet c = 3\n\n",
        "let a = 1\n\nlet b = 2\nlet c = 3\n",
    ),
    "blank lines around blocks": (
        "let a = 1\nadapter x { match q apply m() match v apply m() }\nlet b = 2",
        "let a = 1\n\nadapter x {\n  match q apply m()\n  match v apply m()\n}\n\nlet b = 2\n",
    ),
    "none at the ends of a block": (
        "method m() on matrix {\n\n  b' = b\n\n\n  W' = W\n\n}",
        "method m() on matrix {\n  b' = b\n\n  W' = W\n}\n",
    ),
    "branches": (
        "method m() on matrix { if a { W' = W } else { if b { } else { y' = y } } }",
        "method m() on matrix {\n  if a {\n    W' = W\n  } else if b {\n  } else {\n    y' = y\n"
        "  }\n}\n",
    ),
    "shared and frozen": (
        "method m() on matrix {shared  frozen A[r]=0 shared B[r]=0\nshared frozen frozen[r]=0 }",
        "method m() on matrix {\n  shared frozen A[r] = 0\n  shared B[r] = 0\n"
        "  shared frozen frozen[r] = 0\n}\n",
    ),
    "the order of a format's rows": (
        'format f m { tensor A = "A" config k = 1 tensor B = "B" }',
        'format f m {\n  tensor A = "A"\n  config k = 1\n  tensor B = "B"\n}\n',
    ),
}


@pytest.mark.parametrize(("text", "wanted"), LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(text: str, wanted: str) -> None:
    assert formatted(text) == wanted
    assert to_text(parse(text)) == wanted


def test_what_is_too_long_is_broken() -> None:
    a, b, c = ("a" * 30, "b" * 30, "c" * 30)
    text = f"""\
match {a} | {b}
    | {c}
  in {a}[*].{b}[*].{c}
  apply m(r=8)
  expect 2
match {a} in {b}
  apply m({a} = r + 1, x = {b},
    {c} = 8, y = 9, z = 10)
let v = f({a} * {b}
    * {c} * {a},
  {b}, {c}) + {a}
  + {b}

method m(
  {a}: int = 8, {b}: int = 8, c: text
) on matrix {{
  W' = W
}}

format f m {{
  tensor A = "{a}"
    as "{b}"
    if {c} == 1 and {a} == 1
}}
"""
    flat = re.sub(r"\n +(?=[^ }])", " ", text).replace("( ", "(").replace("\n) on", ") on")
    assert formatted(flat) == formatted(text) == text


# ----------------------------------------------------------------------------------- comments

COMMENTS = {
    "own lines and ends of lines": (
        """
        # first

        # second
        let a = 1# here
           # before b
        let b = 2 ; # there
        # last
        """,
        """
        # first

        # second
        let a = 1  # here
        # before b
        let b = 2  # there
        # last
        """,
    ),
    "inside a statement they go before it": (
        """
        let z = 0
        # before
        match q # one
          # two

          apply m(r=8, # three
            k=9) # four
        """,
        """
        let z = 0
        # before
        # one
        # two
        # three
        match q apply m(r=8, k=9)  # four
        """,
    ),
    "in blocks": (
        """
        method m(r: int, # one
          k: int) on matrix { # two
          # three

          # four
          let a = 1 # five

          # six
        } # seven
        # eight
        adapter a { match q apply m() # nine
        match v apply m() }
        """,
        """
        # one
        method m(r: int, k: int) on matrix {  # two
          # three

          # four
          let a = 1  # five

          # six
        }  # seven

        # eight
        adapter a {
          match q apply m()  # nine
          match v apply m()
        }
        """,
    ),
    "around branches": (
        """
        method m() on matrix {
          if a { # one
            W' = W
            # two
          } # three
          # four
          else # five
          if b { # six
          }
          # seven
          else { # eight
            # nine
          } # ten
          # eleven
        }
        """,
        """
        method m() on matrix {
          if a {  # one
            W' = W
            # two
          } else if b {  # six
            # three
            # four
            # five
            # seven
            # eight
            # nine
          }  # ten
          # eleven
        }
        """,
    ),
    "before what was not in order": (
        """
        format f m {
          # of A
          tensor A = "A" # behind A
          # of k
          config k = 1
        }
        """,
        """
        format f m {
          # of A
          tensor A = "A"  # behind A
          # of k
          config k = 1
        }
        """,
    ),
    "signs of comments in texts and regexes": (
        """
        let a = "# no" # yes "#"
        match /x#y/ apply m() # "
        """,
        """
        let a = "# no"  # yes "#"
        match /x#y/ apply m()  # "
        """,
    ),
}


@pytest.mark.parametrize(("text", "wanted"), COMMENTS.values(), ids=COMMENTS)
def test_where_comments_go(text: str, wanted: str) -> None:
    wanted = dedent(wanted).removeprefix("\n")
    assert formatted(dedent(text)) == wanted
    assert formatted(wanted) == wanted


def test_what_is_no_spec_is_refused() -> None:
    for text in ("", "# only", "match q aply m()", "let a = \ud800"):
        with pytest.raises(SpecSyntaxError):
            formatted(text, "a.peft")
