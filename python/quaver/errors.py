"""The one error that `quaver` reports as a single line instead of a traceback."""

__all__ = ["UsageError"]


class UsageError(ValueError):
    """A mistake in what the caller gave: a flag, a file, a configuration. The text says it all."""
