"""The documentation builds, its links lead somewhere, and pages stay apart from the log."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

import welore
import welore.cli.main

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
LIMIT = 60  # seconds; the build takes a few


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


def test_pages_do_not_link_to_the_log_of_experiments() -> None:
    for page in (*PAGES, ROOT / "README.md"):
        assert "LOG.md" not in page.read_text(encoding="utf-8"), page
