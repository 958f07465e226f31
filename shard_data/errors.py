"""Errors that a user can mend. The command line prints them as one line and exits with code 2."""


class DataError(ValueError):
    """Input or an output folder that cannot be used as it is; the message names the thing and the remedy."""


class BadImage(DataError):
    """One original that cannot be made into a picture."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)  # both, so that it travels whole between processes
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class Incomplete(DataError):
    """Originals are missing or unreadable, and `partial` was not asked for; the message lists them."""


class Damaged(DataError):
    """A shard set that is not what its maker wrote."""


class AlreadyComplete(DataError):
    """The output folder holds a complete shard set and overwriting was not asked for."""
