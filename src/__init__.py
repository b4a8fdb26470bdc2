"""Shared code of the five scripts; the README has a map of the modules."""
