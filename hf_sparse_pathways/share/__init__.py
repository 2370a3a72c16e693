"""Pathways in Hub repositories."""
