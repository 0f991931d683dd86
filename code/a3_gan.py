"""Generative adversarial network on MNIST (hand-out questions 2.5 to 2.7).

    python a3_gan.py --n_epochs 200                     # figures and results in report/figures/gan
    python a3_gan.py --n_epochs 20 --out_dir gan20      # a tenth of the time

Expect the samples to have a Fréchet distance of 0.75 to the test images (lower is better), after 42
to 73 minutes on two cores. For comparison, the validation images, as a single set of 10,000, have
0.86; such sets vary by about 0.1. The distance compares features that a classifier computes from
the images. What the code calls FID uses a LeNet-5 that is trained here, and not Inception, so its
numbers cannot be compared with published ones.

Sources: Goodfellow et al. (2014), Generative Adversarial Nets; Mescheder et al. (2018) for the
gradient penalty; Karras et al. (2020), StyleGAN2, for computing it on few batches; Yazici et al.
(2019) for averaging the generator; Heusel et al. (2017) for the Fréchet distance and for two
learning rates; Naeem et al. (2020) for coverage.
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

BATCH_NORM_EPOCHS = 3  # then batch norm keeps its statistics: G is trained as it is evaluated
R1_GAMMA = 10.0  # D's gradient penalty has the weight gamma / 2. Without it, D memorises images
R1_EVERY = 16  # batches per penalty. With 1, the Fréchet distance after 20 epochs is 1.28, not 1.13
FID_EVERY = 10  # epochs per measurement of the Fréchet distance; first and last always have one
IMAGE_SHAPES = [(784,), (28, 28), (1, 28, 28)]  # for --score: the shapes that an image may have
FIGURES = Path(__file__).resolve().parents[1] / "report" / "figures"
FORMAT = "a3_gan 5"  # version of the saved files; others are rejected
# These attributes of args are stored in a checkpoint and restored by --resume
SETTINGS = ("latent_dim", "epochs", "batch_size", "lr", "seed", "save_interval", "dataset",
            "dataset_md5", "dry_run")


# ----------------------------------------------------------------------------------------- model
class Generator(nn.Module):
    """G(z). PixelShuffle(2) turns four channels into one of twice the height and width."""

    def __init__(self, latent_dim=100):
        super().__init__()
        self.latent_dim = latent_dim
        self.net = nn.Sequential(
            nn.Linear(latent_dim, 256, bias=False),              # [B, 256]
            nn.BatchNorm1d(256),
            nn.ReLU(),
            nn.Linear(256, 64 * 7 * 7, bias=False),              # [B, 3136]
            nn.BatchNorm1d(64 * 7 * 7),
            nn.ReLU(),
            nn.Unflatten(1, (64, 7, 7)),                         # [B, 64, 7, 7]
            nn.Conv2d(64, 4 * 16, 3, padding=1, bias=False),     # [B, 64, 7, 7]
            nn.PixelShuffle(2),                                  # [B, 16, 14, 14]
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 4, 3, padding=1),                      # [B, 4, 14, 14]
            nn.PixelShuffle(2),                                  # [B, 1, 28, 28]
            nn.Tanh())

    def forward(self, z):
        """z [B, latent_dim] -> images [B, 1, 28, 28] in [-1, 1]."""
        return self.net(z)

    def sample(self, n_samples):
        """G(z) for z ~ N(0, I), as pixels uint8 [n_samples, 784]. Call eval() first."""
        z = torch.randn(n_samples, self.latent_dim)  # on the CPU: the same noise on every device
        return generate(self, z)


class Discriminator(nn.Module):
    """Outputs the logit of D(x), the probability that x is real: D(x) = sigmoid(logit)."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 4, stride=2, padding=1),     # [B, 16, 14, 14]
            nn.LeakyReLU(0.2),
            nn.Conv2d(16, 32, 4, stride=2, padding=1),    # [B, 32, 7, 7]
            nn.LeakyReLU(0.2),
            nn.Flatten(),                                 # [B, 1568]
            nn.Linear(32 * 7 * 7, 128),                   # [B, 128]
            nn.LeakyReLU(0.2),
            nn.Linear(128, 1))                            # [B, 1]

    def forward(self, img):
        """img [B, 1, 28, 28] in [-1, 1] -> logits [B, 1], real numbers."""
        return self.net(img)


def discriminator_loss(real_logits, fake_logits):
    """-E log D(x) - E log(1 - D(G(z))) = -V of equation 15: logits [B, 1] each -> a scalar.

    It is log 4 at equilibrium. As D = sigmoid(logit), -log D = softplus(-logit) and
    -log(1 - D) = softplus(logit).
    """
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def generator_loss(fake_logits):
    """-E log D(G(z)), the non-saturating loss (question 2.4): logits [B, 1] -> a scalar.

    It is log 2 at equilibrium.
    """
    return F.softplus(-fake_logits).mean()


def gradient_penalty(discriminator, images):
    """E |d logit / d x|^2 over real images, a scalar: R1 of Mescheder et al. (2018)."""
    images = images.detach().requires_grad_()
    logits = discriminator(images)
    # Each logit depends on its own image alone, so the gradient of the sum has them all
    gradient, = torch.autograd.grad(logits.sum(), images, create_graph=True)  # [B, 1, 28, 28]
    return gradient.square().sum((1, 2, 3)).mean()  # over pixels, over the batch


def to_images(pixels):
    """Pixels uint8 [B, 784] -> [B, 1, 28, 28] in [-1, 1]."""
    return pixels.view(-1, 1, 28, 28).float() / 127.5 - 1


@torch.no_grad()
def generate(generator, z):
    """Noise z [N, latent_dim] -> pixels uint8 [N, 784], both on the CPU. Call eval() first."""
    device = next(generator.parameters()).device
    pixels = []
    for batch in z.split(1000):
        images = generator(batch.to(device))  # [1000, 1, 28, 28] in [-1, 1]
        pixels.append((127.5 * (images + 1)).round().byte().flatten(1).cpu())
    return torch.cat(pixels)


def noise(n, latent_dim, seed):
    """n draws of z ~ N(0, I), [n, latent_dim], which depend on the seed alone."""
    return torch.randn(n, latent_dim, generator=torch.Generator().manual_seed(seed))


# -------------------------------------------------------------------------------------- training
@torch.no_grad()
def update_average(averaged, model, n_updates):
    """averaged = decay * averaged + (1 - decay) * model, a moving average of the weights."""
    # 1 - decay is about 9 / n_updates, so the average spans about the last tenth of the updates
    decay = (1 + n_updates) / (10 + n_updates)
    for average, current in zip(averaged.parameters(), model.parameters(), strict=True):
        average.lerp_(current, 1 - decay)
    for average, current in zip(averaged.buffers(), model.buffers(), strict=True):
        if current.is_floating_point():  # batch norm's means and variances
            average.lerp_(current, 1 - decay)


def train(dataloader, discriminator, generator, optimizer_G, optimizer_D, schedules=(),
          averaged=None, n_updates=0, save_interval=0, out_dir=None):
    """One epoch: for each batch an update of the discriminator, then one of the generator.

    dataloader: any iterable of batches of images [B, 1, 28, 28] in [-1, 1], with or without labels.
    averaged: a copy of the generator, which becomes the moving average of its weights.
    n_updates: how many updates came before this epoch. The decay of the average depends on it.
    save_interval: after so many updates, each time, samples of `averaged` are saved in out_dir.
    Returns the mean losses in nats: the discriminator's, without the penalty, and the generator's.
    Raises ValueError if images are not in [-1, 1].
    """
    device = next(generator.parameters()).device
    total_D, total_G, n_images = 0, 0, 0
    bar = tqdm(dataloader, leave=False, disable=None)  # None: no bar if it is not a terminal
    for step, batch in enumerate(bar, start=1):
        images = batch[0] if isinstance(batch, (list, tuple)) else batch
        # On a GPU they are not checked, since the CPU would have to wait for the answer
        if images.is_cpu and not (images.abs() <= 1).all():
            raise ValueError("pixels must be in [-1, 1], as the generator's are; "
                             f"these are from {images.min()} to {images.max()}")
        images = images.to(device)
        z = torch.randn(len(images), generator.latent_dim, device=device)
        fake = generator(z)  # for both steps

        # The discriminator's step
        discriminator.requires_grad_(True)
        logits = discriminator(torch.cat([images, fake.detach()]))
        real_logits, fake_logits = logits.chunk(2)
        loss_D = discriminator_loss(real_logits, fake_logits)
        optimizer_D.zero_grad()
        loss_D.backward()
        if (step - 1) % R1_EVERY == 0:  # on few batches, so with R1_EVERY times the weight
            penalty = gradient_penalty(discriminator, images)
            (R1_GAMMA / 2 * R1_EVERY * penalty).backward()  # adds to the gradients
        optimizer_D.step()

        # The generator's step, for which the discriminator's weights need no gradients
        discriminator.requires_grad_(False)
        loss_G = generator_loss(discriminator(fake))
        optimizer_G.zero_grad()
        loss_G.backward()
        optimizer_G.step()

        n_updates += 1
        for schedule in schedules:
            schedule.step()
        if averaged is not None:
            update_average(averaged, generator, n_updates)
            if save_interval and n_updates % save_interval == 0:
                save_samples(averaged, out_dir / f"batch_{n_updates:07d}.png")
        total_D += loss_D.detach() * len(images)
        total_G += loss_G.detach() * len(images)
        n_images += len(images)
        if step % 100 == 0:  # not more often: .item() makes the CPU wait for the GPU
            losses = f"D {total_D.item() / n_images:.3f}, G {total_G.item() / n_images:.3f}"
            bar.set_postfix_str(losses)
    return float(total_D) / n_images, float(total_G) / n_images


# ------------------------------------------------------------------------------------ evaluation
def train_classifier(images, labels, epochs=5, batch_size=128):
    """A LeNet-5 (LeCun et al. 1998), whose features are used to evaluate samples.

    images: uint8 [N, 784]. The seed is fixed, so that all runs are measured by the same classifier
    (nearly: a different number of threads rounds differently).
    """
    torch.manual_seed(0)
    classifier = nn.Sequential(
        nn.Conv2d(1, 6, 5),     # [B, 6, 24, 24]
        nn.ReLU(),
        nn.MaxPool2d(2),        # [B, 6, 12, 12]
        nn.Conv2d(6, 16, 5),    # [B, 16, 8, 8]
        nn.ReLU(),
        nn.MaxPool2d(2),        # [B, 16, 4, 4]
        nn.Flatten(),           # [B, 256]
        nn.Linear(256, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, 10))      # logits, [B, 10]
    n_updates = epochs * math.ceil(len(images) / batch_size)
    optimizer = torch.optim.AdamW(classifier.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, n_updates)
    for _ in range(epochs):
        for indices in torch.randperm(len(images)).split(batch_size):
            logits = classifier(to_images(images[indices]))
            loss = F.cross_entropy(logits, labels[indices].long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return classifier


@torch.no_grad()
def classify(classifier, pixels):
    """Pixels uint8 [N, 784] -> features [N, 84], of the penultimate layer, and probabilities."""
    features = torch.cat([classifier[:-1](to_images(batch)) for batch in pixels.split(1000)])
    return features, classifier[-1](features).softmax(1)


def frechet_distance(a, b):
    """|mean_a - mean_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of features [N, d] each.

    Heusel et al. (2017), equation 6.
    """
    a, b = a.double(), b.double()
    S_a, S_b = torch.cov(a.T), torch.cov(b.T)
    # The eigenvalues are real and not negative, but for rounding
    eigenvalues = torch.linalg.eigvals(S_a @ S_b).real.clamp(min=0)
    trace_of_root = eigenvalues.sqrt().sum()  # the trace is the sum of the eigenvalues
    distance_of_means = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return (distance_of_means + S_a.trace() + S_b.trace() - 2 * trace_of_root).item()


def neighbour_radii(real, k=5):
    """The distance of each real feature vector, [N, d], to its k-th nearest neighbour, [N]."""
    radii = []
    for batch in real.split(1000):
        distances = torch.cdist(batch, real)
        radii.append(distances.kthvalue(k + 1).values)  # + 1: the nearest one is itself
    return torch.cat(radii)


def coverage(real, fake, radii):
    """Share of the real feature vectors, [N, d], that have a fake one within their radius."""
    nearest = torch.cat([torch.cdist(batch, fake).amin(1) for batch in real.split(1000)])
    return (nearest < radii).double().mean().item()


def sets_of_fakes(real, fake):
    """Split the fake feature vectors into sets of as many as there are real ones.

    So all Fréchet distances, which depend on the number of images, can be compared. A remainder is
    dropped. If there are fewer fake vectors than real ones, they are one set.
    """
    n_sets = max(1, len(fake) // len(real))
    return fake[:n_sets * len(real)].split(len(real))


def frechet_distance_per_set(real, fake):
    """The Fréchet distance of each set of fake feature vectors to the real ones: a numpy array."""
    return np.array([frechet_distance(real, part) for part in sets_of_fakes(real, fake)])


def mean_coverage(real, fake):
    """Mean coverage of the real feature vectors by each set of fake ones."""
    radii = neighbour_radii(real)
    return float(np.mean([coverage(real, part, radii) for part in sets_of_fakes(real, fake)]))


def nearest_distance(pixels, train_pixels):
    """Distance to the nearest training image: uint8 [N, 784] -> [N], Euclidean, of pixels / 255."""
    train_images = train_pixels.float() / 255
    nearest = []
    for batch in pixels.float().split(250):
        nearest.append(torch.cdist(batch / 255, train_images).amin(1))
    return torch.cat(nearest)


def score(pixels, classifier, train_images, test_images):
    """Compare samples, uint8 [N, 784], with the test images, and the first 2000 with training ones.

    Fréchet distance and coverage are means over sets of samples as large as the test set.
    fid_set_std: standard deviation of the distance over these sets; None if there is only one.
    confident_share: share of samples whose most likely digit has a probability above 0.9.
    nearest_train_distance: median distance to the nearest training image; see nearest_distance.
    class_shares: share of each digit.
    """
    fake, probabilities = classify(classifier, pixels)
    real, _ = classify(classifier, test_images)
    digits = probabilities.argmax(1)
    distances = frechet_distance_per_set(real, fake)
    return {
        "fid": distances.mean().item(),
        "fid_set_std": distances.std(ddof=1).item() if len(distances) > 1 else None,
        "coverage": mean_coverage(real, fake),
        "confident_share": (probabilities.amax(1) > 0.9).double().mean().item(),
        "nearest_train_distance": nearest_distance(pixels[:2000], train_images).median().item(),
        "class_shares": (digits.bincount(minlength=10).double() / len(pixels)).tolist(),
    }


def slerp(start, end, n=9):
    """n points [n, d] from start to end. If these have one norm: on a sphere, at equal angles.

    Shoemake (1985), Animating rotation with quaternion curves.
    """
    cosine = F.cosine_similarity(start, end, dim=0).clamp(-1, 1)
    angle = torch.acos(cosine).clamp(min=1e-4)  # not 0 / 0 if start and end are the same
    t = torch.linspace(0, 1, n).unsqueeze(1)  # [n, 1]
    points = torch.sin((1 - t) * angle) * start + torch.sin(t * angle) * end
    return points / torch.sin(angle)


# --------------------------------------------------------------------------------------- figures
def save_curves(rows, filename, reference_fid):
    """Losses of each epoch, with their values at equilibrium, and the Fréchet distance.

    The distance is that of samples to the validation images. For comparison, reference_fid is the
    distance between the test and the validation images.
    """
    from matplotlib.figure import Figure  # not pyplot, which looks for a display
    figure = Figure(figsize=(6, 2.4), layout="constrained")
    left, right = figure.subplots(1, 2)

    epochs = [row["epoch"] for row in rows]
    losses_D = [row["loss_D"] for row in rows]
    losses_G = [row["loss_G"] for row in rows]
    left.plot(epochs, losses_D, "C0", label=f"discriminator ({losses_D[-1]:.3f})")
    left.axhline(math.log(4), color="C0", linestyle=":", label=f"log 4 = {math.log(4):.3f}")
    left.plot(epochs, losses_G, "C1", label=f"generator ({losses_G[-1]:.3f})")
    left.axhline(math.log(2), color="C1", linestyle=":", label=f"log 2 = {math.log(2):.3f}")
    left.set(xlabel="epoch", ylabel="loss (nats)")
    left.legend()

    measured = [row for row in rows if not math.isnan(row["val_fid"])]
    fids = [row["val_fid"] for row in measured]
    epochs = [row["epoch"] for row in measured]
    right.plot(epochs, fids, ".-", label=f"samples (best {min(fids):.2f})")
    label = f"test images ({reference_fid:.2f})"
    right.axhline(reference_fid, color="black", linestyle=":", label=label)
    top = 2.5 * max(reference_fid, min(fids))
    right.set(xlabel="epoch", ylabel="Fréchet distance", ylim=(0, top))
    right.legend()
    figure.savefig(filename)


def save_grid(images, filename, nrow):
    """Write images [N, 784] in [0, 1] as a grid, `nrow` in a row, black on white, enlarged."""
    images = 1 - images.detach().float().cpu().view(-1, 1, 28, 28)
    enlarged = F.interpolate(images, scale_factor=3)  # [N, 1, 84, 84]
    save_image(enlarged, filename, nrow=nrow, padding=2, pad_value=0.8)


def save_samples(generator, filename):
    """25 samples, from the same noise each time (question 2.6)."""
    z = noise(25, generator.latent_dim, seed=0)
    save_grid(generate(generator, z) / 255, filename, nrow=5)


def save_interpolation(generator, classifier, filename):
    """Nine images from one sample to another, of a different digit (question 2.7).

    The start is the sample, of 1000, of whose digit the classifier is surest; the end is the surest
    sample of any other digit. The path is spherical, since noise z ~ N(0, I) lies near a sphere, of
    radius sqrt(latent_dim). Returns the digits at the ends and their probabilities.
    """
    z = noise(1000, generator.latent_dim, seed=2)
    _, probabilities = classify(classifier, generate(generator, z))  # [1000, 10]
    confidence, digits = probabilities.max(1)
    start = confidence.argmax()
    is_other = digits != digits[start]
    end = (confidence * is_other).argmax()
    path = generate(generator, slerp(z[start], z[end]))  # [9, 784]
    save_grid(path / 255, filename, nrow=9)
    return {
        "digits": [digits[start].item(), digits[end].item()],
        "probabilities": [confidence[start].item(), confidence[end].item()],
    }


# --------------------------------------------------------------------------- the files of a run
def run_dir(args):
    """The folder of the run. Runs on glyphs, which replace a missing MNIST, get another."""
    if args.out_dir:
        return args.out_dir
    name = "gan"
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
    """The trained generator in eval mode, from a run's checkpoint.pt (its best) or weights.pt."""
    content = load_checkpoint(checkpoint)
    generator = Generator(content["latent_dim"])
    generator.load_state_dict(content["best"])
    return generator.to(device).eval()


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
    group.add_argument("--latent_dim", type=int, default=100,
                       help="dimensions of the noise z (default: %(default)s)")
    group.add_argument("--epochs", "--n_epochs", type=int, default=200,
                       help="passes over the training images (default: %(default)s)")
    group.add_argument("--batch_size", type=int, default=64,
                       help="images per update (default: %(default)s)")
    group.add_argument("--lr", type=float, default=1e-3,
                       help="first learning rate of the generator; the discriminator has half of "
                            "it (default: %(default)s)")
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
                       help="output folder (default: report/figures/gan)")
    group.add_argument("--save_interval", type=int, default=0,
                       help="draw samples every N batches (default: never)", metavar="N")

    group = parser.add_argument_group("instead of a full new run").add_mutually_exclusive_group()
    group.add_argument("--dry_run", action="store_true",
                       help="run every step on a few batches, in a temporary folder, or --out_dir")
    group.add_argument("--resume", action="store_true",
                       help="continue the unfinished run in the output folder, with its settings")
    group.add_argument("--sample", type=int, metavar="N",
                       help="write N samples of the trained model to samples.npz and samples.png")
    group.add_argument("--score", type=user_path, metavar="FILE",
                       help="compare the images in an .npz file with the test images")

    args = parser.parse_args(argv)
    lowest = {"latent_dim": 2, "epochs": 1, "batch_size": 2, "lr": 1e-9, "seed": 0, "sample": 1}
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
    generator = load_model(out_dir / "weights.pt", args.device)
    torch.manual_seed(args.seed)
    samples = generator.sample(args.sample)
    np.savez_compressed(out_dir / "samples.npz", samples=samples.view(-1, 28, 28))
    save_grid(samples[:100] / 255, out_dir / "samples.png", nrow=10)
    print(f"{args.sample} samples are in {out_dir}")


def read_images(path):
    """The images in an .npz file, {name: uint8 [N, 784]}. Raises OSError if there are none."""
    if not path.exists():
        raise OSError(f"{path} does not exist")
    try:
        with np.load(path) as file:
            arrays = dict(file)
    except Exception as error:  # numpy raises exceptions of many types
        raise OSError(f"{path} is not an .npz file ({first_line(error)})") from None
    images, others = {}, []
    for name, array in arrays.items():
        is_images = array.dtype == np.uint8 and array.shape[1:] in IMAGE_SHAPES
        if is_images and len(array) >= 100:
            images[name] = torch.from_numpy(array.reshape(-1, 784))
        else:
            others.append(f"{name}: {array.dtype} {list(array.shape)}")
    if not images:
        raise OSError(f"{path} has no array of at least 100 images, uint8 [N, 28, 28], but "
                      + (", ".join(others) or "nothing"))
    for description in others:
        print(f"not images, and not scored: {description}", file=sys.stderr)
    for name, pixels in images.items():
        if len(pixels) < 10_000:
            print(f"warning: {name} has fewer than 10,000 images, which makes its Fréchet distance "
                  "larger", file=sys.stderr)
        if pixels.max() <= 1:
            print(f"warning: no pixel of {name} is above 1, but white should be 255",
                  file=sys.stderr)
    return images


def write_scores(args):
    """--score: compare the images in a file, and the validation images, with the test images.

    The classifier has seen neither the validation nor the test images. The scores are printed and
    written to scores.json, beside the file.
    """
    image_sets = read_images(args.score)
    data = load(args.dataset, args.data_dir)
    image_sets["validation images"] = data.val.images
    classifier = train_classifier(data.train.images, data.train.labels)
    scores = {}
    for name, pixels in image_sets.items():
        scores[name] = score(pixels, classifier, data.train.images, data.test.images)
        for key, value in scores[name].items():
            if value is not None:
                print(f"{name}: {key} {np.round(value, 3)}")
    args.score.with_name("scores.json").write_text(json.dumps(scores, indent=2) + "\n")


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
    train_set, val_set, test_set = data.train, data.val, data.test
    if args.dry_run:
        # Each is a named tuple of images and labels
        train_set = train_set._make(part[:4 * args.batch_size] for part in train_set)
        val_set = val_set._make(part[:200] for part in val_set)
        test_set = test_set._make(part[:200] for part in test_set)
        args.epochs = min(args.epochs, 2)
        args.out_dir = args.out_dir or Path(tempfile.mkdtemp(prefix="a3_gan_"))
    images = to_images(train_set.images).to(args.device)  # [50000, 1, 28, 28]
    out_dir = args.out_dir = run_dir(args)
    out_dir.mkdir(parents=True, exist_ok=True)

    # Models. Epoch e is seeded with 10,000 * seed + e, and epoch 0 is the initialization. So a run
    # can be resumed without saving the state of the random number generator.
    torch.manual_seed(10_000 * args.seed)
    generator = Generator(args.latent_dim).to(args.device)
    discriminator = Discriminator().to(args.device)
    averaged = copy.deepcopy(generator).requires_grad_(False).eval()
    optimizer_G = torch.optim.Adam(generator.parameters(), args.lr, betas=(0.0, 0.99), fused=True)
    optimizer_D = torch.optim.Adam(
        discriminator.parameters(), args.lr / 2, betas=(0.0, 0.99), fused=True)
    # A smaller last batch is left out. G makes as many fakes as a batch has images, and with fewer
    # the means and variances of its batch norm are noisier.
    n_batches = max(1, len(images) // args.batch_size)
    n_images = min(len(images), n_batches * args.batch_size)  # used in an epoch
    # The rates fall to one half in 20 epochs and then stay. In trials where they fell further, D
    # began to memorise the images.
    schedule_G = torch.optim.lr_scheduler.LinearLR(
        optimizer_G, start_factor=1, end_factor=0.5, total_iters=20 * n_batches)
    schedule_D = torch.optim.lr_scheduler.LinearLR(
        optimizer_D, start_factor=1, end_factor=0.5, total_iters=20 * n_batches)
    n_parameters_G = sum(p.numel() for p in generator.parameters())
    n_parameters_D = sum(p.numel() for p in discriminator.parameters())
    print(f"{data.name}, {n_parameters_G:,} (G) and {n_parameters_D:,} (D) parameters, "
          f"{args.device}; writing to {out_dir}")

    # Resume
    parts = {
        "generator": generator,
        "discriminator": discriminator,
        "averaged": averaged,
        "optimizer_G": optimizer_G,
        "optimizer_D": optimizer_D,
        "schedule_G": schedule_G,
        "schedule_D": schedule_D,
    }
    rows = []  # one per epoch, for metrics.csv
    best = None  # the averaged weights of the epoch with the best validation Fréchet distance
    if checkpoint:
        rows = checkpoint["rows"]
        best = checkpoint["best"]
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
    else:
        keep_unfinished_run(out_dir)
        save_samples(averaged, out_dir / "samples_start.png")

    # Fréchet distances compare features of a classifier, which is trained first
    classifier = train_classifier(train_set.images, train_set.labels)
    val_features, _ = classify(classifier, val_set.images)
    val_noise = noise(5 * len(val_set.images), args.latent_dim, seed=0)  # for a mean of 5 sets

    # Epochs
    for epoch in range(len(rows) + 1, args.epochs + 1):
        start = time.time()
        torch.manual_seed(10_000 * args.seed + epoch)
        learning_rate = schedule_G.get_last_lr()[0]  # at the epoch's first update
        shuffled = images[torch.randperm(len(images))]
        dataloader = shuffled[:n_images].split(args.batch_size)
        generator.train(epoch <= BATCH_NORM_EPOCHS)  # later batch norm is in eval mode
        loss_D, loss_G = train(
            dataloader, discriminator, generator, optimizer_G, optimizer_D,
            (schedule_G, schedule_D), averaged, (epoch - 1) * n_batches, args.save_interval,
            out_dir)
        weights_sum = sum(p.sum().item() for p in averaged.parameters())
        if not math.isfinite(loss_D + loss_G + weights_sum):
            raise FloatingPointError(f"a loss or weight in epoch {epoch} is not finite: "
                                     "start again with a smaller --lr")
        val_fid = math.nan
        if epoch in (1, args.epochs) or epoch % FID_EVERY == 0:
            fake_features, _ = classify(classifier, generate(averaged, val_noise))
            val_fid = frechet_distance_per_set(val_features, fake_features).mean().item()
        seconds = time.time() - start
        rows.append({
            "epoch": epoch,
            "loss_D": loss_D,
            "loss_G": loss_G,
            "val_fid": val_fid,
            "seconds": seconds,
            "images_per_s": n_images / seconds,
            "learning_rate": learning_rate,
        })

        if epoch == (args.epochs + 1) // 2:
            save_samples(averaged, out_dir / "samples_half.png")
        if val_fid == np.nanmin([row["val_fid"] for row in rows]):  # never so if it is nan
            best = copy.deepcopy(averaged.state_dict())
        write_metrics(rows, out_dir / "metrics.csv")
        (out_dir / "results.json").unlink(missing_ok=True)  # of an earlier run in this folder
        settings = {name: getattr(args, name) for name in SETTINGS}
        content = {name: part.state_dict() for name, part in parts.items()}
        content.update(format=FORMAT, latent_dim=args.latent_dim, best=best, rows=rows,
                       settings=settings)
        save(content, out_dir / "checkpoint.pt")
        print("  ".join(f"{name} {value:<8.5g}" for name, value in rows[-1].items()))

    # Test
    averaged.load_state_dict(best)
    averaged.cpu()
    save(averaged.state_dict(), out_dir / "mnist_generator.pt")  # which the template asks for
    test_noise = noise(20 * len(test_set.images), args.latent_dim, seed=1)  # for a mean of 20 sets
    samples = generate(averaged, test_noise)
    scores = score(samples, classifier, train_set.images, test_set.images)
    reference = score(val_set.images, classifier, train_set.images, test_set.images)
    _, probabilities = classify(classifier, test_set.images)
    accuracy = (probabilities.argmax(1) == test_set.labels).double().mean().item()
    save_curves(rows, out_dir / "losses.pdf", reference["fid"])
    save_samples(averaged, out_dir / "samples_end.png")
    interpolation = save_interpolation(averaged, classifier, out_dir / "interpolation.png")
    weights = {"format": FORMAT, "latent_dim": args.latent_dim, "best": best}
    save(weights, out_dir / "weights.pt")

    train_seconds = sum(row["seconds"] for row in rows)
    measured = {row["epoch"]: row["val_fid"] for row in rows if not math.isnan(row["val_fid"])}
    best_epoch = min(measured, key=measured.get)
    results = {name: getattr(args, name) for name in SETTINGS}
    results.update(
        device=args.device,
        processor=processor_name(args.device),
        python=platform.python_version(),
        torch=torch.__version__,
        parameters=n_parameters_G + n_parameters_D,
        parameters_generator=n_parameters_G,
        train_seconds=train_seconds,
        images_per_s=n_images * len(rows) / train_seconds,
        peak_memory_mb=peak_memory_mb(args.device),
        classifier_test_accuracy=accuracy,
        best_epoch=best_epoch,
        val_fid=measured[best_epoch],
        **scores,
        reference=reference,  # the scores of the validation images
        interpolation=interpolation)
    (out_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"test: Fréchet distance {scores['fid']:.2f} "
          f"(validation images: {reference['fid']:.2f})")


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
        if arguments.score:
            write_scores(arguments)
        elif arguments.sample:
            write_samples(arguments)
        else:
            main(arguments)
    except KeyboardInterrupt:
        message = "interrupted"
        out_dir = arguments.out_dir  # main sets it when the run begins
        is_run = out_dir and not (arguments.sample or arguments.score)
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
