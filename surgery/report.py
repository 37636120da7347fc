"""How values, shapes, bytes and tables are shown to people."""

from __future__ import annotations

from collections.abc import Sequence


def shown(value: object) -> str:
    """A value as a spec would have it."""
    match value:
        case bool():
            return str(value).lower()
        case str():
            return f'"{value}"'
        case float():
            return f"{value:g}"
        case _:
            return str(value)


def shown_shape(shape: Sequence[int]) -> str:
    """A shape in elements: `[8, 384]`."""
    return f"[{', '.join(map(str, shape))}]"


def shown_bytes(count: int) -> str:
    """A number of bytes in the unit that fits it."""
    value = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:,.0f} {unit}" if unit == "bytes" else f"{value:,.1f} {unit}"
        value /= 1024
    return f"{value:,.1f} TiB"


def aligned(rows: list[list[str]]) -> list[str]:
    """Rows of cells as lines, in columns, with a rule below the first."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
    return [lines[0], "─" * max(map(len, lines)), *lines[1:]]
