"""What the front page promises is there: its verbs, its tree, its Python, its tables."""

import ast
import pydoc
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

import welore
import welore.cli.main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_verb_of_the_command_line_is_in_the_table_and_the_other_way_round() -> None:
    verbs = {command.callback.__name__ for command in welore.cli.main.app.registered_commands}
    assert set(re.findall(r"^\| `welore (\w+)", README, re.MULTILINE)) == verbs


def test_every_function_and_class_that_is_promised_can_be_imported() -> None:
    for name in welore.__all__:
        assert getattr(welore, name) is not None
    for name in re.findall(r"welore\.(\w+)\(", README):
        assert name in welore.__all__


def test_report_stays_a_function_after_its_module_was_imported() -> None:
    import welore.reporting.page

    assert callable(welore.report)
    assert welore.report is welore.reporting.page.report


def test_five_lines_are_python() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(ast.parse(code).body) == 5


def test_tree_lists_every_module() -> None:
    tree = README.split("## The tree")[1].split("```")[1]
    listed = sorted(re.findall(r"\b(\w+)\.py\b", tree))  # two may have one name, in two rooms
    assert listed == sorted(path.stem for path in (ROOT / "src" / "welore").rglob("*.py") if path.stem != "__init__")


def test_commands_of_the_front_page_are_targets_of_make() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`?make (demo|test|install|benchmarks|\w+)`? ", README)) - {"and"} <= targets | {"it"}
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_commands_of_the_front_page_parse() -> None:
    commands = re.findall(r"^welore (.*)", README, re.MULTILINE)
    assert {command.split()[0] for command in commands} >= {"compress", "finetune", "evaluate", "score", "report"}
    parser: Any = typer.main.get_command(welore.cli.main.app)
    for command in commands:
        verb, *words = shlex.split(command)
        assert parser.commands[verb].make_context(verb, words).params, command


def test_tables_are_made_from_the_records() -> None:
    pytest.importorskip("matplotlib")
    command = [sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_records_name_no_place_of_the_machine_that_made_them() -> None:
    for path in (ROOT / "docs").rglob("*.json"):
        assert not re.search(r'"(/|~|[A-Z]:\\)', path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
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
