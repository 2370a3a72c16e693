"""Measurements: quality beside controls, speed beside dense."""
