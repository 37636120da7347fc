"""What stands within a line of a spec: each form of the syntax that has no braces, as a document.

A new form is one function and one row of `PHRASES`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from surgery.language import syntax as ast
from surgery.language.build import number_of
from surgery.language.layout import NOTHING, SPACE, Doc, Group, Nest, filled, hanging

# -------------------------------------------------------------------------------- expressions

# How tightly a form binds; the names are those of the grammar.
_EXPRESSION, _DISJUNCTION, _CONJUNCTION, _NEGATION, _COMPARISON = range(5)
_SUM, _PRODUCT, _UNARY, _POWER, _POSTFIX = range(5, 10)

# Of an operator: how tightly it binds, and how tightly its operands must.
_BINDING: Mapping[str, tuple[int, int, int]] = {
    "or": (_DISJUNCTION, _DISJUNCTION, _CONJUNCTION),
    "and": (_CONJUNCTION, _CONJUNCTION, _NEGATION),
    **dict.fromkeys(("==", "!=", "<", "<=", ">", ">="), (_COMPARISON, _SUM, _SUM)),
    **dict.fromkeys("+-", (_SUM, _SUM, _PRODUCT)),
    **dict.fromkeys(("*", "/", "//", "%", "@"), (_PRODUCT, _PRODUCT, _UNARY)),
    "**": (_POWER, _POSTFIX, _UNARY),
}
_THEN = -1  # looser than all else, and only behind `activate`
# The same of the operators between selectors.
_EITHER, _BOTH, _COMPLEMENT = range(3)


def phrase(node: ast.Node) -> Doc:
    """What stands for a node; one that has braces is none of those here."""
    return PHRASES[type(node)](node)


def _at(level: int, node: ast.Node) -> Doc:
    """A node where the grammar asks for what binds as tightly as `level`."""
    return phrase(node) if _level(node) >= level else ("(", phrase(node), ")")


def _level(node: ast.Node) -> int:
    match node:
        case ast.Conditional():
            return _EXPRESSION
        case ast.Binary(operator):
            return _BINDING[operator][0]
        case ast.LiveThen():
            return _THEN
        case ast.Unary("not"):
            return _NEGATION
        case ast.Unary():
            return _UNARY
        case ast.Either():
            return _EITHER
        case ast.Both():
            return _BOTH
        case _:
            return _POSTFIX  # it is of one piece, in expressions and in selectors


def _number(node: ast.Number) -> Doc:
    written = node.span.text
    if _NUMBER.fullmatch(written) and repr(number_of(written)) == repr(node.value):
        return written
    return "1e999" if node.value == math.inf else repr(node.value)


_NUMBER = re.compile(r"([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")


def _text(node: ast.Text) -> Doc:
    return f'"{node.value}"'


def _truth(node: ast.Truth) -> Doc:
    return "true" if node.value else "false"


def _name(node: ast.Name) -> Doc:
    return node.id


def _keyword(node: ast.Keyword) -> Doc:
    return (f"{node.name} = ", phrase(node.value))


def _call(node: ast.Call) -> Doc:
    if _is_sign(node):
        return (_at(_POSTFIX, node.arguments[0]), "ᵀ")
    return _called(node)


def _called(node: ast.Call) -> Doc:
    return (node.function, _listed("(", (*node.arguments, *node.keywords), ")"))


def _is_sign(node: ast.Call) -> bool:
    """Whether it is a `ᵀ`: the same tree as `transpose(…)`, and so taken where none was written.

    Behind `true` it would be read as a part of a name.
    """
    plain = len(node.arguments) == 1 and not node.keywords
    if node.function != "transpose" or not plain or isinstance(node.arguments[0], ast.Truth):
        return False
    return not node.span.text.endswith(")")


def _listed(opening: str, nodes: Sequence[ast.Node], closing: str) -> Doc:
    return (opening, _arguments([*map(phrase, nodes)]), closing)


def _arguments(parts: Sequence[Doc]) -> Doc:
    # What is broken inside one of them is further from the margin than the next.
    return hanging([*map(Nest, parts[:1]), *parts[1:]], ",")


def _binary(node: ast.Binary) -> Doc:
    _, left, right = _BINDING[node.operator]
    return _infix(node, left, node.operator, right)


def _infix(
    node: ast.Binary | ast.LiveThen | ast.Either | ast.Both, left: int, sign: str, right: int
) -> Doc:
    # Brackets that only help to read are kept. Written with them, the whole begins before its left
    # part does, or ends behind its right one.
    left = _POSTFIX if node.span.start < node.left.span.start else left
    right = _POSTFIX if node.right.span.end < node.span.end else right
    return hanging([_at(left, node.left), (f"{sign} ", _at(right, node.right))])


def _unary(node: ast.Unary) -> Doc:
    if node.operator == "not":
        return ("not ", _at(_NEGATION, node.operand))
    return ("-", _at(_UNARY, node.operand))


def _conditional(node: ast.Conditional) -> Doc:
    return hanging(_cases("", node))


def _cases(word: str, node: ast.Expression) -> list[Doc]:
    """What the cases of a conditional are, one behind the other however many there are."""
    if not isinstance(node, ast.Conditional):
        return [(word, phrase(node))]
    condition = ("if ", _at(_DISJUNCTION, node.condition))
    return [(word, _at(_DISJUNCTION, node.then)), condition, *_cases("else ", node.other)]


def _slice(node: ast.Slice) -> Doc:
    start, stop, step = ("" if p is None else phrase(p) for p in (node.start, node.stop, node.step))
    return (start, ":", stop, (":", step) if node.step is not None else "")


def _subscript(node: ast.Subscript) -> Doc:
    return (_at(_POSTFIX, node.value), _listed("[", node.items, "]"))


# ------------------------------------------------------------------------ selectors and scopes


def _regex(node: ast.Regex) -> Doc:
    return f"/{node.pattern}/"


def _glob(node: ast.Glob) -> Doc:
    return node.pattern


def _role(node: ast.Role) -> Doc:
    return f"@{node.name}"


def _rows(node: ast.Rows) -> Doc:
    return (phrase(node.pattern), "[", phrase(node.rows), "]")


def _either(node: ast.Either) -> Doc:
    return _infix(node, _EITHER, "|", _BOTH)


def _both(node: ast.Both) -> Doc:
    return _infix(node, _BOTH, "&", _COMPLEMENT)


def _complement(node: ast.Complement) -> Doc:
    return ("not ", _at(_COMPLEMENT, node.operand))


def _every(node: ast.Every) -> Doc:
    del node
    return "*"


def _indices(node: ast.Indices) -> Doc:
    return _listed("", node.values, "")


def _step(node: ast.Step) -> Doc:
    container = phrase(node.container)
    return container if node.index is None else (container, "[", phrase(node.index), "]")


def _scope(node: ast.Scope) -> Doc:
    parts = [phrase(node.steps[0])]
    for before, step in zip(node.steps, node.steps[1:], strict=False):
        # Without the spaces two globs would be read as one.
        globs = isinstance(before.container, ast.Glob) and isinstance(step.container, ast.Glob)
        parts += [" . " if globs and before.index is None else ".", phrase(step)]
    return tuple(parts)


# --------------------------------------------------------------------------------- statements


def _application(node: ast.Application) -> Doc:
    """`name(r=8)`, and `name(r = 2 * rank, alpha = r)` as soon as a value has parts of its own."""
    equals = "=" if all(_is_short(k.value) for k in node.arguments) else " = "
    arguments = [(f"{k.name}{equals}", phrase(k.value)) for k in node.arguments]
    return (f"{node.method}(", _arguments(arguments), ")", *_rates(node.rates))


def _rates(rates: Sequence[ast.Rate]) -> Sequence[Doc]:
    """The learning rates of a statement, behind what they are of."""
    if not rates:
        return ()
    return (Group(Nest((SPACE, "lr ", _arguments([*map(phrase, rates)])))),)


def _rate(node: ast.Rate) -> Doc:
    name = f"{node.name} " if node.name else ""
    if not node.times:
        return (f"{name}= ", _at(_DISJUNCTION, node.value))
    plain = isinstance(node.value, ast.Number)
    return (f"{name}= ", phrase(node.value) if plain else ("(", phrase(node.value), ")"), "x")


def _is_short(node: ast.Expression) -> bool:
    if isinstance(node, ast.Unary) and node.operator == "-":
        return _is_short(node.operand)
    return isinstance(node, ast.Number | ast.Text | ast.Truth | ast.Name)


def _selection(node: ast.Selection) -> Doc:
    """What a statement selects, without `optional` and `expect`: they stand around it."""
    clauses: list[Doc] = []
    if node.scopes:
        first, *rest = map(phrase, node.scopes)
        clauses.append(("in ", hanging([first, *(("| ", scope) for scope in rest)])))
    if node.where is not None:
        clauses.append(("where ", _at(_DISJUNCTION, node.where)))
    if node.exclude is not None:
        clauses.append(("except ", phrase(node.exclude)))
    return _clauses(Nest(phrase(node.selector)), clauses)


def _clauses(head: Doc, clauses: Iterable[Doc]) -> Doc:
    """What fits on a line, or each clause on one of its own."""
    return Group((head, Nest(tuple((SPACE, clause) for clause in clauses))))


def _match(node: ast.Match) -> Doc:
    selection = node.selection
    clauses: list[Doc] = [("apply ", phrase(node.application))]
    clauses += [("then ", phrase(application)) for application in node.then]
    if node.at:
        first, *rest = map(_place, node.at)
        clauses.append(("at ", hanging([first, *(("| ", place) for place in rest)])))
    if node.tie is not None:
        clauses.append(node.tie)
    if selection.expect is not None:
        clauses.append(("expect ", phrase(selection.expect)))
    head = "optional match " if selection.optional else "match "
    return _clauses((head, phrase(selection)), clauses)


def _place(node: ast.Call) -> Doc:
    """`first(5)`, or `[0, -1]`."""
    return _called(node) if node.function else _listed("[", node.arguments, "]")


def _train(node: ast.Train) -> Doc:
    selection = node.selection
    clauses: list[Doc] = [("lr ", phrase(rate)) for rate in node.rates]
    clauses += [] if node.tie is None else [node.tie]
    if selection.expect is not None:
        clauses.append(("expect ", phrase(selection.expect)))
    optional = "optional " if selection.optional else ""
    return _clauses((f"{optional}{node.verb} ", phrase(selection)), clauses)


def _declared(node: ast.Param | ast.Argument) -> Doc:
    if node.default is None:
        return f"{node.name}: {node.type}"
    return (f"{node.name}: {node.type} = ", phrase(node.default))


def _param(node: ast.Param) -> Doc:
    return ("param ", _declared(node))


def _let(node: ast.Let, level: int = _EXPRESSION) -> Doc:
    return (f"let {node.name} = ", _at(level, node.value))


def _derived(node: ast.Derived) -> Doc:
    """On one line, or broken within the expression, and before the way."""
    expression = Nest(phrase(node.expression))
    way: Doc = "" if node.way is None else Group(Nest((SPACE, "by ", _called(node.way))))
    return (f"adapter {node.name} = ", expression, way)


def _activate(node: ast.Activate) -> Doc:
    return ("activate ", Nest(phrase(node.expression)))


def _live_then(node: ast.LiveThen) -> Doc:
    return _infix(node, _THEN, "then", _SUM)


def _use(node: ast.Use) -> Doc:
    return f'use "{node.path}"'


# -------------------------------------------------------------------------- methods and formats


def item_phrase(node: ast.Node) -> Doc:
    """An item of a method, where a conditional has to stand in parentheses."""
    return _let(node, _DISJUNCTION) if isinstance(node, ast.Let) else phrase(node)


def signature(arguments: Sequence[ast.Argument]) -> Doc:
    """The arguments of a method in their brackets, which stand apart where they are broken."""
    if not arguments:
        return "()"
    return Group(("(", Nest((NOTHING, filled([*map(phrase, arguments)], ","))), NOTHING, ")"))


def _draw(node: ast.Draw) -> Doc:
    return _called(node.distribution)  # here the grammar takes nothing but a call


def _declaration(node: ast.Declaration) -> Doc:
    roles = ("shared " * node.shared) + ("train " * node.trained) or "frozen "
    if roles == "shared " and (node.name == "frozen" or _SHARED_FROZEN.match(node.span.text)):
        roles = "shared frozen "  # `shared` alone means the same, but not before this name
    sign = "~" if isinstance(node.beginning, ast.Draw) else "="
    beginning = _at(_DISJUNCTION, node.beginning)
    rate: Doc = "" if node.rate is None else (", lr ", phrase(node.rate))
    return (f"{roles}{node.name}", _listed("[", node.shape, "]"), f" {sign} ", beginning, rate)


_SHARED_FROZEN = re.compile(r"shared\s+frozen\b")


def _equation(node: ast.Equation) -> Doc:
    return (f"{node.target}' = ", _at(_DISJUNCTION, node.value))


def _assign(node: ast.Assign) -> Doc:
    return (f"{node.target} := ", _at(_DISJUNCTION, node.value))


def _field(node: ast.Field) -> Doc:
    parts = [_at(_DISJUNCTION, node.value)]
    if node.default is not None:
        parts.append(("else ", _at(_DISJUNCTION, node.default)))
    return (f"config {node.name}{_kinds(node.kinds)} = ", hanging(parts))


def _tensor(node: ast.Tensor) -> Doc:
    clauses: list[Doc] = []
    if node.layout is not None:
        clauses.append(f'as "{node.layout}"')
    if node.condition is not None:
        clauses.append(("if ", phrase(node.condition)))
    return _clauses(f'tensor {node.name}{_kinds(node.kinds)} = "{node.key}"', clauses)


def _kinds(kinds: Sequence[str]) -> str:
    return f" on {', '.join(kinds)}" if kinds else ""


PHRASES: Mapping[type[ast.Node], Callable[[Any], Doc]] = {
    ast.Number: _number,
    ast.Text: _text,
    ast.Truth: _truth,
    ast.Name: _name,
    ast.Keyword: _keyword,
    ast.Call: _call,
    ast.Binary: _binary,
    ast.Unary: _unary,
    ast.Conditional: _conditional,
    ast.Slice: _slice,
    ast.Subscript: _subscript,
    ast.Regex: _regex,
    ast.Glob: _glob,
    ast.Role: _role,
    ast.Rows: _rows,
    ast.Either: _either,
    ast.Both: _both,
    ast.Complement: _complement,
    ast.Every: _every,
    ast.Indices: _indices,
    ast.Step: _step,
    ast.Scope: _scope,
    ast.Application: _application,
    ast.Rate: _rate,
    ast.Selection: _selection,
    ast.Match: _match,
    ast.Train: _train,
    ast.Param: _param,
    ast.Let: _let,
    ast.Derived: _derived,
    ast.Activate: _activate,
    ast.LiveThen: _live_then,
    ast.Use: _use,
    ast.Argument: _declared,
    ast.Draw: _draw,
    ast.Declaration: _declaration,
    ast.Equation: _equation,
    ast.Assign: _assign,
    ast.Field: _field,
    ast.Tensor: _tensor,
}
