"""The front page is short, its links work anywhere, and its tables come from the records."""

import ast
import pydoc
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer.main

import welore
import welore.cli.main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SITE, REPOSITORY = "https://welore.github.io/welore/", "https://github.com/welore/welore/blob/main/"
RAW = "https://raw.githubusercontent.com/welore/welore/main/"


def test_front_page_is_read_in_five_minutes() -> None:
    assert len(README.splitlines()) <= 150
    assert len(README.split()) <= 1200


def test_every_function_and_class_that_is_promised_can_be_imported() -> None:
    for name in welore.__all__:
        assert getattr(welore, name) is not None


def test_report_stays_a_function_after_its_module_was_imported() -> None:
    import welore.reporting.page

    assert callable(welore.report)
    assert welore.report is welore.reporting.page.report


def test_python_of_the_front_page_is_ten_lines() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 10
    assert ast.parse(code).body


def test_front_page_shows_three_commands() -> None:
    assert len(re.findall(r"^welore (\w+)", README, re.MULTILINE)) == 3


def test_commands_of_make_that_pages_name_are_targets() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    pages = [README, (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")]
    assert {name for page in pages for name in re.findall(r"(?:^|`)make (\w+)", page, re.MULTILINE)} <= targets
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_every_link_works_on_a_package_index_page() -> None:
    """No link is relative, and those into the repository or the site lead to something that is there."""
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    pages |= {"reference/cli.md", "reference/api.md", "contributing.md", "changelog.md"}  # made when the site is built
    for link in re.findall(r"\]\(([^)]+)\)", README):
        assert link.startswith("https://"), link
        for start in (REPOSITORY, RAW):
            if link.startswith(start):
                assert (ROOT / link.removeprefix(start)).is_file(), link
        if link.startswith(SITE):
            page = link.removeprefix(SITE).rstrip("/")
            assert pages & {f"{page}.md", f"{page}/index.md", f"{page}/README.md", f"{page}index.md"}, link


def test_package_metadata_is_complete() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {"Homepage", "Documentation", "Repository", "Issues", "Changelog"} <= set(project["urls"])
    assert all(url.startswith("https://") for url in project["urls"].values())
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert any(line.startswith("Programming Language :: Python :: 3.11") for line in project["classifiers"])


def test_every_renamed_option_of_the_changelog_is_an_option() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    renamed = re.findall(r"^\| `(--[\w-]+)` \| `(--[\w-]+)` \|", changelog, re.MULTILINE)
    assert len(renamed) > 15
    commands = typer.main.get_command(welore.cli.main.app).commands.values()  # type: ignore[attr-defined]
    options = {name for command in commands for parameter in command.params for name in parameter.opts}
    for old, new in renamed:
        assert new in options, new
        assert old not in options, old


def test_tables_are_made_from_the_records() -> None:
    pytest.importorskip("matplotlib")
    command = [sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_records_name_no_place_of_the_machine_that_made_them() -> None:
    for path in (ROOT / "docs").rglob("*.json"):
        assert not re.search(r'"(/|~|[A-Z]:\\)', path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_inside_the_repository_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert ((ROOT / page).parent / link).exists(), link


def test_functions_named_in_the_method_exist() -> None:
    named = re.findall(r"`((?:\w+\.)+)(\w+)[`(]", (ROOT / "docs" / "method.md").read_text())
    rooms = {path.name for path in (ROOT / "src" / "welore").iterdir() if path.is_dir()}
    names = {(path + name) for path, name in named if path.split(".")[0] in rooms}
    assert len(names) > 30
    for name in sorted(names):
        assert pydoc.locate(f"welore.{name}") is not None, name
