"""Variational autoencoder on binarized MNIST (hand-out questions 1.12 to 1.15).

    python a3_vae.py --zdim 20      # figures and results in report/figures/vae_z20
    python a3_vae.py --zdim 2       # the same and the data manifold, in report/figures/vae_z2

Expect, on the test set of Larochelle's fixed binarization: ELBO -87.5 and log p(x) >= -84.3 nats per image (over three
seeds -87.4 +- 0.1 and -84.2 +- 0.1); with --zdim 2 -134.9 and -132.7 (-134.7 +- 0.9 and -132.4 +- 0.8). 10 minutes of
training and 2 of testing on two cores of an EPYC.
Source: Kingma & Welling (2014), Auto-Encoding Variational Bayes, here with convolutions. All likelihoods are in nats
per image: summed over the 784 pixels, averaged over images.
"""

import copy
import itertools
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib import rc_context
from matplotlib.figure import Figure  # not pyplot: files only, no display
from scipy.stats import norm
from tqdm import tqdm

from datasets import (check_finite, claim, default_out_dir, label, load_binarized, on_signals, one_line_errors,
                      parse_flags, random_states, read_checkpoint, say_how_to_resume, set_random_states, write_atomic,
                      write_checkpoint, write_results)

EMA_DECAY = 0.999  # of the averaged weights, per update
MAX_GRAD_NORM = 100  # nearly all gradients are shorter: it tames the rare one that would spoil the weights
SCRIPT = "a3_vae"
FLAGS = {  # of a run: default, lowest and highest value, and what it is
    "zdim": (20, 1, 1000, "dimensions of the latent space"),
    "epochs": (40, 1, 10 ** 5, "passes over the training set"),
    "batch_size": (128, 1, 50_000, "images per update"),
    "lr": (3e-3, 1e-9, 10, "highest learning rate of the one-cycle schedule"),
    "seed": (42, 0, 2 ** 31, "of weights, order of images, and noise"),
    "iw_samples": (256, 0, 10 ** 5, "samples of z per test image in the bound on log p(x); 0 leaves it out"),
}


# ----------------------------------------------------------------------------------------------------------- model

class Residual(nn.Module):
    """x + f(x); the last weight of f starts at zero, so the block starts as x plus a small constant."""

    def __init__(self, n):
        super().__init__()
        self.f = nn.Sequential(nn.SiLU(), nn.Linear(n, n), nn.SiLU(), nn.Linear(n, n))
        nn.init.zeros_(self.f[-1].weight)

    def forward(self, x):
        return x + self.f(x)


class Encoder(nn.Module):
    """q(z|x) = N(mean(x), diag(std(x)^2)), hand-out equation 13."""

    def __init__(self, hidden_dim=500, z_dim=20):
        super().__init__()
        self.net = nn.Sequential(
            nn.Unflatten(1, (1, 28, 28)),
            nn.Conv2d(1, 32, 5, stride=2, padding=2), nn.SiLU(),   # [B, 32, 14, 14]
            nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.SiLU(),  # [B, 32, 7, 7]
            nn.Flatten(),
            nn.Linear(32 * 7 * 7, hidden_dim), Residual(hidden_dim), nn.SiLU(),
            nn.Linear(hidden_dim, 2 * z_dim),
        )

    def forward(self, x):
        """x [B, 784] in {0, 1} -> mean and std, each [B, z_dim], std > 0."""
        mean, log_std = self.net(x).chunk(2, dim=1)
        return mean, log_std.clamp(-8, 4).exp()


class Decoder(nn.Module):
    """p(x|z) = prod_m Bernoulli(x_m | f(z)_m), hand-out equation 4."""

    def __init__(self, hidden_dim=500, z_dim=20):
        super().__init__()
        self.logits = nn.Sequential(  # z [B, z_dim] -> log f(z) / (1 - f(z)), [B, 784]
            nn.Linear(z_dim, hidden_dim), Residual(hidden_dim), nn.SiLU(),
            nn.Linear(hidden_dim, 32 * 7 * 7), nn.SiLU(),
            nn.Unflatten(1, (32, 7, 7)),
            nn.Conv2d(32, 4 * 32, 3, padding=1), nn.PixelShuffle(2), nn.SiLU(),  # [B, 32, 14, 14]
            nn.Conv2d(32, 4, 3, padding=1), nn.PixelShuffle(2),                  # [B, 1, 28, 28]
            nn.Flatten(),
        )

    def forward(self, z):
        """z [B, z_dim] -> the Bernoulli means f(z), [B, 784] in (0, 1)."""
        return self.logits(z).sigmoid()


class VAE(nn.Module):
    def __init__(self, hidden_dim=500, z_dim=20):
        super().__init__()
        self.z_dim = z_dim
        self.encoder = Encoder(hidden_dim, z_dim)
        self.decoder = Decoder(hidden_dim, z_dim)

    def forward(self, x):
        """x [B, 784] in {0, 1} -> average negative ELBO, a scalar (equation 12 with one sample of z)."""
        mean, std = self.encoder(x)
        z = mean + std * torch.randn_like(std)  # the reparametrization trick, question 1.11
        elbo = log_p_x_given_z(x, self.decoder.logits(z)) - kl_divergence(mean, std)  # [B]
        return -elbo.mean()

    @torch.no_grad()
    def sample(self, n_samples, generator=None):
        """Ancestral sampling (question 1.2): z ~ N(0, I), then x ~ p(x|z).

        Returns (sampled_ims, im_means), each [n_samples, 784]: draws in {0, 1}, and the Bernoulli means. The noise
        is made on the CPU, by `generator` or the global one, so a seed gives the same noise on every device.
        """
        z = torch.randn(n_samples, self.z_dim, generator=generator)
        im_means = self.decoder(z.to(next(self.parameters()).device))
        sampled_ims = (torch.rand(im_means.shape, generator=generator).to(im_means) < im_means).float()
        return sampled_ims, im_means


def log_p_x_given_z(x, logits):
    """log prod_m Bernoulli(x_m | sigmoid(logits_m)): x and logits [B, 784] -> [B], nats."""
    return -F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(1)  # over pixels


def kl_divergence(mean, std):
    """KL(N(mean, diag(std^2)) || N(0, I)): [B, z_dim] each -> [B], nats (question 1.5)."""
    return 0.5 * (mean ** 2 + std ** 2 - 1 - 2 * std.log()).sum(1)  # over latent dimensions


# ----------------------------------------------------------------------------------------- training and evaluation

def shift_some(images, share, generator):
    """Move a `share` of the images [N, 784] by up to a pixel each way, against overfitting; their margins are blank."""
    images = images.view(-1, 28, 28).clone()
    chosen = torch.randperm(len(images), generator=generator)[:round(share * len(images))]
    for move, indices in zip(itertools.product((-1, 0, 1), repeat=2), chosen.chunk(9)):
        images[indices] = images[indices].roll(move, dims=(1, 2))
    return images.flatten(1)


def epoch_iter(model, data, optimizer, on_step=None, losses=None):
    """One pass over `data`, an iterable of batches of 784-pixel images: learn if model.training, else only measure.

    on_step() is called after each update. `losses` gets a (negative ELBO, batch size) for each batch, behind those
    of an interrupted pass that this one completes. Returns the average ELBO over images, nats.
    """
    losses = [] if losses is None else losses
    device = next(model.parameters()).device
    with torch.set_grad_enabled(model.training):
        for x in data:
            x = x.to(device, torch.float32).flatten(1)  # [B, 784]
            loss = model(x)
            losses.append((loss.detach(), len(x)))  # no .item(): a GPU need not wait for the CPU
            if model.training:
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
                optimizer.step()
                if on_step:
                    on_step()
    return -sum(float(loss) * size for loss, size in losses) / sum(size for _, size in losses)


def run_epoch(model, data, optimizer, averaged=None, on_step=None, losses=None):
    """Train on data[0] and measure on data[1], there with the `averaged` weights if given. Returns both ELBOs."""
    traindata, valdata = data
    model.train()
    train_elbo = epoch_iter(model, traindata, optimizer, on_step, losses)
    model.eval()
    val_elbo = epoch_iter(averaged or model, valdata, optimizer)
    return train_elbo, val_elbo


@torch.no_grad()
def evaluate(model, x, iw_samples):
    """ELBO, its two terms, and the importance-weighted bound on log p(x); averages over x [N, 784], nats.

    log p(x) >= E log 1/k sum_i w_i with w_i = p(x|z_i) p(z_i) / q(z_i|x), z_i ~ q(z|x) and k = iw_samples (Burda et
    al. 2016, equation 8). The ELBO averages over the same k samples. With k = 0: over one, and test_log_px is None.
    """
    k, totals = max(1, iw_samples), 0
    for batch in tqdm(x.split(500), "test", disable=None, leave=False):
        batch = batch.float()
        mean, std = model.encoder(batch)
        recon, log_sum_w = torch.zeros_like(mean[:, 0]), torch.full_like(mean[:, 0], -math.inf)  # [B]
        for _ in range(k):
            epsilon = torch.randn_like(std)
            z = mean + std * epsilon
            log_p_x_z = log_p_x_given_z(batch, model.decoder.logits(z))  # [B]
            log_p_z_over_q = (0.5 * (epsilon ** 2 - z ** 2) + std.log()).sum(1)  # -log(2 pi) / 2 cancels
            recon += log_p_x_z / k
            log_sum_w = torch.logaddexp(log_sum_w, log_p_x_z + log_p_z_over_q)
        totals += torch.stack([recon, kl_divergence(mean, std), log_sum_w - math.log(k)]).sum(1)  # [3, B] -> [3]
    recon, kl, log_px = (totals / len(x)).tolist()
    return {"test_elbo": recon - kl, "test_log_p_x_given_z": recon, "test_kl": kl,
            "test_log_px": log_px if iw_samples else None, "iw_samples": iw_samples}


# --------------------------------------------------------------------------------------------------------- figures

PRINT = {  # drawn as large as the report prints them, in inches and points
    "font.size": 8, "axes.titlesize": 8, "figure.titlesize": 8, "legend.fontsize": 7, "legend.handlelength": 1.5,
    "lines.linewidth": 1, "lines.markersize": 3,
    "savefig.dpi": 300, "savefig.bbox": "tight", "savefig.pad_inches": 0.03}


@rc_context(PRINT)
def save_elbo_plot(train_curve, val_curve, filename, note=""):
    """Average ELBO of each epoch, nats per image (question 1.13). The first few may lie below the frame."""
    epochs = range(1, len(train_curve) + 1)
    figure = Figure(figsize=(2.7, 2.1), layout="constrained")
    axes = figure.subplots()
    marker = "." * (len(train_curve) == 1)
    axes.plot(epochs, train_curve, "-", marker=marker, label=f"training (last {train_curve[-1]:.1f})")
    axes.plot(epochs, val_curve, "--", marker=marker, label=f"validation (best {max(val_curve):.1f})")
    axes.set(xlabel="epoch", ylabel="ELBO (nats per image)", title=f"ELBO{note}")
    if len(train_curve) > 4:
        low, high = np.quantile([*train_curve, *val_curve], [0.1, 1])
        axes.set_ylim(bottom=low - 0.25 * (high - low))  # with room for the legend
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    write_atomic(filename, lambda file: figure.savefig(file, format=Path(filename).suffix[1:]))


def image_grid(images, columns):
    """Images [N, 784] -> one array, `columns` of them side by side, each 30x30 with its frame."""
    images = F.pad(images.float().cpu(), (0, 0, 0, -len(images) % columns))  # blank ones fill the last row
    images = F.pad(images.view(-1, columns, 28, 28), (1, 1, 1, 1), value=0.2)  # [rows, columns, 30, 30]
    return images.transpose(1, 2).flatten(2).flatten(0, 1).numpy()  # [rows * 30, columns * 30]


@rc_context(PRINT)
def save_images(panels, filename, title, columns=8):
    """Draw panels, {caption: images [N, 784] in [0, 1]}, side by side."""
    grids = [image_grid(images, columns) for images in panels.values()]
    height, width = grids[0].shape
    figure = Figure(figsize=(2.2 * len(panels), 2.2 * height / width + 0.3), layout="constrained")
    for axis, grid, caption in zip(figure.subplots(1, len(panels), squeeze=False)[0], grids, panels):
        axis.imshow(grid, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(caption)
        axis.axis("off")
    figure.suptitle(title)
    write_atomic(filename, lambda file: figure.savefig(file, format="png"))


def save_samples(model, filename, title):
    """64 samples and their means, from the same noise at every call (question 1.14)."""
    sampled_ims, im_means = model.sample(64, torch.Generator().manual_seed(0))
    save_images({"Bernoulli draws": sampled_ims, "means": im_means}, filename, title)


@torch.no_grad()
def save_reconstructions(model, x, filename, note=""):
    """Images x [50, 784] in five rows, each above the row of its reconstructions, from the posterior's mean."""
    recon = model.decoder(model.encoder(x.float())[0])
    pairs = torch.stack([x.view(5, 10, 784), recon.view(5, 10, 784)], dim=1).view(100, 784)
    save_images({"below each row of images: its reconstructions": pairs}, filename, f"Validation images{note}", 10)


@torch.no_grad()
@rc_context(PRINT)
def save_manifold(model, filename, note="", n=20):
    """Decoder means over a grid of z whose lines have equal mass of the prior between them (question 1.15).

    As in Kingma & Welling (2014), figure 4b: z = ppf(u) of equally spaced u in [0.01, 0.99].
    """
    z = torch.from_numpy(norm.ppf(np.linspace(0.01, 0.99, n))).float()
    z1, z2 = torch.meshgrid(z, z.flip(0), indexing="xy")  # z1 grows to the right, z2 upwards
    means = model.decoder(torch.stack([z1, z2], dim=-1).view(-1, 2).to(next(model.parameters()).device))
    edge = 0.49 / (n - 1)  # half a tile, as u is in the middle of each
    figure = Figure(figsize=(4.7, 4.7), layout="constrained")
    axes = figure.subplots()
    axes.imshow(image_grid(means, n), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest",
                extent=2 * (0.01 - edge, 0.99 + edge))
    axes.set(xlabel=r"$\Phi(z_1)$", ylabel=r"$\Phi(z_2)$", title=f"Decoder means over the latent space{note}")
    write_atomic(filename, lambda file: figure.savefig(file, format="png"))


# ------------------------------------------------------------------------------------------------------ checkpoint

def make_modules(flags):
    """The networks of a run with these flags, by the names of their weights in its checkpoint."""
    return {name: VAE(z_dim=flags["zdim"]) for name in ("model", "averaged")}


def load_model(checkpoint, device="cpu"):
    """The VAE (averaged weights of the best epoch so far) in eval mode, from a run's checkpoint.pt or best.pt."""
    _, modules = read_checkpoint(checkpoint, SCRIPT, FLAGS, make_modules)
    return modules["averaged"].to(device).eval()


# ------------------------------------------------------------------------------------------------------------ main

def run_name(args):
    """Of the output folder: see default_out_dir."""
    return f"vae_z{args.zdim}"


def run(args, checkpoint):
    """Train, from the start or from `checkpoint`; then measure the best epoch on the test set, and draw it."""
    wall_start, device = time.time(), torch.device(args.device)
    data = load_binarized(args.dataset, args.data_dir)
    note, out_dir = label(data.name), args.out_dir or default_out_dir(run_name(args), data.name)
    args.flags["dataset"] = data.name  # no longer auto
    claim(out_dir, data, checkpoint)
    train, val, test = (split.images.to(device) for split in (data.train, data.val, data.test))
    if args.dry_run:
        train, val, test = train[:5 * args.batch_size // 2], val[:200], test[:200]

    torch.manual_seed(args.seed)
    model = VAE(z_dim=args.zdim).to(device)
    n_parameters = sum(p.numel() for p in model.parameters())
    averaged = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.05, fused=True)
    n_batches = math.ceil(len(train) / args.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, pct_start=0.1, cycle_momentum=False,
        total_steps=max(20, args.epochs * n_batches))  # at 10 it divides by zero
    state = {"model": model, "averaged": averaged, "optimizer": optimizer, "schedule": schedule}
    rows, best = [], None  # of metrics.csv; the averaged weights with the best validation ELBO
    losses, seconds, signals = [], 0.0, []  # of the running epoch
    save_samples(averaged, out_dir / "samples_start.png", f"Samples before training{note}")
    if checkpoint:
        for name, part in state.items():
            part.load_state_dict(checkpoint[name])
        rows, best, losses, seconds = (checkpoint[key] for key in ("rows", "best", "losses", "seconds"))
        set_random_states(checkpoint, device)
        wall_start -= seconds + sum(row["seconds"] for row in rows)  # the time before the interruption counts

    def save():
        write_checkpoint(out_dir, {
            "script": SCRIPT, "flags": args.flags, "md5": data.md5, "epoch": len(rows), "rows": rows, "best": best,
            "losses": [(float(loss), size) for loss, size in losses], "seconds": seconds,
            **random_states(device), **{name: part.state_dict() for name, part in state.items()}})

    def on_step():
        schedule.step()
        n = schedule.last_epoch  # updates so far
        decay = min(EMA_DECAY, (1 + n) / (10 + n))  # less at first, to forget the untrained weights
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - decay)
        bar.update()
        if n % 50 == 0 or n % n_batches == 0 or signals:
            elbo = -float(losses[-1][0])
            check_finite(elbo + sum(p.detach().sum() for p in model.parameters()), len(rows) + 1, args.lr)
            bar.set_postfix_str(f"ELBO {elbo:.1f}")
        if signals:
            sys.exit(128 + signals[0])

    print(f"{data.name}{note}, binarization: {data.binarization}; {len(train)} training images\n"
          f"VAE{note} with z_dim {args.zdim}, {n_parameters / 1e6:.2f}M parameters, on {device}; output in {out_dir}\n"
          f"epoch  train ELBO    val ELBO  seconds  images/s  learning rate")
    bar = tqdm(total=args.epochs * n_batches, initial=schedule.last_epoch, unit="batch", disable=None)  # tty only
    on_signals(lambda number, frame: signals.append(number))  # on_step looks, when a batch is done
    try:
        for epoch in range(len(rows) + 1, args.epochs + 1):
            start = time.time() - seconds
            rng = torch.Generator().manual_seed(args.seed + 1_000_003 * epoch)  # so a resumed epoch is the same
            order = torch.randperm(len(train), generator=rng).to(device)
            images = shift_some(train, 0.5 - 0.5 * (epoch - 1) / args.epochs, rng)  # fewer and fewer
            loaders = images[order].split(args.batch_size)[len(losses):], val.split(1000)
            train_elbo, val_elbo = run_epoch(model, loaders, optimizer, averaged, on_step, losses)
            check_finite(train_elbo + val_elbo, epoch, args.lr)
            seconds = time.time() - start
            rows.append({"epoch": epoch, "train_elbo": train_elbo, "val_elbo": val_elbo, "seconds": seconds,
                         "images_per_s": len(train) / seconds, "learning_rate": schedule.get_last_lr()[0]})
            tqdm.write("{:5d}  {:10.2f}  {:10.2f}  {:7.1f}  {:8.0f}  {:13.2e}".format(*rows[-1].values()) + note)
            if best is None or val_elbo > best["val_elbo"]:
                best = {"epoch": epoch, "val_elbo": val_elbo, "model": copy.deepcopy(averaged.state_dict())}
            if epoch == (args.epochs + 1) // 2:
                save_samples(averaged, out_dir / "samples_half.png", f"Samples after epoch {epoch}{note}")
            losses, seconds = [], 0.0
            save()
        bar.close()
        on_signals()  # from here on they end the program at once: the training is saved
        if signals:
            sys.exit(128 + signals[0])

        averaged.load_state_dict(best["model"])
        torch.manual_seed(args.seed)  # so that an interrupted run ends with the same results
        scores = evaluate(averaged, test, args.iw_samples)
        save_elbo_plot([row["train_elbo"] for row in rows], [row["val_elbo"] for row in rows], out_dir / "elbo.png",
                       f", {args.zdim} latent dimensions{note}")
        save_samples(averaged, out_dir / "samples_end.png", f"Samples after training{note}")
        save_reconstructions(averaged, val[::len(val) // 50][:50], out_dir / "reconstructions.png", note)
        if args.zdim == 2:
            save_manifold(averaged, out_dir / "manifold.png", note)
    except SystemExit:  # from a signal
        if len(rows) < args.epochs:
            seconds = time.time() - start
            save()
        say_how_to_resume(args, out_dir)
        raise
    finally:
        bar.close()

    seconds = sum(row["seconds"] for row in rows)
    write_results(out_dir, SCRIPT, args, data, {
        "binarization": data.binarization, "parameters": n_parameters, "train_seconds": seconds,
        "images_per_s": len(train) * len(rows) / seconds, "wall_seconds": time.time() - wall_start,
        "best_epoch": best["epoch"], "val_elbo": best["val_elbo"], **scores})
    log_px = f"; log p(x) >= {scores['test_log_px']:.2f} (k = {args.iw_samples})" if args.iw_samples else ""
    print(f"test, nats per image{note}: ELBO {scores['test_elbo']:.2f} = "
          f"log p(x|z) {scores['test_log_p_x_given_z']:.2f} - KL {scores['test_kl']:.2f}{log_px}; "
          f"weights of epoch {best['epoch']}")


def save_sample_files(args):
    """--sample: N images of a trained model, uint8 [N, 28, 28], in samples.npz, and the first 100 in samples.png."""
    model, generator = load_model(args.resume, args.device), torch.Generator().manual_seed(args.seed)
    parts = [[(255 * x).round().byte().cpu() for x in model.sample(min(1000, args.sample - i), generator)]
             for i in range(0, args.sample, 1000)]
    samples, means = (torch.cat(part) for part in zip(*parts))  # [N, 784]
    write_atomic(args.out_dir / "samples.npz", lambda file: np.savez_compressed(
        file, samples=samples.view(-1, 28, 28).numpy(), means=means.view(-1, 28, 28).numpy()))
    save_images({"Bernoulli draws": samples[:100] / 255, "means": means[:100] / 255}, args.out_dir / "samples.png",
                f"Samples{label(args.dataset)}", columns=min(10, args.sample))


def main(argv=None):
    with one_line_errors(SCRIPT):
        args, checkpoint = parse_flags(argv, SCRIPT, __doc__, FLAGS, run_name, make_modules)
        if args.sample:
            save_sample_files(args)
        else:
            run(args, checkpoint)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # so that a log file can be followed
    main()
