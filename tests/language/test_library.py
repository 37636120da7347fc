"""Which definition a name means."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from surgery.errors import SpecSyntaxError
from surgery.language import library as module
from surgery.language.library import Library
from surgery.language.parse import parse
from surgery.resources import formats_dir, methods_dir

METHOD = "method {}() on matrix {{ W' = 2 * W }}"
FORMAT = 'format {} {} {{ config kind = "{}" }}'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library of two methods and a format, in place of the standard one."""
    texts = {
        "methods/one.peft": METHOD.format("one"),
        "methods/two.peft": METHOD.format("two"),
        "formats/peft.peft": "\n".join(
            FORMAT.format("peft", name, kind)
            for name, kind in (("one", "A"), ("one", "B"), ("two", "C"))
        ),
    }
    for path, text in texts.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text, encoding="utf-8")
    monkeypatch.setattr(module, "methods_dir", lambda: tmp_path / "methods")
    monkeypatch.setattr(module, "formats_dir", lambda: tmp_path / "formats")
    forget()
    return tmp_path


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    yield
    forget()


def forget() -> None:
    for cached in ("_standard_names", "_standard_method", "_standard_formats"):
        getattr(module, cached).cache_clear()


def kinds(library: Library, method: str) -> list[str]:
    return [f"{f.name} {f.fields[0].value.span.text}" for f in library.formats(method)]


def test_the_standard_library() -> None:
    library = Library.standard()
    assert library.names() == tuple(sorted(path.stem for path in methods_dir().glob("*.peft")))
    for name in library.names():
        method = library.method(name)
        assert method is not None
        assert method.name == name
        assert method.span.source.name == str(methods_dir() / f"{name}.peft")
    assert library.method("none such") is None
    written = sum(path.read_text(encoding="utf-8").count("\nformat ") for path in formats())
    assert len(library.all_formats()) == written


def formats() -> list[Path]:
    return list(formats_dir().glob("*.peft"))


def test_a_file_is_read_when_it_is_asked_for(folder: Path) -> None:
    (folder / "methods" / "bad.peft").write_text("method", encoding="utf-8")
    library = Library.standard()
    assert library.names() == ("bad", "one", "two")
    assert library.method("one") is library.method("one")
    with pytest.raises(SpecSyntaxError, match=r"bad\.peft"):
        library.method("bad")


def test_a_name_is_no_path(folder: Path) -> None:
    assert Library.standard().method("../methods/one") is None
    assert (folder / "methods" / "one.peft").exists()


def test_formats_in_the_order_of_the_file(folder: Path) -> None:
    del folder
    assert kinds(Library.standard(), "one") == ['peft "A"', 'peft "B"']
    assert kinds(Library.standard(), "none such") == []


def test_a_method_of_a_spec_stands_before_the_standard_one(folder: Path) -> None:
    del folder
    spec = parse(METHOD.format("one") + METHOD.format("three"))
    library = Library.standard().extended(spec)
    assert library.names() == ("one", "three", "two")
    assert library.method("one") is spec.statements[0]
    assert library.method("two") is Library.standard().method("two")
    assert kinds(library, "one") == []
    assert kinds(library, "two") == ['peft "C"']


def test_a_method_of_a_spec_has_the_formats_of_the_spec(folder: Path) -> None:
    del folder
    spec = parse(METHOD.format("one") + FORMAT.format("peft", "one", "D"))
    assert kinds(Library.standard().extended(spec), "one") == ['peft "D"']


def test_a_format_of_a_spec_for_a_standard_method(folder: Path) -> None:
    del folder
    library = Library.standard().extended(parse(FORMAT.format("other", "one", "D")))
    assert kinds(library, "one") == ['other "D"', 'peft "A"', 'peft "B"']
    library = library.extended(parse(FORMAT.format("peft", "one", "E")))
    assert kinds(library, "one") == ['peft "E"', 'other "D"']
    library = library.extended(parse(METHOD.format("one")))
    assert kinds(library, "one") == []


def test_a_spec_without_definitions_changes_nothing(folder: Path) -> None:
    del folder
    library = Library.standard()
    assert library.extended(parse("match q apply one()")) is library
