"""The language: text to a typed syntax tree, with diagnostics that point into the source."""

VERSION = 1
"""Of the language. A file that a newer one wrote may mean what this one does not know."""
