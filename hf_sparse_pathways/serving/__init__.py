"""Serving a model with pathways over HTTP, as OpenAI's clients speak it."""
