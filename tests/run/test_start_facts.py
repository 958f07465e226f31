"""The commit of the code that a run is started from."""

import subprocess

from pipeline.run.start_facts import revision


def git(folder, *words):
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    result = subprocess.run(["git", "-C", str(folder), *identity, *words], capture_output=True, text=True, check=True)
    return result.stdout.strip()


def test_the_commit_and_whether_files_differ_from_it(tmp_path):
    git(tmp_path, "init", "--quiet")
    assert revision(tmp_path) == ""  # no commit yet
    (tmp_path / "a.py").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "one")
    commit = git(tmp_path, "rev-parse", "HEAD")[:12]
    assert revision(tmp_path) == commit
    (tmp_path / "a.py").write_text("2")
    assert revision(tmp_path) == f"{commit}-dirty"


def test_a_folder_inside_of_another_project_s_checkout_has_none(tmp_path):
    """As where the package is installed in an environment that lies in a checkout."""
    test_the_commit_and_whether_files_differ_from_it(tmp_path)
    (tmp_path / "site-packages").mkdir()
    assert revision(tmp_path / "site-packages") == ""


def test_a_copy_of_a_slurm_job_states_it(tmp_path):
    (tmp_path / "REVISION").write_text("v1-3-gabcdef\n")
    assert revision(tmp_path) == "v1-3-gabcdef"
