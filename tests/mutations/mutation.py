"""One deliberate mistake in the code."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """`old`, which occurs once in `file`, becomes `new`; then `tests` must fail.

    `file` is relative to the top of the repository; `tests` are files, or tests in them as pytest names them.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def applied(self, text: str) -> str:
        """The file's text with the mistake. Raises ValueError where the list no longer fits the code."""
        if text.count(self.old) != 1:
            raise ValueError(
                f"mutation {self.name}: {self.old!r} occurs {text.count(self.old)} times in {self.file}; "
                "tests/mutations has to follow the code"
            )
        return text.replace(self.old, self.new)
