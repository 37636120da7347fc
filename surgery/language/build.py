"""Rule names of the grammar to nodes of the syntax tree.

Nothing here raises; what a node means comes later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast, get_args

from surgery.errors import Span
from surgery.language import syntax as ast

Builder = Callable[[Span, Sequence[Any]], Any]


def _made(form: type[ast.Node]) -> Builder:
    """What a form is made of, in the order of its fields."""
    return lambda span, children: form(*children, span=span)


def _only(kind: type | tuple[type, ...], children: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(c for c in children if isinstance(c, kind))


def _spec(span: Span, children: Sequence[Any]) -> ast.Spec:
    return ast.Spec(tuple(children), span=span)


# ---------------------------------------------------------------------------- statements


class _Clause(tuple[str, Any]):
    """A clause of a match by its keyword, until the match takes it up."""

    __slots__ = ()


def _clause(name: str) -> Builder:
    def build(span: Span, children: Sequence[Any]) -> _Clause:
        del span
        return _Clause((name, children[-1]))

    return build


def _match(span: Span, children: Sequence[Any]) -> ast.Match:
    first, *then = _only(ast.Application, children)
    clauses = dict(_only(_Clause, children))
    tie, at = clauses.get("tie"), clauses.get("at", ())
    return ast.Match(_selection(span, children), first, tie, tuple(then), at, span=span)


def _at(span: Span, children: Sequence[Any]) -> _Clause:
    del span
    return _Clause(("at", tuple(children)))


def _listed(span: Span, children: Sequence[Any]) -> ast.Call:
    return ast.Call("", tuple(children), span=span)


def _train(span: Span, children: Sequence[Any]) -> ast.Train:
    (verb,) = _only(_Verb, children)
    tie = dict(_only(_Clause, children)).get("tie")
    selection, rates = _selection(span, children), _rates_in(children)
    return ast.Train(cast("ast.Verb", str(verb)), selection, tie, rates, span=span)


def _rates_in(children: Sequence[Any]) -> tuple[ast.Rate, ...]:
    return dict(_only(_Clause, children)).get("lr", ())


def _rates(span: Span, children: Sequence[Any]) -> _Clause:
    del span
    return _Clause(("lr", tuple(children)))


def _rate(span: Span, children: Sequence[Any]) -> ast.Rate:
    *name, value = children
    times = isinstance(value, _Times)
    expression = value[0] if times else value
    return ast.Rate(expression, times, "".join(map(str, name)), span=span)


class _Times(tuple[Any]):
    """How many times something is, until a rate takes it up."""

    __slots__ = ()


def _multiple(span: Span, children: Sequence[Any]) -> _Times:
    number = str(children[0]).removesuffix("x")
    inside = Span(span.source, span.start, span.end - 1)
    return _Times((ast.Number(number_of(number), span=inside),))


def _times(span: Span, children: Sequence[Any]) -> _Times:
    del span
    return _Times(children)


class _Verb(str):
    """What a statement begins with, until the statement takes it up."""

    __slots__ = ()


def _selection(span: Span, children: Sequence[Any]) -> ast.Selection:
    clauses = dict(_only(_Clause, children))
    (selector,) = _only(_SELECTORS, children)
    return ast.Selection(
        selector,
        clauses.get("in", ()),
        clauses.get("where"),
        clauses.get("except"),
        clauses.get("expect"),
        optional="optional" in children,
        span=span,
    )


_SELECTORS = get_args(ast.Selector)


def _in_scope(span: Span, children: Sequence[Any]) -> _Clause:
    del span
    return _Clause(("in", tuple(children)))


def _use(span: Span, children: Sequence[Any]) -> ast.Use:
    return ast.Use(str(children[0])[1:-1], span=span)


def _application(span: Span, children: Sequence[Any]) -> ast.Application:
    name, *rest = children
    given = [part for part in rest if not isinstance(part, _Clause)]
    keywords = _only(ast.Keyword, given[0]) if given else ()
    return ast.Application(str(name), keywords, _rates_in(rest), span=span)


def _param(span: Span, children: Sequence[Any]) -> ast.Param:
    name, kind, *default = children
    return ast.Param(str(name), kind, default[0] if default else None, span=span)


def _let(span: Span, children: Sequence[Any]) -> ast.Let:
    return ast.Let(str(children[0]), children[1], span=span)


def _adapter(span: Span, children: Sequence[Any]) -> ast.Adapter:
    return ast.Adapter(str(children[0]), _only((ast.Match, ast.Train), children), span=span)


def _derived(span: Span, children: Sequence[Any]) -> ast.Derived:
    name, expression, *way = children
    return ast.Derived(str(name), expression, way[0] if way else None, span=span)


def _first_text(span: Span, children: Sequence[Any]) -> str:
    del span
    return str(children[0])


# --------------------------------------------------------------------- selectors and scopes


def _regex(span: Span, children: Sequence[Any]) -> ast.Regex:
    return ast.Regex(str(children[0])[1:-1], span=span)


def _glob(span: Span, children: Sequence[Any]) -> ast.Glob:
    return ast.Glob(str(children[0]), span=span)


def _role_of(span: Span, children: Sequence[Any]) -> ast.Role:
    return ast.Role(str(children[0])[1:], span=span)


def _scope(span: Span, children: Sequence[Any]) -> ast.Scope:
    return ast.Scope(tuple(children), span=span)


def _step(span: Span, children: Sequence[Any]) -> ast.Step:
    container, *index = children
    return ast.Step(container, index[0] if index else None, span=span)


def _every(span: Span, children: Sequence[Any]) -> ast.Every:
    del children
    return ast.Every(span=span)


def _indices(span: Span, children: Sequence[Any]) -> ast.Indices:
    return ast.Indices(tuple(children), span=span)


def _slice(span: Span, children: Sequence[Any]) -> ast.Slice:
    parts: list[Any] = [None]
    for child in children:
        if isinstance(child, ast.Node):
            parts[-1] = child
        else:
            parts.append(None)
    start, stop, step = (*parts, None, None)[:3]
    return ast.Slice(start, stop, step, span=span)


# ------------------------------------------------------------------------------- methods


def _method(span: Span, children: Sequence[Any]) -> ast.Method:
    name, *rest, kind, body = children
    arguments = rest[0] if rest else ()
    return ast.Method(str(name), arguments, str(kind), body, span=span)


def _argument(span: Span, children: Sequence[Any]) -> ast.Argument:
    name, kind, *default = children
    return ast.Argument(str(name), kind, default[0] if default else None, span=span)


def _tuple(span: Span, children: Sequence[Any]) -> tuple[Any, ...]:
    del span
    return tuple(children)


def _declaration(span: Span, children: Sequence[Any]) -> ast.Declaration:
    role, name, shape, beginning, *rate = children
    roles = ("train" in role, "shared" in role)
    return ast.Declaration(name.id, shape, beginning, *roles, *rate, span=span)


def _draw(span: Span, children: Sequence[Any]) -> ast.Draw:
    return ast.Draw(children[0], span=span)


def _equation(span: Span, children: Sequence[Any]) -> ast.Equation:
    return ast.Equation(children[0].id, children[1], span=span)


def _assign(span: Span, children: Sequence[Any]) -> ast.Assign:
    return ast.Assign(children[0].id, children[1], span=span)


def _branch(span: Span, children: Sequence[Any]) -> ast.Branch:
    condition, then, *other = children
    return ast.Branch(condition, then, other[0] if other else (), span=span)


def _otherwise(span: Span, children: Sequence[Any]) -> tuple[Any, ...]:
    del span
    (body,) = children
    return (body,) if isinstance(body, ast.Branch) else body


# ------------------------------------------------------------------------------- formats


def _format(span: Span, children: Sequence[Any]) -> ast.Format:
    name, method, *rest = children
    return ast.Format(
        str(name), str(method), _only(ast.Field, rest), _only(ast.Tensor, rest), span=span
    )


def _field(span: Span, children: Sequence[Any]) -> ast.Field:
    name, *rest = children
    kinds = dict(_only(_Clause, rest)).get("on", ())
    value, *default = (c for c in rest if not isinstance(c, _Clause))
    return ast.Field(str(name), value, default[0] if default else None, kinds, span=span)


def _tensor(span: Span, children: Sequence[Any]) -> ast.Tensor:
    name, *rest = children
    clauses = dict(_only(_Clause, rest))
    (key,) = (c for c in rest if not isinstance(c, _Clause))
    return ast.Tensor(
        str(name),
        clauses.get("on", ()),
        str(key)[1:-1],
        clauses.get("as"),
        clauses.get("if"),
        span=span,
    )


def _kinds(span: Span, children: Sequence[Any]) -> _Clause:
    del span
    return _Clause(("on", tuple(map(str, children))))


def _layout(span: Span, children: Sequence[Any]) -> _Clause:
    del span
    return _Clause(("as", str(children[0])[1:-1]))


# ---------------------------------------------------------------------------- expressions


def _number(span: Span, children: Sequence[Any]) -> ast.Number:
    return ast.Number(number_of(str(children[0])), span=span)


def number_of(text: str) -> int | float:
    """The value of a number as it is written; what is too long for an int is infinite."""
    whole = text.isascii() and text.isdigit() and len(text) < 4000
    return int(text) if whole else float(text)


def _text(span: Span, children: Sequence[Any]) -> ast.Text:
    return ast.Text(str(children[0])[1:-1], span=span)


def _truth(span: Span, children: Sequence[Any]) -> ast.Truth:
    return ast.Truth(str(children[0]) == "true", span=span)


def _name(span: Span, children: Sequence[Any]) -> ast.Name:
    return ast.Name(str(children[0]), span=span)


def _call(span: Span, children: Sequence[Any]) -> ast.Call:
    name, *arguments = children
    given = arguments[0] if arguments else ()
    keywords = _only(ast.Keyword, given)
    positional = tuple(a for a in given if not isinstance(a, ast.Keyword))
    return ast.Call(str(name), positional, keywords, span=span)


def _keyword(span: Span, children: Sequence[Any]) -> ast.Keyword:
    return ast.Keyword(children[0].id, children[1], span=span)


def _conditional(span: Span, children: Sequence[Any]) -> ast.Conditional:
    then, condition, other = children
    return ast.Conditional(then, condition, other, span=span)


def _binary(span: Span, children: Sequence[Any]) -> ast.Binary:
    left, operator, right = children
    return ast.Binary(_operator(operator), left, right, span=span)


def _operator(token: str) -> ast.BinaryOperator:
    return cast("ast.BinaryOperator", str(token))


def _logical(operator: str) -> Builder:
    def build(span: Span, children: Sequence[Any]) -> ast.Binary:
        left, right = children
        return ast.Binary(_operator(operator), left, right, span=span)

    return build


def _negative(span: Span, children: Sequence[Any]) -> Any:
    sign, operand = children
    return operand if str(sign) == "+" else ast.Unary("-", operand, span=span)


def _not(span: Span, children: Sequence[Any]) -> ast.Unary:
    return ast.Unary("not", children[0], span=span)


def _transposed(span: Span, children: Sequence[Any]) -> ast.Call:
    return ast.Call("transpose", (children[0],), span=span)


def _subscript(span: Span, children: Sequence[Any]) -> ast.Subscript:
    value, *items = children
    return ast.Subscript(value, tuple(items), span=span)


BUILDERS: Mapping[str, Builder] = {
    "start": _spec,
    "match": _match,
    "train": _train,
    "verb": lambda span, children: _Verb(children[0]),
    "in_scope": _in_scope,
    "where": _clause("where"),
    "except": _clause("except"),
    "expect": _clause("expect"),
    "tie": lambda span, children: _Clause(("tie", str(children[0]))),
    "at": _at,
    "place": _call,
    "listed": _listed,
    "application": _application,
    "rates": _rates,
    "rate": _rate,
    "rate_of": _rate,
    "multiple": _multiple,
    "times": _times,
    "param": _param,
    "let": _let,
    "adapter": _adapter,
    "derived": _derived,
    "way": _call,
    "activate": _made(ast.Activate),
    "live_then": _made(ast.LiveThen),
    "type": _first_text,
    "regex": _regex,
    "glob": _glob,
    "role_of": _role_of,
    "rows_of": _made(ast.Rows),
    "either": _made(ast.Either),
    "both": _made(ast.Both),
    "without": _made(ast.Complement),
    "use": _use,
    "scope": _scope,
    "step": _step,
    "every": _every,
    "slice": _slice,
    "indices": _indices,
    "method": _method,
    "signature": _tuple,
    "argument": _argument,
    "body": _tuple,
    "declaration": _declaration,
    "role": lambda span, children: tuple(map(str, children)),
    "shape": _tuple,
    "draw": _draw,
    "equation": _equation,
    "assign": _assign,
    "branch": _branch,
    "otherwise": _otherwise,
    "format": _format,
    "field": _field,
    "tensor": _tensor,
    "kinds": _kinds,
    "layout": _layout,
    "condition": _clause("if"),
    "conditional": _conditional,
    "or_": _logical("or"),
    "and_": _logical("and"),
    "not_": _not,
    "compare": _binary,
    "binary": _binary,
    "negative": _negative,
    "transposed": _transposed,
    "subscript": _subscript,
    "number": _number,
    "text": _text,
    "truth": _truth,
    "call": _call,
    "arguments": _tuple,
    "arguments_of_method": _tuple,
    "keyword": _keyword,
    "name": _name,
}
