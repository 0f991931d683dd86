"""Normalizing flow on MNIST (hand-out questions 3.7 and 3.8).

    python a3_nf.py                     # figures and results in report/figures/nf
    python a3_nf.py --n_mixtures 0      # RealNVP, in report/figures/nf_affine

The script has two models. The first is RealNVP (Dinh et al. 2017, Density estimation using Real
NVP), the flow that the hand-out refers to, with affine couplings and checkerboard masks. The
second, which is the default, needs fewer bits and gives better samples. It is a multi-scale
autoregressive model, as in Reed et al. (2017), Parallel multiscale autoregressive density
estimation, written as a flow. After a fixed map of its grey level, each pixel is transformed
exactly once, through the CDF of a mixture, as in Ho et al. (2019), Flow++. The mixture depends on
other pixels of the original image. The later couplings of RealNVP, by contrast, depend on pixels
that earlier ones have already transformed.

Expect 0.966 bits per dimension on the test set, with one draw of the dequantization noise, after
67 minutes on two CPU cores. The first epoch already ends below the hand-out's target of 1.85.
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

from datasets import DATA_DIR, DataError, load

MAX_GRAD_NORM = 1  # for gradient clipping: only rare outliers exceed it
# The autoregressive layer learns at this share of --lr. Trained alone at the full rate, it gave
# samples with a Fréchet distance of 16.0, not 11.7.
AUTOREGRESSIVE_LR_FACTOR = 0.5
COMMON_LEVELS = 0, 252, 253, 254, 255  # 88% of MNIST's pixels have one of these grey levels
STANDARD_WEIGHT = 1e-5  # weight of the standard logistic, a component of every mixture
IW_SAMPLES = 8  # draws of the dequantization noise per test image in the importance-weighted bound
TARGET_BPD = 1.85  # question 3.8
FIGURES = Path(__file__).resolve().parents[1] / "report" / "figures"
FORMAT = "a3_nf 5"  # version of the saved files; others are rejected
# These attributes of args are stored in a checkpoint and restored by --resume
SETTINGS = "n_mixtures", "epochs", "batch_size", "lr", "seed", "dataset", "dataset_md5", "dry_run"


# ------------------------------------------------------------------------------------ the prior
# It is logistic and not Gaussian, because the logit is its inverse CDF, which is cheap to compute:
# if h has the CDF F, then z = logit(F(h)) has the distribution of the prior. GreyLevels and Mixture
# below are both maps of this form.


def logistic(x):
    """CDF, survival function (1 - CDF) and density of the standard logistic distribution at x.

    Where the CDF is rounded to 1, the survival function is still exact.
    """
    cdf = torch.sigmoid(x)
    sf = torch.sigmoid(-x)
    return cdf, sf, cdf * sf


def log_prior(z):
    """log p(z) of independent standard logistic variables: z [B, D] -> [B], nats."""
    log_density = F.logsigmoid(z) + F.logsigmoid(-z)
    return log_density.sum(1)  # over dimensions


def sample_prior(size):
    """Draw a tensor of this size from the prior: apply its inverse CDF to uniform noise."""
    u = torch.rand(size)
    return u.clamp(min=2 ** -25).logit()  # rand can be 0, but not 1


# --------------------------------------------------------------------------- first model: RealNVP
def get_mask(side=28):
    """A checkerboard, as in Dinh et al. (2017), [1, side * side]: 1 for pixels that are kept.

    These are the ones whose row + column is even.
    """
    row = torch.arange(side).view(side, 1)
    column = torch.arange(side).view(1, side)
    return ((row + column + 1) % 2).view(1, -1)


class Residual(nn.Sequential):
    """h + f(h), where f consists of the given layers."""

    def forward(self, h):
        return h + super().forward(h)


def residual_network(n_in, n_hidden, n_out):
    """[B, n_in, H, W] -> [B, n_out, H, W]. The last layer starts with weights and biases of 0."""
    blocks = []
    for _ in range(2):
        blocks.append(Residual(
            nn.SiLU(),
            nn.Conv2d(n_hidden, n_hidden, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(n_hidden, n_hidden, 1)))
    last = nn.Conv2d(n_hidden, n_out, 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Conv2d(n_in, n_hidden, 3, padding=1), *blocks, nn.SiLU(), last)


class Coupling(nn.Module):
    """RealNVP's affine coupling (Dinh et al. 2017, equations 6 to 9). With the mask b,

        y = b * x + (1 - b) * (x * exp(s) + t)     where  s, t = net(b * x)
        x = b * y + (1 - b) * (y - t) * exp(-s)    since  b * y = b * x
        log |det dy/dx| = sum of (1 - b) * s       since  the Jacobian is triangular.

    In the code s and t are set to 0 where b is 1, so that x * exp(s) + t keeps these pixels.

    The mask [1, c_in], where c_in is the number of pixels, holds a 1 for each pixel that is kept
    and a 0 for each that is changed.
    """

    def __init__(self, c_in, mask, n_hidden=32):
        super().__init__()
        self.register_buffer("mask", mask.float(), persistent=False)
        side = math.isqrt(c_in)
        self.net = nn.Sequential(
            nn.Unflatten(1, (1, side, side)),       # [B, 1, 28, 28]
            nn.PixelUnshuffle(2),                   # [B, 4, 14, 14], which is cheaper to convolve
            residual_network(4, n_hidden, 2 * 4),   # [B, 8, 14, 14], 0 at first: y = x
            nn.PixelShuffle(2),                     # [B, 2, 28, 28]
            nn.Flatten(2))                          # [B, 2, 784]

    def forward(self, z, ldj, reverse=False):
        """z [B, c_in] and the log-determinant so far, ldj [B], nats -> both after this layer."""
        s, t = self.net(self.mask * z).unbind(1)           # [B, c_in] each
        s = (1 - self.mask) * 2 * torch.tanh(s / 2)        # |s| < 2, so that nothing overflows
        t = (1 - self.mask) * t
        if reverse:
            return (z - t) * torch.exp(-s), ldj - s.sum(1)
        return z * torch.exp(s) + t, ldj + s.sum(1)


class Flow(nn.Module):
    """RealNVP: n_flows pairs of couplings. Each of the two changes one half of the pixels.

    (The name Flow is the template's.)
    """

    def __init__(self, shape, n_flows=4, n_hidden=32):
        super().__init__()
        self.z_shape = tuple(shape)  # (784,)
        mask = get_mask(math.isqrt(shape[0]))
        self.layers = nn.ModuleList()
        for _ in range(n_flows):
            self.layers.append(Coupling(shape[0], mask, n_hidden))
            self.layers.append(Coupling(shape[0], 1 - mask, n_hidden))

    def forward(self, z, logdet, reverse=False):
        """z [B, D], logdet [B] -> (z, logdet). reverse=True is the inverse map."""
        layers = reversed(self.layers) if reverse else self.layers
        for layer in layers:
            z, logdet = layer(z, logdet, reverse)
        return z, logdet


# ------------------------------------------------------------------------------ the grey levels
class GreyLevels(nn.Module):
    """The first map of both models: dequantized grey levels y in [0, 256] -> h = logit(CDF(y)).

    The CDF is piecewise linear: a level has a probability, its share, which the dequantization
    noise u spreads evenly over [level, level + 1]. Any increasing CDF gives a valid flow. With the
    true shares of the levels, the h of a random pixel would have exactly the distribution of the
    prior. But black, whose true share is 0.8, would leave only h > 1.4 for the greys, which cost
    most of the bits. So its share is set to one half, which leaves them h > 0. In a short run this
    CDF saved 0.020 bits per dimension, compared with equal shares, CDF(y) = y / 256.
    """

    n_features = 4

    def __init__(self):
        super().__init__()
        self.register_buffer("share", torch.empty(256))  # P(level = v), for v = 0, ..., 255
        self.register_buffer("below", torch.empty(256))  # P(level < v)
        self.register_buffer("above", torch.empty(256))  # P(level > v)
        self.register_buffer("edges", torch.empty(255))  # the h between the levels v and v + 1
        self.register_buffer("table", torch.empty(256, self.n_features))  # see features()
        self.fit(torch.arange(256))  # equal shares but for black, until images or weights come

    def fit(self, images):
        """Set the shares of the levels to those in images, but that of black to one half.

        images: integers 0..255 of any shape.
        """
        count = torch.bincount(images.flatten().cpu(), minlength=256)
        count += 1  # so that each level has a positive probability
        count[0] = count[1:].sum()
        self.set_shares(count.double() / count.sum())

    def set_shares(self, share):
        """Set the shares of the levels, float64 [256], which sum to one."""
        up_to = share.cumsum(0)  # P(level <= v)
        self.share.copy_(share)
        self.below.copy_(up_to - share)
        self.above.copy_(share.flip(0).cumsum(0).flip(0) - share)  # more exact than 1 - up_to
        self.edges.copy_(up_to[:-1].logit())

        level = torch.arange(256)
        middle = (up_to - share / 2).logit()  # the h of the level at u = 1/2
        brightness = level / 128 - 1
        self.table.copy_(torch.stack([middle, brightness, level == 0, level >= 252], dim=1))

    def forward(self, y):
        """Grey levels y [B, D] in [0, 256] -> h [B, D], and the log-determinant [B], nats."""
        level = y.long().clamp(0, 255)
        u = (y - level).clamp(1e-6, 1 - 1e-6)  # so that no h is infinite
        log_cdf = torch.log(self.below[level] + u * self.share[level])
        log_sf = torch.log(self.above[level] + (1 - u) * self.share[level])
        log_slope = self.share[level].log() - log_cdf - log_sf  # d logit(F) = dF / (F (1 - F))
        return log_cdf - log_sf, log_slope.sum(1)

    def level(self, h):
        """The inverse, rounded down: h of any shape -> grey levels, integers from 0 to 255."""
        return torch.bucketize(h.detach().contiguous(), self.edges, right=True)

    def features(self, h):
        """The inputs of the second model's networks: pixels h [B, ...] -> [B, 4, ...].

        These are functions of the grey level: the h of its middle, its brightness, whether it is
        black, and whether it is nearly white. They leave out the noise u, which says nothing about
        the image. In a short run that saved 0.035 bits per dimension.
        """
        features = self.table[self.level(h)]  # [B, ..., 4]
        return features.movedim(-1, 1)


# --------------------------------------------------------------- second model: coarse to fine
# The group of a pixel depends on its place in its block of 4 x 4 pixels:
#
#     1 6 3 6
#     7 5 7 5
#     4 6 2 6
#     7 5 7 5
#
#     groups 1, 2     7 x 7 pixels each      sampled one by one     AutoregressiveLayer
#     groups 3, 4     7 x 7 pixels each      sampled all at once    MixtureCoupling
#     groups 5, 6, 7  14 x 14 pixels each    sampled all at once    MixtureCoupling
#
# The groups are sampled in this order, each over the whole image and given all earlier groups.
# From an image to latent variables, the layers run the other way, from group 7 to group 1. So when
# a layer transforms its group, the groups that it is given have not been transformed yet, and the
# networks can still see their grey levels.


class Mixture:
    """The map of a single pixel: z = logit(CDF(h)), with the CDF of a mixture of distributions.

    Flow++ (Ho et al. 2019) has such a map, with logistic distributions alone. Here h is a pixel
    after GreyLevels, and z is its latent variable. The mixture has

    - the standard logistic distribution, so that no h has a density of 0, whose log is infinite;
    - K = n_mixtures logistic components, whose means and scales a network chooses;
    - one component for each of the J COMMON_LEVELS, as a logistic density cannot match the sharp
      edges of a level (in a short run these components saved 0.047 bits per dimension).

    The network also chooses the weights of the components, except that of the first, which is small
    and fixed. For pixels h [B, ...] its output is `parameters`, [B, n_parameters, ...].

    The class has nothing to train. It is not an nn.Module, so that the grey levels, which belong to
    the Model, are not registered again in each layer.
    """

    def __init__(self, n_mixtures, grey_levels):
        self.grey_levels = grey_levels
        self.n_mixtures = n_mixtures
        self.sizes = [n_mixtures + len(COMMON_LEVELS), n_mixtures, n_mixtures]
        self.n_parameters = sum(self.sizes)  # log weights, means and log scales

    def initial_parameters(self):
        """[n_parameters]: black is likely; the means differ, since equal ones would stay equal."""
        log_weights = torch.zeros(self.sizes[0])
        log_weights[self.n_mixtures] = 3  # of the first of COMMON_LEVELS, black
        means = torch.linspace(-1, 1, self.n_mixtures)
        log_scales = torch.zeros(self.n_mixtures)
        return torch.cat([log_weights, means, log_scales])

    def components(self, parameters):
        """Weights [B, 1 + K + J, ...] of all components, means and scales [B, 1 + K, ...].

        The first component is the standard logistic distribution.
        """
        log_weights, means, log_scales = parameters.split(self.sizes, dim=1)
        weights = (1 - STANDARD_WEIGHT) * log_weights.softmax(1)
        scales = log_scales.clamp(-7, 7).exp()  # bounded, so that nothing overflows
        one = torch.ones_like(means[:, :1])
        weights = torch.cat([STANDARD_WEIGHT * one, weights], dim=1)
        means = torch.cat([0 * one, means], dim=1)
        scales = torch.cat([one, scales], dim=1)
        return weights, means, scales

    def level_components(self, h):
        """CDF, survival function and density at h [B, ...] of the J components for grey levels.

        Each result is [B, J, ...]. Such a component is the distribution of h for a pixel that has
        this level: the CDF is 0 below the level, u within it, and 1 above it.
        """
        grey_levels = self.grey_levels
        level = grey_levels.level(h)
        share = grey_levels.share[level]
        # GreyLevels made h such that sigmoid(h) = below[level] + u * share. This is solved for u.
        grey_cdf, grey_sf, grey_pdf = logistic(h)
        u = ((grey_cdf - grey_levels.below[level]) / share).clamp(min=0)
        # Not from u, since 1 - u would lose digits
        one_minus_u = ((grey_sf - grey_levels.above[level]) / share).clamp(min=0)
        slope = grey_pdf / share  # du/dh

        difference = torch.stack([level - common for common in COMMON_LEVELS], dim=1)
        here = difference == 0
        cdfs = torch.where(here, u.unsqueeze(1), (difference > 0).to(h.dtype))
        sfs = torch.where(here, one_minus_u.unsqueeze(1), (difference < 0).to(h.dtype))
        pdfs = torch.where(here, slope.unsqueeze(1), 0)
        return cdfs, sfs, pdfs

    def logit_cdf(self, h, weights, means, scales):
        """h [B, ...] and the components -> z = logit(CDF(h)) and log dz/dh, [B, ...] each."""
        cdfs, sfs, pdfs = logistic((h.unsqueeze(1) - means) / scales)
        level_cdfs, level_sfs, level_pdfs = self.level_components(h)
        cdfs = torch.cat([cdfs, level_cdfs], dim=1)  # [B, 1 + K + J, ...]
        sfs = torch.cat([sfs, level_sfs], dim=1)
        pdfs = torch.cat([pdfs / scales, level_pdfs], dim=1)
        log_cdf = (weights * cdfs).sum(1).log()
        log_sf = (weights * sfs).sum(1).log()
        log_pdf = (weights * pdfs).sum(1).log()
        return log_cdf - log_sf, log_pdf - log_cdf - log_sf  # d logit(F) = dF / (F (1 - F))

    def transform(self, h, parameters):
        """h [B, ...] -> z and log dz/dh, [B, ...] each."""
        return self.logit_cdf(h, *self.components(parameters))

    @torch.no_grad()
    def inverse(self, z, parameters):
        """z [B, ...] -> h and log dh/dz, [B, ...] each, without gradients.

        h is found by bisection, to the resolution of the dtype.
        """
        weights, means, scales = self.components(parameters)
        # A single logistic distribution would have h = mean + scale * z, and a mixture of several
        # an h between the lowest and the highest of these. The components of the common levels can
        # move h further out, but not by 20 for any z that sample_prior can draw.
        solutions = means + scales * z.unsqueeze(1)
        low = solutions.amin(1) - 20
        high = solutions.amax(1) + 20
        for _ in range(200):  # about 40 are enough in float32, and 70 in float64
            h = (low + high) / 2
            resolution = torch.finfo(z.dtype).eps * h.abs().clamp(min=1e-3)
            if (high - low <= resolution).all():
                break
            too_low = self.logit_cdf(h, weights, means, scales)[0] < z
            low = torch.where(too_low, h, low)
            high = torch.where(too_low, high, h)
        log_slope = self.logit_cdf(h, weights, means, scales)[1]
        return h, -log_slope


class MixtureCoupling(nn.Module):
    """Transforms one group of pixels, given others: z = mixture.transform(h, net(seen pixels)).

    `changed`, [H, W], holds the indices in z of the group's pixels, with H = W = 14 or 7. `seen` is
    a list of such arrays, one for each group that the network sees.
    """

    def __init__(self, seen, changed, n_hidden, mixture):
        super().__init__()
        self.register_buffer("seen", torch.stack(seen), persistent=False)  # [c, H, W]
        self.register_buffer("changed", changed, persistent=False)         # [H, W]
        self.mixture = mixture
        n_features = mixture.grey_levels.n_features * len(seen)
        self.net = residual_network(n_features, n_hidden, mixture.n_parameters)
        self.net[-1].bias.data = mixture.initial_parameters()

    def forward(self, z, ldj, reverse=False):
        """z [B, D] and the log-determinant so far, ldj [B], nats -> both after this layer.

        In z, some pixels are h and the others are latent variables. The seen ones are h, in both
        directions.
        """
        features = self.mixture.grey_levels.features(z[:, self.seen])  # [B, 4, c, H, W]
        parameters = self.net(features.flatten(1, 2))                  # [B, n_parameters, H, W]
        transform = self.mixture.inverse if reverse else self.mixture.transform
        values, log_slope = transform(z[:, self.changed], parameters)  # [B, H, W] each
        z = z.clone()
        z[:, self.changed] = values
        return z, ldj + log_slope.sum((1, 2))


class AutoregressiveLayer(nn.Module):
    """Transforms each pixel given those before it, in the order of the indices `pixels`, [n].

    From an image to latent variables it does so for all of them at once; in sampling, one by one.
    The networks form a NADE (Larochelle and Murray 2011) with one more hidden layer. For pixel i,
    with the features f_j of pixel j,

        context_i    = sum over j < i of f_j W_context_j
        hidden_i     = silu(context_i + b_context_i) W_hidden_i + b_hidden_i
        parameters_i = silu(hidden_i) W_out_i + b_out_i

    W_context_j is the same for all pixels i > j, so that all contexts are one cumulative sum.
    During sampling, each pixel is added to the context as soon as it is known.
    """

    def __init__(self, pixels, n_context, n_hidden, mixture):
        super().__init__()
        n = len(pixels)
        n_features = mixture.grey_levels.n_features
        self.register_buffer("pixels", pixels, persistent=False)
        self.mixture = mixture
        n_terms = n_features * n / 2  # of the sum in a context, on average
        self.W_context = nn.Parameter(torch.randn(n, n_features, n_context) / n_terms ** 0.5)
        # Not 0: the context of the first pixel is 0, so its hidden units would all be 0 as well
        self.b_context = nn.Parameter(0.1 * torch.randn(n, n_context))
        self.W_hidden = nn.Parameter(torch.randn(n, n_context, n_hidden) / n_context ** 0.5)
        self.b_hidden = nn.Parameter(torch.zeros(n, n_hidden))
        self.W_out = nn.Parameter(torch.zeros(n, n_hidden, mixture.n_parameters))
        self.b_out = nn.Parameter(mixture.initial_parameters().repeat(n, 1))

    def forward(self, z, ldj, reverse=False):
        """z [B, D] and the log-determinant so far, ldj [B], nats -> both after this layer.

        In z, some pixels are h and the others are latent variables.
        """
        if reverse:
            values, log_slope = self.inverse(z[:, self.pixels])
        else:
            h = z[:, self.pixels]                         # [B, n]
            parameters = self.network(self.contexts(h))   # [B, n_parameters, n]
            values, log_slope = self.mixture.transform(h, parameters)
        z = z.clone()
        z[:, self.pixels] = values
        return z, ldj + log_slope.sum(1)

    def inverse(self, z):
        """z [B, n] -> h and log dh/dz, [B, n] each, pixel by pixel."""
        h = torch.zeros_like(z)
        log_slope = torch.zeros_like(z)
        context = z.new_zeros(len(z), 1, self.b_context.shape[1])  # [B, 1, n_context]
        for pixel in range(z.shape[1]):
            i = slice(pixel, pixel + 1)  # so that all tensors keep their dimensions
            h[:, i], log_slope[:, i] = self.mixture.inverse(z[:, i], self.network(context, i))
            context = context + self.context_terms(h[:, i], i)
        return h, log_slope

    def contexts(self, h):
        """The contexts of all pixels: h [B, n] -> [B, n, n_context]."""
        terms = self.context_terms(h)
        terms = F.pad(terms[:, :-1], (0, 0, 1, 0))  # 0 for the first pixel, and without the last
        return terms.cumsum(1)

    def context_terms(self, h, i=slice(None)):
        """What the pixels i add to the contexts of later ones: h [B, n] -> [B, n, n_context]."""
        features = self.mixture.grey_levels.features(h)  # [B, 4, n]
        return torch.einsum("bfn,nfc->bnc", features, self.W_context[i])

    def network(self, context, i=slice(None)):
        """The networks of the pixels i: context [B, n, n_context] -> [B, n_parameters, n]."""
        hidden = F.silu(context + self.b_context[i])
        hidden = torch.einsum("bnc,nch->bnh", hidden, self.W_hidden[i]) + self.b_hidden[i]
        hidden = F.silu(hidden)
        parameters = torch.einsum("bnh,nhp->bnp", hidden, self.W_out[i]) + self.b_out[i]
        return parameters.transpose(1, 2)


def quarters(pixels):
    """Every second pixel in both directions: [H, W] -> a, b, c, d, [H / 2, W / 2] each.

    In every block of 2 x 2 pixels, a and b are the upper ones and c and d the lower ones.
    """
    a = pixels[0::2, 0::2]
    b = pixels[0::2, 1::2]
    c = pixels[1::2, 0::2]
    d = pixels[1::2, 1::2]
    return a, b, c, d


class MultiscaleFlow(nn.Module):
    """The layers for the groups drawn above, in images of 28 x 28 pixels."""

    def __init__(self, grey_levels, n_hidden=48, n_hidden_coarse=32, n_context=96, n_mixtures=6):
        super().__init__()
        self.z_shape = (784,)
        mixture = Mixture(n_mixtures, grey_levels)
        self.layers = nn.ModuleList()

        coarse, g6, g7, g5 = quarters(torch.arange(784).view(28, 28))  # [14, 14] each
        self.layers.append(MixtureCoupling([coarse, g6, g5], g7, n_hidden, mixture))
        self.layers.append(MixtureCoupling([coarse, g5], g6, n_hidden, mixture))
        self.layers.append(MixtureCoupling([coarse], g5, n_hidden, mixture))

        g1, g3, g4, g2 = quarters(coarse)  # groups 1 to 4, [7, 7] each
        self.layers.append(MixtureCoupling([g1, g3, g2], g4, n_hidden_coarse, mixture))
        self.layers.append(MixtureCoupling([g1, g2], g3, n_hidden_coarse, mixture))
        pixels = torch.cat([g1.flatten(), g2.flatten()])  # [98]
        self.layers.append(AutoregressiveLayer(pixels, n_context, 64, mixture))

    def forward(self, z, logdet, reverse=False):
        """z [B, 784], logdet [B] -> (z, logdet). reverse=True is the inverse map."""
        layers = reversed(self.layers) if reverse else self.layers
        for layer in layers:
            z, logdet = layer(z, logdet, reverse)
        return z, logdet


# ------------------------------------------------------------------------- the model of an image
class Model(nn.Module):
    """p(x) of images x: dequantization, the map of the grey levels, a flow, and the prior.

    n_mixtures: logistic components of a mixture in the MultiscaleFlow; 0 for RealNVP.
    """

    def __init__(self, shape, n_mixtures=6):
        super().__init__()
        self.grey_levels = GreyLevels()
        if n_mixtures == 0:
            self.flow = Flow(shape)
        else:
            self.flow = MultiscaleFlow(self.grey_levels, n_mixtures=n_mixtures)

    def dequantize(self, x):
        """y = x + u with u uniform in [0, 1), so that E log p(y) <= log P(x) (question 3.4).

        Raises ValueError if x does not hold integers from 0 to 255.
        """
        if x.dtype != torch.uint8 and not ((x >= 0) & (x <= 255) & (x == x.round())).all():
            raise ValueError("pixels must be integers from 0 to 255; "
                             f"these are {x.dtype} from {x.min()} to {x.max()}")
        x = x.to(self.grey_levels.share)  # its device and dtype
        u = torch.rand_like(x).clamp(max=1 - 2 ** -16)  # so that x + u is not rounded to x + 1
        return x + u

    def forward(self, x):
        """Images x [B, D] or [B, 28, 28], integers 0..255 -> log p(x + u) [B], nats.

        It is log p(z) + log |det dz/dy| (equation 17).
        """
        y = self.dequantize(x.flatten(1))
        h, ldj = self.grey_levels(y)
        z, ldj = self.flow(h, ldj)
        return log_prior(z) + ldj

    @torch.no_grad()
    def sample(self, n_samples):
        """Images [n_samples, D], integers 0..255.

        The noise is drawn on the CPU, so that a seed gives the same noise on every device.
        """
        noise = sample_prior((n_samples, *self.flow.z_shape)).to(self.grey_levels.share)
        images = []
        for z in noise.split(1000):
            h, _ = self.flow(z, z.new_zeros(len(z)), reverse=True)
            images.append(self.grey_levels.level(h))
        return torch.cat(images)


def bits_per_dimension(log_p, D=784):
    """Nats per image -> bits per dimension (question 3.8)."""
    return -log_p / (D * math.log(2))


# ----------------------------------------------------------------------- training and evaluation
def epoch_iter(model, data, optimizer, schedule=None):
    """One pass over `data`. A model in training mode is updated.

    data: an iterable of batches of images, [B, 784] or [B, 1, 28, 28], integers 0..255, with or
    without labels, so that the template's loaders can be used as well.
    Returns the average bits per dimension.
    """
    device = next(model.parameters()).device
    total, n_images = 0, 0
    bar = tqdm(data, leave=False, disable=None)  # None: no bar if the output is not a terminal
    with torch.set_grad_enabled(model.training):
        for step, batch in enumerate(bar, start=1):
            x = batch[0] if isinstance(batch, (list, tuple)) else batch
            x = x.to(device).flatten(1)  # [B, 784]
            loss = bits_per_dimension(model(x).mean(), x.shape[1])
            if model.training:
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
                optimizer.step()
                if schedule is not None:
                    schedule.step()
            total += loss.detach() * len(x)
            n_images += len(x)
            if step % 100 == 0:  # not more often: .item() makes the CPU wait for the GPU
                bar.set_postfix_str(f"{total.item() / n_images:.4f} bits per dimension")
    return float(total) / n_images


def run_epoch(model, data, optimizer, schedule=None):
    """Train on data[0], then evaluate on data[1]. Returns the bits per dimension of each."""
    model.train()
    train_bpd = epoch_iter(model, data[0], optimizer, schedule)
    model.eval()
    val_bpd = epoch_iter(model, data[1], optimizer=None)
    return train_bpd, val_bpd


@torch.no_grad()
def evaluate(model, x, k):
    """Two upper bounds on the bits per dimension of the discrete images x [N, 784].

    test_bpd is the mean of -log p(x + u), with one draw of the noise u for each image. The
    importance-weighted one, test_bpd_iw, is tighter. It is the mean of -log(1/k sum_i p(x + u_i)),
    with k draws (Burda et al. 2016, equation 8). Both are given in bits per dimension.
    """
    one, many = 0, 0
    for batch in tqdm(x.split(500), "test", leave=False, disable=None):
        log_p = torch.stack([model(batch) for _ in range(k)])  # [k, B]
        one += log_p[0].sum()
        many += (log_p.logsumexp(0) - math.log(k)).sum()
    return {
        "test_bpd": bits_per_dimension(one.item() / len(x), x.shape[1]),
        "test_bpd_iw": bits_per_dimension(many.item() / len(x), x.shape[1]),
        "iw_samples": k,
    }


# --------------------------------------------------------------------------------------- figures
def save_bpd_plot(train_curve, val_curve, filename):
    """Bits per dimension of each epoch: left, with the target of 1.85; right, without it."""
    from matplotlib.figure import Figure  # not pyplot, which looks for a display
    figure = Figure(figsize=(6, 2.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = range(1, len(train_curve) + 1)
    for axes in (left, right):
        axes.plot(epochs, train_curve, ".-", label=f"training (last {train_curve[-1]:.3f})")
        axes.plot(epochs, val_curve, ".--", label=f"validation (last {val_curve[-1]:.3f})")
        axes.set(xlabel="epoch", ylabel="bits per dimension")
        axes.grid(alpha=0.3)
    left.axhline(TARGET_BPD, color="black", linestyle=":", label=f"question 3.8: {TARGET_BPD}")
    left.legend()
    figure.savefig(filename)


def save_grid(images, filename, nrow):
    """Write images [N, 784] in [0, 1] as a grid, `nrow` in a row, black on white, enlarged."""
    images = 1 - images.detach().float().cpu().view(-1, 1, 28, 28)
    enlarged = F.interpolate(images, scale_factor=3)  # [N, 1, 84, 84]
    save_image(enlarged, filename, nrow=nrow, padding=2, pad_value=0.8)


def save_samples(model, filename):
    """64 samples, always from the same noise."""
    torch.manual_seed(0)  # which does not change the training: each epoch sets its own seed
    save_grid(model.sample(64) / 255, filename, nrow=8)


# --------------------------------------------------------------------------- the files of a run
def run_dir(args):
    """The folder of the run. Runs on glyphs, which replace a missing MNIST, get another."""
    if args.out_dir:
        return args.out_dir
    name = "nf" if args.n_mixtures else "nf_affine"
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
    """The trained Model in eval mode, from a run's checkpoint.pt (its best epoch) or weights.pt."""
    content = load_checkpoint(checkpoint)
    model = Model([784], n_mixtures=content["n_mixtures"])
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


def seconds_to(target_bpd, rows):
    """Training time up to the end of the first epoch below the target; None if there is none."""
    seconds = 0
    for row in rows:
        seconds += row["seconds"]
        if row["val_bpd"] < target_bpd:
            return seconds
    return None


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
    group.add_argument("--n_mixtures", type=int, default=6,
                       help="logistic components of a mixture; 0: RealNVP (default: %(default)s)")
    group.add_argument("--epochs", "--n_epochs", type=int, default=16,
                       help="passes over the training images (default: %(default)s)")
    group.add_argument("--batch_size", type=int, default=32,
                       help="images per update (default: %(default)s)")
    group.add_argument("--lr", type=float, default=8e-3,
                       help="peak learning rate of the one-cycle schedule (default: %(default)s)")
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
                       help="output folder (default: report/figures/nf, or nf_affine)")

    group = parser.add_argument_group("instead of a full new run").add_mutually_exclusive_group()
    group.add_argument("--dry_run", action="store_true",
                       help="run every step on a few batches, in a temporary folder, or --out_dir")
    group.add_argument("--resume", action="store_true",
                       help="continue the unfinished run in the output folder, with its settings")
    group.add_argument("--sample", type=int, metavar="N",
                       help="write N samples of the trained model to samples.npz and samples.png")

    args = parser.parse_args(argv)
    lowest = {"n_mixtures": 0, "epochs": 1, "batch_size": 1, "lr": 1e-9, "seed": 0, "sample": 1}
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
    """--sample: N samples, uint8 [N, 28, 28], in samples.npz, and the first 100 in samples.png."""
    out_dir = run_dir(args)
    model = load_model(out_dir / "weights.pt", args.device)
    torch.manual_seed(args.seed)
    samples = model.sample(args.sample).byte().cpu()
    np.savez_compressed(out_dir / "samples.npz", samples=samples.view(-1, 28, 28))
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
    data = load(args.dataset, args.data_dir)
    if checkpoint and data.md5 != settings["dataset_md5"]:
        raise DataError(f"the run in {args.out_dir} was started with other images: "
                        "pass their folder with --data_dir, or start a new run")
    args.dataset = data.name  # mnist or glyphs, no longer auto: run_dir depends on it
    args.dataset_md5 = data.md5
    train, val, test = data.train.images, data.val.images, data.test.images
    if args.dry_run:
        train, val, test = train[:5 * args.batch_size // 2], val[:200], test[:10]  # 2.5 batches
        args.epochs = min(args.epochs, 2)
        args.out_dir = args.out_dir or Path(tempfile.mkdtemp(prefix="a3_nf_"))
    train, val, test = train.to(args.device), val.to(args.device), test.to(args.device)
    out_dir = args.out_dir = run_dir(args)
    out_dir.mkdir(parents=True, exist_ok=True)

    # Model. Epoch e is seeded with 10,000 * seed + e, and epoch 0 is the initialization. So a run
    # can be resumed without saving the state of the random number generator.
    torch.manual_seed(10_000 * args.seed)
    model = Model([784], n_mixtures=args.n_mixtures)
    model.grey_levels.fit(data.train.images)
    model.to(args.device)
    # channels_last makes convolutions faster, but some versions of torch misread it on mps.
    if not args.device.startswith("mps"):
        model.to(memory_format=torch.channels_last)
    parameter_groups = []
    for layer in model.flow.layers:
        factor = AUTOREGRESSIVE_LR_FACTOR if isinstance(layer, AutoregressiveLayer) else 1
        parameter_groups.append({"params": layer.parameters(), "lr": factor * args.lr})
    optimizer = torch.optim.AdamW(
        parameter_groups, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    total_updates = args.epochs * math.ceil(len(train) / args.batch_size)
    total_updates = max(20, total_updates)  # at exactly 10, OneCycleLR divides by zero
    rates = [group["lr"] for group in parameter_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rates, total_updates, pct_start=0.1, cycle_momentum=False)
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"{data.name}, {n_parameters:,} parameters, {args.device}; writing to {out_dir}")

    # Resume
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    rows = []  # one per epoch, for metrics.csv
    best = None  # the weights of the epoch with the best validation bpd
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
        save_samples(model, out_dir / "samples_start.png")

    # Epochs
    for epoch in range(len(rows) + 1, args.epochs + 1):
        start = time.time()
        torch.manual_seed(10_000 * args.seed + epoch)
        learning_rate = schedule.get_last_lr()[0]  # at the epoch's first update
        batches = train[torch.randperm(len(train))].split(args.batch_size)
        train_bpd, val_bpd = run_epoch(model, (batches, val.split(500)), optimizer, schedule)
        if not math.isfinite(train_bpd + val_bpd):
            raise FloatingPointError(f"the loss in epoch {epoch} is not finite: "
                                     "start again with a smaller --lr")
        seconds = time.time() - start
        rows.append({
            "epoch": epoch,
            "train_bpd": train_bpd,
            "val_bpd": val_bpd,
            "seconds": seconds,
            "images_per_s": len(train) / seconds,
            "learning_rate": learning_rate,
        })

        if epoch == (args.epochs + 1) // 2:
            save_samples(model, out_dir / "samples_half.png")
        if val_bpd == min(row["val_bpd"] for row in rows):
            best = copy.deepcopy(model.state_dict())
        write_metrics(rows, out_dir / "metrics.csv")
        (out_dir / "results.json").unlink(missing_ok=True)  # of an earlier run in this folder
        settings = {name: getattr(args, name) for name in SETTINGS}
        content = {name: part.state_dict() for name, part in parts.items()}
        content.update(format=FORMAT, n_mixtures=args.n_mixtures, best=best, rows=rows,
                       settings=settings)
        save(content, out_dir / "checkpoint.pt")
        print("  ".join(f"{name} {value:<8.5g}" for name, value in rows[-1].items()))

    # Test
    model.load_state_dict(best)
    torch.manual_seed(10_000 * args.seed + args.epochs + 1)
    scores = evaluate(model, test, IW_SAMPLES)
    save_samples(model, out_dir / "samples_end.png")
    train_curve = [row["train_bpd"] for row in rows]
    val_curve = [row["val_bpd"] for row in rows]
    save_bpd_plot(train_curve, val_curve, out_dir / "bpd.pdf")
    weights = {"format": FORMAT, "n_mixtures": args.n_mixtures, "best": best}
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
        best_epoch=val_curve.index(min(val_curve)) + 1,
        val_bpd=min(val_curve),
        seconds_to_1_85=seconds_to(TARGET_BPD, rows),
        **scores)
    (out_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"test: {scores['test_bpd']:.4f} bits per dimension, "
          f"{scores['test_bpd_iw']:.4f} with {IW_SAMPLES} draws")


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
