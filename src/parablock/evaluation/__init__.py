"""Scores of a model: loss, exact match, multiple choice."""
