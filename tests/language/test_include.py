"""`use`: what comes from other files, what stays out, and what is refused at which place."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

import surgery
from surgery.errors import Diagnostic, SurgeryError
from surgery.include import MAX_FILES
from surgery.language import syntax as ast
from surgery.language.parse import MAX_BYTES

Write = Callable[[Mapping[str, str]], Path]

SCALE = """method scale(k: float = 1) on matrix {
  train s[out] = 0
  W' = W + (k * s) * rows(W)
}
"""
OTHER_SCALE = SCALE.replace("(k * s)", "(2 * k * s)")
FORMAT = 'format house scale { config factor = k else 1 tensor s = "s" }\n'


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes files below a folder by their names there, and gives `main.peft`."""

    def write(files: Mapping[str, str]) -> Path:
        for name, text in files.items():
            path = tmp_path / "specs" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path / "specs" / "main.peft"

    return write


def model() -> nn.Module:
    cast(Any, torch).manual_seed(2)
    return nn.ModuleDict({"q": nn.Linear(5, 7), "k": nn.Linear(7, 3)})


def refused(path: Path) -> tuple[Diagnostic, ...]:
    with pytest.raises(SurgeryError) as caught:
        surgery.load(path)
    assert all(d.hint or d.label for d in caught.value.diagnostics)
    assert surgery.check(path) == caught.value.diagnostics
    return caught.value.diagnostics


def only(path: Path, code: str) -> Diagnostic:
    (found,) = refused(path)
    assert found.code == code
    assert found.span is not None
    return found


def place(found: Diagnostic) -> tuple[str, int]:
    assert found.span is not None
    return Path(found.span.source.name).name, found.span.source.position(found.span.start)[0]


def kinds(spec: ast.Spec) -> list[str]:
    return [type(s).__name__ for s in spec.statements]


# ------------------------------------------------------------------------------------ meaning


def test_definitions_come_in_front_and_no_use_is_left(write: Write) -> None:
    main = write(
        {
            "main.peft": 'use "lib/scale.peft"\nmatch q apply scale(k=double)',
            "lib/scale.peft": f'use "../numbers.peft"\n{SCALE}{FORMAT}',
            "numbers.peft": "param base: int = 2\nlet double = 2 * base",
        }
    )
    spec = surgery.load(main)
    assert kinds(spec) == ["Param", "Let", "Method", "Format", "Match"]
    assert surgery.check(main) == ()
    for given in (main, str(main), spec):
        (site,) = surgery.plan(given, model(), values={"base": 3}).sites
        assert site.form.arguments == (("k", 6.0),)
    names = [Path(s.span.source.name).relative_to(main.parent) for s in spec.statements]
    assert [*map(str, names)] == ["numbers.peft"] * 2 + ["lib/scale.peft"] * 2 + ["main.peft"]


def test_where_the_use_stands_makes_no_difference(write: Write) -> None:
    first = write({"main.peft": f'use "a.peft"\nlet k = 2\n{SCALE}', "a.peft": "let n = 3"})
    spec = surgery.load(first)
    first.write_text(f'let k = 2\n{SCALE}\nuse "a.peft"')
    assert surgery.load(first) == spec


def test_a_file_without_use_is_what_it_is(write: Write) -> None:
    main = write({"main.peft": "match q apply lora(r=2)"})
    assert surgery.load(main) == surgery.parse(main.read_text())


def test_a_file_twice_is_read_once(write: Write) -> None:
    main = write(
        {
            "main.peft": 'use "a.peft" use "b.peft" use "./a.peft" use "lib/../a.peft"',
            "a.peft": 'use "c.peft" let a = c',
            "b.peft": 'use "c.peft" let b = c',
            "c.peft": "let c = 3",
            "lib/none.peft": "let none = 1",
        }
    )
    assert [s.name for s in surgery.load(main).statements if isinstance(s, ast.Let)] == [*"cab"]


def test_what_a_file_defines_hides_what_it_uses(write: Write) -> None:
    files = {
        "main.peft": f'use "a.peft"\n{SCALE}let n = 5\nmatch q apply scale(k=n)',
        "a.peft": f"{OTHER_SCALE}{FORMAT}let n = 3",
    }
    spec = surgery.load(write(files))
    assert kinds(spec) == ["Method", "Let", "Match"]  # a hidden method's format goes with it
    assert spec == surgery.parse(f"{SCALE}let n = 5\nmatch q apply scale(k=n)")


def test_a_used_file_hides_what_it_uses_itself(write: Write) -> None:
    main = write(
        {
            "main.peft": 'use "a.peft"',
            "a.peft": f'use "b.peft"\n{SCALE}',
            "b.peft": OTHER_SCALE,
        }
    )
    assert surgery.load(main) == surgery.parse(SCALE)


def test_a_format_is_for_the_method_that_its_file_sees(write: Write) -> None:
    standard = 'format peft lora { config peft_type = "MINE" }\n'
    own = "method lora(r: int = 2) on matrix { train l[out] = 0 W' = l * rows(W) }\n"
    files = {"main.peft": 'use "a.peft" use "b.peft"', "a.peft": own, "b.peft": standard}
    assert surgery.load(write(files)) == surgery.parse(own)
    files["b.peft"] = f'use "a.peft"\n{standard}'
    assert surgery.load(write(files)) == surgery.parse(own + standard)
    files["main.peft"] = 'use "b.peft"'
    files["b.peft"] = standard
    assert surgery.load(write(files)) == surgery.parse(standard)


def test_a_saved_adapter_needs_no_other_file(write: Write, tmp_path: Path) -> None:
    main = write(
        {
            "main.peft": 'use "lib/scale.peft"\nmatch q apply scale(k=twice)',
            "lib/scale.peft": f"param n: int = 2\nlet twice = 2 * n\n{SCALE}{FORMAT}",
        }
    )
    surgery.compile(main, model(), values={"n": 3}).save(tmp_path / "out")
    (main.parent / "lib" / "scale.peft").unlink()
    text = (tmp_path / "out" / "adapter.peft").read_text()
    assert 'use "' not in text
    assert surgery.check(tmp_path / "out" / "adapter.peft") == ()
    (site,) = surgery.attach(tmp_path / "out", model()).plan.sites
    assert site.form.arguments == (("k", 6.0),)


def test_symlinks_inside_the_folder_are_followed(write: Write) -> None:
    main = write({"main.peft": 'use "link.peft" use "a.peft"', "a.peft": "let n = 3"})
    (main.parent / "link.peft").symlink_to("a.peft")
    assert kinds(surgery.load(main)) == ["Let"]
    linked = main.parents[1] / "linked"
    linked.symlink_to(main.parent, target_is_directory=True)
    assert kinds(surgery.load(linked / "main.peft")) == ["Let"]


def test_paths_are_relative_to_the_file_and_not_to_where_one_stands(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = write({"main.peft": 'use "lib/a.peft"', "lib/a.peft": 'use "b.peft"', "lib/b.peft": ""})
    (main.parent / "lib" / "b.peft").write_text("let n = 3")
    monkeypatch.chdir(main.parent)
    assert kinds(surgery.load("main.peft")) == ["Let"]
    monkeypatch.chdir(main.parents[1])
    (statement,) = surgery.load("specs/main.peft").statements
    assert statement.span.source.name == "specs/lib/b.peft"


# ------------------------------------------------------------------------------------ refused


def test_a_circle_is_shown_with_its_files(write: Write) -> None:
    main = write(
        {
            "main.peft": 'let m = 1\nuse "a.peft"',
            "a.peft": 'use "b.peft"',
            "b.peft": 'let n = 3\nuse "a.peft"',
        }
    )
    found = only(main, "E127")
    assert "a.peft -> " in found.message
    assert found.message.count("a.peft") == 2
    assert "main" not in found.message
    assert place(found) == ("b.peft", 2)


def test_a_file_that_uses_itself(write: Write) -> None:
    assert place(only(write({"main.peft": 'use "main.peft"'}), "E127")) == ("main.peft", 1)


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("../out.peft", "leads out of the folder"),
        ("lib/../../out.peft", "leads out of the folder"),
        ("gone/../../specs/../out.peft", "leads out of the folder"),
        ("/etc/out.peft", "no relative path"),
        ("C:\\out.peft", "no relative path"),
        ("\\\\host\\out.peft", "no relative path"),
        ("notes.txt", "no .peft file"),
        ("", "no .peft file"),
        ("..", "no .peft file"),
        ("a\0.peft", "a character that no path has"),
    ],
)
def test_paths_that_may_not_be_used(path: str, why: str, write: Write) -> None:
    main = write({"main.peft": f'let n = 1\nuse "{path}"', "../out.peft": "let n = 3"})
    found = only(main, "E506")
    assert why in found.message
    assert place(found) == ("main.peft", 2)


def test_a_used_file_leaves_the_folder_no_more_than_the_first(write: Write) -> None:
    main = write(
        {
            "main.peft": 'use "lib/a.peft"',
            "lib/a.peft": 'let n = 1\nuse "../../out.peft"',
            "../out.peft": "let m = 3",
        }
    )
    assert place(only(main, "E506")) == ("a.peft", 2)


def test_a_symlink_that_leads_out(write: Write) -> None:
    files = {"main.peft": 'use "in.peft" use "lib/out.peft"', "../out.peft": "let n = 3"}
    main = write(files)
    (main.parent / "in.peft").symlink_to("../out.peft")
    (main.parent / "lib").symlink_to("..", target_is_directory=True)
    assert [d.code for d in refused(main)] == ["E506", "E506"]


def test_a_missing_file_and_the_nearest(write: Write) -> None:
    main = write({"main.peft": 'use "scle.peft"\nuse "no/where.peft"', "scale.peft": SCALE})
    first, second = refused(main)
    assert (first.code, first.hint) == ("E501", "did you mean `scale.peft`?")
    assert first.span is not None
    assert first.span.text == 'use "scle.peft"'
    assert (second.code, second.hint) == ("E501", "check the path")


def test_what_is_no_file_is_not_opened(write: Write) -> None:
    main = write({"main.peft": 'use "pipe.peft" use "folder.peft"', "folder.peft/a.peft": ""})
    os.mkfifo(main.parent / "pipe.peft")
    assert {d.code for d in refused(main)} == {"E501"}


def test_mistakes_of_all_files_are_reported_at_their_places(write: Write) -> None:
    main = write(
        {
            "main.peft": 'use "a.peft" use "b.peft" use "a.peft" match q apply scale()',
            "a.peft": "let n = \nlet m = 2",
            "b.peft": "let k = 2\n\nlet m = * 3",
        }
    )
    found = refused(main)
    assert [place(d) for d in found] == [("a.peft", 2), ("b.peft", 3)]
    assert {d.code for d in found} == {"E003"}


def test_a_definition_that_is_wrong_is_shown_in_its_file(write: Write) -> None:
    main = write(
        {
            "main.peft": 'use "a.peft"\nmatch q apply scale()',
            "a.peft": f"{SCALE.replace('k * s', 'k * t')}let n = unknown",
        }
    )
    found = surgery.check(main)
    assert {place(d) for d in found} == {("a.peft", 3), ("a.peft", 5)}
    assert {d.code for d in found} == {"E101"}


def test_what_is_no_text(write: Write) -> None:
    main = write({"main.peft": 'use "a.peft"', "a.peft": ""})
    (found,) = refused(main)
    assert (found.code, str(main.parent / "a.peft") in str(found)) == ("E005", True)
    (main.parent / "a.peft").write_bytes(b"let n = \xff\xfe")
    (found,) = refused(main)
    assert (found.code, str(main.parent / "a.peft") in found.message) == ("E001", True)


@pytest.mark.parametrize(
    ("statement", "word"),
    [
        ("match q apply lora()", "match"),
        ("adapter a { match q apply lora() }", "adapter"),
        ("activate none", "activate"),
    ],
)
def test_a_used_file_only_defines(statement: str, word: str, write: Write) -> None:
    main = write({"main.peft": 'let m = 1 use "a.peft"', "a.peft": f"let n = 2\n{statement}"})
    found = only(main, "E128")
    assert place(found) == ("a.peft", 2)
    assert found.span is not None
    assert found.span.text == word
    assert found.related[0][1].text == 'use "a.peft"'


def test_two_used_files_that_define_a_name(write: Write) -> None:
    files = {
        "main.peft": 'use "a.peft"\nuse "b.peft"',
        "a.peft": f"let n = 2\n{SCALE}{FORMAT}",
        "b.peft": f"param n: int = 3\n{SCALE}{FORMAT}",
    }
    main = write(files)
    found = refused(main)
    assert [d.code for d in found] == ["E107"] * 3
    assert [place(d) for d in found] == [("b.peft", line) for line in (1, 2, 6)]
    assert [Path(d.related[0][1].source.name).name for d in found] == ["a.peft"] * 3
    main.write_text(f"{files['main.peft']}\nlet n = 1\n{SCALE}")
    assert kinds(surgery.load(main)) == ["Let", "Method"]


def test_a_name_twice_in_one_used_file_is_that_files_mistake(write: Write) -> None:
    main = write({"main.peft": 'use "a.peft"', "a.peft": "let n = 1\nlet n = 2"})
    (found,) = surgery.check(main)
    assert (found.code, place(found)) == ("E107", ("a.peft", 2))


def test_a_value_never_changes_its_meaning_by_being_used(write: Write) -> None:
    files = {
        "main.peft": 'use "a.peft"\nlet rank = 32',
        "a.peft": "param rank: int = 8\nlet alpha = 2 * rank",
    }
    main = write(files)
    found = only(main, "E129")
    assert place(found) == ("a.peft", 2)
    assert found.related[0][1].text == "let rank = 32"
    main.write_text(f"{files['main.peft']}\nlet alpha = 2 * rank")
    assert kinds(surgery.load(main)) == ["Let", "Let"]
    # nor by taking a name that its own file lacks
    main.write_text('let rank = 32\nuse "b.peft"')
    (main.parent / "b.peft").write_text("let alpha = 2 * rank")
    assert place(only(main, "E129")) == ("b.peft", 1)


def test_a_text_uses_nothing(write: Write, tmp_path: Path) -> None:
    write({"main.peft": "let n = 1"})
    text = 'use "main.peft"\nmatch q apply lora()'
    for spec in (text, surgery.parse(text), surgery.parse(text, str(tmp_path / "specs/x.peft"))):
        (found,) = surgery.check(spec)
        assert (found.code, bool(found.hint)) == ("E130", True)
        assert found.span is not None
        assert found.span.text == 'use "main.peft"'
        with pytest.raises(SurgeryError, match="E130"):
            surgery.plan(spec, model())


# ------------------------------------------------------------------------------------- limits


def chain(count: int) -> dict[str, str]:
    """So many files, each of which uses the next."""
    files = {f"f{i}.peft": f'use "f{i + 1}.peft" let n{i} = {i}' for i in range(count - 1)}
    return {"main.peft": 'use "f0.peft"', **files, f"f{count - 1}.peft": "let last = 1"}


def test_as_many_files_as_there_may_be(write: Write) -> None:
    assert len(surgery.load(write(chain(MAX_FILES - 1))).statements) == MAX_FILES - 1


def test_too_many_files(write: Write) -> None:
    assert f"more than {MAX_FILES} files" in only(write(chain(MAX_FILES)), "E002").message
    uses = "\n".join(f'use "g{i}.peft"' for i in range(MAX_FILES + 9))
    files = {f"g{i}.peft": f"let n{i} = {i}" for i in range(MAX_FILES + 9)}
    found = only(write({**files, "main.peft": uses}), "E002")
    assert place(found) == ("main.peft", MAX_FILES)


def test_too_many_bytes(write: Write) -> None:
    third = f"# {'x' * (MAX_BYTES // 3)}\n"
    files = {f"{n}.peft": f"{third}let {n} = 1" for n in "abc"}
    main = write({"main.peft": 'use "a.peft" use "b.peft"', **files})
    assert kinds(surgery.load(main)) == ["Let", "Let"]
    main.write_text('use "a.peft" use "b.peft" use "c.peft"')
    assert "bytes" in only(main, "E002").message
    (main.parent / "a.peft").write_text(third * 4)
    main.write_text('use "a.peft"')
    assert place(only(main, "E002")) == ("main.peft", 1)
