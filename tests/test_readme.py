"""The code in README.md and on the pages of docs/ runs as it stands, and links between files of the repository hold."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
WITH_CODE = ["README.md", *(page for page in PAGES if "```python\n" in (ROOT / page).read_text(encoding="utf-8"))]
OTHERS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "examples/*/*.md", "benchmarks/*.md")
    for path in ROOT.glob(pattern)
)


def test_pages_with_code_are_found():
    assert len(WITH_CODE) >= 10


@pytest.mark.parametrize("page", WITH_CODE)
def test_the_blocks_of_a_page_run_in_their_order(page):
    pytest.importorskip("sklearn")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    names = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, page, "exec", dont_inherit=True), names)


@pytest.mark.parametrize("page", OTHERS + PAGES)
def test_links_to_files_of_the_repository_lead_somewhere(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", text)
    assert [target for target in targets if not ((ROOT / page).parent / target).exists()] == []


def test_the_script_of_the_pictures_draws_those_that_the_pages_show(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    specification = importlib.util.spec_from_file_location("pictures", ROOT / "docs" / "pictures.py")
    pictures = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(pictures)
    monkeypatch.setattr(pictures, "IMAGES", tmp_path)
    pictures.main()
    shown = {target for page in PAGES for target in re.findall(r"images/(\w+\.png)", (ROOT / page).read_text())}
    assert {path.name for path in tmp_path.iterdir()} <= shown
    assert len(list(tmp_path.iterdir())) == 3
