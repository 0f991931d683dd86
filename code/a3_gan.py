"""Generative adversarial network on MNIST (hand-out questions 2.5 to 2.7).

    python a3_gan.py --n_epochs 200     # figures and results in report/figures/gan
    python a3_gan.py --n_epochs 20 --out_dir gan20     # in a tenth of the time, nearly as good

Expect, after 200 epochs: Frechet distance 0.97 to the test images (10,000 training images: 0.71; over three seeds 1.07
+- 0.13), coverage 0.93 (0.95), all ten digits; 42 minutes in all on two cores of an EPYC. After 20 epochs: 1.36, 0.88.
Sources: Goodfellow et al. (2014), Generative Adversarial Nets; Mescheder et al. (2018) for the gradient penalty; Yazici
et al. (2019) for the averaged generator, from which all samples are; Heusel et al. (2017) for the Frechet distance and
for two learning rates; Naeem et al. (2020) for coverage. Both metrics use the features of a LeNet-5 trained on the
digits and kept in data/: they compare generators on one machine, and not with figures from an Inception network.
"""

import contextlib
import copy
import itertools
import math
import sys
import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib import rc_context
from matplotlib.figure import Figure  # not pyplot: files only, no display
from tqdm import tqdm

from datasets import (InputError, Split, check_finite, claim, default_out_dir, label, load, on_signals, one_line_errors,
                      parse_flags, random_states, read_checkpoint, resolve_data_dir, say_how_to_resume,
                      set_random_states, write_atomic, write_checkpoint, write_results)

EMA_DECAY = 0.9999  # of the averaged generator, per update
R1_GAMMA, R1_EVERY = 3.0, 16  # weight of the gradient penalty, which only every 16th batch has
FID_EVERY = 5  # epochs
SCRIPT = "a3_gan"
FLAGS = {  # of a run: default, lowest and highest value, and what it is
    "latent_dim": (100, 2, 1000, "dimensions of the noise z"),
    "epochs": (200, 1, 10 ** 5, "passes over the training set"),
    "batch_size": (64, 2, 3125, "images per update"),
    "lr": (2e-3, 1e-9, 10, "learning rate of the generator; the discriminator's is a quarter of it"),
    "seed": (42, 0, 2 ** 31, "of weights, order of images, and noise"),
    "save_interval": (0, 0, 10 ** 9, "batches between samples drawn into progress/ in the output folder; 0 for only "
                      "those at the start, halfway and at the end"),
}


# ----------------------------------------------------------------------------------------------------------- model

class Generator(nn.Module):
    def __init__(self, latent_dim=100):
        super().__init__()
        self.latent_dim = latent_dim
        self.net = nn.Sequential(
            nn.Linear(latent_dim, 256, bias=False), nn.BatchNorm1d(256), nn.ReLU(),
            nn.Linear(256, 64 * 7 * 7, bias=False), nn.BatchNorm1d(64 * 7 * 7), nn.ReLU(),
            nn.Unflatten(1, (64, 7, 7)),
            nn.Conv2d(64, 4 * 16, 3, padding=1, bias=False), nn.PixelShuffle(2),  # [B, 16, 14, 14]
            nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 4, 3, padding=1), nn.PixelShuffle(2), nn.Tanh(),        # [B, 1, 28, 28]
        )

    def forward(self, z):
        """z [B, latent_dim] -> images [B, 1, 28, 28] in [-1, 1]."""
        return self.net(z)


class Discriminator(nn.Module):
    """The score is the logit of D(x), the probability that x is real: D(x) = sigmoid(score)."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 4, stride=2, padding=1), nn.LeakyReLU(0.2),   # [B, 16, 14, 14]
            nn.Conv2d(16, 32, 4, stride=2, padding=1), nn.LeakyReLU(0.2),  # [B, 32, 7, 7]
            nn.Flatten(),
            nn.Linear(32 * 7 * 7, 128), nn.LeakyReLU(0.2),
            nn.Linear(128, 1),
        )

    def forward(self, img):
        """img [B, 1, 28, 28] in [-1, 1] -> scores [B, 1], real numbers."""
        return self.net(img)


def discriminator_loss(real_scores, fake_scores):
    """-E log D(x) - E log(1 - D(G(z))), equation 15 with its sign changed: scores [B, 1] each -> a scalar, nats.

    At equilibrium, where D is 1/2 everywhere, it is log 4 (question 2.3).
    """
    return F.softplus(-real_scores).mean() + F.softplus(fake_scores).mean()  # -log sigmoid(s) = softplus(-s)


def generator_loss(fake_scores):
    """-E log D(G(z)), the non-saturating loss (question 2.4): scores [B, 1] -> a scalar, log 2 at equilibrium."""
    return F.softplus(-fake_scores).mean()


def gradient_penalty(discriminator, images):
    """E |d score / d x|^2 over real images, a scalar: R1 of Mescheder et al. (2018), without its factor gamma / 2.

    Without it the discriminator comes to know the training images by heart, and the samples get worse again.
    """
    images = images.detach().requires_grad_()
    gradient, = torch.autograd.grad(discriminator(images).sum(), images, create_graph=True)  # [B, 1, 28, 28]
    return gradient.square().sum((1, 2, 3)).mean()  # over pixels, over the batch


def to_images(pixels):
    """uint8 [B, 784] -> [B, 1, 28, 28] in [-1, 1]."""
    return pixels.view(-1, 1, 28, 28).float() / 127.5 - 1


@torch.no_grad()
def generate(generator, z):
    """Noise z [N, latent_dim] -> pixels uint8 [N, 784], both on the CPU; the generator in eval mode, on any device."""
    device = next(generator.parameters()).device
    images = (generator(batch.to(device)) for batch in z.split(1000))  # [1000, 1, 28, 28]
    return torch.cat([(127.5 * (x + 1)).round().byte().flatten(1).cpu() for x in images])


def noise(n, latent_dim, seed):
    """n draws of z ~ N(0, I), [n, latent_dim], the same ones for the same seed."""
    return torch.randn(n, latent_dim, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------- training and evaluation

def train(dataloader, discriminator, generator, optimizer_G, optimizer_D, on_step=None, losses=None):
    """One epoch: for each batch an update of the discriminator, then one of the generator.

    `dataloader` is any iterable of batches of images [B, 1, 28, 28] in [-1, 1], alone or with their labels, which are
    not used. on_step() is called after each pair of updates. `losses` gets (loss_D, loss_G, batch size) of each batch,
    behind those of an interrupted epoch that this one completes. Returns both losses, averaged over images, loss_D
    without the gradient penalty.
    """
    losses = [] if losses is None else losses
    device = next(generator.parameters()).device
    generator.train()
    discriminator.train().requires_grad_(True)
    for batch in dataloader:
        images = (batch[0] if isinstance(batch, (list, tuple)) else batch).to(device)
        fake = generator(torch.randn(len(images), generator.latent_dim, device=device))

        both = torch.cat([images, fake.detach()])  # detached: this step is the discriminator's
        real_scores, fake_scores = discriminator(both).chunk(2)
        loss_D = discriminator_loss(real_scores, fake_scores)
        penalty = 0
        if len(losses) % R1_EVERY == 0:  # rarely, with as much more weight, to save time: Karras et al. (2020)
            penalty = R1_GAMMA / 2 * R1_EVERY * gradient_penalty(discriminator, images)
        optimizer_D.zero_grad()
        (loss_D + penalty).backward()
        optimizer_D.step()

        discriminator.requires_grad_(False)  # this step is the generator's, against the updated discriminator
        loss_G = generator_loss(discriminator(fake))
        optimizer_G.zero_grad()
        loss_G.backward()
        optimizer_G.step()
        discriminator.requires_grad_(True)

        losses.append((loss_D.detach(), loss_G.detach(), len(images)))  # no .item(): a GPU need not wait for the CPU
        if on_step:
            on_step()
    n_images = sum(size for *_, size in losses)
    return tuple(sum(float(batch[i]) * batch[2] for batch in losses) / n_images for i in (0, 1))


class Classifier(nn.Module):
    """LeNet-5 (LeCun et al. 1998) with ReLU and max-pooling. It only measures samples."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2),   # [B, 6, 12, 12]
            nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),  # [B, 16, 4, 4]
            nn.Flatten(), nn.Linear(256, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(),
        )
        self.logits = nn.Linear(84, 10)

    def forward(self, images):
        """[B, 1, 28, 28] in [-1, 1] -> logits of the ten digits, [B, 10]."""
        return self.logits(self.features(images))

    @torch.no_grad()
    def measure(self, pixels):
        """uint8 [N, 784] -> features [N, 84] and probabilities of the digits [N, 10], on the CPU."""
        device = self.logits.weight.device
        features = torch.cat([self.features(to_images(batch.to(device))) for batch in pixels.split(1000)])
        return features.cpu(), self.logits(features).softmax(1).cpu()


def load_classifier(data, data_dir):
    """The classifier of this data, from `data_dir` if it is there; else trained, and kept there if possible.

    Trained on the CPU from a fixed seed, whatever the run's device and seed are. Reseeds the global generator.
    """
    path = resolve_data_dir(data_dir) / f"classifier_{data.name}.pt"
    classifier = Classifier()
    try:
        cached = torch.load(path, weights_only=True)
        classifier.load_state_dict(cached["model"])
        if cached["md5"] == data.md5:
            return classifier
    except Exception:  # none yet, or a bad one: torch raises a dozen kinds
        pass
    print(f"training the classifier that measures the samples, once (about 10 seconds) ...{label(data.name)}")
    torch.manual_seed(0)
    classifier, epochs, batch_size = Classifier(), 5, 128
    optimizer = torch.optim.AdamW(classifier.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 5e-3, total_steps=epochs * math.ceil(len(data.train.images) / batch_size))
    for _ in range(epochs):
        for indices in torch.randperm(len(data.train.images)).split(batch_size):
            logits = classifier(to_images(data.train.images[indices]))
            loss = F.cross_entropy(logits, data.train.labels[indices].long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with contextlib.suppress(InputError):  # a read-only folder only costs the time to train it again
        write_atomic(path, lambda file: torch.save({"md5": data.md5, "model": classifier.state_dict()}, file))
    return classifier


def frechet_distance(a, b):
    """|mean_a - mean_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of features a, b [N, d], S their covariances.

    Heusel et al. (2017), equation 6. S_a S_b is similar to a positive semidefinite matrix, so the trace of its root
    is the sum of the roots of its eigenvalues.
    """
    a, b = a.double().numpy(), b.double().numpy()
    S_a, S_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    trace_root = np.sqrt(np.linalg.eigvals(S_a @ S_b).real.clip(min=0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(S_a) + np.trace(S_b) - 2 * trace_root)


def coverage(real, fake, k=5):
    """Share of the real features [N, d] with a fake one nearer than their k-th nearest real neighbour.

    Naeem et al. (2020). For two equal distributions and as many samples of each it is 1 - 2^-k on average.
    """
    covered = 0
    for batch in real.split(1000):
        radius = torch.cdist(batch, real).kthvalue(k + 1, dim=1).values  # the nearest one is itself
        covered += (torch.cdist(batch, fake).min(dim=1).values < radius).sum().item()
    return covered / len(real)


def nearest_distance(pixels, train_pixels):
    """Distance of each image [N, 784] to the nearest training image, [N]: root of the summed squares, white is 1."""
    train_images = train_pixels.float() / 255
    return torch.cat([torch.cdist(batch / 255, train_images).min(dim=1).values for batch in pixels.float().split(250)])


def evaluate(generator, classifier, data):
    """Measure as many samples as there are test images, 10,000, from noise that was not used before.

    `fid_floor` and `coverage_of_training_images` are the same measures of 10,000 training images: the best to hope for.
    `nearest_train_distance_of_test` is how far test images, which are no copies, are from the training images. Nearest
    distances are of every fifth image.
    """
    pixels = generate(generator, noise(len(data.test.images), generator.latent_dim, seed=1))
    fake, probabilities = classifier.measure(pixels)
    real, real_probabilities = classifier.measure(data.test.images)
    other = classifier.measure(data.train.images[:len(pixels)])[0]
    shares = torch.bincount(probabilities.argmax(1), minlength=10) / len(pixels)
    entropy = torch.special.entr  # -p log p
    mutual_information = entropy(probabilities.mean(0)).sum() - entropy(probabilities).sum(1).mean()  # nats
    correct = real_probabilities.argmax(1) == data.test.labels
    near, near_test = (nearest_distance(x[::5], data.train.images) for x in (pixels, data.test.images))
    return {
        "fid": frechet_distance(fake, real), "fid_floor": frechet_distance(other, real),
        "coverage": coverage(real, fake), "coverage_of_training_images": coverage(real, other),
        "class_shares": [round(share, 4) for share in shares.tolist()],
        "classifier_confidence": probabilities.max(1).values.mean().item(),
        "classifier_score": mutual_information.exp().item(),  # as the Inception score: 1 to 10
        "classifier_test_accuracy": correct.double().mean().item(),
        "nearest_train_distance": near.median().item(), "nearest_train_distance_min": near.min().item(),
        "nearest_train_distance_of_test": near_test.median().item(),
        "nearest_train_distance_of_test_min": near_test.min().item()}


def slerp(start, end, n=9):
    """n points [n, d] from start [d] to end [d], both included, by equal angles (Shoemake 1985).

    They are about as far from the origin as draws of N(0, I) are; a straight line would pass nearer to it.
    """
    angle = torch.acos(F.cosine_similarity(start, end, dim=0))
    weight = torch.sin(torch.linspace(0, 1, n) * angle).unsqueeze(1)  # [n, 1]
    weight = weight / weight[-1]  # from 0 to 1, exactly
    return weight.flip(0) * start + weight * end


# --------------------------------------------------------------------------------------------------------- figures

PRINT = {  # drawn as large as the report prints them, in inches and points
    "font.size": 8, "axes.titlesize": 8, "figure.titlesize": 8, "legend.fontsize": 7, "legend.handlelength": 1.5,
    "lines.linewidth": 1, "lines.markersize": 3,
    "savefig.dpi": 300, "savefig.bbox": "tight", "savefig.pad_inches": 0.03}


@rc_context(PRINT)
def save_curves(rows, filename, fid_floor, note=""):
    """Losses of each epoch with their values at equilibrium, and the Frechet distance on validation data."""
    figure = Figure(figsize=(5.5, 2.1), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    if note:
        figure.suptitle(note.strip())  # the two titles have no room for it
    epochs = [row["epoch"] for row in rows]
    for key, name, style, n in (("loss_D", "discriminator", "-", 4), ("loss_G", "generator", "--", 2)):
        line, = left.plot(epochs, [row[key] for row in rows], style, marker="." * (len(rows) == 1),
                          label=f"{name} (last {rows[-1][key]:.3f})")
        left.axhline(math.log(n), color=line.get_color(), linestyle=":", label=f"log {n} = {math.log(n):.3f}")
    left.set(xlabel="epoch", ylabel="loss (nats)", title="Losses, and their values at equilibrium")
    measured, fids = zip(*((row["epoch"], row["val_fid"]) for row in rows if row["val_fid"] is not None))
    right.plot(measured, fids, ".-", label=f"averaged generator (best {min(fids):.2f})")
    right.axhline(fid_floor, color="black", linestyle=":", label=f"training images ({fid_floor:.2f})")
    right.set(xlabel="epoch", ylim=(0, None), title="Fréchet distance to validation images")
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    write_atomic(filename, lambda file: figure.savefig(file, format="png"))


@rc_context(PRINT)
def save_images(pixels, filename, title, columns, captions=(), width=1.8):
    """Draw pixels uint8 [N, 784], `columns` of them side by side, with captions under the columns; width in inches."""
    blank = F.pad(pixels, (0, 0, 0, -len(pixels) % columns))  # fills the last row
    grid = F.pad(blank.view(-1, columns, 28, 28), (1, 1, 1, 1), value=50)  # [rows, columns, 30, 30]
    grid = grid.transpose(1, 2).flatten(2).flatten(0, 1).numpy()  # [rows * 30, columns * 30]
    figure = Figure(figsize=(width, width * grid.shape[0] / grid.shape[1] + 0.4), layout="constrained")
    axes = figure.subplots()
    axes.imshow(grid, cmap="gray_r", vmin=0, vmax=255, interpolation="nearest")
    axes.set_xticks([30 * i + 14.5 for i in range(len(captions))], captions)
    axes.set_yticks([])
    axes.tick_params(length=0)
    axes.set_frame_on(False)
    axes.set_title(title)
    write_atomic(filename, lambda file: figure.savefig(file, format="png"))


def save_samples(generator, filename, title):
    """25 samples, from the same noise at every call (question 2.6)."""
    save_images(generate(generator, noise(25, generator.latent_dim, seed=0)), filename, title, columns=5)


def save_interpolation(generator, classifier, filename, note=""):
    """Nine images on the great circle between two samples of different digits (question 2.7).

    Of 1000 samples it takes for each digit the one that the classifier is surest of; of the 45 pairs the one on whose
    path the digit seen less often is seen most often. Returns the digits and the classifier's probabilities of them.
    """
    z = noise(1000, generator.latent_dim, seed=2)
    probabilities = classifier.measure(generate(generator, z))[1]  # [1000, 10]
    left, surest = probabilities.clone(), []
    for digit in range(10):
        surest.append(left[:, digit].argmax().item())
        left[surest[-1]] = -1  # each digit has another sample, even if all are alike
    paths = {(a, b): generate(generator, slerp(z[surest[a]], z[surest[b]]))
             for a, b in itertools.combinations(range(10), 2)}

    def shorter_stay(pair):
        seen = classifier.measure(paths[pair])[1].argmax(1)  # [9], digits
        return min((seen == digit).sum().item() for digit in pair)

    digits = max(paths, key=shorter_stay)
    sure = [probabilities[surest[digit], digit].item() for digit in digits]
    save_images(paths[digits], filename,
                f"From a {digits[0]} (p = {sure[0]:.3f}) to a {digits[1]} (p = {sure[1]:.3f}), spherical interpolation"
                f"{note}", columns=9, captions=[f"t = {k}/8" for k in range(9)], width=5.5)
    return {"path": "spherical", "digits": list(digits), "probabilities": sure}


# ------------------------------------------------------------------------------------------------------ checkpoint

def make_modules(flags):
    """The networks of a run with these flags, by the names of their weights in its checkpoint."""
    return {"generator": Generator(flags["latent_dim"]), "averaged": Generator(flags["latent_dim"]),
            "discriminator": Discriminator(), "classifier": Classifier()}


def load_model(checkpoint, device="cpu"):
    """The generator (averaged weights of the best epoch so far) in eval mode, from a run's checkpoint.pt or best.pt."""
    _, modules = read_checkpoint(checkpoint, SCRIPT, FLAGS, make_modules)
    return modules["averaged"].to(device).eval()


# ------------------------------------------------------------------------------------------------------------ main

def run_name(args):
    """Of the output folder: see default_out_dir."""
    return "gan"


def run(args, checkpoint):
    """Train, from the start or from `checkpoint`; then measure the best epoch on the test set, and draw it."""
    wall_start, device = time.time(), torch.device(args.device)
    data = load(args.dataset, args.data_dir)
    note, out_dir = label(data.name), args.out_dir or default_out_dir(run_name(args), data.name)
    args.flags["dataset"] = data.name  # no longer auto
    claim(out_dir, data, checkpoint)
    classifier = load_classifier(data, args.data_dir).to(device)
    if args.dry_run:
        data = data._replace(train=Split(*(x[:3 * args.batch_size] for x in data.train)),
                             val=Split(*(x[:200] for x in data.val)), test=Split(*(x[:200] for x in data.test)))
    train_images = data.train.images.to(device)

    torch.manual_seed(args.seed)
    generator, discriminator = Generator(args.latent_dim).to(device), Discriminator().to(device)
    n_parameters = [sum(p.numel() for p in model.parameters()) for model in (generator, discriminator)]
    averaged = copy.deepcopy(generator).requires_grad_(False).eval()
    optimizer_G = torch.optim.Adam(generator.parameters(), args.lr, betas=(0.0, 0.99), fused=True)
    optimizer_D = torch.optim.Adam(discriminator.parameters(), args.lr / 4, betas=(0.0, 0.99), fused=True)
    n_batches = len(train_images) // args.batch_size  # the last, smaller one is left out: it would upset the batch norm
    schedule_G, schedule_D = (torch.optim.lr_scheduler.LambdaLR(  # constant, and from halfway on linearly to zero
        optimizer, lambda n: min(1, 2 - 2 * n / (args.epochs * n_batches))) for optimizer in (optimizer_G, optimizer_D))
    averages, currents = ([tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
                          for model in (averaged, generator))  # weights, and means and variances of batch norms
    state = {"generator": generator, "discriminator": discriminator, "averaged": averaged, "classifier": classifier,
             "optimizer_G": optimizer_G, "optimizer_D": optimizer_D, "schedule_G": schedule_G, "schedule_D": schedule_D}
    rows, best = [], None  # of metrics.csv; the averaged weights with the best Frechet distance on validation data
    losses, seconds, signals = [], 0.0, []  # of the running epoch
    save_samples(averaged, out_dir / "samples_start.png", f"Samples before training{note}")
    if checkpoint:
        for name, part in state.items():
            part.load_state_dict(checkpoint[name])
        rows, best, losses, seconds = (checkpoint[key] for key in ("rows", "best", "losses", "seconds"))
        set_random_states(checkpoint, device)
        wall_start -= seconds + sum(row["seconds"] for row in rows)  # the time before the interruption counts
    z = noise(len(data.val.images), args.latent_dim, seed=0)
    val_features = classifier.measure(data.val.images)[0]
    val_floor = frechet_distance(classifier.measure(data.train.images[:len(z)])[0], val_features)

    def save():
        write_checkpoint(out_dir, {
            "script": SCRIPT, "flags": args.flags, "md5": data.md5, "epoch": len(rows), "rows": rows, "best": best,
            "losses": [(float(D), float(G), size) for D, G, size in losses], "seconds": seconds,
            **random_states(device), **{name: part.state_dict() for name, part in state.items()}})

    def on_step():
        schedule_G.step()
        schedule_D.step()
        n = schedule_G.last_epoch  # updates so far
        decay = min(EMA_DECAY, (1 + n) / (10 + n))  # less at first, to forget the untrained weights
        torch._foreach_lerp_(averages, currents, 1 - decay)
        bar.update()
        if n % 50 == 0 or n % n_batches == 0 or signals:
            loss_D, loss_G, _ = losses[-1]
            weights = sum(tensor.sum() for tensor in (*currents, *discriminator.state_dict().values()))
            check_finite(loss_D + loss_G + weights, len(rows) + 1, args.lr)
            bar.set_postfix_str(f"D {loss_D:.3f} G {loss_G:.3f} FID {best['val_fid'] if best else math.nan:.2f}")
        if args.save_interval and n % args.save_interval == 0:
            save_samples(averaged, out_dir / "progress" / f"batch_{n:07d}.png", f"Samples after {n} batches{note}")
        if signals:
            sys.exit(128 + signals[0])

    print(f"{data.name}{note}: {len(train_images)} training images\n"
          f"GAN{note} with latent_dim {args.latent_dim}, {n_parameters[0] / 1e6:.2f}M parameters of the generator and "
          f"{n_parameters[1] / 1e6:.2f}M of the discriminator, on {device}; output in {out_dir}\n"
          f"FID of training images on validation: {val_floor:.2f}{note}\n"
          f"epoch  loss D  loss G  val FID  seconds  images/s  learning rate")
    bar = tqdm(total=args.epochs * n_batches, initial=schedule_G.last_epoch, unit="batch", disable=None)  # tty only
    on_signals(lambda number, frame: signals.append(number))  # on_step looks, when a batch is done
    try:
        for epoch in range(len(rows) + 1, args.epochs + 1):
            start = time.time() - seconds
            rng = torch.Generator().manual_seed(args.seed + 1_000_003 * epoch)  # so a resumed epoch is the same
            order = torch.randperm(len(train_images), generator=rng).to(device)
            batches = order.split(args.batch_size)[len(losses):n_batches]
            loss_D, loss_G = train((to_images(train_images[indices]) for indices in batches),
                                   discriminator, generator, optimizer_G, optimizer_D, on_step, losses)
            fid = None
            if epoch % FID_EVERY == 0 or epoch == args.epochs:
                fid = frechet_distance(classifier.measure(generate(averaged, z))[0], val_features)
            seconds = time.time() - start
            rows.append({"epoch": epoch, "loss_D": loss_D, "loss_G": loss_G, "val_fid": fid, "seconds": seconds,
                         "images_per_s": n_batches * args.batch_size / seconds,
                         "learning_rate": schedule_G.get_last_lr()[0]})
            tqdm.write("{:5d}  {:6.3f}  {:6.3f}  {:>7}  {:7.1f}  {:8.0f}  {:13.2e}".format(
                epoch, loss_D, loss_G, "" if fid is None else f"{fid:.2f}", *list(rows[-1].values())[4:]) + note)
            if fid is not None and (best is None or fid < best["val_fid"]):
                best = {"epoch": epoch, "val_fid": fid, "model": copy.deepcopy(averaged.state_dict())}
            if epoch == (args.epochs + 1) // 2:
                save_samples(averaged, out_dir / "samples_half.png", f"Samples after epoch {epoch}{note}")
            losses, seconds = [], 0.0
            save()
        bar.close()
        on_signals()  # from here on they end the program at once: the training is saved
        if signals:
            sys.exit(128 + signals[0])

        averaged.load_state_dict(best["model"])
        weights = {name: tensor.cpu() for name, tensor in averaged.state_dict().items()}
        write_atomic(out_dir / "mnist_generator.pt", lambda file: torch.save(weights, file))
        scores = evaluate(averaged, classifier, data)
        save_curves(rows, out_dir / "losses.png", val_floor, note)
        save_samples(averaged, out_dir / "samples_end.png", f"Samples after training{note}")
        interpolation = save_interpolation(averaged, classifier, out_dir / "interpolation.png", note)
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
        "parameters": sum(n_parameters), "parameters_generator": n_parameters[0], "train_seconds": seconds,
        "images_per_s": n_batches * args.batch_size * len(rows) / seconds, "wall_seconds": time.time() - wall_start,
        "best_epoch": best["epoch"], "val_fid": best["val_fid"], "val_fid_floor": val_floor, **scores,
        "interpolation": interpolation})
    print(f"test{note}: FID {scores['fid']:.2f} (training images: {scores['fid_floor']:.2f}), coverage "
          f"{scores['coverage']:.3f} ({scores['coverage_of_training_images']:.3f}), classifier's confidence "
          f"{scores['classifier_confidence']:.3f} and score {scores['classifier_score']:.2f}\n"
          f"share of each digit{note}: {' '.join(f'{100 * share:.1f}%' for share in scores['class_shares'])}; "
          f"distance to the nearest training image {scores['nearest_train_distance']:.2f} (test images: "
          f"{scores['nearest_train_distance_of_test']:.2f}); weights of epoch {best['epoch']}")


def save_sample_files(args):
    """--sample: N images of a trained model, uint8 [N, 28, 28], in samples.npz, and the first 100 in samples.png."""
    generator = load_model(args.resume, args.device)
    samples = generate(generator, noise(args.sample, generator.latent_dim, args.seed))  # [N, 784]
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
