"""The GAN's losses, training steps and measures against closed forms."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
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
    assert images.shape == (5, 1, 28, 28)
    assert images.abs().max() <= 1
    scores = Discriminator()(images)
    assert scores.shape == (5, 1)
    assert scores.std() > 0


# ---------------------------------------------------------------------------------------- losses
def test_losses_against_hand_computed_values():
    real, fake = torch.tensor([[0.0], [2.0]]), torch.tensor([[-1.0], [3.0]])
    of_real = (math.log(2) + math.log(1 + math.exp(-2))) / 2
    of_fake = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(3))) / 2
    assert discriminator_loss(real, fake).item() == pytest.approx(of_real + of_fake)
    of_generator = (math.log(1 + math.exp(1)) + math.log(1 + math.exp(-3))) / 2
    assert generator_loss(fake).item() == pytest.approx(of_generator)


def test_losses_of_extreme_scores():
    """In float32 sigmoid(1000) is 1, and log(1 - 1) is minus infinity."""
    far = torch.full((1, 1), 1000.0)
    assert discriminator_loss(-far, far).item() == 2000
    assert generator_loss(-far).item() == 1000


def test_the_best_discriminator_is_the_ratio_of_the_densities():
    """On two points: D* = p_data / (p_data + p_g), where V = -log 4 + 2 JSD."""
    p_data = torch.tensor([0.8, 0.2]).double()
    p_g = torch.tensor([0.4, 0.6]).double()
    real = torch.tensor([0] * 8 + [1] * 2)  # which of the two points
    fake = torch.tensor([0] * 4 + [1] * 6)
    scores = (p_data / p_g).log().requires_grad_()  # D* = sigmoid(log p_data / p_g)
    loss = discriminator_loss(scores[real], scores[fake])
    gradient, = torch.autograd.grad(loss, scores)
    assert gradient.abs().max() < 1e-7
    for change in ([0.1, 0.0], [-0.1, 0.0], [0.0, 0.1], [0.0, -0.1]):
        other = scores + torch.tensor(change)
        assert discriminator_loss(other[real], other[fake]) > loss
    mean = (p_data + p_g) / 2
    kl_data = (p_data * (p_data / mean).log()).sum().item()
    kl_g = (p_g * (p_g / mean).log()).sum().item()
    jsd = 0.5 * kl_data + 0.5 * kl_g
    assert -loss.item() == pytest.approx(-math.log(4) + 2 * jsd, abs=1e-6)


def test_gradient_penalty_of_a_linear_discriminator():
    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 1))
    expected = linear[1].weight.square().sum().item()
    images = torch.rand(4, 1, 28, 28)
    assert gradient_penalty(linear, images).item() == pytest.approx(expected, rel=1e-5)


def test_gradient_penalty_against_finite_differences():
    discriminator = Discriminator().double()
    images = torch.rand(2, 1, 28, 28).double()
    steps = 1e-7 * torch.eye(784).double().view(784, 1, 28, 28)  # few cross a kink of leaky ReLU
    expected = 0
    with torch.no_grad():
        for x in images:
            gradient = (discriminator(x + steps) - discriminator(x - steps)) / 2e-7
            expected += gradient.square().sum().item() / 2  # the mean of two images
    penalty = gradient_penalty(discriminator, images)
    assert penalty.item() == pytest.approx(expected, rel=1e-4)
    penalty.backward()  # it can be minimised
    assert discriminator.net[0].weight.grad.abs().max() > 0


# -------------------------------------------------------------------------------------- training
class Recorder(torch.optim.SGD):
    """An optimizer that changes nothing and keeps the gradients of its last step."""

    def __init__(self, model):
        super().__init__(model.parameters(), lr=0.0)
        self.model = model

    def step(self):
        self.gradients = [p.grad.clone() for p in self.model.parameters()]


def frozen():
    """An optimizer that changes nothing."""
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.0)


def random_images(n):
    return torch.rand(n, 1, 28, 28) * 2 - 1


def test_each_step_has_the_gradients_of_its_own_loss():
    generator, discriminator = Generator(3), Discriminator()
    images = random_images(6)
    optimizer_G, optimizer_D = Recorder(generator), Recorder(discriminator)
    rng = torch.get_rng_state()
    loss_D, loss_G = train([images], discriminator, generator, optimizer_G, optimizer_D)

    torch.set_rng_state(rng)
    discriminator.requires_grad_(True)
    fake = generator(torch.randn(6, 3))
    expected_D = discriminator_loss(discriminator(images), discriminator(fake.detach()))
    expected_G = generator_loss(discriminator(fake))
    assert loss_D == pytest.approx(expected_D.item(), rel=1e-5)
    assert loss_G == pytest.approx(expected_G.item(), rel=1e-5)

    penalty = gradient_penalty(discriminator, images)
    penalized_D = expected_D + a3_gan.R1_GAMMA / 2 * a3_gan.R1_EVERY * penalty
    expected = torch.autograd.grad(penalized_D, list(discriminator.parameters()), retain_graph=True)
    expected += torch.autograd.grad(expected_G, list(generator.parameters()))
    actual = optimizer_D.gradients + optimizer_G.gradients
    for a, b in zip(expected, actual, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-6)
        assert a.abs().max() > 0


def test_the_gradient_penalty_comes_with_every_sixteenth_batch(monkeypatch):
    calls = []

    def penalty(*args):
        calls.append(args)
        return torch.zeros((), requires_grad=True)
    monkeypatch.setattr(a3_gan, "gradient_penalty", penalty)
    for n_batches, n_penalties in ((1, 1), (16, 1), (17, 2), (33, 3)):
        calls.clear()
        batches = [torch.zeros(2, 1, 28, 28)] * n_batches
        train(batches, Discriminator(), Generator(3), frozen(), frozen())
        assert len(calls) == n_penalties


def test_the_generators_step_is_against_the_updated_discriminator():
    generator, discriminator = Generator(3), Discriminator()
    optimizer_D = torch.optim.SGD(discriminator.parameters(), lr=1.0)
    rng = torch.get_rng_state()
    images = random_images(8)
    _, loss_G = train([images], discriminator, generator, frozen(), optimizer_D)
    torch.set_rng_state(rng)
    random_images(8)
    fake = generator(torch.randn(8, 3))
    assert loss_G == pytest.approx(generator_loss(discriminator(fake)).item(), rel=1e-5)


def test_averages_are_weighted_by_batch_size_and_labels_are_not_used(monkeypatch):
    def batch_size_as_loss_D(real_logits, fake_logits):
        return real_logits.mean() * 0 + len(real_logits)

    def ten_times_batch_size_as_loss_G(fake_logits):
        return fake_logits.mean() * 0 + 10 * len(fake_logits)
    monkeypatch.setattr(a3_gan, "discriminator_loss", batch_size_as_loss_D)
    monkeypatch.setattr(a3_gan, "generator_loss", ten_times_batch_size_as_loss_G)
    as_a_dataloader_has_it = (torch.zeros(2, 1, 28, 28), torch.zeros(2))
    data = [torch.zeros(4, 1, 28, 28), as_a_dataloader_has_it]
    averages = train(data, Discriminator(), Generator(3), frozen(), frozen())
    mean = (4 * 4 + 2 * 2) / 6
    assert averages == pytest.approx([mean, 10 * mean])


def test_averaged_generator_follows_its_formula():
    """The weights, and the means and variances of batch norm."""
    generator, discriminator = Generator(3), Discriminator()
    averaged = copy.deepcopy(generator).requires_grad_(False).eval()
    optimizer_G = torch.optim.Adam(generator.parameters(), 1e-2)
    expected = copy.deepcopy(generator.state_dict())
    for n in range(1, 6):
        train([random_images(4)], discriminator, generator, optimizer_G, frozen(),
              averaged=averaged, n_updates=n - 1)
        decay = (1 + n) / (10 + n)
        for key, value in generator.state_dict().items():
            expected[key] = decay * expected[key] + (1 - decay) * value
    for key, actual in averaged.state_dict().items():
        if actual.is_floating_point():
            assert torch.allclose(expected[key], actual, atol=1e-6), key
            assert not torch.allclose(generator.state_dict()[key], actual, atol=1e-4), key


@pytest.mark.parametrize("images", [random_images(4) + 1, torch.full((4, 1, 28, 28), 255).byte()])
def test_images_of_another_range_are_refused(images):
    batches = [random_images(4), images]
    with pytest.raises(ValueError, match=r"must be in \[-1, 1\].*to (1\.9|255)"):
        train(batches, Discriminator(), Generator(3), frozen(), frozen())


def test_samples_come_from_standard_normal_noise():
    generator = Generator(3).eval()
    torch.manual_seed(5)
    samples = generator.sample(20)
    assert samples.dtype == torch.uint8
    assert torch.equal(samples, generate(generator, noise(20, 3, seed=5)))


def test_it_learns():
    """Samples of a generator that is trained on copies of one image come near it."""
    target = torch.full((1, 1, 28, 28), -1.0)
    target[:, :, 8:20, 12:16] = 1
    generator, discriminator = Generator(2), Discriminator()
    optimizer_G = torch.optim.Adam(generator.parameters(), 2e-3, betas=(0.0, 0.99))
    optimizer_D = torch.optim.Adam(discriminator.parameters(), 5e-4, betas=(0.0, 0.99))

    def distance():
        samples = to_images(generate(generator.eval(), noise(50, 2, seed=0)))
        return (samples - target).abs().mean().item()
    assert distance() > 0.9
    batches = [target.expand(32, -1, -1, -1)] * 60
    train(batches, discriminator, generator.train(), optimizer_G, optimizer_D)
    assert distance() < 0.4


def test_pixels_to_images_and_back():
    pixels = torch.arange(784).remainder(256).byte().view(1, 784)
    images = to_images(pixels)
    assert images.shape == (1, 1, 28, 28)
    assert images.min() == -1
    assert images.max() == 1

    class AlwaysTheSame(torch.nn.Linear):
        def forward(self, z):
            return images.expand(len(z), -1, -1, -1)
    generated = generate(AlwaysTheSame(1, 1), torch.zeros(2500, 1))
    assert torch.equal(generated, pixels.expand(2500, -1))


# -------------------------------------------------------------------------------------- measures
def root(matrix):
    """The square root of a symmetric matrix, by its eigenvectors."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ values.clamp(min=0).sqrt().diag() @ vectors.T


def test_frechet_distance_of_gaussians_that_do_not_commute():
    """The reference is tr (S_a^1/2 S_b S_a^1/2)^1/2."""
    a = torch.randn(400, 5).double() @ torch.randn(5, 5).double()
    b = torch.randn(300, 5).double() @ torch.randn(5, 5).double() + 1
    S_a, S_b = torch.cov(a.T), torch.cov(b.T)
    assert (S_a @ S_b - S_b @ S_a).abs().max() > 1
    cross = root(root(S_a) @ S_b @ root(S_a))
    means = (a.mean(0) - b.mean(0)).square().sum()
    expected = (means + torch.trace(S_a + S_b - 2 * cross)).item()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8)
    dead_a = torch.cat([a, torch.zeros(400, 3)], dim=1)  # features that are always 0
    dead_b = torch.cat([b, torch.zeros(300, 3)], dim=1)
    assert frechet_distance(dead_a, dead_b) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("k", [1, 5])
def test_coverage_of_equal_distributions(k):
    real, fake = torch.randn(2, 4000, 6)
    assert coverage(real, fake, k) == pytest.approx(1 - 2 ** -k, abs=0.02)


def test_coverage_by_hand():
    real = torch.tensor([[0.0], [1.0], [3.0], [10.0]])
    assert a3_gan.neighbour_radii(real, 1).tolist() == [1, 1, 2, 7]
    assert coverage(real, torch.tensor([[0.5]]), k=1) == 2 / 4
    assert coverage(real, torch.tensor([[0.5], [4.0]]), k=1) == 4 / 4
    assert coverage(real, torch.tensor([[-5.0], [18.0]]), k=1) == 0


def test_coverage_of_a_missing_mode():
    modes = torch.randn(2000, 4)
    modes[:1000] += 100
    one_mode = torch.randn(2000, 4)  # where it is twice as dense
    assert coverage(modes, one_mode) == pytest.approx(0.5 * (1 - 3 ** -5), abs=0.02)


def test_classifier_learns_the_digits(glyphs_dir):
    data = datasets.load("glyphs", glyphs_dir)
    classifier = train_classifier(data.train.images[:5000], data.train.labels[:5000])
    pixels, labels = data.test.images[:2000], data.test.labels[:2000]
    features, probabilities = classify(classifier, pixels)
    assert features.shape == (2000, 84)
    assert (probabilities.argmax(1) == labels).float().mean() > 0.9
    expected = classifier(to_images(pixels)).softmax(1)
    assert torch.allclose(probabilities, expected, atol=1e-5)
    assert torch.allclose(classifier[-1](features).softmax(1), expected, atol=1e-5)


def test_classifier_is_always_the_same(glyphs_dir):
    data = datasets.load("glyphs", glyphs_dir)
    images, labels = data.train.images[:300], data.train.labels[:300]
    torch.manual_seed(123)  # its own seed is what counts
    one = train_classifier(images, labels, epochs=1)
    torch.manual_seed(124)
    other = train_classifier(images, labels, epochs=1)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def digit_images(n, first_pixels, brightness):
    """n images with these first pixels in turn, and random ones around the brightness after them.
    """
    pixels = (brightness + 20 * torch.randn(n, 784)).round().clamp(0, 255).byte()
    pixels[:, 0] = torch.tensor(first_pixels).repeat(n)[:n]
    return pixels


def classify_by_first_pixel(classifier, pixels):
    """A stand-in for `classify`, which is 95% sure of every fourth image, and 89% of the others.

    The features are the next three pixels.
    """
    n = len(pixels)
    probabilities = torch.full((n, 10), 0.11 / 9)
    probabilities[torch.arange(n), pixels[:, 0].long()] = 0.89
    probabilities[0::4] = 0.05 / 9
    probabilities[torch.arange(0, n, 4), pixels[0::4, 0].long()] = 0.95
    return pixels[:, 1:4].float(), probabilities


def test_images_that_a_cut_batch_leaves_out_are_not_counted(glyphs_dir, tmp_path, monkeypatch):
    """70 images are 4 batches of 16, and 6 that are left out."""
    data = a3_gan.load("glyphs", glyphs_dir)
    small = data._replace(**{name: datasets.Split(*(part[:70] for part in getattr(data, name)))
                             for name in ("train", "val", "test")})
    monkeypatch.setattr(a3_gan, "load", lambda *_: small)
    a3_gan.main(a3_gan.parse_args([
        "--epochs", "1", "--batch_size", "16", "--device", "cpu", "--out_dir", str(tmp_path)]))
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["images_per_s"] * found["train_seconds"] == pytest.approx(64)


def test_score_measures_samples_against_the_test_images(monkeypatch):
    monkeypatch.setattr(a3_gan, "classify", classify_by_first_pixel)
    samples = digit_images(2100, [3, 5, 5], 130)
    train_images = digit_images(500, [1], 100)
    test_images = digit_images(400, [0, 1], 110)
    scores = score(samples, None, train_images, test_images)
    shares = [0, 0, 0, 1 / 3, 0, 2 / 3, 0, 0, 0, 0]
    assert scores["class_shares"] == pytest.approx(shares, abs=1e-4)
    assert scores["confident_share"] == pytest.approx(0.25)
    assert scores["fid"] == pytest.approx(3 * 20 ** 2, rel=0.15)  # three features differ by 20

    assert 0 < scores["fid_set_std"] < 0.2 * scores["fid"]
    one_set = score(samples[:420], None, train_images, test_images)
    assert one_set["fid_set_std"] is None

    real = test_images[:, 1:4].float()
    sets = samples[:2000, 1:4].float().split(400)  # five sets, as large as the real one
    expected = np.mean([coverage(real, fake) for fake in sets])
    the_wrong_way = np.mean([coverage(fake, real) for fake in sets])
    assert scores["coverage"] == pytest.approx(expected)
    assert scores["coverage"] != pytest.approx(the_wrong_way)

    distances = cdist(samples[:2000].numpy() / 255, train_images.numpy() / 255)
    nearest = np.sort(distances.min(1))
    assert scores["nearest_train_distance"] == pytest.approx(nearest[999], rel=1e-3)


def score_file(path, glyphs_dir, **arrays):
    np.savez(path, **arrays)
    a3_gan.write_scores(a3_gan.parse_args([
        "--dataset", "glyphs", "--data_dir", str(glyphs_dir), "--score", str(path)]))


def test_a_file_of_samples_is_scored_beside_validation_images(
        glyphs_dir, tmp_path, monkeypatch, capsys):
    def sizes_as_score(pixels, classifier, train_images, test_images):
        sizes = [len(pixels), len(train_images), len(test_images)]
        return {"fid": pixels.double().mean().item(), "sizes": sizes}
    monkeypatch.setattr(a3_gan, "train_classifier", lambda images, labels: None)
    monkeypatch.setattr(a3_gan, "score", sizes_as_score)
    images = np.full((100, 28, 28), 7, np.uint8)
    score_file(tmp_path / "file.npz", glyphs_dir, samples=images, means=images.repeat(2, axis=0))
    found = json.loads((tmp_path / "scores.json").read_text())
    assert found["samples"] == {"fid": 7, "sizes": [100, 50_000, 10_000]}
    assert found["means"]["sizes"][0] == 200
    val_images = datasets.load("glyphs", glyphs_dir).val.images
    assert found["validation images"]["fid"] == val_images.double().mean().item()
    assert found["validation images"]["sizes"] == [10_000, 50_000, 10_000]
    assert "samples: fid 7.0" in capsys.readouterr().out


IMAGES = np.arange(100 * 784).reshape(100, 28, 28).astype(np.uint8)


@pytest.mark.parametrize("images", [
    IMAGES,
    IMAGES.reshape(100, 784),
    IMAGES.reshape(100, 1, 28, 28),
    np.asfortranarray(IMAGES),
], ids=["[N, 28, 28]", "[N, 784]", "[N, 1, 28, 28]", "Fortran order"])
def test_these_arrays_are_images(tmp_path, images):
    np.savez(tmp_path / "file.npz", x=images)
    found = a3_gan.read_images(tmp_path / "file.npz")
    assert np.array_equal(found["x"], IMAGES.reshape(100, 784))


@pytest.mark.parametrize("arrays, what", [
    ({}, "but nothing"),
    ({"x": IMAGES / 255}, r"x: float64 \[100, 28, 28\]"),
    ({"x": np.stack([IMAGES] * 3, axis=-1)}, r"x: uint8 \[100, 28, 28, 3\]"),
    ({"x": IMAGES[:, :14]}, r"x: uint8 \[100, 14, 28\]"),
    ({"x": IMAGES[:9]}, r"x: uint8 \[9, 28, 28\]"),
    ({"x": IMAGES.astype(int), "y": np.zeros(100)}, r"x: int64 .*, y: float64 \[100\]"),
], ids=["nothing", "floats", "colour", "another size", "too few", "several arrays"])
def test_a_file_without_images_is_an_error_that_says_what_is_in_it(tmp_path, arrays, what):
    path = tmp_path / "file.npz"
    np.savez(path, **arrays)
    with pytest.raises(OSError, match=f"file.npz has no array of at least 100 images.*{what}"):
        a3_gan.read_images(path)


def test_a_file_that_is_missing_or_no_npz_file_is_named(tmp_path):
    with pytest.raises(OSError, match="other.npz does not exist"):
        a3_gan.read_images(tmp_path / "other.npz")
    for array in (IMAGES, np.array([None])):
        np.save(tmp_path / "file.npy", array)
        with pytest.raises(OSError, match="file.npy is not an .npz file"):
            a3_gan.read_images(tmp_path / "file.npy")


def test_what_looks_wrong_in_a_file_of_images_is_said(tmp_path, capsys):
    np.savez(tmp_path / "file.npz", x=IMAGES % 2, labels=np.zeros(100, np.uint8))
    assert a3_gan.read_images(tmp_path / "file.npz").keys() == {"x"}
    err = capsys.readouterr().err
    assert "not images, and not scored: labels: uint8 [100]" in err
    assert "no pixel of x is above 1" in err


# --------------------------------------------------------------------------------- interpolation
def test_slerp_keeps_the_norm_and_goes_by_equal_angles():
    start, end = noise(2, 100, seed=3)
    path = slerp(start, end)
    assert path.shape == (9, 100)
    assert torch.allclose(path[0], start, atol=1e-5)
    assert torch.allclose(path[-1], end, atol=1e-5)
    start, end = start / start.norm(), end / end.norm()
    path = slerp(start, end, 5)
    assert path.norm(dim=1).tolist() == pytest.approx([1] * 5, rel=1e-5)
    cosines = (path[1:] * path[:-1]).sum(1)
    quarter = math.acos((start @ end).item()) / 4
    assert cosines.tolist() == pytest.approx([math.cos(quarter)] * 4, rel=1e-5)
    path = slerp(start, start)
    assert torch.allclose(path, start.expand(9, -1), atol=1e-5)


def test_interpolation_joins_the_surest_samples_of_two_digits(tmp_path, monkeypatch):
    z = noise(1000, 2, seed=2)
    probabilities = torch.full((1000, 10), 0.05)
    probabilities[300, 3] = 0.99
    probabilities[301, 3] = 0.98  # the same digit
    probabilities[700, 8] = 0.97
    probabilities[100, 1] = 0.96
    points = []

    def generate_blank(generator, z):
        points.append(z)
        return torch.zeros(len(z), 784, dtype=torch.uint8)
    monkeypatch.setattr(a3_gan, "classify", lambda classifier, pixels: (None, probabilities))
    monkeypatch.setattr(a3_gan, "generate", generate_blank)
    ends = a3_gan.save_interpolation(Generator(2), None, tmp_path / "interpolation.png")
    assert ends["digits"] == [3, 8]
    assert ends["probabilities"] == pytest.approx([0.99, 0.97])
    assert torch.allclose(points[-1], slerp(z[300], z[700]))
    assert Image.open(tmp_path / "interpolation.png").size == (9 * 86 + 2, 88)
