"""The methods and formats that a name can mean: the standard ones, and those of a spec."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from surgery.language import syntax as ast
from surgery.language.parse import load
from surgery.resources import formats_dir, methods_dir, statements_dir

TRAINED = "trained"
"""The method that `train` and `save` put on a parameter; no other may have its name."""


@dataclass(frozen=True, slots=True)
class Library:
    """Methods and formats by name; a spec's own definitions stand before the standard ones.

    A method that a spec defines has only the formats of that spec: what a format says holds for the
    equation it was written for. A format that a spec writes for a standard method takes the place
    of the standard one of that name.
    """

    methods: Mapping[str, ast.Method] = field(default_factory=dict[str, ast.Method])
    own_formats: tuple[ast.Format, ...] = ()

    @staticmethod
    def standard() -> Library:
        """The library alone; a method's file is read when it is first asked for."""
        return Library()

    def method(self, name: str) -> ast.Method | None:
        """The definition of a name, or None. Raises SpecSyntaxError for a damaged file."""
        return self.methods.get(name) or _standard_method(name)

    def names(self) -> tuple[str, ...]:
        """Every method there is, in alphabetical order; no file is read for it."""
        return tuple(sorted({*self.methods, *_standard_names()}))

    def formats(self, method: str) -> tuple[ast.Format, ...]:
        """How formats spell a method, in the order in which they are written, a spec's own first.

        Raises SpecSyntaxError for a damaged file.
        """
        own = tuple(f for f in self.own_formats if f.method == method)
        if method in self.methods:
            return own
        shadowed = {f.name for f in own}
        standard = (f for f in _standard_formats() if f.method == method)
        return (*own, *(f for f in standard if f.name not in shadowed))

    def all_formats(self) -> tuple[ast.Format, ...]:
        """The formats of every method, method by method."""
        return tuple(f for name in self.names() for f in self.formats(name))

    def extended(self, spec: ast.Spec) -> Library:
        """This library with a spec's own definitions before it."""
        methods = {s.name: s for s in spec.statements if isinstance(s, ast.Method)}
        formats = tuple(s for s in spec.statements if isinstance(s, ast.Format))
        if not methods and not formats:
            return self
        replaced = {(f.name, f.method) for f in formats}
        kept = tuple(
            f
            for f in self.own_formats
            if f.method not in methods and (f.name, f.method) not in replaced
        )
        return Library({**self.methods, **methods}, (*formats, *kept))


@lru_cache(maxsize=1)
def _standard_names() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in methods_dir().glob("*.peft")))


@lru_cache(maxsize=256)
def _standard_method(name: str) -> ast.Method | None:
    if name not in _standard_names():
        return None
    spec = load(methods_dir() / f"{name}.peft")
    found = (s for s in spec.statements if isinstance(s, ast.Method) and s.name == name)
    return next(found, None)


@lru_cache(maxsize=1)
def trained() -> ast.Method:
    """What `train` and `save` put on a parameter."""
    (method,) = load(statements_dir() / f"{TRAINED}.peft").statements
    assert isinstance(method, ast.Method)
    return method


@lru_cache(maxsize=1)
def _standard_formats() -> tuple[ast.Format, ...]:
    specs = (load(path) for path in sorted(formats_dir().glob("*.peft")))
    return tuple(s for spec in specs for s in spec.statements if isinstance(s, ast.Format))
