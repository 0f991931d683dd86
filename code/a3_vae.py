"""Variational autoencoder on binarized MNIST (hand-out questions 1.12 to 1.15).

    python a3_vae.py --zdim 20      # figures and results in report/figures/vae_z20
    python a3_vae.py --zdim 2       # the same and the data manifold, in report/figures/vae_z2

Expect a test ELBO of -86.3 and log p(x) >= -83.2 nats per image (-133.4 and -131.0 with --zdim 2), after 10 minutes of
training on two CPU cores. The model: Kingma & Welling (2014), Auto-Encoding Variational Bayes, with residual blocks.
"""

import argparse
import copy
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure  # not pyplot, which looks for a display
from torchvision.utils import save_image
from tqdm import tqdm

from datasets import DATA_DIR, DataError, load_binarized

MAX_GRAD_NORM = 100  # gradient clipping: only rare outliers exceed it
IW_SAMPLES = 256  # samples of z per test image in the importance-weighted bound on log p(x)
FIGURES = Path(__file__).resolve().parents[1] / "report" / "figures"
FORMAT = "a3_vae 3"  # of checkpoints; files of another script or version are rejected


# ----------------------------------------------------------------------------------------------------------- model
class Residual(nn.Sequential):
    """x + f(x), where f is two layers of one kind, nn.Linear or nn.Conv2d, each after an activation."""
    def __init__(self, layer, *args, **kwargs):
        super().__init__(nn.SiLU(), layer(*args, **kwargs), nn.SiLU(), layer(*args, **kwargs))

    def forward(self, x):
        return x + super().forward(x)


class Encoder(nn.Module):
    """q(z|x) = N(mean(x), diag(std(x)^2)), hand-out equation 13."""
    def __init__(self, hidden_dim=256, z_dim=20):
        super().__init__()
        self.net = nn.Sequential(
            nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, 32, 5, stride=2, padding=2), nn.SiLU(),     # [B, 32, 14, 14]
            nn.Conv2d(32, 32, 3, stride=2, padding=1), Residual(nn.Conv2d, 32, 32, 3, padding=1),  # [B, 32, 7, 7]
            Residual(nn.Conv2d, 32, 32, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(32 * 7 * 7, hidden_dim),
            Residual(nn.Linear, hidden_dim, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, 2 * z_dim))

    def forward(self, x):
        """x [B, 784] in {0, 1} -> mean and std, each [B, z_dim], std > 0."""
        mean, log_std = self.net(x).chunk(2, dim=1)
        return mean, log_std.clamp(-8, 4).exp()  # bounded, so that the KL divergence is finite


class Decoder(nn.Module):
    """p(x|z) = prod_m Bernoulli(x_m | f(z)_m), hand-out equation 4."""
    def __init__(self, hidden_dim=256, z_dim=20):
        super().__init__()
        self.logits = nn.Sequential(  # z [B, z_dim] -> log(f(z) / (1 - f(z))), [B, 784]
            nn.Linear(z_dim, hidden_dim), Residual(nn.Linear, hidden_dim, hidden_dim), nn.SiLU(),
            nn.Linear(hidden_dim, 32 * 7 * 7), nn.Unflatten(1, (32, 7, 7)), Residual(nn.Conv2d, 32, 32, 3, padding=1),
            nn.SiLU(), nn.Conv2d(32, 4 * 32, 3, padding=1), nn.PixelShuffle(2),  # [B, 128, 7, 7] -> [B, 32, 14, 14]
            Residual(nn.Conv2d, 32, 32, 3, padding=1),
            nn.SiLU(), nn.Conv2d(32, 4, 3, padding=1), nn.PixelShuffle(2), nn.Flatten())  # [B, 4, 14, 14] -> [B, 784]

    def forward(self, z):
        """z [B, z_dim] -> the Bernoulli means f(z), [B, 784] in (0, 1)."""
        return self.logits(z).sigmoid()


class VAE(nn.Module):
    def __init__(self, hidden_dim=256, z_dim=20):
        super().__init__()
        self.z_dim = z_dim
        self.encoder, self.decoder = Encoder(hidden_dim, z_dim), Decoder(hidden_dim, z_dim)
        self.to(memory_format=torch.channels_last)  # makes convolutions faster, on a CPU by a fifth

    def forward(self, x):
        """x [B, 784] in {0, 1} -> average negative ELBO, a scalar (equation 12 with one sample of z)."""
        mean, std = self.encoder(x)
        z = mean + std * torch.randn_like(std)  # the reparametrization trick, question 1.11
        log_p_x_z = log_p_x_given_z(x, self.decoder.logits(z))
        # the KL's gradient through z alone is less noisy (Roeder et al. 2017), but with z_dim <= 2 it trains worse
        kl = log_q_over_p(z, mean.detach(), std.detach()) if self.z_dim > 2 else kl_divergence(mean, std)  # [B]
        return (kl - log_p_x_z).mean()

    @torch.no_grad()
    def sample(self, n_samples):
        """z ~ N(0, I), then x ~ p(x|z) (question 1.2) -> draws in {0, 1} and Bernoulli means, each [n_samples, 784]."""
        z = torch.randn(n_samples, self.z_dim)  # on the CPU: a seed gives the same noise on every device
        im_means = torch.cat([self.decoder(batch.to(next(self.parameters()).device)) for batch in z.split(1000)])
        return (torch.rand(im_means.shape).to(im_means) < im_means).float(), im_means


def log_p_x_given_z(x, logits):
    """log prod_m Bernoulli(x_m | sigmoid(logits_m)): x and logits [B, 784] -> [B], nats."""
    return -F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(1)  # over pixels


def kl_divergence(mean, std):
    """KL(N(mean, diag(std^2)) || N(0, I)): [B, z_dim] each -> [B], nats (question 1.5)."""
    return 0.5 * (mean ** 2 + std ** 2 - 1 - 2 * std.log()).sum(1)  # over latent dimensions


def log_q_over_p(z, mean, std):
    """log q(z|x) - log p(z), whose mean over z ~ q(z|x) is the KL divergence: [..., z_dim] each -> [...], nats."""
    return (0.5 * (z ** 2 - ((z - mean) / std) ** 2) - std.log()).sum(-1)


# ----------------------------------------------------------------------------------------- training and evaluation
def shift_some(images, share):
    """Shift a `share` of the images [N, 784] by -1, 0 or 1 pixels in x and in y, as data augmentation."""
    images = images.view(-1, 28, 28).clone()
    chosen = torch.randperm(len(images))[:round(share * len(images))].to(images.device)
    for i, indices in enumerate(chosen.chunk(9)):
        images[indices] = images[indices].roll((i // 3 - 1, i % 3 - 1), dims=(1, 2))  # borders are nearly blank
    return images.flatten(1)


@torch.no_grad()
def update_average(averaged, model, n_updates):
    """Move the averaged weights towards the model's, so that the last tenth of the updates so far counts most."""
    torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 9 / (10 + n_updates))


def epoch_iter(model, data, optimizer, schedule=None, averaged=None):
    """One pass over batches [B, 784], with updates if the model is in training mode. Returns the average ELBO."""
    device = next(model.parameters()).device
    total, n_images = 0, 0
    with torch.set_grad_enabled(model.training):
        for x in tqdm(data, leave=False, disable=None):  # disable=None: no bar if the output is not a terminal
            loss = model(x.to(device, torch.float32).flatten(1))  # [B, 784] -> a scalar
            if model.training:
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
                optimizer.step()
                if schedule:
                    schedule.step()
                    update_average(averaged, model, schedule.last_epoch)  # last_epoch counts updates
            total += loss.detach() * len(x)  # .item() would make the CPU wait for the GPU
            n_images += len(x)
    return -float(total) / n_images


def run_epoch(model, data, optimizer, schedule=None, averaged=None):
    """Train on data[0], then evaluate data[1] with the averaged weights, if given. Returns both ELBOs."""
    model.train()
    train_elbo = epoch_iter(model, data[0], optimizer, schedule, averaged)
    model.eval()
    return train_elbo, epoch_iter(model if averaged is None else averaged, data[1], optimizer)


@torch.no_grad()
def evaluate(model, x, k):
    """ELBO, its two terms, and a tighter bound on log p(x): averages over x [N, 784], nats.

    The bound is E log(1/k sum_i w_i) with w_i = p(x|z_i) p(z_i) / q(z_i|x) and z_i ~ q(z|x) (Burda et al. 2016, eq. 8).
    With k = 1 it is the ELBO; it grows with k, towards log p(x).
    """
    totals = 0
    for batch in tqdm(x.split(2), "test", leave=False, disable=None):  # few images, but k samples of z for each
        mean, std = model.encoder(batch.float())                          # [B, z_dim]
        z = mean + std * torch.randn(k, *mean.shape, device=mean.device)  # [k, B, z_dim]
        log_p_x_z = log_p_x_given_z(batch.float().repeat(k, 1), model.decoder.logits(z.flatten(0, 1))).view(k, -1)
        log_p_x = (log_p_x_z - log_q_over_p(z, mean, std)).logsumexp(0) - math.log(k)  # [B]
        totals += torch.stack([log_p_x_z.mean(0), kl_divergence(mean, std), log_p_x]).sum(1)  # [3, B] -> [3]
    log_p_x_z, kl, log_px = (totals / len(x)).tolist()
    return {"test_elbo": log_p_x_z - kl, "test_log_p_x_given_z": log_p_x_z, "test_kl": kl, "test_log_px": log_px}


# --------------------------------------------------------------------------------------------------------- figures
def save_elbo_plot(train_curve, val_curve, filename, untrained_elbo=None):
    """Average ELBO of each epoch, nats per image (question 1.13): the full range, and its upper end enlarged."""
    figure = Figure(figsize=(6, 2.4), layout="constrained")
    left, right = figure.subplots(1, 2, subplot_kw={"xlabel": "epoch", "ylabel": "ELBO (nats per image)"})
    for axes in (left, right):
        for curve, style, name in ((train_curve, ".-", "training"), (val_curve, ".--", "validation")):
            axes.plot(range(1, len(curve) + 1), curve, style, label=f"{name} (last {curve[-1]:.1f})")
        axes.grid(alpha=0.3)
    right.set_ylim(np.quantile([*train_curve, *val_curve], [0.1, 1]) + [-1, 1])  # from the 10% quantile up
    if untrained_elbo is not None:
        left.plot(0, untrained_elbo, "k.", label=f"before training ({untrained_elbo:.1f})")
    left.legend(loc="center right", bbox_to_anchor=(1, 0.4))
    figure.savefig(filename)


def save_grid(images, filename, nrow):
    """Write images [N, 784] in [0, 1] as a grid, `nrow` in a row, black on white, three times enlarged."""
    images = F.interpolate(1 - images.detach().float().cpu().view(-1, 1, 28, 28), scale_factor=3)  # [N, 1, 84, 84]
    save_image(images, filename, nrow=nrow, padding=2, pad_value=0.8)


def save_samples(model, filename):
    """64 samples (left half) and their Bernoulli means (right half), from the same noise each time (question 1.14)."""
    torch.manual_seed(0)
    samples, means = model.sample(64)
    save_grid(torch.cat([samples.view(8, 8, 784), means.view(8, 8, 784)], dim=1).flatten(0, 1), filename, nrow=16)


def save_manifold(model, filename, n=20):
    """Decoder means over an n x n grid of z, at quantiles 1% to 99% of the prior (question 1.15)."""
    z = torch.special.ndtri(torch.linspace(0.01, 0.99, n))  # the normal distribution's percent point function
    z = torch.cartesian_prod(z.flip(0), z).flip(1)  # [n * n, 2]: z1 grows to the right, z2 upwards
    save_grid(model.decoder(z.to(next(model.parameters()).device)), filename, nrow=n)


# ----------------------------------------------------------------------------------------------------- checkpoints
def save(content, path):
    """torch.save through a temporary file, so that an interrupted save leaves the old file intact."""
    torch.save(content, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def load_checkpoint(path):
    """The content of a checkpoint.pt, best.pt or weights.pt of this script. Raises OSError for any other file."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)  # so that a file cannot run code
        if content["format"] == FORMAT:
            return content
    except Exception:  # torch raises exceptions of many types
        pass
    raise OSError(f"{path} is missing, damaged or of another version: train first, or set --out_dir")


def load_model(checkpoint, device="cpu"):
    """The trained VAE (averaged weights) in eval mode, from checkpoint.pt (last epoch), best.pt or weights.pt."""
    content = load_checkpoint(checkpoint)
    model = VAE(z_dim=content["zdim"])
    model.load_state_dict(content["averaged"])
    return model.to(device).eval()


# ------------------------------------------------------------------------------------------------------------ main
def parse_args(argv=None):
    parser = argparse.ArgumentParser(  # no usage line, so that an error is a single line
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS)
    add = parser.add_argument_group("model and training").add_argument
    add("--zdim", type=int, default=20, help="dimensions of the latent space (default: %(default)s)")
    add("--epochs", "--n_epochs", type=int, default=40, help="passes over the training images (default: %(default)s)")
    add("--batch_size", type=int, default=128, help="images per update (default: %(default)s)")
    add("--lr", type=float, help="peak of the one-cycle learning rate (default: 0.003; 0.0015 if --zdim <= 2)")
    add("--seed", type=int, default=42, help="seed of weights, image order and noise (default: %(default)s)")
    add("--device", help="cpu, cuda or mps (default: %(default)s)", default="cuda" if torch.cuda.is_available() else
        "mps" if torch.backends.mps.is_available() else "cpu")
    add = parser.add_argument_group("data and output").add_argument
    add("--dataset", choices=["auto", "mnist", "glyphs"], default="auto",
        help="auto: MNIST or, if that is not available, glyphs (digits drawn in fonts) (default: %(default)s)")
    add("--data_dir", type=Path, default=DATA_DIR, help="folder of the data (default: %(default)s)")
    add("--out_dir", type=Path, help="folder of the run (default: report/figures/vae_z<zdim>)")
    add = parser.add_argument_group("instead of a full new run").add_mutually_exclusive_group().add_argument
    add("--dry_run", action="store_true", help="a few batches of everything, in a temporary folder or in --out_dir")
    add("--resume", action="store_true", help="continue the run in its folder, with its own settings")
    add("--sample", type=int, metavar="N", help="write N samples of the trained model to samples.npz and samples.png")
    args = parser.parse_args(argv)
    if args.lr is None:  # with two dimensions q(z|x) is so narrow that large steps throw training back
        args.lr = 3e-3 if args.zdim > 2 else 1.5e-3
    for name, low in (("zdim", 1), ("epochs", 1), ("batch_size", 1), ("lr", 1e-9), ("seed", 0), ("sample", 1)):
        if getattr(args, name) is not None and not low <= getattr(args, name) < 2 ** 31:
            parser.error(f"--{name} must be between {low} and {2 ** 31 - 1}")
    try:
        torch.zeros(1, device=args.device).item()
    except Exception as error:  # torch raises exceptions of many types
        parser.error(f"--device {args.device} cannot be used: {str(error).partition(chr(10))[0]}")
    return args


def run_dir(args):
    """The folder of the run. Glyphs get one of their own, so that they never overwrite the figures of MNIST."""
    return args.out_dir or FIGURES / f"vae_z{args.zdim}{'_glyphs' if args.dataset == 'glyphs' else ''}"


def write_samples(args):
    """--sample: N samples and their means, uint8 [N, 28, 28], in samples.npz, and the first samples in samples.png."""
    model = load_model(run_dir(args) / "weights.pt", args.device)
    torch.manual_seed(args.seed)
    samples, means = ((255 * x).round().byte().cpu().view(-1, 28, 28) for x in model.sample(args.sample))
    np.savez_compressed(run_dir(args) / "samples.npz", samples=samples, means=means)
    save_grid(samples[:100] / 255, run_dir(args) / "samples.png", nrow=10)
    print(f"{args.sample} samples are in {run_dir(args)}")


def main(args):
    checkpoint = load_checkpoint(run_dir(args) / "checkpoint.pt") if args.resume else None
    vars(args).update({**checkpoint["settings"], "out_dir": run_dir(args)} if checkpoint else {})
    data = load_binarized(args.dataset, args.data_dir)
    if getattr(args, "dataset_md5", data.md5) != data.md5:  # that of the checkpoint
        raise DataError(f"the run in {run_dir(args)} began with other images: give their --data_dir, or start again")
    args.dataset, args.dataset_md5 = data.name, data.md5  # no longer auto
    train, val, test = (split.images.to(args.device) for split in (data.train, data.val, data.test))
    if args.dry_run:
        args.epochs, args.out_dir = min(args.epochs, 2), args.out_dir or Path(tempfile.mkdtemp(prefix="a3_vae_"))
        train, val, test = train[:5 * args.batch_size // 2], val[:200], test[:50]
    settings = {k: v for k, v in vars(args).items() if k not in ("device", "data_dir", "out_dir", "resume", "sample")}
    out_dir = args.out_dir = run_dir(args)
    out_dir.mkdir(parents=True, exist_ok=True)

    # the random numbers of an epoch are seeded by 10,000 * seed + epoch, so a resumed run needs no saved random state
    torch.manual_seed(10_000 * args.seed)
    model = VAE(z_dim=args.zdim).to(args.device)
    averaged = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.05, fused=True)
    n_updates = max(20, args.epochs * math.ceil(len(train) / args.batch_size))  # with 10, OneCycleLR divides by zero
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, n_updates, pct_start=0.1, cycle_momentum=False)
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"{data.name} ({data.binarization}), {n_parameters:,} parameters, {args.device}; writing to {out_dir}")
    untrained_elbo = epoch_iter(averaged, val.split(1000), None)
    state = {"model": model, "averaged": averaged, "optimizer": optimizer, "schedule": schedule}
    rows = checkpoint["rows"] if checkpoint else []
    if checkpoint:
        for name, part in state.items():
            part.load_state_dict(checkpoint[name])
    else:
        if (out_dir / "checkpoint.pt").exists() and not (out_dir / "results.json").exists():  # an unfinished run
            for name in ("checkpoint", "best"):
                os.replace(out_dir / f"{name}.pt", out_dir / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}.pt")
            print(f"{out_dir} has an unfinished run: its checkpoints are kept, renamed by date", file=sys.stderr)
        (out_dir / "checkpoint.pt").unlink(missing_ok=True)  # of a finished run
        save_samples(averaged, out_dir / "samples_start.png")

    for epoch in range(len(rows) + 1, args.epochs + 1):
        start = time.time()
        torch.manual_seed(10_000 * args.seed + epoch)
        share = 0.5 - 0.5 * (epoch - 1) / args.epochs if args.zdim > 2 else 0  # two dimensions cannot encode a shift
        batches = shift_some(train, share)[torch.randperm(len(train))].split(args.batch_size)
        train_elbo, val_elbo = run_epoch(model, (batches, val.split(1000)), optimizer, schedule, averaged)
        if not math.isfinite(train_elbo + val_elbo):
            raise FloatingPointError(f"the loss in epoch {epoch} is not finite: start again with a smaller --lr")
        seconds = time.time() - start
        rows.append({"epoch": epoch, "train_elbo": train_elbo, "val_elbo": val_elbo, "seconds": seconds,
                     "images_per_s": len(train) / seconds, "learning_rate": schedule.get_last_lr()[0]})
        print("  ".join(f"{name} {value:<8.5g}" for name, value in rows[-1].items()))
        if epoch == (args.epochs + 1) // 2:
            save_samples(averaged, out_dir / "samples_half.png")
        weights = {"format": FORMAT, "zdim": args.zdim, "averaged": averaged.state_dict()}
        if val_elbo == max(row["val_elbo"] for row in rows):
            save(weights, out_dir / "best.pt")
        np.savetxt(out_dir / "metrics.csv", [[*row.values()] for row in rows], "%.8g", ",",
                   header=",".join(rows[0]), comments="")
        (out_dir / "results.json").unlink(missing_ok=True)  # of an earlier run
        parts = {name: part.state_dict() for name, part in state.items()}
        save({**weights, **parts, "rows": rows, "settings": settings}, out_dir / "checkpoint.pt")

    torch.manual_seed(10_000 * args.seed + args.epochs + 1)
    best_row = max(rows, key=lambda row: row["val_elbo"])
    best = load_model(out_dir / "best.pt", args.device)
    scores = evaluate(best, test, IW_SAMPLES)
    save_elbo_plot(*([r[k] for r in rows] for k in ("train_elbo", "val_elbo")), out_dir / "elbo.pdf", untrained_elbo)
    save_samples(best, out_dir / "samples_end.png")
    if args.zdim == 2:
        save_manifold(best, out_dir / "manifold.png")
    save(load_checkpoint(out_dir / "best.pt"), out_dir / "weights.pt")
    peak_memory_mb, seconds = None, sum(row["seconds"] for row in rows)
    if sys.platform != "win32":  # ru_maxrss counts KiB on Linux and bytes on macOS
        import resource
        peak_memory_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024 ** (1 + (sys.platform == "darwin"))
    results = {**settings, "binarization": data.binarization, "device": args.device, "parameters": n_parameters,
               "train_seconds": seconds, "images_per_s": len(train) * len(rows) / seconds,
               "peak_memory_mb": peak_memory_mb, "untrained_elbo": untrained_elbo, "best_epoch": best_row["epoch"],
               "val_elbo": best_row["val_elbo"], **scores, "iw_samples": IW_SAMPLES}
    (out_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"test: ELBO {scores['test_elbo']:.2f}, log p(x) >= {scores['test_log_px']:.2f} nats per image")


if __name__ == "__main__":
    arguments = parse_args()
    try:
        (write_samples if arguments.sample else main)(arguments)
    except KeyboardInterrupt:
        print(f'interrupted; a run continues with --resume --out_dir "{run_dir(arguments)}"', file=sys.stderr)
        sys.exit(130)
    except (DataError, FloatingPointError, OSError) as error:
        sys.exit(f"{Path(__file__).name}: error: {error}")
