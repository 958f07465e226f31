"""Every write of a run fails: training continues without what it can do without, and ends with one line."""

import re
import sys
import textwrap
from pathlib import Path

import pytest

from tests.helpers.launching import run_command
from tests.helpers.recipes import write_tiny_recipe, write_tiny_set
from tests.helpers.run_folders import read_lines

LIMITED = """
    import functools, resource, sys
    from pipeline import train
    from pipeline.run import session
    session.CheckpointWriter = functools.partial(session.CheckpointWriter, retry_after=(0.01,))
    limit = int(sys.argv.pop(1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.exit(train.main())
"""
"""train.py in a process for which the kernel refuses (EFBIG) what would make a file larger than the limit. (Python's
search for a temporary folder writes 4 bytes.)"""

KINDS = ("log.txt", "metrics.jsonl", "status.json", "config.yaml", "run_id", "data_trace.jsonl", "samples/")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    (folder / "limited.py").write_text(textwrap.dedent(LIMITED))
    pictures = {"every": 2, "count": 4, "reconstructions": 4}
    return write_tiny_recipe(folder, write_tiny_set(folder / "data"), data={"trace": True}, samples=pictures)


@pytest.mark.parametrize(("limit", "complete"), [(4, ()), (1000, ("run_id", "status.json"))])
def test_training_continues_and_each_kind_of_file_is_named_once(recipe, tmp_path, limit, complete):
    run_dir = tmp_path / "run"
    arguments = ["--config", str(recipe), "--run-dir", str(run_dir)]
    root = str(Path(__file__).parents[2])
    ended = run_command(sys.executable, str(recipe.parent / "limited.py"), str(limit), *arguments, PYTHONPATH=root)
    output = ended.stderr
    assert "step 6/6" in output
    assert ended.returncode == 2, output
    assert output.splitlines()[-1].startswith("error: ")
    assert "the checkpoint of step 6 could not be written" in output.splitlines()[-1]
    assert "Traceback" not in output
    for kind in set(KINDS) - set(complete):
        lines = [line for line in output.splitlines() if line.startswith(f"{run_dir}/{kind}")]
        assert len(lines) == 1, (kind, output)
        assert re.search("file too large|no space left", lines[0], re.IGNORECASE)
    assert {path.name for path in run_dir.rglob("*") if ".partial" in path.name or "writing" in path.name} == set()
    for name in complete:
        assert (run_dir / name).stat().st_size > 0
    assert all(line["keys"] for line in read_lines(run_dir / "data_trace.jsonl"))
