"""Data: what is read is right, what is corrupt is named, and without a network there are glyphs."""

import errno
import gzip
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

import datasets
from conftest import CODE, mnist_dir, needs_mnist

pytestmark = pytest.mark.usefixtures("offline")


def md5(array):
    return hashlib.md5(array.tobytes()).hexdigest()


def idx(array):
    """A uint8 array in the idx format of MNIST's files."""
    header = bytes([0, 0, 8, array.ndim])
    for size in array.shape:
        header += size.to_bytes(4, "big")
    return header + array.tobytes()


@pytest.fixture
def tiny_mnist(tmp_path, monkeypatch):
    """A data folder with four small files in MNIST's format, two raw and two .gz, and their arrays.
    """
    rng = np.random.default_rng(0)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    arrays, sums = {}, {}
    for name in datasets.MNIST_MD5:
        n = 70 if "train" in name else 20
        shape = (n, 28, 28) if "images" in name else (n,)
        arrays[name] = rng.integers(0, 256, shape, dtype=np.uint8)
        content = idx(arrays[name])
        sums[name] = hashlib.md5(content).hexdigest()
        if "train" in name:
            (raw / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (raw / name).write_bytes(content)
    monkeypatch.setattr(datasets, "MNIST_MD5", sums)
    monkeypatch.setattr(datasets, "SIZES", [50, 20, 20])
    return tmp_path, arrays


@pytest.fixture
def tiny_larochelle(monkeypatch):
    """90 binary images, split, whose MD5 sums are taken for those of Larochelle's."""
    images = np.random.default_rng(1).integers(0, 2, (90, 784), dtype=np.uint8)
    pixels = {"train": images[:50], "valid": images[50:70], "test": images[70:]}
    sums = {name: md5(split) for name, split in pixels.items()}
    monkeypatch.setattr(datasets, "LAROCHELLE_MD5", sums)
    monkeypatch.setattr(datasets, "SIZES", [50, 20, 20])
    return pixels


def write_amat(folder, pixels):
    """Write train and test as .amat.gz and valid as .amat; return the path of the latter."""
    (folder / "binarized_mnist").mkdir(exist_ok=True)
    for name, split in pixels.items():
        lines = [" ".join(map(str, row)) for row in split]
        text = ("\n".join(lines) + "\n").encode()
        path = folder / "binarized_mnist" / f"binarized_mnist_{name}.amat"
        if name == "valid":
            path.write_bytes(text)
        else:
            Path(f"{path}.gz").write_bytes(gzip.compress(text))
    return folder / "binarized_mnist" / "binarized_mnist_valid.amat"


def write_npz(path, pixels):
    """As the file that is downloaded: float32."""
    np.savez(path, **{f"{name}_data": split.astype(np.float32) for name, split in pixels.items()})


def one_line(function, *args, match, error=datasets.DataError):
    """The function raises exactly this kind of error, with one line that matches."""
    with pytest.raises(datasets.DataError, match=match) as caught:
        function(*args)
    assert caught.type is error
    assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------- grey levels
def test_idx_files_are_read_and_split(tiny_mnist):
    folder, arrays = tiny_mnist
    data = datasets.load("auto", folder)
    images = arrays["train-images-idx3-ubyte"].reshape(-1, 784)
    labels = arrays["train-labels-idx1-ubyte"]
    test_images = arrays["t10k-images-idx3-ubyte"].reshape(-1, 784)
    assert data.name == "mnist"
    assert data.binarization is None
    assert data.train.images.dtype == torch.uint8
    assert np.array_equal(data.train.images, images[:50])
    assert np.array_equal(data.train.labels, labels[:50])
    assert np.array_equal(data.val.images, images[-20:])
    assert np.array_equal(data.val.labels, labels[-20:])
    assert np.array_equal(data.test.images, test_images)
    assert np.array_equal(data.test.labels, arrays["t10k-labels-idx1-ubyte"])
    assert data.md5 == md5(np.concatenate([images, test_images]))


DAMAGES = {
    "cut": lambda content: content[:-9],
    "a bit": lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
    "empty": lambda content: b"",
}


@pytest.mark.parametrize("which", ["auto", "mnist"])  # it is not a reason for glyphs
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_corrupt_file_is_named_in_one_line(tiny_mnist, name, damage, which):
    folder, _ = tiny_mnist
    path = folder / "MNIST" / "raw" / name
    path.write_bytes(damage(path.read_bytes()))
    one_line(datasets.load, which, folder, match=name.removesuffix(".gz"))


def test_a_missing_file_is_named_as_it_must_be_called(tiny_mnist):
    folder, _ = tiny_mnist
    raw = folder / "MNIST" / "raw"
    (raw / "t10k-labels-idx1-ubyte").rename(raw / "t10k-labels.idx1-ubyte")  # a common spelling
    one_line(datasets.load, "mnist", folder, match=r"t10k-labels-idx1-ubyte \(or \.gz\) is not in",
             error=datasets.UnavailableError)


def test_an_unpacked_file_with_the_name_of_a_packed_one_is_read(tiny_mnist):
    folder, _ = tiny_mnist
    path = folder / "MNIST" / "raw" / "train-images-idx3-ubyte.gz"
    expected = datasets.load("mnist", folder).md5
    path.write_bytes(gzip.decompress(path.read_bytes()))
    assert datasets.load("mnist", folder).md5 == expected


def test_the_folder_of_the_data_can_begin_with_a_tilde(tmp_path):
    program = "import datasets; print(datasets.DATA_DIR)"
    environment = {**os.environ, "HOME": str(tmp_path), "A3_DATA_DIR": "~/my data"}
    printed = subprocess.run([sys.executable, "-c", program], cwd=CODE, env=environment,
                             capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(tmp_path / "my data")


@pytest.mark.parametrize("load", [datasets.load, datasets.load_binarized])
def test_mnist_by_name_without_a_network_is_an_error(tmp_path, load):
    one_line(load, "mnist", tmp_path, match="no network.*--data_dir",
             error=datasets.UnavailableError)


@pytest.mark.parametrize("load", [datasets.load, datasets.load_binarized])
def test_auto_without_a_network_gives_glyphs_and_says_so(glyphs_dir, capsys, load):
    assert load("auto", glyphs_dir).name == "glyphs"
    err = capsys.readouterr().err
    assert "NO MNIST" in err
    assert "ELBO" not in err


def download_as_torchvision(arrays, breaks_off):
    def download(root, download):
        raw = Path(root) / "MNIST" / "raw"
        raw.mkdir(parents=True)
        for name, array in arrays.items():  # it keeps the .gz files, too
            (raw / name).write_bytes(idx(array))
            (raw / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
            if breaks_off:
                raise KeyboardInterrupt
    return download


def files_below(folder):
    return {path.name for path in folder.rglob("*") if path.is_file()}


def test_a_download_leaves_the_four_files(tiny_mnist, monkeypatch):
    folder, arrays = tiny_mnist
    monkeypatch.setattr(torchvision.datasets, "MNIST", download_as_torchvision(arrays, False))
    data = datasets.load("mnist", folder / "new")
    assert data.md5 == datasets.load("mnist", folder).md5
    assert files_below(folder / "new") == set(arrays)


def test_a_download_that_breaks_off_leaves_nothing(tiny_mnist, monkeypatch):
    folder, arrays = tiny_mnist
    monkeypatch.setattr(torchvision.datasets, "MNIST", download_as_torchvision(arrays, True))
    with pytest.raises(KeyboardInterrupt):
        datasets.load("mnist", folder / "new")
    assert not (folder / "new").exists()


def test_a_download_is_put_into_place_within_one_file_system(tiny_mnist, monkeypatch):
    """data/ can be on another disk than the folder for temporary files."""
    folder, arrays = tiny_mnist
    replace = os.replace

    def replace_in_folder(source, target):
        if Path(source).parent != Path(target).parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        replace(source, target)
    monkeypatch.setattr(os, "replace", replace_in_folder)
    monkeypatch.setattr(torchvision.datasets, "MNIST", download_as_torchvision(arrays, False))
    datasets.load("mnist", folder / "new")
    assert files_below(folder / "new") == set(arrays)


@pytest.fixture
def full_disk(monkeypatch):
    """Files can be begun, but not ended."""
    def write_half(source, target):
        Path(target).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(shutil, "copyfile", write_half)
    monkeypatch.setattr(np, "savez_compressed", lambda path, **_: write_half(None, path))


def test_a_download_to_a_full_disk_leaves_no_partial_file(tiny_mnist, monkeypatch, full_disk):
    folder, arrays = tiny_mnist
    monkeypatch.setattr(torchvision.datasets, "MNIST", download_as_torchvision(arrays, False))
    one_line(datasets.load, "mnist", folder / "new", match="No space left on device",
             error=datasets.UnavailableError)
    assert files_below(folder / "new") == set()


def test_without_a_network_no_empty_folder_is_left(tmp_path):
    one_line(datasets.load, "mnist", tmp_path / "new", match="no network",
             error=datasets.UnavailableError)
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------------------------------- glyphs
def test_glyphs_resemble_mnist(glyphs_dir):
    data = datasets.load("glyphs", glyphs_dir)
    assert [len(data.train.images), len(data.val.images)] == [50_000, 10_000]
    assert data.test.images.shape == (10_000, 784)
    assert data.train.images.dtype == torch.uint8
    assert 0.11 < data.train.images.float().mean() / 255 < 0.15
    assert len(data.train.images.unique()) == 256
    assert torch.bincount(data.train.labels).min() > 4500
    x = data.test.images.view(-1, 28, 28).double()
    row_of_mass = (x.sum(2) * torch.arange(28)).sum(1) / x.sum((1, 2))
    assert abs(row_of_mass.mean() - 13.5) < 0.2
    assert row_of_mass.std() < 1.5


def test_labels_of_glyphs_are_right(glyphs_dir):
    """The nearest class mean of the training images identifies most test images."""
    data = datasets.load("glyphs", glyphs_dir)
    means = []
    for digit in range(10):
        means.append(data.train.images[data.train.labels == digit].float().mean(0))
    guess = torch.cdist(data.test.images.float(), torch.stack(means)).argmin(1)
    assert (guess == data.test.labels).float().mean() > 0.6


def test_glyphs_are_always_the_same():
    images, labels = datasets.make_glyphs(30)
    again, same_labels = datasets.make_glyphs(30)
    assert np.array_equal(images, again)
    assert np.array_equal(labels, same_labels)


@pytest.fixture
def drawn(monkeypatch):
    """Stand-ins for the glyphs, and the list of how many were drawn, call by call."""
    calls = []

    def draw(n):
        calls.append(n)
        return np.full((n, 784), 7, np.uint8), np.ones(n, np.uint8)
    monkeypatch.setattr(datasets, "make_glyphs", draw)
    return calls


def test_glyphs_are_drawn_once(tmp_path, drawn):
    folder = tmp_path / "new"
    for _ in range(2):
        assert (datasets.load("glyphs", folder).test.images == 7).all()
    assert drawn == [70_000]
    assert files_below(folder) == {"glyphs.npz"}


def test_glyphs_on_a_full_disk_leave_no_partial_file(tmp_path, drawn, full_disk):
    assert (datasets.load("glyphs", tmp_path).test.images == 7).all()
    assert files_below(tmp_path) == set()


def test_a_corrupt_cache_of_glyphs_is_named(tmp_path, drawn):
    datasets.load("glyphs", tmp_path)
    path = tmp_path / "glyphs.npz"
    path.write_bytes(path.read_bytes()[:-30])
    one_line(datasets.load, "glyphs", tmp_path, match="glyphs.npz is corrupt.*delete it")


# ---------------------------------------------------------------------------------- binarization
def test_binarization_is_fixed(glyphs_dir):
    grey = datasets.load("glyphs", glyphs_dir)
    binary = datasets.load_binarized("glyphs", glyphs_dir)
    again = datasets.load_binarized("glyphs", glyphs_dir)
    assert torch.equal(binary.train.images, again.train.images)
    assert binary.md5 == again.md5
    assert binary.md5 != grey.md5
    assert binary.train.images.max() == 1
    assert "seed 0" in binary.binarization
    assert torch.equal(binary.val.labels, grey.val.labels)


@pytest.mark.parametrize("split", ["train", "test"])
def test_binarization_has_the_grey_levels_as_means(glyphs_dir, split):
    level = getattr(datasets.load("glyphs", glyphs_dir), split).images.flatten()
    pixel = getattr(datasets.load_binarized("glyphs", glyphs_dir), split).images.flatten()
    assert pixel[level == 0].sum() == 0
    assert pixel[level == 255].all()
    for low in (1, 64, 128, 192):
        chosen = (level >= low) & (level < low + 60)
        expected = level[chosen].double().mean() / 255
        standard_error = 0.5 / chosen.sum().item() ** 0.5  # at most
        assert abs(pixel[chosen].double().mean() - expected) < 4 * standard_error


def check_larochelle(data, pixels):
    assert data.name == "mnist"
    assert data.binarization == "larochelle"
    assert data.train.labels is None
    assert data.train.images.dtype == torch.uint8
    assert np.array_equal(data.train.images, pixels["train"])
    assert np.array_equal(data.val.images, pixels["valid"])
    assert np.array_equal(data.test.images, pixels["test"])


def test_larochelle_from_npz(tmp_path, tiny_larochelle):
    write_npz(tmp_path / "binarized_mnist.npz", tiny_larochelle)
    check_larochelle(datasets.load_binarized("auto", tmp_path), tiny_larochelle)


def test_larochelle_from_text_files(tmp_path, tiny_larochelle):
    (tmp_path / "binarized_mnist.npz").write_bytes(b"not looked at if there are text files")
    write_amat(tmp_path, tiny_larochelle)
    check_larochelle(datasets.load_binarized("mnist", tmp_path), tiny_larochelle)


TEXT_DAMAGES = {
    "cut": lambda text: text[:-2],
    "not binary": lambda text: text.replace(b"1", b"2", 1),
    "twice": lambda text: text + text,
    "a pixel": lambda text: text.replace(b"0", b"1", 1),
}


@pytest.mark.parametrize("damage", TEXT_DAMAGES.values(), ids=TEXT_DAMAGES)
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
        data = datasets.load_binarized("auto", tmp_path / "new")
        check_larochelle(data, tiny_larochelle)
    (url, sha256), = calls
    assert url.startswith("https://github.com/mgermain/MADE/releases/")
    assert sha256 == "af10774d1da7e037c2f2d0388e6fd51e99f03d8878b72c15c86e0ca91c1424b2"


def test_without_larochelle_mnist_is_binarized_anew_and_says_so(tiny_mnist, capsys):
    folder, arrays = tiny_mnist
    data = datasets.load_binarized("mnist", folder)
    assert data.name == "mnist"
    assert "seed 0" in data.binarization
    assert data.train.images.max() == 1
    assert np.array_equal(data.test.labels, arrays["t10k-labels-idx1-ubyte"])
    err = capsys.readouterr().err
    assert "Larochelle" in err
    assert "ELBOs will differ a little" in err


# ------------------------------------------------------------------------------------- real files
@needs_mnist
def test_real_mnist():
    data = datasets.load("mnist", mnist_dir())
    assert [len(data.train.images), len(data.val.images)] == [50_000, 10_000]
    assert len(data.test.images) == 10_000
    pixels = torch.cat([data.train.images, data.val.images]).double() / 255
    assert pixels.mean() == pytest.approx(0.1307, abs=1e-4)  # MNIST's well-known moments
    assert pixels.std() == pytest.approx(0.3081, abs=1e-4)
    assert data.train.labels[:5].tolist() == [5, 0, 4, 1, 9]


@needs_mnist
def test_real_larochelle():
    data = datasets.load_binarized("mnist", mnist_dir())
    grey = datasets.load("mnist", mnist_dir())
    assert data.name == "mnist"
    assert data.binarization == "larochelle"
    mean = grey.test.images.float().mean().item() / 255
    assert data.test.images.float().mean().item() == pytest.approx(mean, abs=1e-3)
