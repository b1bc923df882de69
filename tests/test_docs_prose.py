"""The prose of code and pages: docstrings lead with a noun, and name no page that is not there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOPS = ("pyramid_rt", "kernels", "models", "bench", "tests", "examples")
QUESTIONS = ("What", "Where", "Which", "How", "Whether", "Who", "When")


def sources() -> Iterator[Path]:
    for top in TOPS:
        for file in sorted((ROOT / top).rglob("*.py")):
            if file.resolve() == file:  # links into kernels/ and models/ are those files again
                yield file


def docstrings(file: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "lineno", 1), text


def test_docstrings_lead_with_a_noun() -> None:
    found = [
        f"{file.relative_to(ROOT)}:{line}: {text.splitlines()[0]}"
        for file in sources()
        for line, text in docstrings(file)
        if text.split()[0].rstrip(",:") in QUESTIONS
    ]
    assert not found, "\n".join(found)


def test_no_page_is_named_that_is_not_there() -> None:
    """By its file's name anywhere, or in capitals as design notes are cited."""
    pages = {path.name for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]}
    files = [
        *sources(),
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        ROOT / "Makefile",
        ROOT / ".ci" / "run",
    ]
    for file in files:
        if file == Path(__file__):
            continue
        text = file.read_text(encoding="utf-8")
        named = set(re.findall(r"\b([A-Za-z_]+\.md)\b", text))
        assert named <= pages, f"{file.relative_to(ROOT)} names {sorted(named - pages)}"
        cited = re.findall(r"\b(?:DESIGN|HOUSE|STYLE|PAPER)\b", text)
        assert not cited, f"{file.relative_to(ROOT)} cites {sorted(set(cited))}"


def test_pages_hold_no_placeholders() -> None:
    """A word in capitals with an underscore, outside of code, waits for its text; the paper's methods do not."""
    found = []
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        prose = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        found += [
            f"{page.name}: {word}" for word in re.findall(r"\b(?!PSD_[AF]\b)[A-Z]{3,}_[A-Z_0-9]+\b", prose)
        ]
    assert not found, found
