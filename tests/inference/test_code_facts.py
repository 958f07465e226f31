"""What a report says of the code: the commit of this repository, whether files differ, and nothing of one around it."""

import subprocess

import pytest

from pipeline.inference import code_facts as module


@pytest.fixture
def facts(tmp_path, monkeypatch):
    """The facts of a copy of the code in tmp_path/repository."""
    package = tmp_path / "repository" / "pipeline"
    package.mkdir(parents=True)
    (package / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(module, "PACKAGE", package)
    return module.code_facts.__wrapped__


def git(folder, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True, text=True).stdout


def test_the_commit_and_whether_files_differ(facts, tmp_path):
    repository = tmp_path / "repository"
    git(repository, "init", "-q")
    git(repository, "add", ".")
    git(repository, "commit", "-qm", "first")
    commit = git(repository, "log", "-1", "--format=%H").strip()
    assert (facts()["commit"], facts()["dirty"]) == (commit, False)
    (repository / "pipeline" / "a.py").write_text("x = 2\n")
    assert (facts()["commit"], facts()["dirty"]) == (commit, True)


def test_a_repository_around_an_installation_is_not_that_of_the_code(facts, tmp_path, monkeypatch):
    git(tmp_path, "init", "-q")
    (tmp_path / "b.txt").write_text("b")
    git(tmp_path, "add", "b.txt")
    git(tmp_path, "commit", "-qm", "other")
    assert (facts()["commit"], facts()["dirty"]) == (None, None)
    monkeypatch.setenv("PATH", str(tmp_path))  # no git at all
    assert (facts()["commit"], facts()["dirty"]) == (None, None)
