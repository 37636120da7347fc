"""`surgery fmt`: files in place, standard input, what it says, and what it leaves alone."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from surgery.cli.commands import app

ROUGH = "# why\nmatch  q   apply m( r = 8 )   # here\nlet a=Aᵀ"
FINE = "# why\nmatch q apply m(r=8)  # here\nlet a = Aᵀ\n"
BAD = "match q aply m()\n"


def run(*arguments: str | Path, stdin: bytes | None = None) -> Result:
    result = CliRunner().invoke(app, ["fmt", *map(str, arguments)], input=stdin)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def written(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def test_a_file_is_laid_out_in_place(tmp_path: Path) -> None:
    rough, fine = written(tmp_path / "a.peft", ROUGH), written(tmp_path / "b.peft", FINE)
    before = fine.stat()
    result = run(rough, fine)
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{rough}: formatted\n", "")
    assert rough.read_bytes() == fine.read_bytes() == FINE.encode()
    assert fine.stat().st_mtime_ns == before.st_mtime_ns
    assert fine.stat().st_ino == before.st_ino
    again = run(rough, fine)
    assert (again.exit_code, again.output) == (0, "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.peft", "b.peft"]


def test_line_ends_and_marks_of_other_systems(tmp_path: Path) -> None:
    path = written(tmp_path / "a.peft", "\ufeff# why\r\nmatch q apply m(r=8)  # here\r\nlet a = Aᵀ")
    assert run(path).exit_code == 0
    assert path.read_bytes() == FINE.encode()


@pytest.mark.skipif(os.name != "posix", reason="modes and links are those of posix")
def test_modes_and_links_stay(tmp_path: Path) -> None:
    path = written(tmp_path / "a.peft", ROUGH)
    path.chmod(0o640)
    link = tmp_path / "link.peft"
    link.symlink_to(path)
    assert run(link).exit_code == 0
    assert link.is_symlink()
    assert path.read_text() == FINE
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_standard_input_goes_to_standard_output() -> None:
    result = run("-", stdin=ROUGH.encode())
    assert (result.exit_code, result.stdout_bytes, result.stderr) == (0, FINE.encode(), "")
    assert run("-", stdin=FINE.encode()).stdout_bytes == FINE.encode()
    bad = run("-", stdin=BAD.encode())
    assert (bad.exit_code, bad.stdout) == (1, "")
    assert "<stdin>:1:9" in bad.stderr
    assert run("-", stdin=b"\xff").exit_code == 1


def test_check_names_what_would_change_and_writes_nothing(tmp_path: Path) -> None:
    rough, fine = written(tmp_path / "a.peft", ROUGH), written(tmp_path / "b.peft", FINE)
    result = run(rough, fine, "--check")
    assert (result.exit_code, result.stdout) == (1, f"{rough}: would be formatted\n")
    assert rough.read_text() == ROUGH
    assert (run(fine, "--check").exit_code, run(fine, "--check").output) == (0, "")
    assert run("-", "--check", stdin=ROUGH.encode()).exit_code == 1
    assert run("-", "--check", stdin=FINE.encode()).output == ""


def test_diff_is_one_that_patch_takes(tmp_path: Path) -> None:
    rough, fine = written(tmp_path / "a.peft", ROUGH), written(tmp_path / "b.peft", FINE)
    result = run(rough, fine, "--diff")
    assert result.exit_code == 0
    assert result.stdout == (
        f"--- {rough}\n+++ {rough}\n@@ -1,3 +1,3 @@\n # why\n"
        "-match  q   apply m( r = 8 )   # here\n"
        "-let a=Aᵀ\n"
        "\\ No newline at end of file\n"
        "+match q apply m(r=8)  # here\n"
        "+let a = Aᵀ\n"
    )
    assert rough.read_text() == ROUGH
    assert run(fine, "--diff").output == ""
    assert run(rough, "--diff", "--check").exit_code == 1


def test_other_files_are_done_where_one_is_no_spec(tmp_path: Path) -> None:
    bad, rough = written(tmp_path / "a.peft", BAD), written(tmp_path / "b.peft", ROUGH)
    result = run(bad, tmp_path / "none.peft", tmp_path, rough)
    assert result.exit_code == 1
    assert result.stdout == f"{rough}: formatted\n"
    assert f"{bad}:1:9" in result.stderr
    assert result.stderr.count("E501") == 2
    assert (bad.read_text(), rough.read_text()) == (BAD, FINE)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    path = written(tmp_path / "a.peft", ROUGH)
    tmp_path.chmod(0o555)
    result = run(path)
    tmp_path.chmod(0o755)
    assert result.exit_code == 1
    assert "E513" in result.stderr
    assert path.read_text() == ROUGH


def test_without_a_file_it_is_bad_usage() -> None:
    assert run().exit_code == 2
    assert "Usage" in run("--help").stdout


def test_a_terminal_of_another_encoding_gets_utf_8() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "surgery.cli", "fmt", "-"],
        input=ROUGH.encode(),
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.stdout == FINE.encode()
