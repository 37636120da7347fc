"""From a method's syntax to its equations, with every name resolved and every shape checked.

The same walk checks a definition, with its arguments as symbols, and instantiates it at a site,
with its arguments as values; `in`, `out` and `channels` stay symbols in both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from keyword import iskeyword
from typing import Any, assert_never

from surgery.algebra import scalars
from surgery.algebra.asked import Asking
from surgery.algebra.axes import Size, evaluate, names_in
from surgery.algebra.bases import COMMON
from surgery.algebra.beginnings import AFTER, DISTRIBUTIONS, Distribution
from surgery.algebra.declared import (
    check_draw,
    check_trained,
    check_whole,
    of_all_sites,
    positive,
)
from surgery.algebra.equations import ENDING, Equations, Parameter, Random, reserved
from surgery.algebra.expr import (
    BIAS,
    WEIGHT,
    Expr,
    Shape,
    depends_on,
    parameter,
    walk,
)
from surgery.algebra.kinds import SIZES, kind_named
from surgery.algebra.mentions import decisions, names, nodes
from surgery.algebra.observed import LEAVES, is_lasting
from surgery.algebra.ops import OPS
from surgery.algebra.rates import Rate, rate
from surgery.algebra.rules import substitute
from surgery.algebra.scalars import Scalars, unknown_name
from surgery.algebra.shapes import show
from surgery.algebra.sums import difference
from surgery.errors import Report, Span, SurgeryError, refuse
from surgery.language import syntax as ast


class Elaborator(Asking):
    """Runs a method's body."""

    def __init__(
        self,
        arguments: Mapping[str, object],
        decide: scalars.Decide = scalars.undecided,
        sizes: Mapping[str, int] | None = None,
        facts: Mapping[str, object] | None = None,
    ) -> None:
        """Run with these arguments; `sizes` and `facts` are the site's, where they are known."""
        super().__init__(arguments, decide)
        self.scope |= facts or {}
        self.sizes = sizes or {}
        self.parameters: dict[str, Parameter] = {}
        self.targets: dict[str, Expr] = {}
        self.changes: dict[str, Size] = {}
        self.arguments: frozenset[str] = frozenset(arguments)
        self.start: Expr = WEIGHT
        self.taken: frozenset[str] = frozenset()
        self.reserved: frozenset[str] = frozenset()
        self.report = Report()
        self.failed: set[str] = set()

    def run(self, method: ast.Method) -> Equations:
        """The equations of a method. Raises DefinitionError."""
        self.taken = frozenset(_declared(method))
        self.at(kind_named(method.kind))
        self.reserved = reserved(self.kind)
        self._items(method.body)
        self.report.stop()
        if not self.targets:
            refuse(
                "E120",
                f"`{method.name}` has no equation",
                method.span,
                hint=f"say what becomes of the site: {self.kind.said}",
            )
        targets = self.targets
        if self.start is not WEIGHT:  # equations see W after the last change of it
            targets = {t: self._begun(e) for t, e in {"W": WEIGHT, **targets}.items()}
        fields: dict[str, Any] = {self.kind.targets[t]: e for t, e in targets.items()}
        fields |= {"start": self.start, "changes": (*self.changes.items(),)}
        fields |= {"shares": tuple(self.shares), "totals": tuple(self.totals)}
        fields |= {"endings": tuple(self.endings), "kind": self.kind}
        return Equations((*self.parameters.values(),), **fields)

    def holds(self, condition: ast.Expression) -> bool:
        """Whether a condition holds; at a site, sizes in it are numbers."""
        if not self.sizes:
            return super().holds(condition)
        return Scalars(_Numeric(self.scope, self.sizes)).holds(condition)

    # ------------------------------------------------------------------------------ items

    def _items(self, items: Iterable[ast.Item]) -> None:
        """Every item, though one before it is wrong; but for those that read what it defines."""
        for item in items:
            try:
                if self._can_be_read(item):
                    self._item(item)
                    continue
            except SurgeryError as error:
                self.report.extend(error.diagnostics)
            defined = (n for n in nodes(item) if isinstance(n, ast.Let | ast.Declaration))
            self.failed |= {n.name for n in defined} - self.scope.keys()

    def _can_be_read(self, item: ast.Item) -> bool:
        """Whether all that it reads first was defined, or is nowhere."""
        read = item.condition if isinstance(item, ast.Branch) else item
        return not self.failed or self.failed.isdisjoint(names(read))

    def _item(self, item: ast.Item) -> None:
        match item:
            case ast.Let():
                self._define(item.name, self(item.value), item.span)
            case ast.Declaration():
                self._declare(item)
            case ast.Equation():
                self._equation(item)
            case ast.Assign():
                self._assign(item)
            case ast.Branch():
                self._items(item.then if self.holds(item.condition) else item.other)
            case _:
                assert_never(item)

    def _define(self, name: str, value: object, span: Span) -> None:
        if name in self.reserved:
            refuse("E106", f"`{name}` is reserved in an equation", span, hint="use another name")
        if name in self.scope:
            refuse("E107", f"`{name}` is defined twice", span, hint="use another name")
        self.scope[name] = value

    def _equation(self, item: ast.Equation) -> None:
        if item.target in self.arguments:
            self._change(item)
            return
        if item.target not in self.kind.targets:
            refuse(
                "E101",
                f"`{item.target}'` is nothing that an equation can give",
                item.span.within(0, len(item.target) + 1),
                hint=f"an equation gives {self.kind.said}",
            )
        value = self.tensor(item.value)
        shape = self.kind.variables[item.target].shape
        if item.target in self.targets:
            refuse("E107", f"{item.target}' is given twice", item.span, hint="leave one out")
        if item.target == "x" and depends_on(value, self.kind.output):
            refuse(
                "E125",
                "x' cannot be made of y, which is made of x'",
                item.value.span,
                hint="say it of the output instead: `y' = …`",
            )
        if value.shape != shape:
            refuse(
                "E108",
                f"{item.target}' must have shape {show(shape)}",
                item.value.span,
                label=f"this is {show(value.shape)}",
            )
        self._check_running(value, item.value.span)
        self.targets[item.target] = value

    def _change(self, item: ast.Equation) -> None:
        """`r' = …`: what an argument becomes."""
        match item.value:
            case ast.Call(function=name, arguments=(), keywords=()) if name == ENDING:
                given = self.scope[item.target]
                if not isinstance(given, str) and getattr(given, "type", None) != "text":
                    hint = f'declare it so: `{item.target}: text = ""`'
                    refuse("E103", "ending() is a text", item.value.span, hint=hint)
                self.endings.append(item.target)
            case _:
                self.changes[item.target] = self.changed(item)

    def _check_running(self, value: Expr, place: Span) -> None:
        """Refuse what is no work for a forward."""
        for expr in walk(value):
            if expr.op in LEAVES or (expr.op in OPS and OPS[expr.op].begins):
                refuse(
                    "E136",
                    f"{expr.op}() stands in a beginning, which is computed once",
                    place,
                    hint="begin a parameter with it: `train A[r, in] = …`",
                )

    # ------------------------------------------------------------------- what W is at the start

    def _assign(self, item: ast.Assign) -> None:
        """`W := W - D`: W less the beginnings of what D is made of, which are kept for that."""
        if item.target != "W" or "W" not in self.kind.targets:
            refuse(
                "E101",
                f"`{item.target}` is nothing that a method can change before it begins",
                item.span.within(0, len(item.target)),
                hint="there is `W := W - …`; a local name is given by `let`",
            )
        value = self.tensor(item.value)
        if value.shape != WEIGHT.shape:
            label = f"this is {show(value.shape)}"
            refuse("E108", f"W must have shape {show(WEIGHT.shape)}", item.value.span, label=label)
        self._check_change(difference(value, WEIGHT), item.value.span)
        self.start = substitute(value, {**self._kept(value), WEIGHT: self.start})

    def _check_change(self, change: Expr | None, place: Span) -> None:
        """Refuse what is no difference of parameters."""
        if change is None:
            return
        some = tuple(walk(change))
        self._check_running(change, place)
        if any(e in (WEIGHT, BIAS) for e in some):
            refuse(
                "E137",
                "W can only begin as W and a difference that is made of parameters",
                place,
                hint="declare its factors, as in `train B[out, r] = qr_q(W, r)`, and write "
                "`W := W - B @ A`",
            )
        if any(e.op == "drop" for e in some):
            refuse("E114", "what W begins as is not random by drop(p)", place, hint="leave it out")

    def _kept(self, value: Expr) -> dict[Expr, Expr]:
        """For each trained parameter in an expression the frozen one that begins as it does."""
        read = {e.text("name") for e in walk(value) if e.op == "parameter"}
        trained = [p for p in self.parameters.values() if p.name in read and p.trained]
        return {parameter(p.name, p.shape): self._keeping(p) for p in trained}

    def _keeping(self, p: Parameter) -> Expr:
        if p.shared:
            refuse(
                "E123",
                f"`{p.name}` is shared by all sites and trained, and no beginning of it is kept",
                p.span,
                hint="declare it without `shared`, or without `train`",
            )
        known = next((q for q in self.parameters.values() if q.of == p.name), None)
        if known is None:
            known = self._keep(p)
        return parameter(known.name, known.shape)

    def _keep(self, p: Parameter) -> Parameter:
        name = f"{p.name}_0"
        while name in self.taken or name in self.parameters:
            name += "_"
        beginning = p.beginning
        if isinstance(beginning, Expr):  # of what those began as that it is made of
            beginning = substitute(beginning, self._kept(beginning))
        kept = replace(p, name=name, beginning=beginning, trained=False, of=p.name, rate=None)
        self.parameters[name] = replace(kept, again=self._is_told(beginning))
        return self.parameters[name]

    def _is_told(self, beginning: Random | Expr) -> bool:
        """Whether a kept beginning can be made again, by its seed or of the base."""
        if isinstance(beginning, Random):
            return beginning.seed is not None
        if not is_lasting(beginning):
            return False
        read = (self.parameters[e.text("name")] for e in walk(beginning) if e.op == "parameter")
        return all(p.again or not p.of for p in read)

    def _is_made_again(self, p: Parameter) -> bool:
        """Whether it is always what the base and what has a seed make it."""
        if p.trained or p.shared or not isinstance(p.beginning, Expr):
            return False
        if not is_lasting(p.beginning):
            return False
        read = (self.parameters[e.text("name")] for e in walk(p.beginning) if e.op == "parameter")
        return all(q.redrawn or (q.shared and not q.trained) for q in read)

    def _begun(self, value: Expr) -> Expr:
        """An expression over W, of W as it is at this point."""
        return value if self.start is WEIGHT else substitute(value, {WEIGHT: self.start})

    # ------------------------------------------------------------------------ parameters

    def _declare(self, item: ast.Declaration) -> None:
        shape = tuple(self.size(s) for s in item.shape)
        for length, place in zip(shape, item.shape, strict=True):
            positive(length, place.span)
        if iskeyword(item.name):
            hint = "use another name"
            refuse(
                "E106",
                f"`{item.name}` is a word of Python, which a site's code is",
                item.span,
                hint=hint,
            )
        beginning = self._beginning(item, shape)
        self._define(item.name, parameter(item.name, shape), item.span)
        p = Parameter(item.name, shape, beginning, item.trained, item.shared, item.span)
        p = replace(p, rate=self._rate(item))
        if p.whole:
            check_whole(item, p)
        self.parameters[item.name] = replace(p, again=self._is_made_again(p))

    def _rate(self, item: ast.Declaration) -> Rate | None:
        """What a parameter learns at; None where nothing says so, or what it says is a symbol."""
        if item.rate is None:
            return None
        check_trained(item)
        value = _numeric(self.size(item.rate.value), self.sizes)
        return rate(value, item.rate.times, item.rate.value.span)

    def _beginning(self, item: ast.Declaration, shape: Shape) -> Random | Expr:
        if isinstance(item.beginning, ast.Draw):
            return self._random(item.beginning.distribution, item.shared)
        value = self.tensor(item.beginning)
        if not (value.is_scalar or value.shape == shape):
            refuse(
                "E108",
                f"`{item.name}` must begin with a number or {show(shape)}",
                item.beginning.span,
                label=f"this is {show(value.shape)}",
            )
        self._check_beginning(item, value)
        return self._begun(value)

    def _check_beginning(self, item: ast.Declaration, value: Expr) -> None:
        place = item.beginning.span
        if item.shared and not of_all_sites(self._begun(value)):
            refuse(
                "E123",
                f"`{item.name}` is shared by all sites, and cannot begin with what is one site's",
                place,
                hint=f"begin it with a number, a draw or {COMMON}(W, …), or declare it without "
                "`shared`",
            )
        for expr in walk(value):
            if expr.op == "drop":
                refuse("E114", "a beginning is not random by drop(p)", place, hint="use `~ …`")
            read = self.parameters[expr.text("name")] if expr.op == "parameter" else None
            if read is not None and read.shared and read.trained:
                refuse(
                    "E123",
                    "a beginning cannot read what is shared by all sites and trained",
                    place,
                    hint="begin with a number, a draw, what is made of W, or `shared frozen`",
                )

    def _random(self, call: ast.Call, shared: bool) -> Random:
        row = DISTRIBUTIONS.get(call.function)
        if row is None:
            unknown_name(call.function, call.span, DISTRIBUTIONS, noun="distribution")
        check_draw(call, row)
        values = {k.name: self._draw_argument(k, row, shared) for k in call.keywords}
        after = values.pop(AFTER, None)
        known = {n: v for n, v in values.items() if isinstance(v, int | float)}
        seed = known.pop("seed", None)
        objection = row.objection({**row.arguments, **known})
        if objection:
            refuse("E111", f"{call.function}() cannot be drawn", call.span, label=objection)
        return Random(
            call.function,
            tuple(sorted(known.items())),
            None if seed is None else int(seed),
            row.whole,
            after if isinstance(after, Size) else None,
        )

    def _draw_argument(
        self, keyword: ast.Keyword, row: Distribution, shared: bool
    ) -> int | float | Size | None:
        """The value of an argument; None while it is a symbol, which `after` may stay."""
        name, place = keyword.name, keyword.value.span
        if name not in row.named:
            unknown_name(name, keyword.span, row.named, "argument")
        value = self.size(keyword.value)
        if name == AFTER:
            return value
        if shared and not row.told and names_in(value) & SIZES:
            refuse(
                "E123",
                "what all sites share cannot depend on the sizes of one",
                place,
                hint="use numbers and arguments, or declare it without `shared`",
            )
        value = _numeric(value, self.sizes)
        if isinstance(value, Size) and value.number is None:
            return None
        wanted = "int" if name == "seed" else "float"
        found = scalars.typed(value, wanted, name, place)
        assert isinstance(found, int | float)
        return found


def _declared(method: ast.Method) -> Iterator[str]:
    return (
        n.name for n in nodes(method) if isinstance(n, ast.Let | ast.Declaration | ast.Argument)
    )


class _Numeric(Mapping[str, object]):
    """Names, with the sizes in their values as numbers."""

    def __init__(self, names: Mapping[str, object], sizes: Mapping[str, int]) -> None:
        self.names = names
        self.sizes = sizes

    def __getitem__(self, name: str) -> object:
        return _numeric(self.names[name], self.sizes)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _numeric(value: object, sizes: Mapping[str, int]) -> object:
    if isinstance(value, Size) and names_in(value) <= sizes.keys():
        return evaluate(value, sizes)
    return value


# --------------------------------------------------------------------- signatures and definitions


@lru_cache(maxsize=512)
def instantiate(
    method: ast.Method,
    arguments: tuple[tuple[str, object], ...],
    sizes: tuple[tuple[str, int], ...] = (),
    facts: tuple[tuple[str, object], ...] = (),
) -> Equations:
    """A method with its arguments given, at a site of these sizes. Raises DefinitionError.

    The sizes decide conditions such as `in % 8 == 0`, and are numbers in the arguments of a draw;
    in shapes they stay symbols. facts: those of `equations.FACTS`, wherever there are sizes.
    """
    return Elaborator(dict(arguments), sizes=dict(sizes), facts=dict(facts)).run(method)


@lru_cache(maxsize=512)
def asks_sizes(method: ast.Method) -> bool:
    """Whether what a method says may depend on the site's facts, or sizes other than in a shape."""
    given = {a.name for a in method.arguments} | scalars.CONSTANTS.keys()
    return any(not names(e) <= given for e in decisions(method))
