"""Training what a pathway keeps, beside the dense model trained equally."""
