"""MNIST as uint8 tensors in memory, in grey levels or binarized, split into training, validation and test images.

    data = load("auto")              # grey levels 0..255, for the GAN and the flow
    data = load_binarized("auto")    # pixels in {0, 1}, for the VAE
    data.train.images                # [50000, 784] uint8

"mnist" is read from `data_dir`, or downloaded into it. "glyphs" are distorted digits in matplotlib's fonts, for work
without a network. "auto" is MNIST if it is available, otherwise glyphs, with a warning. Of MNIST's training images the
last 10,000 are for validation.
"""

import contextlib
import gzip
import hashlib
import os
import socket
import sys
import tempfile
from collections import namedtuple
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps  # comes with torchvision and matplotlib

DATA_DIR = Path(os.environ.get("A3_DATA_DIR") or Path(__file__).resolve().parents[1] / "data")
SIZES = [50_000, 10_000, 10_000]  # training, validation, test
MNIST_MD5 = {"train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
             "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
             "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
             "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637"}  # of the uncompressed files, in this order
LAROCHELLE_URL = "https://github.com/mgermain/MADE/releases/download/ICML2015/binarized_mnist.npz"
LAROCHELLE_MD5 = {"train": "8d4f0427d6c2572b5e9994e08bad66de", "valid": "3e33becd40c694040e5e6c812e2f4b50",
                  "test": "fc34623e13bd64fed2f8b61365198339"}  # of the pixels as uint8 0 and 1, row after row
FONTS = ["DejaVuSans", "DejaVuSansMono", "DejaVuSerif", "STIXGeneral", "STIXGeneralItalic", "cmr10", "cmss10"]
CORRUPT = "{} is corrupt or unreadable ({}): replace or delete it, then run again"

Split = namedtuple("Split", "images labels")  # [N, 784] and [N], both uint8; labels are None if unknown
Dataset = namedtuple("Dataset", "name train val test md5 binarization")  # md5 of all images


class DataError(Exception):
    """Data is missing or corrupt. The message is one line that says what to do."""


class UnavailableError(DataError):
    """Data is neither on disk nor downloadable."""


def load(name="auto", data_dir=DATA_DIR):
    """The images in grey levels 0..255, as a Dataset; `name` is "auto", "mnist" or "glyphs".

    Raises DataError for a corrupt file, or if "mnist" is asked for but neither on disk nor downloadable.
    """
    if name != "glyphs":
        try:
            return load_mnist(Path(data_dir) / "MNIST" / "raw")
        except UnavailableError as error:
            if name != "auto":
                raise
            print("!" * 100, f"!!  NO MNIST: {error}", "!!  USING GLYPHS INSTEAD, digits drawn in fonts: no number "
                  "and no figure of this run is about MNIST.", "!" * 100, sep="\n", file=sys.stderr)
    return load_glyphs(Path(data_dir) / "glyphs.npz")


def load_binarized(name="auto", data_dir=DATA_DIR):
    """The images with pixels in {0, 1}, always the same ones; arguments and errors as for `load`.

    For MNIST this is Larochelle's binarization (Larochelle & Murray 2011), if available. Otherwise each pixel is drawn
    once, from a fixed seed, and is 1 with probability grey level / 255 (Salakhutdinov & Murray 2008).
    """
    try:
        if name != "glyphs":
            return load_larochelle(Path(data_dir))
        grey = load(name, data_dir)
    except UnavailableError as error:
        grey = load(name, data_dir)
        if grey.name == "mnist":
            print(f"{error}\nBinarizing the grey levels instead: ELBOs will differ a little.", file=sys.stderr)
    generator = torch.Generator().manual_seed(0)
    images, labels = (torch.cat(parts) for parts in zip(grey.train, grey.val, grey.test, strict=True))
    chunks = [255 * torch.rand(x.shape, generator=generator) < x for x in images.split(10_000)]  # rand is in [0, 1)
    return make_dataset(grey.name, torch.cat(chunks).byte(), labels, "one Bernoulli draw per pixel, seed 0")


def make_dataset(name, images, labels=None, binarization=None):
    """Arrays of 70,000 x 784 pixels and of 70,000 labels, uint8, in the order training, validation, test -> Dataset."""
    images = torch.as_tensor(images).view(-1, 784)
    splits = map(Split, images.split(SIZES), [None] * 3 if labels is None else torch.as_tensor(labels).split(SIZES))
    return Dataset(name, *splits, hashlib.md5(images.numpy()).hexdigest(), binarization)


def read(path):
    """The uncompressed content of a file or of its .gz; None if there is neither. Raises DataError if unreadable."""
    file = path if path.exists() else Path(f"{path}.gz")
    try:
        return gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except FileNotFoundError:
        return None
    except Exception as error:  # gzip raises exceptions of many types
        raise DataError(CORRUPT.format(file, error)) from None


def read_npz(path, shapes):
    """The arrays in an .npz file with these names and shapes, as uint8. Raises DataError if they cannot be read."""
    try:
        with np.load(path) as arrays:
            return [arrays[name].astype(np.uint8, order="C").reshape(shape) for name, shape in shapes.items()]
    except Exception as error:  # numpy and zipfile raise exceptions of many types
        raise DataError(CORRUPT.format(path, error)) from None


def download(what, path, fetch):
    """Call fetch(), which downloads `what` to `path`. Raises UnavailableError if that fails."""
    print(f"downloading {what} to {path} ...")
    timeout, _ = socket.getdefaulttimeout(), socket.setdefaulttimeout(20)  # seconds; the default is to wait forever
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fetch()
    except Exception as error:  # from the network, a proxy, the disk, torch or torchvision
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise UnavailableError(f"{what} is not at {path} and cannot be downloaded ({reason}): see data/README.md, name "
                               f"another folder with --data_dir, or use --dataset glyphs") from None
    finally:
        socket.setdefaulttimeout(timeout)


def load_mnist(raw):
    """MNIST from the four files in the folder `raw`, which are downloaded if one is missing."""
    def fetch():
        from torchvision.datasets import MNIST
        with tempfile.TemporaryDirectory(dir=raw.parent) as folder:  # so that an interruption leaves no partial files
            MNIST(folder, download=True)
            raw.mkdir(exist_ok=True)
            for name in MNIST_MD5:
                os.replace(Path(folder) / "MNIST" / "raw" / name, raw / name)

    arrays = []
    if None in [read(raw / name) for name in MNIST_MD5]:
        download("MNIST", raw, fetch)
    for name, md5 in MNIST_MD5.items():
        if hashlib.md5(content := read(raw / name)).hexdigest() != md5:
            raise DataError(CORRUPT.format(f"{raw / name} (or .gz)", "its MD5 sum is not MNIST's"))
        arrays.append(np.frombuffer(content, np.uint8, offset=16 if "images" in name else 8))  # without the header
    return make_dataset("mnist", np.concatenate(arrays[:2]), np.concatenate(arrays[2:]))


def load_larochelle(data_dir):
    """Larochelle's binarization, from three text files or from one .npz, which is downloaded if there is neither."""
    path, npz = data_dir / "binarized_mnist", data_dir / "binarized_mnist.npz"
    texts = [read(path / f"binarized_mnist_{name}.amat") for name in LAROCHELLE_MD5]
    if None not in texts:  # digits, each followed by a space or the end of the line
        pixels = [np.frombuffer(text, np.uint8)[::2] - ord("0") for text in texts]
    else:
        if not npz.exists():
            download("Larochelle's binarization", npz, lambda: torch.hub.download_url_to_file(
                LAROCHELLE_URL, npz, hash_prefix="af10774d1da7e037c2f2d0388e6fd51e", progress=False))  # SHA-256
        path, pixels = npz, read_npz(npz, {f"{name}_data": (-1, 784) for name in LAROCHELLE_MD5})
    if [hashlib.md5(x).hexdigest() for x in pixels] != list(LAROCHELLE_MD5.values()):
        raise DataError(CORRUPT.format(path, "the MD5 sums are not those in data/README.md"))
    return make_dataset("mnist", np.concatenate(pixels, axis=None), binarization="larochelle")


def load_glyphs(path):
    """70,000 digits drawn in fonts, from the file `path` if it exists; otherwise drawn now and kept there."""
    if path.exists():
        return make_dataset("glyphs", *read_npz(path, {"images": (70_000, 784), "labels": (70_000,)}))
    print("drawing the glyphs, once (about 10 seconds) ...")
    (images, labels), temporary = make_glyphs(sum(SIZES)), path.with_suffix(f".{os.getpid()}.tmp.npz")
    with contextlib.suppress(OSError):  # in a read-only folder they are drawn anew each time
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(temporary, images=images, labels=labels)
        os.replace(temporary, path)
    return make_dataset("glyphs", images, labels)


def make_glyphs(n, seed=0):
    """n digits in random fonts, randomly rotated, sheared, scaled and warped: images [n, 784] and labels [n], uint8."""
    bank = []  # the ten digits in each font and in two stroke widths, at twice MNIST's size
    for name in FONTS:
        font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{name}.ttf", 100)
        for stroke, digit in np.ndindex(2, 10):
            image = Image.new("L", (200, 200))
            ImageDraw.Draw(image).text((100, 100), str(digit), 255, font, anchor="mm", stroke_width=stroke)
            image = ImageOps.expand(ImageOps.pad(image.crop(image.getbbox()), (40, 40)), 8)
            bank.append(np.asarray(image, np.float32) / 255)
    bank = torch.from_numpy(np.stack(bank)).view(-1, 10, 1, 56, 56)  # [styles, digits, 1, 56, 56]
    generator = torch.Generator().manual_seed(seed)
    labels, images = torch.randint(10, (n,), generator=generator), []
    for y in labels.split(5000):
        glyphs = bank[torch.randint(len(bank), y.shape, generator=generator), y]  # [B, 1, 56, 56]
        # for each of the 28x28 pixels, the grid holds the point of the glyph, in [-1, 1]^2, to sample
        matrix = torch.eye(2) + 0.15 * torch.randn(len(y), 2, 2, generator=generator)
        grid = F.affine_grid(F.pad(matrix, (0, 1)), [len(y), 1, 28, 28], align_corners=False)  # [B, 28, 28, 2]
        waves = F.interpolate(0.07 * torch.randn(len(y), 2, 5, 5, generator=generator), (28, 28), mode="bicubic")
        image = F.grid_sample(glyphs, grid + waves.permute(0, 2, 3, 1), align_corners=False)  # [B, 1, 28, 28]
        images.append((255 * (1.2 * image).clamp(max=1)).round().byte().flatten(1))
    return torch.cat(images).numpy(), labels.byte().numpy()
