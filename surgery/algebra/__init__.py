"""Sizes, expressions, operators and rewriting: everything a method's equation is made of."""
