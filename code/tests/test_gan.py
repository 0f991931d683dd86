"""The GAN: its losses and metrics against closed forms, and the script as a user meets it."""

import csv
import json
import math
import shutil
import signal
import struct
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

import a3_gan
import datasets
from a3_gan import (Classifier, Discriminator, Generator, coverage, discriminator_loss, evaluate, frechet_distance,
                    generate, generator_loss, gradient_penalty, load_model, nearest_distance, noise, slerp, to_images,
                    train)
from conftest import locked_by_another, mnist_dir, needs_mnist, run_killed, run_script, start_script


# ---------------------------------------------------------------------------------------------------- mathematics

@pytest.mark.parametrize("latent_dim", [2, 100])
def test_shapes_and_ranges(latent_dim):
    generator, discriminator = Generator(latent_dim), Discriminator()
    images = generator(torch.randn(5, latent_dim))
    assert images.shape == (5, 1, 28, 28) and images.abs().max() <= 1
    scores = discriminator(images)
    assert scores.shape == (5, 1) and scores.std() > 0


def test_losses_against_hand_computed_values():
    real, fake = torch.tensor([[0.0], [2.0]]), torch.tensor([[-1.0], [3.0]])
    D_real, D_fake = real.double().sigmoid(), fake.double().sigmoid()
    assert discriminator_loss(real, fake).item() == pytest.approx(
        -(D_real.log().mean() + (1 - D_fake).log().mean()).item(), rel=1e-6)
    assert discriminator_loss(real, fake).item() == pytest.approx(
        (math.log(2) + math.log(1 + math.exp(-2))) / 2 + (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(3))) / 2)
    assert generator_loss(fake).item() == pytest.approx(-D_fake.log().mean().item(), rel=1e-6)
    far = torch.full((1, 1), 1000.0)  # only logits survive this
    assert discriminator_loss(-far, far).item() == 2000 and generator_loss(-far).item() == 1000


def test_losses_at_equilibrium():
    half = torch.zeros(7, 1)  # D = 1/2 everywhere: V(D, G) = -log 4
    assert discriminator_loss(half, half).item() == pytest.approx(math.log(4))
    assert generator_loss(half).item() == pytest.approx(math.log(2))
    scores = torch.zeros(1000, 1, requires_grad=True)  # equal distributions: the gradient of the constant score is zero
    discriminator_loss(scores, scores).backward()
    assert scores.grad.abs().max() < 1e-7


def test_the_best_discriminator_is_the_ratio_of_the_densities():
    """On two points with p_data = (0.8, 0.2) and p_g = (0.4, 0.6): D* = p_data / (p_data + p_g), V = -log 4 + 2 JSD."""
    p_data, p_g = torch.tensor([0.8, 0.2]).double(), torch.tensor([0.4, 0.6]).double()
    x, y = (torch.repeat_interleave(torch.arange(2), (10 * p).round().long()) for p in (p_data, p_g))
    scores = (p_data / p_g).log().requires_grad_()  # D* = sigmoid(log p_data / p_g)
    loss = discriminator_loss(scores[x], scores[y])
    assert torch.autograd.grad(loss, scores)[0].abs().max() < 1e-7
    for change in ([0.1, 0.0], [-0.1, 0.0], [0.0, 0.1], [0.0, -0.1]):
        other = scores + torch.tensor(change)
        assert discriminator_loss(other[x], other[y]) > loss
    mean = (p_data + p_g) / 2
    jsd = 0.5 * (p_data * (p_data / mean).log()).sum() + 0.5 * (p_g * (p_g / mean).log()).sum()
    assert -loss.item() == pytest.approx(-math.log(4) + 2 * jsd.item(), abs=1e-6)


def test_the_generators_loss_does_not_saturate():
    """Question 2.4: where D(G(z)) is nearly 0 its gradient by the score is -1, that of log(1 - D) nearly 0."""
    score = torch.full((1, 1), -12.0, requires_grad=True)
    generator_loss(score).backward()
    assert score.grad.item() == pytest.approx(-1, abs=1e-4)
    score.grad = None
    (1 - score.sigmoid()).log().mean().backward()
    assert abs(score.grad.item()) < 1e-4


def test_gradient_penalty_against_finite_differences():
    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 1))
    images = torch.rand(4, 1, 28, 28)
    assert gradient_penalty(linear, images).item() == pytest.approx(linear[1].weight.square().sum().item(), rel=1e-5)

    torch.manual_seed(0)
    discriminator, images = Discriminator().double(), images[:2].double()
    with torch.no_grad():
        steps = 1e-7 * torch.eye(784, dtype=torch.float64).view(784, 1, 28, 28)  # few cross a kink of leaky ReLU
        gradients = [(discriminator(x + steps) - discriminator(x - steps)) / 2e-7 for x in images]
    expected = sum(gradient.square().sum().item() for gradient in gradients) / 2
    penalty = gradient_penalty(discriminator, images)
    assert penalty.item() == pytest.approx(expected, rel=1e-4)
    penalty.backward()  # it can be learned from
    assert discriminator.net[0].weight.grad.abs().max() > 0


class Recorder:
    """An optimizer that changes nothing and notes at each step which gradients there are."""

    def __init__(self, own, other):
        self.own, self.other, self.seen, self.others = own, other, [], []

    def zero_grad(self):
        self.own.zero_grad()
        self.before = [p.grad if p.grad is None else p.grad.clone() for p in self.other.parameters()]

    def step(self):
        self.seen.append([p.grad.clone() for p in self.own.parameters()])
        after = [p.grad for p in self.other.parameters()]
        self.others.append(all(a is b is None or torch.equal(a, b) for a, b in zip(self.before, after)))


def test_each_step_has_its_own_gradients_and_leaves_the_others_alone():
    torch.manual_seed(0)
    generator, discriminator = Generator(3), Discriminator()
    images = torch.rand(6, 1, 28, 28) * 2 - 1
    optimizer_G, optimizer_D = Recorder(generator, discriminator), Recorder(discriminator, generator)
    rng = torch.get_rng_state()
    loss_D, loss_G = train([images], discriminator, generator, optimizer_G, optimizer_D)
    assert optimizer_G.others == optimizer_D.others == [True]

    torch.set_rng_state(rng)
    fake = generator.train()(torch.randn(6, 3))
    expected_D = discriminator_loss(discriminator(images), discriminator(fake.detach()))
    expected_G = generator_loss(discriminator(fake))
    penalized_D = expected_D + a3_gan.R1_GAMMA / 2 * a3_gan.R1_EVERY * gradient_penalty(discriminator, images)
    assert (loss_D, loss_G) == pytest.approx((expected_D.item(), expected_G.item()), rel=1e-5)
    for loss, model, optimizer in ((penalized_D, discriminator, optimizer_D), (expected_G, generator, optimizer_G)):
        gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        for expected, actual in zip(gradients, optimizer.seen[0]):
            assert torch.allclose(expected, actual, rtol=1e-3, atol=1e-6) and actual.abs().max() > 0


def test_the_gradient_penalty_comes_at_the_same_batches_in_an_epoch_that_is_completed(monkeypatch):
    generator, discriminator, calls = Generator(3), Discriminator(), []
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.0)
    monkeypatch.setattr(a3_gan, "gradient_penalty", lambda *args: calls.append(len(losses)) or torch.zeros(()))
    losses, images = [], torch.zeros(2, 1, 28, 28)
    for n in (10, 30):
        train([images] * n, discriminator, generator, optimizer, optimizer, losses=losses)
    assert calls == [0, 16, 32]


def test_the_generators_step_is_against_the_updated_discriminator():
    torch.manual_seed(0)
    generator, discriminator = Generator(3), Discriminator()
    images = torch.rand(8, 1, 28, 28) * 2 - 1
    rng = torch.get_rng_state()
    optimizers = torch.optim.SGD(generator.parameters(), 0.0), torch.optim.SGD(discriminator.parameters(), 1.0)
    loss_G = train([images], discriminator, generator, *optimizers)[1]
    torch.set_rng_state(rng)
    assert loss_G == pytest.approx(generator_loss(discriminator(generator(torch.randn(8, 3)))).item(), rel=1e-5)


def test_epoch_average_is_weighted_by_batch_size_and_completes_an_interrupted_epoch():
    generator, discriminator = Generator(3), Discriminator()
    for p in discriminator.parameters():
        torch.nn.init.zeros_(p)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.0)
    losses, calls = [(3.0, 5.0, 12)], []
    averages = train([torch.zeros(4, 1, 28, 28)], discriminator, generator, optimizer, optimizer,
                     lambda: calls.append(1), losses)
    assert averages == pytest.approx(((12 * 3 + 4 * math.log(4)) / 16, (12 * 5 + 4 * math.log(2)) / 16))
    assert len(losses) == 2 and calls == [1]
    with_labels = [(torch.zeros(4, 1, 28, 28), torch.zeros(4))]  # as torch's and the template's DataLoader have it
    losses = train(with_labels, discriminator, generator, optimizer, optimizer)
    assert losses == pytest.approx((math.log(4), math.log(2)))


def test_it_learns():
    """Samples of a generator that is trained on copies of one image come near it."""
    torch.manual_seed(0)
    target = torch.full((1, 1, 28, 28), -1.0)
    target[:, :, 8:20, 12:16] = 1
    generator, discriminator = Generator(2), Discriminator()
    optimizer_G = torch.optim.Adam(generator.parameters(), 2e-3, betas=(0.0, 0.99))
    optimizer_D = torch.optim.Adam(discriminator.parameters(), 5e-4, betas=(0.0, 0.99))

    def distance():
        return (to_images(generate(generator.eval(), noise(50, 2, seed=0))) - target).abs().mean().item()
    before = distance()
    train([target.expand(32, -1, -1, -1)] * 60, discriminator, generator, optimizer_G, optimizer_D)
    assert before > 0.9 and distance() < 0.4


def test_pixels_to_images_and_back():
    pixels = torch.arange(784).remainder(256).to(torch.uint8).view(1, 784)
    images = to_images(pixels)
    assert images.shape == (1, 1, 28, 28) and (images.min(), images.max()) == (-1, 1)

    class Fixed(torch.nn.Linear):
        def forward(self, z):
            return images.expand(len(z), -1, -1, -1)
    assert torch.equal(generate(Fixed(1, 1), torch.zeros(2500, 1)), pixels.expand(2500, -1))


def test_noise_is_standard_normal_and_leaves_the_global_state_alone():
    state = torch.get_rng_state()
    z = noise(20_000, 4, seed=0)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(z, noise(20_000, 4, seed=0))
    assert not torch.equal(z, noise(20_000, 4, seed=1))
    assert z.mean(0).abs().max() < 0.05 and (torch.cov(z.T) - torch.eye(4)).abs().max() < 0.05


# -------------------------------------------------------------------------------------------------------- metrics

def test_frechet_distance_of_commuting_gaussians():
    """Diagonal covariances: |m1 - m2|^2 + sum (s1 - s2)^2. The sample moments are exact, so the equality is too."""
    z = torch.randn(500, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = z - z.mean(0)
    z = z @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(z.T))).T  # mean 0, covariance I
    m1, s1 = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 2.0, 0.5])
    m2, s2 = torch.tensor([1.0, 1.0, -1.0]), torch.tensor([3.0, 2.0, 0.1])
    expected = ((m1 - m2) ** 2).sum() + ((s1 - s2) ** 2).sum()
    assert frechet_distance(m1 + s1 * z, m2 + s2 * z) == pytest.approx(expected.item(), rel=1e-6)


def test_frechet_distance_of_gaussians_that_do_not_commute():
    """tr (S1^1/2 S2 S1^1/2)^1/2, with the roots by eigenvectors."""
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(400, 5, generator=generator).double() @ torch.randn(5, 5, generator=generator).double()
    b = torch.randn(300, 5, generator=generator).double() @ torch.randn(5, 5, generator=generator).double() + 1

    def root(matrix):
        values, vectors = torch.linalg.eigh(matrix)
        return vectors @ values.clamp(min=0).sqrt().diag() @ vectors.T
    S_a, S_b = torch.cov(a.T), torch.cov(b.T)
    assert (S_a @ S_b - S_b @ S_a).abs().max() > 1
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + torch.trace(S_a + S_b - 2 * root(root(S_a) @ S_b @ root(S_a)))
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-8)
    assert frechet_distance(b, a) == pytest.approx(expected.item(), rel=1e-8)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8)
    dead = torch.cat([a, torch.zeros(400, 3)], dim=1), torch.cat([b, torch.zeros(300, 3)], dim=1)  # features always 0
    assert frechet_distance(*dead) == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("k", [1, 5])
def test_coverage_of_equal_distributions(k):
    generator = torch.Generator().manual_seed(0)
    real, fake = torch.randn(4000, 6, generator=generator), torch.randn(4000, 6, generator=generator)
    assert coverage(real, fake, k) == pytest.approx(1 - 2 ** -k, abs=0.02)


def test_coverage_by_hand_and_of_a_missing_mode():
    real = torch.tensor([[0.0], [1.0], [3.0], [10.0]])  # distances to the nearest other one: 1, 1, 2, 7
    assert coverage(real, torch.tensor([[0.5]]), k=1) == 2 / 4
    assert coverage(real, torch.tensor([[0.5], [4.0]]), k=1) == 4 / 4
    assert coverage(real, torch.tensor([[-5.0], [18.0]]), k=1) == 0
    modes = torch.randn(2000, 4, generator=torch.Generator().manual_seed(0))
    modes[:1000] += 100
    fake = torch.randn(2000, 4, generator=torch.Generator().manual_seed(1))
    assert coverage(modes, fake) == pytest.approx(0.5 * (1 - 3 ** -5), abs=0.02)  # twice as many fake ones in one mode


def test_nearest_distance_by_hand():
    train_pixels = torch.zeros(3, 784, dtype=torch.uint8)
    train_pixels[1, :4], train_pixels[2] = 255, 255
    pixels = torch.zeros(2, 784, dtype=torch.uint8)
    pixels[0, :3], pixels[1] = 255, 254
    assert nearest_distance(pixels, train_pixels).tolist() == pytest.approx([1, 28 / 255], abs=1e-3)


class FirstPixel(torch.nn.Module):
    """A stand-in classifier: the digit is the first pixel, and it is as sure of it as told; feature d is pixel d."""

    def __init__(self, sure=1.0):
        super().__init__()
        self.sure = sure

    def measure(self, pixels):
        probabilities = torch.full((len(pixels), 10), (1 - self.sure) / 9)
        probabilities[torch.arange(len(pixels)), pixels[:, 0].long()] = self.sure
        return pixels[:, 1:4].float(), probabilities


def digits(n, first_pixels, brightness):
    """n images with these first pixels in turn, and random ones around the brightness behind them."""
    noise = 20 * torch.randn(n, 784, generator=torch.Generator().manual_seed(brightness))
    pixels = (brightness + noise).round().clamp(0, 255).to(torch.uint8)
    pixels[:, 0] = torch.tensor(first_pixels).repeat(n)[:n]
    return datasets.Split(pixels, pixels[:, 0].clone())


@pytest.mark.parametrize("sure, score", [(1.0, 2.0), (0.1, 1.0)])
def test_evaluate_measures_samples_against_the_test_images(monkeypatch, sure, score):
    train, val, test = digits(600, [1], 100), digits(500, [2], 0), digits(500, [0, 1, 1, 1], 110)
    samples = digits(500, [3, 5], 130).images
    monkeypatch.setattr(a3_gan, "generate", lambda generator, z: samples[:len(z)])
    test.labels[0] = 7  # one wrong of 500
    scores = evaluate(Generator(2), FirstPixel(sure), datasets.Dataset("glyphs", train, val, test, ""))
    if sure == 1:
        assert scores["class_shares"] == [0, 0, 0, 0.5, 0, 0.5, 0, 0, 0, 0]
        assert scores["classifier_test_accuracy"] == 499 / 500
    assert scores["classifier_score"] == pytest.approx(score, rel=1e-5)  # exp(log 2): sure, and two digits
    assert scores["classifier_confidence"] == pytest.approx(sure)
    assert scores["fid"] == pytest.approx(3 * 20 ** 2, rel=0.15) and scores["fid_floor"] == pytest.approx(
        3 * 10 ** 2, rel=0.25)  # three features that differ by so much
    features = [x[:, 1:4].float() for x in (test.images, samples, train.images[:500])]
    assert scores["coverage"] == coverage(features[0], features[1])
    assert scores["coverage_of_training_images"] == coverage(features[0], features[2]) > scores["coverage"] + 0.05
    for key, x in (("nearest_train_distance", samples), ("nearest_train_distance_of_test", test.images)):
        expected = cdist(x[::5].numpy() / 255, train.images.numpy() / 255).min(1)
        assert scores[key] == pytest.approx(np.sort(expected)[49], rel=1e-3)  # torch's median of 100
        assert scores[key + "_min"] == pytest.approx(expected.min(), rel=1e-3)


def test_slerp_ends_exactly_at_its_ends_and_keeps_the_norm():
    start, end = noise(2, 100, seed=3)
    path = slerp(start, end)
    assert path.shape == (9, 100) and torch.equal(path[0], start) and torch.equal(path[-1], end)
    start, end = start / start.norm(), end / end.norm()
    path = slerp(start, end)
    assert path.norm(dim=1).tolist() == pytest.approx([1] * 9, rel=1e-5)
    steps = (path[1:] * path[:-1]).sum(1)  # cosines: equal angles
    assert steps.tolist() == pytest.approx([math.cos(math.acos((start @ end).item()) / 8)] * 8, rel=1e-5)
    for seed in range(200):
        start, end = noise(2, 3, seed)
        path = slerp(start, end, 5)
        assert torch.equal(path[0], start) and torch.equal(path[-1], end)


def test_interpolation_is_between_the_surest_samples_where_both_digits_last_longest(tmp_path, monkeypatch):
    z, drawn = noise(1000, 2, seed=2), []
    probabilities = torch.full((1000, 10), 0.05)
    for digit in range(10):
        probabilities[100 * digit + 7, digit], probabilities[100 * digit + 8, digit] = 0.9 + digit / 1000, 0.8

    probabilities[307, 5] = 0.99  # taken already, for 3: so 5 has 507

    def measure(classifier, pixels):
        if len(pixels) == 1000:
            return None, probabilities
        start, end = ((z == x).all(1).nonzero().item() for x in (pixels[0], pixels[-1]))  # the ends are exact
        assert start % 100 == end % 100 == 7
        held = 4 if (start, end) == (307, 407) else 6 + (start + end) // 100 % 3  # of the nine images
        return None, torch.nn.functional.one_hot(torch.tensor([start // 100] * held + [end // 100] * (9 - held)), 10)
    monkeypatch.setattr(Classifier, "measure", measure)
    monkeypatch.setattr(a3_gan, "generate", lambda generator, z: z)
    monkeypatch.setattr(a3_gan, "save_images", lambda pixels, *args, **kwargs: drawn.append((pixels, args)))
    ends = a3_gan.save_interpolation(Generator(2), Classifier(), tmp_path / "i.png", " [note]")
    assert ends == {"path": "spherical", "digits": [3, 4], "probabilities": pytest.approx([0.903, 0.904])}
    (pixels, (_, title)), = drawn
    assert "From a 3 (p = 0.903) to a 4 (p = 0.904)" in title and "spherical" in title and "[note]" in title
    assert len(pixels) == 9 and torch.equal(pixels[0], z[307]) and torch.equal(pixels[8], z[407])


def test_samples_do_not_depend_on_the_others_in_their_batch():
    """Batch norm in eval mode, as load_model and the averaged generator have it."""
    generator = Generator(4)
    generator(torch.randn(64, 4))  # moves the running statistics
    z = noise(30, 4, seed=0)
    together = generate(generator.eval(), z)
    assert (generate(generator, z[5:6]).int() - together[5:6].int()).abs().max() <= 1


# ---------------------------------------------------------------------------------------------------- the script

FILES = {"samples_start.png", "samples_half.png", "samples_end.png", "losses.png", "interpolation.png", "metrics.csv",
         "results.json", "checkpoint.pt", "best.pt", "mnist_generator.pt"}


def png_size(path):
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    return struct.unpack(">II", content[16:24])


def main(*args):
    """Run main in this process -> exit status."""
    try:
        a3_gan.main([str(arg) for arg in args])
    except SystemExit as stop:
        return stop.code or 0
    return 0


def dry_flags(out_dir, data_dir, *more):
    return ["--dry_run", "--dataset", "glyphs", "--data_dir", data_dir, "--out_dir", out_dir,
            "--batch_size", 32, "--device", "cpu", *more]


def dry_run(out_dir, data_dir, *more):
    return main(*dry_flags(out_dir, data_dir, *more))


def one_line(capsys):
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("a3_gan.py: error: ")
    return err


def resume(path, data_dir, *more):
    return main("--resume", path, "--data_dir", data_dir, "--device", "cpu", *more)


def assert_same_run(folder_a, folder_b):
    """Both runs ended in the same state, bit for bit: weights, optimizers, random state, curves, test results."""
    def same(x, y):
        if isinstance(x, torch.Tensor):
            return torch.equal(x, y)
        if isinstance(x, dict):
            return x.keys() == y.keys() and all(same(x[key], y[key]) for key in x)
        if isinstance(x, (list, tuple)):
            return len(x) == len(y) and all(map(same, x, y))
        return x == y
    for name in ("checkpoint.pt", "best.pt"):
        a, b = (torch.load(folder / name, weights_only=True) for folder in (folder_a, folder_b))
        for row in a["rows"] + b["rows"]:
            del row["seconds"], row["images_per_s"]
        a["seconds"] = b["seconds"] = 0
        assert [key for key in a if not same(a[key], b[key])] == []
    a, b = (json.loads((folder / "results.json").read_text()) for folder in (folder_a, folder_b))
    for key in ("fid", "coverage", "class_shares", "interpolation", "nearest_train_distance", "best_epoch"):
        assert a[key] == b[key]


@pytest.fixture(autouse=True)
def coarse_figures(monkeypatch):
    """Of all tests but those of `finished`: else drawing is what takes the time."""
    monkeypatch.setitem(a3_gan.PRINT, "savefig.dpi", 50)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, glyphs_dir):
    """The folder of a finished dry run with --latent_dim 7."""
    folder = tmp_path_factory.mktemp("finished")
    assert dry_run(folder, glyphs_dir, "--latent_dim", 7) == 0
    return folder


@pytest.fixture(scope="module")
def measured_often(tmp_path_factory, glyphs_dir):
    """The folder of a finished dry run that looked at the Frechet distance after each epoch; epoch 1 was the best."""
    folder = tmp_path_factory.mktemp("measured_often")
    with pytest.MonkeyPatch.context() as patch:
        measure_each_epoch(patch)
        assert dry_run(folder, glyphs_dir, "--latent_dim", 7) == 0
    return folder


def measure_each_epoch(patch):
    """Have FIDs each epoch, and turn their order round, so that an untrained generator has the best one."""
    distance = frechet_distance
    patch.setattr(a3_gan, "FID_EVERY", 1)
    patch.setattr(a3_gan, "frechet_distance", lambda a, b: 1e6 / distance(a, b))


def test_a_run_leaves_what_is_promised(finished):
    assert {path.name for path in finished.iterdir()} == FILES
    for path in finished.glob("*.png"):
        assert min(png_size(path)) > 200, path
    results = json.loads((finished / "results.json").read_text())
    for key in ("dataset", "seed", "epochs", "device", "parameters", "train_seconds", "images_per_s", "peak_memory_mb",
                "fid", "fid_floor", "coverage", "class_shares", "classifier_confidence", "classifier_score",
                "nearest_train_distance", "interpolation", "dataset_md5", "versions", "wall_seconds"):
        assert results[key] is not None, key
    assert results["dataset"] == "glyphs" and results["flags"]["latent_dim"] == 7
    assert results["fid"] > results["fid_floor"] > 0 and sum(results["class_shares"]) == pytest.approx(1)
    assert len(set(results["interpolation"]["digits"])) == 2
    with open(finished / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert list(rows[0]) == ["epoch", "loss_D", "loss_G", "val_fid", "seconds", "images_per_s", "learning_rate"]
    assert rows[0]["val_fid"] == "" and float(rows[1]["val_fid"]) > 0  # not each epoch, but the last


def test_mnist_generator_is_the_averaged_generator_alone(finished):
    generator = Generator(latent_dim=7)
    generator.load_state_dict(torch.load(finished / "mnist_generator.pt", weights_only=True))
    best = torch.load(finished / "checkpoint.pt", weights_only=True)["best"]["model"]
    for model in (generator, load_model(finished / "best.pt"), load_model(finished / "checkpoint.pt")):
        assert all(torch.equal(value, best[key]) for key, value in model.state_dict().items())
    assert not model.training and model.latent_dim == 7


def test_from_another_folder_with_every_flag_then_sample(tmp_path, glyphs_dir, monkeypatch):
    status, stdout, stderr = run_script(
        "a3_gan.py", "--latent_dim", 3, "--n_epochs", 1, "--batch_size", 64, "--lr", 1e-3, "--seed", 7,
        "--device", "cpu", "--save_interval", 2, "--dataset", "glyphs", "--data_dir", glyphs_dir, "--out_dir", "run",
        "--dry_run", cwd=tmp_path)
    assert status == 0, stderr
    assert "glyphs, not MNIST" in stdout
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES | {"progress"}
    progress = [path.name for path in (tmp_path / "run" / "progress").iterdir()]
    assert progress == ["batch_0000002.png"]  # of three batches
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 2  # a header and one epoch
    monkeypatch.chdir(tmp_path)
    assert main("--resume", "run/checkpoint.pt", "--sample", 12, "--out_dir", "elsewhere") == 0
    samples = np.load(tmp_path / "elsewhere" / "samples.npz")["samples"]
    assert samples.dtype == np.uint8 and samples.shape == (12, 28, 28) and samples.std() > 0
    width, height = png_size(tmp_path / "elsewhere" / "samples.png")
    assert 25 < height < 0.4 * width  # two rows of ten leave no gap under the title


def test_help_names_every_flag_and_its_default(capsys):
    assert main("-h") == 0
    text = capsys.readouterr().out
    for flag in ("--latent_dim", "--epochs", "--n_epochs", "--batch_size", "--lr", "--seed", "--device", "--dataset",
                 "--data_dir", "--out_dir", "--resume", "--sample", "--dry_run", "--save_interval"):
        assert flag in text
    assert text.count("default") >= 10


def test_offline_it_goes_on_with_glyphs_and_says_so_everywhere(tmp_path, glyphs_dir, offline, monkeypatch, capsys):
    monkeypatch.setattr(datasets.tempfile, "tempdir", str(tmp_path))
    assert main("--dry_run", "--data_dir", glyphs_dir, "--device", "cpu") == 0
    out, err = capsys.readouterr()
    folder, = tmp_path.glob("a3_gan_*")
    results = json.loads((folder / "results.json").read_text())
    assert "NO MNIST" in err and "no network" in err and results["dataset"] == "glyphs"
    lines = [line for line in out.splitlines() if not line.startswith(("epoch", "downloading", "training the"))]
    assert len(lines) == 7 and all("[glyphs, not MNIST]" in line for line in lines)


def test_glyphs_do_not_replace_results_on_mnist(tmp_path, glyphs_dir, capsys):
    (tmp_path / "results.json").write_text(json.dumps({"dataset": "mnist"}, indent=2))
    assert dry_run(tmp_path, glyphs_dir) == 1
    assert "must not replace" in one_line(capsys) and len(list(tmp_path.iterdir())) == 1


def test_classifier_is_good_and_kept_for_its_data(glyphs_dir, finished, monkeypatch):
    """The dry run has left it; it is taken from there, unless it is broken or of other data."""
    data = datasets.load("glyphs", glyphs_dir)
    path = glyphs_dir / "classifier_glyphs.pt"
    monkeypatch.setattr(torch.optim, "AdamW", None)  # training it would fail
    classifier = a3_gan.load_classifier(data, glyphs_dir)
    accuracy = (classifier.measure(data.test.images)[1].argmax(1) == data.test.labels).double().mean()
    assert accuracy > 0.97
    with pytest.raises(TypeError):
        a3_gan.load_classifier(data._replace(md5="another"), glyphs_dir)
    content = path.read_bytes()
    try:
        path.write_bytes(content[:5000])
        with pytest.raises(TypeError):
            a3_gan.load_classifier(data, glyphs_dir)
    finally:
        path.write_bytes(content)


def test_classifier_can_be_trained_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    split = digits(500, [0, 1], 100)
    data = datasets.Dataset("glyphs", split, split, split, "")
    classifier = a3_gan.load_classifier(data, tmp_path / "file")
    again = a3_gan.load_classifier(data, tmp_path / "file")
    assert all(map(torch.equal, classifier.parameters(), again.parameters()))  # from a fixed seed


def test_averaged_generator_follows_its_formula(tmp_path, glyphs_dir, monkeypatch):
    """Weights, and means and variances of the batch norms."""
    trail, step = [], torch.optim.Adam.step

    def spy(optimizer, *args):
        result = step(optimizer, *args)
        if len(optimizer.param_groups[0]["params"]) == len(list(Generator().parameters())):
            trail.append({key: value.clone() for key, value in watched[0].state_dict().items()})
        return result
    watched, init = [], Generator.__init__

    def watch(generator, *args):
        init(generator, *args)
        watched.append(generator)
    monkeypatch.setattr(Generator, "__init__", watch)
    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    assert dry_run(tmp_path, glyphs_dir) == 0
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert len(trail) == 6
    torch.manual_seed(42)
    average = Generator(100).state_dict()
    for n, weights in enumerate(trail, 1):
        decay = min(0.9999, (1 + n) / (10 + n))
        average = {key: decay * average[key] + (1 - decay) * value for key, value in weights.items()}
    for key, actual in checkpoint["averaged"].items():
        if actual.is_floating_point():
            assert torch.allclose(average[key], actual, atol=1e-6), key
            assert not torch.allclose(checkpoint["generator"][key], actual, atol=1e-4), key


@pytest.mark.parametrize("batch, number", [
    (2, signal.SIGINT), (3, signal.SIGTERM), (5, signal.SIGINT), (6, signal.SIGINT)])
def test_resumed_run_equals_an_uninterrupted_one(measured_often, tmp_path, glyphs_dir, monkeypatch, batch, number,
                                                 capsys):
    """A signal in the middle of an epoch, in an epoch's last batch, or in the last batch of all (3 per epoch)."""
    measure_each_epoch(monkeypatch)
    calls, loss = [], a3_gan.generator_loss

    def interrupted(scores):
        calls.append(1)
        if len(calls) == batch:
            signal.raise_signal(number)
        return loss(scores)
    monkeypatch.setattr(a3_gan, "generator_loss", interrupted)
    assert dry_run(tmp_path, glyphs_dir, "--latent_dim", 7) == 128 + number
    assert "--resume" in capsys.readouterr().err
    assert not (tmp_path / "results.json").exists() and len(calls) == batch
    if batch > 3:  # the interruption in epoch 2 does not touch the best epoch
        best = torch.load(tmp_path / "best.pt", weights_only=True)
        assert best["losses"] == [] and best["epoch"] == best["best"]["epoch"] == 1
    assert load_model(tmp_path / "checkpoint.pt").latent_dim == 7  # also before the first FID
    monkeypatch.setattr(a3_gan, "generator_loss", loss)
    assert resume(tmp_path / "checkpoint.pt", glyphs_dir) == 0
    assert_same_run(tmp_path, measured_often)


def test_a_new_run_does_not_replace_one_that_is_not_finished(finished, tmp_path, glyphs_dir, capsys):
    for name in ("checkpoint.pt", "metrics.csv"):
        shutil.copy(finished / name, tmp_path)
    assert dry_run(tmp_path, glyphs_dir, "--seed", 1) == 1
    assert "--resume" in one_line(capsys)
    assert (tmp_path / "checkpoint.pt").read_bytes() == (finished / "checkpoint.pt").read_bytes()
    assert resume(tmp_path, glyphs_dir) == 0  # by its folder
    assert dry_run(tmp_path, glyphs_dir, "--seed", 1) == 0  # it is finished now


def test_resuming_a_finished_run_measures_it_again(finished, tmp_path, glyphs_dir):
    for path in finished.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert resume(tmp_path / "checkpoint.pt", glyphs_dir) == 0
    assert_same_run(tmp_path, finished)
    old, new = (json.loads((folder / "results.json").read_text()) for folder in (finished, tmp_path))
    assert new["wall_seconds"] > new["train_seconds"] == old["train_seconds"]


def test_a_resumed_run_measures_with_its_own_classifier(finished, tmp_path, glyphs_dir, monkeypatch):
    (tmp_path / "checkpoint.pt").write_bytes((finished / "checkpoint.pt").read_bytes())
    monkeypatch.setattr(a3_gan, "load_classifier", lambda *args: Classifier())  # an untrained one
    assert resume(tmp_path / "checkpoint.pt", glyphs_dir) == 0
    a, b = (json.loads((folder / "results.json").read_text()) for folder in (finished, tmp_path))
    assert (a["fid"], a["classifier_test_accuracy"]) == (b["fid"], b["classifier_test_accuracy"])


def test_same_seed_same_numbers_and_another_seed_others(finished, tmp_path, glyphs_dir):
    assert dry_run(tmp_path / "same", glyphs_dir, "--latent_dim", 7) == 0
    assert_same_run(tmp_path / "same", finished)
    assert dry_run(tmp_path / "other", glyphs_dir, "--latent_dim", 7, "--seed", 1) == 0
    weights, others = (torch.load(folder / "checkpoint.pt", weights_only=True)["generator"].values()
                       for folder in (finished, tmp_path / "other"))
    assert not any(torch.equal(a, b) for a, b in zip(weights, others) if a.dim() > 1)
    start, other = (tmp_path / name / "samples_start.png" for name in ("same", "other"))
    assert start.read_bytes() != other.read_bytes()  # the weights at the start are others, too


def test_best_epoch_is_that_with_the_lowest_distance_on_validation_data(tmp_path, glyphs_dir, monkeypatch):
    monkeypatch.setattr(a3_gan, "FID_EVERY", 1)
    references, distances = [], iter([9.0, 5.0, 7.0, 1.0, 2.0])  # floor, epoch 1, epoch 2, test, its floor
    monkeypatch.setattr(a3_gan, "frechet_distance", lambda a, b: references.append(b) or next(distances))
    assert dry_run(tmp_path, glyphs_dir) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["best_epoch"], results["val_fid"], results["val_fid_floor"]) == (1, 5, 9)
    assert (results["fid"], results["fid_floor"]) == (1, 2)
    data = datasets.load("glyphs", glyphs_dir)
    classifier = a3_gan.load_classifier(data, glyphs_dir)
    val, test = (classifier.measure(split.images[:200])[0] for split in (data.val, data.test))
    assert [torch.equal(b, val) for b in references] == [True] * 3 + [False] * 2
    assert torch.equal(references[3], test) and torch.equal(references[4], test)
    best, last = (torch.load(tmp_path / name, weights_only=True) for name in ("best.pt", "checkpoint.pt"))
    assert (best["epoch"], last["epoch"], last["best"]["epoch"]) == (1, 2, 1)
    assert torch.equal(best["averaged"]["net.0.weight"], last["best"]["model"]["net.0.weight"])
    assert not torch.equal(best["averaged"]["net.0.weight"], last["averaged"]["net.0.weight"])


@pytest.mark.parametrize("size, updates", [(3125, 16), (2999, 16), (16_666 // 8, 24)])
def test_any_number_of_updates(tmp_path, glyphs_dir, size, updates, monkeypatch):
    def no_training(batches, discriminator, generator, optimizer_G, optimizer_D, on_step, losses):
        for batch in batches:
            assert batch.shape == (size, 1, 28, 28)
            losses.append((1.0, 1.0, size))
            optimizer_G.step(), optimizer_D.step()  # without gradients: nothing, but the schedule expects it
            on_step()
        return 1.0, 1.0
    monkeypatch.setattr(a3_gan, "train", no_training)
    monkeypatch.setattr(a3_gan, "evaluate", lambda *args: dict.fromkeys(
        ("fid", "fid_floor", "coverage", "coverage_of_training_images", "classifier_confidence", "classifier_score",
         "nearest_train_distance", "nearest_train_distance_of_test"), 0.0) | {"class_shares": [0.1] * 10})
    monkeypatch.setattr(a3_gan, "generate", lambda generator, z: torch.zeros(len(z), 784, dtype=torch.uint8))
    monkeypatch.setattr(a3_gan, "save_interpolation", lambda *args: None)
    assert main("--dataset", "glyphs", "--data_dir", glyphs_dir, "--out_dir", tmp_path, "--device", "cpu",
                "--epochs", 1, "--batch_size", size) == 0
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["schedule_G"]["last_epoch"] == updates


def test_a_signal_to_a_real_process(tmp_path, glyphs_dir):
    """Ctrl-C while it trains on all glyphs: it saves, and says how to go on."""
    process = start_script("a3_gan.py", "--dataset", "glyphs", "--device", "cpu", "--out_dir", "run",
                           "--data_dir", glyphs_dir, cwd=tmp_path)
    while not process.stdout.readline().startswith("epoch"):  # the header: training begins
        assert process.poll() is None, process.stderr.read()
    time.sleep(2)  # let it train a little
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert stderr.startswith(f"interrupted; to go on: {sys.executable} ") and stderr.count("\n") == 1
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert checkpoint["schedule_G"]["last_epoch"] > 0


def test_kill_9_while_a_checkpoint_is_written(finished, tmp_path, glyphs_dir):
    run_killed("a3_gan", *dry_flags(tmp_path, glyphs_dir, "--latent_dim", 7), cwd=tmp_path)
    assert len(list(tmp_path.glob(".checkpoint.pt.*.tmp"))) == 1 and not (tmp_path / "results.json").exists()
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["epoch"] == 1
    assert resume(tmp_path / "checkpoint.pt", glyphs_dir) == 0
    assert not list(tmp_path.glob(".*"))
    assert_same_run(tmp_path, finished)


def test_a_second_run_in_a_folder_is_refused(tmp_path, glyphs_dir, capsys):
    (tmp_path / "results.json").write_text("of the other")
    with locked_by_another(tmp_path):
        assert dry_run(tmp_path, glyphs_dir) == 1
    assert "another run" in one_line(capsys) and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("args", [
    ["--epochs", "0"], ["--n_epochs", "-3"], ["--epochs", "many"], ["--batch_size", "1"], ["--batch_size", "50000"],
    ["--lr", "nan"], ["--lr", "0"],
    ["--latent_dim", "1"], ["--latent_dim", "1000000"], ["--seed", "-1"], ["--save_interval", "-1"],
    ["--dataset", "cifar"], ["--device", "cuda:99"], ["--device", "toaster"], ["--device", "meta"],
    ["--sample", "5"], ["--unknown"],
    ["--epochs", "1000000000"], ["--lr", "1e9"], ["--lr", "-1"]])
def test_wrong_usage_exits_with_2_and_says_why(args, capsys):
    assert main(*args) == 2
    assert args[0].replace("n_", "") in one_line(capsys).replace("n_", "")


def test_resume_refuses_flags_that_would_change_the_run(finished, glyphs_dir, capsys):
    changed = "--lr", 0.1, "--latent_dim", 20, "--out_dir", finished / "x"
    assert resume(finished / "checkpoint.pt", glyphs_dir, *changed) == 2
    assert "--latent_dim --lr --out_dir" in capsys.readouterr().err


class Evil:
    """Its pickle makes a file when it is loaded without weights_only=True."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_bad_checkpoints_are_refused_in_one_line(finished, tmp_path, glyphs_dir, capsys):
    content = (finished / "checkpoint.pt").read_bytes()
    (tmp_path / "truncated.pt").write_bytes(content[:len(content) // 2])
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"script": "a3_vae"}, tmp_path / "vae.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    checkpoint = torch.load(finished / "checkpoint.pt", weights_only=True)
    checkpoint["discriminator"]["renamed"] = checkpoint["discriminator"].popitem()[1]
    torch.save(checkpoint, tmp_path / "layers.pt")
    torch.save({"script": "a3_gan"}, tmp_path / "empty.pt")
    checkpoint = torch.load(finished / "checkpoint.pt", weights_only=True)
    torch.save(checkpoint | {"rows": Evil(tmp_path / "it ran")}, tmp_path / "code.pt")
    next(iter(checkpoint["averaged"].values())).view(-1)[0] = math.nan
    torch.save(checkpoint, tmp_path / "nan.pt")
    for name, words in (("truncated.pt", "truncated"), ("text.pt", "corrupt"), ("vae.pt", "a3_vae.py"),
                        ("list.pt", "not a checkpoint"), ("layers.pt", "this version"), ("empty.pt", "this version"),
                        ("code.pt", "not a checkpoint"),
                        ("nan.pt", "this version"), ("none.pt", "there is no")):
        assert resume(tmp_path / name, glyphs_dir) == 1
        err = one_line(capsys)
        assert words in err and name in err
        with pytest.raises(datasets.InputError):
            load_model(tmp_path / name)
    assert resume(finished / "mnist_generator.pt", glyphs_dir) == 1  # weights alone do not make a run
    assert "not a checkpoint" in one_line(capsys)
    assert not (tmp_path / "it ran").exists()
    assert main("--resume", "--out_dir", tmp_path / "nowhere") == 1
    assert "there is no" in one_line(capsys)


def test_resume_refuses_other_data(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets, "make_glyphs", lambda n: (np.ones((n, 784), np.uint8), np.ones(n, np.uint8)))
    assert resume(finished / "checkpoint.pt", tmp_path) == 1
    assert "other data" in capsys.readouterr().err


@pytest.mark.parametrize("ctrl_c, where", [(False, "loss"), (True, "loss"), (True, "gradient")])
def test_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(
        tmp_path, glyphs_dir, monkeypatch, capsys, ctrl_c, where):
    calls, loss = [], a3_gan.generator_loss

    def diverging(scores):
        calls.append(1)
        if ctrl_c and len(calls) == 5:
            signal.raise_signal(signal.SIGINT)  # in the middle of the epoch: its weights are bad already
        result = loss(scores)
        if len(calls) >= 5 and where == "gradient":
            result.register_hook(lambda gradient: gradient * math.nan)  # the weights are, the loss is not
        return result * (math.nan if len(calls) >= 5 and where == "loss" else 1)
    monkeypatch.setattr(a3_gan, "generator_loss", diverging)
    assert dry_run(tmp_path, glyphs_dir) == 1  # 3 batches per epoch: the fifth call is in epoch 2
    err = one_line(capsys)
    assert "not finite" in err and "another --out_dir" in err and len(calls) == (5 if ctrl_c else 6)
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert checkpoint["epoch"] == 1 and all(p.isfinite().all() for p in checkpoint["generator"].values())
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize("name", ["samples_start.png", "best.pt", "metrics.csv", "checkpoint.pt", "mnist_generator.pt",
                                  "losses.png", "results.json"])
def test_full_disk_is_one_line_and_the_run_can_go_on(measured_often, tmp_path, glyphs_dir, monkeypatch, capsys, name):
    """Whichever file cannot be written, the second time: if there is a checkpoint, it goes on from there."""
    measure_each_epoch(monkeypatch)
    replace, tried = datasets.os.replace, []

    def full(temporary, path):
        tried.append(path.name)
        if tried.count(name) == (2 if name in ("metrics.csv", "checkpoint.pt") else 1) and path.name == name:
            raise OSError(28, "No space left on device")
        replace(temporary, path)
    monkeypatch.setattr(datasets.os, "replace", full)
    assert dry_run(tmp_path, glyphs_dir, "--latent_dim", 7) == 1
    err = one_line(capsys)
    assert "No space left" in err and name in err and not list(tmp_path.glob("*.tmp"))
    monkeypatch.setattr(datasets.os, "replace", replace)
    if (tmp_path / "checkpoint.pt").exists():
        assert resume(tmp_path / "checkpoint.pt", glyphs_dir) == 0
        assert_same_run(tmp_path, measured_often)
        assert (tmp_path / "metrics.csv").read_text().count("\n") == 3
    else:
        assert name in ("samples_start.png", "best.pt")


def test_missing_data_and_unusable_folder_are_one_line_and_exit_with_1(tmp_path, glyphs_dir, offline, capsys):
    assert main("--dataset", "mnist", "--data_dir", tmp_path / "empty") == 1
    assert "--data_dir" in one_line(capsys)
    (tmp_path / "file").write_text("not a folder")
    assert dry_run(tmp_path / "file" / "run", glyphs_dir) == 1
    assert "cannot write" in one_line(capsys)


def test_torch_distributions_is_not_used():
    assert "torch.distributions" not in open(a3_gan.__file__).read()


@needs_mnist
def test_one_epoch_on_real_mnist(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "MNIST").symlink_to(mnist_dir() / "MNIST")  # the classifier is not to be written there
    status, stdout, stderr = run_script("a3_gan.py", "--epochs", 1, "--dataset", "mnist", "--data_dir", "data",
                                        "--out_dir", "run", cwd=tmp_path)
    assert status == 0, stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["dataset"] == "mnist" and results["classifier_test_accuracy"] > 0.985
    assert 0.3 < results["fid_floor"] < 2 and results["coverage_of_training_images"] > 0.9
    assert results["fid"] < 100 and results["coverage"] > 0.1 and min(results["class_shares"]) > 0.01
