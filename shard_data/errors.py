"""Errors that a user can mend. The command line prints them as one line and exits with code 2."""


class DataError(ValueError):
    """Input or an output folder that cannot be used as it is; the message names the thing and the remedy."""


class Damaged(DataError):
    """A shard set that is not what its maker wrote."""


class AlreadyComplete(DataError):
    """The output folder holds a complete shard set and overwriting was not asked for."""
