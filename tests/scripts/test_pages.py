"""README.md and docs/guides as a reader follows them: every command, file and line of code, in order, as written.

The commands that train get options that make them short; see tests/helpers/pages.py.
"""

import json

import pytest

from tests.helpers.pages import PAGES, ROOT, Checkout, steps

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("pages")]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Checkout:
    return Checkout(tmp_path_factory.mktemp("checkout"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_works_as_written(checkout, page):
    for step in steps(page):
        checkout.take(step)


def test_the_notebook_works_as_written(checkout):
    """Its cells, as one program in the notebook's folder, on the run that the README's first command makes."""
    notebook = json.loads((ROOT / "docs/tour.ipynb").read_text())
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(code) > 6
    checkout.take(steps(ROOT / "README.md")[3])
    (checkout.folder / "docs").mkdir()
    (checkout.folder / "docs/tour.py").write_text("\n".join(code))
    checkout.run("bash", "-c", "cd docs && python tour.py", PYTHONPATH=str(checkout.folder))
