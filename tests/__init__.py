"""The tests. The Hub that they talk to is their own (``tests.hub``)."""

from tests.hub import endpoint as endpoint
