"""Weights of other code bases: one table of names a source format, and the files that they come in."""
