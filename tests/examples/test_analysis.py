"""The example of an analysis, as a user runs it."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples" / "analysis.py"


def test_a_script_is_an_analysis_with_processes_report_and_figure(tmp_path):
    arguments = ["--seeds", "6", "--widths", "4", "8", "--workers", "2"]
    text = SCRIPT.read_text().replace("seconds=0.1", "seconds=1.0")
    (tmp_path / "mine.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "mine.py", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 claims: " in done.stdout
    assert "Redraw:  python mine.py --redraw results/direction/" in done.stdout
    [folder] = (tmp_path / "results" / "direction").glob("2*")
    assert "measuring in 2 processes" in (folder / "log.txt").read_text()
    assert (folder / "figures" / "cosine.pdf").read_bytes().startswith(b"%PDF")
    assert "uphill" in (folder / "report.md").read_text()


def test_it_is_as_short_as_it_claims():
    assert len(SCRIPT.read_text().splitlines()) <= 100
