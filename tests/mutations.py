"""The mistakes that `make mutate` makes, and the tests that must notice each of them."""

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
                "tests/mutations.py has to follow the code"
            )
        return text.replace(self.old, self.new)


WIRING = ("tests/training/test_wiring.py",)

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        "learning rate of step 0 at every step",
        "pipeline/training/trainer.py",
        "self._set_learning_rate(self.learning_rate(step))",
        "self._set_learning_rate(self.learning_rate(0))",
        WIRING,
    ),
)
