"""README.md and docs: links lead somewhere, settings exist, and quoted messages are those of the code."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from pipeline.models.nvae_options import ReleaseOptions
from tests.helpers.pages import BLOCK, PAGES, ROOT, steps, why_not_run

DOCS = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]
GUIDES = sorted((ROOT / "docs/guides").glob("*.md"))
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(#[^)\s]*)?\)")
SECTIONS = "model|data|condition|train|objective|regularizers|optim|validation|samples|checkpoint|tracking"
SETTING = re.compile(rf"`((?:{SECTIONS})(?:\.[a-z_]+)+)(?==|`)")
FILES = r"\.(py|md|json|yaml|safetensors|png)$"
OTHERS = {
    "migration.md": {"data.binarise", "data.binarization_seed", "data.transform"},  # a former name; facts of a report
    "settings.md": {"data.binarise"},
    "your_model.md": {"model.bias"},  # the guide adds it
}
"""What looks like a setting, by page."""

MESSAGES = [text.strip() for _, text in BLOCK.findall((ROOT / "docs/troubleshooting.md").read_text())]

each_page = pytest.mark.parametrize("page", DOCS, ids=lambda page: str(page.relative_to(ROOT)))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text()), re.M)
    return {"#" + re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@each_page
def test_links_lead_somewhere(page):
    missing = []
    for name, anchor in LINK.findall(page.read_text()):
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            missing.append(name + anchor)
    assert missing == []


@each_page
def test_settings_that_are_named_exist(page):
    known = (ROOT / "docs/settings.md").read_text()
    named = {name for name in SETTING.findall(BLOCK.sub("", page.read_text())) if not re.search(FILES, name)}
    assert {name for name in named if f"- `{name}`" not in known and f"- `{name}." not in known} == OTHERS.get(
        page.name, set()
    )


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_a_guide_says_what_one_has_at_the_end_and_how_long_it_takes(page):
    text = page.read_text()
    head = text.split("\n## ")[0]
    assert head.startswith("# ")
    assert "**At the end you have**" in head
    assert "**Time**" in head
    assert len(text.splitlines()) <= 160


def test_most_commands_of_the_pages_are_run():
    commands = [step.text for page in PAGES for step in steps(page) if step.kind == "bash"]
    assert len(commands) > 60
    assert sum(why_not_run(command) is not None for command in commands) < 0.15 * len(commands)


@pytest.mark.parametrize("change", [step.text for page in PAGES for step in steps(page) if step.kind == "diff"])
def test_a_change_that_a_guide_shows_fits_the_code(change):
    command = ["git", "apply", "--check", "--unidiff-zero", "-"]
    checked = subprocess.run(command, input=change, cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_every_option_of_the_release_is_explained():
    text = (ROOT / "docs/guides/from_the_release.md").read_text()
    assert {name for name in ReleaseOptions.model_fields if f"`{name}`" not in text} == set()


def texts(path: Path) -> list[list[str | None]]:
    """The strings of a file in pieces, with None for what is filled in: of f-strings, and of strings for `%`."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else None for part in node.values]
            found.append([piece for part in parts for piece in pieces_of(part)])
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(pieces_of(node.value))
    return found


def pieces_of(part: str | None) -> list[str | None]:
    """A constant string in pieces, with None for each `%s`."""
    if part is None:
        return [None]
    first, *others = re.split(r"%[-+.\d]*[sdgrf]", part)
    return [first, *(piece for other in others for piece in (None, other))]


def start_of(text: list[str | None], message: str, is_cut: bool) -> int | None:
    """Where a text of the code begins that fits the message up to its end; None where it does not, or has few words.

    Where the message is cut, the text may be longer.
    """
    start, place, count, is_free = None, 0, 0, True
    for piece in filter(lambda piece: piece != "", text):
        if piece is None:
            start, is_free = start or 0, True
            continue
        found = message.find(piece, place) if is_free else place if message.startswith(piece, place) else -1
        if found < 0:
            ends = range(place, len(message) + 1) if is_free else [place]
            cut = next((end for end in ends if piece.startswith(message[end:])), None) if is_cut else None
            return None if cut is None else enough(start if start is not None else cut, count + len(message) - cut)
        start = found if start is None else start
        place, count, is_free = found + len(piece), count + len(piece), False
    return enough(start, count) if is_free or place == len(message) else None


def enough(start: int | None, count: int) -> int | None:
    """The start, unless fewer than 12 characters of the text are fixed."""
    return start if count >= 12 else None


def is_of_the_code(message: str, is_cut: bool, known: list[list[str | None]]) -> bool:
    """Whether texts of the code, one after the other, make this message; a name may stand before them."""
    starts = {start_of(text, message, is_cut) for text in known} - {None}
    return any(
        " " not in message[:start].strip() or is_of_the_code(message[:start], False, known) for start in sorted(starts)
    )


@pytest.fixture(scope="module")
def texts_of_the_code() -> list[list[str | None]]:
    paths = [path for folder in ("pipeline", "shard_data") for path in (ROOT / folder).rglob("*.py")]
    return [text for path in paths for text in texts(path)]


def test_there_are_twenty_messages():
    assert len(MESSAGES) >= 20


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: re.sub(r"\W+", "_", message[:40]))
def test_a_quoted_message_is_one_of_the_code(texts_of_the_code, message):
    shown = message.removesuffix("...").rstrip()
    assert is_of_the_code(shown, shown != message, texts_of_the_code), f"no text of the code gives: {message}"
