"""The language: text to a typed syntax tree, with diagnostics that point into the source."""
