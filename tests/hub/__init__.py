"""A Hub of the tests' own: an HTTP server on this machine that speaks the Hub's protocol."""
