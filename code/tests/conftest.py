"""What the tests share: the scripts on the path, glyphs made once, and scripts run as a user runs them."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

CODE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CODE))


def mnist_dir():
    """The folder with MNIST and Larochelle's binarization that $A3_DATA_DIR names, or None."""
    folder = os.environ.get("A3_DATA_DIR")
    return Path(folder).resolve() if folder and (Path(folder) / "MNIST" / "raw").is_dir() else None


needs_mnist = pytest.mark.skipif(mnist_dir() is None, reason="A3_DATA_DIR does not name a folder with MNIST/raw")


@pytest.fixture(autouse=True)
def seeded():
    """The same numbers at every run of the tests."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def glyphs_dir(tmp_path_factory):
    """A data folder with the glyphs in it."""
    import datasets
    folder = tmp_path_factory.mktemp("data")
    glyphs = [np.concatenate(parts) for parts in zip(*([x.numpy() for x in split] for split in (
        datasets.load("glyphs", folder)[1:4])))]
    np.savez(folder / "glyphs.npz", images=glyphs[0], labels=glyphs[1])  # not compressed: read a hundred times
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


def run_killed(name, *args, patch="", cwd):
    """Run it, after the statement `patch`; kill -9 it when its second checkpoint.pt is written, not yet in place."""
    program = f"""
import os, signal, sys
sys.path.insert(0, {str(CODE)!r})
import {name}
{patch}
replace, checkpoints = os.replace, []
def killed(temporary, path):
    checkpoints.extend([path] * (path.name == "checkpoint.pt"))
    if len(checkpoints) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(temporary, path)
os.replace = killed
{name}.main(sys.argv[1:])
"""
    process = subprocess.run([sys.executable, "-c", program, *map(str, args)], cwd=cwd, timeout=300)
    assert process.returncode == -signal.SIGKILL


@contextlib.contextmanager
def locked_by_another(folder):
    """Hold the folder's lock as a run in another process does: a lock is of the descriptor, not of the process."""
    fcntl = pytest.importorskip("fcntl")  # not on Windows
    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    yield
    os.close(lock)
