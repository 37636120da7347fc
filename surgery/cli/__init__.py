"""The command line: the verbs of the Python API, one command each."""

from __future__ import annotations


def main() -> None:
    """Run the command that the process was called with."""
    from surgery.cli.commands import app  # imported late, so that importing the package is free

    app()


__all__ = ["main"]
