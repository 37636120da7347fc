"""Rewriting: identities that always hold and always help, and alternatives to be chosen by cost.

A rule takes an expression and returns a replacement or None; its algebra stands at the end of its
line. `make` is the one way to build an expression: it checks the shape, then simplifies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache

from surgery.algebra.axes import Size, size
from surgery.algebra.expr import Attribute, Expr, Shape, node, number, zeros
from surgery.algebra.ops import OPS

Rule = Callable[[Expr], "Expr | None"]


def make(op: str, *args: Expr, **attrs: Attribute) -> Expr:
    """The simplified expression `op(args; attrs)`. Raises `Mismatch` if the shapes do not fit."""
    shape = OPS[op].shape(args, attrs)
    return _simplified(node(op, args, shape, tuple(attrs.items())))


def rebuild(expr: Expr, args: tuple[Expr, ...]) -> Expr:
    """The same operator on other arguments, simplified anew."""
    if args == expr.args:
        return expr
    return make(expr.op, *args, **dict(expr.attrs))


def substitute(root: Expr, replacements: dict[Expr, Expr]) -> Expr:
    """`root` with leaves or whole subexpressions replaced."""
    memo = dict(replacements)

    def visit(expr: Expr) -> Expr:
        if expr not in memo:
            memo[expr] = rebuild(expr, tuple(map(visit, expr.args)))
        return memo[expr]

    return visit(root)


@lru_cache(maxsize=8192)
def _simplified(expr: Expr) -> Expr:
    # Remembered, or a rule that goes down two sides would go down shared parts twice at each level.
    for rule in _IDENTITIES.get(expr.op, ()):
        replacement = rule(expr)
        if replacement is None:
            continue
        # Zeros have a shape of their own, and how many tokens there are is not known here.
        if not (replacement.op == "zeros" and expr.is_activation):
            return replacement
    return expr


def is_zero(expr: Expr) -> bool:
    """Whether the expression is identically zero."""
    return expr.op == "zeros" or (expr.op == "number" and not constant(expr).terms)


def constant(expr: Expr) -> Size:
    """The value of a number."""
    value = expr.attr("value")
    assert isinstance(value, Size)
    return value


def _is_one(expr: Expr) -> bool:
    return expr.op == "number" and constant(expr) == size(1)


def _all_numbers(exprs: Iterable[Expr]) -> bool:
    return all(e.op == "number" for e in exprs)


# ------------------------------------------------------------------------------ identities


def _add(e: Expr) -> Expr | None:
    a, b = e.args
    if is_zero(a):
        return b if b.shape == e.shape else None  # 0 + b = b
    if is_zero(b):
        return a if a.shape == e.shape else None  # a + 0 = a
    if _all_numbers(e.args):
        return number(constant(a) + constant(b))
    if b.op == "neg":
        return make("sub", a, b.args[0])  # a + -b = a - b
    if a.op == "neg":
        return make("sub", b, a.args[0])  # -a + b = b - a
    if a.op == "sub" and a.args[1] is b and a.args[0].shape == e.shape:
        return a.args[0]  # (a - b) + b = a
    return None


def _sub(e: Expr) -> Expr | None:
    a, b = e.args
    if a is b:
        return _zero_like(e)  # a - a = 0
    if is_zero(b):
        return a if a.shape == e.shape else None  # a - 0 = a
    if is_zero(a):
        return make("neg", b) if b.shape == e.shape else None  # 0 - b = -b
    if _all_numbers(e.args):
        return number(constant(a) - constant(b))
    if b.op == "neg":
        return make("add", a, b.args[0])  # a - -b = a + b
    return _without(a, b, e.shape)


def _without(a: Expr, b: Expr, shape: Shape) -> Expr | None:
    if a.op != "add" or b not in a.args:
        return None
    rest = a.args[1 - a.args.index(b)]
    return rest if rest.shape == shape else None  # (a + b) - b = a


def _neg(e: Expr) -> Expr | None:
    a = e.args[0]
    match a.op:
        case "zeros":
            return a  # -0 = 0
        case "neg":
            return a.args[0]  # --a = a
        case "number":
            return number(-constant(a))
        case "sub":
            return make("sub", a.args[1], a.args[0])  # -(a - b) = b - a
        case _:
            return None


def _mul(e: Expr) -> Expr | None:
    a, b = e.args
    if is_zero(a) or is_zero(b):
        return _zero_like(e)  # 0 * b = 0
    if _is_one(a):
        return b  # 1 * b = b
    if _all_numbers(e.args):
        return number(constant(a) * constant(b))
    if a.op == "neg":
        return make("neg", make("mul", a.args[0], b))  # -a * b = -(a * b)
    if b.op == "neg":
        return make("neg", make("mul", a, b.args[0]))  # a * -b = -(a * b)
    return _mul_number(a, b)


def _mul_number(a: Expr, b: Expr) -> Expr | None:
    if b.op == "number":
        return make("mul", b, a)  # a * 2 = 2 * a
    if a.op == "number" and b.op == "mul" and b.args[0].op == "number":
        return make("mul", number(constant(a) * constant(b.args[0])), b.args[1])  # 2 (3 a) = 6 a
    return None


def _div(e: Expr) -> Expr | None:
    a, b = e.args
    if b.op == "number" and constant(b).number is not None:
        return make("mul", number(1 / constant(b)), a)  # a / 2 = 1/2 * a
    if is_zero(a):
        return _zero_like(e)  # 0 / b = 0
    if _all_numbers(e.args):
        return number(constant(a) / constant(b))
    return None


def _matmul(e: Expr) -> Expr | None:
    a, b = e.args
    if is_zero(a) or is_zero(b):
        return zeros(e.shape)  # 0 @ b = 0
    if a.op == "eye":
        return b  # I @ b = b
    if b.op == "eye":
        return a  # a @ I = a
    if a.op == "neg":
        return make("neg", make("matmul", a.args[0], b))  # -a @ b = -(a @ b)
    if b.op == "neg":
        return make("neg", make("matmul", a, b.args[0]))  # a @ -b = -(a @ b)
    return None


def _scale_matrix(e: Expr) -> Expr | None:
    v, m = e.args
    if is_zero(m) or is_zero(v):
        return zeros(e.shape)  # 0 * m = 0
    if m.op == "neg":
        return make("neg", make(e.op, v, m.args[0]))  # v * -m = -(v * m)
    return None


def _rotate_half(e: Expr) -> Expr | None:
    a = e.args[0]
    if is_zero(a):
        return zeros(e.shape)  # 0, turned, is 0
    if a.op == "neg":
        return make(
            "neg", make(e.op, a.args[0], size=e.attr("size"))
        )  # -a, turned, is -(a, turned)
    return None


def _transpose(e: Expr) -> Expr | None:
    rule = _TRANSPOSES.get(e.args[0].op)
    return None if rule is None else rule(e.args[0])


def _transposed_product(a: Expr) -> Expr | None:
    if len(a.args[1].shape) < 2:
        return None
    return make("matmul", make("transpose", a.args[1]), make("transpose", a.args[0]))


def _transposed_cayley(a: Expr) -> Expr | None:
    return make("cayley", make("neg", a.args[0])) if _is_skew(a.args[0]) else None


def _transposed_reflection(a: Expr) -> Expr | None:
    return a if len(a.args[0].shape) == 1 else None


def _itself(a: Expr) -> Expr:
    return a


# What aᵀ is, by the operator of a.
_TRANSPOSES: dict[str, Rule] = {
    "transpose": lambda a: a.args[0],  # aᵀᵀ = a
    "diag": _itself,  # symmetric
    "eye": _itself,  # symmetric
    "drop": _itself,  # symmetric
    "householder": _transposed_reflection,  # symmetric, if it is one alone
    "zeros": lambda a: zeros((*a.shape[:-2], a.shape[-1], a.shape[-2])),  # 0ᵀ = 0
    "skew": lambda a: make("neg", a),  # Qᵀ = -Q
    "cayley": _transposed_cayley,  # C(Q)ᵀ = C(-Q), if Qᵀ = -Q
    "neg": lambda a: make("neg", make("transpose", a.args[0])),  # (-a)ᵀ = -(aᵀ)
    "blockdiag": lambda a: make("blockdiag", make("transpose", a.args[0])),  # blockwise
    "neumann": lambda a: make(
        "neumann", make("transpose", a.args[0]), terms=a.attr("terms")
    ),  # power by power
    "kron": lambda a: make("kron", *(make("transpose", x) for x in a.args)),  # aᵀ ⊗ bᵀ
    "matmul": _transposed_product,  # (a @ b)ᵀ = bᵀ @ aᵀ
    "scale_rows": lambda a: make("scale_cols", a.args[0], make("transpose", a.args[1])),
    "scale_cols": lambda a: make("scale_rows", a.args[0], make("transpose", a.args[1])),
}


def _inverse(e: Expr) -> Expr | None:
    rule = _INVERSES.get(e.args[0].op)
    return None if rule is None else rule(e.args[0])


def _inverse_product(a: Expr) -> Expr | None:
    if not all(map(_square, a.args)):
        return None
    return make("matmul", make("inverse", a.args[1]), make("inverse", a.args[0]))


def _inverse_blocks(a: Expr) -> Expr | None:
    if not all(map(_square, a.args)):
        return None
    return make(a.op, *(make("inverse", x) for x in a.args))


def _inverse_butterfly(a: Expr) -> Expr:
    # (F_0 F_1 ...)⁻¹ = (F_0⁻ᵀ F_1⁻ᵀ ...)ᵀ
    turned = make("transpose", make("inverse", a.args[0]))
    return make("transpose", make("butterfly", turned))


# What a⁻¹ is, by the operator of a.
_INVERSES: dict[str, Rule] = {
    "inverse": lambda a: a.args[0],  # (a⁻¹)⁻¹ = a
    "eye": _itself,  # its own inverse
    "householder": lambda a: make("transpose", a),  # orthogonal
    "butterfly": _inverse_butterfly,  # blockwise, the factors in turn
    "drop": lambda a: make("eye", size=a.shape[0]),  # its value is I
    "cayley": lambda a: make("cayley", make("neg", a.args[0])),  # C(Q)⁻¹ = C(-Q)
    "diag": lambda a: make("diag", make("div", number(1), a.args[0])),  # elementwise
    "transpose": lambda a: make("transpose", make("inverse", a.args[0])),  # (aᵀ)⁻¹ = (a⁻¹)ᵀ
    "blockdiag": _inverse_blocks,  # blockwise
    "kron": _inverse_blocks,  # (a ⊗ b)⁻¹ = a⁻¹ ⊗ b⁻¹
    "matmul": _inverse_product,  # (a @ b)⁻¹ = b⁻¹ @ a⁻¹
}


def _drop(e: Expr) -> Expr | None:
    if e.attr("p") != size(0):
        return None
    return make("eye", size=e.shape[0])  # nothing is dropped


def _constant_gradient(e: Expr) -> Expr | None:
    return e.args[0] if e.args[0].op in ("number", "zeros") else None  # it has no gradient


def _is_skew(expr: Expr) -> bool:
    match expr.op:
        case "skew":
            return True
        case "neg":
            return _is_skew(expr.args[0])
        case "mul":
            return expr.args[0].is_scalar and _is_skew(expr.args[1])
        case "sub":
            return len(expr.shape) > 1 and make("transpose", expr.args[0]) is expr.args[1]
        case _:
            return False


def _square(expr: Expr) -> bool:
    return len(expr.shape) > 1 and expr.shape[-1] == expr.shape[-2]


def _zero_like(expr: Expr) -> Expr:
    return zeros(expr.shape) if expr.shape else number(0)


_IDENTITIES: dict[str, tuple[Rule, ...]] = {
    "add": (_add,),
    "sub": (_sub,),
    "neg": (_neg,),
    "mul": (_mul,),
    "div": (_div,),
    "matmul": (_matmul,),
    "scale_rows": (_scale_matrix,),
    "scale_cols": (_scale_matrix,),
    "scale": (_scale_matrix,),
    "transpose": (_transpose,),
    "rotate_half": (_rotate_half,),
    "inverse": (_inverse,),
    "drop": (_drop,),
    "stop_gradient": (_constant_gradient,),
}


# ---------------------------------------------------------------------------- alternatives


def alternatives(expr: Expr) -> tuple[Expr, ...]:
    """Other expressions of the same value, some of which may cost less."""
    return tuple(e for rule in _ALTERNATIVES.get(expr.op, ()) if (e := rule(expr)) is not None)


def _scalar_into_right(e: Expr) -> Expr | None:
    s, m = e.args
    if not s.is_scalar or m.op != "matmul":
        return None
    return make("matmul", m.args[0], make("mul", s, m.args[1]))  # s (a @ b) = a @ (s b)


def _scalar_into_left(e: Expr) -> Expr | None:
    s, m = e.args
    if not s.is_scalar or m.op != "matmul":
        return None
    return make("matmul", make("mul", s, m.args[0]), m.args[1])  # s (a @ b) = (s a) @ b


def _scalar_into_tile(e: Expr) -> Expr | None:
    s, m = e.args
    if not s.is_scalar or m.op != "tile":
        return None
    return make("tile", make("mul", s, m.args[0]), **dict(m.attrs))  # s tile(a) = tile(s a)


def _right_first(e: Expr) -> Expr | None:
    a, c = e.args
    if a.op != "matmul" or len(a.shape) != 2:
        return None
    return make("matmul", a.args[0], make("matmul", a.args[1], c))  # (a @ b) @ c = a @ (b @ c)


def _left_first(e: Expr) -> Expr | None:
    a, c = e.args
    if c.op != "matmul" or len(c.args[0].shape) != 2 or len(c.args[1].shape) != 2:
        return None
    return make("matmul", make("matmul", a, c.args[0]), c.args[1])  # a @ (b @ c) = (a @ b) @ c


def _rows_into_left(e: Expr) -> Expr | None:
    v, m = e.args
    if m.op != "matmul":
        return None
    return make("matmul", make("scale_rows", v, m.args[0]), m.args[1])  # v (a @ b) = (v a) @ b


def _columns_into_right(e: Expr) -> Expr | None:
    v, m = e.args
    if m.op != "matmul":
        return None
    return make("matmul", m.args[0], make("scale_cols", v, m.args[1]))  # (a @ b) v = a @ (b v)


def _factor_right(e: Expr) -> Expr | None:
    a, b = e.args
    if not _products(a, b) or a.args[1] is not b.args[1]:
        return None
    return make(
        "matmul", make(e.op, a.args[0], b.args[0]), a.args[1]
    )  # a @ c + b @ c = (a + b) @ c


def _factor_left(e: Expr) -> Expr | None:
    a, b = e.args
    if not _products(a, b) or a.args[0] is not b.args[0]:
        return None
    return make(
        "matmul", a.args[0], make(e.op, a.args[1], b.args[1])
    )  # c @ a + c @ b = c @ (a + b)


def _products(a: Expr, b: Expr) -> bool:
    return a.op == "matmul" and b.op == "matmul"


_ALTERNATIVES: dict[str, tuple[Rule, ...]] = {
    "mul": (_scalar_into_right, _scalar_into_left, _scalar_into_tile),
    "matmul": (_right_first, _left_first),
    "scale_rows": (_rows_into_left,),
    "scale_cols": (_columns_into_right,),
    "add": (_factor_right, _factor_left),
    "sub": (_factor_right, _factor_left),
}


def shape_of(op: str, args: tuple[Expr, ...], **attrs: Attribute) -> Shape:
    """The shape an operator would give. Raises `Mismatch`."""
    return OPS[op].shape(args, attrs)
