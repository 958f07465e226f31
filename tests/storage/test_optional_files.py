"""Files that a run can do without: faults are tolerated, logged once, and leave no half of anything."""

import resource

import pytest

from pipeline.storage.optional_files import OptionalFiles, append_lines


@pytest.fixture
def limit_files():
    """(bytes) -> from now on no file may become larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_lines_are_appended_completely_or_not_at_all(tmp_path, limit_files):
    path = tmp_path / "lines"
    append_lines(path, "first\n")
    limit_files(10)
    with pytest.raises(OSError, match="No space left|File too large"):
        append_lines(path, "second\nthird\n")
    limit_files(100)
    append_lines(path, "fourth\n")
    assert path.read_text() == "first\nfourth\n"


def test_the_first_fault_of_each_kind_is_logged(tmp_path, caplog):
    (tmp_path / "full").symlink_to("/dev/full")
    files = OptionalFiles()
    for kind in ("pictures", "pictures", "lines"):
        with files.writing(kind, tmp_path / "full"), (tmp_path / "full").open("w") as file:
            file.write("x")
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert f"{tmp_path}/full could not be written: No space left on device" in caplog.text
    with pytest.raises(ValueError, match="other"), files.writing("pictures", tmp_path):
        raise ValueError("other")
