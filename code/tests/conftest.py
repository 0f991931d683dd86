"""What the tests share: scripts on the path, MNIST if there is any, glyphs that are drawn once."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # faster for small tests, and for the processes they start
os.environ["MPLBACKEND"] = "agg"

import torch  # noqa: E402
import torchvision  # noqa: E402

CODE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CODE))


def mnist_dir():
    """The folder with MNIST that $A3_DATA_DIR names, or None."""
    folder = os.environ.get("A3_DATA_DIR")
    return Path(folder).resolve() if folder and (Path(folder) / "MNIST" / "raw").is_dir() else None


needs_mnist = pytest.mark.skipif(
    mnist_dir() is None, reason="A3_DATA_DIR does not name a folder with MNIST/raw")


@pytest.fixture(autouse=True)
def seeded():
    """The same numbers in every run of the tests."""
    torch.manual_seed(0)


@pytest.fixture
def offline(monkeypatch):
    """No network: both downloaders fail as they do then."""
    def fail(*args, **kwargs):
        raise RuntimeError("Error downloading:\n<urlopen error no network>")
    monkeypatch.setattr(torchvision.datasets, "MNIST", fail)
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)


@pytest.fixture(scope="session")
def glyphs_dir(tmp_path_factory):
    """A data folder with the glyphs in it, uncompressed because they are read a hundred times."""
    import datasets
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "savez_compressed", np.savez)
        datasets.load("glyphs", folder)
    return folder


def randomized(model, scale, seed=0):
    """The model with random weights everywhere: a special initialisation can hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=generator))
    return model
