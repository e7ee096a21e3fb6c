"""Answers against labels, and against the eager model's answers to the same texts."""
