"""Scores, bounds and tables of an evaluation."""
