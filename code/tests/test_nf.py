"""The flow's mathematics against autograd, quadrature and scipy."""

import copy
import csv
import importlib
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

import a3_nf
from a3_nf import (
    COMMON_LEVELS,
    STANDARD_WEIGHT,
    AutoregressiveLayer,
    Coupling,
    Flow,
    GreyLevels,
    Mixture,
    MixtureCoupling,
    Model,
    MultiscaleFlow,
    bits_per_dimension,
    epoch_iter,
    evaluate,
    get_mask,
    log_prior,
    sample_prior,
)
from conftest import randomized


def grey_images(n, D=784, seed=0):
    """Two thirds of the pixels are black, the others of any level."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(256, (n, D), generator=generator)
    is_grey = torch.rand(n, D, generator=generator) < 1 / 3
    return (x * is_grey).byte()


def normal(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def log_abs_det(f, x):
    """log |det df/dx| at x [D], by autograd."""
    jacobian = torch.autograd.functional.jacobian(f, x)
    return torch.linalg.slogdet(jacobian)[1].item()


def encode(model, y):
    """Grey levels y in [0, 256] -> latent z and log-determinant."""
    return model.flow(*model.grey_levels(y))


def to_grey(levels, z):
    """The inverse of the GreyLevels: z -> y in [0, 256]."""
    level = levels.level(z)
    u = (z.sigmoid() - levels.below[level]) / levels.share[level]
    return level + u.clamp(0, 1)


def decode(model, z):
    z, _ = model.flow(z, torch.zeros_like(z[:, 0]), reverse=True)
    return to_grey(model.grey_levels, z)


def fitted_levels(dtype=torch.float32):
    """GreyLevels with different shares."""
    levels = GreyLevels().to(dtype)
    levels.fit(torch.cat([torch.zeros(400).long(), torch.arange(256), torch.arange(256) // 2]))
    return levels


TOYS = ["coupling", "autoregressive"]


def toy_model(kind, seed=0):
    """A model of images of two pixels, with levels of different shares and random weights."""
    model = Model([784], n_mixtures=3)
    model.grey_levels = fitted_levels()
    mixture = Mixture(3, model.grey_levels)
    first, second = torch.tensor([[0]]), torch.tensor([[1]])
    if kind == "coupling":
        layers = [
            MixtureCoupling([first], second, 8, mixture),
            AutoregressiveLayer(torch.tensor([0]), 8, 8, mixture),
        ]
    else:
        layers = [AutoregressiveLayer(torch.tensor([1, 0]), 8, 8, mixture)]
    model.flow.layers = torch.nn.ModuleList(layers)
    model.flow.z_shape = (2,)
    return randomized(model, 0.25, seed).eval()


@torch.no_grad()
def toy_probabilities(model, n=6):
    """P(x) of all images x of two pixels, [256, 256]: the integral of p over x + [0, 1]^2.

    By n points a pixel, u = (1 - cos t) / 2 with equally spaced t, which lie closer near the ends.
    """
    t = (torch.arange(n) + 0.5) * math.pi / n
    u = (1 - t.cos()) / 2
    y = (torch.arange(256).view(-1, 1) + u).flatten()
    log_p = []
    for batch in torch.cartesian_prod(y, y).split(100_000):
        z, ldj = encode(model, batch)
        log_p.append(log_prior(z) + ldj)
    p = torch.cat(log_p).double().exp().view(256, n, 256, n)
    weight = (t.sin() / t.sin().sum()).double()  # du / dt
    return torch.einsum("aibj,i,j->ab", p, weight, weight)


# ------------------------------------------------------------------------------- prior and mask
def test_prior_against_scipy():
    x = 5 * normal(4, 7)
    expected = stats.logistic.logpdf(x.double().numpy()).sum(1)
    assert log_prior(x).numpy() == pytest.approx(expected, rel=1e-5)
    assert log_prior(torch.full((1, 2), 1000.0)).item() == -2000
    draws = sample_prior((200, 100))
    assert draws.isfinite().all()
    assert stats.kstest(draws.flatten().numpy(), "logistic").pvalue > 0.01
    assert sample_prior((3, 784)).shape == (3, 784)


def test_checkerboard_mask():
    mask = get_mask()
    assert mask.shape == (1, 784)
    assert mask.sum() == 392
    assert set(mask.unique().tolist()) == {0, 1}
    image = mask.view(28, 28)
    assert torch.equal(image[1:], 1 - image[:-1])
    assert torch.equal(image[:, 1:], 1 - image[:, :-1])


# -------------------------------------------------------------------------- the map of a mixture
@pytest.mark.parametrize("log_scale", [1.0, -1.0, -6.0])
def test_mixture_against_scipy(log_scale):
    """Three logistics, uniform distributions on grey levels, and the standard logistic."""
    levels = fitted_levels(torch.float64)
    x = 4 * normal(50, 1).double()
    logits = normal(50, 8, 1, seed=1).double()
    means = 2 * normal(50, 3, 1).double()
    parameters = torch.cat([logits, means, torch.full_like(means, log_scale)], dim=1)
    h, log_slope = Mixture(3, levels).transform(x, parameters)

    y = to_grey(levels, x).numpy()
    dy_dx = (-levels(to_grey(levels, x))[1]).exp().view(50, 1).numpy()
    weights = logits.softmax(1)[..., 0].numpy()  # [50, 8]
    x, means = x.numpy(), means[..., 0].numpy()

    def mixture(logistic, uniform, factor=1):
        logistics = logistic(x, means, math.exp(log_scale))  # [50, 3]
        levels = factor * uniform(y, COMMON_LEVELS)          # [50, 5], of width 1
        learned = (weights * np.concatenate([logistics, levels], axis=1)).sum(1)
        return (1 - STANDARD_WEIGHT) * learned + STANDARD_WEIGHT * logistic(x[:, 0])

    cdf = mixture(stats.logistic.cdf, stats.uniform.cdf)
    sf = mixture(stats.logistic.sf, stats.uniform.sf)
    pdf = mixture(stats.logistic.pdf, stats.uniform.pdf, dy_dx)
    assert h.flatten().numpy() == pytest.approx(np.log(cdf / sf), abs=1e-7)  # y is rounded
    assert log_slope.flatten().numpy() == pytest.approx(np.log(pdf / cdf / sf), abs=1e-7)


@pytest.mark.parametrize("dtype, accuracy", [(torch.float32, 2e-6), (torch.float64, 1e-14)])
def test_mixture_is_inverted_far_out_and_between_narrow_components(dtype, accuracy):
    n = 10_000
    x = torch.cat([6 * normal(n // 2), torch.linspace(-30, 30, n // 2)]).to(dtype).view(n, 1)
    logits = normal(n, 13, 1)
    means = 5 * normal(n, 8, 1, seed=1)
    log_scales = 3 * normal(n, 8, 1, seed=2)
    parameters = torch.cat([logits, means, log_scales], dim=1).to(dtype)
    mixture = Mixture(8, fitted_levels(dtype))

    y, log_slope = mixture.transform(x, parameters)
    assert y.isfinite().all()
    assert log_slope.isfinite().all()
    back, log_slope_back = mixture.inverse(y, parameters)
    # y is rounded: where the slope is small, x is known less well
    error_of_x = (back - x).abs() / ((1 + x.abs()) * (1 + torch.exp(-log_slope)))
    assert error_of_x.max() < 20 * accuracy
    y_back, log_slope = mixture.transform(back, parameters)
    assert ((y_back - y).abs() / (1 + y.abs())).max() < 20 * accuracy
    assert torch.equal(log_slope_back, -log_slope)


# ------------------------------------------------------------------------------------- the layers
def make_layers():
    """One layer of each kind, for 16 pixels, with random weights."""
    pixels = torch.arange(16).view(4, 4)
    a, b, c, d = pixels[0::2, 0::2], pixels[0::2, 1::2], pixels[1::2, 0::2], pixels[1::2, 1::2]
    mixture = Mixture(3, fitted_levels(torch.float64))
    layers = {
        "affine": Coupling(16, get_mask(4), 8),
        "affine, the other half": Coupling(16, 1 - get_mask(4), 8),
        "mixture, three groups seen": MixtureCoupling([a, b, d], c, 8, mixture),
        "mixture, one group seen": MixtureCoupling([a], d, 8, mixture),
        "autoregressive": AutoregressiveLayer(torch.tensor([0, 5, 3, 15, 2]), 8, 6, mixture),
    }
    for layer in layers.values():
        randomized(layer.double().eval(), 0.3)
    return layers


def changed_pixels(layer):
    if isinstance(layer, Coupling):
        return (layer.mask[0] == 0).nonzero().flatten()
    if isinstance(layer, MixtureCoupling):
        return layer.changed.flatten()
    return layer.pixels


@pytest.mark.parametrize("kind", make_layers())
def test_log_determinant_of_a_layer_against_autograd(kind):
    layer = make_layers()[kind]
    z = normal(3, 16).double()
    ldj = torch.tensor([1.0, -2.0, 0.5]).double()
    out, new = layer(z, ldj)
    for i in range(3):
        expected = log_abs_det(lambda x: layer(x.view(1, 16), ldj[:1])[0][0], z[i])
        assert abs(expected) > 1e-3
        assert (new - ldj)[i].item() == pytest.approx(expected, abs=1e-9)
    is_changed = torch.zeros(16, dtype=torch.bool)
    is_changed[changed_pixels(layer)] = True
    assert torch.equal(out[:, ~is_changed], z[:, ~is_changed])
    assert (out[:, is_changed] != z[:, is_changed]).all()


@pytest.mark.parametrize("kind", make_layers())
def test_a_layer_is_inverted(kind):
    layer = make_layers()[kind]
    z = normal(30, 16).double()
    ldj = normal(30).double()
    back, residue = layer(*layer(z, ldj), reverse=True)
    assert torch.allclose(back, z, atol=1e-10)
    assert torch.allclose(residue, ldj, atol=1e-9)


def test_affine_coupling_against_its_formula():
    """y = x * exp(s) + t, with a network that is constant here: s = 0.5 and t = 3."""
    layer = Coupling(16, get_mask(4), 8)
    with torch.no_grad():
        layer.net[2][-1].bias.copy_(torch.tensor([0.5] * 4 + [3.0] * 4))
    z = normal(1, 16)
    out, ldj = layer(z, torch.zeros(1))
    s = 2 * math.tanh(0.5 / 2)  # bounded
    expected = torch.where(get_mask(4) == 1, z, z * math.exp(s) + 3)
    assert torch.allclose(out, expected, atol=1e-5)
    assert ldj.item() == pytest.approx(8 * s, rel=1e-5)


def test_an_affine_coupling_sees_only_the_pixels_that_it_keeps():
    layer = make_layers()["affine"]
    z = normal(1, 16).double()
    jacobian = torch.autograd.functional.jacobian(
        lambda x: layer(x.view(1, 16), z[0, :1])[0][0], z[0])
    kept = layer.mask[0] == 1
    assert torch.equal(jacobian[kept][:, kept], torch.eye(8).double())
    assert torch.equal(jacobian[kept][:, ~kept], torch.zeros(8, 8).double())
    among_changed = jacobian[~kept][:, ~kept]
    assert torch.equal(among_changed, among_changed.diagonal().diag())
    assert jacobian[~kept][:, kept].abs().max() > 0.01


def test_each_pixel_of_the_autoregressive_layer_sees_those_before_it():
    layer = make_layers()["autoregressive"]
    n = len(layer.pixels)
    x = normal(1, n).double()
    parameters = layer.network(layer.contexts(x))
    for j in range(n):
        other = x.clone()
        other[0, j] += 10  # certainly another grey level
        changes = (layer.network(layer.contexts(other)) != parameters).any(dim=1)[0]
        assert changes.tolist() == [j < i for i in range(n)]


@pytest.mark.parametrize("n_mixtures", [0, 3])
def test_log_determinant_of_a_whole_flow_against_autograd(n_mixtures):
    model = randomized(Model([784], n_mixtures).double().eval(), 0.1)
    z = normal(1, 784).double()
    ldj = torch.zeros(1).double()
    out, forward = model.flow(z, ldj)
    expected = log_abs_det(lambda x: model.flow(x.view(1, 784), ldj)[0][0], z[0])
    assert abs(expected) > 1
    assert forward.item() == pytest.approx(expected, abs=1e-8)
    back, residue = model.flow(out, forward, reverse=True)
    assert torch.allclose(back, z, atol=1e-9)
    assert residue.abs().max() < 1e-8


@pytest.mark.parametrize("scale", [None, 0.1], ids=["initial", "randomised"])
@pytest.mark.parametrize("kind", ["Flow", "Coupling", "MultiscaleFlow"])
@torch.no_grad()
def test_invertibility_as_the_hand_outs_unit_test_asks_for_it(kind, scale):
    if kind == "Flow":
        model = Flow([784], n_flows=2)
    elif kind == "Coupling":
        model = Coupling(c_in=784, mask=get_mask())
    else:
        model = MultiscaleFlow(fitted_levels()).eval()
    if scale:
        randomized(model, scale)
    z = normal(64, 784)
    out, ldj = model(z, torch.zeros(64))
    back, residue = model(out, ldj, reverse=True)
    bound = 1e-5 if scale is None and kind != "MultiscaleFlow" else 1e-4
    assert ((back - z) / z).abs().mean() < bound
    assert residue.abs().mean() < bound
    if scale:
        assert ldj.abs().mean() > 1
        assert (out - z).abs().mean() > 0.05


def test_the_multiscale_flow_changes_each_pixel_once_and_sees_only_pixels_of_the_image():
    """A layer must not see what a layer before it has changed: that is a latent variable."""
    flow = MultiscaleFlow(fitted_levels())
    changed = []
    for layer in flow.layers:
        if isinstance(layer, MixtureCoupling):
            assert not set(changed) & set(layer.seen.flatten().tolist())
        changed += changed_pixels(layer).tolist()
    assert sorted(changed) == list(range(784))


def test_the_order_of_the_pixels_is_the_one_drawn_in_the_script():
    drawn = [[1, 6, 3, 6], [7, 5, 7, 5], [4, 6, 2, 6], [7, 5, 7, 5]]
    order = torch.tensor(drawn).repeat(7, 7).flatten()
    *couplings, last = MultiscaleFlow(fitted_levels()).layers
    for number, layer in zip([7, 6, 5, 4, 3], couplings, strict=True):
        assert set(order[layer.changed.flatten()].tolist()) == {number}
        assert set(order[layer.seen.flatten()].tolist()) <= set(range(1, number))
    assert order[last.pixels].tolist() == 49 * [1] + 49 * [2]


# ---------------------------------------------------------------------------------- grey levels
def test_log_determinant_of_the_grey_levels_against_autograd():
    levels = GreyLevels().double()
    levels.fit(grey_images(20))
    y = torch.tensor([[0.5, 1.01, 17.99, 254.5, 255.999]]).double()
    z, ldj = levels(y)
    assert ldj.item() == pytest.approx(log_abs_det(lambda y: levels(y.view(1, 5))[0][0], y[0]))
    assert torch.allclose(to_grey(levels, z), y)
    assert (z[0].diff() > 0).all()


def test_grey_levels_turn_the_training_pixels_into_the_prior():
    """Exactly so if half of them are black."""
    images = grey_images(500, seed=1).clamp(min=1)
    images = images.masked_fill(torch.rand(images.shape) < 0.5, 0)
    levels = GreyLevels()
    levels.fit(images)
    z, _ = levels(images[:40].float() + torch.rand(40, 784))
    assert stats.kstest(z.flatten().numpy(), "logistic").statistic < 0.02
    assert torch.equal(z < 0, images[:40] == 0)
    assert torch.equal(to_grey(levels, z).floor(), images[:40].float())


def test_images_can_have_two_dimensions():
    x = grey_images(3)
    model = Model([784], n_mixtures=2)
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    assert torch.equal(model(x.view(3, 28, 28)), expected)


@pytest.mark.parametrize("x", [
    torch.rand(4, 784),
    torch.full((4, 784), 1020),
    torch.full((4, 784), -1),
    torch.full((4, 784), math.nan),
], ids=["in [0, 1]", "above 255", "below 0", "nan"])
def test_pixels_that_are_not_grey_levels_are_refused(x):
    with pytest.raises(ValueError, match="must be integers from 0 to 255"):
        Model([784])(x)


def test_dequantization_is_uniform(monkeypatch):
    model = Model([784], n_mixtures=0)
    u = model.dequantize(torch.full((100, 784), 7)) - 7  # integers of any type
    assert stats.kstest(u.flatten().double().numpy(), "uniform").pvalue > 0.01
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, 1 - 2 ** -24))
    assert model.dequantize(torch.tensor([[0, 255]]).byte()).floor().tolist() == [[0, 255]]


def test_a_mixture_can_give_black_exactly_its_probability():
    """So that the dequantization bound is tight: a black pixel costs the same wherever z is."""
    levels = fitted_levels(torch.float64)
    mixture = Mixture(1, levels)
    weights = torch.tensor([0.3, 0.6, 0.1, 1e-30, 1e-30, 1e-30]).double()  # of a logistic, levels
    parameters = torch.cat([weights.log(), torch.tensor([300.0, 0.0])]).view(1, 8, 1).double()
    for u in (0.1, 0.8):
        x, ldj = levels(torch.tensor([[u]]).double())
        z, log_slope = mixture.transform(x, parameters)
        log_p = log_prior(z) + log_slope.sum(1) + ldj
        expected = (1 - STANDARD_WEIGHT) * 0.6 + STANDARD_WEIGHT * levels.share[0].item()
        assert log_p.item() == pytest.approx(math.log(expected), abs=1e-8)


def test_the_networks_are_told_nothing_of_the_dequantization_noise():
    levels, x = fitted_levels(), grey_images(20).float()
    low = levels.features(levels(x + 0.01)[0])
    high = levels.features(levels(x + 0.99)[0])
    assert torch.equal(low, high)
    h, brightness, black, white = low.unbind(1)  # [20, 784] each
    assert torch.allclose(h, levels(x + 0.5)[0], atol=1e-5)
    assert torch.equal(brightness, x / 128 - 1)
    assert torch.equal(black == 1, x == 0)
    assert torch.equal(white == 1, x >= 252)


# -------------------------------------------------------------------------------- the whole model
def test_log_p_of_the_whole_model_against_autograd(monkeypatch):
    model = randomized(Model([784], n_mixtures=2).double().eval(), 0.1)
    model.grey_levels.fit(grey_images(20))
    x = grey_images(1, seed=1)
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, 0.3))
    z, _ = encode(model, x + 0.3)
    log_det = log_abs_det(lambda y: encode(model, y.view(1, 784))[0][0], x[0].double() + 0.3)
    expected = stats.logistic.logpdf(z.detach().numpy()).sum() + log_det
    assert model(x).item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", TOYS)
def test_density_integrates_to_one(kind):
    P = toy_probabilities(toy_model(kind, seed=3))
    assert P.sum().item() == pytest.approx(1, abs=5e-3)  # the error of the quadrature
    independent = P.sum(0) * P.sum(1, keepdim=True)
    assert (P / independent - 1).abs().max() > 0.5


@torch.no_grad()
def test_dequantized_bits_per_dimension_are_a_bound_on_the_exact_ones():
    """With one draw they are above -log2 P(x), with more draws nearer."""
    model = toy_model("coupling")
    P = toy_probabilities(model)
    levels = torch.tensor([0, 100, 255])
    x = torch.cartesian_prod(levels, levels).repeat(1000, 1)
    exact = -P[x[:, 0], x[:, 1]].log2().mean().item() / 2
    one = evaluate(model, x, 1)
    few = evaluate(model, x[:4500], 8)
    many = evaluate(model, x[:360], 200)
    gap = one["test_bpd"] - exact
    assert gap > 0.002
    assert one["test_bpd"] == pytest.approx(one["test_bpd_iw"])
    assert exact < few["test_bpd_iw"] < exact + 0.7 * gap
    assert many["test_bpd_iw"] == pytest.approx(exact, abs=0.2 * gap)
    assert few["test_bpd"] == pytest.approx(one["test_bpd"], abs=0.02)
    assert few["iw_samples"] == 8


@pytest.mark.parametrize("kind", TOYS)
def test_samples_have_the_distribution_of_the_density(kind):
    model = toy_model(kind, seed=2)
    P = toy_probabilities(model)
    x = model.sample(20_000).long()
    first, second = x[:, 0] >= 100, x[:, 1] >= 100
    pairs = [
        (first, P[100:]),
        (second, P[:, 100:]),
        (first & second, P[100:, 100:]),
    ]
    for observed, expected in pairs:
        assert 0.05 < expected.sum() < 0.95
        assert observed.double().mean().item() == pytest.approx(expected.sum().item(), abs=0.015)
    shares = torch.bincount(x[:, 0], minlength=256) / len(x)
    assert (shares - P.sum(1)).abs().max() < 0.015


def test_an_untrained_realnvp_costs_what_the_grey_levels_do():
    """The cross-entropy of an image and the shares of the levels: a black pixel costs 1 bit."""
    model, x = Model([784], n_mixtures=0), grey_images(50)
    model.grey_levels.fit(x)
    p = torch.bincount(x.flatten(), minlength=256).double() + 1
    p[0] = 0
    p = p / p.sum() / 2
    p[0] = 0.5
    bpd = bits_per_dimension(model(x)).detach().numpy()
    assert bpd == pytest.approx(-p.log2()[x.long()].mean(1).numpy(), abs=1e-5)
    assert bits_per_dimension(model(torch.zeros(1, 784))).item() == pytest.approx(1, abs=1e-5)


# ---------------------------------------------------------------------------------------- training
@pytest.fixture(scope="module")
def trained():
    """A model after some updates, and its images, whose pixels are equal in blocks of 2 x 2."""
    torch.manual_seed(0)
    small = grey_images(64, 196).view(64, 14, 14)
    x = small.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2).flatten(1)
    model = Model([784], n_mixtures=4)
    model.grey_levels.fit(x)
    optimizer = torch.optim.AdamW(model.parameters(), 8e-3)
    curve = [epoch_iter(model.train(), x.split(32), optimizer) for _ in range(15)]
    return model.eval(), x, curve


def test_it_learns(trained):
    model, _, curve = trained
    assert curve[0] > 3.5
    assert curve[-1] < curve[0] - 0.3
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0


def test_the_components_of_a_mixture_do_not_become_one(trained):
    model, x, _ = trained
    layer = model.flow.layers[0]
    z, _ = model.grey_levels(x + 0.5)
    parameters = layer.net(model.grey_levels.features(z[:, layer.seen]).flatten(1, 2))
    _, means, _ = layer.mixture.components(parameters)
    assert (means.sort(dim=1).values.diff(dim=1).abs().mean(dim=(0, 2, 3)) > 0.02).all()


def images_with_extremes(x):
    """Ten of the images x, a black one, a white one, and one of black and white stripes."""
    stripes = torch.arange(784) % 2 * 255
    return torch.stack([*x[:10], torch.zeros(784), torch.full((784,), 255), stripes])


@pytest.mark.parametrize("u", [0.001, 0.5, 0.999])
@torch.no_grad()
def test_images_are_recovered_after_training_also_extreme_ones(trained, u):
    model, x = copy.deepcopy(trained[0]).double(), trained[1]
    model.grey_levels.fit(x)  # again, in double precision
    y = images_with_extremes(x).double() + u
    z, _ = encode(model, y)
    assert (decode(model, z) - y).abs().max() < 1e-7  # grey levels


@pytest.mark.parametrize("source", [0.01, 0.5, 0.99, "the prior"])
@torch.no_grad()
def test_latent_variables_are_recovered_in_single_precision(trained, source):
    """They come from images with this noise u, or from the prior.

    Where the flow is flat, single precision can miss an image, but not its z. Errors of z are
    measured as probabilities, since the prior has hardly any mass far out. Only where the flow is
    so steep that rounding y changes z, it is enough that y is recovered.
    """
    model, x = trained[0], trained[1]
    if source == "the prior":
        torch.manual_seed(0)
        z = sample_prior((200, 784))
        true_y = math.nan  # there is none
    else:
        true_y = images_with_extremes(x) + source
        z, _ = encode(model, true_y)
    y = decode(model, z)
    back, ldj = encode(model, y)
    assert y.min() >= 0
    assert y.max() <= 256
    assert ldj.isfinite().all()
    away_from_edges = ((y % 1 > 1e-3) & (y % 1 < 1 - 1e-3)).all(1)  # where levels are rounded
    assert away_from_edges.sum() >= 10
    error = (back.sigmoid() - z.sigmoid())[away_from_edges].abs()
    error_of_y = (y - true_y)[away_from_edges].abs()
    is_steep = (error > 1e-3) & (error_of_y < 1e-4)  # grey levels
    assert is_steep.float().mean() < 1e-4
    assert error[~is_steep].mean() < 1e-5
    assert error[~is_steep].max() < 1e-3


@pytest.mark.parametrize("u", [0.0, 1 - 2 ** -24], ids=["lowest noise", "highest noise"])
@pytest.mark.parametrize("value", [0, 1, 128, 254, 255])
def test_log_p_and_its_gradients_are_finite_for_any_image(trained, value, u, monkeypatch):
    model = trained[0]
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, u))
    model.zero_grad()
    log_p = model(torch.full((2, 784), value))
    log_p.sum().backward()
    assert log_p.isfinite().all()
    for parameter in model.parameters():
        assert parameter.grad.isfinite().all()


def test_seconds_to_a_target_count_whole_epochs():
    rows = [{"seconds": 10, "val_bpd": 2.0}, {"seconds": 11, "val_bpd": 1.5}]
    assert a3_nf.seconds_to(1.85, rows) == 21
    assert a3_nf.seconds_to(2.5, rows) == 10
    assert a3_nf.seconds_to(1.0, rows) is None


def test_the_multiscale_flow_resumes_bit_for_bit(glyphs_dir, tmp_path, monkeypatch):
    """Interrupted in epoch 2; test_scripts.py does the same to RealNVP, by signals."""
    def run(*argv):
        common = ["--device", "cpu", "--dataset", "glyphs", "--data_dir", str(glyphs_dir)]
        a3_nf.main(a3_nf.parse_args([*argv, *common]))

    monkeypatch.setattr(a3_nf, "save_samples", lambda *_: None)  # most of the time of a dry run
    whole, interrupted = tmp_path / "whole", tmp_path / "interrupted"
    new_run = ["--dry_run", "--n_mixtures", "2", "--batch_size", "8"]
    run(*new_run, "--out_dir", str(whole))

    clip = torch.nn.utils.clip_grad_norm_

    def clip_or_interrupt(*args):
        if (interrupted / "checkpoint.pt").exists():
            raise KeyboardInterrupt
        clip(*args)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.nn.utils, "clip_grad_norm_", clip_or_interrupt)
        run(*new_run, "--out_dir", str(interrupted))
    assert not (interrupted / "weights.pt").exists()
    run("--resume", "--out_dir", str(interrupted))

    expected = torch.load(whole / "weights.pt", weights_only=True)["best"]
    found = torch.load(interrupted / "weights.pt", weights_only=True)["best"]
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


# --------------------------------------------------------------------------------------- ablations
sys.path.insert(0, str(Path(a3_nf.__file__).parents[1] / "report"))
ablations = importlib.import_module("ablations")


@pytest.mark.parametrize("name", ablations.ABLATIONS)
@torch.no_grad()
def test_an_ablated_model_is_a_flow_as_well(name, monkeypatch):
    for attribute, value in ablations.ABLATIONS[name].items():
        monkeypatch.setattr(a3_nf, attribute, value)
    model = Model([784], n_mixtures=2)
    model.grey_levels.fit(grey_images(20))
    model = randomized(model, 0.07).double().eval()
    z, _ = model.grey_levels(grey_images(3, seed=1) + 0.4)
    ldj = torch.zeros(3).double()
    out, forward = model.flow(z, ldj)
    assert forward.abs().min() > 1
    back, residue = model.flow(out, forward, reverse=True)
    assert torch.allclose(back, z, atol=1e-6)
    assert residue.abs().max() < 1e-6


def test_the_ablations_are_written_to_a_table(glyphs_dir, tmp_path, monkeypatch):
    names = "as it is", "affine map"
    monkeypatch.setattr(ablations, "ABLATIONS", {name: ablations.ABLATIONS[name] for name in names})
    table = tmp_path / "ablations.csv"
    monkeypatch.setattr(sys, "argv", [
        "ablations.py", "--n_images", "64", "--dataset", "glyphs", "--data_dir", str(glyphs_dir),
        "--out", str(table)])
    n_threads = torch.get_num_threads()
    ablations.main()
    torch.set_num_threads(n_threads)
    rows = list(csv.DictReader(table.open()))
    assert [row["model"] for row in rows] == list(names)
    assert float(rows[0]["val_bpd"]) != float(rows[1]["val_bpd"])
    assert all(float(row["cpu_seconds"]) > 0 for row in rows)
