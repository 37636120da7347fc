"""Which modules a config of peft's is for, as selectors and as tests of a path.

Read from peft 0.21: a name stands for the end of a path behind a dot, a text for a regex of a whole
path, and what is absent for what a table says of the model's type.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, cast

from torch import nn

from surgery.errors import Report, Source, Span, refuse
from surgery.language.patterns import compile_selector
from surgery.language.syntax import Regex
from surgery.mapping.fields import ConfigFile
from surgery.mapping.forms import shown
from surgery.model.inventory import survey
from surgery.resources import formats_dir

EVERY_LINEAR = "all-linear"
_PLAIN = re.compile(r"[A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+)*")
_WORDS = ("in", "where", "except", "apply", "not")
_HEADS = ("score", "classifier")  # of models that classify, where they do not name one

Taker = Callable[[str], bool]
Holds = Literal["always", "never", "sometimes"]


@dataclass(frozen=True, slots=True)
class Chosen:
    """Some modules: the selector, and a test of a path.

    tail, text: what all of their paths end with, as names behind a dot and as a text, if anything.
    where, but: the clauses that are needed beside it.
    """

    selector: str
    takes: Taker
    tail: str = ""
    text: str = ""
    where: str = ""
    but: str = ""


def named(tail: str) -> Chosen:
    """What ends with a name, or some names, behind a dot."""
    plain = _PLAIN.fullmatch(tail) and tail not in _WORDS
    text = tail if plain else f"/{escaped(tail)}/"
    return Chosen(text, lambda path: path == tail or path.endswith(f".{tail}"), tail, tail)


def ending(text: str) -> Chosen:
    """What ends with a text, wherever a name begins in it."""
    return Chosen(f"/[^.]*{escaped(text)}/", lambda path: path.endswith(text), text=text)


def by_pattern(pattern: str, span: Span) -> Chosen:
    """What a key of a table of patterns stands for: a regex of what follows a dot, or nothing."""
    if re.fullmatch(r"\w+", pattern):
        return named(pattern)
    return matching(pattern, span, whole=pattern.startswith("^"))


def matching(pattern: str, span: Span, *, whole: bool = True) -> Chosen:
    """What a regex is the whole path of, or of what follows a dot. Raises SpecSyntaxError."""
    body = pattern.removeprefix("^").removesuffix("$")
    report = Report()
    found = compile_selector(Regex(body, span=Span(Source(span.text, f"/{body}/"), 0, 0)), report)
    report.stop()
    assert found is not None  # what is wrong was reported
    text = re.sub(r"(?<!\\)/", r"\/", body)
    return Chosen(f"/{text}/", found.matches_whole if whole else found.matches_tail)


def escaped(text: str) -> str:
    """A text as a regex that matches it alone."""
    return re.sub(r"[^A-Za-z0-9_-]", lambda found: f"\\{found.group()}", text)


def every_linear(model: nn.Module | None, classifies: bool) -> Chosen:
    """All linear layers but the one that gives the model's output."""
    where = "(type == Linear or type == Conv1D)"
    if model is None:
        return Chosen("*", lambda path: True, where=where, but="@head")
    head = _head(model, classifies)
    entries = [e for e in survey(model).entries if _is_linear(e.module)]
    paths = {e.path for e in entries if e.module is not head}
    but = next((named(e.path).selector for e in entries if e.module is head), "")
    types = {type(e.module).__name__ for e in entries if e.module is not head}
    where = where if len(types) > 1 else f"type == {next(iter(types), 'Linear')}"
    return Chosen("*", paths.__contains__, where=where, but=but)


def _is_linear(module: nn.Module) -> bool:
    classes = type(module).__mro__
    return isinstance(module, nn.Linear) or any(c.__name__ == "Conv1D" for c in classes)


def _head(model: nn.Module, classifies: bool) -> nn.Module | None:
    given: Any = getattr(model, "get_output_embeddings", None)
    head = given() if callable(given) else None
    if head is None and classifies:
        head = next((own for name in _HEADS if (own := getattr(model, name, None))), None)
    return cast("nn.Module | None", head)


def targets_of(config: ConfigFile, model: nn.Module | None) -> tuple[Chosen, ...]:
    """The modules that a config puts its method on, but for what it leaves out of them.

    Raises SpecSyntaxError for a regex, ArtifactError (E515) where they are not said.
    """
    stated = config.get("target_modules")
    if stated is None and not config.get("target_parameters"):
        stated = taken_where_absent(config, "target_modules", model)
    if isinstance(stated, str) and stated.lower() == EVERY_LINEAR:
        return (every_linear(model, config.get("task_type") == "SEQ_CLS"),)
    if isinstance(stated, str):
        return (matching(stated, config.span("target_modules")),)
    return all_of(map(str, cast("list[object]", stated or ())))


# ------------------------------------------------------------------------------ what is absent


@lru_cache(maxsize=1)
def _table() -> Mapping[str, Mapping[str, object]]:
    text = (formats_dir() / "peft_targets.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def taken_where_absent(config: ConfigFile, name: str, model: nn.Module | None) -> object:
    """What a field of names means where a config has none: what is said of the model's type.

    Raises ArtifactError (E515) where there is no model, or nothing is said of its type.
    """
    kind = str(config.get("peft_type"))
    section = kind if name == "target_modules" else f"{kind}-{name}"
    rows = _table().get(section)
    if rows is None:
        return [] if section != kind else _refuse_absent(config, name, "peft has no names for it")
    own: Any = None if model is None else getattr(model, "config", None)
    type_of = getattr(own, "model_type", None)
    if type_of is None:
        _refuse_absent(config, name, "what it then is depends on the type of the model")
    found = rows.get(str(type_of))
    if found is None and "like" in rows and type_of not in cast("list[str]", rows.get("but", [])):
        found = _table()[str(rows["like"])].get(str(type_of))
    if found is None:
        _refuse_absent(config, name, f"peft says nothing of models of type {shown(type_of)}")
    return found


def _refuse_absent(config: ConfigFile, name: str, reason: str) -> Any:
    refuse(
        "E515",
        f"`{name}` is absent: {reason}",
        config.source,
        hint="give the model, or write the names of its modules into the config",
    )


# ---------------------------------------------------------------------------- one and another


def holds(chosen: Chosen, other: Chosen) -> Holds:
    """Whether all that is chosen is among others, as far as the endings tell."""
    if not chosen.tail:
        return "sometimes"
    if other.takes(chosen.tail):
        return "always"
    begun = f".{chosen.tail}" if other.tail else chosen.tail
    apart = other.text and not other.text.endswith(begun)
    return "never" if apart else "sometimes"


def all_of(names: Iterable[str], form: Callable[[str], Chosen] = named) -> tuple[Chosen, ...]:
    """Each of some names as what is chosen by it, once and in order."""
    return tuple(form(name) for name in dict.fromkeys(names))
