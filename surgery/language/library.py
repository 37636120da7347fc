"""The methods and formats that a name can mean: the standard ones, and those of a spec."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from surgery.language import syntax as ast
from surgery.language.parse import load
from surgery.resources import formats_dir, methods_dir


@dataclass(frozen=True)
class Library:
    """Methods and formats by name. A definition of a spec shadows the standard one of that name,
    its formats included: what a format says holds for the equation it was written for.
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
        """Every method there is, in alphabetical order."""
        return tuple(sorted({*self.methods, *_standard_names()}))

    def formats(self, method: str) -> tuple[ast.Format, ...]:
        """How formats spell a method, in the order in which they are written."""
        formats = self.own_formats if method in self.methods else _standard_formats()
        return tuple(f for f in formats if f.method == method)

    def all_formats(self) -> tuple[ast.Format, ...]:
        """Every format statement that holds: the standard ones not shadowed, and the spec's own."""
        kept = (f for f in _standard_formats() if f.method not in self.methods)
        return (*kept, *self.own_formats)

    def extended(self, spec: ast.Spec) -> Library:
        """This library with a spec's own definitions before it."""
        methods = {s.name: s for s in spec.statements if isinstance(s, ast.Method)}
        formats = tuple(s for s in spec.statements if isinstance(s, ast.Format))
        if not methods and not formats:
            return self
        return Library({**self.methods, **methods}, (*self.own_formats, *formats))


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
def _standard_formats() -> tuple[ast.Format, ...]:
    specs = (load(path) for path in sorted(formats_dir().glob("*.peft")))
    return tuple(s for spec in specs for s in spec.statements if isinstance(s, ast.Format))
