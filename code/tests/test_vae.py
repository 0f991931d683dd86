"""The VAE's mathematics against numerical references, and the training loop that it shares with the flow."""

import copy
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import integrate, stats

import a3_nf
import a3_vae
from a3_vae import VAE, Decoder, Encoder, epoch_iter, evaluate, kl_divergence, log_p_x_given_z, log_q_over_p
from conftest import randomized


def binary_images(n, seed=0):
    return (torch.rand(n, 784, generator=torch.Generator().manual_seed(seed)) < 0.2).float()


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (0.7, 0.3), (-3.0, 2.5), (0.1, 1e-3)])
def test_kl_against_numerical_integration(mean, std):
    def integrand(z):
        return stats.norm.pdf(z, mean, std) * (stats.norm.logpdf(z, mean, std) - stats.norm.logpdf(z))
    expected = integrate.quad(integrand, mean - 12 * std, mean + 12 * std, epsabs=1e-10)[0]
    actual = kl_divergence(torch.tensor([[mean, 0.0]]).double(), torch.tensor([[std, 1.0]]).double())
    assert actual.item() == pytest.approx(expected, abs=1e-6)


def test_log_q_over_p_against_scipy_and_its_mean_against_the_kl():
    mean, std = torch.randn(3, 5), torch.rand(3, 5) + 0.2
    z = mean + std * torch.randn(100_000, 3, 5)
    log_ratio = log_q_over_p(z, mean, std)
    expected = (stats.norm.logpdf(z[:9], mean, std) - stats.norm.logpdf(z[:9])).sum(-1)
    assert log_ratio[:9].numpy() == pytest.approx(expected, abs=1e-4)
    assert ((log_ratio.mean(0) - kl_divergence(mean, std)).abs() < 5 * log_ratio.std(0) / 100_000 ** 0.5).all()


def test_log_p_x_given_z_against_scipy():
    x, logits = binary_images(4), 3 * torch.randn(4, 784)
    expected = stats.bernoulli.logpmf(x.numpy(), logits.double().sigmoid().numpy()).sum(1)
    assert log_p_x_given_z(x, logits).numpy() == pytest.approx(expected, rel=1e-5)
    extreme = torch.full((1, 784), 200.0)  # sigmoid(200) is 1 in float32, so only logits give the right answer
    assert log_p_x_given_z(torch.zeros(1, 784), extreme).item() == pytest.approx(-784 * 200)


@pytest.mark.parametrize("z_dim", [2, 20])
def test_shapes_and_ranges(z_dim):
    x = binary_images(3)
    mean, std = randomized(Encoder(z_dim=z_dim), 0.1)(x)
    assert mean.shape == std.shape == (3, z_dim) and (std > 0).all()
    means = randomized(Decoder(z_dim=z_dim), 0.1)(mean)
    assert means.shape == (3, 784) and (means > 0).all() and (means < 1).all()
    model = VAE(hidden_dim=30, z_dim=z_dim)
    assert model(x).shape == ()
    sampled_ims, im_means = model.sample(5)
    assert sampled_ims.shape == im_means.shape == (5, 784) and set(sampled_ims.unique().tolist()) == {0.0, 1.0}


def test_samples_are_bernoulli_draws_with_the_means_of_latents_from_the_prior():
    model, z = randomized(VAE(z_dim=2), 0.15), []
    model.decoder.register_forward_hook(lambda module, args, output: z.append(args[0]))
    sampled_ims, im_means = model.sample(3000)
    assert all(stats.kstest(column.numpy(), "norm").pvalue > 0.01 for column in torch.cat(z).T)
    z_scores = (sampled_ims - im_means).sum(0) / (im_means * (1 - im_means)).sum(0).sqrt()  # per pixel, N(0, 1)
    assert im_means.std() > 0.1 and abs(z_scores.mean()) < 0.2 and 0.9 < z_scores.std() < 1.1


def test_elbo_with_means_of_one_half_is_784_log_2_plus_kl():
    model, x = randomized(VAE(), 0.1), binary_images(50)
    last = [m for m in model.decoder.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))][-1]
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.zeros_(last.bias)
    kl = kl_divergence(*model.encoder(x)).mean().item()
    assert kl > 0.1
    assert evaluate(model, x, 1)["test_elbo"] == pytest.approx(-784 * math.log(2) - kl, rel=1e-6)
    assert VAE()(x).item() == pytest.approx(784 * math.log(2), rel=0.05)  # untrained: nearly so


@pytest.mark.parametrize("z_dim", [1, 20])
def test_loss_and_gradient_are_unbiased_estimates(z_dim):
    """Averaged over noise they are those of KL - E_q log p(x|z), computed here in closed form and by quadrature."""
    model, x = randomized(VAE(z_dim=1), 0.08), binary_images(1)
    model.z_dim = z_dim  # with more than two dimensions the loss has another estimate of the KL divergence
    bias = model.encoder.net[-1].bias  # the gradients with respect to mean and log std
    mean, std = model.encoder(x)
    eps = torch.linspace(-7, 7, 2001).unsqueeze(1)
    recon = log_p_x_given_z(x.expand(2001, -1), model.decoder.logits(mean + std * eps))
    weights = torch.exp(-0.5 * eps[:, 0] ** 2) / math.sqrt(2 * math.pi) * 14 / 2000
    loss = (kl_divergence(mean, std) - (recon * weights).sum()).squeeze()
    expected = torch.cat([loss.view(1), *torch.autograd.grad(loss, bias)])
    losses = [model(x.expand(400, -1)) for _ in range(30)]
    estimates = torch.stack([torch.cat([loss.view(1), *torch.autograd.grad(loss, bias)]) for loss in losses])
    assert ((estimates.mean(0) - expected).abs() < 5 * estimates.std(0) / 30 ** 0.5).all()
    assert recon.std() > 0.1 and expected[1:].abs().min() > 0.05  # so that the test is not about a constant
    model(x).backward()
    assert all(p.grad.abs().max() > 0 for p in model.encoder.parameters())  # it reaches every layer


@torch.no_grad()
def test_importance_weighted_bound_tightens_to_the_exact_log_likelihood():
    """With one latent dimension log p(x) can be integrated: ELBO = bound with k=1 < k=5 < k=1000 = exact."""
    model, x = randomized(VAE(hidden_dim=20, z_dim=1), 0.14, seed=1), binary_images(1)
    z = torch.linspace(-8, 8, 2001).unsqueeze(1)
    log_joint = log_p_x_given_z(x.expand(2001, -1), model.decoder.logits(z)) \
        + torch.from_numpy(stats.norm.logpdf(z[:, 0].numpy()))
    exact = (log_joint.logsumexp(0) + math.log(16 / 2000)).item()
    many = evaluate(model, x.expand(4, -1), 1000)
    elbo, gap = many["test_elbo"], exact - many["test_elbo"]
    one, five = (evaluate(model, x.expand(400, -1), k)["test_log_px"] for k in (1, 5))  # averages over 400 draws
    assert gap > 0.5  # there is something to close
    assert one == pytest.approx(elbo, abs=0.3 * gap)
    assert elbo < five < many["test_log_px"] == pytest.approx(exact, abs=0.05 * gap)


@torch.no_grad()
def test_evaluate_averages_over_all_images():
    """47 images, in batches of which the last is smaller, against the same averages without noise."""
    model, x = randomized(VAE(z_dim=2), 0.1), binary_images(47)
    model.encoder.net[-1].weight[2:], model.encoder.net[-1].bias[2:] = 0, -8  # a tiny std: the noise hardly matters
    scores = evaluate(model, x.byte(), 3)
    mean, std = model.encoder(x)
    recon, kl = log_p_x_given_z(x, model.decoder.logits(mean)).mean().item(), kl_divergence(mean, std).mean().item()
    assert scores["test_log_p_x_given_z"] == pytest.approx(recon, rel=1e-4)
    assert scores["test_kl"] == pytest.approx(kl, rel=1e-5)
    assert scores["test_elbo"] == pytest.approx(scores["test_log_p_x_given_z"] - scores["test_kl"])
    assert scores["test_log_px"] == pytest.approx(scores["test_elbo"], abs=3)  # log w varies by sqrt(z_dim / 2) only


class MeanPixel(torch.nn.Module):
    """A stand-in for a model: its bits per dimension, or minus its ELBO, are a weight times the mean pixel."""
    def __init__(self, module):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.factor = None if module is a3_vae else -math.log(2) * 784

    def forward(self, x):
        return self.weight * (x.mean() if self.factor is None else x.mean(1) * self.factor)


both = pytest.mark.parametrize("module, sign", [(a3_vae, -1), (a3_nf, 1)], ids=["vae", "nf"])


@both
def test_epoch_average_is_weighted_by_batch_size(module, sign):
    model = MeanPixel(module).eval()
    data = [torch.full((4, 784), 1.0), torch.full((1, 1, 28, 28), 6.0)]
    assert module.epoch_iter(model, data, None) == pytest.approx(sign * (4 * 1 + 1 * 6) / 5)
    assert model.weight.grad is None


@both
def test_run_epoch_trains_on_the_first_and_measures_on_the_second(module, sign):
    model = MeanPixel(module)
    data = [torch.full((2, 784), 1.0)], [torch.full((2, 784), 1.0)]
    averages = module.run_epoch(model, data, torch.optim.SGD(model.parameters(), lr=0.25))
    assert (*averages, model.weight.item()) == pytest.approx((sign, sign * 0.75, 0.75)) and not model.training


@both
def test_averaged_weights_follow_their_formula_and_are_those_that_are_validated(module, sign):
    """Plain gradient descent on a constant gradient: after n updates the weight is 1 - 0.01 n."""
    model, expected = MeanPixel(module), 1
    averaged = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1)
    data = [torch.full((2, 784), 1.0)] * 30, [torch.full((2, 784), 1.0)]
    for n in range(1, 31):
        decay = (1 + n) / (10 + n)
        expected = decay * expected + (1 - decay) * (1 - 0.01 * n)
    validated = module.run_epoch(model, data, optimizer, schedule, averaged)[1]
    assert averaged.weight.item() == pytest.approx(expected) and model.weight.item() == pytest.approx(0.7)
    assert validated == pytest.approx(sign * expected)
    before = averaged.weight.item()
    module.update_average(averaged, model, 10_000)
    step = 9 / 10_010 if module is a3_vae else 1 - a3_nf.EMA_DECAY  # the flow's decay is constant from here on
    assert before - averaged.weight.item() == pytest.approx(step * (before - 0.7), rel=1e-3)


def test_shift_some_moves_a_share_of_the_images_by_up_to_a_pixel():
    x = torch.zeros(900, 28, 28, dtype=torch.uint8)
    x[:, 10, 12] = 1
    moved = a3_vae.shift_some(x.flatten(1), 0.5).view(-1, 28, 28)
    assert moved.sum() == 900 and moved[:, 9:12, 11:14].sum() == 900 and x[:, 10, 12].all()
    assert moved[:, 10, 12].sum() == 450 + 50  # (0, 0) is one of the nine moves
    assert moved.sum(0)[9:12, 11:14].min() == 50
    assert torch.equal(a3_vae.shift_some(x.flatten(1), 0), x.flatten(1))


def test_it_learns(tmp_path):
    model, x = VAE().train(), binary_images(8)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    curve = [epoch_iter(model, [x], optimizer) for _ in range(40)]
    a3_vae.save_elbo_plot(curve, curve, tmp_path / "elbo.pdf")  # with no more arguments, as in the template
    assert curve[0] < -500 and curve[-1] > -330  # random pixels: 784 * entropy(0.2) = 392 nats, unless memorised


def test_manifold_covers_the_prior_at_equally_spaced_quantiles(tmp_path):
    model, seen = VAE(z_dim=2), []
    model.decoder.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    a3_vae.save_manifold(model, tmp_path / "manifold.png", n=20)
    u = stats.norm.cdf(seen[0].view(20, 20, 2))
    assert u[0, :, 0] == pytest.approx(np.linspace(0.01, 0.99, 20), abs=1e-6)  # z1 grows to the right
    assert u[:, 0, 1] == pytest.approx(np.linspace(0.99, 0.01, 20), abs=1e-6)  # z2 grows upwards
    assert Image.open(tmp_path / "manifold.png").size == (20 * 86 + 2, 20 * 86 + 2)
