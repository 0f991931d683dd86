"""What the three scripts share: MNIST as uint8 tensors in memory; the files and the command line of a run.

    data = load("auto")              # grey levels 0..255, for the GAN and the flow
    data = load_binarized("auto")    # pixels in {0, 1}, for the VAE
    data.train.images                # [50000, 784] uint8
    data.test.labels                 # [10000] uint8

"mnist" is read from `data_dir`, or downloaded there. "glyphs" are digits drawn from matplotlib's fonts
and distorted at random: no network is needed for them. "auto" is MNIST if it can be had, else glyphs,
with a warning. Of MNIST's 60,000 training images the first 50,000 are for training and the last 10,000
for validation; its 10,000 test images are for test.
"""

import argparse
import contextlib
import gzip
import hashlib
import io
import json
import math
import os
import platform
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

MNIST_MD5 = {  # of the uncompressed content
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
N_TRAIN, N_VAL, N_TEST = 50_000, 10_000, 10_000
GLYPH_FONTS = ("DejaVuSans DejaVuSans-Oblique DejaVuSansMono DejaVuSansMono-Oblique DejaVuSerif DejaVuSerif-Italic "
               "STIXGeneral STIXGeneralBol STIXGeneralItalic STIXGeneralBolIta cmr10 cmb10 cmss10 cmtt10").split()

FIGURES = Path(__file__).resolve().parents[1] / "report" / "figures"
KEPT = ("dataset", "dry_run")  # flags that a checkpoint keeps, beside its script's numbers
LOCKS = []  # descriptors of the folders that this process writes to, until `release`


class InputError(Exception):
    """What the user can mend: the message is one line that says what is wrong and what to do."""


class Split(NamedTuple):
    images: torch.Tensor  # [N, 784] uint8
    labels: Optional[torch.Tensor]  # [N] uint8, the digit; None where the source has none


class Dataset(NamedTuple):
    name: str  # "mnist" or "glyphs"
    train: Split
    val: Split
    test: Split
    md5: str  # of all images, in the order train, val, test
    binarization: Optional[str] = None  # None: 256 grey levels


def label(name):
    """What figure titles and log lines add, so that glyphs are never taken for MNIST: "" for "mnist"."""
    return "" if name == "mnist" else f" [{name}, not MNIST]"


def load(name="auto", data_dir=None):
    """The grey-level images, as a Dataset with pixels 0..255.

    name: "auto", "mnist" or "glyphs". data_dir: default $A3_DATA_DIR, else the repository's data/.
    Raises InputError for a corrupt file, or if "mnist" is asked for and is neither on disk nor downloadable.
    """
    data_dir = resolve_data_dir(data_dir)
    if name != "glyphs":
        try:
            return load_mnist(data_dir)
        except Unavailable as error:
            if name == "mnist":
                raise
            warn_glyphs(error)
    return load_glyphs(data_dir)


def load_binarized(name="auto", data_dir=None):
    """The images with pixels in {0, 1}, always the same ones.

    MNIST: Larochelle's files (Larochelle & Murray 2011) if `data_dir`/binarized_mnist holds them, without
    labels. Else each pixel is drawn once from a Bernoulli whose mean is its grey level, as in Salakhutdinov &
    Murray (2008), from a fixed seed. `binarization` in the result says which. Arguments and errors as `load`.
    """
    folder = resolve_data_dir(data_dir) / "binarized_mnist"
    files = [folder / f"binarized_mnist_{split}.amat" for split in ("train", "valid", "test")]
    if name != "glyphs" and any(find(path) for path in files):
        splits = [Split(read_amat(path, n), None) for path, n in zip(files, (N_TRAIN, N_VAL, N_TEST))]
        return make_dataset("mnist", splits, "larochelle")
    data = load(name, data_dir)
    generator = torch.Generator().manual_seed(0)
    splits = []
    for images, labels in (data.train, data.val, data.test):
        # rand is in [0, 1), so black stays 0 and white stays 1
        chunks = [(255 * torch.rand(x.shape, generator=generator) < x).to(torch.uint8) for x in images.split(10_000)]
        splits.append(Split(torch.cat(chunks), labels))
    return make_dataset(data.name, splits, "one Bernoulli draw per pixel, seed 0")


# ------------------------------------------------------------------------------------------------ the data's files

def resolve_data_dir(data_dir=None):
    """The folder with the data: the argument, else $A3_DATA_DIR, else data/ beside code/."""
    return Path(data_dir or os.environ.get("A3_DATA_DIR") or Path(__file__).resolve().parents[1] / "data")


def find(path):
    """The file itself, or else its .gz, or else None."""
    return next((p for p in (path, path.with_name(path.name + ".gz")) if p.is_file()), None)


def read(path):
    """The uncompressed content of a file that `find` returned. Raises InputError if it cannot be read."""
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} is corrupt or cannot be read ({error}): delete it, and run again or put a good copy "
                         f"there") from None


def make_dataset(name, splits, binarization=None):
    md5 = hashlib.md5()
    for split in splits:
        md5.update(split.images.numpy())
    return Dataset(name, *splits, md5.hexdigest(), binarization)


def split_train(train_images, train_labels, test_images, test_labels):
    """[60000, 784] and [10000, 784] uint8 arrays and their labels -> train, val and test splits."""
    x, y = torch.from_numpy(train_images), torch.from_numpy(train_labels)
    test = Split(torch.from_numpy(test_images), torch.from_numpy(test_labels))
    return Split(x[:N_TRAIN], y[:N_TRAIN]), Split(x[-N_VAL:], y[-N_VAL:]), test


# ----------------------------------------------------------------------------------------------------------- MNIST

class Unavailable(InputError):
    """MNIST is not on disk and cannot be downloaded."""


def load_mnist(data_dir):
    raw = data_dir / "MNIST" / "raw"
    if not all(find(raw / name) for name in MNIST_MD5):
        download_mnist(data_dir)
    arrays = []
    for name, md5 in MNIST_MD5.items():
        path = find(raw / name)
        content = read(path)
        if hashlib.md5(content).hexdigest() != md5:
            raise InputError(f"{path} is corrupt or truncated (its MD5 is not MNIST's): delete it, and run again "
                             f"or put a good copy there")
        header = 16 if "images" in name else 8  # idx format: magic number and sizes, then the bytes
        array = np.frombuffer(content, np.uint8, offset=header).copy()
        arrays.append(array.reshape(-1, 784) if "images" in name else array)
    return make_dataset("mnist", split_train(*arrays))


def download_mnist(data_dir):
    """Fetch the files with torchvision, into a temporary folder first: what broke off leaves nothing behind."""
    raw = data_dir / "MNIST" / "raw"
    print(f"downloading MNIST into {raw} ...")
    timeout = socket.getdefaulttimeout()
    try:
        from torchvision.datasets import MNIST  # takes seconds to import, and is needed only here
        raw.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=data_dir) as folder, contextlib.redirect_stdout(io.StringIO()):
            socket.setdefaulttimeout(20)  # urllib's own is to wait for ever
            MNIST(folder, download=True)
            for name in MNIST_MD5:
                if not find(raw / name):
                    shutil.move(find(Path(folder) / "MNIST" / "raw" / name), raw)
    except Exception as error:  # of the network, a proxy, the disk, torchvision
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise Unavailable(f"MNIST is not in {raw} and cannot be downloaded ({reason}): put its four files there "
                          f"(raw or .gz), or name a folder that has MNIST/raw/ with --data_dir, "
                          f"or use --dataset glyphs") from None
    finally:
        socket.setdefaulttimeout(timeout)


def read_amat(path, n_rows):
    """Larochelle's text format, a row of 784 "0" or "1" per image -> [n_rows, 784] uint8 in {0, 1}."""
    found = find(path)
    if found is None:
        raise InputError(f"{path} (or .gz) is missing beside the other binarized files: put it there, "
                         f"or remove the folder to have MNIST binarized from a fixed seed")
    text = np.frombuffer(read(found), np.uint8)
    pixels = text[::2] - ord("0")  # a digit and a separator in turn; wraps round to over 1 for anything else
    if len(text) != n_rows * 784 * 2 or pixels.max() > 1 or text[1::2].max() > ord(" "):
        raise InputError(f"{found} is corrupt or truncated (it is not {n_rows} rows of 784 zeros and ones): "
                         f"delete it, or put a good copy there")
    return torch.from_numpy(pixels.reshape(n_rows, 784))


# ---------------------------------------------------------------------------------------------------------- glyphs

def warn_glyphs(reason):
    bar = "!" * 100
    print(f"{bar}\n!!  NO MNIST: {reason}\n!!  GOING ON WITH GLYPHS, digits drawn from fonts. "
          f"No figure or number of this run is about MNIST.\n{bar}", file=sys.stderr)


def load_glyphs(data_dir):
    """60,000 + 10,000 glyphs, from `data_dir`/glyphs.npz if it is there; else made, and kept there if possible."""
    path = data_dir / "glyphs.npz"
    try:
        with np.load(path) as cache:
            images, labels = cache["images"], cache["labels"]
        if images.shape != (N_TRAIN + N_VAL + N_TEST, 784):
            raise ValueError
    except (OSError, ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile):  # none yet, or a bad one
        print("making the glyphs, once (about 10 seconds) ...")
        images, labels = make_glyphs(N_TRAIN + N_VAL + N_TEST)
        with contextlib.suppress(InputError):  # a read-only folder only costs the time to make them again
            write_atomic(path, lambda file: np.savez_compressed(file, images=images, labels=labels))
    return make_dataset("glyphs", split_train(images[:-N_TEST], labels[:-N_TEST], images[-N_TEST:], labels[-N_TEST:]))


def make_glyphs(n, seed=0):
    """n digits, as MNIST made them: fitted into 20x20, then centred by mass in 28x28.

    Returns images [n, 784] uint8 and labels [n] uint8, the same ones for the same seed.
    """
    generator = torch.Generator().manual_seed(seed)
    bank = render_digits()  # [10, styles, 56, 56]
    labels = torch.randint(10, (n,), generator=generator)
    images = [distort(bank, y, generator) for y in labels.split(5000)]
    return torch.cat(images).numpy(), labels.to(torch.uint8).numpy()


def render_digits():
    """Every digit in every font and stroke width, at twice MNIST's size -> [10, styles, 56, 56] in [0, 1]."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont  # comes with torchvision and matplotlib

    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    bank = np.zeros((10, len(GLYPH_FONTS), 2, 56, 56), np.float32)
    for f, name in enumerate(GLYPH_FONTS):
        font = ImageFont.truetype(str(fonts / f"{name}.ttf"), 100)
        for digit in range(10):
            for stroke in range(2):
                image = Image.new("L", (200, 200))
                ImageDraw.Draw(image).text((100, 100), str(digit), 255, font, anchor="mm", stroke_width=stroke)
                image = image.crop(image.getbbox())
                size = [max(1, round(40 * side / max(image.size))) for side in image.size]
                left, top = (56 - size[0]) // 2, (56 - size[1]) // 2
                image = np.asarray(image.resize(size, Image.Resampling.BOX), np.float32) / 255
                bank[digit, f, stroke, top:top + size[1], left:left + size[0]] = image
    return torch.from_numpy(bank).flatten(1, 2)


def distort(bank, labels, generator):
    """One random style, affine and elastic distortion and blur for each label [B] -> [B, 784] uint8."""
    B = len(labels)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(B, *shape, generator=generator)

    style = torch.randint(bank.shape[1], (B,), generator=generator)
    glyphs = bank[labels, style].unsqueeze(1)  # [B, 1, 56, 56]

    # the grid says for each of the 28x28 pixels where in the glyph, in [-1, 1]^2, its value comes from
    angle, shear = uniform(-0.25, 0.25), uniform(-0.3, 0.3)
    matrix = torch.stack([angle.cos(), shear - angle.sin(), angle.sin(), angle.cos()], 1).view(B, 2, 2)
    matrix = matrix / uniform(0.8, 1.05, 2, 1)  # a smaller digit reads from a wider range
    grid = F.affine_grid(F.pad(matrix, (0, 1)), [B, 1, 28, 28], align_corners=False)  # [B, 28, 28, 2]
    waves = 0.07 * torch.randn(B, 2, 5, 5, generator=generator)
    grid = grid + F.interpolate(waves, size=(28, 28), mode="bicubic").permute(0, 2, 3, 1)

    # centre of mass to the middle: measure it, then shift the grid
    image = F.grid_sample(glyphs, grid, align_corners=False)  # [B, 1, 28, 28]
    centre = (grid * image.permute(0, 2, 3, 1)).sum((1, 2)) / image.sum((1, 2, 3)).unsqueeze(1)  # [B, 2]
    image = F.grid_sample(glyphs, grid + centre.view(B, 1, 1, 2), align_corners=False)

    kernel = torch.tensor([[1., 2., 1.], [2., 4., 2.], [1., 2., 1.]]).view(1, 1, 3, 3) / 16
    image = torch.lerp(image, F.conv2d(image, kernel, padding=1), uniform(0.2, 1.0, 1, 1, 1))
    return (255 * (1.15 * image).clamp(max=1)).round().to(torch.uint8).flatten(1)


# ---------------------------------------------------------------------------------------------- the files of a run

def write_atomic(path, write):
    """Have write(file) fill a file of this name, such that neither a crash nor a full disk leaves half of one.

    What is there now stays until all of the new content is on the disk. Raises InputError if that cannot be done.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    content = io.BytesIO()
    write(content)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())  # a full disk shows here at the latest
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}): make room or name another folder; a run that has "
                         f"a checkpoint goes on with --resume") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_csv(path, rows):
    """A table with a heading, from dictionaries with the same keys; None is an empty cell."""
    lines = [",".join(row) for row in rows[:1]] + [
        ",".join("" if value is None else f"{value:.8g}" for value in row.values()) for row in rows]
    write_atomic(path, lambda file: file.write("".join(line + "\n" for line in lines).encode()))


def random_states(device):
    """Of the CPU and of the run's device, as a checkpoint keeps them."""
    return {"device": device.type, "rng": torch.get_rng_state(), "device_rng": None if device.type == "cpu"
            else getattr(torch, device.type).get_rng_state(device)}  # torch.cuda or torch.mps


def set_random_states(checkpoint, device):
    """Go on with the random numbers of a checkpoint; on another device than its run's, only with the CPU's."""
    torch.set_rng_state(checkpoint["rng"])
    if device.type != "cpu" and checkpoint["device"] == device.type:
        getattr(torch, device.type).set_rng_state(checkpoint["device_rng"], device)


def write_checkpoint(folder, content):
    """Write metrics.csv, checkpoint.pt and, if the epoch that ended is the best so far, best.pt; remove old results."""
    if content["best"] and content["best"]["epoch"] == content["epoch"] and not content["losses"]:
        write_atomic(folder / "best.pt", lambda file: torch.save(content, file))
    (folder / "results.json").unlink(missing_ok=True)  # of an older state
    write_csv(folder / "metrics.csv", content["rows"])
    write_atomic(folder / "checkpoint.pt", lambda file: torch.save(content, file))  # last: the others are there


def write_results(folder, script, args, data, results):
    """Write results.json: the results, and what run they are of, on which data and machine."""
    results = {
        "script": script, "dataset": data.name, "dataset_md5": data.md5, "seed": args.seed, "epochs": args.epochs,
        "device": args.device, **results, "peak_memory_mb": peak_memory_mb(), "flags": args.flags,
        "versions": {"python": platform.python_version(), "torch": torch.__version__}}
    write_atomic(folder / "results.json", lambda file: file.write((json.dumps(results, indent=2) + "\n").encode()))


def check_finite(number, epoch, lr):
    """Raises InputError if a loss, or the sum of one and all weights, is infinite or not a number."""
    if not math.isfinite(number):
        raise InputError(f"the loss or a weight in epoch {epoch} is not finite: start anew with a --lr below {lr:g}"
                         + ", in another --out_dir" * (epoch > 1))


def default_out_dir(name, dataset):
    """Where a run writes to: only MNIST's figures go where the report takes them from."""
    return FIGURES / (name if dataset == "mnist" else f"{name}_{dataset}")


def claim(folder, data, checkpoint=None):
    """Make a folder this process's own until `release`, for a run on `data`, a new one or the checkpoint's.

    Raises InputError if the data is not the checkpoint's, if another process has the folder, if it has results on MNIST
    and the data is not MNIST, or if it has a run that is not finished and this is a new one.
    """
    results, metrics = folder / "results.json", folder / "metrics.csv"
    if checkpoint and checkpoint["md5"] != data.md5:
        raise InputError(f"the checkpoint is of other data ({checkpoint['flags']['dataset']}, MD5 {checkpoint['md5']}) "
                         f"than this ({data.name}, MD5 {data.md5}): see --data_dir")
    lock(folder)
    if data.name != "mnist" and results.exists() and '"dataset": "mnist"' in results.read_text():
        raise InputError(f"{folder} has results on MNIST, which {data.name} must not replace: name another --out_dir")
    if not checkpoint and not results.exists() and metrics.exists() and metrics.stat().st_size:  # an epoch, no results
        raise InputError(f"{folder} has a run that is not finished: go on with --resume, or name another --out_dir, "
                         f"or delete {metrics}")


def lock(folder):
    """Keep other processes' runs out of a folder, and remove what a killed one left half written.

    The system takes the lock back when a process ends, even by kill -9. Windows has no such lock.
    """
    try:
        import fcntl
        folder.mkdir(parents=True, exist_ok=True)
        LOCKS.append(os.open(folder, os.O_RDONLY))
        fcntl.flock(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        for half_written in folder.glob(".*.tmp"):
            half_written.unlink()
    except BlockingIOError:
        raise InputError(f"another run is writing to {folder}: let it end, or name another --out_dir") from None
    except (ImportError, OSError):  # no locks here; a folder that cannot be made is write_atomic's to tell
        pass


def release():
    """Let other processes write to the folders that this one has claimed."""
    while LOCKS:
        os.close(LOCKS.pop())


def read_checkpoint(path, script, flags, make_modules):
    """A checkpoint's dictionary, and the modules with its weights, "averaged" with the best epoch's if there is one.

    make_modules(flags) makes the modules, {name of their weights in the checkpoint: module}. All is on the CPU. Raises
    InputError if the file is missing, broken or another script's.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # so that a file cannot run code
        if checkpoint["script"] != script:
            raise InputError(f"{path} is a checkpoint of {checkpoint['script']}.py, not of {script}.py")
        checkpoint["flags"] = {name: checkpoint["flags"][name] for name in (*flags, *KEPT)}
        modules = make_modules(checkpoint["flags"])
        best = [("averaged", checkpoint["best"]["model"])] if checkpoint["best"] else []
        for name, weights in [(name, checkpoint[name]) for name in modules] + best:
            modules[name].load_state_dict(weights)
            if not all(tensor.isfinite().all() for tensor in weights.values()):
                raise ValueError("not finite")
        return checkpoint, modules
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"there is no checkpoint {path}: name the checkpoint.pt of a run") from None
    except Exception as error:  # torch raises a dozen kinds
        raise InputError(f"{path} is not a checkpoint of this version of {script}.py, or is truncated or corrupt "
                         f"({type(error).__name__})") from None


# ----------------------------------------------------------------------------------- the command line, the process

def parse_flags(argv, script, description, flags, run_name, make_modules):
    """The command line -> args, and the checkpoint that --resume means, or None.

    flags: {name: (default, lowest, highest, help)} of the script's own, all numbers; args.flags is what a checkpoint
    keeps. With --resume a flag that is not given is as in the checkpoint, and one that is given must be the same there.
    run_name(args) is what default_out_dir needs, make_modules what read_checkpoint does. Wrong usage ends the program
    with one line and exit status 2.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{script}.py: error: {message} (-h lists all flags)\n")
    add = parser.add_argument_group("model and training").add_argument
    for name, (default, _, _, text) in flags.items():
        also = ["--n_epochs"] * (name == "epochs")  # as the hand-out's GAN calls it
        add(f"--{name}", *also, type=type(default), default=default, help=f"{text} (default %(default)s)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: a GPU if there is one)")
    add = parser.add_argument_group("data and output").add_argument
    add("--dataset", choices=["auto", "mnist", "glyphs"], default="auto", help="glyphs are digits drawn from fonts; "
        "auto is MNIST, or if it cannot be had glyphs (default %(default)s)")
    add("--data_dir", type=Path, help="folder of the data (default: $A3_DATA_DIR, else data/ of the repository)")
    add("--out_dir", type=Path, help="folder to write to (default: one in report/figures, or the checkpoint's)")
    add = parser.add_argument_group("instead of a new run").add_argument
    add("--resume", nargs="?", type=Path, const=True, metavar="CHECKPOINT",
        help="go on with an interrupted run (default: checkpoint.pt in the output folder)")
    add("--sample", type=int, metavar="N", help="with --resume: write N samples to samples.npz and samples.png")
    add("--dry_run", action="store_true", help="a few batches of everything, in a temporary folder")
    args = parser.parse_args(argv)

    checkpoint, path = None, args.resume
    if path is True:  # no file is named
        names = ["mnist", "glyphs"] if args.dataset == "auto" else [args.dataset]
        paths = [(args.out_dir or default_out_dir(run_name(args), name)) / "checkpoint.pt" for name in names]
        path = next(filter(Path.exists, paths), paths[0])
    if path:
        path = path / "checkpoint.pt" if path.is_dir() else path
        checkpoint, _ = read_checkpoint(path, script, flags, make_modules)
        parser.set_defaults(out_dir=path.parent, **checkpoint["flags"])
        args = parser.parse_args(argv)
        args.resume = path
        kept = checkpoint["flags"].items()
        changed = [name for name, value in kept if getattr(args, name) not in (value, "auto")]
        changed += ["out_dir"] * (args.out_dir.resolve() != path.parent.resolve())
        if changed and not args.sample:
            parser.error(f"--resume goes on with the run as it was: leave out --{' --'.join(changed)}, or start anew")
        args.dataset = checkpoint["flags"]["dataset"]
    elif args.sample:
        parser.error("--sample needs --resume CHECKPOINT")
    elif args.dry_run:
        args.epochs, args.out_dir = min(args.epochs, 2), args.out_dir or Path(tempfile.mkdtemp(prefix=f"{script}_"))
    for name, (_, low, high, _) in {**flags, "sample": (None, 1, 10 ** 6, "")}.items():
        if getattr(args, name) is not None and not low <= getattr(args, name) <= high:
            parser.error(f"--{name} {getattr(args, name)} is not between {low} and {high}")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device} cannot be used: {str(error).splitlines()[0]}")
    args.flags = {name: getattr(args, name) for name in (*flags, *KEPT)}
    return args, checkpoint


@contextlib.contextmanager
def one_line_errors(script):
    """Around all that a script does: an InputError ends it with one line and exit status 1, a signal with the shell's
    status; either way its folders are free then."""
    on_signals()
    try:
        yield
    except InputError as error:
        print(f"{script}.py: error: {error}", file=sys.stderr)
        sys.exit(1)
    finally:
        on_signals()
        release()


def on_signals(handler=lambda number, frame: sys.exit(128 + number)):
    """Have Ctrl-C and SIGTERM call the handler; by default they end the program with the shell's exit status."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def say_how_to_resume(args, out_dir):
    command = [sys.executable, sys.argv[0], "--resume", str(out_dir / "checkpoint.pt")]
    command += ["--data_dir", str(args.data_dir)] * (args.data_dir is not None)
    tqdm.write(f"interrupted; to go on: {shlex.join(command)}", file=sys.stderr)  # above the bar, if there is one


def peak_memory_mb():
    """The most memory that this process has had, or None where the system does not tell (Windows)."""
    with contextlib.suppress(ImportError):
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak // (2 ** 20 if sys.platform == "darwin" else 2 ** 10)  # macOS counts bytes, Linux kB
