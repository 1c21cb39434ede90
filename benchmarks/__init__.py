"""Measurements: each module writes JSON, prints a table, and says what was inflated."""
