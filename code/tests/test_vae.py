"""The VAE's mathematics against numerical references, and the loop that it shares with the flow."""

import copy
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import integrate, stats

import a3_nf
import a3_vae
from a3_vae import (
    VAE,
    Decoder,
    Encoder,
    epoch_iter,
    evaluate,
    kl_divergence,
    log_p_x_given_z,
    log_q_over_p,
)
from conftest import randomized


def binary_images(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(n, 784, generator=generator) < 0.2).float()


# -------------------------------------------------------------------------------- the densities
@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (0.7, 0.3), (-3.0, 2.5), (0.1, 1e-3)])
def test_kl_against_numerical_integration(mean, std):
    def integrand(z):
        log_ratio = stats.norm.logpdf(z, mean, std) - stats.norm.logpdf(z)
        return stats.norm.pdf(z, mean, std) * log_ratio
    low, high = mean - 12 * std, mean + 12 * std
    expected, _ = integrate.quad(integrand, low, high, epsabs=1e-10)
    means = torch.tensor([[mean, 0.0]]).double()  # the second dimension adds nothing
    stds = torch.tensor([[std, 1.0]]).double()
    assert kl_divergence(means, stds).item() == pytest.approx(expected, abs=1e-6)


def test_log_q_over_p_against_scipy():
    mean, std = torch.randn(3, 5), torch.rand(3, 5) + 0.2
    z = mean + std * torch.randn(9, 3, 5)
    expected = stats.norm.logpdf(z, mean, std) - stats.norm.logpdf(z)
    assert log_q_over_p(z, mean, std).numpy() == pytest.approx(expected.sum(-1), abs=1e-4)


def test_the_mean_of_log_q_over_p_is_the_kl():
    mean, std = torch.randn(3, 5), torch.rand(3, 5) + 0.2
    n = 100_000
    log_ratio = log_q_over_p(mean + std * torch.randn(n, 3, 5), mean, std)
    error = log_ratio.mean(0) - kl_divergence(mean, std)
    assert (error.abs() < 5 * log_ratio.std(0) / n ** 0.5).all()


def test_log_p_x_given_z_against_scipy():
    x, logits = binary_images(4), 3 * torch.randn(4, 784)
    means = logits.double().sigmoid()
    expected = stats.bernoulli.logpmf(x.numpy(), means.numpy()).sum(1)
    assert log_p_x_given_z(x, logits).numpy() == pytest.approx(expected, rel=1e-5)


def test_log_p_x_given_z_of_extreme_logits():
    """In float32 sigmoid(200) is 1, and log(1 - 1) is minus infinity."""
    x, logits = torch.zeros(1, 784), torch.full((1, 784), 200.0)
    assert log_p_x_given_z(x, logits).item() == pytest.approx(-784 * 200)


# ------------------------------------------------------------------------------------- the model
@pytest.mark.parametrize("z_dim", [2, 20])
def test_shapes_and_ranges(z_dim):
    x = binary_images(3)
    mean, std = randomized(Encoder(z_dim=z_dim), 0.1)(x)
    assert mean.shape == std.shape == (3, z_dim)
    assert (std > 0).all()
    means = randomized(Decoder(z_dim=z_dim), 0.1)(mean)
    assert means.shape == (3, 784)
    assert (means > 0).all()
    assert (means < 1).all()
    model = VAE(hidden_dim=30, z_dim=z_dim)
    assert model(x).shape == ()
    sampled_ims, im_means = model.sample(5)
    assert sampled_ims.shape == im_means.shape == (5, 784)
    assert set(sampled_ims.unique().tolist()) == {0.0, 1.0}


def test_samples_are_bernoulli_draws_with_the_means_of_latents_from_the_prior():
    model = randomized(VAE(z_dim=2), 0.15)
    z = []
    model.decoder.register_forward_hook(lambda module, args, output: z.append(args[0]))
    sampled_ims, im_means = model.sample(3000)
    for dimension in torch.cat(z).T:
        assert stats.kstest(dimension.numpy(), "norm").pvalue > 0.01
    assert im_means.std() > 0.1
    variance = im_means * (1 - im_means)
    z_scores = (sampled_ims - im_means).sum(0) / variance.sum(0).sqrt()  # per pixel, N(0, 1)
    assert abs(z_scores.mean()) < 0.2
    assert 0.9 < z_scores.std() < 1.1


def test_elbo_with_means_of_one_half_is_784_log_2_plus_kl():
    model, x = randomized(VAE(), 0.1), binary_images(50)
    for layer in model.decoder.modules():
        if isinstance(layer, torch.nn.Conv2d):
            last = layer
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.zeros_(last.bias)
    kl = kl_divergence(*model.encoder(x)).mean().item()
    assert kl > 0.1
    assert evaluate(model, x, 1)["test_elbo"] == pytest.approx(-784 * math.log(2) - kl, rel=1e-6)


def test_an_untrained_model_costs_about_784_log_2():
    assert VAE()(binary_images(50)).item() == pytest.approx(784 * math.log(2), rel=0.05)


@pytest.mark.parametrize("z_dim", [1, 20])
def test_loss_and_gradient_are_unbiased_estimates(z_dim):
    """Averaged over noise they are those of KL - E log p(x|z), by quadrature over one dimension."""
    model, x = randomized(VAE(z_dim=1), 0.08), binary_images(1)
    model.z_dim = z_dim  # with more than two dimensions the loss has another estimate of the KL
    bias = model.encoder.net[-1].bias  # it shifts mean and log std

    def with_gradient(loss):
        gradient, = torch.autograd.grad(loss, bias)
        return torch.cat([loss.detach().view(1), gradient])

    n = 2001
    eps = torch.linspace(-7, 7, n).unsqueeze(1)
    weights = torch.exp(-0.5 * eps[:, 0] ** 2) / math.sqrt(2 * math.pi) * 14 / (n - 1)
    mean, std = model.encoder(x)
    reconstruction = log_p_x_given_z(x.expand(n, -1), model.decoder.logits(mean + std * eps))
    loss = kl_divergence(mean, std) - (reconstruction * weights).sum()
    expected = with_gradient(loss.squeeze())
    assert reconstruction.std() > 0.1  # the test is not about a constant
    assert expected[1:].abs().min() > 0.05

    estimates = torch.stack([with_gradient(model(x.expand(400, -1))) for _ in range(30)])
    error = (estimates.mean(0) - expected).abs()
    assert (error < 5 * estimates.std(0) / 30 ** 0.5).all()


def test_gradients_reach_every_layer():
    model = randomized(VAE(), 0.08)
    model(binary_images(5)).backward()
    for parameter in model.parameters():
        assert parameter.grad.abs().max() > 0


# ------------------------------------------------------------------------------------ evaluation
@torch.no_grad()
def test_importance_weighted_bound_tightens_to_the_exact_log_likelihood():
    """With one latent dimension log p(x) can be integrated: ELBO = k=1 < k=5 < k=1000 = exact."""
    model, x = randomized(VAE(hidden_dim=20, z_dim=1), 0.14, seed=1), binary_images(1)
    n = 2001
    z = torch.linspace(-8, 8, n).unsqueeze(1)
    log_prior = torch.from_numpy(stats.norm.logpdf(z[:, 0].numpy()))
    log_joint = log_p_x_given_z(x.expand(n, -1), model.decoder.logits(z)) + log_prior
    exact = (log_joint.logsumexp(0) + math.log(16 / (n - 1))).item()

    one = evaluate(model, x.expand(400, -1), 1)["test_log_px"]  # an average over 400 draws
    five = evaluate(model, x.expand(400, -1), 5)["test_log_px"]
    many = evaluate(model, x.expand(4, -1), 1000)
    elbo = many["test_elbo"]
    gap = exact - elbo
    assert gap > 0.5  # there is something to close
    assert one == pytest.approx(elbo, abs=0.3 * gap)
    assert elbo < five < many["test_log_px"]
    assert many["test_log_px"] == pytest.approx(exact, abs=0.05 * gap)


@torch.no_grad()
def test_evaluate_averages_over_all_images():
    """47 images, in batches of which the last is smaller, against the averages without noise."""
    model, x = randomized(VAE(z_dim=2), 0.1), binary_images(47)
    last = model.encoder.net[-1]
    last.weight[2:] = 0  # a tiny std, so that the noise hardly matters
    last.bias[2:] = -8
    mean, std = model.encoder(x)
    reconstruction = log_p_x_given_z(x, model.decoder.logits(mean)).mean().item()
    kl = kl_divergence(mean, std).mean().item()
    scores = evaluate(model, x.byte(), 3)
    assert scores["test_log_p_x_given_z"] == pytest.approx(reconstruction, rel=1e-4)
    assert scores["test_kl"] == pytest.approx(kl, rel=1e-5)
    assert scores["test_elbo"] == pytest.approx(reconstruction - kl, rel=1e-4)
    # log w varies by sqrt(z_dim / 2) only
    assert scores["test_log_px"] == pytest.approx(scores["test_elbo"], abs=3)


# ------------------------------------------------------------- training, also that of the flow
class MeanPixel(torch.nn.Module):
    """A stand-in for a model: its bits per dimension, or minus its ELBO, are weight * mean pixel.
    """

    def __init__(self, module):
        super().__init__()
        self.is_flow = module is a3_nf
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x):
        if self.is_flow:  # log p of each image, in nats
            return -self.weight * x.mean(1) * math.log(2) * 784
        return self.weight * x.mean()


def images_of(*values):
    """One batch of two images for each value of their pixels."""
    return [torch.full((2, 784), float(value)) for value in values]


both = pytest.mark.parametrize("module, sign", [(a3_vae, -1), (a3_nf, 1)], ids=["vae", "nf"])


@both
def test_epoch_average_is_weighted_by_batch_size(module, sign):
    model = MeanPixel(module).eval()
    data = [torch.full((4, 784), 1.0), torch.full((1, 1, 28, 28), 0.0)]
    assert module.epoch_iter(model, data, None) == pytest.approx(sign * (4 * 1 + 1 * 0) / 5)
    assert model.weight.grad is None


@both
def test_labels_of_a_dataloader_are_not_used(module, sign):
    data = [(torch.full((4, 784), 1.0), torch.zeros(4))]
    average = module.epoch_iter(MeanPixel(module).eval(), data, None)
    assert average == pytest.approx(sign)


@both
def test_run_epoch_trains_on_the_first_and_measures_on_the_second(module, sign):
    model = MeanPixel(module)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    train, val = module.run_epoch(model, (images_of(1), images_of(1)), optimizer)
    assert train == pytest.approx(sign)
    assert val == pytest.approx(sign * 0.75)
    assert model.weight.item() == pytest.approx(0.75)
    assert not model.training


def test_averaged_weights_follow_their_formula_and_are_those_that_are_validated():
    """Plain gradient descent on a constant gradient: after n updates the weight is 1 - 0.01 n."""
    model = MeanPixel(a3_vae)
    averaged = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1)
    data = images_of(*[1] * 30), images_of(1)
    _, validated = a3_vae.run_epoch(model, data, optimizer, schedule, averaged)

    expected = 1
    for n in range(1, 31):
        decay = (1 + n) / (10 + n)
        expected = decay * expected + (1 - decay) * (1 - 0.01 * n)
    assert averaged.weight.item() == pytest.approx(expected)
    assert model.weight.item() == pytest.approx(0.7)
    assert validated == pytest.approx(-expected)


def test_shift_some_moves_a_share_of_the_images_by_up_to_a_pixel():
    x = torch.zeros(900, 28, 28, dtype=torch.uint8)
    x[:, 10, 12] = 1
    moved = a3_vae.shift_some(x.flatten(1), 0.5).view(-1, 28, 28)
    assert x[:, 10, 12].all()  # the images themselves are not changed
    assert moved.sum() == 900
    assert moved[:, 9:12, 11:14].sum() == 900
    assert moved[:, 10, 12].sum() == 450 + 50  # (0, 0) is one of the nine shifts
    assert moved.sum(0)[9:12, 11:14].min() == 50
    assert torch.equal(a3_vae.shift_some(x.flatten(1), 0), x.flatten(1))


@pytest.mark.parametrize("x", [
    2 * binary_images(4) - 1,
    255 * binary_images(4),
    binary_images(4) / 2,
], ids=["-1 and 1", "0 and 255", "grey"])
def test_pixels_that_are_not_binary_are_refused(x):
    model = VAE().eval()
    for use in (model, lambda x: epoch_iter(model, [x], None), lambda x: evaluate(model, x, 1)):
        with pytest.raises(ValueError, match="must be 0 or 1"):
            use(x)


def test_it_learns(tmp_path):
    model, x = VAE().train(), binary_images(8)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    curve = [epoch_iter(model, [x], optimizer) for _ in range(40)]
    assert curve[0] < -500
    assert curve[-1] > -330  # random pixels have an entropy of 392 nats, unless memorised
    a3_vae.save_elbo_plot(curve, curve, tmp_path / "elbo.pdf")  # called as in the template


def test_manifold_covers_the_prior_at_equally_spaced_quantiles(tmp_path):
    model, seen = VAE(z_dim=2), []
    model.decoder.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    a3_vae.save_manifold(model, tmp_path / "manifold.png", n=20)
    u = stats.norm.cdf(seen[0].view(20, 20, 2))
    assert u[0, :, 0] == pytest.approx(np.linspace(0.01, 0.99, 20), abs=1e-6)  # z1 to the right
    assert u[:, 0, 1] == pytest.approx(np.linspace(0.99, 0.01, 20), abs=1e-6)  # z2 upwards
    assert Image.open(tmp_path / "manifold.png").size == (20 * 86 + 2, 20 * 86 + 2)
