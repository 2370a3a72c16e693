"""Trainable FFN layers that take the place of a base's: sgatlin, and what it is compared with."""
