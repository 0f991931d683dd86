"""Variational autoencoder on binarized MNIST (hand-out questions 1.12 to 1.15).

    python a3_vae.py --zdim 20      # figures and results in report/figures/vae_z20
    python a3_vae.py --zdim 2       # the same, plus the data manifold, in report/figures/vae_z2

Expect a test ELBO of about -86.3 nats per image (-133.4 with --zdim 2), and a tighter bound on
log p(x) of -83.2 (-131.0). Training takes 10 to 20 minutes on a CPU, and the test up to 9 more. The
objective is that of Kingma & Welling (2014), Auto-Encoding Variational Bayes. Encoder and decoder
are convolutional residual networks.
"""

import argparse
import copy
import csv
import json
import math
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.utils import save_image
from tqdm import tqdm

from datasets import DATA_DIR, DataError, load_binarized

MAX_GRAD_NORM = 100  # for gradient clipping: only rare outliers exceed it
IW_SAMPLES = 256  # samples of z per test image in the importance-weighted bound on log p(x)
FIGURES = Path(__file__).resolve().parents[1] / "report" / "figures"
FORMAT = "a3_vae 4"  # version of the saved files; others are rejected
# These attributes of args are stored in a checkpoint and restored by --resume
SETTINGS = "zdim", "epochs", "batch_size", "lr", "seed", "dataset", "dataset_md5", "dry_run"


# ----------------------------------------------------------------------------------------- model
class Residual(nn.Sequential):
    """h + f(h), where f consists of the given layers."""

    def forward(self, h):
        return h + super().forward(h)


def dense_block(n):
    """[B, n] -> [B, n]. A nonlinearity precedes each layer, so the block ends with the sum."""
    return Residual(
        nn.SiLU(),
        nn.Linear(n, n),
        nn.SiLU(),
        nn.Linear(n, n))


def convolutional_block(channels):
    """[B, channels, H, W] -> the same shape."""
    return Residual(
        nn.SiLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(channels, channels, 3, padding=1))


class Encoder(nn.Module):
    """q(z|x) = N(mean(x), diag(std(x)^2)), hand-out equation 13."""

    def __init__(self, hidden_dim=256, z_dim=20):
        super().__init__()
        self.net = nn.Sequential(
            nn.Unflatten(1, (1, 28, 28)),                # [B, 1, 28, 28]
            nn.Conv2d(1, 32, 5, stride=2, padding=2),    # [B, 32, 14, 14]
            nn.SiLU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1),   # [B, 32, 7, 7]
            convolutional_block(32),
            convolutional_block(32),
            nn.SiLU(),
            nn.Flatten(),                                # [B, 1568]
            nn.Linear(32 * 7 * 7, hidden_dim),           # [B, hidden_dim]
            dense_block(hidden_dim),
            nn.SiLU(),
            nn.Linear(hidden_dim, 2 * z_dim))            # [B, 2 * z_dim]

    def forward(self, x):
        """x [B, 784] in {0, 1} -> mean and std, each [B, z_dim], std > 0."""
        mean, log_std = self.net(x).chunk(2, dim=1)
        std = log_std.clamp(-8, 4).exp()  # bounded, so that std is neither 0 nor infinite
        return mean, std


class Decoder(nn.Module):
    """p(x|z) = prod_m Bernoulli(x_m | f(z)_m), hand-out equation 4."""

    def __init__(self, hidden_dim=256, z_dim=20):
        super().__init__()
        self.logits = nn.Sequential(  # a network: z [B, z_dim] -> log(f(z) / (1 - f(z))), [B, 784]
            nn.Linear(z_dim, hidden_dim),          # [B, hidden_dim]
            dense_block(hidden_dim),
            nn.SiLU(),
            nn.Linear(hidden_dim, 32 * 7 * 7),     # [B, 1568]
            nn.Unflatten(1, (32, 7, 7)),           # [B, 32, 7, 7]
            convolutional_block(32),
            nn.SiLU(),
            nn.Conv2d(32, 4 * 32, 3, padding=1),   # [B, 128, 7, 7]
            nn.PixelShuffle(2),                    # [B, 32, 14, 14]: 4 channels to 2 x 2 pixels
            convolutional_block(32),
            nn.SiLU(),
            nn.Conv2d(32, 4, 3, padding=1),        # [B, 4, 14, 14]
            nn.PixelShuffle(2),                    # [B, 1, 28, 28]
            nn.Flatten())                          # [B, 784]

    def forward(self, z):
        """z [B, z_dim] -> the Bernoulli means f(z), [B, 784] in (0, 1)."""
        return self.logits(z).sigmoid()


class VAE(nn.Module):
    def __init__(self, hidden_dim=256, z_dim=20):
        super().__init__()
        self.z_dim = z_dim
        self.encoder = Encoder(hidden_dim, z_dim)
        self.decoder = Decoder(hidden_dim, z_dim)

    def forward(self, x):
        """x [B, 784], floats 0 and 1 -> average negative ELBO: equation 12, one z per image."""
        check_binary(x)
        mean, std = self.encoder(x)
        z = mean + std * torch.randn_like(std)  # the reparametrization trick, question 1.11
        log_likelihood = log_p_x_given_z(x, self.decoder.logits(z))  # [B]
        if self.z_dim > 2:
            # An estimate of the KL from one z, through which the encoder gets its gradient. What
            # detach() leaves out of the gradient has the expectation 0, so that the gradient stays
            # unbiased and is less noisy (Roeder et al. 2017, Sticking the landing).
            kl = log_q_over_p(z, mean.detach(), std.detach())        # [B]
        else:
            kl = kl_divergence(mean, std)  # trains better with few dimensions
        return (kl - log_likelihood).mean()

    @torch.no_grad()
    def sample(self, n_samples):
        """z ~ N(0, I), then x ~ p(x|z) (question 1.2).

        Returns draws in {0, 1} and the Bernoulli means they are drawn from, [n_samples, 784] each.
        """
        device = next(self.parameters()).device
        z = torch.randn(n_samples, self.z_dim)  # on the CPU: the same noise on every device
        means = torch.cat([self.decoder(batch.to(device)) for batch in z.split(1000)])
        uniform = torch.rand(means.shape).to(device)
        return (uniform < means).float(), means


def check_binary(x):
    """Raise ValueError if a pixel is neither 0 nor 1: then there is no Bernoulli likelihood.

    Images on a GPU are not checked, since the CPU would have to wait for the answer.
    """
    if x.is_cpu and not ((x == 0) | (x == 1)).all():
        raise ValueError(f"pixels must be 0 or 1; these are {x.dtype} from {x.min()} to {x.max()}")


def log_p_x_given_z(x, logits):
    """log prod_m Bernoulli(x_m | sigmoid(logits_m)): x and logits [B, 784] -> [B], nats."""
    cross_entropy = F.binary_cross_entropy_with_logits(logits, x, reduction="none")
    return -cross_entropy.sum(1)  # over pixels


def kl_divergence(mean, std):
    """KL(N(mean, diag(std^2)) || N(0, I)): [B, z_dim] each -> [B], nats (question 1.5)."""
    return 0.5 * (mean ** 2 + std ** 2 - 1 - 2 * std.log()).sum(1)  # over latent dimensions


def log_q_over_p(z, mean, std):
    """log q(z|x) - log p(z), whose mean over z ~ q(z|x) is the KL divergence.

    z [..., B, z_dim], mean and std [B, z_dim] -> [..., B], nats. The terms log 2 pi cancel.
    """
    return (0.5 * (z ** 2 - ((z - mean) / std) ** 2) - std.log()).sum(-1)


# ----------------------------------------------------------------------- training and evaluation
def shift_some(images, share):
    """Augmentation: shift a random `share` of the images [N, 784] by at most one pixel.

    They are split into nine groups, one for each (down, right) with -1, 0 or 1. So one group of
    the nine stays as it is.
    """
    images = images.view(-1, 28, 28).clone()
    chosen = torch.randperm(len(images))[:round(share * len(images))]
    for i, indices in enumerate(chosen.chunk(9)):
        shift = i // 3 - 1, i % 3 - 1
        # What leaves the image comes back on the other side, but borders are nearly blank.
        images[indices] = images[indices].roll(shift, dims=(1, 2))
    return images.flatten(1)


@torch.no_grad()
def update_average(averaged, model, n_updates):
    """averaged = decay * averaged + (1 - decay) * model, a moving average of the weights."""
    # 1 - decay is about 9 / n_updates, so the average spans about the last tenth of the updates
    decay = (1 + n_updates) / (10 + n_updates)
    for average, current in zip(averaged.parameters(), model.parameters(), strict=True):
        average.lerp_(current, 1 - decay)


def epoch_iter(model, data, optimizer, schedule=None, averaged=None, n_updates=0):
    """One pass over `data`. A model in training mode is updated.

    data: an iterable of batches of images, [B, 784] or [B, 1, 28, 28], in {0, 1}, with or without
    labels, so that the template's loaders can be used as well.
    n_updates: updates before this pass, which set the decay of `averaged`.
    Returns the average ELBO.
    """
    device = next(model.parameters()).device
    total, n_images = 0, 0
    bar = tqdm(data, leave=False, disable=None)  # None: no bar if the output is not a terminal
    with torch.set_grad_enabled(model.training):
        for step, batch in enumerate(bar, start=1):
            x = batch[0] if isinstance(batch, (list, tuple)) else batch
            check_binary(x)  # while it is on the CPU: the model does not check images on a GPU
            x = x.to(device, torch.float32).flatten(1)  # [B, 784]
            loss = model(x)
            if model.training:
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
                optimizer.step()
                n_updates += 1
                if schedule is not None:
                    schedule.step()
                if averaged is not None:
                    update_average(averaged, model, n_updates)
            total += loss.detach() * len(x)
            n_images += len(x)
            if step % 100 == 0:  # not more often: .item() makes the CPU wait for the GPU
                bar.set_postfix_str(f"ELBO {-total.item() / n_images:.2f}")
    return -float(total) / n_images


def run_epoch(model, data, optimizer, schedule=None, averaged=None, n_updates=0):
    """Train on data[0], then evaluate on data[1], with the averaged weights if there are any.

    Returns the average ELBO of each.
    """
    model.train()
    train_elbo = epoch_iter(model, data[0], optimizer, schedule, averaged, n_updates)
    model.eval()
    evaluated = model if averaged is None else averaged.eval()
    val_elbo = epoch_iter(evaluated, data[1], optimizer=None)
    return train_elbo, val_elbo


@torch.no_grad()
def evaluate(model, x, k):
    """ELBO, its two terms, and a tighter bound on log p(x): averages over x [N, 784], nats.

    The bound is E log(1/k sum_i w_i) with w_i = p(x|z_i) p(z_i) / q(z_i|x) and z_i ~ q(z|x)
    (Burda et al. 2016, equation 8). With k = 1 it is the ELBO; it grows with k, towards log p(x).
    x holds 0 and 1, of any dtype.
    """
    check_binary(x)
    reconstruction, kl, log_px = 0, 0, 0
    # Only two images at a time, since each needs k samples of z
    for batch in tqdm(x.split(2), "test", leave=False, disable=None):
        batch = batch.float()
        mean, std = model.encoder(batch)                                     # [B, z_dim]
        z = mean + std * torch.randn(k, *mean.shape, device=mean.device)     # [k, B, z_dim]
        logits = model.decoder.logits(z.flatten(0, 1))                       # [k * B, 784]
        log_likelihood = log_p_x_given_z(batch.repeat(k, 1), logits)         # [k * B]
        log_likelihood = log_likelihood.view(k, -1)                          # [k, B]
        log_w = log_likelihood - log_q_over_p(z, mean, std)                  # [k, B]
        reconstruction += log_likelihood.mean(0).sum()
        kl += kl_divergence(mean, std).sum()
        log_px += (log_w.logsumexp(0) - math.log(k)).sum()
    reconstruction = reconstruction.item() / len(x)
    kl = kl.item() / len(x)
    return {
        "test_elbo": reconstruction - kl,
        "test_log_p_x_given_z": reconstruction,
        "test_kl": kl,
        "test_log_px": log_px.item() / len(x),
        "iw_samples": k,
    }


# --------------------------------------------------------------------------------------- figures
def save_elbo_plot(train_curve, val_curve, filename, untrained_elbo=None):
    """Average ELBO of each epoch, nats per image (question 1.13); right, the top enlarged.

    The training ELBO is that of the current weights and, for z_dim > 2, partly of shifted images;
    the validation ELBO is that of the averaged weights.
    """
    from matplotlib.figure import Figure  # not pyplot, which looks for a display
    figure = Figure(figsize=(6, 2.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = range(1, len(train_curve) + 1)
    for axes in (left, right):
        axes.plot(epochs, train_curve, ".-", label=f"training (last {train_curve[-1]:.1f})")
        axes.plot(epochs, val_curve, ".--", label=f"validation (last {val_curve[-1]:.1f})")
        axes.set(xlabel="epoch", ylabel="ELBO (nats per image)")
        axes.grid(alpha=0.3)
    bottom, top = np.quantile(train_curve + val_curve, [0.1, 1])  # without the lowest tenth
    right.set_ylim(bottom - 1, top + 1)
    if untrained_elbo is not None:
        left.plot(0, untrained_elbo, "k.", label=f"before training ({untrained_elbo:.1f})")
    left.legend(loc="center right", bbox_to_anchor=(1, 0.4))
    figure.savefig(filename)


def save_grid(images, filename, nrow):
    """Write images [N, 784] in [0, 1] as a grid, `nrow` in a row, black on white, enlarged."""
    images = 1 - images.detach().float().cpu().view(-1, 1, 28, 28)
    enlarged = F.interpolate(images, scale_factor=3)  # [N, 1, 84, 84]
    save_image(enlarged, filename, nrow=nrow, padding=2, pad_value=0.8)


def save_samples(model, filename):
    """64 samples (left half) and their means (right half), always from the same noise."""
    torch.manual_seed(0)  # which does not change the training: each epoch sets its own seed
    samples, means = model.sample(64)
    halves = torch.cat([samples.view(8, 8, 784), means.view(8, 8, 784)], dim=1)  # [8, 16, 784]
    save_grid(halves.flatten(0, 1), filename, nrow=16)


@torch.no_grad()
def save_manifold(model, filename, n=20):
    """Decoder means on an n x n grid of z, at quantiles of the prior from 1% to 99%."""
    device = next(model.parameters()).device
    z = torch.special.ndtri(torch.linspace(0.01, 0.99, n))  # the inverse CDF of N(0, 1)
    z2, z1 = torch.meshgrid(z.flip(0), z, indexing="ij")    # z1 grows to the right, z2 upwards
    grid = torch.stack([z1.flatten(), z2.flatten()], dim=1)  # [n * n, 2]
    save_grid(model.decoder(grid.to(device)), filename, nrow=n)


# --------------------------------------------------------------------------- the files of a run
def run_dir(args):
    """The folder of the run. Runs on glyphs, which replace a missing MNIST, get another."""
    if args.out_dir:
        return args.out_dir
    name = f"vae_z{args.zdim}"
    if args.dataset == "glyphs":
        name += "_glyphs"
    return FIGURES / name


def first_line(error):
    return str(error).partition("\n")[0]


def save(content, path):
    """torch.save via a temporary file, so that an interruption leaves the old file intact."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        torch.save(content, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError if the disk is full
        reason = first_line(error)
        raise OSError(f"{path} cannot be written ({reason}): is the disk full?") from None
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path):
    """The content of a checkpoint.pt or weights.pt. Raises OSError for any other file."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)  # no code in it is run
        if content["format"] == FORMAT:
            return content
    except Exception:  # torch raises exceptions of many types
        pass
    raise OSError(f"{path} is missing, damaged or of another version: "
                  "train first, or set --out_dir")


def load_model(checkpoint, device="cpu"):
    """The trained VAE in eval mode, from a run's checkpoint.pt (its best epoch) or weights.pt."""
    content = load_checkpoint(checkpoint)
    model = VAE(z_dim=content["zdim"])
    model.load_state_dict(content["best"])
    return model.to(device).eval()


def is_unfinished(out_dir):
    """Whether this folder has a checkpoint, but not the results.json that a run writes last."""
    return (out_dir / "checkpoint.pt").exists() and not (out_dir / "results.json").exists()


def keep_unfinished_run(out_dir):
    """Rename the checkpoint of an unfinished run, so that a new run does not overwrite it."""
    if is_unfinished(out_dir):
        kept = out_dir / f"checkpoint-{time.strftime('%Y%m%d-%H%M%S')}.pt"
        os.replace(out_dir / "checkpoint.pt", kept)
        print(f"{out_dir} has an unfinished run, whose checkpoint is kept as {kept.name}",
              file=sys.stderr)


def write_metrics(rows, path):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def peak_memory_mb(device):
    """Peak memory in MiB: that of a cuda GPU, otherwise the process's (None on Windows)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2 ** 20
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":
        return peak // 2 ** 20  # from bytes
    return peak // 2 ** 10  # from KiB


def processor_name(device):
    """The name of the GPU or, if the system reports it, of the CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


# ------------------------------------------------------------------------------------------ main
def fault_of(device):
    """Why torch cannot use this device, in one line; None if it can."""
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:  # torch raises exceptions of many types
        return first_line(error)


def default_device():
    """cuda or mps, if there is such a GPU and torch can use it, otherwise cpu."""
    for device, backend in [("cuda", torch.cuda), ("mps", torch.backends.mps)]:
        if backend.is_available():
            fault = fault_of(device)
            if fault is None:
                return device
            print(f"{device} cannot be used, using the CPU instead: {fault}", file=sys.stderr)
    return "cpu"


def user_path(text):
    return Path(os.path.expanduser(text))


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS)  # so that an error is a single line

    group = parser.add_argument_group("model and training")
    group.add_argument("--zdim", type=int, default=20,
                       help="dimensions of the latent space (default: %(default)s)")
    group.add_argument("--epochs", "--n_epochs", type=int, default=40,
                       help="passes over the training images (default: %(default)s)")
    group.add_argument("--batch_size", type=int, default=128,
                       help="images per update (default: %(default)s)")
    group.add_argument("--lr", type=float,
                       help="peak learning rate of the one-cycle schedule (default: 0.003; 0.0015 "
                            "if --zdim is at most 2)")
    group.add_argument("--seed", type=int, default=42,
                       help="seed of weights, image order and noise (default: %(default)s)")
    group.add_argument("--device",
                       help="cpu, cuda or mps (default: a GPU if there is one, otherwise cpu)")

    group = parser.add_argument_group("data and output")
    group.add_argument("--dataset", choices=["auto", "mnist", "glyphs"], default="auto",
                       help="auto: MNIST or, if that is not available, glyphs (digits drawn in "
                            "fonts) (default: %(default)s)")
    group.add_argument("--data_dir", type=user_path, default=DATA_DIR,
                       help="data folder (default: %(default)s)")
    group.add_argument("--out_dir", type=user_path,
                       help="output folder (default: report/figures/vae_z<zdim>)")

    group = parser.add_argument_group("instead of a full new run").add_mutually_exclusive_group()
    group.add_argument("--dry_run", action="store_true",
                       help="run every step on a few batches, in a temporary folder, or --out_dir")
    group.add_argument("--resume", action="store_true",
                       help="continue the unfinished run in the output folder, with its settings")
    group.add_argument("--sample", type=int, metavar="N",
                       help="write N samples of the trained model to samples.npz and samples.png")

    args = parser.parse_args(argv)
    if args.lr is None:  # with two dimensions, q(z|x) is narrow and training less stable
        args.lr = 3e-3 if args.zdim > 2 else 1.5e-3
    lowest = {"zdim": 1, "epochs": 1, "batch_size": 1, "lr": 1e-9, "seed": 0, "sample": 1}
    for name, low in lowest.items():
        value = getattr(args, name)
        if value is not None and not low <= value < 2 ** 31:
            parser.error(f"--{name} must be between {low} and {2 ** 31 - 1}")
    if args.device is None:
        args.device = default_device()
    elif fault_of(args.device):
        parser.error(f"--device {args.device} cannot be used ({fault_of(args.device)}): "
                     "try --device cpu")
    return args


def write_samples(args):
    """--sample: N samples and their means, uint8 [N, 28, 28], and the first 100 in samples.png."""
    out_dir = run_dir(args)
    model = load_model(out_dir / "weights.pt", args.device)
    torch.manual_seed(args.seed)
    samples, means = model.sample(args.sample)
    samples = (255 * samples).byte().cpu().view(-1, 28, 28)
    means = (255 * means).round().byte().cpu().view(-1, 28, 28)
    np.savez_compressed(out_dir / "samples.npz", samples=samples, means=means)
    save_grid(samples[:100] / 255, out_dir / "samples.png", nrow=10)
    print(f"{args.sample} samples are in {out_dir}")


def main(args):
    checkpoint = None
    if args.resume:
        args.out_dir = run_dir(args)
        checkpoint = load_checkpoint(args.out_dir / "checkpoint.pt")
        settings = checkpoint["settings"]
        vars(args).update(settings)
        print(f"the run continues with its own settings, not the command line's: {settings}")

    # Data
    data = load_binarized(args.dataset, args.data_dir)
    if checkpoint and data.md5 != settings["dataset_md5"]:
        raise DataError(f"the run in {args.out_dir} was started with other images: "
                        "pass their folder with --data_dir, or start a new run")
    args.dataset = data.name  # mnist or glyphs, no longer auto: run_dir depends on it
    args.dataset_md5 = data.md5
    train, val, test = data.train.images, data.val.images, data.test.images
    if args.dry_run:
        train, val, test = train[:5 * args.batch_size // 2], val[:200], test[:10]  # 2.5 batches
        args.epochs = min(args.epochs, 2)
        args.out_dir = args.out_dir or Path(tempfile.mkdtemp(prefix="a3_vae_"))
    train, val, test = train.to(args.device), val.to(args.device), test.to(args.device)
    out_dir = args.out_dir = run_dir(args)
    out_dir.mkdir(parents=True, exist_ok=True)

    # Model. Epoch e is seeded with 10,000 * seed + e, and epoch 0 is the initialization. So a run
    # can be resumed without saving the state of the random number generator.
    torch.manual_seed(10_000 * args.seed)
    model = VAE(z_dim=args.zdim).to(args.device)
    # channels_last makes convolutions faster, but some versions of torch misread it on mps.
    if not args.device.startswith("mps"):
        model.to(memory_format=torch.channels_last)
    averaged = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.05, fused=True)
    total_updates = args.epochs * math.ceil(len(train) / args.batch_size)
    total_updates = max(20, total_updates)  # at exactly 10, OneCycleLR divides by zero
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_updates, pct_start=0.1, cycle_momentum=False)
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"{data.name} ({data.binarization}), {n_parameters:,} parameters, {args.device}; "
          f"writing to {out_dir}")

    # Also if the run is resumed, since the trained weights are loaded only below
    untrained_elbo = epoch_iter(averaged, val.split(1000), optimizer=None)

    # Resume
    parts = {"model": model, "averaged": averaged, "optimizer": optimizer, "schedule": schedule}
    rows = []  # one per epoch, for metrics.csv
    best = None  # the averaged weights of the epoch with the best validation ELBO
    if checkpoint:
        rows = checkpoint["rows"]
        best = checkpoint["best"]
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        # The run may have begun on a device with another memory format, which AdamW does not notice
        for weight, state in optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.empty_like(weight).copy_(state[name])
    else:
        keep_unfinished_run(out_dir)
        save_samples(averaged, out_dir / "samples_start.png")

    # Epochs
    for epoch in range(len(rows) + 1, args.epochs + 1):
        start = time.time()
        torch.manual_seed(10_000 * args.seed + epoch)
        learning_rate = schedule.get_last_lr()[0]  # at the epoch's first update
        # At first, half of the images are shifted, then ever fewer. Two dimensions have no room to
        # encode a shift besides the digit: with shifts and a learning rate of 0.003 together, the
        # ELBO was 7 nats lower.
        share = 0
        if args.zdim > 2:
            share = 0.5 - 0.5 * (epoch - 1) / args.epochs
        images = shift_some(train, share)
        batches = images[torch.randperm(len(train))].split(args.batch_size)
        data_of_epoch = batches, val.split(1000)
        train_elbo, val_elbo = run_epoch(
            model, data_of_epoch, optimizer, schedule, averaged, (epoch - 1) * len(batches))
        if not math.isfinite(train_elbo + val_elbo):
            raise FloatingPointError(f"the loss in epoch {epoch} is not finite: "
                                     "start again with a smaller --lr")
        seconds = time.time() - start
        rows.append({
            "epoch": epoch,
            "train_elbo": train_elbo,
            "val_elbo": val_elbo,
            "seconds": seconds,
            "images_per_s": len(train) / seconds,
            "learning_rate": learning_rate,
        })

        if epoch == (args.epochs + 1) // 2:
            save_samples(averaged, out_dir / "samples_half.png")
        if val_elbo == max(row["val_elbo"] for row in rows):
            best = copy.deepcopy(averaged.state_dict())
        write_metrics(rows, out_dir / "metrics.csv")
        (out_dir / "results.json").unlink(missing_ok=True)  # of an earlier run in this folder
        settings = {name: getattr(args, name) for name in SETTINGS}
        content = {name: part.state_dict() for name, part in parts.items()}
        content.update(format=FORMAT, zdim=args.zdim, best=best, rows=rows,
                       settings=settings)
        save(content, out_dir / "checkpoint.pt")
        print("  ".join(f"{name} {value:<8.5g}" for name, value in rows[-1].items()))

    # Test
    averaged.load_state_dict(best)
    torch.manual_seed(10_000 * args.seed + args.epochs + 1)
    scores = evaluate(averaged, test, IW_SAMPLES)
    save_samples(averaged, out_dir / "samples_end.png")
    if args.zdim == 2:
        save_manifold(averaged, out_dir / "manifold.png")
    train_curve = [row["train_elbo"] for row in rows]
    val_curve = [row["val_elbo"] for row in rows]
    save_elbo_plot(train_curve, val_curve, out_dir / "elbo.pdf", untrained_elbo)
    weights = {"format": FORMAT, "zdim": args.zdim, "best": best}
    save(weights, out_dir / "weights.pt")

    train_seconds = sum(row["seconds"] for row in rows)
    results = {name: getattr(args, name) for name in SETTINGS}
    results.update(
        device=args.device,
        processor=processor_name(args.device),
        python=platform.python_version(),
        torch=torch.__version__,
        parameters=n_parameters,
        train_seconds=train_seconds,
        images_per_s=len(train) * len(rows) / train_seconds,
        peak_memory_mb=peak_memory_mb(args.device),
        binarization=data.binarization,
        untrained_elbo=untrained_elbo,
        best_epoch=val_curve.index(max(val_curve)) + 1,
        val_elbo=max(val_curve),
        **scores)
    (out_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"test: ELBO {scores['test_elbo']:.2f}, log p(x) >= {scores['test_log_px']:.2f} "
          "nats per image")


if __name__ == "__main__":
    # Write each line at once, even to a file, and replace characters that the console lacks.
    if hasattr(sys.stdout, "reconfigure"):  # which it has not in a notebook
        sys.stdout.reconfigure(line_buffering=True, errors="replace")
    # Ignore the user's matplotlib settings, which could change the figures or stop the run.
    os.environ["MPLBACKEND"] = "agg"
    import matplotlib
    matplotlib.rcdefaults()
    matplotlib.rcParams["pdf.fonttype"] = 42  # TrueType, since many publishers refuse Type 3
    arguments = parse_args()
    try:
        if arguments.sample:
            write_samples(arguments)
        else:
            main(arguments)
    except KeyboardInterrupt:
        message = "interrupted"
        out_dir = arguments.out_dir  # main sets it when the run begins
        is_run = out_dir and not arguments.sample
        if is_run and is_unfinished(out_dir):
            message += (f': to continue the run, use --resume --out_dir "{out_dir}" '
                        f'--data_dir "{arguments.data_dir}"')
        print(message, file=sys.stderr)
        sys.exit(130)
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        sys.exit(f"{Path(__file__).name}: error: the GPU is out of memory: "
                 "use a smaller --batch_size, or --device cpu")
    except (DataError, FloatingPointError, OSError) as error:
        message = str(error)
        if isinstance(error, OSError) and error.errno and not error.filename:  # as on a full disk
            message += f", in {run_dir(arguments)}"
        sys.exit(f"{Path(__file__).name}: error: {message}")
