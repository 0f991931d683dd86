"""Generative adversarial network on MNIST (hand-out questions 2.5 to 2.7).

    python a3_gan.py --n_epochs 200                     # figures and results in report/figures/gan
    python a3_gan.py --n_epochs 20 --out_dir gan20      # a tenth of the time

Expect a Fréchet distance to the test images of 0.75 (training images: 0.67), after 42 to 73 minutes on two cores.
Sources: Goodfellow et al. (2014), Generative Adversarial Nets; Mescheder et al. (2018) for the gradient penalty; Yazici
et al. (2019) for averaging the generator; Heusel et al. (2017) for the Fréchet distance and two learning rates.
"""

import argparse
import copy
import itertools
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
from scipy.optimize import linear_sum_assignment
from torchvision.utils import save_image
from tqdm import tqdm

from datasets import DATA_DIR, DataError, load

BATCH_NORM_EPOCHS = 3  # then batch norm's means and variances are frozen, and G is trained as it is evaluated
R1_GAMMA, R1_EVERY = 10.0, 16  # weight of the gradient penalty, without which D memorises; on every 16th batch only
FID_EVERY = 10  # epochs between measurements of the Fréchet distance, besides the first and the last
FIGURES = Path(__file__).resolve().parents[1] / "report" / "figures"
FORMAT = "a3_gan 4"  # of checkpoints; files of another script or version are rejected


# ----------------------------------------------------------------------------------------------------------- model
class Generator(nn.Module):
    def __init__(self, latent_dim=100):
        super().__init__()
        self.latent_dim = latent_dim
        self.net = nn.Sequential(
            nn.Linear(latent_dim, 256, bias=False), nn.BatchNorm1d(256), nn.ReLU(),
            nn.Linear(256, 64 * 7 * 7, bias=False), nn.BatchNorm1d(64 * 7 * 7), nn.ReLU(),
            nn.Unflatten(1, (64, 7, 7)),
            nn.Conv2d(64, 4 * 16, 3, padding=1, bias=False), nn.PixelShuffle(2),  # [B, 64, 7, 7] -> [B, 16, 14, 14]
            nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 4, 3, padding=1), nn.PixelShuffle(2), nn.Tanh())        # [B, 4, 14, 14] -> [B, 1, 28, 28]

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
            nn.Flatten(), nn.Linear(32 * 7 * 7, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1))

    def forward(self, img):
        """img [B, 1, 28, 28] in [-1, 1] -> scores [B, 1], real numbers."""
        return self.net(img)


def discriminator_loss(real_scores, fake_scores):
    """-E log D(x) - E log(1 - D(G(z))) = -V of equation 15: scores [B, 1] each -> a scalar, log 4 at equilibrium."""
    return F.softplus(-real_scores).mean() + F.softplus(fake_scores).mean()  # -log sigmoid(s) = softplus(-s)


def generator_loss(fake_scores):
    """-E log D(G(z)), the non-saturating loss (question 2.4): scores [B, 1] -> a scalar, log 2 at equilibrium."""
    return F.softplus(-fake_scores).mean()


def gradient_penalty(discriminator, images):
    """E |d score / d x|^2 over real images, a scalar: R1 of Mescheder et al. (2018), without its factor gamma / 2."""
    images = images.detach().requires_grad_()
    gradient, = torch.autograd.grad(discriminator(images).sum(), images, create_graph=True)  # [B, 1, 28, 28]
    return gradient.square().sum((1, 2, 3)).mean()  # over pixels, over the batch


def to_images(pixels):
    """Pixels uint8 [B, 784] -> [B, 1, 28, 28] in [-1, 1]."""
    return pixels.view(-1, 1, 28, 28).float() / 127.5 - 1


@torch.no_grad()
def generate(generator, z):
    """Noise z [N, latent_dim] -> pixels uint8 [N, 784], both on the CPU. The generator must be in eval mode."""
    images = (generator(batch.to(next(generator.parameters()).device)) for batch in z.split(1000))  # [1000, 1, 28, 28]
    return torch.cat([(127.5 * (x + 1)).round().byte().flatten(1).cpu() for x in images])


def noise(n, latent_dim, seed):
    """n draws of z ~ N(0, I), [n, latent_dim], the same ones for the same seed."""
    return torch.randn(n, latent_dim, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------- training and evaluation
@torch.no_grad()
def update_average(averaged, model, n_updates):
    """averaged = decay * averaged + (1 - decay) * model, a moving average of the weights, in place."""
    decay = (1 + n_updates) / (10 + n_updates)  # the average is over about the last tenth of all updates
    tensors = [[*m.parameters(), *filter(torch.is_floating_point, m.buffers())] for m in (averaged, model)]
    torch._foreach_lerp_(*tensors, 1 - decay)  # the buffers are the running means and variances of batch norm


def train(dataloader, discriminator, generator, optimizer_G, optimizer_D, schedules=(), averaged=None, save_interval=0,
          out_dir=None):
    """One epoch: for each batch an update of the discriminator, then one of the generator.

    `dataloader`: any iterable of batches of images [B, 1, 28, 28] in [-1, 1], with or without labels. Returns the mean
    losses of the discriminator, without the gradient penalty, and of the generator, nats.
    """
    device = next(generator.parameters()).device
    total, n_images = 0, 0
    for step, batch in enumerate(dataloader):
        images = (batch[0] if isinstance(batch, (list, tuple)) else batch).to(device)
        fake = generator(torch.randn(len(images), generator.latent_dim, device=device))
        discriminator.requires_grad_(True)
        real_scores, fake_scores = discriminator(torch.cat([images, fake.detach()])).chunk(2)
        loss_D = discriminator_loss(real_scores, fake_scores)
        optimizer_D.zero_grad()
        loss_D.backward()
        if step % R1_EVERY == 0:  # lazy regularization: rarely, but with more weight (Karras et al. 2020)
            (R1_GAMMA / 2 * R1_EVERY * gradient_penalty(discriminator, images)).backward()
        optimizer_D.step()
        discriminator.requires_grad_(False)  # the generator's step passes through it, but does not change it
        loss_G = generator_loss(discriminator(fake))
        optimizer_G.zero_grad()
        loss_G.backward()
        optimizer_G.step()
        for schedule in schedules:
            schedule.step()
        if averaged is not None:
            n_updates = schedules[0].last_epoch  # it is stepped once per batch
            update_average(averaged, generator, n_updates)
            if save_interval and n_updates % save_interval == 0:
                save_samples(averaged, out_dir / f"batch_{n_updates:07d}.png")
        total += torch.stack([loss_D, loss_G]).detach() * len(images)  # .item() would make the CPU wait for the GPU
        n_images += len(images)
    return (total / n_images).tolist()


def train_classifier(images, labels, epochs=5, batch_size=128):
    """A LeNet-5 (LeCun et al. 1998) with the same seed in every run, whose features are used to evaluate samples."""
    torch.manual_seed(0)
    classifier = nn.Sequential(
        nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2),   # [B, 6, 12, 12]
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),  # [B, 16, 4, 4]
        nn.Flatten(), nn.Linear(256, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10))
    optimizer = torch.optim.AdamW(classifier.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, epochs * math.ceil(len(images) / batch_size))
    for _ in range(epochs):
        for indices in torch.randperm(len(images)).split(batch_size):
            loss = F.cross_entropy(classifier(to_images(images[indices])), labels[indices].long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return classifier


@torch.no_grad()
def classify(classifier, pixels):
    """Pixels uint8 [N, 784] -> features [N, 84], of the penultimate layer, and probabilities [N, 10]."""
    features = torch.cat([classifier[:-1](to_images(batch)) for batch in pixels.split(1000)])
    return features, classifier[-1](features).softmax(1)


def frechet_distance(a, b):
    """|mean_a - mean_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of features [N, d] (Heusel et al. 2017, equation 6)."""
    a, b = a.double().numpy(), b.double().numpy()
    S_a, S_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    trace_root = np.sqrt(np.linalg.eigvals(S_a @ S_b).real.clip(min=0)).sum()  # the sum of the root's eigenvalues
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(S_a) + np.trace(S_b) - 2 * trace_root)


def coverage(real, fake, k=5):
    """Share of the real features [N, d] with a fake one closer than their k-th real neighbour (Naeem et al. 2020)."""
    radius = torch.cat([torch.cdist(x, real).kthvalue(k + 1).values for x in real.split(1000)])  # + 1: one is itself
    nearest = torch.cat([torch.cdist(x, fake).amin(1) for x in real.split(1000)])
    return (nearest < radius).double().mean().item()


def mean_of_sets(measure, real, fake):
    """Mean of measure(real, part) over parts of the fake features that are as large as the real set: one is noisy."""
    return float(np.mean([measure(real, part) for part in fake.chunk(max(1, len(fake) // len(real)))]))


def nearest_distance(pixels, train_pixels):
    """Distance of each image [N, 784] to the nearest training image, [N]: Euclidean, with pixels in [0, 1]."""
    train_images = train_pixels.float() / 255
    return torch.cat([torch.cdist(batch / 255, train_images).min(dim=1).values for batch in pixels.float().split(250)])


def score(pixels, classifier, train_images, test_images):
    """Compare samples, uint8 [N, 784], with the test images, in sets of as many, and 2000 with the training images."""
    fake, probabilities = classify(classifier, pixels)
    real = classify(classifier, test_images)[0]
    return {"fid": mean_of_sets(frechet_distance, real, fake), "coverage": mean_of_sets(coverage, real, fake),
            "confident_share": (probabilities.amax(1) > 0.9).double().mean().item(),
            "nearest_train_distance": nearest_distance(pixels[:2000], train_images).median().item(),
            "class_shares": (probabilities.argmax(1).bincount(minlength=10).double() / len(pixels)).tolist()}


def slerp(start, end, n=9):
    """Spherical interpolation: n points [n, d] from start to end at equal angles (Shoemake 1985)."""
    angle = torch.acos(F.cosine_similarity(start, end, dim=0))
    weight = torch.sin(torch.linspace(0, 1, n) * angle).unsqueeze(1) / torch.sin(angle)  # [n, 1], from 0 to 1
    return weight.flip(0) * start + weight * end


# --------------------------------------------------------------------------------------------------------- figures
def save_curves(rows, filename, fid_floor):
    """Losses of each epoch with their values at equilibrium, and the Fréchet distance to validation images."""
    figure = Figure(figsize=(6, 2.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for key, name, n in (("loss_D", "discriminator", 4), ("loss_G", "generator", 2)):
        line, = left.plot(range(1, len(rows) + 1), [row[key] for row in rows], label=f"{name} ({rows[-1][key]:.3f})")
        left.axhline(math.log(n), color=line.get_color(), linestyle=":", label=f"log {n} = {math.log(n):.3f}")
    left.set(xlabel="epoch", ylabel="loss (nats)")
    fids = {row["epoch"]: row["val_fid"] for row in rows if not math.isnan(row["val_fid"])}
    right.plot(fids.keys(), fids.values(), ".-", label=f"samples (best {min(fids.values()):.2f})")
    right.axhline(fid_floor, color="black", linestyle=":", label=f"training images ({fid_floor:.2f})")
    right.set(xlabel="epoch", ylabel="Fréchet distance", ylim=(0, 2.5 * max(fid_floor, min(fids.values()))))
    for axes in (left, right):
        axes.legend()
    figure.savefig(filename)


def save_grid(images, filename, nrow):
    """Write images [N, 784] in [0, 1] as a grid, `nrow` in a row, black on white, three times enlarged."""
    images = F.interpolate(1 - images.detach().float().cpu().view(-1, 1, 28, 28), scale_factor=3)  # [N, 1, 84, 84]
    save_image(images, filename, nrow=nrow, padding=2, pad_value=0.8)


def save_samples(generator, filename):
    """25 samples, from the same noise each time (question 2.6)."""
    save_grid(generate(generator, noise(25, generator.latent_dim, seed=0)) / 255, filename, nrow=5)


def save_interpolation(generator, classifier, filename):
    """Nine images on the most even of the 45 paths between the digits (question 2.7). Returns what is at its ends."""
    z = noise(1000, generator.latent_dim, seed=2)
    probabilities = classify(classifier, generate(generator, z))[1].numpy()             # [1000, 10]
    samples, digits = linear_sum_assignment(probabilities, maximize=True)               # a sure sample of each digit
    pairs = list(itertools.combinations(range(10), 2))
    paths = [generate(generator, slerp(z[samples[i]], z[samples[j]])) for i, j in pairs]  # [9, 784] each
    steps = torch.stack([path.float().diff(dim=0).norm(dim=1) for path in paths])       # [45, 8]
    best = (steps.amax(1) / steps.mean(1)).argmin()
    save_grid(paths[best] / 255, filename, nrow=9)
    return {"path": "spherical", "digits": [int(digits[i]) for i in pairs[best]],
            "probabilities": [float(probabilities[samples[i], digits[i]]) for i in pairs[best]]}


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
    """The trained generator (averaged weights) in eval mode, from checkpoint.pt (last epoch), best.pt or weights.pt."""
    content = load_checkpoint(checkpoint)
    generator = Generator(content["latent_dim"])
    generator.load_state_dict(content["averaged"])
    return generator.to(device).eval()


# ------------------------------------------------------------------------------------------------------------ main
def parse_args(argv=None):
    parser = argparse.ArgumentParser(  # no usage line, so that an error is a single line
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS)
    add = parser.add_argument_group("model and training").add_argument
    add("--latent_dim", type=int, default=100, help="dimensions of the noise z (default: %(default)s)")
    add("--epochs", "--n_epochs", type=int, default=200, help="passes over the training images (default: %(default)s)")
    add("--batch_size", type=int, default=64, help="images per update (default: %(default)s)")
    add("--lr", type=float, default=1e-3, help="G's first learning rate; D's is half (default: %(default)s)")
    add("--seed", type=int, default=42, help="seed of weights, image order and noise (default: %(default)s)")
    add("--device", help="cpu, cuda or mps (default: %(default)s)", default="cuda" if torch.cuda.is_available() else
        "mps" if torch.backends.mps.is_available() else "cpu")
    add = parser.add_argument_group("data and output").add_argument
    add("--dataset", choices=["auto", "mnist", "glyphs"], default="auto",
        help="auto: MNIST or, if that is not available, glyphs (digits drawn in fonts) (default: %(default)s)")
    add("--data_dir", type=Path, default=DATA_DIR, help="folder of the data (default: %(default)s)")
    add("--out_dir", type=Path, help="folder of the run (default: report/figures/gan)")
    add("--save_interval", type=int, default=0, help="draw samples every so many batches (default: never)")
    add = parser.add_argument_group("instead of a full new run").add_mutually_exclusive_group().add_argument
    add("--dry_run", action="store_true", help="a few batches of everything, in a temporary folder or in --out_dir")
    add("--resume", action="store_true", help="continue the run in its folder, with its own settings")
    add("--sample", type=int, metavar="N", help="write N samples of the trained model to samples.npz and samples.png")
    add("--score", type=Path, metavar="FILE", default=argparse.SUPPRESS, help="measure the images in an .npz file")
    args = parser.parse_args(argv)
    for name, low in (("latent_dim", 2), ("epochs", 1), ("batch_size", 2), ("lr", 1e-9), ("seed", 0), ("sample", 1)):
        if getattr(args, name) is not None and not low <= getattr(args, name) < 2 ** 31:
            parser.error(f"--{name} must be between {low} and {2 ** 31 - 1}")
    try:
        torch.zeros(1, device=args.device).item()
    except Exception as error:  # torch raises exceptions of many types
        parser.error(f"--device {args.device} cannot be used: {str(error).partition(chr(10))[0]}")
    return args


def run_dir(args):
    """The folder of the run. Glyphs get one of their own, so that they never overwrite the figures of MNIST."""
    return args.out_dir or FIGURES / f"gan{'_glyphs' if args.dataset == 'glyphs' else ''}"


def write_samples(args):
    """--sample: N samples, uint8 [N, 28, 28], in samples.npz, and the first of them in samples.png."""
    generator = load_model(run_dir(args) / "weights.pt", args.device)
    samples = generate(generator, noise(args.sample, generator.latent_dim, args.seed)).view(-1, 28, 28)
    np.savez_compressed(run_dir(args) / "samples.npz", samples=samples)
    save_grid(samples[:100] / 255, run_dir(args) / "samples.png", nrow=10)
    print(f"{args.sample} samples are in {run_dir(args)}")


def write_scores(args):
    """--score: compare the images in a file with the test images, and, as a reference, training images with these."""
    try:
        samples = {name: torch.from_numpy(images).view(-1, 784) for name, images in np.load(args.score).items()}
    except Exception:  # numpy and torch raise exceptions of many types
        samples = {}
    if not samples or any(len(pixels) < 100 or pixels.dtype != torch.uint8 for pixels in samples.values()):
        raise OSError(f"{args.score} is not an .npz file of at least 100 images, uint8 [N, 28, 28]")
    data, n = load(args.dataset, args.data_dir), max(map(len, samples.values()))
    samples["training images"], others = data.train.images[:n], data.train.images[2000:]  # none is its own nearest
    classifier = train_classifier(*data.train)
    scores = {name: score(pixels, classifier, others, data.test.images) for name, pixels in samples.items()}
    for name, values in scores.items():
        print(f"{name}: " + "  ".join(f"{key} {np.round(value, 3)}" for key, value in values.items()))
    args.score.with_name("scores.json").write_text(json.dumps(scores, indent=2) + "\n")


def main(args):
    checkpoint = load_checkpoint(run_dir(args) / "checkpoint.pt") if args.resume else None
    vars(args).update({**checkpoint["settings"], "out_dir": run_dir(args)} if checkpoint else {})
    data = load(args.dataset, args.data_dir)
    if getattr(args, "dataset_md5", data.md5) != data.md5:  # that of the checkpoint
        raise DataError(f"the run in {run_dir(args)} began with other images: give their --data_dir, or start again")
    args.dataset, args.dataset_md5 = data.name, data.md5  # no longer auto
    (train_images, train_labels), (val_images, _), (test_images, test_labels) = data.train, data.val, data.test
    if args.dry_run:
        args.epochs, args.out_dir = min(args.epochs, 2), args.out_dir or Path(tempfile.mkdtemp(prefix="a3_gan_"))
        train_images, train_labels = train_images[:4 * args.batch_size], train_labels[:4 * args.batch_size]
        val_images, test_images, test_labels = val_images[:200], test_images[:200], test_labels[:200]
    settings = {k: v for k, v in vars(args).items() if k not in ("device", "data_dir", "out_dir", "resume", "sample")}
    out_dir = args.out_dir = run_dir(args)
    out_dir.mkdir(parents=True, exist_ok=True)

    # the random numbers of an epoch are seeded by 10,000 * seed + epoch, so a resumed run needs no saved random state
    torch.manual_seed(10_000 * args.seed)
    train_on_device = train_images.to(args.device)
    generator, discriminator = Generator(args.latent_dim).to(args.device), Discriminator().to(args.device)
    averaged = copy.deepcopy(generator).requires_grad_(False).eval()
    optimizer_G = torch.optim.Adam(generator.parameters(), args.lr, betas=(0.0, 0.99), fused=True)
    optimizer_D = torch.optim.Adam(discriminator.parameters(), args.lr / 2, betas=(0.0, 0.99), fused=True)
    n_batches = max(1, len(train_images) // args.batch_size)  # without a smaller last batch, for the batch norm
    schedule_G, schedule_D = (torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.5, 20 * n_batches)  # for 20 epochs
                              for optimizer in (optimizer_G, optimizer_D))  # at lower rates D memorises
    n_parameters = [sum(p.numel() for p in model.parameters()) for model in (generator, discriminator)]
    print(f"{data.name}, {n_parameters} parameters, {args.device}; output: {out_dir}; first training a classifier")
    state = {"generator": generator, "discriminator": discriminator, "averaged": averaged, "optimizer_G": optimizer_G,
             "optimizer_D": optimizer_D, "schedule_G": schedule_G, "schedule_D": schedule_D}
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
    classifier = train_classifier(train_images, train_labels)
    z, real = noise(len(train_images), args.latent_dim, seed=0), classify(classifier, val_images)[0]
    val_floor = mean_of_sets(frechet_distance, real, classify(classifier, train_images)[0])

    for epoch in range(len(rows) + 1, args.epochs + 1):
        start = time.time()
        torch.manual_seed(10_000 * args.seed + epoch)
        batches = torch.randperm(len(train_images)).split(args.batch_size)[:n_batches]
        dataloader = (to_images(train_on_device[i]) for i in tqdm(batches, leave=False, disable=None))
        generator.train(epoch <= BATCH_NORM_EPOCHS)
        loss_D, loss_G = train(dataloader, discriminator, generator, optimizer_G, optimizer_D, (schedule_G, schedule_D),
                               averaged, args.save_interval, out_dir)
        if not math.isfinite(loss_D + loss_G + sum(p.sum().item() for p in averaged.parameters())):
            raise FloatingPointError(f"the loss in epoch {epoch} is not finite: start again with a smaller --lr")
        due = epoch in (1, args.epochs) or epoch % FID_EVERY == 0
        fid = mean_of_sets(frechet_distance, real, classify(classifier, generate(averaged, z))[0]) if due else math.nan
        seconds = time.time() - start
        rows.append({"epoch": epoch, "loss_D": loss_D, "loss_G": loss_G, "val_fid": fid, "seconds": seconds,
                     "images_per_s": n_batches * args.batch_size / seconds,
                     "learning_rate": schedule_G.get_last_lr()[0]})
        print("  ".join(f"{name} {value:<8.5g}" for name, value in rows[-1].items()))
        if epoch == (args.epochs + 1) // 2:
            save_samples(averaged, out_dir / "samples_half.png")
        weights = {"format": FORMAT, "latent_dim": args.latent_dim, "averaged": averaged.state_dict()}
        if fid == np.nanmin([row["val_fid"] for row in rows]):
            save(weights, out_dir / "best.pt")
        np.savetxt(out_dir / "metrics.csv", [[*row.values()] for row in rows], "%.8g", ",",
                   header=",".join(rows[0]), comments="")
        (out_dir / "results.json").unlink(missing_ok=True)  # of an earlier run
        parts = {name: part.state_dict() for name, part in state.items()}
        save({**weights, **parts, "rows": rows, "settings": settings}, out_dir / "checkpoint.pt")

    best_row = min((row for row in rows if not math.isnan(row["val_fid"])), key=lambda row: row["val_fid"])
    best = load_model(out_dir / "best.pt")
    save(best.state_dict(), out_dir / "mnist_generator.pt")  # as the template does
    samples = generate(best, noise(4 * len(train_images), args.latent_dim, seed=1))
    scores, floor = (score(pixels, classifier, train_images, test_images) for pixels in (samples, train_images))
    save_curves(rows, out_dir / "losses.pdf", val_floor)
    save_samples(best, out_dir / "samples_end.png")
    save(load_checkpoint(out_dir / "best.pt"), out_dir / "weights.pt")
    peak_memory_mb, seconds = None, sum(row["seconds"] for row in rows)
    if sys.platform != "win32":  # ru_maxrss counts KiB on Linux and bytes on macOS
        import resource
        peak_memory_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024 ** (1 + (sys.platform == "darwin"))
    accuracy = (classify(classifier, test_images)[1].argmax(1) == test_labels).double().mean().item()
    results = {**settings, "device": args.device, "parameters": sum(n_parameters), "train_seconds": seconds,
               "parameters_generator": n_parameters[0], "classifier_test_accuracy": accuracy,
               "images_per_s": n_batches * args.batch_size * len(rows) / seconds, "peak_memory_mb": peak_memory_mb,
               "best_epoch": best_row["epoch"], "val_fid": best_row["val_fid"], "val_fid_floor": val_floor, **scores,
               "fid_floor": floor["fid"], "coverage_of_training_images": floor["coverage"],
               "nearest_train_distance_of_test": nearest_distance(test_images[::5], train_images).median().item(),
               "interpolation": save_interpolation(best, classifier, out_dir / "interpolation.png")}
    (out_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"test: Fréchet distance {scores['fid']:.2f} (training images: {floor['fid']:.2f})")


if __name__ == "__main__":
    arguments = parse_args()
    try:
        (write_scores if "score" in arguments else write_samples if arguments.sample else main)(arguments)
    except KeyboardInterrupt:
        print(f'interrupted; a run continues with --resume --out_dir "{run_dir(arguments)}"', file=sys.stderr)
        sys.exit(130)
    except (DataError, FloatingPointError, OSError) as error:
        sys.exit(f"{Path(__file__).name}: error: {error}")
