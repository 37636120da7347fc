"""`use "file.peft"`: a file with the definitions of other files in front of its own.

A file means the same whoever uses it. Its scope is its own definitions over those of the files it
uses; a name that two of these define, and it does not, is refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath

from surgery.algebra.mentions import names
from surgery.errors import Report, Span, SurgeryError
from surgery.language import syntax as ast
from surgery.language.parse import MAX_BYTES, nearest_name, parse_bytes, read_bytes

MAX_FILES = 64
SUFFIX = ".peft"

_Key = tuple[str, ...]
"""What a definition defines: its namespace, then its name; a format has a method besides."""

_KINDS = "here: `use`, `param`, `let`, `method` and `format`"


def load(path: str | Path) -> ast.Spec:
    """The spec in a file, with all that it uses: no `use` is left in it.

    Raises ArtifactError: E501 for a file that cannot be read, E506 for a path that may not be
    used; SpecSyntaxError; DefinitionError: E107 for a name that two used files define, E127 for a
    circle, E128 for a statement that a used file may not have, E129 for a name that would change
    its meaning.
    """
    data = read_bytes(path)
    spec = parse_bytes(data, str(path))
    if not any(isinstance(s, ast.Use) for s in spec.statements):
        return spec
    return _Reader(os.fspath(path), len(data)).whole(spec)


class _File:
    """A file that was read.

    name: what a person would open. own: what it defines, and where. scope: the file that defines
    what a name means here.
    """

    __slots__ = ("name", "own", "scope", "spec")

    def __init__(self, name: str, spec: ast.Spec) -> None:
        self.name = name
        self.spec = spec
        self.own = {k: s.span for s in reversed(spec.statements) if (k := _key(s)) is not None}
        self.scope: Mapping[_Key, _File] = {}


def _key(statement: ast.Statement) -> _Key | None:
    match statement:
        case ast.Param() | ast.Let():
            return "name", statement.name
        case ast.Method():
            return "method", statement.name
        case ast.Format():
            return "format", statement.name, statement.method
        case _:
            return None


def _shadowed(key: _Key, own: Mapping[_Key, Span]) -> bool:
    """Whether a file's own definitions hide one; a method of its own hides another's formats."""
    return key in own or (key[0] == "format" and ("method", key[2]) in own)


class _Reader:
    """The walk over the files of one spec, depth first; each is read once."""

    def __init__(self, path: str, size: int) -> None:
        """Begin at the file that is compiled, of so many bytes."""
        self.path = path
        self.root = os.path.realpath(os.path.dirname(path))
        self.size = size
        self.full = False
        self.report = Report()
        self.files: dict[str, _File | None] = {}  # by real path, what is used before its user
        self.chain: dict[str, str] = {}  # the files that are being read, and their names

    def whole(self, spec: ast.Spec) -> ast.Spec:
        """The spec of the first file with all that it uses. Raises with all that is wrong."""
        main = self._file(spec, os.path.join(self.root, os.path.basename(self.path)), self.path)
        self._stop()
        kept = [(f, s) for f in self.files.values() if f for s in _kept(f, main)]
        for file, statement in kept:
            _check_meaning(file, statement, main, self.report)
        self._stop()
        return ast.Spec(tuple(s for _, s in kept), span=spec.span)

    def _stop(self) -> None:
        self.report.arrange()
        self.report.stop()

    def _file(self, spec: ast.Spec, real: str, name: str) -> _File:
        file = _File(name, spec)
        self.chain[real] = name
        uses = [s for s in spec.statements if isinstance(s, ast.Use)]
        used = [found for use in uses if (found := self._used(use, real, name)) is not None]
        del self.chain[real]
        file.scope = self._scope(file, used)
        self.files[real] = file
        return file

    def _used(self, use: ast.Use, user: str, name: str) -> _File | None:
        """The file that a `use` means; None if it is refused, which is reported."""
        real = self._real(use, user)
        if real is None or real in self.files:
            return None if real is None else self.files[real]
        if real in self.chain:
            self._report_circle(use, real)
            return None
        self.files[real] = None
        called = os.path.normpath(os.path.join(os.path.dirname(name), use.path))
        spec = self._parsed(use, real, called)
        if spec is None:
            return None
        del self.files[real]  # it comes back after those that it uses
        for statement in spec.statements:
            if _key(statement) is None and not isinstance(statement, ast.Use):
                self._report_statement(statement, called, use)
        return self._file(spec, real, called)

    def _real(self, use: ast.Use, user: str) -> str | None:
        """Where a used file is, inside the folder of the file that is compiled."""
        wrong = _unusable(use.path)
        real = ""
        if not wrong:
            real = os.path.realpath(os.path.join(os.path.dirname(user), use.path))
            wrong = "" if Path(real).is_relative_to(self.root) else self._outside
        if not wrong:
            return real
        self.report.error(
            "E506",
            f'`use "{use.path}"` {wrong}',
            use.span,
            hint="name a .peft file below the folder of the compiled one, relative to this file",
        )
        return None

    @property
    def _outside(self) -> str:
        return f"leads out of the folder `{os.path.dirname(self.path) or os.curdir}`"

    def _parsed(self, use: ast.Use, real: str, name: str) -> ast.Spec | None:
        if not self._may_read(use, real, name):
            return None
        try:
            data = read_bytes(real)
            self.size += len(data)
            if self.size > MAX_BYTES:
                self._report_limit(use, f"more than {MAX_BYTES:,} bytes")
                return None
            return parse_bytes(data, name)
        except SurgeryError as error:
            for found in error.diagnostics:  # what is no text at all has no place in it
                self.report.extend([replace(found, span=found.span or use.span)])
            return None

    def _may_read(self, use: ast.Use, real: str, name: str) -> bool:
        if len(self.files) + len(self.chain) > MAX_FILES:
            self._report_limit(use, f"more than {MAX_FILES} files")
        if self.full or os.path.isfile(real):
            return not self.full
        what = "is no file" if os.path.exists(real) else "does not exist"
        near = nearest_name(Path(real))
        hint = f"did you mean `{near}`?" if near else "check the path"
        self.report.error("E501", f"{name} {what}", use.span, hint=hint)
        return False

    def _scope(self, file: _File, used: list[_File]) -> dict[_Key, _File]:
        scope: dict[_Key, _File] = {}
        for key, owner in ((k, o) for other in used for k, o in other.scope.items()):
            if _shadowed(key, file.own):
                continue
            if scope.setdefault(key, owner) is not owner:
                self._report_clash(key, scope[key], owner, file)
        return {**scope, **dict.fromkeys(file.own, file)}

    # ------------------------------------------------------------------------- what is wrong

    def _report_circle(self, use: ast.Use, real: str) -> None:
        chain = [*self.chain]
        called = [self.chain[r] for r in chain[chain.index(real) :]]
        self.report.error(
            "E127",
            f"files use each other in a circle: {' -> '.join([*called, called[0]])}",
            use.span,
            hint="move what both need to a file of its own, and use that",
        )

    def _report_statement(self, statement: ast.Statement, name: str, use: ast.Use) -> None:
        word = statement.span.text.split(maxsplit=1)[0]
        self.report.error(
            "E128",
            f"{name} is used by another file, and has a `{word}`",
            statement.span.within(0, len(word)),
            label="a used file only defines",
            hint=f"statements that adapt a model stand in the file that is compiled; {_KINDS}",
            related=(("used here", use.span),),
        )

    def _report_limit(self, use: ast.Use, what: str) -> None:
        if self.full:
            return
        self.full = True
        self.report.error(
            "E002",
            f"the spec and the files it uses are {what}",
            use.span,
            hint="use only the files whose definitions are needed",
        )

    def _report_clash(self, key: _Key, first: _File, second: _File, user: _File) -> None:
        self.report.error(
            "E107",
            f"{_called(key)} is defined in {first.name} and in {second.name}",
            second.own[key],
            hint=f"define it in {user.name}, which uses both, or use one of them",
            related=(("and here", first.own[key]),),
        )


def _unusable(path: str) -> str:
    """Why a path can be no file's in the folder, before any file is looked for; or ""."""
    windows = PureWindowsPath(path)
    if PurePosixPath(path).is_absolute() or windows.drive or windows.root:
        return "is no relative path"
    if not path.endswith(SUFFIX):
        return f"is no {SUFFIX} file"
    return "has a character that no path has" if "\0" in path else ""


def _called(key: _Key) -> str:
    match key:
        case ("format", name, method):
            return f"the format `{name}` of `{method}`"
        case ("method", name):
            return f"the method `{name}`"
        case _:
            return f"`{key[1]}`"


# -------------------------------------------------------------------------------- together


def _kept(file: _File, main: _File) -> Iterator[ast.Statement]:
    """The statements of a file that the whole is made of: those that nothing hides."""
    for statement in file.spec.statements:
        key = _key(statement)
        if isinstance(statement, ast.Use):
            continue
        if key is None or (main.scope.get(key) is file and _still_fits(key, file, main)):
            yield statement


def _still_fits(key: _Key, file: _File, main: _File) -> bool:
    """Whether a format is for the very method that its name means in the whole."""
    method = ("method", key[-1])
    return key[0] != "format" or file.scope.get(method) is main.scope.get(method)


def _check_meaning(file: _File, statement: ast.Statement, main: _File, report: Report) -> None:
    """E129 where a value is made of a name that another file, nearer the whole, defines anew."""
    if not isinstance(statement, ast.Let | ast.Param):
        return
    for name in sorted(names(statement)):
        key = ("name", name)
        owner = main.scope.get(key)
        if owner is None or owner is file.scope.get(key):
            continue
        report.error(
            "E129",
            f"`{statement.name}` is made of `{name}`, which is another in {owner.name}",
            statement.span,
            hint=f"rename one `{name}`, or define `{statement.name}` in {main.name} as well",
            related=((f"`{name}` would be this", owner.own[key]),),
        )
