"""What a worker raises for a case that it cannot run by its nature, not by a fault."""

from __future__ import annotations


class CannotRun(Exception):
    """The runtime has no way to run the case; the text is for people and stands alone."""
