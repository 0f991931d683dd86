"""Normalizing flow on MNIST (hand-out questions 3.7 and 3.8).

    python a3_nf.py                     # figures and results in report/figures/nf
    python a3_nf.py --n_mixtures 0      # with RealNVP's affine couplings, in report/figures/nf_affine

Expect 0.967 bits per dimension on the test set with one draw of the dequantization noise, after about two hours on one
CPU core, and less than 1.85 on validation images after about 15 seconds. Sources: Dinh et al. (2017), Density
estimation using Real NVP, for affine couplings, masks and scales; Ho et al. (2019), Flow++, for mixture couplings.
"""

import argparse
import copy
import json
import math
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure  # not pyplot, which looks for a display
from torchvision.utils import save_image
from tqdm import tqdm

from datasets import DATA_DIR, DataError, load

EMA_DECAY = 0.999  # of the averaged weights, per update
MAX_GRAD_NORM = 1  # gradient clipping: only rare outliers exceed it
IW_SAMPLES = 8  # draws of the dequantization noise per test image in the importance-weighted bound
COMMON_LEVELS = 0, 252, 253, 254, 255  # grey levels of 88% of MNIST's pixels; each is a component of the mixtures
FIXED_WEIGHT = 1e-3  # of the standard logistic that is a component of every mixture
TARGET_BPD = 1.85  # question 3.8
FIGURES = Path(__file__).resolve().parents[1] / "report" / "figures"
FORMAT = "a3_nf 3"  # of checkpoints; files of another script or version are rejected


# ----------------------------------------------------------------------------------------------------------- model
def log_prior(x):
    """log p(x) of standard logistic variables: x [B, D] -> [B], nats. If F is the CDF of X, logit F(X) has this law."""
    return (F.logsigmoid(x) + F.logsigmoid(-x)).sum(1)


def sample_prior(size):
    """Draws from the prior, a tensor of this size: the inverse CDF, the logit, of uniform noise."""
    return torch.rand(size).clamp(min=2 ** -25).logit()  # rand can be 0, but not 1


def get_mask(low=2, high=4, distance=1, side=28):
    """Mask of a coupling, [1, side * side]: 1 for pixels that it sees, 0 for those that it changes, -1 for the others.

    In each 2 x 2 block, with `distance` from pixel to pixel, the ranks are 0 2 / 3 1. Pixels with rank < low are seen,
    those with low <= rank < high are changed. The default is a checkerboard.
    """
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    remaining = (row % distance == 0) & (column % distance == 0)
    row, column = row // distance, column // distance
    rank = 2 * ((row + column) % 2) + row % 2
    return torch.where(remaining & (rank < high), (rank < low).long(), -1).view(1, -1)


def pixel_indices(mask):
    """Indices of the pixels where a mask [1, D] is 1, and of those where it is 0: [c, H, W] each, or as a list [c]."""
    side = math.isqrt(mask.numel())
    for n in filter(lambda n: side % n == 0, range(2, side)):
        images = mask.view(1, side, side), torch.arange(side ** 2).view(1, side, side)
        values, pixels = (F.pixel_unshuffle(image, n) for image in images)  # [n * n, H, W]
        if (values == values[:, :1, :1]).all():  # equal tiles of n x n pixels: each place in the tile is a channel
            return pixels[values[:, 0, 0] == 1], pixels[values[:, 0, 0] == 0]
    return (mask[0] == 1).nonzero().flatten(), (mask[0] == 0).nonzero().flatten()


class Residual(nn.Sequential):
    """x + f(x), where f consists of the given layers."""
    def forward(self, x):
        return x + super().forward(x)


class Coupling(nn.Module):
    """RealNVP's affine coupling (Dinh et al. 2017, equations 7 and 8): y = x * exp(log_scale) + shift.

    x is the pixels where `mask` is 0. A network computes log_scale and shift from those where it is 1, so that the
    log-determinant is the sum of log_scale. `features`: [B, c, ...] -> [B, n_features * c, ...], the network's input.
    """
    def __init__(self, c_in, mask, n_hidden=32, n_blocks=2, n_parameters=2, features=lambda z: z, n_features=1):
        super().__init__()
        seen, changed = pixel_indices(mask)
        self.register_buffer("seen", seen, persistent=False)  # [c, H, W] or [c]
        self.register_buffer("changed", changed, persistent=False)
        self.features, self.n_parameters = features, n_parameters  # the latter per changed pixel
        spatial, pointwise = partial(nn.Conv2d, kernel_size=3, padding=1), partial(nn.Conv2d, kernel_size=1)
        if seen.dim() == 1:  # a list of pixels, not an image
            spatial, pointwise = nn.Linear, nn.Linear
        blocks = [Residual(nn.SiLU(), spatial(n_hidden, n_hidden), nn.SiLU(), pointwise(n_hidden, n_hidden))
                  for _ in range(n_blocks)]
        self.net = nn.Sequential(spatial(n_features * len(seen), n_hidden), *blocks, nn.SiLU(),
                                 pointwise(n_hidden, n_parameters * len(changed)))
        self.position = nn.Parameter(torch.zeros(n_features * len(seen), *seen.shape[1:]))  # tells where a pixel is
        nn.init.zeros_(self.net[-1].weight)  # so that the affine map starts as the identity
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, z, ldj, reverse=False):
        """z [B, c_in], log-determinant so far ldj [B], nats -> the same after the coupling, or its inverse."""
        parameters = self.net(self.features(z[:, self.seen]) + self.position).unflatten(1, (self.n_parameters, -1))
        changed, log_det = self.map(z[:, self.changed], parameters, reverse)  # [B, c, ...] each
        z = z.clone()
        z[:, self.changed] = changed
        return z, ldj + log_det.flatten(1).sum(1)

    def map(self, x, parameters, reverse=False):
        """x [B, c, ...], parameters [B, n_parameters, c, ...] -> y, log dy/dx; or with `reverse` y -> x, log dx/dy."""
        log_scale, shift = 2 * torch.tanh(parameters[:, 0] / 2), parameters[:, 1]  # bounded, so that nothing overflows
        return ((x - shift) * (-log_scale).exp(), -log_scale) if reverse else (x * log_scale.exp() + shift, log_scale)


class MixtureCoupling(Coupling):
    """Flow++'s coupling (Ho et al. 2019, section 3.2) without its affine map: y = logit of the CDF of a mixture."""
    def __init__(self, c_in, mask, components, n_mixtures=12, **options):
        super().__init__(c_in, mask, n_parameters=3 * n_mixtures + len(COMMON_LEVELS), **options)
        self.components, self.n_mixtures = components, n_mixtures
        bias = self.net[-1].bias.detach().view(self.n_parameters, -1)
        bias[n_mixtures] = 3  # the logit of black's weight: most pixels are black
        bias[-2 * n_mixtures:-n_mixtures] = torch.linspace(-1, 1, n_mixtures).view(-1, 1)  # equal means stay equal

    def map(self, x, parameters, reverse=False):
        logits, mean, log_s = parameters.tensor_split([-2 * self.n_mixtures, -self.n_mixtures], dim=1)
        mixture = logits, mean, log_s.clamp(-7, 7), self.components  # bounded, so that nothing overflows
        if not reverse:
            return mixture_logit(x, *mixture)
        x = mixture_logit_inverse(x, *mixture)
        return x, -mixture_logit(x, *mixture)[1]


def mixture_logit(x, logits, mean, log_s, components):
    """h = logit of the CDF of a mixture at x [B, ...], and log dh/dx, each [B, ...].

    The mixture is of K logistics, with `mean` and log scale `log_s` [B, K, ...], and J others, whose CDF, survival
    function and density components(x) returns, [B, J, ...] each. Their weights are the softmax of `logits`
    [B, K + J, ...]. A standard logistic is mixed in with weight FIXED_WEIGHT, so that the slope is never zero.
    """
    inverse_s = torch.exp(-log_s)
    u = (x.unsqueeze(1) - mean) * inverse_s
    cdf, sf = u.sigmoid(), (-u).sigmoid()  # of each logistic; sf, the survival function, is 1 - cdf
    functions = zip((cdf, sf, cdf * sf * inverse_s), components(x), strict=True)
    learned = torch.stack([(logits.softmax(1) * torch.cat(pair, dim=1)).sum(1) for pair in functions])
    fixed = torch.stack([x.sigmoid(), (-x).sigmoid(), x.sigmoid() * (-x).sigmoid()])
    log_cdf, log_sf, log_pdf = torch.lerp(learned, fixed, FIXED_WEIGHT).log()
    return log_cdf - log_sf, log_pdf - log_cdf - log_sf  # d logit(F) = dF / (F (1 - F))


@torch.no_grad()
def mixture_logit_inverse(h, logits, mean, log_s, components):
    """The x [B, ...] at which mixture_logit is h, by bisection, to the resolution of the dtype; without gradients."""
    x_k = mean + log_s.exp() * h.unsqueeze(1)  # where each logistic alone has this h; the fixed one has it at h
    low, high = torch.minimum(h, x_k.amin(1)) - 20, torch.maximum(h, x_k.amax(1)) + 20  # 20: enough for `components`
    for _ in range(200):  # about 40 halvings are enough in float32, and 70 in float64
        x = (low + high) / 2
        if (high - low <= torch.finfo(h.dtype).eps * x.abs().clamp(min=1e-3)).all():
            break
        less = mixture_logit(x, logits, mean, log_s, components)[0] < h
        low, high = torch.where(less, x, low), torch.where(less, high, x)
    return x


class Flow(nn.Module):
    """n_flows + 1 couplings, fine to coarse: each changes one pixel of every 2 x 2 block, given those not changed yet.

    After three of them an image of half the side is left, and treated in the same way. The last coupling has the mask
    of the one before it, inverted, and changes what is left.
    """
    def __init__(self, shape, n_flows=4, coupling=Coupling, **options):
        super().__init__()
        self.z_shape = tuple(shape)  # [D], for square images of D pixels
        masks = [get_mask(3 - i % 3, 4 - i % 3, 2 ** (i // 3), math.isqrt(shape[0])) for i in range(n_flows)]
        masks.append(torch.where(masks[-1] < 0, -1, 1 - masks[-1]))
        self.layers = nn.ModuleList([coupling(shape[0], mask, **options) for mask in masks])

    def forward(self, z, logdet, reverse=False):
        """z [B, D], logdet [B] -> (z, logdet); with `reverse` from the latent variables to the data."""
        for layer in reversed(self.layers) if reverse else self.layers:
            z, logdet = layer(z, logdet, reverse)
        return z, logdet


class EmpiricalLogit(nn.Module):
    """The logit of a CDF of the grey levels, nearly the empirical one: it makes pixels resemble the logistic prior.

    Black counts as one half: its true share, 0.8, would squeeze the greys, which cost most of the bits, into one tail.
    """
    def __init__(self):
        super().__init__()
        for name, *size in (("p", 256), ("cdf", 256), ("sf", 256), ("edges", 255), ("table", 4, 256)):
            self.register_buffer(name, torch.empty(size))
        self.fit(torch.arange(256))

    def fit(self, images):
        """Set the shares of the levels to those in images, integers 0..255 of any shape."""
        count = torch.bincount(images.flatten().cpu(), minlength=256) + 1  # so that each has positive probability
        count[0] = count[1:].sum()
        p, y = count.double() / count.sum(), torch.arange(256)
        self.p.copy_(p)  # the share of each level
        self.cdf.copy_(p.cumsum(0) - p)  # of all levels below it
        self.sf.copy_(p.flip(0).cumsum(0).flip(0) - p)  # of all above it
        self.edges.copy_(p.cumsum(0)[:-1].logit())  # the z between two levels
        self.table.copy_(torch.stack([(p.cumsum(0) - p / 2).logit(), y / 128 - 1, y == 0, y >= 252]))  # for features()

    def forward(self, y):
        """Grey levels y [B, D] in [0, 256] -> z [B, D], and the log-determinant [B], nats."""
        level = y.long().clamp(0, 255)
        u = (y - level).clamp(1e-6, 1 - 1e-6)  # so that no z is infinite
        log_cdf = (self.cdf[level] + u * self.p[level]).log()
        log_sf = (self.sf[level] + (1 - u) * self.p[level]).log()
        return log_cdf - log_sf, (self.p[level].log() - log_cdf - log_sf).sum(1)  # d logit(F) = dF / (F (1 - F))

    def level(self, z):
        """The inverse of the map, rounded down: z of any shape -> grey levels, integers from 0 to 255."""
        return torch.bucketize(z.detach(), self.edges, right=True)

    def features(self, z):
        """z [B, c, ...] -> network input [B, 4c, ...]: four functions of the level, free of the noise u."""
        return self.table[:, self.level(z)].transpose(0, 1).flatten(1, 2)

    def components(self, z):
        """CDF, survival function and density at z [B, ...] of uniform noise on each of the COMMON_LEVELS, [B, J, ...].

        With them a mixture can give black its probability, whatever u is; logistics alone would blur the level's edges.
        """
        level = self.level(z)
        p, at_z, above_z = self.p[level], z.sigmoid(), (-z).sigmoid()
        u, rest = (at_z - self.cdf[level]) / p, (above_z - self.sf[level]) / p  # rest = 1 - u, exact near u = 1
        steps = torch.stack([level - common for common in COMMON_LEVELS], dim=1)  # [B, J, ...]
        cdf, sf, density = (x.clamp(min=0).unsqueeze(1) * (steps == 0) for x in (u, rest, at_z * above_z / p))
        return cdf + (steps > 0), sf + (steps < 0), density


class Model(nn.Module):
    """Dequantization, the empirical logit, couplings: z = flow(logit(x + u)), which has the logistic prior."""
    def __init__(self, shape, n_hidden=32, n_mixtures=12, n_flows=12):
        super().__init__()
        self.logit = EmpiricalLogit()
        mixture = partial(MixtureCoupling, components=self.logit.components, n_mixtures=n_mixtures)
        self.flow = Flow(shape, n_flows, mixture if n_mixtures else Coupling, n_hidden=n_hidden,
                         features=self.logit.features, n_features=len(self.logit.table))

    def dequantize(self, x):
        """x + u with u uniform in [0, 1): so the density gives a bound, E log p(x + u) <= log P(x) (question 3.4)."""
        x = x.to(self.logit.p)  # its device and dtype
        return x + torch.rand_like(x).clamp(max=1 - 2 ** -16)  # x + u must not be rounded to x + 1

    def forward(self, x):
        """x [B, D], integers 0..255 -> log p(x + u) = log p(z) + log |det dz/dx| [B], nats (equation 17)."""
        z, ldj = self.flow(*self.logit(self.dequantize(x)))
        return log_prior(z) + ldj

    @torch.no_grad()
    def sample(self, n_samples):
        """Images [n_samples, D], integers 0..255. A seed gives the same noise, made on the CPU, on every device."""
        z = sample_prior((n_samples, *self.flow.z_shape)).to(self.logit.p)
        z = torch.cat([self.flow(batch, torch.zeros_like(batch[:, 0]), reverse=True)[0] for batch in z.split(1000)])
        return self.logit.level(z)


def bits_per_dimension(log_p, D=784):
    """Nats per image -> bits per dimension (question 3.8)."""
    return -log_p / (D * math.log(2))


# ----------------------------------------------------------------------------------------- training and evaluation
@torch.no_grad()
def update_average(averaged, model, n_updates):
    """averaged = decay * averaged + (1 - decay) * model, an exponential moving average of the weights, in place."""
    decay = min(EMA_DECAY, (1 + n_updates) / (10 + n_updates))  # smaller at first, to forget the initial weights
    torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - decay)


def epoch_iter(model, data, optimizer, schedule=None, averaged=None):
    """One pass over batches [B, 784], with updates if the model is in training mode. Returns the average bpd."""
    device = next(model.parameters()).device
    total, n_images = 0, 0
    with torch.set_grad_enabled(model.training):
        for batch in tqdm(data, leave=False, disable=None):  # disable=None: no bar if the output is not a terminal
            x = (batch[0] if isinstance(batch, (list, tuple)) else batch).to(device).flatten(1)  # [B, 784]
            loss = bits_per_dimension(model(x).mean(), x.shape[1])
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
    return float(total) / n_images


def run_epoch(model, data, optimizer, schedule=None, averaged=None):
    """Train on data[0], then evaluate data[1] with the averaged weights, if given. Returns both averages."""
    model.train()
    train_bpd = epoch_iter(model, data[0], optimizer, schedule, averaged)
    model.eval()
    return train_bpd, epoch_iter(model if averaged is None else averaged, data[1], optimizer)


def time_to_target(batches, model, images, reached):
    """Yield the batches. After 1, 2, 4, ... of them evaluate `images`; append to `reached` the time to TARGET_BPD."""
    start = time.time()
    for n, batch in enumerate(batches):
        if not reached and n.bit_count() == 1 and epoch_iter(model, [images], None) < TARGET_BPD:
            reached.append(time.time() - start)
        yield batch


@torch.no_grad()
def evaluate(model, x, k):
    """Bits per dimension of x [N, 784] with one draw of the noise u, and by the bound -E log(1/k sum_i p(x + u_i))."""
    totals = 0
    for batch in tqdm(x.split(500), "test", leave=False, disable=None):
        log_p = torch.stack([model(batch) for _ in range(k)])  # [k, B]
        totals += torch.stack([log_p[0], log_p.logsumexp(0) - math.log(k)]).sum(1)  # (Burda et al. 2016, equation 8)
    one, many = bits_per_dimension(totals / len(x), x.shape[1]).tolist()
    return {"test_bpd": one, "test_bpd_iw": many, "iw_samples": k}


# --------------------------------------------------------------------------------------------------------- figures
def save_bpd_plot(train_curve, val_curve, filename):
    """Bits per dimension of each epoch (question 3.8): with the hand-out's target of 1.85, and enlarged."""
    figure = Figure(figsize=(6, 2.4), layout="constrained")
    left, right = figure.subplots(1, 2, subplot_kw={"xlabel": "epoch", "ylabel": "bits per dimension"})
    for axes in (left, right):
        for curve, style, name in ((train_curve, ".-", "training"), (val_curve, ".--", "validation")):
            axes.plot(range(1, len(curve) + 1), curve, style, label=f"{name} (last {curve[-1]:.3f})")
        axes.grid(alpha=0.3)
    left.axhline(TARGET_BPD, color="black", linestyle=":", label=f"question 3.8: {TARGET_BPD}")
    left.legend()
    figure.savefig(filename)


def save_grid(images, filename, nrow):
    """Write images [N, 784] in [0, 1] as a grid, `nrow` in a row, black on white, three times enlarged."""
    images = F.interpolate(1 - images.detach().float().cpu().view(-1, 1, 28, 28), scale_factor=3)  # [N, 1, 84, 84]
    save_image(images, filename, nrow=nrow, padding=2, pad_value=0.8)


def save_samples(model, filename):
    """64 samples, from the same noise each time."""
    torch.manual_seed(0)
    save_grid(model.sample(64) / 255, filename, nrow=8)


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
    """The trained flow (averaged weights) in eval mode, from checkpoint.pt (last epoch), best.pt or weights.pt."""
    content = load_checkpoint(checkpoint)
    model = Model([784], n_mixtures=content["n_mixtures"])
    model.load_state_dict(content["averaged"])
    return model.to(device).eval()


# ------------------------------------------------------------------------------------------------------------ main
def parse_args(argv=None):
    parser = argparse.ArgumentParser(  # no usage line, so that an error is a single line
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS)
    add = parser.add_argument_group("model and training").add_argument
    add("--n_mixtures", type=int, default=12, help="logistics per mixture; 0: affine couplings (default: %(default)s)")
    add("--epochs", "--n_epochs", type=int, default=40, help="passes over the training images (default: %(default)s)")
    add("--batch_size", type=int, default=32, help="images per update (default: %(default)s)")
    add("--lr", type=float, default=8e-3, help="peak learning rate of the one-cycle schedule (default: %(default)s)")
    add("--seed", type=int, default=42, help="seed of weights, image order and noise (default: %(default)s)")
    add("--device", help="cpu, cuda or mps (default: %(default)s)", default="cuda" if torch.cuda.is_available() else
        "mps" if torch.backends.mps.is_available() else "cpu")
    add = parser.add_argument_group("data and output").add_argument
    add("--dataset", choices=["auto", "mnist", "glyphs"], default="auto",
        help="auto: MNIST or, if that is not available, glyphs (digits drawn in fonts) (default: %(default)s)")
    add("--data_dir", type=Path, default=DATA_DIR, help="folder of the data (default: %(default)s)")
    add("--out_dir", type=Path, help="folder of the run (default: report/figures/nf, or nf_affine)")
    add = parser.add_argument_group("instead of a full new run").add_mutually_exclusive_group().add_argument
    add("--dry_run", action="store_true", help="a few batches of everything, in a temporary folder or in --out_dir")
    add("--resume", action="store_true", help="continue the run in its folder, with its own settings")
    add("--sample", type=int, metavar="N", help="write N samples of the trained model to samples.npz and samples.png")
    args = parser.parse_args(argv)
    for name, low in (("n_mixtures", 0), ("epochs", 1), ("batch_size", 1), ("lr", 1e-9), ("seed", 0), ("sample", 1)):
        if getattr(args, name) is not None and not low <= getattr(args, name) < 2 ** 31:
            parser.error(f"--{name} must be between {low} and {2 ** 31 - 1}")
    try:
        torch.zeros(1, device=args.device).item()
    except Exception as error:  # torch raises exceptions of many types
        parser.error(f"--device {args.device} cannot be used: {str(error).partition(chr(10))[0]}")
    return args


def run_dir(args):
    """The folder of the run. Glyphs get one of their own, so that they never overwrite the figures of MNIST."""
    name = "nf" if args.n_mixtures else "nf_affine"
    return args.out_dir or FIGURES / f"{name}{'_glyphs' if args.dataset == 'glyphs' else ''}"


def write_samples(args):
    """--sample: N samples, uint8 [N, 28, 28], in samples.npz, and the first of them in samples.png."""
    model = load_model(run_dir(args) / "weights.pt", args.device)
    torch.manual_seed(args.seed)
    samples = model.sample(args.sample).byte().cpu()
    np.savez_compressed(run_dir(args) / "samples.npz", samples=samples.view(-1, 28, 28))
    save_grid(samples[:100] / 255, run_dir(args) / "samples.png", nrow=10)
    print(f"{args.sample} samples are in {run_dir(args)}")


def main(args):
    checkpoint = load_checkpoint(run_dir(args) / "checkpoint.pt") if args.resume else None
    vars(args).update({**checkpoint["settings"], "out_dir": run_dir(args)} if checkpoint else {})
    data = load(args.dataset, args.data_dir)
    if getattr(args, "dataset_md5", data.md5) != data.md5:  # that of the checkpoint
        raise DataError(f"the run in {run_dir(args)} began with other images: give their --data_dir, or start again")
    args.dataset, args.dataset_md5 = data.name, data.md5  # no longer auto
    train, val, test = (split.images.to(args.device) for split in (data.train, data.val, data.test))
    if args.dry_run:
        args.epochs, args.out_dir = min(args.epochs, 2), args.out_dir or Path(tempfile.mkdtemp(prefix="a3_nf_"))
        train, val, test = train[:5 * args.batch_size // 2], val[:200], test[:50]
    settings = {k: v for k, v in vars(args).items() if k not in ("device", "data_dir", "out_dir", "resume", "sample")}
    out_dir = args.out_dir = run_dir(args)
    out_dir.mkdir(parents=True, exist_ok=True)

    # the random numbers of an epoch are seeded by 10,000 * seed + epoch, so a resumed run needs no saved random state
    torch.manual_seed(10_000 * args.seed)
    model = Model([784], n_mixtures=args.n_mixtures).to(args.device)
    model.logit.fit(data.train.images)
    averaged = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    n_updates = max(20, args.epochs * math.ceil(len(train) / args.batch_size))  # with 10, OneCycleLR divides by zero
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, n_updates, pct_start=0.1, cycle_momentum=False)
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"{data.name}, {n_parameters:,} parameters, {args.device}; writing to {out_dir}")
    state, rows = {"model": model, "averaged": averaged, "optimizer": optimizer, "schedule": schedule}, []
    reached = []  # seconds to TARGET_BPD, if it is reached in the first epoch
    if checkpoint:
        rows, reached = checkpoint["rows"], checkpoint["reached"]
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
        batches = train[torch.randperm(len(train))].split(args.batch_size)
        batches = time_to_target(batches, averaged, val[:1000], reached) if epoch == 1 else batches
        train_bpd, val_bpd = run_epoch(model, (batches, val.split(500)), optimizer, schedule, averaged)
        if not math.isfinite(train_bpd + val_bpd):
            raise FloatingPointError(f"the loss in epoch {epoch} is not finite: start again with a smaller --lr")
        seconds = time.time() - start
        rows.append({"epoch": epoch, "train_bpd": train_bpd, "val_bpd": val_bpd, "seconds": seconds,
                     "images_per_s": len(train) / seconds, "learning_rate": schedule.get_last_lr()[0]})
        print("  ".join(f"{name} {value:<8.5g}" for name, value in rows[-1].items()))
        if epoch == (args.epochs + 1) // 2:
            save_samples(averaged, out_dir / "samples_half.png")
        weights = {"format": FORMAT, "n_mixtures": args.n_mixtures, "averaged": averaged.state_dict()}
        if val_bpd == min(row["val_bpd"] for row in rows):
            save(weights, out_dir / "best.pt")
        np.savetxt(out_dir / "metrics.csv", [[*row.values()] for row in rows], "%.8g", ",",
                   header=",".join(rows[0]), comments="")
        (out_dir / "results.json").unlink(missing_ok=True)  # of an earlier run
        parts = {name: part.state_dict() for name, part in state.items()}
        save({**weights, **parts, "rows": rows, "settings": settings, "reached": reached}, out_dir / "checkpoint.pt")

    torch.manual_seed(10_000 * args.seed + args.epochs + 1)
    best_row = min(rows, key=lambda row: row["val_bpd"])
    best = load_model(out_dir / "best.pt", args.device)
    scores = evaluate(best, test, IW_SAMPLES)
    save_bpd_plot([row["train_bpd"] for row in rows], [row["val_bpd"] for row in rows], out_dir / "bpd.pdf")
    save_samples(best, out_dir / "samples_end.png")
    save(load_checkpoint(out_dir / "best.pt"), out_dir / "weights.pt")
    peak_memory_mb, seconds = None, sum(row["seconds"] for row in rows)
    if sys.platform != "win32":  # ru_maxrss counts KiB on Linux and bytes on macOS
        import resource
        peak_memory_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024 ** (1 + (sys.platform == "darwin"))
    results = {**settings, "device": args.device, "parameters": n_parameters, "train_seconds": seconds,
               "images_per_s": len(train) * len(rows) / seconds, "peak_memory_mb": peak_memory_mb,
               "best_epoch": best_row["epoch"], "val_bpd": best_row["val_bpd"],
               **scores, "seconds_to_1_85": reached[0] if reached else None}
    (out_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"test: {scores['test_bpd']:.4f} bits per dimension, {scores['test_bpd_iw']:.4f} with {IW_SAMPLES} draws")


if __name__ == "__main__":
    arguments = parse_args()
    try:
        (write_samples if arguments.sample else main)(arguments)
    except KeyboardInterrupt:
        print(f'interrupted; a run continues with --resume --out_dir "{run_dir(arguments)}"', file=sys.stderr)
        sys.exit(130)
    except (DataError, FloatingPointError, OSError) as error:
        sys.exit(f"{Path(__file__).name}: error: {error}")
