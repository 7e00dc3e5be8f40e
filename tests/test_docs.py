"""The documentation builds, its links lead somewhere, and its commands and snippets are those of this version."""

import ast
import contextlib
import dataclasses
import functools
import inspect
import io
import json
import os
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
from welore.config import CompressionConfig, RunOptions

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
USER_PAGES = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
SETTINGS = [name for name in welore.__all__ if name.endswith("Config") and name != "WeLoreConfig"]
LIMIT = 60  # seconds; the build takes a few


@pytest.mark.slow
def test_site_builds_without_a_warning_and_every_link_and_anchor_leads_somewhere(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=LIMIT, env=environment)
    assert run.returncode == 0, run.stderr
    reference = (tmp_path / "site" / "reference" / "cli" / "index.html").read_text(encoding="utf-8")
    app: Any = typer.main.get_command(welore.cli.main.app)
    for verb in app.commands:
        assert f"welore {verb}" in reference
    api = (tmp_path / "site" / "reference" / "api" / "index.html").read_text(encoding="utf-8")
    for name in welore.__all__:
        assert f"{name}</span>" in api or f".{name}" in api, name


@pytest.mark.parametrize("page", USER_PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_of_a_page_parse(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in re.findall(r"```yaml\n# (\S+)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        Path(name).write_text(content)
    parser: Any = typer.main.get_command(welore.cli.main.app)
    for command in commands(page):
        verb, *words = shlex.split(command, comments=True)
        if verb.startswith("-"):
            continue
        with contextlib.redirect_stderr(io.StringIO()):
            context = parser.commands[verb].make_context(verb, words)
        assert context.params, f"{page}: {command}"
        for word in context.args:  # options of transformers' TrainingArguments
            assert not word.startswith("--") or word[2:].replace("-", "_") in training_arguments(), command


@pytest.mark.parametrize("page", USER_PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_python_of_a_page_is_python_and_names_what_is_public(page: Path) -> None:
    for code in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        check_snippet(code, page)


def test_pages_do_not_link_to_the_log_of_experiments() -> None:
    for page in (*PAGES, ROOT / "README.md"):
        assert "research/LOG" not in page.read_text(encoding="utf-8"), page


@pytest.mark.slow
def test_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = json.loads((ROOT / "docs" / "notebooks" / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 4
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names: dict[str, Any] = {}
    for number, cell in enumerate(code, start=1):
        check_snippet(cell, ROOT / "docs" / "notebooks" / "quickstart.ipynb")
        exec(compile(cell, f"cell {number}", "exec"), names)
    assert names["result"].parameter_ratio == pytest.approx(0.7, abs=0.02)


@functools.cache
def training_arguments() -> set[str]:
    """Names of the fields of transformers' TrainingArguments."""
    from transformers import TrainingArguments

    return {field.name for field in dataclasses.fields(TrainingArguments)}


def commands(page: Path) -> list[str]:
    """The `welore` commands of a page's shell blocks, continued lines joined, launchers left out."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = [re.search(r"(?:^|--no-python |--no_python )welore (.*)", line) for line in lines]
    return [match[1].replace(" ...", "") for match in found if match]


def check_snippet(code: str, page: Path) -> None:
    """Every attribute of welore and every name imported from it is public; keyword arguments of configs are fields."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "welore":
            assert node.attr in welore.__all__, f"{page}: welore.{node.attr}"
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and ast.unparse(node.func.value) == "welore"
        ):
            promised = inspect.signature(getattr(welore, node.func.attr)).parameters
            names = {keyword.arg for keyword in node.keywords}
            names -= set(CompressionConfig.__dataclass_fields__) if node.func.attr == "WeLoreConfig" else set()
            names -= set(RunOptions.__annotations__) if "options" in promised else set()
            assert names <= set(promised), f"{page}: {names}"
        if isinstance(node, ast.ImportFrom) and node.module == "welore":
            assert {alias.name for alias in node.names} <= set(welore.__all__), page
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in SETTINGS:
            fields = getattr(welore, node.func.id).__dataclass_fields__
            assert {keyword.arg for keyword in node.keywords} <= set(fields), f"{page}: {node.func.id}"
