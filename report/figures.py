"""Draw the report's figures that no training leaves behind, from the committed weights.

    python3 figures.py          # writes into figures/lesson, in about a minute

Needs MNIST, in data/ or in the folder that $A3_DATA_DIR names.
"""

import os
import sys
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"  # whatever a notebook has set

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

REPORT = Path(__file__).resolve().parent
FIGURES = REPORT / "figures"
sys.path.insert(0, str(REPORT.parent / "code"))

import a3_gan  # noqa: E402
import a3_nf  # noqa: E402
import a3_vae  # noqa: E402
import datasets  # noqa: E402

OUT = FIGURES / "lesson"
N_DIGITS = 12  # in a row


def new_figure(height, n_plots, width=5.5):
    """A figure as wide as the page's text, in inches, so that 8 points are printed as 8 points."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, n_plots)


# ------------------------------------------------------------------------------------- digits
def nearest_training_images(images, train_images):
    """For each image [N, 784] the training image at the smallest Euclidean distance, [N, 784]."""
    distances = torch.cdist(images.float(), train_images.float())
    return train_images[distances.argmin(1)]


def draw_comparison(data):
    """For question 4.1: samples of each model, and below each its nearest training image."""
    torch.manual_seed(0)
    vae = a3_vae.load_model(FIGURES / "vae_z20" / "weights.pt")
    draws, means = vae.sample(N_DIGITS)
    generator = a3_gan.load_model(FIGURES / "gan" / "weights.pt")
    flow = a3_nf.load_model(FIGURES / "nf" / "weights.pt")
    sources = {
        "mnist": data.test.images[:N_DIGITS],
        "vae_draws": 255 * draws,
        "vae_means": 255 * means,
        "gan": generator.sample(N_DIGITS),
        "flow": flow.sample(N_DIGITS),
    }
    for name, images in sources.items():
        nearest = nearest_training_images(images, data.train.images)
        both = torch.cat([images.float(), nearest.float()])
        a3_vae.save_grid(both / 255, OUT / f"compare_{name}.png", nrow=N_DIGITS)


@torch.no_grad()
def draw_reconstructions(binarized):
    """For question 1.13: test images, and the means that the VAEs decode their codes to."""
    x = binarized.test.images[400::800][:N_DIGITS].float()  # they are sorted by digit
    rows = [x]
    for zdim in (20, 2):
        vae = a3_vae.load_model(FIGURES / f"vae_z{zdim}" / "weights.pt")
        mean, _ = vae.encoder(x)
        rows.append(vae.decoder(mean))
    a3_vae.save_grid(torch.cat(rows), OUT / "reconstructions.png", nrow=N_DIGITS)


# ------------------------------------------------------------------------------------- curves
def draw_ring():
    """For question 1.3: a function bends a Gaussian into a ring."""
    z = np.random.default_rng(0).standard_normal((800, 2))
    norm = np.linalg.norm(z, axis=1, keepdims=True)
    ring = z / 10 + z / norm
    figure, (left, right) = new_figure(1.9, 2, width=4)
    left.plot(*z.T, ".", markersize=1.5)
    left.set(title="$z$", xlim=(-4, 4), ylim=(-4, 4), aspect="equal")
    right.plot(*ring.T, ".", markersize=1.5)
    right.set(title=r"$g(z) = z/10 + z/\|z\|$", xlim=(-2, 2), ylim=(-2, 2), aspect="equal")
    figure.savefig(OUT / "ring.pdf")


def draw_generator_losses():
    """For question 2.4: both losses of the generator, and their slopes."""
    a = torch.linspace(-7, 5, 300)
    saturating = -torch.nn.functional.softplus(a)       # log(1 - sigmoid(a))
    non_saturating = torch.nn.functional.softplus(-a)   # -log sigmoid(a)
    figure, (left, right) = new_figure(1.9, 2)
    left.plot(a, saturating, "C0", label=r"$\log(1 - \sigma(a))$")
    left.plot(a, non_saturating, "C1", label=r"$-\log\,\sigma(a)$")
    left.set(ylabel="loss of a sample")
    right.plot(a, -torch.sigmoid(a), "C0")
    right.plot(a, torch.sigmoid(a) - 1, "C1")
    right.set(ylabel="slope")
    for axes in (left, right):
        axes.axvspan(-7, -4, color="0.9")  # early in training
        axes.set(xlabel="the discriminator's logit $a$", xlim=(-7, 5))
    left.legend()
    figure.savefig(OUT / "generator_losses.pdf")


def draw_dequantization():
    """For question 3.4: the densities of a model of four levels, and their log-likelihoods."""
    levels = np.arange(4)
    p = np.array([0.5, 0.2, 0.1, 0.2])
    figure, (left, right) = new_figure(1.9, 2)
    v = np.linspace(-0.5, 4.5, 5001)
    for width, colour in ((0.1, "C0"), (0.02, "C1")):
        height = 1 / (width * np.sqrt(2 * np.pi))
        density = sum(p[k] * height * np.exp(-0.5 * ((v - k) / width) ** 2) for k in levels)
        log_likelihood = (p * np.log(p * height)).sum()
        left.plot(v, density, colour, label=f"log-likelihood {log_likelihood:.2f}")
    left.set(title="without noise: $p(x)$", xlabel="$x$")
    log_likelihood = (p * np.log(p)).sum()
    right.stairs(p, np.arange(5), color="C2", label=f"log-likelihood {log_likelihood:.2f}")
    right.set(title="with noise: $p(x + u)$", xlabel="$v = x + u$", xlim=(-0.5, 4.5), ylim=(0, 1))
    for axes in (left, right):
        axes.set(ylabel="density")
        axes.legend()
    figure.savefig(OUT / "dequantization.pdf")


# ------------------------------------------------------------------------------------ the flow
def box(axes, x, y, text, colour="white", width=0.9):
    corner = x - width / 2, y - 0.3
    axes.add_patch(Rectangle(corner, width, 0.6, facecolor=colour, edgecolor="black"))
    axes.text(x, y, text, ha="center", va="center")


def arrow(axes, start, end):
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=8, color="black",
                                   shrinkA=0, shrinkB=0))


def draw_coupling():
    """For question 3.7: an affine coupling."""
    figure, axes = new_figure(1.35, 1, width=4.2)
    box(axes, 0, 1.6, "$x_1$", "0.9")
    box(axes, 0, 0, "$x_2$")
    box(axes, 2, 0.8, "net")
    box(axes, 4, 0, r"$x_2\,e^s + t$", width=1.3)
    box(axes, 6, 1.6, "$y_1$", "0.9")
    box(axes, 6, 0, "$y_2$")
    arrow(axes, (0.45, 1.6), (5.55, 1.6))
    arrow(axes, (0.45, 0), (3.35, 0))
    arrow(axes, (4.65, 0), (5.55, 0))
    arrow(axes, (2, 1.6), (2, 1.1))
    arrow(axes, (2.45, 0.8), (4, 0.3))
    axes.text(3.4, 0.75, "$s, t$")
    axes.text(3, 1.68, "the kept pixels, unchanged", ha="center", va="bottom")
    axes.set(xlim=(-0.6, 6.6), ylim=(-0.4, 2.1), aspect="equal")
    axes.axis("off")
    figure.savefig(OUT / "coupling.pdf")


def group_of_each_pixel():
    """The number of the group in which each of the 28 x 28 pixels is drawn, from 1 to 7."""
    groups = torch.zeros(784, dtype=torch.long)
    flow = a3_nf.Model([784]).flow
    *couplings, autoregressive = flow.layers
    first, second = autoregressive.pixels.chunk(2)
    groups[first] = 1
    groups[second] = 2
    for number, layer in enumerate(reversed(couplings), start=3):
        groups[layer.changed.flatten()] = number
    return groups.view(28, 28)


def draw_order():
    """For question 3.7: in which order the flow draws the pixels."""
    groups = group_of_each_pixel()
    figure, axes = new_figure(3.2, 1, width=3.2)
    axes.imshow(groups, cmap="Blues_r", vmin=0, vmax=8)
    for (row, column), number in np.ndenumerate(groups.numpy()):
        colour = "white" if number < 4 else "black"
        axes.text(column, row, str(number), ha="center", va="center", color=colour, fontsize=7)
    axes.set(xticks=[], yticks=[])
    figure.savefig(OUT / "order.pdf")


def main():
    matplotlib.rcdefaults()
    matplotlib.rcParams.update({"font.size": 8, "pdf.fonttype": 42})
    OUT.mkdir(exist_ok=True)
    draw_ring()
    draw_generator_losses()
    draw_dequantization()
    draw_coupling()
    draw_order()
    data = datasets.load("mnist")
    draw_comparison(data)
    draw_reconstructions(datasets.load_binarized("mnist"))


if __name__ == "__main__":
    main()
