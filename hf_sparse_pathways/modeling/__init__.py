"""Models with pathways: a base's own classes, derived from once more."""
