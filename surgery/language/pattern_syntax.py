"""What regexes and globs consist of: one tree for both, read by hand so that spans are exact.

Whatever cannot be matched in linear time, or would be too large, is refused with E007.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from surgery.errors import Span, refuse

_MAX_DEPTH = 100
_MAX_DIGITS = 5

Ranges = tuple[tuple[str, str], ...]

_CLASSES: dict[str, Ranges] = {
    "d": (("0", "9"),),
    "w": (("0", "9"), ("A", "Z"), ("a", "z"), ("_", "_")),
    "s": ((" ", " "), ("\t", "\r")),
}


@dataclass(frozen=True, slots=True)
class Chars:
    """One character of some ranges, or of none of them."""

    ranges: Ranges
    negated: bool = False

    def has(self, character: str) -> bool:
        """Whether the character is among them."""
        return any(a <= character <= b for a, b in self.ranges) != self.negated


@dataclass(frozen=True, slots=True)
class Sequence:
    """One after the other; `spread` if a choice among them counts as one between the wholes."""

    parts: tuple[Part, ...]
    spread: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """One of several; `places` are their offsets in the pattern."""

    options: tuple[Part, ...]
    places: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """`least` to `most` times; None for no end."""

    part: Part
    least: int
    most: int | None


Part = Chars | Sequence | Choice | Repeat

_ANY = Chars((), negated=True)
_IN_NAME = Chars(((".", "."),), negated=True)


def read_regex(text: str, span: Span) -> Part:
    """The tree of a regex; `span` is where it stands, without the slashes.

    Raises SpecSyntaxError (E007).
    """
    reader = _Reader(text, span)
    part = reader.choice(0)
    if reader.at < len(text):
        reader.fail(
            "this `)` closes nothing", reader.at, reader.at + 1, r"a bracket itself is `\)`"
        )
    return part


def read_glob(text: str, span: Span) -> Part:
    """The tree of a glob: `*` inside a name, `**` across dots, `{a,b}` one of several.

    Raises SpecSyntaxError (E007).
    """
    return _glob(text, 0, span, 0)


# ------------------------------------------------------------------------------------ regexes


class _Reader:
    """Recursive descent; every method reads from `at` on and leaves `at` behind what it read."""

    def __init__(self, text: str, span: Span) -> None:
        self.text = text
        self.span = span
        self.at = 0

    def fail(self, message: str, start: int, end: int, hint: str) -> NoReturn:
        refuse("E007", message, self.span.within(start, max(end, start + 1)), hint=hint)

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def choice(self, depth: int) -> Part:
        options: list[Part] = []
        places: list[tuple[int, int]] = []
        while True:
            start = self.at
            options.append(self.sequence(depth))
            places.append((start, self.at))
            if self.peek() != "|":
                break
            self.at += 1
        return options[0] if len(options) == 1 else Choice(tuple(options), tuple(places))

    def sequence(self, depth: int) -> Part:
        parts: list[Part] = []
        while self.peek() not in ("", "|", ")"):
            parts.append(self.repeated(depth))
        return parts[0] if len(parts) == 1 else Sequence(tuple(parts))

    def repeated(self, depth: int) -> Part:
        start = self.at
        part = self.atom(depth)
        bounds = self.bounds()
        if bounds is None:
            return part
        if self.bounds() is not None:
            self.fail("a repeat of a repeat", start, self.at, "one sign is enough")
        least, most = bounds
        if most is None and _endless(part):
            self.fail(
                "an unbounded repeat of an unbounded repeat",
                start,
                self.at,
                "bound one of them, as in `(a+){1,4}`",
            )
        return Repeat(part, least, most)

    def bounds(self) -> tuple[int, int | None] | None:
        match self.peek():
            case "?":
                self.at += 1
                return 0, 1
            case "*":
                self.at += 1
                return 0, None
            case "+":
                self.at += 1
                return 1, None
            case "{":
                return self.braces()
            case _:
                return None

    def braces(self) -> tuple[int, int | None]:
        start = self.at
        end = self.text.find("}", start)
        inside = self.text[start + 1 : end] if end > 0 else ""
        low, comma, high = inside.partition(",")
        digits = all(p.isascii() and p.isdigit() for p in (low, high) if p)
        if end < 0 or not low or not digits:
            self.fail(
                "a repeat is `{m}`, `{m,}` or `{m,n}`", start, end + 1, r"a brace itself is `\{`"
            )
        self.at = end + 1
        if max(len(low), len(high)) > _MAX_DIGITS:
            self.fail("this repeat is too long", start, self.at, "`*` and `+` have no end")
        least = int(low)
        most = int(high) if high else None if comma else least
        if most is not None and most < least:
            hint = f"write `{{{most},{least}}}`"
            self.fail(f"`{{{inside}}}` is empty: {most} < {least}", start, self.at, hint)
        return least, most

    def atom(self, depth: int) -> Part:
        start, character = self.at, self.peek()
        self.at += 1
        match character:
            case "(":
                return self.group(start, depth + 1)
            case "[":
                return self.set(start)
            case ".":
                return _ANY
            case "\\":
                return self.escape(start)
            case "?" | "*" | "+" | "{":
                hint = f"the sign itself is `\\{character}`"
                self.fail(f"nothing stands before `{character}`", start, self.at, hint)
            case "^" | "$":
                message = f"`{character}` is not needed: the whole of a name is matched"
                self.fail(message, start, self.at, "leave it out")
            case _:
                return Chars(((character, character),))

    def group(self, start: int, depth: int) -> Part:
        if depth > _MAX_DEPTH:
            self.fail(f"nested deeper than {_MAX_DEPTH}", start, self.at, "use fewer brackets")
        if self.peek() == "?":
            if self.text[self.at : self.at + 2] != "?:":
                message = "look-around and named groups are not part of selectors"
                self.fail(message, start, self.at + 2, "a group is `( … )` or `(?: … )`")
            self.at += 2
        inside = self.choice(depth)
        if self.peek() != ")":
            self.fail("this group is not closed", start, start + 1, r"a bracket itself is `\(`")
        self.at += 1
        if inside == Sequence(()):
            # Repeated, it would cost time and make no states that could be counted.
            self.fail("this group is empty", start, self.at, "leave it out")
        return inside

    def escape(self, start: int) -> Chars:
        character = self.peek()
        self.at += 1
        if character and character in "dws":
            return Chars(_CLASSES[character])
        if character and character in "DWS":
            return Chars(_CLASSES[character.lower()], negated=True)
        if character == "" or (character.isalnum() and character.isascii()):
            message = f"`\\{character}` is not part of selectors"
            hint = r"the classes are `\d`, `\w`, `\s` and `\D`, `\W`, `\S`"
            if character.isdigit():
                hint = "a back-reference cannot be matched in linear time"
            self.fail(message, start, min(self.at, len(self.text)), hint)
        return Chars(((character, character),))

    def set(self, start: int) -> Chars:
        negated = self.peek() == "^"
        self.at += negated
        ranges = list(self.range(start))
        while self.peek() != "]":
            ranges += self.range(start)
        self.at += 1
        return Chars(tuple(ranges), negated)

    def range(self, start: int) -> Ranges:
        begin = self.at
        members = self.set_member(start)
        low = _single(members)
        if not low or self.peek() != "-" or self.text[self.at + 1 : self.at + 2] in ("]", ""):
            return members
        self.at += 1
        high = _single(self.set_member(start))
        if high < low:
            hint = "a range goes from the lower character to the higher"
            self.fail("this range is empty", begin, self.at, hint)
        return ((low, high),)

    def set_member(self, start: int) -> Ranges:
        begin, character = self.at, self.peek()
        if character == "":
            self.fail("this set is not closed", start, start + 1, r"a bracket itself is `\[`")
        self.at += 1
        if character != "\\":
            return ((character, character),)
        part = self.escape(begin)
        if part.negated:
            self.fail("a negated class inside a set", begin, self.at, "negate the set: `[^ … ]`")
        return part.ranges


def _single(ranges: Ranges) -> str:
    """The only character of some ranges, or nothing."""
    low, high = next(iter(ranges), ("", ""))
    return low if low == high and len(ranges) == 1 else ""


def _endless(part: Part) -> bool:
    """Whether some repeat without an end is inside."""
    match part:
        case Chars():
            return False
        case Sequence():
            return any(map(_endless, part.parts))
        case Choice():
            return any(map(_endless, part.options))
        case Repeat():
            return part.most is None or _endless(part.part)


# -------------------------------------------------------------------------------------- globs


def _glob(text: str, base: int, span: Span, depth: int) -> Part:
    """The tree of a part of a glob that begins at the offset `base` of the whole."""
    parts: list[Part] = []
    at = 0
    while at < len(text):
        if text[at] == "{":
            end = _closing(text, at, base, span, depth)
            parts.append(_options(text, at + 1, end, base, span, depth))
            at = end + 1
        elif text[at] == "}":
            _refuse(
                "this `}` closes nothing",
                base + at,
                span,
                "open it with `{`, as in `{up,down}_proj`",
            )
        elif text.startswith("**", at):
            parts.append(Repeat(_ANY, 0, None))
            at += 2
        else:
            parts.append(_plain(text[at]))
            at += 1
    return parts[0] if len(parts) == 1 else Sequence(tuple(parts), spread=True)


def _plain(character: str) -> Part:
    return Repeat(_IN_NAME, 0, None) if character == "*" else Chars(((character, character),))


def _options(text: str, start: int, end: int, base: int, span: Span, depth: int) -> Choice:
    """What stands between the braces from `start` to `end`."""
    places: list[tuple[int, int]] = []
    level, begin = 0, start
    for at in range(start, end + 1):
        if at == end or (text[at] == "," and level == 0):
            places.append((begin, at))
            begin = at + 1
        else:
            level += {"{": 1, "}": -1}.get(text[at], 0)
    options = tuple(_glob(text[a:b], base + a, span, depth + 1) for a, b in places)
    return Choice(options, tuple((base + a, base + b) for a, b in places))


def _closing(text: str, start: int, base: int, span: Span, depth: int) -> int:
    """The offset of the brace that closes the one at `start`."""
    if depth >= _MAX_DEPTH:
        _refuse(f"nested deeper than {_MAX_DEPTH}", base + start, span, "use fewer braces")
    level = 0
    for at in range(start, len(text)):
        level += {"{": 1, "}": -1}.get(text[at], 0)
        if level == 0:
            return at
    hint = "close it with `}`; braces hold no spaces, as in `{up,down}_proj`"
    _refuse("this `{` is not closed", base + start, span, hint)


def _refuse(message: str, at: int, span: Span, hint: str) -> NoReturn:
    """Refuse one character of a glob."""
    refuse("E007", message, span.within(at, at + 1), hint=hint)
