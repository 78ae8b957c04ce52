"""Runs that others published: rows of a table, read into what ran and what was measured."""
