"""What the tests share: the scripts on the path, glyphs made once, and scripts run as a user runs them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CODE))


def mnist_dir():
    """The folder with MNIST and Larochelle's binarization that $A3_DATA_DIR names, or None."""
    folder = os.environ.get("A3_DATA_DIR")
    return Path(folder).resolve() if folder and (Path(folder) / "MNIST" / "raw").is_dir() else None


needs_mnist = pytest.mark.skipif(mnist_dir() is None, reason="A3_DATA_DIR does not name a folder with MNIST/raw")


@pytest.fixture(scope="session")
def glyphs_dir(tmp_path_factory):
    """A data folder with the glyphs in it."""
    import datasets
    folder = tmp_path_factory.mktemp("data")
    datasets.load("glyphs", folder)
    return folder


@pytest.fixture
def offline(monkeypatch):
    """No network: torchvision's downloader fails as it does then."""
    import torchvision

    def download(*args, **kwargs):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz:\n<urlopen error no network>")
    monkeypatch.setattr(torchvision.datasets, "MNIST", download)


def start_script(name, *args, cwd):
    """Start code/<name> with these arguments, in another working directory."""
    command = [sys.executable, str(CODE / name), *map(str, args)]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_script(name, *args, cwd):
    """Run it to its end -> (exit status, stdout, stderr)."""
    process = start_script(name, *args, cwd=cwd)
    stdout, stderr = process.communicate(timeout=300)
    return process.returncode, stdout, stderr
