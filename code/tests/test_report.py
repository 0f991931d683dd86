"""The Makefile of the report, and macros.py: what they say when something is missing or broken."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from conftest import CODE

REPORT = CODE.parent / "report"
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def report(tmp_path):
    """A copy of the report's folder, without pictures, beside a copy of the code."""
    ignore = shutil.ignore_patterns("*.png", "*.pdf", "*.pt", "tests", "__pycache__")
    shutil.copytree(REPORT, tmp_path / "report", ignore=ignore)
    shutil.copytree(CODE, tmp_path / "code", ignore=ignore)
    (tmp_path / "code" / "tests").mkdir()
    (tmp_path / "code" / "tests" / "test.py").touch()
    return tmp_path / "report"


def run(command, folder, **environment):
    process = subprocess.run(command, cwd=folder, env={**os.environ, **environment},
                             capture_output=True, text=True, timeout=60)
    return process.returncode, process.stdout, process.stderr


# ------------------------------------------------------------------------------------ the Makefile
@needs_make
@pytest.mark.parametrize("name", ["frank", "van der Berg", "O'Brien", "Müller"])
def test_a_name_can_have_spaces_and_quotes(report, name):
    (report / "report.pdf").write_bytes(b"PDF")
    (report / "der").write_text("keep me")
    status, _, stderr = run(["make", "-o", "report.pdf", "zip", f"LASTNAME={name}"], report)
    assert status == 0, stderr
    assert (report / "der").read_text() == "keep me"
    with zipfile.ZipFile(report / f"{name}_assignment3.zip") as file:
        packed = set(file.namelist())
    expected = {"report/report.pdf", "report/macros.py", "code/a3_vae.py", "code/tests/test.py"}
    assert expected <= packed


@needs_make
def test_a_zip_needs_a_name(report):
    (report / "report.pdf").touch()
    status, _, stderr = run(["make", "-o", "report.pdf", "zip"], report)
    assert status != 0
    assert "make zip LASTNAME=frank" in stderr


@needs_make
def test_without_latexmk_the_packages_are_named(report):
    make = shutil.which("make")
    status, _, stderr = run([make, "-o", "numbers.tex", "report.pdf"], report, PATH="")
    assert status != 0
    assert "latexmk texlive-latex-recommended texlive-fonts-recommended" in stderr


# --------------------------------------------------------------------------------------- macros.py
def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


DAMAGES = {  # what happens to which file
    "missing results": ("vae_z20/results.json", Path.unlink),
    "truncated results": ("vae_z20/results.json", lambda path: path.write_text('{"seed":')),
    "results of another kind": ("vae_z20/results.json", lambda path: path.write_text("[1, 2]")),
    "results on glyphs": (
        "gan/results.json", lambda path: edit(path, lambda x: x.update(dataset="glyphs"))),
    "missing metrics": ("nf/metrics.csv", Path.unlink),
    "empty metrics": ("nf/metrics.csv", lambda path: path.write_text("")),
    "unfinished metrics": (
        "nf/metrics.csv", lambda path: path.write_text("epoch,val_bpd\n1,1.0\n")),
    "missing scores": ("nf/scores.json", Path.unlink),
    "empty scores": ("nf/scores.json", lambda path: path.write_text("{}")),
    "scores of another kind": ("gan/scores.json", lambda path: path.write_text("[]")),
    "missing ablations": ("nf/ablations.csv", Path.unlink),
    "empty ablations": ("nf/ablations.csv", lambda path: path.write_text("")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_result_is_one_line_with_the_file_and_the_command(report, damage):
    name, break_it = DAMAGES[damage]
    path = report / "figures" / name
    break_it(path)
    status, _, stderr = run([sys.executable, "macros.py"], report)
    assert status == 1
    assert stderr.count("\n") == 1
    assert stderr.startswith(f"macros.py: error: {path} is missing or broken (")
    assert "python" in stderr.partition("make it in code/ with")[2]


@pytest.mark.parametrize("folder, key", [
    ("vae_z20", "test_elbo"), ("vae_z2", "best_epoch"), ("gan", "interpolation"),
    ("nf", "train_seconds")])
def test_a_result_that_lacks_an_entry_is_one_line(report, folder, key):
    edit(report / "figures" / folder / "results.json", lambda results: results.pop(key))
    status, _, stderr = run([sys.executable, "macros.py"], report)
    assert status == 1
    assert stderr.count("\n") == 1
    assert key in stderr
    assert str(report / "figures" / folder) in stderr


def test_scores_that_are_older_than_the_weights_are_noticed(report):
    scores = report / "figures" / "gan" / "scores.json"
    (scores.parent / "weights.pt").touch()
    os.utime(scores, (1, 1))
    status, _, stderr = run([sys.executable, "macros.py"], report)
    assert status == 1
    assert "scores.json is older than weights.pt" in stderr
