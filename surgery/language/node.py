"""What all nodes of the syntax tree are: frozen records that know where they were read from."""

from __future__ import annotations

from dataclasses import MISSING, FrozenInstanceError, dataclass, field
from typing import Any, NoReturn, TypeVar, dataclass_transform

from surgery.errors import Span

_T = TypeVar("_T")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def node(cls: type[_T]) -> type[_T]:
    """A frozen dataclass whose functions are those of `Node`, and are not written for each class.

    Writing them for each would be a tenth of the time that importing the package takes.
    """
    return dataclass(init=False, eq=False, repr=False, slots=True)(cls)


@node
class Node:
    """The root of all nodes."""

    span: Span = field(kw_only=True)

    def __init__(self, *values: object, **named: object) -> None:
        """The fields in order or by name; what is left out has its default."""
        given = {**dict(zip(self.__match_args__, values, strict=False)), **named}
        for name, one in self.__dataclass_fields__.items():
            value = given.pop(name, one.default)
            if value is MISSING:
                raise TypeError(f"{type(self).__name__} needs {name}")
            object.__setattr__(self, name, value)
        if given or len(values) > len(self.__match_args__):
            raise TypeError(f"{type(self).__name__} has no such fields: {[*given, *values]}")

    def __setattr__(self, name: str, value: object) -> NoReturn:
        """A node is frozen."""
        raise FrozenInstanceError(f"cannot assign to field {name!r}")

    def __delattr__(self, name: str) -> NoReturn:
        """A node is frozen."""
        raise FrozenInstanceError(f"cannot delete field {name!r}")

    def __reduce__(self) -> tuple[object, ...]:
        """Copies and pickles are made of the fields."""
        return _made, (type(self), {n: getattr(self, n) for n in self.__dataclass_fields__})

    def __eq__(self, other: object) -> bool:
        """Whether both mean the same."""
        return type(other) is type(self) and _parts(other) == _parts(self)

    def __hash__(self) -> int:
        """Of what it means."""
        return hash((type(self), _parts(self)))

    def __repr__(self) -> str:
        """The form and its parts."""
        return f"{type(self).__name__}({', '.join(map(repr, _parts(self)))})"


def _made(cls: type[Node], fields: dict[str, Any]) -> Node:
    return cls(**fields)


def _parts(node: Node) -> tuple[object, ...]:
    """All that a node means: its fields, but where it was read from."""
    return tuple(getattr(node, name) for name in node.__match_args__)
