"""The pages: examples print what stands below them, tables name what there is, links lead somewhere."""

from __future__ import annotations

import ast
import dataclasses
import os
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import pyramid_rt
from pyramid_rt.decoding.methods import METHODS
from pyramid_rt.kernels.reference.sampling import DIVERGENCES
from pyramid_rt.params import Options, SamplingParams

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FILES = re.compile(
    r"https://(?:github\.com|raw\.githubusercontent\.com)/pyramid-rt/pyramid_rt/(?:blob/|tree/)?main/([^)#\s]*)"
)


def blocks(page: Path) -> list[tuple[str, str]]:
    """The fenced blocks of a page: language and text."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def examples(page: Path) -> list[tuple[str, str | None]]:
    """Python blocks, each with the text block that follows it at once: what it prints."""
    found, all_blocks = [], blocks(page)
    for index, (language, code) in enumerate(all_blocks):
        after = all_blocks[index + 1] if index + 1 < len(all_blocks) else ("", "")
        if language == "python":
            found.append((code, after[1] if after[0] == "text" else None))
    return found


def names_in_table(page: str, heading: str) -> list[str]:
    """Names in backticks in the first column of the tables under a heading."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    section = re.split(r"^## ", text, flags=re.MULTILINE)
    part = next(part for part in section if part.startswith(f"{heading}\n"))
    cells = re.findall(r"^\| (`[^|]*) \|", part, re.MULTILINE)
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


@pytest.mark.parametrize("page", [page for page in PAGES if examples(page)], ids=lambda page: page.stem)
def test_examples_print_what_stands_below_them(page: Path, tmp_path: Path) -> None:
    """A page's blocks run in one program, top to bottom, on a CPU as a reader without a GPU would run them."""
    marker = "<next block>"
    shown = [printed for _, printed in examples(page)]
    assert None not in shown, f"{page.name}: an example without the text it prints"
    program = f"\nprint({marker!r})\n".join(code for code, _ in examples(page))
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    printed = re.split(rf"(?:^|(?<=\n)|(?<=.)){marker}\n", done.stdout)
    assert [text.rstrip("\n") for text in printed] == [
        text.rstrip("\n") for text in shown if text is not None
    ]


def test_options_page_names_every_option() -> None:
    listed = names_in_table("options.md", "Of a call")
    assert sorted(listed) == sorted(typing.get_type_hints(Options))
    text = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    for field in dataclasses.fields(SamplingParams):
        if field.name not in listed:  # what it keeps for itself
            continue
        default = re.search(rf"^\| `{field.name}` \| `?([^|`]*)`? \|", text, re.MULTILINE)
        assert default is not None, field.name
        said = {"none": (None, ()), "no": (False,), "yes": (True,)}.get(default[1])
        expected = field.default
        assert expected in said if said is not None else str(expected).removesuffix(".0") == default[1], (
            f"{field.name}: the page says {default[1]!r}, the default is {expected!r}"
        )


def test_options_page_names_every_option_of_loading() -> None:
    hints = typing.get_type_hints(pyramid_rt.load)
    assert names_in_table("options.md", "Of loading") == [
        name for name in hints if name not in ("weights_dir", "return")
    ]


def test_statistics_page_names_every_statistic() -> None:
    for heading, record in (("Of the whole", pyramid_rt.Stats), ("Of each tier", pyramid_rt.TierStats)):
        listed = names_in_table("statistics.md", heading)
        assert listed == [field.name for field in dataclasses.fields(record)], heading


def test_methods_page_names_every_method_and_divergence() -> None:
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    table = text.split("\n## ")[0]
    assert sorted(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == sorted(METHODS)
    plain = {name for name in names_in_table("methods.md", "Divergences") if name != "topk_"}
    assert plain | {f"topk_{name}" for name in plain} == set(DIVERGENCES)


def test_api_page_shows_every_public_name() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^::: pyramid_rt\.(\w+)$", text, re.MULTILINE)) == sorted(pyramid_rt.__all__)


def test_errors_are_explained() -> None:
    errors = {
        name
        for name in pyramid_rt.__all__
        if isinstance(getattr(pyramid_rt, name), type) and issubclass(getattr(pyramid_rt, name), Exception)
    }
    assert set(names_in_table("embedding.md", "Errors")) - {"partial"} == errors - {"PyramidError"}


def test_layout_page_shows_the_tree() -> None:
    """Every file it names is there, and every room is named."""
    tree = next(code for language, code in blocks(ROOT / "docs" / "layout.md") if language == "text")
    folders: list[str] = []
    named = set()
    for line in tree.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        if name.endswith("/"):
            folders[min(depth, len(folders)) :] = [name]
            named.add("".join(folders))
        else:
            named.add("".join(folders) + name)
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing, f"named and not there: {missing}"
    rooms = {
        f"{file.parent.relative_to(ROOT)}/"
        for top in ("pyramid_rt", "kernels", "models", "bench")
        for file in (ROOT / top).rglob("__init__.py")
        if len(file.relative_to(ROOT).parts) <= 3
    }
    assert not rooms - named, f"there and not named: {sorted(rooms - named)}"


def test_glossary_is_sorted_and_explains_the_words_of_the_code() -> None:
    words = re.findall(
        r"^\| (?!word|---)([^|]+?) \|", (ROOT / "docs" / "glossary.md").read_text(), re.MULTILINE
    )
    assert words == sorted(words, key=str.lower)
    needed = (
        "recursion, tier, match, rejection, fuzzy, steps, cursor, readback, burst, horizon, commit, proposal"
    )
    needed += ", window, active flag, decode state, round plan, effective distribution"
    assert set(needed.split(", ")) <= set(words)


def test_readme_stands_alone_and_is_short() -> None:
    """The package index shows it too, where nothing lies beside it: links are absolute, and lead into this tree."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 155
    targets = re.findall(r"^\[[^\]]+\]: (\S+)$", text, re.MULTILINE) + re.findall(r"\]\(([^)\s]+)\)", text)
    assert targets
    assert [target for target in targets if not target.startswith(("https://", "#"))] == []
    used = set(re.findall(r"\]\[(\w+)\]", text))
    assert used == set(re.findall(r"^\[(\w+)\]: ", text, re.MULTILINE))


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "pyproject.toml"], ids=lambda page: page.name
)
def test_links_into_the_repository_lead_somewhere(page: Path) -> None:
    for target in FILES.findall(page.read_text(encoding="utf-8").replace('"', " ")):
        assert (ROOT / target).exists(), f"{page.name}: {target} is not in the tree"


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(page.name for page in PAGES if page.name != "README.md")


def test_python_blocks_are_python() -> None:
    for page in PAGES:
        for code, _ in examples(page):
            ast.parse(code)
