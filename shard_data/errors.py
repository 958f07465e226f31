"""Errors that a user can fix. The command line prints them as one line and exits with code 2."""


class DataError(ValueError):
    """Input, an option or an output folder that cannot be used. The message names it and the fix."""


class BadImage(DataError):
    """One original that cannot be converted to an image."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)  # both, so that the error can be pickled between processes
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class Incomplete(DataError):
    """Originals are missing or unreadable, and `partial` is not set. The message lists them."""


class Damaged(DataError):
    """The files of a shard set are not what its manifest says."""


class AlreadyComplete(DataError):
    """The output folder holds a complete shard set, and `overwrite` is not set."""
