"""MNIST in memory, in grey levels or binarized, split into training, validation and test images.

    data = load("auto")              # grey levels 0..255, for the GAN and the flow
    data = load_binarized("auto")    # pixels in {0, 1}, for the VAE
    data.train.images                # [50000, 784] uint8

"mnist" is read from `data_dir`, or downloaded into it. "glyphs" are distorted digits in
matplotlib's fonts, for work without a network. "auto" is MNIST if it is on disk or can be
downloaded, otherwise glyphs, with a warning. The last 10,000 of MNIST's training images are the
validation images.
"""

import gzip
import hashlib
import os
import shutil
import socket
import sys
import tempfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps  # comes with torchvision and matplotlib

DATA_DIR = Path(__file__).resolve().parents[1] / "data"
if os.environ.get("A3_DATA_DIR"):
    DATA_DIR = Path(os.environ["A3_DATA_DIR"]).expanduser()
SIZES = [50_000, 10_000, 10_000]  # training, validation, test
MNIST_MD5 = {  # the MD5 of each file, uncompressed
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
LAROCHELLE_URL = "https://github.com/mgermain/MADE/releases/download/ICML2015/binarized_mnist.npz"
LAROCHELLE_SHA256 = "af10774d1da7e037c2f2d0388e6fd51e99f03d8878b72c15c86e0ca91c1424b2"  # of the npz
LAROCHELLE_MD5 = {  # the MD5 of the pixels as uint8 0 and 1, row after row
    "train": "8d4f0427d6c2572b5e9994e08bad66de",
    "valid": "3e33becd40c694040e5e6c812e2f4b50",
    "test": "fc34623e13bd64fed2f8b61365198339",
}
FONTS = [
    "DejaVuSans",
    "DejaVuSansMono",
    "DejaVuSerif",
    "STIXGeneral",
    "STIXGeneralItalic",
    "cmr10",
    "cmss10",
]

Split = namedtuple("Split", "images labels")  # uint8 [N, 784] and [N]; labels are None if unknown
Dataset = namedtuple("Dataset", "name train val test md5 binarization")  # md5: of all images


class DataError(Exception):
    """Data is missing or corrupt. The message is one line that says what to do."""


class UnavailableError(DataError):
    """Data is neither on disk nor downloadable."""


def corrupt(path, reason):
    return DataError(f"{path} is corrupt or unreadable ({reason}): "
                     "replace or delete it, then run again")


# ----------------------------------------------------------------------------- what scripts call
def load(name="auto", data_dir=DATA_DIR):
    """The images in grey levels 0..255, as a Dataset; `name` is "auto", "mnist" or "glyphs".

    Raises DataError for a corrupt file, or if "mnist" is requested but unavailable.
    """
    if name != "glyphs":
        try:
            return load_mnist(Path(data_dir) / "MNIST" / "raw")
        except UnavailableError as error:
            if name == "mnist":
                raise
            frame = "!" * 100
            print(frame, f"!!  NO MNIST: {error}",
                  "!!  USING GLYPHS INSTEAD, digits drawn in fonts: no result of this run is "
                  "about MNIST.",
                  frame, sep="\n", file=sys.stderr)
    return load_glyphs(Path(data_dir) / "glyphs.npz")


def load_binarized(name="auto", data_dir=DATA_DIR):
    """The images with pixels in {0, 1}, the same in each run; arguments and errors as for `load`.

    For MNIST this is Larochelle's binarization (Larochelle & Murray 2011), if it is available.
    Otherwise each pixel is drawn once, from a fixed seed, and is 1 with probability grey level /
    255 (Salakhutdinov & Murray 2008).
    """
    if name == "glyphs":
        return binarize(load(name, data_dir))
    try:
        return load_larochelle(Path(data_dir))
    except UnavailableError as error:
        grey = load(name, data_dir)
        if grey.name == "mnist":
            print(f"{error}\nBinarizing the grey levels instead: ELBOs will differ a little.",
                  file=sys.stderr)
        return binarize(grey)


def binarize(data):
    """One Bernoulli draw per pixel of a Dataset in grey levels."""
    images = torch.cat([data.train.images, data.val.images, data.test.images])
    labels = torch.cat([data.train.labels, data.val.labels, data.test.labels])
    generator = torch.Generator().manual_seed(0)
    binary = []
    for batch in images.split(10_000):
        uniform = torch.rand(batch.shape, generator=generator)  # in [0, 1)
        binary.append(255 * uniform < batch)
    return make_dataset(
        data.name, torch.cat(binary).byte(), labels, "one Bernoulli draw per pixel, seed 0")


def make_dataset(name, images, labels=None, binarization=None):
    """Split images, uint8 [70000, 784], and labels, uint8 [70000]: training, validation, test."""
    md5 = hashlib.md5(images.numpy()).hexdigest()
    images = images.split(SIZES)
    labels = [None, None, None] if labels is None else labels.split(SIZES)
    train, val, test = map(Split, images, labels)
    return Dataset(name, train, val, test, md5, binarization)


# ----------------------------------------------------------------------------------------- files
def read(path):
    """The uncompressed content of a file or of its .gz; None if there is neither.

    Raises DataError if it cannot be read.
    """
    compressed = Path(f"{path}.gz")
    if not path.exists():
        path = compressed
    try:
        if not path.exists():
            return None
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):  # some browsers unpack a .gz file but keep its name
            content = gzip.decompress(content)
        return content
    except Exception as error:  # gzip raises exceptions of many types
        raise corrupt(path, error) from None


def read_npz(path, names):
    """The arrays with these names in an .npz file, as uint8.

    Raises DataError if they cannot be read.
    """
    try:
        with np.load(path) as arrays:
            return [arrays[name].astype(np.uint8, order="C") for name in names]
    except Exception as error:  # numpy and zipfile raise exceptions of many types
        raise corrupt(path, error) from None


def download(what, missing, folder, fetch):
    """Download files with fetch(temporary folder), which returns their paths, and copy them.

    `what` and `missing` are for messages: what is downloaded, and what is missing without it.
    Raises UnavailableError if that fails. No partial file is left behind.
    """
    print(f"downloading {what} to {folder} ...")
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # seconds; the default is to wait forever
    try:
        with tempfile.TemporaryDirectory() as temporary:
            files = fetch(Path(temporary))
            folder.mkdir(parents=True, exist_ok=True)
            for file in files:
                partial = folder / f"{file.name}.{os.getpid()}.tmp"
                try:
                    shutil.copyfile(file, partial)
                    os.replace(partial, folder / file.name)
                finally:
                    partial.unlink(missing_ok=True)
    except Exception as error:  # from the network, a proxy, the disk, torch or torchvision
        reason = str(error).strip() or type(error).__name__
        reason = reason.splitlines()[-1]
        raise UnavailableError(
            f"{missing} is not in {folder}, and {what} cannot be downloaded ({reason}): see "
            "data/README.md, name another folder with --data_dir, or use --dataset glyphs"
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)


# ----------------------------------------------------------------------------------------- MNIST
def load_mnist(raw):
    """MNIST from the four files in the folder `raw`, which are downloaded if one is missing."""
    missing = [name for name in MNIST_MD5 if read(raw / name) is None]
    if missing:
        download("MNIST", f"{missing[0]} (or .gz)", raw, fetch_mnist)
    arrays = []
    for name, md5 in MNIST_MD5.items():
        content = read(raw / name)
        if hashlib.md5(content).hexdigest() != md5:
            raise corrupt(f"{raw / name} (or .gz)", "its MD5 sum is not MNIST's")
        header = 16 if "images" in name else 8
        arrays.append(np.frombuffer(content, np.uint8, offset=header))
    train_images, test_images, train_labels, test_labels = arrays
    images = np.concatenate([train_images, test_images]).reshape(-1, 784)
    labels = np.concatenate([train_labels, test_labels])
    return make_dataset("mnist", torch.from_numpy(images), torch.from_numpy(labels))


def fetch_mnist(folder):
    """Download MNIST with torchvision into a folder. Returns the paths of the four files."""
    from torchvision.datasets import MNIST
    MNIST(folder, download=True)
    return [folder / "MNIST" / "raw" / name for name in MNIST_MD5]


def fetch_larochelle(folder):
    """Download Larochelle's binarization into a folder. Returns the path of the file, in a list."""
    npz = folder / "binarized_mnist.npz"
    torch.hub.download_url_to_file(
        LAROCHELLE_URL, npz, hash_prefix=LAROCHELLE_SHA256, progress=False)
    return [npz]


def load_larochelle(data_dir):
    """Larochelle's binarization: three text files or one .npz, which is downloaded if need be."""
    folder = data_dir / "binarized_mnist"
    npz = data_dir / "binarized_mnist.npz"
    texts = [read(folder / f"binarized_mnist_{name}.amat") for name in LAROCHELLE_MD5]
    if None not in texts:
        source = folder
        pixels = []
        for text in texts:  # digits, each followed by a space or the end of the line
            pixels.append(np.frombuffer(text, np.uint8)[::2] - ord("0"))
    else:
        source = npz
        if not npz.exists():
            download("Larochelle's binarization", npz.name, data_dir, fetch_larochelle)
        pixels = read_npz(npz, [f"{name}_data" for name in LAROCHELLE_MD5])
    for split, md5 in zip(pixels, LAROCHELLE_MD5.values(), strict=True):
        if hashlib.md5(np.ascontiguousarray(split)).hexdigest() != md5:
            raise corrupt(source, "the MD5 sums are not those in data/README.md")
    images = np.concatenate(pixels, axis=None).reshape(-1, 784)
    return make_dataset("mnist", torch.from_numpy(images), binarization="larochelle")


# ---------------------------------------------------------------------------------------- glyphs
def load_glyphs(path):
    """70,000 digits drawn in fonts, from the file `path` if it exists; otherwise drawn now."""
    if path.exists():
        images, labels = read_npz(path, ["images", "labels"])
        if images.shape != (70_000, 784) or labels.shape != (70_000,):
            raise corrupt(path, f"its arrays are {images.shape} and {labels.shape}")
    else:
        print("drawing the glyphs, once (about 10 seconds) ...")
        images, labels = make_glyphs(sum(SIZES))
        temporary = path.with_suffix(f".{os.getpid()}.tmp.npz")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(temporary, images=images, labels=labels)
            os.replace(temporary, path)
        except OSError:  # in a read-only folder, or on a full disk, they are drawn anew each time
            if temporary.exists():
                temporary.unlink()
    return make_dataset("glyphs", torch.from_numpy(images), torch.from_numpy(labels))


def draw_digits():
    """The ten digits in each font, in two stroke widths: [styles, 10, 1, 56, 56] in [0, 1]."""
    import matplotlib  # which has the fonts
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    digits = []
    for name in FONTS:
        font = ImageFont.truetype(str(fonts / f"{name}.ttf"), 100)
        for stroke, digit in np.ndindex(2, 10):
            image = Image.new("L", (200, 200))
            pen = ImageDraw.Draw(image)
            pen.text((100, 100), str(digit), 255, font, anchor="mm", stroke_width=stroke)
            image = ImageOps.pad(image.crop(image.getbbox()), (40, 40))
            image = ImageOps.expand(image, 8)  # by a border
            digits.append(np.asarray(image, np.float32) / 255)
    return torch.from_numpy(np.stack(digits)).view(-1, 10, 1, 56, 56)


def make_glyphs(n, seed=0):
    """n digits in random fonts, rotated, sheared, scaled and warped: [n, 784] and [n], uint8."""
    digits = draw_digits()
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (n,), generator=generator)
    images = []
    for y in labels.split(5000):
        B = len(y)
        styles = torch.randint(len(digits), (B,), generator=generator)
        glyphs = digits[styles, y]  # [B, 1, 56, 56]
        # For each of the 28 x 28 pixels, the grid holds the point of the glyph to sample, in
        # [-1, 1]^2: an affine map, plus waves.
        matrix = torch.eye(2) + 0.15 * torch.randn(B, 2, 2, generator=generator)
        matrix = F.pad(matrix, (0, 1))  # [B, 2, 3], with no shift
        grid = F.affine_grid(matrix, [B, 1, 28, 28], align_corners=False)  # [B, 28, 28, 2]
        waves = 0.07 * torch.randn(B, 2, 5, 5, generator=generator)
        waves = F.interpolate(waves, (28, 28), mode="bicubic").permute(0, 2, 3, 1)
        warped = F.grid_sample(glyphs, grid + waves, align_corners=False)  # [B, 1, 28, 28]
        brightened = (1.2 * warped).clamp(max=1)
        images.append((255 * brightened).round().byte().flatten(1))
    return torch.cat(images).numpy(), labels.byte().numpy()
