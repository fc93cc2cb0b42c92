"""RUN_DIR/report.html: what a run did, for people who would rather look than read. One file that needs no network."""

from __future__ import annotations

from pathlib import Path

from millrace.files import replace_text
from millrace.observe.report.page import render_page
from millrace.observe.report.record import read_run


def write_report(run_dir: Path) -> Path:
    """Write the report of what a run has recorded so far and return its path. Raises NoRun where no run has written."""
    path = run_dir / "report.html"
    replace_text(path, render_page(read_run(run_dir)))
    return path
