"""A kernel in C that multiplies rows of a matrix where they lie, compiled on first use."""
