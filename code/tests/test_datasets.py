"""Data: what is read is right, what is broken is named, and without a network there are glyphs."""

import gzip
import hashlib
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import a3_gan
import a3_nf
import a3_vae
import datasets
from conftest import CODE, locked_by_another, mnist_dir, needs_mnist


def idx(array):
    """A uint8 array in the idx format of MNIST's files."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.tobytes()


@pytest.fixture
def tiny_mnist(tmp_path, monkeypatch):
    """A data folder with four small files in MNIST's format, two raw and two .gz, of which the MD5 sums are known."""
    rng = np.random.default_rng(0)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    arrays, md5 = {}, {}
    for name in datasets.MNIST_MD5:
        n = 70 if "train" in name else 20
        arrays[name] = rng.integers(0, 256, (n, 28, 28) if "images" in name else (n,), dtype=np.uint8)
        content = idx(arrays[name])
        md5[name] = hashlib.md5(content).hexdigest()
        if "train" in name:
            (raw / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (raw / name).write_bytes(content)
    for key, value in {"MNIST_MD5": md5, "N_TRAIN": 50, "N_VAL": 20, "N_TEST": 20}.items():
        monkeypatch.setattr(datasets, key, value)
    return tmp_path, arrays


def write_amat(folder, rows=(50, 20, 20), seed=0):
    rng = np.random.default_rng(seed)
    (folder / "binarized_mnist").mkdir()
    pixels = []
    for split, n in zip(("train", "valid", "test"), rows):
        pixels.append(rng.integers(0, 2, (n, 784)))
        text = "\n".join(" ".join(map(str, row)) for row in pixels[-1]) + "\n"
        (folder / "binarized_mnist" / f"binarized_mnist_{split}.amat.gz").write_bytes(gzip.compress(text.encode()))
    return pixels


def test_idx_files_are_read_and_split(tiny_mnist):
    folder, arrays = tiny_mnist
    data = datasets.load("auto", folder)
    images = arrays["train-images-idx3-ubyte"].reshape(-1, 784)
    assert data.name == "mnist"
    assert np.array_equal(data.train.images, images[:50]) and np.array_equal(data.val.images, images[-20:])
    assert np.array_equal(data.val.labels, arrays["train-labels-idx1-ubyte"][-20:])
    assert np.array_equal(data.test.images, arrays["t10k-images-idx3-ubyte"].reshape(-1, 784))
    assert data.train.images.dtype == torch.uint8


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte"])
def test_truncated_file_is_named_in_one_line(tiny_mnist, name):
    path = tiny_mnist[0] / "MNIST" / "raw" / name
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(datasets.InputError, match=name) as error:
        datasets.load("auto", tiny_mnist[0])  # not a reason for glyphs
    assert "\n" not in str(error.value)


def test_mnist_by_name_offline_is_an_error(tmp_path, offline):
    with pytest.raises(datasets.InputError, match="--data_dir") as error:
        datasets.load("mnist", tmp_path)
    assert "\n" not in str(error.value)


def test_auto_offline_gives_glyphs_and_says_so(glyphs_dir, offline, capsys):
    assert datasets.load("auto", glyphs_dir).name == "glyphs"
    assert "NO MNIST" in capsys.readouterr().err
    assert datasets.label("glyphs") and not datasets.label("mnist")


def test_glyphs_resemble_mnist(glyphs_dir):
    data = datasets.load("glyphs", glyphs_dir)
    assert [len(split.images) for split in (data.train, data.val, data.test)] == [50_000, 10_000, 10_000]
    assert data.train.images.dtype == torch.uint8 and data.train.images.shape[1] == 784
    assert 0.11 < data.train.images.float().mean() / 255 < 0.15
    assert len(data.train.images.unique()) == 256
    assert torch.bincount(data.train.labels).min() > 4500
    x = data.test.images.view(-1, 28, 28).double()
    centre = (x.sum(2) * torch.arange(28)).sum(1) / x.sum((1, 2))  # the row of the centre of mass
    assert abs(centre.mean() - 13.5) < 0.2 and centre.std() < 0.7
    # the labels are right: the nearest class mean of the training set tells most test images
    means = torch.stack([data.train.images[data.train.labels == digit].float().mean(0) for digit in range(10)])
    guess = torch.cdist(data.test.images.float(), means).argmin(1)
    assert (guess == data.test.labels).float().mean() > 0.6


def test_glyphs_are_the_same_for_the_same_seed():
    a, b, c = (datasets.make_glyphs(30, seed)[0] for seed in (1, 1, 2))
    assert np.array_equal(a, b) and not np.array_equal(a, c)


def test_broken_glyph_cache_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "make_glyphs", lambda n: (np.ones((n, 784), np.uint8), np.ones(n, np.uint8)))
    (tmp_path / "glyphs.npz").write_bytes(b"PK\x03\x04 cut off")
    assert datasets.load("glyphs", tmp_path).test.images.sum() == 10_000 * 784
    monkeypatch.delattr(datasets, "make_glyphs")  # now it is read
    assert datasets.load("glyphs", tmp_path).test.images.sum() == 10_000 * 784


def test_binarization_is_fixed_and_has_the_grey_levels_as_means(glyphs_dir):
    grey = datasets.load("glyphs", glyphs_dir)
    a, b = (datasets.load_binarized("glyphs", glyphs_dir) for _ in range(2))
    assert torch.equal(a.train.images, b.train.images) and a.md5 == b.md5
    assert a.train.images.max() == 1 and "seed 0" in a.binarization
    level = grey.train.images.flatten()
    assert a.train.images.flatten()[level == 0].sum() == 0 and a.train.images.flatten()[level == 255].all()
    for low in (1, 64, 128, 192):
        chosen = (level >= low) & (level < low + 60)
        n, mean = chosen.sum().item(), level[chosen].double().mean() / 255
        assert abs(a.train.images.flatten()[chosen].double().mean() - mean) < 4 * 0.5 / n ** 0.5  # four sigma


def test_larochelle_files_are_preferred(tiny_mnist):
    pixels = write_amat(tiny_mnist[0])
    data = datasets.load_binarized("auto", tiny_mnist[0])
    assert data.name == "mnist" and data.binarization == "larochelle"
    for split, expected in zip((data.train, data.val, data.test), pixels):
        assert np.array_equal(split.images, expected)


@pytest.mark.parametrize("damage", [lambda t: t[:-1], lambda t: t.replace(b"1", b"2", 1), lambda t: t + t])
def test_broken_larochelle_file_is_named(tiny_mnist, damage):
    write_amat(tiny_mnist[0])
    path = tiny_mnist[0] / "binarized_mnist" / "binarized_mnist_valid.amat.gz"
    path.write_bytes(gzip.compress(damage(gzip.decompress(path.read_bytes()))))
    with pytest.raises(datasets.InputError, match="valid"):
        datasets.load_binarized("mnist", tiny_mnist[0])
    path.unlink()
    with pytest.raises(datasets.InputError, match="valid.* is missing"):
        datasets.load_binarized("mnist", tiny_mnist[0])


def test_write_atomic_keeps_the_old_file_when_the_disk_is_full(tmp_path, monkeypatch):
    path = tmp_path / "file"
    datasets.write_atomic(path, lambda file: file.write(b"old"))

    def full(descriptor):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(datasets.os, "fsync", full)
    with pytest.raises(datasets.InputError, match="No space left"):
        datasets.write_atomic(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_download_leaves_the_four_files_and_nothing_else(tiny_mnist, monkeypatch):
    import torchvision
    source, new = tiny_mnist[0] / "MNIST", tiny_mnist[0] / "new"
    monkeypatch.setattr(torchvision.datasets, "MNIST",
                        lambda root, download: shutil.copytree(source, Path(root) / "MNIST"))
    assert datasets.load("mnist", new).name == "mnist"
    assert {path.name for path in new.rglob("*") if path.is_file()} == {p.name for p in (source / "raw").iterdir()}
    assert [path.name for path in new.iterdir()] == ["MNIST"]


def test_default_folders():
    """Only MNIST's figures go where the report takes them from."""
    figures = CODE.parent / "report" / "figures"
    names = [(a3_vae, {"zdim": 2}, "vae_z2"), (a3_gan, {}, "gan"), (a3_nf, {"n_mixtures": 8}, "nf"),
             (a3_nf, {"n_mixtures": 0}, "nf_affine")]
    for script, flags, name in names:
        run_name = script.run_name(SimpleNamespace(**flags))
        assert datasets.default_out_dir(run_name, "mnist") == figures / name
        assert datasets.default_out_dir(run_name, "glyphs") == figures / f"{name}_glyphs"


def test_claim_refuses_a_folder_that_another_process_has_and_clears_what_a_killed_one_left(tmp_path):
    data = datasets.make_dataset("mnist", 3 * [datasets.Split(torch.zeros(1, 784, dtype=torch.uint8), None)])
    left = tmp_path / ".checkpoint.pt.1234.tmp"
    left.write_bytes(b"half of a checkp")
    with locked_by_another(tmp_path):
        with pytest.raises(datasets.InputError, match="another run is writing"):
            datasets.claim(tmp_path, data)
        assert left.exists()
    datasets.release()  # also of what was refused
    datasets.claim(tmp_path, data)
    assert not left.exists()
    datasets.release()
    with locked_by_another(tmp_path):  # waits for ever if the lock is still held
        pass


def test_write_atomic_into_a_read_only_folder_is_one_line(tmp_path):
    tmp_path.chmod(0o500)
    if os.geteuid() == 0:
        os.seteuid(65534)  # root may write anywhere
    try:
        with pytest.raises(datasets.InputError, match=r"cannot write .*file \(Permission denied\): .*another folder"):
            datasets.write_atomic(tmp_path / "file", lambda file: file.write(b"new"))
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        tmp_path.chmod(0o700)
    assert not list(tmp_path.iterdir())


@needs_mnist
def test_real_mnist():
    data = datasets.load("mnist", mnist_dir())
    assert [len(split.images) for split in (data.train, data.val, data.test)] == [50_000, 10_000, 10_000]
    pixels = torch.cat([data.train.images, data.val.images]).double() / 255
    assert abs(pixels.mean() - 0.1307) < 1e-4 and abs(pixels.std() - 0.3081) < 1e-4  # MNIST's well-known moments
    assert data.train.labels[:5].tolist() == [5, 0, 4, 1, 9]
    binarized = datasets.load_binarized("mnist", mnist_dir())
    assert abs(binarized.test.images.float().mean() - data.test.images.float().mean() / 255) < 1e-3
