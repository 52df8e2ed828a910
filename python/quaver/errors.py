"""The errors that `quaver` reports as a single line instead of a traceback."""

__all__ = ["CheckpointError", "FileError", "UsageError"]


class UsageError(ValueError):
    """A mistake of the caller: a flag, a file, a configuration. The text is the whole message."""


class FileError(UsageError):
    """A file that is missing, damaged or foreign; the text names it."""


class CheckpointError(FileError):
    """A checkpoint that cannot be stored or does not fit; the text names the file and the key."""
