"""Data: what is read is right, what is corrupt is named, and without a network there are glyphs."""

import gzip
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

import datasets
from conftest import mnist_dir, needs_mnist

pytestmark = pytest.mark.usefixtures("offline")


def idx(array):
    """A uint8 array in the idx format of MNIST's files."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.tobytes()


@pytest.fixture
def tiny_mnist(tmp_path, monkeypatch):
    """A data folder with four small files in MNIST's format, two raw and two .gz, and their arrays."""
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
    monkeypatch.setattr(datasets, "MNIST_MD5", md5)
    monkeypatch.setattr(datasets, "SIZES", [50, 20, 20])
    return tmp_path, arrays


@pytest.fixture
def tiny_larochelle(monkeypatch):
    """90 binary images, split, whose MD5 sums are taken for those of Larochelle's."""
    pixels = dict(zip(("train", "valid", "test"), np.split(
        np.random.default_rng(1).integers(0, 2, (90, 784), dtype=np.uint8), [50, 70]), strict=True))
    monkeypatch.setattr(datasets, "LAROCHELLE_MD5", {
        name: hashlib.md5(x.tobytes()).hexdigest() for name, x in pixels.items()})
    monkeypatch.setattr(datasets, "SIZES", [50, 20, 20])
    return pixels


def write_amat(folder, pixels):
    """Write train and test as .amat.gz and valid as .amat; return the path of the latter."""
    (folder / "binarized_mnist").mkdir(exist_ok=True)
    for name, x in pixels.items():
        text = ("\n".join(" ".join(map(str, row)) for row in x) + "\n").encode()
        path = folder / "binarized_mnist" / f"binarized_mnist_{name}.amat"
        if name == "valid":
            path.write_bytes(text)
        else:
            Path(f"{path}.gz").write_bytes(gzip.compress(text))
    return folder / "binarized_mnist" / "binarized_mnist_valid.amat"


def write_npz(path, pixels, dtype=np.float32):
    np.savez(path, **{f"{name}_data": x.astype(dtype) for name, x in pixels.items()})


def one_line(function, *args, match, error=datasets.DataError):
    """The function raises exactly this kind of error, with one line that matches."""
    with pytest.raises(datasets.DataError, match=match) as caught:
        function(*args)
    assert caught.type is error and "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------------------- grey levels
def test_idx_files_are_read_and_split(tiny_mnist):
    folder, arrays = tiny_mnist
    data = datasets.load("auto", folder)
    images = arrays["train-images-idx3-ubyte"].reshape(-1, 784)
    assert data.name == "mnist" and data.binarization is None
    assert np.array_equal(data.train.images, images[:50]) and np.array_equal(data.val.images, images[-20:])
    assert np.array_equal(data.val.labels, arrays["train-labels-idx1-ubyte"][-20:])
    assert np.array_equal(data.test.images, arrays["t10k-images-idx3-ubyte"].reshape(-1, 784))
    assert np.array_equal(data.test.labels, arrays["t10k-labels-idx1-ubyte"])
    assert data.train.images.dtype == torch.uint8
    assert data.md5 == hashlib.md5(np.concatenate([images, data.test.images]).tobytes()).hexdigest()


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte"])
@pytest.mark.parametrize("damage", [lambda c: c[:-9], lambda c: c[:-9] + bytes([c[-9] ^ 1]) + c[-8:], lambda c: b""])
def test_a_corrupt_file_is_named_in_one_line(tiny_mnist, name, damage):
    path = tiny_mnist[0] / "MNIST" / "raw" / name
    path.write_bytes(damage(path.read_bytes()))
    for which in ("auto", "mnist"):  # not a reason for glyphs
        one_line(datasets.load, which, tiny_mnist[0], match=name.removesuffix(".gz"))


@pytest.mark.parametrize("load", [datasets.load, datasets.load_binarized])
def test_mnist_by_name_without_a_network_is_an_error(tmp_path, load):
    one_line(load, "mnist", tmp_path, match="no network.*--data_dir", error=datasets.UnavailableError)


def test_auto_without_a_network_gives_glyphs_and_says_so(glyphs_dir, capsys):
    for load in (datasets.load, datasets.load_binarized):
        assert load("auto", glyphs_dir).name == "glyphs"
        assert "NO MNIST" in (err := capsys.readouterr().err) and "ELBO" not in err


@pytest.mark.parametrize("breaks_off", [False, True])
def test_a_download_leaves_all_four_files_or_nothing(tiny_mnist, monkeypatch, breaks_off):
    folder, arrays = tiny_mnist

    def download(root, download):
        raw = Path(root) / "MNIST" / "raw"
        raw.mkdir(parents=True)
        for name, array in arrays.items():  # torchvision keeps the .gz files, too
            (raw / name).write_bytes(idx(array))
            (raw / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
            if breaks_off:
                raise KeyboardInterrupt
    monkeypatch.setattr(torchvision.datasets, "MNIST", download)
    if breaks_off:
        with pytest.raises(KeyboardInterrupt):
            datasets.load("mnist", folder / "new")
    else:
        assert datasets.load("mnist", folder / "new").md5 == datasets.load("mnist", folder).md5
    files = {path.name for path in folder.joinpath("new").rglob("*") if path.is_file()}
    assert files == (set() if breaks_off else set(arrays))


# ---------------------------------------------------------------------------------------------------------- glyphs
def test_glyphs_resemble_mnist_and_are_always_the_same(glyphs_dir):
    assert np.array_equal(datasets.make_glyphs(30)[0], datasets.make_glyphs(30)[0])
    data = datasets.load("glyphs", glyphs_dir)
    assert [len(split.images) for split in (data.train, data.val, data.test)] == [50_000, 10_000, 10_000]
    assert data.train.images.dtype == torch.uint8 and data.train.images.shape[1] == 784
    assert 0.11 < data.train.images.float().mean() / 255 < 0.15
    assert len(data.train.images.unique()) == 256
    assert torch.bincount(data.train.labels).min() > 4500
    x = data.test.images.view(-1, 28, 28).double()
    centre = (x.sum(2) * torch.arange(28)).sum(1) / x.sum((1, 2))  # the row of the centre of mass
    assert abs(centre.mean() - 13.5) < 0.2 and centre.std() < 1.5
    # the labels are right: the nearest class mean of the training set identifies most test images
    means = torch.stack([data.train.images[data.train.labels == digit].float().mean(0) for digit in range(10)])
    guess = torch.cdist(data.test.images.float(), means).argmin(1)
    assert (guess == data.test.labels).float().mean() > 0.6


def test_glyphs_are_drawn_once_and_a_corrupt_cache_is_named(tmp_path, monkeypatch):
    drawn = []

    def draw(n):
        drawn.append(n)
        return np.full((n, 784), 7, np.uint8), np.ones(n, np.uint8)
    monkeypatch.setattr(datasets, "make_glyphs", draw)
    for _ in range(2):
        assert (datasets.load("glyphs", tmp_path / "new").test.images == 7).all()
    assert drawn == [70_000] and [path.name for path in (tmp_path / "new").iterdir()] == ["glyphs.npz"]
    path = tmp_path / "new" / "glyphs.npz"
    path.write_bytes(path.read_bytes()[:-30])
    one_line(datasets.load, "glyphs", tmp_path / "new", match="glyphs.npz is corrupt.*delete it")


# ---------------------------------------------------------------------------------------------------- binarization
def test_binarization_is_fixed_and_has_the_grey_levels_as_means(glyphs_dir):
    grey = datasets.load("glyphs", glyphs_dir)
    a, b = (datasets.load_binarized("glyphs", glyphs_dir) for _ in range(2))
    assert torch.equal(a.train.images, b.train.images) and a.md5 == b.md5 != grey.md5
    assert a.train.images.max() == 1 and "seed 0" in a.binarization
    assert torch.equal(a.val.labels, grey.val.labels)
    for split, binary in ((grey.train, a.train), (grey.test, a.test)):
        level, pixel = split.images.flatten(), binary.images.flatten()
        assert pixel[level == 0].sum() == 0 and pixel[level == 255].all()
        for low in (1, 64, 128, 192):
            chosen = (level >= low) & (level < low + 60)
            n, mean = chosen.sum().item(), level[chosen].double().mean() / 255
            assert abs(pixel[chosen].double().mean() - mean) < 4 * 0.5 / n ** 0.5  # four sigma


def check(data, pixels):
    assert (data.name, data.binarization) == ("mnist", "larochelle") and data.train.labels is None
    for split, x in zip((data.train, data.val, data.test), pixels.values(), strict=True):
        assert np.array_equal(split.images, x) and split.images.dtype == torch.uint8


def test_larochelle_from_text_files_or_npz(tmp_path, tiny_larochelle):
    write_npz(tmp_path / "binarized_mnist.npz", tiny_larochelle)
    check(datasets.load_binarized("auto", tmp_path), tiny_larochelle)
    (tmp_path / "binarized_mnist.npz").write_bytes(b"not looked at if there are text files")
    write_amat(tmp_path, tiny_larochelle)
    check(datasets.load_binarized("mnist", tmp_path), tiny_larochelle)


@pytest.mark.parametrize("damage", [lambda t: t[:-2], lambda t: t.replace(b"1", b"2", 1), lambda t: t + t,
                                    lambda t: t.replace(b"0", b"1", 1)])
def test_a_corrupt_text_file_is_an_error_of_one_line(tmp_path, tiny_larochelle, damage):
    path = write_amat(tmp_path, tiny_larochelle)
    path.write_bytes(damage(path.read_bytes()))
    one_line(datasets.load_binarized, "auto", tmp_path, match="binarized_mnist is corrupt.*MD5")


def test_larochelle_is_downloaded_once(tmp_path, tiny_larochelle, monkeypatch):
    calls = []

    def download(url, path, hash_prefix=None, progress=True):
        calls.append((url, hash_prefix))
        write_npz(path, tiny_larochelle)
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        check(datasets.load_binarized("auto", tmp_path / "new"), tiny_larochelle)
    sha256 = "af10774d1da7e037c2f2d0388e6fd51e99f03d8878b72c15c86e0ca91c1424b2"
    (url, prefix), = calls
    assert url.startswith("https://github.com/mgermain/MADE/releases/") and len(prefix) > 8
    assert sha256.startswith(prefix)


def test_without_larochelle_mnist_is_binarized_anew_and_says_so(tiny_mnist, capsys):
    data = datasets.load_binarized("mnist", tiny_mnist[0])
    assert data.name == "mnist" and "seed 0" in data.binarization and data.train.images.max() == 1
    assert np.array_equal(data.test.labels, tiny_mnist[1]["t10k-labels-idx1-ubyte"])
    err = capsys.readouterr().err
    assert "Larochelle" in err and "ELBOs will differ a little" in err


# ------------------------------------------------------------------------------------------------------ real files
@needs_mnist
def test_real_mnist():
    data = datasets.load("mnist", mnist_dir())
    assert [len(split.images) for split in (data.train, data.val, data.test)] == [50_000, 10_000, 10_000]
    pixels = torch.cat([data.train.images, data.val.images]).double() / 255
    assert abs(pixels.mean() - 0.1307) < 1e-4 and abs(pixels.std() - 0.3081) < 1e-4  # MNIST's well-known moments
    assert data.train.labels[:5].tolist() == [5, 0, 4, 1, 9]


@needs_mnist
def test_real_larochelle():
    data, grey = (load("mnist", mnist_dir()) for load in (datasets.load_binarized, datasets.load))
    assert (data.name, data.binarization) == ("mnist", "larochelle")
    assert abs(data.test.images.float().mean() - grey.test.images.float().mean() / 255) < 1e-3
