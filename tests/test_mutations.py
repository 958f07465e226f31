"""The list of `make mutate` fits the code, and its runner tells a noticed mistake from one that survives."""

from collections import Counter
from pathlib import Path

import pytest

from tests.helpers.launching import ROOT
from tests.mutate import report, try_mutation
from tests.mutations import MUTATIONS, Mutation

FOLDERS = (
    "pipeline/training",
    "pipeline/evaluation",
    "pipeline/storage",
    "pipeline/distributed",
    "pipeline/data/order",
)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_fits_the_code(mutation):
    text = (ROOT / mutation.file).read_text()
    compile(mutation.applied(text), mutation.file, "exec")
    assert mutation.old != mutation.new
    for test in mutation.tests:
        assert (ROOT / test.partition("::")[0]).is_file(), test


def test_the_list_covers_what_it_is_for():
    assert len(MUTATIONS) >= 60
    assert max(Counter(mutation.name for mutation in MUTATIONS).values()) == 1
    for folder in FOLDERS:
        assert sum(mutation.file.startswith(folder) for mutation in MUTATIONS) >= 3, folder


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "arithmetic.py").write_text("def double(x):\n    return 2 * x\n")
    (tmp_path / "test_strong.py").write_text(
        "from arithmetic import double\ndef test_it():\n    assert double(3) == 6\n"
    )
    (tmp_path / "test_weak.py").write_text("from arithmetic import double\ndef test_it():\n    assert double(0) == 0\n")
    return tmp_path


@pytest.mark.parametrize(("test", "killed"), [("test_strong.py", True), ("test_weak.py", False), ("none.py", False)])
def test_only_a_failing_test_kills(tree, test, killed):
    mutation = Mutation("doubles wrongly", "arithmetic.py", "2 * x", "3 * x", (test,))
    outcome = try_mutation(tree, mutation, timeout=60)
    assert outcome.killed is killed, outcome.output
    assert ("SURVIVED" in report([outcome])) is not killed
    assert "2 * x" in (tree / "arithmetic.py").read_text()
