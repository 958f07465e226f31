"""What the commands share: other commands that they start."""

import os
import re
import time

import pytest

from pipeline import cli
from pipeline.cli import ROOT, CommandLine, run_python
from shard_data import progress


@pytest.mark.parametrize("columns", range(40, 100, 7))
def test_help_breaks_no_word_at_its_hyphen(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    parser = CommandLine("x.py", "About.")
    parser.add_argument("model", help="a run folder, or hf-hub:OWNER/NAME; `x.py --dry-run` writes\n nothing")
    text = parser.format_help()
    assert {"hf-hub:OWNER/NAME;", "--dry-run`"} <= set(text.split())
    assert "writes nothing" in " ".join(text.split())


STANDS_STILL = """
import subprocess, sys, time
from shard_data.progress import advance
for _ in range(8):
    time.sleep(0.5)
    advance()
open(sys.argv[1], "w").close()
time.sleep(1000)
"""


def test_a_command_that_makes_no_progress_is_killed(tmp_path):
    """Not while it advances: for twice the timeout."""
    before, start = progress.count(), time.monotonic()
    with pytest.raises(ValueError, match=re.escape("` made no progress for 2 s and was ended")):
        run_python("-c", STANDS_STILL, str(tmp_path / "advanced"), progress_timeout=2)
    assert (tmp_path / "advanced").exists()
    assert progress.count() - before == 8
    assert time.monotonic() - start < 60


def test_a_command_finds_this_project_and_what_is_on_the_users_path(tmp_path, monkeypatch):
    """On a cluster, PYTHONPATH may be where torch is."""
    (tmp_path / "from_a_module_system.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    run_python("-P", "-c", "import from_a_module_system, pipeline")


def test_a_command_that_fails_is_named():
    with pytest.raises(ValueError, match="`python -c 'import sys; sys.exit.3.'` ended with exit code 3; see above"):
        run_python("-c", "import sys; sys.exit(3)", progress_timeout=60)


def test_a_commands_own_commands_do_not_get_the_pipe():
    """They could outlive it, and their progress would be taken for its own."""
    code = (
        "import os; from shard_data import progress; assert progress._pipe; assert progress.VARIABLE not in os.environ"
    )
    run_python("-c", code)


def test_only_a_pipe_is_written_to(tmp_path, monkeypatch):
    with (tmp_path / "file").open("w") as file:
        monkeypatch.setenv(progress.VARIABLE, str(file.fileno()))
        assert progress._take_pipe() is None
    monkeypatch.setenv(progress.VARIABLE, "none")
    assert progress._take_pipe() is None


def test_a_copy_of_the_code_names_the_scripts_of_the_checkout_that_it_runs_in(tmp_path, monkeypatch):
    """As in a SLURM job, where console commands need not be in PATH."""
    command = "python pipeline/report.py runs/nvae --serve"
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    monkeypatch.chdir(ROOT)
    assert cli.as_called(command) == command
    monkeypatch.chdir(tmp_path)
    assert cli.as_called(command) == "nvae-report runs/nvae --serve"


def test_a_mistake_on_the_command_line_is_one_line(capsys):
    parser = CommandLine("edit.py", "About.")
    parser.add_argument("--strength", metavar="S")
    dash = "expected one argument, and one that begins with a dash as --strength=-1"
    for words, message in {
        "--strength -1..2": f"argument --strength: {dash}",
        "--strenght=1": "unrecognized arguments: --strenght=1; did you mean --strength?",
        "--epochs 1": "unrecognized arguments: --epochs 1",
    }.items():
        with pytest.raises(SystemExit, match="2"):
            parser.parse_args(words.split())
        assert capsys.readouterr().err == f"edit.py: error: {message} (see --help)\n"
    assert parser.parse_args(["--strength=-1..2"]).strength == "-1..2"


def test_a_fault_of_the_system_is_reported_without_its_number(tmp_path, capsys):
    assert cli.run_tool(lambda: (tmp_path / "missing" / "a.png").write_text("")) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/missing/a.png: No such file or directory\n"


@pytest.mark.parametrize("letters", [1, 1_000_000])
def test_a_reader_that_ends_early_is_no_error(letters, monkeypatch, capsys):
    """As in `| head -1`: noticed when the command ends, or while it prints."""
    reader, writer = os.pipe()
    os.close(reader)
    with monkeypatch.context() as patched, open(writer, "w") as printed:
        patched.setattr("sys.stdout", printed)
        assert cli.run_tool(lambda: print("x" * letters)) == 0
    assert capsys.readouterr().err == ""


def test_another_broken_pipe_is_an_error(capsys):
    def write() -> None:
        raise BrokenPipeError("the service has gone")

    assert cli.run_tool(write) == 2
    assert capsys.readouterr().err == "error: the service has gone\n"
