"""Normalizing flow on MNIST (hand-out questions 3.7 and 3.8).

    python a3_nf.py                     # figures and results in report/figures/nf
    python a3_nf.py --n_mixtures 0      # with the plain affine couplings of RealNVP

Expect, on the test set: 1.012 bits per dimension with one draw of the dequantization noise (over three seeds 1.0129 +-
0.0005), 1.006 by the bound with eight. 54 minutes of training and 1 of testing on two cores of an EPYC; validation is
under 1.85 after 6 seconds.
Sources: Dinh et al. (2017), Density estimation using Real NVP, for couplings, masks and scales; Ho et al. (2019),
Flow++ (the hand-out's reference [3]), for couplings by a mixture of logistics and for dequantization. Likelihoods are
in nats per image, on the scale 0..256 of the grey levels; bits per dimension are -log p(x) / (784 log 2).
"""

import copy
import math
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib import rc_context
from matplotlib.figure import Figure  # not pyplot: files only, no display
from tqdm import tqdm

from datasets import (check_finite, claim, default_out_dir, label, load, on_signals, one_line_errors, parse_flags,
                      random_states, read_checkpoint, say_how_to_resume, set_random_states, write_atomic,
                      write_checkpoint, write_results)

EMA_DECAY = 0.999  # of the averaged weights, per update
MAX_GRAD_NORM = 1  # nearly all gradients are shorter: it tames the rare one that would spoil the weights
FIXED = 1e-3  # weight of the standard logistic that is part of each mixture
TARGET_BPD = 1.85  # question 3.8
SCRIPT = "a3_nf"
FLAGS = {  # of a run: default, lowest and highest value, and what it is
    "n_mixtures": (12, 0, 100, "logistics in the mixture of a coupling; 0 for affine couplings"),
    "n_hidden": (64, 1, 1000, "channels of the couplings' networks"),
    "epochs": (40, 1, 10 ** 5, "passes over the training set"),
    "batch_size": (32, 1, 5000, "images per update"),
    "lr": (8e-3, 1e-9, 10, "highest learning rate of the one-cycle schedule"),
    "seed": (42, 0, 2 ** 31, "of weights, order of images, and noise"),
    "iw_samples": (8, 0, 10 ** 5, "draws of the dequantization noise per test image in the importance-weighted bound; "
                   "0 leaves it out"),
}


# ----------------------------------------------------------------------------------------------------------- model

def log_prior(x):
    """log p(x) of independent standard logistic variables: x [B, D] -> [B], nats.

    Logistic, as in NICE (Dinh et al. 2015), rather than Gaussian, because the couplings end in logits of distribution
    functions: where such a function is that of the data, its logit has just this distribution.
    """
    return (F.logsigmoid(x) + F.logsigmoid(-x)).sum(1)


def sample_prior(size, generator=None):
    """Draws from the prior, a tensor of this size: the inverse of its distribution function at uniform noise."""
    return torch.rand(size, generator=generator).clamp(min=2 ** -25).logit()  # rand can be 0, but not 1


def get_mask(scale=0, side=28):
    """Which pixels a coupling sees, 1, and which it changes, 0: [1, side * side], a checkerboard.

    Each further scale halves the pixels that the one before sees: scale 1 sees the pixels of even row and even column
    and changes those of odd row and odd column, scale 2 is a checkerboard on the former, and so on. What was changed
    before is -1, factored out (RealNVP, section 3.6): so a coupling sees pixels that no other has changed.
    """
    step = 2 ** (scale // 2)  # between pixels in a row
    row, column = torch.meshgrid(2 * [torch.arange(side) / step], indexing="ij")  # not whole: factored out before
    left, mask = (row % 1 == 0) & (column % 1 == 0), (row + column + 1) % 2
    if scale % 2 == 1:  # of what this checkerboard sees, every other row
        left, mask = left & (mask == 1), (row + 1) % 2
    return torch.where(left, mask, -1).view(1, -1)


def pixel_tables(mask):
    """The pixels where a mask [1, D] has ones and where it has zeros: two tables of indices, each [c, H, W].

    If the mask, as an image, consists of equal n x n tiles, each place in the tile is a channel: the checkerboard gives
    two channels of 14x14 that are seen and two that are changed, and no convolution computes what is thrown away.
    Otherwise the tables are lists of pixels, [c].
    """
    mask, table = mask.flatten().cpu(), torch.arange(mask.numel())
    side = math.isqrt(len(mask))
    for n in range(2, side):
        if side ** 2 == len(mask) and side % n == 0:
            values, pixels = (F.pixel_unshuffle(x.view(1, side, side), n) for x in (mask, table))  # [n * n, H, W]
            if (values == values[:, :1, :1]).all():
                return pixels[values[:, 0, 0] == 1], pixels[values[:, 0, 0] == 0]
    return table[mask == 1], table[mask == 0]


class Residual(nn.Sequential):
    """x + f(x), with f the layers in their order."""

    def forward(self, x):
        return x + super().forward(x)


def mixture_logit(x, logits, mean, log_s):
    """h = logit F(x), F the distribution function of a mixture of logistics (Ho et al. 2019, section 3.2).

    x [B, ...]; logits of the weights, means and log scales, each [B, K, ...]. Returns h and log dh/dx, each [B, ...].
    A standard logistic with weight FIXED is part of the mixture: it keeps the slope above zero between the K others,
    and everything finite where these underflow (|x| > 70) and are left out.
    """
    weight, inverse_s = logits.softmax(1), torch.exp(-log_s)
    u = (x.unsqueeze(1) - mean) * inverse_s
    below, above = u.sigmoid(), (-u).sigmoid()  # in each component, the mass on either side of x
    weight_below = weight * below
    learned = torch.stack([weight_below.sum(1), (weight * above).sum(1), (weight_below * above * inverse_s).sum(1)])
    tiny = 1e6 * torch.finfo(x.dtype).tiny  # so that no gradient overflows
    log_learned = learned.clamp(min=tiny).log().masked_fill(learned < tiny, -math.inf)
    log_below = F.logsigmoid(x)
    log_fixed = torch.stack([log_below, log_below - x, 2 * log_below - x])  # of mass below and above, and of density
    log_F, log_1_F, log_density = torch.logaddexp(math.log(FIXED) + log_fixed, math.log1p(-FIXED) + log_learned)
    return log_F - log_1_F, log_density - log_F - log_1_F  # d logit(F) = dF / (F (1 - F))


@torch.no_grad()
def mixture_logit_inverse(h, logits, mean, log_s):
    """The x with h = mixture_logit(x, ...)[0], by bisection; without gradients.

    It ends when x is as near as its number format can tell, after about 40 halvings in float32 and 70 in float64.
    """
    x_k = mean + log_s.exp() * h.unsqueeze(1)  # where each component alone has this h; the fixed one has it at h
    low, high = torch.minimum(h, x_k.amin(1)), torch.maximum(h, x_k.amax(1))
    for _ in range(200):
        x = (low + high) / 2
        if (high - low <= torch.finfo(h.dtype).eps * x.abs().clamp(min=1e-3)).all():
            break
        less = mixture_logit(x, logits, mean, log_s)[0] < h
        low, high = torch.where(less, x, low), torch.where(less, high, x)
    return x


class Coupling(nn.Module):
    """Change the pixels where `mask` is 0, given those where it is 1; leave these, and those where it is -1.

    A network of the seen pixels gives the parameters of an increasing map of the real numbers for each changed pixel:
    the logit of a mixture of n_mixtures logistics, then log_scale and shift. With n_mixtures=0 these only: RealNVP's
    affine coupling (Dinh et al. 2017, equations 7 and 8), which starts as the identity. `embed` maps the seen pixels
    [B, c, ...] to the network's input [B, n_embed * c, ...].
    """

    def __init__(self, c_in, mask, n_hidden=64, n_mixtures=12, embed=lambda z: z, n_embed=1):
        super().__init__()
        if mask.numel() != c_in or not {0, 1} <= set(mask.flatten().tolist()):
            raise ValueError(f"a mask for {c_in} dimensions has as many entries, zeros and ones among them")
        for name, table in zip(("seen", "changed"), pixel_tables(mask)):
            self.register_buffer(name, table, persistent=False)  # [c, H, W] or [c]
        if self.seen.dim() == 3:  # an image
            spatial, pointwise = partial(nn.Conv2d, kernel_size=3, padding=1), partial(nn.Conv2d, kernel_size=1)
        else:
            spatial = pointwise = nn.Linear
        n_changed = len(self.changed)
        self.n_mixtures, self.n_parameters = n_mixtures, 2 + 3 * n_mixtures  # of each changed pixel
        self.embed = embed
        self.net = nn.Sequential(
            spatial(n_embed * len(self.seen), n_hidden),
            Residual(nn.SiLU(), spatial(n_hidden, n_hidden), nn.SiLU(), pointwise(n_hidden, n_hidden)), nn.SiLU(),
            pointwise(n_hidden, self.n_parameters * n_changed))
        nn.init.zeros_(self.net[-1].weight)
        bias = nn.init.zeros_(self.net[-1].bias).detach().view(self.n_parameters, n_changed)
        means = torch.linspace(-1, 1, n_mixtures)  # not equal: components that start equal would stay equal
        bias[2 + n_mixtures:2 + 2 * n_mixtures] = means.unsqueeze(1)

    def forward(self, z, ldj, reverse=False):
        """z [B, c_in] and the log-determinant so far, ldj [B], nats -> both behind this layer, or before it."""
        x = z[:, self.changed]  # [B, c, H, W] or [B, c]
        parameters = self.net(self.embed(z[:, self.seen])).unflatten(1, (self.n_parameters, -1))  # [B, 2 + 3K, c, ...]
        log_scale, shift, logits, mean, log_s = parameters.split([1, 1, *3 * [self.n_mixtures]], dim=1)
        log_scale, shift = 2 * torch.tanh(log_scale.squeeze(1) / 2), shift.squeeze(1)
        mixture, log_dh = (logits, mean, log_s.clamp(-7, 7)), 0
        if not reverse:
            if self.n_mixtures:
                x, log_dh = mixture_logit(x, *mixture)
            y = x * log_scale.exp() + shift
        else:
            y = (x - shift) * (-log_scale).exp()
            if self.n_mixtures:
                y = mixture_logit_inverse(y, *mixture)
                log_dh = mixture_logit(y, *mixture)[1]
        log_det = (log_dh + log_scale).flatten(1).sum(1)
        z = z.clone()
        z[:, self.changed] = y
        return z, ldj - log_det if reverse else ldj + log_det


class Flow(nn.Module):
    """Couplings from fine to coarse: each changes half of the pixels that are left, given the other half.

    The last is followed by one with the roles swapped, so all pixels are changed. RealNVP has several couplings with
    swapped roles at each scale; here each pixel is changed once, by a richer map, so that no network but that last one
    sees what another has turned into noise. In reverse, an image is drawn from coarse to fine: each step draws as many
    pixels as there are already.
    """

    def __init__(self, shape, n_flows=4, **coupling):
        """n_flows: how often the pixels are halved, 1 to 10. `coupling`: further arguments of each coupling."""
        super().__init__()
        self.z_shape = tuple(shape)
        masks = [get_mask(scale, math.isqrt(shape[0])) for scale in range(n_flows)]
        masks.append(torch.where(masks[-1] < 0, masks[-1], 1 - masks[-1]))
        self.layers = nn.ModuleList([Coupling(shape[0], mask, **coupling) for mask in masks])

    def forward(self, z, logdet, reverse=False):
        """z [B, D], logdet [B] -> (z, logdet); with `reverse` from the latent variables to the data."""
        for layer in reversed(self.layers) if reverse else self.layers:
            z, logdet = layer(z, logdet, reverse)
        return z, logdet


class GreyLevels(nn.Module):
    """From grey levels y in [0, 256] to the real numbers: z = logit C(y), with C a distribution function.

    C gives each level its share p of the training pixels, but black one half: its true share, 0.8, would leave little
    room for the greys, which cost most of the bits, and training was slower. Within a level C is linear, as
    dequantization is uniform. So black is z < 0, and pixels start out distributed nearly as the prior.
    """

    def __init__(self):
        super().__init__()
        for name in ("p", "below", "above"):  # the share of each level, of all below it, and of all above it
            self.register_buffer(name, torch.empty(256))
        self.set(torch.full((256,), 1 / 256))

    def set(self, p):
        p = p.cpu().double()
        self.p.copy_(p)
        self.below.copy_(p.cumsum(0) - p)
        self.above.copy_(p.flip(0).cumsum(0).flip(0) - p)

    def fit(self, images):
        """Count the levels of images, integers 0..255 of any shape."""
        count = torch.bincount(images.flatten(), minlength=256) + 1  # no level is impossible
        count[0] = count[1:].sum()
        self.set(count / count.sum())

    def forward(self, y, ldj, reverse=False):
        """y [B, D] -> z [B, D], or with `reverse` z -> y; ldj [B], nats."""
        if not reverse:
            level = y.long().clamp(0, 255)
            u = (y - level).clamp(1e-6, 1 - 1e-6)  # the very ends of the scale are infinitely far out
            below, above = self.below[level] + u * self.p[level], self.above[level] + (1 - u) * self.p[level]
            out = z = below.log() - above.log()
        else:
            z, below, above = y, y.sigmoid(), (-y).sigmoid()
            level = torch.bucketize(z.detach(), self.below[1:].log() - (self.above + self.p)[1:].log(), right=True)
            u = torch.where(below < above, below - self.below[level], self.p[level] - (above - self.above[level]))
            out = level + (u / self.p[level]).clamp(0, 1)
        log_det = (self.p[level].log() - F.logsigmoid(z) - F.logsigmoid(-z)).sum(1)  # d logit(C) = dC / (C (1 - C))
        return out, ldj - log_det if reverse else ldj + log_det

    def embed(self, z):
        """What the couplings' networks are told of pixels z [B, c, ...]: [B, 4c, ...].

        z itself, which is mostly noise where the pixel is black; the grey level y; how black it is, 1 up to y = 1 and
        falling to 0 at y = 2; and how white, 0 up to y = 251 and rising to 1 at 252, which most of the ink has.
        """
        y = self(z, 0, reverse=True)[0]
        return torch.cat([z, y / 128 - 1, (2 - y).clamp(0, 1), (y - 251).clamp(0, 1)], dim=1)


class Model(nn.Module):
    """Dequantization, grey levels to real numbers, couplings: z = flow(levels(x + u)), z from the prior."""

    def __init__(self, shape, n_hidden=64, n_mixtures=12):
        super().__init__()
        self.levels = GreyLevels()
        self.flow = Flow(shape, 7, n_hidden=n_hidden, n_mixtures=n_mixtures, embed=self.levels.embed, n_embed=4)

    def dequantize(self, x):
        """x + u with u uniform in [0, 1), so that a density is a bound: E log p(x + u) <= log P(x) (question 3.4)."""
        x = x.to(self.levels.p)  # its device and number format
        return x + torch.rand_like(x).clamp(max=1 - 2 ** -16)  # 255 + u must not be rounded to 256

    def encode(self, y):
        """y [B, D] in [0, 256] -> the latent z [B, D], and log |det dz/dy| [B], nats."""
        return self.flow(*self.levels(y, torch.zeros_like(y[:, 0])))

    def decode(self, z):
        """The inverse of encode, without the log-determinant."""
        z, ldj = self.flow(z, torch.zeros_like(z[:, 0]), reverse=True)
        return self.levels(z, ldj, reverse=True)[0]

    def forward(self, x):
        """x [B, D], integers 0..255 -> log p(x + u) = log p(z) + log |det dz/dx| [B], nats (equation 17)."""
        z, ldj = self.encode(self.dequantize(x))
        return log_prior(z) + ldj

    @torch.no_grad()
    def sample(self, n_samples, generator=None, temperature=1.0):
        """Images [n_samples, D], integers 0..255, from the prior scaled by `temperature`.

        The noise is made on the CPU, by `generator` or the global one, so a seed gives the same on every device.
        """
        z = temperature * sample_prior((n_samples, *self.flow.z_shape), generator)
        return self.decode(z.to(self.levels.p)).floor().clamp(max=255)


def bits_per_dimension(log_p, D=784):
    """Nats per image -> bits per dimension (question 3.8)."""
    return -log_p / (D * math.log(2))


# ----------------------------------------------------------------------------------------- training and evaluation

def epoch_iter(model, data, optimizer, on_step=None, losses=None):
    """One pass over `data`, an iterable of batches of 784-pixel images: learn if model.training, else only measure.

    Batches may come with labels, which are not used. on_step() is called after each update. `losses` gets a (bits per
    dimension, batch size) for each batch, behind those of an interrupted pass that this one completes. Returns the
    average bits per dimension over images.
    """
    losses = [] if losses is None else losses
    device = next(model.parameters()).device
    with torch.set_grad_enabled(model.training):
        for batch in data:
            x = (batch[0] if isinstance(batch, (list, tuple)) else batch).to(device).flatten(1)  # [B, 784]
            loss = bits_per_dimension(model(x).mean(), x.shape[1])
            losses.append((loss.detach(), len(x)))  # no .item(): a GPU need not wait for the CPU
            if model.training:
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
                optimizer.step()
                if on_step:
                    on_step()
    return sum(float(loss) * size for loss, size in losses) / sum(size for _, size in losses)


def run_epoch(model, data, optimizer, averaged=None, on_step=None, losses=None):
    """Train on data[0] and measure on data[1], there with the `averaged` weights if given. Returns both averages."""
    traindata, valdata = data
    model.train()
    train_bpd = epoch_iter(model, traindata, optimizer, on_step, losses)
    model.eval()
    val_bpd = epoch_iter(averaged or model, valdata, optimizer)
    return train_bpd, val_bpd


@torch.no_grad()
def evaluate(model, x, iw_samples):
    """Bits per dimension of x [N, 784], averages: with one draw of the dequantization noise u, and with iw_samples.

    The latter is the importance-weighted bound -log P(x) <= -E log 1/k sum_i p(x + u_i), k = iw_samples (Burda et al.
    2016, equation 8; the u_i are uniform, and so have density one). With k = 0 it is None.
    """
    k, totals = max(1, iw_samples), 0
    for batch in tqdm(x.split(500), "test", disable=None, leave=False):
        log_p = torch.stack([model(batch) for _ in range(k)])  # [k, B]
        totals += torch.stack([log_p[0], log_p.logsumexp(0) - math.log(k)]).sum(1)  # [2, B] -> [2]
    one, many = bits_per_dimension(totals / len(x), x.shape[1]).tolist()
    return {"test_bpd": one, "test_bpd_iw": many if iw_samples else None, "iw_samples": iw_samples}


# --------------------------------------------------------------------------------------------------------- figures

PRINT = {  # drawn as large as the report prints them, in inches and points
    "font.size": 8, "axes.titlesize": 8, "figure.titlesize": 8, "legend.fontsize": 7, "legend.handlelength": 1.5,
    "lines.linewidth": 1, "lines.markersize": 3,
    "savefig.dpi": 300, "savefig.bbox": "tight", "savefig.pad_inches": 0.03}


@rc_context(PRINT)
def save_bpd_plot(train_curve, val_curve, filename, note=""):
    """Bits per dimension of each epoch, on the left with the hand-out's target of 1.85 (question 3.8)."""
    epochs = range(1, len(train_curve) + 1)
    figure = Figure(figsize=(5.5, 2.1), layout="constrained")
    left, right = figure.subplots(1, 2)
    marker = "." * (len(train_curve) == 1)
    for axes in (left, right):
        axes.plot(epochs, train_curve, "-", marker=marker, label=f"training (last {train_curve[-1]:.3f})")
        axes.plot(epochs, val_curve, "--", marker=marker, label=f"validation (best {min(val_curve):.3f})")
        axes.set(xlabel="epoch", ylabel="bits per dimension")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    left.axhline(TARGET_BPD, color="black", linestyle=":", label=f"question 3.8: {TARGET_BPD}")
    left.legend()
    figure.suptitle(f"Negative log-likelihood{note}")
    write_atomic(filename, lambda file: figure.savefig(file, format=Path(filename).suffix[1:]))


@rc_context(PRINT)
def save_images(pixels, filename, title, columns, captions=(), row_captions=(), width=1.8):
    """Draw pixels [N, 784], 0..255, `columns` of them side by side, with captions under columns and beside rows."""
    blank = F.pad(pixels.cpu(), (0, 0, 0, -len(pixels) % columns))  # fills the last row
    grid = F.pad(blank.view(-1, columns, 28, 28), (1, 1, 1, 1), value=50)  # [rows, columns, 30, 30]
    grid = grid.transpose(1, 2).flatten(2).flatten(0, 1).numpy()  # [rows * 30, columns * 30]
    figure = Figure(figsize=(width, width * grid.shape[0] / grid.shape[1] + 0.4), layout="constrained")
    axes = figure.subplots()
    axes.imshow(grid, cmap="gray_r", vmin=0, vmax=255, interpolation="nearest")
    axes.set_xticks([30 * i + 14.5 for i in range(len(captions))], captions)
    axes.set_yticks([30 * i + 14.5 for i in range(len(row_captions))], row_captions)
    axes.tick_params(length=0)
    axes.set_frame_on(False)
    axes.set_title(title)
    write_atomic(filename, lambda file: figure.savefig(file, format="png"))


def save_samples(model, filename, title):
    """64 samples, from the same noise at every call."""
    save_images(model.sample(64, torch.Generator().manual_seed(0)), filename, title, columns=8)


def save_temperatures(model, filename, note="", scales=(0.6, 0.7, 0.8, 0.9, 1.0)):
    """Nine samples from the same noise at each scale of the prior: Glow's temperatures (Kingma & Dhariwal 2018)."""
    rows = [model.sample(9, torch.Generator().manual_seed(1), scale) for scale in scales]
    save_images(torch.cat(rows), filename, f"Samples by scale of the prior{note}", columns=9,
                row_captions=[f"{scale:.1f}" for scale in scales], width=3.6)


@torch.no_grad()
def interpolate(model, x, n=9):
    """n images on the straight line in latent space between each two of x [N, 2, 784] -> [N, n, 784].

    In float64, so that the ends are x itself: the flow is invertible. The dequantization noise is 1/2.
    """
    model = copy.deepcopy(model).cpu().double()
    start, end = (model.encode(x[:, i].cpu().double() + 0.5)[0] for i in (0, 1))  # [N, 784]
    t = torch.linspace(0, 1, n, dtype=torch.double).view(n, 1)
    z = torch.lerp(start.unsqueeze(1), end.unsqueeze(1), t)  # [N, n, 784]
    return model.decode(z.flatten(0, 1)).floor().clamp(max=255).view(z.shape)


def save_interpolation(model, test, filename, note=""):
    """From the first test image of each even digit to that of the next digit."""
    first = [(test.labels == digit).nonzero()[0, 0] for digit in range(10)]
    pairs = test.images[torch.stack(first)].view(5, 2, 784)
    save_images(interpolate(model, pairs).flatten(0, 1), filename,
                f"Interpolation in latent space between test images{note}", columns=9,
                captions=[f"t = {k}/8" for k in range(9)],
                row_captions=[f"{digit} to {digit + 1}" for digit in range(0, 10, 2)], width=4.5)


# ------------------------------------------------------------------------------------------------------ checkpoint

def make_modules(flags):
    """The networks of a run with these flags, by the names of their weights in its checkpoint."""
    return {name: Model([784], flags["n_hidden"], flags["n_mixtures"]) for name in ("model", "averaged")}


def load_model(checkpoint, device="cpu"):
    """The flow (averaged weights of the best epoch so far) in eval mode, from a run's checkpoint.pt or best.pt."""
    _, modules = read_checkpoint(checkpoint, SCRIPT, FLAGS, make_modules)
    return modules["averaged"].to(device).eval()


# ------------------------------------------------------------------------------------------------------------ main

def run_name(args):
    """Of the output folder: see default_out_dir."""
    return "nf" if args.n_mixtures else "nf_affine"


def run(args, checkpoint):
    """Train, from the start or from `checkpoint`; then measure the best epoch on the test set, and draw it."""
    wall_start, device = time.time(), torch.device(args.device)
    data = load(args.dataset, args.data_dir)
    note, out_dir = label(data.name), args.out_dir or default_out_dir(run_name(args), data.name)
    args.flags["dataset"] = data.name  # no longer auto
    claim(out_dir, data, checkpoint)
    train, val, test = (split.images.to(device) for split in (data.train, data.val, data.test))
    if args.dry_run:
        train, val, test = train[:5 * args.batch_size // 2], val[:200], test[:200]

    torch.manual_seed(args.seed)
    model = Model([784], args.n_hidden, args.n_mixtures).to(device)
    model.levels.fit(data.train.images)
    n_parameters = sum(p.numel() for p in model.parameters())
    averaged = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    n_batches = math.ceil(len(train) / args.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, pct_start=0.1, cycle_momentum=False,
        total_steps=max(20, args.epochs * n_batches))  # at 10 it divides by zero
    state = {"model": model, "averaged": averaged, "optimizer": optimizer, "schedule": schedule}
    rows, best = [], None  # of metrics.csv; the averaged weights with the best validation bpd
    losses, seconds, signals = [], 0.0, []  # of the running epoch
    seconds_to_target = None  # of training
    save_samples(averaged, out_dir / "samples_start.png", f"Samples before training{note}")
    if checkpoint:
        for name, part in state.items():
            part.load_state_dict(checkpoint[name])
        rows, best, losses, seconds = (checkpoint[key] for key in ("rows", "best", "losses", "seconds"))
        seconds_to_target = checkpoint["seconds_to_target"]
        set_random_states(checkpoint, device)
        wall_start -= seconds + sum(row["seconds"] for row in rows)  # the time before the interruption counts

    def save():
        write_checkpoint(out_dir, {
            "script": SCRIPT, "flags": args.flags, "md5": data.md5, "epoch": len(rows), "rows": rows, "best": best,
            "losses": [(float(loss), size) for loss, size in losses], "seconds": seconds,
            "seconds_to_target": seconds_to_target, **random_states(device),
            **{name: part.state_dict() for name, part in state.items()}})

    def check_target(val_bpd):
        nonlocal seconds_to_target
        if seconds_to_target is None and val_bpd < TARGET_BPD:
            seconds_to_target = time.time() - start + sum(row["seconds"] for row in rows)
            tqdm.write(f"validation under {TARGET_BPD} after {seconds_to_target:.0f} s{note}")

    def on_step():
        schedule.step()
        n = schedule.last_epoch  # updates so far
        decay = min(EMA_DECAY, (1 + n) / (10 + n))  # less at first, to forget the untrained weights
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - decay)
        bar.update()
        if n % 50 == 0 or n % n_batches == 0 or signals:
            bpd = float(losses[-1][0])
            check_finite(bpd + sum(p.detach().sum() for p in model.parameters()), len(rows) + 1, args.lr)
            bar.set_postfix_str(f"{bpd:.3f} bits per dimension")
        if seconds_to_target is None and n.bit_count() == 1:  # a power of two: seldom
            check_target(epoch_iter(averaged, [val[:1000]], None))
        if signals:
            sys.exit(128 + signals[0])

    print(f"{data.name}{note}: {len(train)} training images\n"
          f"flow{note} with {args.n_mixtures} logistics per pixel, {n_parameters / 1e6:.2f}M parameters, on {device}; "
          f"output in {out_dir}\n"
          f"epoch  train bpd  val bpd  seconds  images/s  learning rate")
    bar = tqdm(total=args.epochs * n_batches, initial=schedule.last_epoch, unit="batch", disable=None)  # tty only
    on_signals(lambda number, frame: signals.append(number))  # on_step looks, when a batch is done
    try:
        for epoch in range(len(rows) + 1, args.epochs + 1):
            start = time.time() - seconds
            rng = torch.Generator().manual_seed(args.seed + 1_000_003 * epoch)  # so a resumed epoch is the same
            order = torch.randperm(len(train), generator=rng).to(device)
            loaders = train[order].split(args.batch_size)[len(losses):], val.split(500)
            train_bpd, val_bpd = run_epoch(model, loaders, optimizer, averaged, on_step, losses)
            check_finite(train_bpd + val_bpd, epoch, args.lr)
            check_target(val_bpd)
            seconds = time.time() - start
            rows.append({"epoch": epoch, "train_bpd": train_bpd, "val_bpd": val_bpd, "seconds": seconds,
                         "images_per_s": len(train) / seconds, "learning_rate": schedule.get_last_lr()[0]})
            tqdm.write("{:5d}  {:9.4f}  {:7.4f}  {:7.1f}  {:8.0f}  {:13.2e}".format(*rows[-1].values()) + note)
            if best is None or val_bpd < best["val_bpd"]:
                best = {"epoch": epoch, "val_bpd": val_bpd, "model": copy.deepcopy(averaged.state_dict())}
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
        save_bpd_plot([row["train_bpd"] for row in rows], [row["val_bpd"] for row in rows], out_dir / "bpd.png", note)
        save_samples(averaged, out_dir / "samples_end.png", f"Samples after training{note}")
        save_temperatures(averaged, out_dir / "temperatures.png", note)
        save_interpolation(averaged, data.test, out_dir / "interpolation.png", note)
        sample_start = time.time()
        averaged.sample(64).cpu()
        sample_seconds = time.time() - sample_start
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
        "parameters": n_parameters, "train_seconds": seconds, "images_per_s": len(train) * len(rows) / seconds,
        "wall_seconds": time.time() - wall_start, "best_epoch": best["epoch"], "val_bpd": best["val_bpd"], **scores,
        "seconds_to_1_85": seconds_to_target, "seconds_to_sample_64": sample_seconds})
    iw = f"; with {args.iw_samples} draws of the noise {scores['test_bpd_iw']:.4f}" if args.iw_samples else ""
    print(f"test, bits per dimension{note}: {scores['test_bpd']:.4f}{iw}; weights of epoch {best['epoch']}; "
          f"64 samples take {sample_seconds:.2f} s")


def save_sample_files(args):
    """--sample: N images of a trained model, uint8 [N, 28, 28], in samples.npz, and the first 100 in samples.png."""
    model, generator = load_model(args.resume, args.device), torch.Generator().manual_seed(args.seed)
    samples = torch.cat([model.sample(min(1000, args.sample - i), generator).byte().cpu()
                         for i in range(0, args.sample, 1000)])  # [N, 784]
    write_atomic(args.out_dir / "samples.npz",
                 lambda file: np.savez_compressed(file, samples=samples.view(-1, 28, 28).numpy()))
    save_images(samples[:100], args.out_dir / "samples.png", f"Samples{label(args.dataset)}",
                columns=min(10, args.sample), width=3.6)


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
