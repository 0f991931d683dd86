"""The GAN's losses, training steps and measures against closed forms."""
# ruff: noqa: I001

import copy
import json
import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

import a3_gan
import datasets
from a3_gan import (
    Discriminator,
    Generator,
    classify,
    discriminator_loss,
    frechet_distance,
    generate,
    generator_loss,
    gradient_penalty,
    noise,
    score,
    slerp,
    to_images,
    train,
    train_classifier,
)


def coverage(real, fake, k=5):
    return a3_gan.coverage(real, fake, a3_gan.neighbour_radii(real, k))


@pytest.mark.parametrize("latent_dim", [2, 100])
def test_shapes_and_ranges(latent_dim):
    images = Generator(latent_dim)(torch.randn(5, latent_dim))
    assert images.shape == (5, 1, 28, 28) and images.abs().max() <= 1
    scores = Discriminator()(images)
    assert scores.shape == (5, 1) and scores.std() > 0


# ---------------------------------------------------------------------------------------------------------- losses
def test_losses_against_hand_computed_values():
    real, fake = torch.tensor([[0.0], [2.0]]), torch.tensor([[-1.0], [3.0]])
    assert discriminator_loss(real, fake).item() == pytest.approx(
        (math.log(2) + math.log(1 + math.exp(-2))) / 2 + (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(3))) / 2)
    assert generator_loss(fake).item() == pytest.approx(-fake.double().sigmoid().log().mean().item(), rel=1e-6)
    far = torch.full((1, 1), 1000.0)  # only logits give the right answer
    assert discriminator_loss(-far, far).item() == 2000 and generator_loss(-far).item() == 1000


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


def test_gradient_penalty_against_finite_differences():
    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 1))
    images = torch.rand(4, 1, 28, 28)
    assert gradient_penalty(linear, images).item() == pytest.approx(linear[1].weight.square().sum().item(), rel=1e-5)
    discriminator, images = Discriminator().double(), images[:2].double()
    with torch.no_grad():
        steps = 1e-7 * torch.eye(784).double().view(784, 1, 28, 28)  # few cross a kink of leaky ReLU
        gradients = [(discriminator(x + steps) - discriminator(x - steps)) / 2e-7 for x in images]
    expected = sum(gradient.square().sum().item() for gradient in gradients) / 2
    penalty = gradient_penalty(discriminator, images)
    assert penalty.item() == pytest.approx(expected, rel=1e-4)
    penalty.backward()  # it can be minimised
    assert discriminator.net[0].weight.grad.abs().max() > 0


# -------------------------------------------------------------------------------------------------------- training
class Recorder:
    """An optimizer that changes nothing, and notes its gradients and whether the other network's have changed."""
    def __init__(self, own, other):
        self.own, self.other, self.seen, self.others = own, other, [], []

    def zero_grad(self):
        self.own.zero_grad()
        self.before = [p.grad if p.grad is None else p.grad.clone() for p in self.other.parameters()]

    def step(self):
        self.seen.append([p.grad.clone() for p in self.own.parameters()])
        pairs = zip(self.before, [p.grad for p in self.other.parameters()], strict=True)
        self.others.append(all(a is b is None or torch.equal(a, b) for a, b in pairs))


def test_each_step_has_its_own_gradients_and_leaves_the_others_alone():
    generator, discriminator = Generator(3), Discriminator()
    images = torch.rand(6, 1, 28, 28) * 2 - 1
    optimizer_G, optimizer_D = Recorder(generator, discriminator), Recorder(discriminator, generator)
    rng = torch.get_rng_state()
    loss_D, loss_G = train([images], discriminator, generator, optimizer_G, optimizer_D)
    assert optimizer_G.others == optimizer_D.others == [True]

    torch.set_rng_state(rng)
    discriminator.requires_grad_(True)
    fake = generator.train()(torch.randn(6, 3))
    expected_D = discriminator_loss(discriminator(images), discriminator(fake.detach()))
    expected_G = generator_loss(discriminator(fake))
    penalized_D = expected_D + a3_gan.R1_GAMMA / 2 * a3_gan.R1_EVERY * gradient_penalty(discriminator, images)
    assert (loss_D, loss_G) == pytest.approx((expected_D.item(), expected_G.item()), rel=1e-5)
    for loss, model, optimizer in ((penalized_D, discriminator, optimizer_D), (expected_G, generator, optimizer_G)):
        gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        for expected, actual in zip(gradients, optimizer.seen[0], strict=True):
            assert torch.allclose(expected, actual, rtol=1e-3, atol=1e-6) and actual.abs().max() > 0


def frozen():
    """An optimizer that changes nothing."""
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.0)


def test_the_gradient_penalty_comes_with_every_sixteenth_batch(monkeypatch):
    calls = []
    zero = torch.zeros((), requires_grad=True)
    monkeypatch.setattr(a3_gan, "gradient_penalty", lambda *args: calls.append(1) or zero)
    for n, expected in ((1, 1), (16, 1), (17, 2), (33, 3)):
        calls.clear()
        train([torch.zeros(2, 1, 28, 28)] * n, Discriminator(), Generator(3), frozen(), frozen())
        assert len(calls) == expected


def test_the_generators_step_is_against_the_updated_discriminator():
    generator, discriminator = Generator(3), Discriminator()
    images = torch.rand(8, 1, 28, 28) * 2 - 1
    rng = torch.get_rng_state()
    optimizers = torch.optim.SGD(generator.parameters(), 0.0), torch.optim.SGD(discriminator.parameters(), 1.0)
    loss_G = train([images], discriminator, generator, *optimizers)[1]
    torch.set_rng_state(rng)
    assert loss_G == pytest.approx(generator_loss(discriminator(generator(torch.randn(8, 3)))).item(), rel=1e-5)


def test_averages_are_weighted_by_batch_size_and_labels_are_not_used(monkeypatch):
    monkeypatch.setattr(a3_gan, "discriminator_loss", lambda real, fake: real.mean() * 0 + len(real))
    monkeypatch.setattr(a3_gan, "generator_loss", lambda fake: fake.mean() * 0 + 10 * len(fake))
    data = [torch.zeros(4, 1, 28, 28), (torch.zeros(2, 1, 28, 28), torch.zeros(2))]  # the second as DataLoader has it
    averages = train(data, Discriminator(), Generator(3), frozen(), frozen())
    assert averages == pytest.approx([(4 * 4 + 2 * 2) / 6, 10 * (4 * 4 + 2 * 2) / 6])


def test_averaged_generator_follows_its_formula():
    """The weights, and the means and variances of batch norm."""
    generator, discriminator = Generator(3), Discriminator()
    averaged = copy.deepcopy(generator).requires_grad_(False).eval()
    optimizer_G = torch.optim.Adam(generator.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer_G, lambda n: 1)
    expected = {key: value.clone() for key, value in generator.state_dict().items()}
    for n in range(1, 6):
        train([torch.rand(4, 1, 28, 28)], discriminator, generator, optimizer_G, frozen(), (schedule,), averaged)
        decay = (1 + n) / (10 + n)
        expected = {key: decay * expected[key] + (1 - decay) * value for key, value in generator.state_dict().items()}
    for key, actual in averaged.state_dict().items():
        if actual.is_floating_point():
            assert torch.allclose(expected[key], actual, atol=1e-6), key
            assert not torch.allclose(generator.state_dict()[key], actual, atol=1e-4), key


def test_it_learns():
    """Samples of a generator that is trained on copies of one image come near it."""
    target = torch.full((1, 1, 28, 28), -1.0)
    target[:, :, 8:20, 12:16] = 1
    generator, discriminator = Generator(2), Discriminator()
    optimizer_G = torch.optim.Adam(generator.parameters(), 2e-3, betas=(0.0, 0.99))
    optimizer_D = torch.optim.Adam(discriminator.parameters(), 5e-4, betas=(0.0, 0.99))

    def distance():
        return (to_images(generate(generator.eval(), noise(50, 2, seed=0))) - target).abs().mean().item()
    before = distance()
    train([target.expand(32, -1, -1, -1)] * 60, discriminator, generator.train(), optimizer_G, optimizer_D)
    assert before > 0.9 and distance() < 0.4


def test_pixels_to_images_and_back():
    pixels = torch.arange(784).remainder(256).byte().view(1, 784)
    images = to_images(pixels)
    assert images.shape == (1, 1, 28, 28) and (images.min(), images.max()) == (-1, 1)

    class Fixed(torch.nn.Linear):
        def forward(self, z):
            return images.expand(len(z), -1, -1, -1)
    assert torch.equal(generate(Fixed(1, 1), torch.zeros(2500, 1)), pixels.expand(2500, -1))


# -------------------------------------------------------------------------------------------------------- measures
def test_frechet_distance_of_gaussians_that_do_not_commute():
    """The reference is tr (S1^1/2 S2 S1^1/2)^1/2, with the roots taken by eigenvectors."""
    a = torch.randn(400, 5).double() @ torch.randn(5, 5).double()
    b = torch.randn(300, 5).double() @ torch.randn(5, 5).double() + 1

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
    real, fake = torch.randn(2, 4000, 6)
    assert coverage(real, fake, k) == pytest.approx(1 - 2 ** -k, abs=0.02)


def test_coverage_by_hand_and_of_a_missing_mode():
    real = torch.tensor([[0.0], [1.0], [3.0], [10.0]])  # distances to the nearest other one: 1, 1, 2, 7
    assert coverage(real, torch.tensor([[0.5]]), k=1) == 2 / 4
    assert coverage(real, torch.tensor([[0.5], [4.0]]), k=1) == 4 / 4
    assert coverage(real, torch.tensor([[-5.0], [18.0]]), k=1) == 0
    modes = torch.randn(2000, 4)
    modes[:1000] += 100
    assert coverage(modes, torch.randn(2000, 4)) == pytest.approx(0.5 * (1 - 3 ** -5), abs=0.02)  # twice as dense there


def test_classifier_learns_the_digits_and_is_always_the_same(glyphs_dir):
    data = datasets.load("glyphs", glyphs_dir)
    images, labels = data.train.images[:5000], data.train.labels[:5000]
    torch.manual_seed(123)  # its own seed is what counts
    classifier, again = train_classifier(images, labels), train_classifier(images[:300], labels[:300], epochs=1)
    features, probabilities = classify(classifier, data.test.images[:2000])
    assert features.shape == (2000, 84) and probabilities.sum(1).sub(1).abs().max() < 1e-5
    assert (probabilities.argmax(1) == data.test.labels[:2000]).float().mean() > 0.9
    expected = classifier(to_images(data.test.images[:2000])).softmax(1)
    assert torch.allclose(probabilities, expected, atol=1e-5)
    assert torch.allclose(classifier[-1](features).softmax(1), expected, atol=1e-5)
    torch.manual_seed(124)
    same = train_classifier(images[:300], labels[:300], epochs=1)
    assert all(map(torch.equal, again.parameters(), same.parameters()))


def digit_images(n, first_pixels, brightness):
    """n images with these first pixels in turn, and random ones around the brightness after them."""
    pixels = (brightness + 20 * torch.randn(n, 784)).round().clamp(0, 255).byte()
    pixels[:, 0] = torch.tensor(first_pixels).repeat(n)[:n]
    return pixels


def test_score_measures_samples_against_the_test_images(monkeypatch):
    def classify_by_first_pixel(classifier, pixels):  # features are the next three pixels; every fourth is 95% sure
        probabilities = torch.full((len(pixels), 10), 0.05 / 9)
        probabilities[torch.arange(len(pixels)), pixels[:, 0].long()] = 0.89
        probabilities[::4] += 0.06 * (probabilities[::4] > 0.5)
        return pixels[:, 1:4].float(), probabilities
    monkeypatch.setattr(a3_gan, "classify", classify_by_first_pixel)
    samples, train_images = digit_images(2100, [3, 5, 5], 130), digit_images(500, [1], 100)
    test_images = digit_images(400, [0, 1], 110)
    scores = score(samples, None, train_images, test_images)
    assert scores["class_shares"] == pytest.approx([0, 0, 0, 1 / 3, 0, 2 / 3, 0, 0, 0, 0], abs=1e-4)
    assert scores["confident_share"] == pytest.approx(0.25)
    assert scores["fid"] == pytest.approx(3 * 20 ** 2, rel=0.15)  # three features that differ by 20
    real, sets = test_images[:, 1:4].float(), samples[:, 1:4].float().split(420)  # five sets, of about as many
    assert scores["coverage"] == pytest.approx(np.mean([coverage(real, fake) for fake in sets]))
    assert scores["coverage"] != pytest.approx(np.mean([coverage(fake, real) for fake in sets]))
    expected = cdist(samples[:2000].numpy() / 255, train_images.numpy() / 255).min(1)
    assert scores["nearest_train_distance"] == pytest.approx(np.sort(expected)[999], rel=1e-3)  # torch's median


def test_a_file_of_samples_is_scored_beside_training_images(glyphs_dir, tmp_path, monkeypatch, capsys):
    data = datasets.load("glyphs", glyphs_dir)
    monkeypatch.setattr(a3_gan, "train_classifier", lambda *train: torch.equal(train[1], data.train.labels))
    monkeypatch.setattr(a3_gan, "score", lambda pixels, classifier, train, test: {
        "fid": pixels.double().mean().item(), "sizes": [*map(len, (pixels, train, test)), classifier]})

    def score_file(**arrays):
        np.savez(tmp_path / "file.npz", **arrays)
        flags = ["--dataset", "glyphs", "--data_dir", str(glyphs_dir), "--score", str(tmp_path / "file.npz")]
        a3_gan.write_scores(a3_gan.parse_args(flags))
    images = np.full((100, 28, 28), 7, np.uint8)
    score_file(samples=images, means=images.repeat(2, 0))
    found = json.loads((tmp_path / "scores.json").read_text())
    assert found["samples"] == {"fid": 7, "sizes": [100, 48_000, 10_000, True]} and found["means"]["sizes"][0] == 200
    assert found["training images"]["fid"] == data.train.images[:200].double().mean().item()
    assert "samples: fid 7.0" in capsys.readouterr().out
    for bad in ({}, {"x": images / 255}, {"x": images[:, :27]}, {"x": images[:9]}, {"x": np.array([None])}):
        with pytest.raises(OSError, match="not an .npz file of at least 100 images"):
            score_file(**bad)


def test_slerp_keeps_the_norm_and_goes_by_equal_angles():
    start, end = noise(2, 100, seed=3)
    path = slerp(start, end)
    assert path.shape == (9, 100) and torch.allclose(path[[0, -1]], torch.stack([start, end]), atol=1e-5)
    start, end = start / start.norm(), end / end.norm()
    path = slerp(start, end, 5)
    assert path.norm(dim=1).tolist() == pytest.approx([1] * 5, rel=1e-5)
    steps = (path[1:] * path[:-1]).sum(1)  # cosines of the angles
    assert steps.tolist() == pytest.approx([math.cos(math.acos((start @ end).item()) / 4)] * 4, rel=1e-5)


def test_interpolation_joins_the_surest_samples_whose_path_changes_most_evenly(tmp_path, monkeypatch):
    z, grids = noise(1000, 2, seed=2), []
    probabilities = torch.full((1000, 10), 0.05)
    for digit in range(10):
        probabilities[100 * digit + 7, digit], probabilities[100 * digit + 8, digit] = 0.9 + digit / 1000, 0.8
    probabilities[307, 5] = 0.91  # taken already for 3, so that 5 has 507

    def generate_path(generator, z_path):  # white pixels appear one by one, or, but from 3 to 4, the last two at once
        if len(z_path) == 1000:
            return torch.zeros(1000, 784, dtype=torch.uint8)
        start, end = ((z - x).norm(dim=1).argmin().item() for x in (z_path[0], z_path[-1]))
        assert start % 100 == end % 100 == 7
        level = torch.arange(9)
        level[-1] += (start, end) != (307, 407)
        return (torch.arange(784) < 10 * level.unsqueeze(1)).byte() * 255
    monkeypatch.setattr(a3_gan, "classify", lambda classifier, pixels: (None, probabilities))
    monkeypatch.setattr(a3_gan, "generate", generate_path)
    monkeypatch.setattr(a3_gan, "save_grid", lambda images, filename, nrow: grids.append(images))
    ends = a3_gan.save_interpolation(Generator(2), None, tmp_path / "interpolation.png")
    assert ends == {"path": "spherical", "digits": [3, 4], "probabilities": pytest.approx([0.903, 0.904])}
    assert grids[0].sum(1).tolist() == pytest.approx([10 * i for i in range(9)])
