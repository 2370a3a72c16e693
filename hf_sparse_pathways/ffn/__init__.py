"""FFN blocks: where they are in a model, and how their kept neurons are computed."""
