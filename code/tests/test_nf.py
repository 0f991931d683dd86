"""The flow's mathematics against autograd, quadrature and scipy."""
# ruff: noqa: I001

import copy
import math

import numpy as np
import pytest
import torch
from scipy import stats

import a3_nf
from a3_nf import (COMMON_LEVELS, Coupling, EmpiricalLogit, Flow, MixtureCoupling, Model, bits_per_dimension,
                   epoch_iter, evaluate, get_mask, log_prior, mixture_logit, mixture_logit_inverse, sample_prior)
from conftest import randomized


def grey_images(n, D=784, seed=0):
    """Two thirds of the pixels black, the others of any level."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(256, (n, D), generator=generator)
    return (x * (torch.rand(n, D, generator=generator) < 1 / 3)).byte()


def normal(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def log_abs_det(f, x):
    """log |det df/dx| at x [D], by autograd."""
    return torch.linalg.slogdet(torch.autograd.functional.jacobian(f, x))[1]


def encode(model, y):
    """Grey levels y in [0, 256] -> latent z and log-determinant."""
    return model.flow(*model.logit(y))


def grey(logit, z):
    """The inverse of the EmpiricalLogit: z -> y in [0, 256]."""
    level = logit.level(z)
    return level + ((z.sigmoid() - logit.cdf[level]) / logit.p[level]).clamp(0, 1)


def decode(model, z):
    return grey(model.logit, model.flow(z, torch.zeros_like(z[:, 0]), reverse=True)[0])


def grey_levels(dtype=torch.float32):
    logit = EmpiricalLogit().to(dtype)
    logit.fit(torch.cat([torch.zeros(400, dtype=torch.long), torch.arange(256), torch.arange(256) // 2]))
    return logit


def make_coupling(mask, n_mixtures, logit=None):
    if n_mixtures:
        return MixtureCoupling(mask.numel(), mask, (logit or grey_levels()).components, n_mixtures, n_hidden=8)
    return Coupling(mask.numel(), mask, 8)


def toy_model(seed=0, n_mixtures=3):
    """A model of images of two pixels, each coupled to the other, with grey levels that are not uniform."""
    model = Model([784], 8, n_mixtures)
    model.logit, mask = grey_levels(), torch.tensor([[1.0, 0.0]])
    model.flow.layers = torch.nn.ModuleList([make_coupling(m, n_mixtures, model.logit) for m in (mask, 1 - mask)])
    model.flow.z_shape = (2,)
    randomized(model, 0.25, seed)
    return model


@torch.no_grad()
def toy_probabilities(model, n=6):
    """P(x) of all images x of two pixels, [256, 256]: the integral of p over x + [0, 1]^2.

    By n points a pixel, u = (1 - cos t) / 2 with equally spaced t, which are closer together near the ends.
    """
    t = (torch.arange(n) + 0.5) * math.pi / n
    y = (torch.arange(256).view(-1, 1) + (1 - t.cos()) / 2).flatten()
    log_p = []
    for batch in torch.cartesian_prod(y, y).split(100_000):
        z, ldj = encode(model, batch)
        log_p.append(log_prior(z) + ldj)
    weight = (t.sin() / t.sin().sum()).double()  # du / dt
    return torch.einsum("aibj,i,j->ab", torch.cat(log_p).double().exp().view(256, n, 256, n), weight, weight)


# -------------------------------------------------------------------------------------------------- prior and masks
def test_prior_against_scipy():
    x = 5 * normal(4, 7)
    assert log_prior(x).numpy() == pytest.approx(stats.logistic.logpdf(x.double().numpy()).sum(1), rel=1e-5)
    assert log_prior(torch.full((1, 2), 1000.0)).item() == -2000
    draws = sample_prior((200, 100))
    assert stats.kstest(draws.flatten().numpy(), "logistic").pvalue > 0.01 and draws.isfinite().all()
    assert sample_prior((3, 784)).shape == (3, 784)


def test_checkerboard_mask():
    mask = get_mask()
    assert mask.shape == (1, 784) and mask.sum() == 392 and set(mask.unique().tolist()) == {0, 1}
    image = mask.view(28, 28)
    assert torch.equal(image[1:], 1 - image[:-1]) and torch.equal(image[:, 1:], 1 - image[:, :-1])


# ---------------------------------------------------------------------------------------------- mixture of logistics
@pytest.mark.parametrize("log_s", [1.0, -1.0, -6.0])
def test_mixture_logit_against_scipy(log_s):
    """Three logistics and, in grey levels, uniform ones; the standard logistic is the fixed component."""
    x, logits, mean = 4 * normal(50, 1).double(), normal(50, 8, 1, seed=1).double(), 2 * normal(50, 3, 1).double()
    levels = grey_levels(torch.float64)
    h, log_slope = mixture_logit(x, logits, mean, torch.full_like(mean, log_s), levels.components)
    fixed = a3_nf.FIXED_WEIGHT * torch.ones(50, 1).double()
    weight = torch.cat([fixed, (1 - fixed) * logits.softmax(1)[..., 0]], 1).numpy()
    loc = torch.cat([torch.zeros(50, 1), mean[..., 0]], 1).numpy()
    scale = np.array([1] + 3 * [math.exp(log_s)])
    y, slope = grey(levels, x), (-levels(grey(levels, x))[1]).exp().view(50, 1).numpy()  # slope: dy/dx
    cdf, sf, pdf = (
        (weight * np.concatenate([logistic(x.numpy(), loc, scale), factor * uniform(y.numpy(), COMMON_LEVELS)], 1)
         ).sum(1) for logistic, uniform, factor in ((stats.logistic.cdf, stats.uniform.cdf, 1),
                                          (stats.logistic.sf, stats.uniform.sf, 1),
                                          (stats.logistic.pdf, stats.uniform.pdf, slope)))
    assert h.flatten().numpy() == pytest.approx(np.log(cdf / sf), abs=1e-8)  # y is rounded
    assert log_slope.flatten().numpy() == pytest.approx(np.log(pdf / cdf / sf), abs=1e-8)


@pytest.mark.parametrize("dtype, accuracy", [(torch.float32, 2e-6), (torch.float64, 1e-14)])
def test_mixture_logit_is_inverted_far_out_and_between_narrow_components(dtype, accuracy):
    x = torch.cat([6 * normal(5000), torch.linspace(-30, 30, 5000)]).to(dtype).view(-1, 1)
    parameters = [p.to(dtype) for p in (normal(10_000, 13, 1), 5 * normal(10_000, 8, 1, seed=1),
                                        (3 * normal(10_000, 8, 1, seed=2)).clamp(-7, 7))]
    parameters.append(grey_levels(dtype).components)
    h, log_slope = mixture_logit(x, *parameters)
    assert h.isfinite().all() and log_slope.isfinite().all()
    back = mixture_logit_inverse(h, *parameters)
    # as exact as h, which is rounded, allows: where the slope is small, x is known less well
    assert ((back - x).abs() / ((1 + x.abs()) * (1 + torch.exp(-log_slope)))).max() < 20 * accuracy
    assert ((mixture_logit(back, *parameters)[0] - h).abs() / (1 + h.abs())).max() < 20 * accuracy


# ------------------------------------------------------------------------------------------------ couplings and flow
MASKS = {"checkerboard": get_mask(side=4), "the other way": 1 - get_mask(side=4), "a quarter": get_mask(3, 4, 1, 4),
         "an eighth": get_mask(1, 2, 1, 4), "half resolution": get_mask(2, 3, 2, 8), "odd side": get_mask(1, 2, 4, 12),
         "not an image": torch.tensor([[1.0, 0.0, 0.0, -1.0, 1.0, 0.0]])}


@pytest.mark.parametrize("n_mixtures", [0, 3])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_log_determinant_of_a_coupling_against_autograd(mask, n_mixtures):
    D = mask.numel()
    layer = randomized(make_coupling(mask, n_mixtures).double(), 0.3)
    z, ldj = normal(3, D).double(), torch.tensor([1.0, -2.0, 0.5]).double()
    out, new = layer(z, ldj)
    for i in range(3):
        expected = log_abs_det(lambda x: layer(x.view(1, D), ldj[:1])[0][0], z[i])
        assert abs(expected) > 1e-3 and (new - ldj)[i].item() == pytest.approx(expected.item(), abs=1e-9)
    assert torch.equal(out[:, mask[0] != 0], z[:, mask[0] != 0])  # seen, or factored out
    assert (out[:, mask[0] == 0] != z[:, mask[0] == 0]).all()
    back, old = layer(out, new, reverse=True)
    assert torch.allclose(back, z, atol=1e-10) and torch.allclose(old, ldj, atol=1e-9)


def test_affine_coupling_against_its_formula():
    """y = x * exp(log_scale) + shift, with log_scale and shift from the seen pixels; a constant network here."""
    layer = Coupling(4, torch.tensor([[1, 0, 0, 1]]), 8)
    with torch.no_grad():
        layer.net[-1].bias.copy_(torch.tensor([0.5, -1.0, 3.0, 4.0]))
    z, ldj = layer(torch.tensor([[9.0, 2.0, 10.0, 9.0]]), torch.zeros(1))
    log_scale = 2 * np.tanh(np.array([0.5, -1.0]) / 2)
    assert z[0].tolist() == pytest.approx([9, *(np.array([2, 10]) * np.exp(log_scale) + [3, 4]), 9])
    assert ldj.item() == pytest.approx(log_scale.sum())


@pytest.mark.parametrize("n_mixtures", [0, 3])
def test_log_determinant_of_the_flow_and_of_its_inverse_against_autograd(n_mixtures):
    components = grey_levels(torch.float64).components
    options = {"coupling": MixtureCoupling, "n_mixtures": n_mixtures, "components": components} if n_mixtures else {}
    flow = randomized(Flow([64], 6, n_hidden=8, **options).double(), 0.3)
    assert len(flow.layers) == 7
    z, ldj = normal(2, 64).double(), torch.zeros(2).double()
    out, forward = flow(z, ldj)
    back, none = flow(out, forward, reverse=True)
    assert torch.allclose(back, z, atol=1e-9) and none.abs().max() < 1e-8
    expected = log_abs_det(lambda x: flow(x.view(1, 64), ldj[:1])[0][0], z[0]).item()
    assert abs(expected) > 1 and forward[0].item() == pytest.approx(expected, abs=1e-8)
    if n_mixtures == 0:  # the inverse has a derivative as well; that of the mixture is found by bisection
        expected = log_abs_det(lambda x: flow(x.view(1, 64), ldj[:1], reverse=True)[0][0], out[0]).item()
        assert flow(out, ldj, reverse=True)[1][0].item() == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("scale", [None, 0.1], ids=["initial", "randomised"])
@pytest.mark.parametrize("bound, make", [
    (1e-5, lambda: Flow([784], n_flows=2)), (1e-5, lambda: Coupling(c_in=784, mask=get_mask())),
    (1e-4, lambda: Flow([784], 2, MixtureCoupling, components=grey_levels().components)),
    (1e-4, lambda: make_coupling(get_mask(), 8))], ids=["flow", "coupling", "mixture flow", "mixture coupling"])
@torch.no_grad()
def test_invertibility_as_the_hand_outs_unit_test_asks_for_it(bound, make, scale):
    model, z = make(), normal(64, 784)
    if scale:
        randomized(model, scale)
    out, ldj = model(z, torch.zeros(64))
    back, residue = model(out, ldj, reverse=True)
    bound = 1e-4 if scale else bound
    assert ((back - z) / z).abs().mean() < bound and residue.abs().mean() < bound
    assert scale is None or (ldj.abs().mean() > 1 and (out - z).abs().mean() > 0.05)


def test_each_pixel_is_changed_once_and_seen_before_that():
    """Also the last one: a pixel that stayed as the prior draws it would be black half of the time."""
    model = randomized(Model([784], 8, 2), 0.3)
    changed = []
    for layer in model.flow.layers:
        if layer is not model.flow.layers[-1]:
            assert not set(changed) & set(layer.seen.flatten().tolist())
        changed += layer.changed.flatten().tolist()
    assert sorted(changed) == list(range(784))
    y = grey_images(2).float() + 0.5
    z, _ = encode(model, y)
    fine = get_mask()[0] == 0
    y[:, fine] = (y[:, fine] + 100) % 256
    assert torch.equal(encode(model, y)[0][:, ~fine], z[:, ~fine])


# ------------------------------------------------------------------------------------------------------- grey levels
def test_log_determinant_of_the_grey_levels_against_autograd():
    logit = EmpiricalLogit().double()
    logit.fit(grey_images(20))
    y = (torch.tensor([0.0, 1, 17, 254, 255]) + torch.tensor([0.5, 0.01, 0.99, 0.5, 0.999])).double()
    z, ldj = logit(y.view(1, 5))
    assert ldj.item() == pytest.approx(log_abs_det(lambda y: logit(y.view(1, 5))[0][0], y).item())
    assert torch.allclose(grey(logit, z), y.view(1, 5)) and (z[0].diff() > 0).all()


def test_grey_levels_turn_the_training_pixels_into_the_prior():
    """Exactly so if half of them are black."""
    images = grey_images(500, seed=1)
    images = images.clamp(min=1).masked_fill(torch.rand(images.shape) < 0.5, 0)
    logit = EmpiricalLogit()
    logit.fit(images)
    z, _ = logit(images[:40].float() + torch.rand(40, 784))
    assert stats.kstest(z.flatten().numpy(), "logistic").statistic < 0.02
    assert torch.equal(z < 0, images[:40] == 0)
    assert torch.equal(grey(logit, z).floor(), images[:40].float())


def test_dequantization_is_uniform(monkeypatch):
    model = Model([784], 8, 0)
    u = model.dequantize(torch.full((100, 784), 7)) - 7  # integers of any type
    assert stats.kstest(u.flatten().double().numpy(), "uniform").pvalue > 0.01
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, 1 - 2 ** -24))
    assert model.dequantize(torch.tensor([[0, 255]]).byte()).floor().tolist() == [[0, 255]]


def test_a_mixture_can_give_black_exactly_its_probability():
    """So that the dequantization bound is tight: log p(z) + ldj of a black pixel is log P(black) wherever z is."""
    logit = grey_levels(torch.float64)
    layer = make_coupling(torch.tensor([[1, 0]]), 1, logit).double()
    weight = torch.tensor([0.3, 0.6, 0.1, 0, 0, 0]).double()  # of one logistic, far out, and of the common levels
    with torch.no_grad():
        layer.net[-1].bias.copy_(torch.cat([(weight + 1e-30).log(), torch.tensor([300.0, 0.0])]))
    z, ldj = layer(*logit(torch.tensor([[7.5, 0.1], [7.5, 0.8]]).double()))
    z_grey, ldj_grey = logit(torch.full((1, 1), 7.5).double())
    log_p = log_prior(z) + ldj - (log_prior(z_grey) + ldj_grey)
    fixed = a3_nf.FIXED_WEIGHT
    assert log_p.detach().numpy() == pytest.approx(math.log((1 - fixed) * 0.6 + fixed * logit.p[0].item()), abs=1e-8)


def test_the_networks_are_told_nothing_of_the_dequantization_noise():
    logit, x = grey_levels(), grey_images(20).float()
    a, b = (logit.features(logit(x + u)[0]) for u in (0.01, 0.99))
    assert torch.equal(a, b) and a.shape == (20, 4 * 784)
    z, y, black, white = a.unflatten(1, (4, 784)).unbind(1)
    assert torch.allclose(z, logit(x + 0.5)[0], atol=1e-5) and torch.equal(y, x / 128 - 1)
    assert torch.equal(black == 1, x == 0) and torch.equal(white == 1, x >= 252)


# --------------------------------------------------------------------------------------------------- the whole model
def test_log_p_of_the_whole_model_against_autograd(monkeypatch):
    model = randomized(Model([784], 4, 2).double(), 0.2)
    model.logit.fit(grey_images(20))
    x = grey_images(1, seed=1)
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, 0.3))
    z, _ = encode(model, x + 0.3)
    expected = log_abs_det(lambda y: encode(model, y.view(1, 784))[0][0], x[0].double() + 0.3).item()
    assert model(x).item() == pytest.approx(stats.logistic.logpdf(z.detach().numpy()).sum() + expected, abs=1e-4)


@pytest.mark.parametrize("n_mixtures", [0, 3])
def test_density_integrates_to_one(n_mixtures):
    P = toy_probabilities(toy_model(3, n_mixtures))
    assert P.sum().item() == pytest.approx(1, abs=5e-3)  # the error of the quadrature
    assert (P / P.sum(0) / P.sum(1, keepdim=True) - 1).abs().max() > 0.5  # and the pixels are not independent


@torch.no_grad()
def test_dequantized_bits_per_dimension_are_a_bound_on_the_exact_ones():
    """With one draw they are above -log2 P(x), with more draws nearer."""
    model = toy_model()
    P = toy_probabilities(model)
    x = torch.cartesian_prod(*[torch.tensor([0, 100, 255])] * 2).repeat(1000, 1)
    exact = -P[x[:, 0], x[:, 1]].log2().mean().item() / 2
    one, few, many = (evaluate(model, x[:9 * n], k) for n, k in ((1000, 1), (500, 8), (40, 200)))
    gap = one["test_bpd"] - exact
    assert gap > 0.002 and one["test_bpd"] == pytest.approx(one["test_bpd_iw"])
    assert exact < few["test_bpd_iw"] < exact + 0.7 * gap
    assert many["test_bpd_iw"] == pytest.approx(exact, abs=0.2 * gap)
    assert few["test_bpd"] == pytest.approx(one["test_bpd"], abs=0.02) and few["iw_samples"] == 8


def test_samples_have_the_distribution_of_the_density():
    model = toy_model(2)
    P = toy_probabilities(model)
    x = model.sample(20_000).long()
    bright = x[:, 0] >= 100, x[:, 1] >= 100
    for observed, expected in ((bright[0], P[100:]), (bright[1], P[:, 100:]), (bright[0] & bright[1], P[100:, 100:])):
        assert 0.05 < expected.sum() < 0.95
        assert observed.double().mean().item() == pytest.approx(expected.sum().item(), abs=0.015)
    assert (torch.bincount(x[:, 0], minlength=256) / len(x) - P.sum(1)).abs().max() < 0.015


def test_an_untrained_affine_model_costs_what_the_grey_levels_do():
    """The cross-entropy of an image and the shares of the levels: a black pixel costs -log2 1/2 = 1 bit."""
    model, x = Model([784], 8, 0), grey_images(50)
    model.logit.fit(x)
    p = torch.bincount(x.flatten(), minlength=256).double() + 1
    p = torch.cat([torch.full((1,), 0.5), p[1:] / p[1:].sum() / 2])
    bpd = bits_per_dimension(model(x)).detach().numpy()
    assert bpd == pytest.approx(-p.log2()[x.long()].mean(1).numpy(), abs=1e-5)
    assert bits_per_dimension(model(torch.zeros(1, 784))).item() == pytest.approx(1, abs=1e-5)


# ---------------------------------------------------------------------------------------------------------- training
@pytest.fixture(scope="module")
def trained():
    """A small model after some updates, and its images, whose pixels are equal in blocks of 2x2."""
    torch.manual_seed(0)
    x = grey_images(64, 196).view(64, 14, 14).repeat_interleave(2, dim=1).repeat_interleave(2, dim=2).flatten(1)
    model = Model([784], 16, 4)
    model.logit.fit(x)
    optimizer = torch.optim.AdamW(model.parameters(), 8e-3)
    curve = [epoch_iter(model.train(), x.split(32), optimizer) for _ in range(15)]
    return model.eval(), x, curve


def test_it_learns(trained):
    model, _, curve = trained
    assert curve[0] > 3.5 and curve[-1] < curve[0] - 0.3
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    means = model.flow.layers[0].net[-1].bias.view(17, 1)[-8:-4]
    assert (means.diff(dim=0).abs() > 0.05).all()  # the components have not become one


@pytest.mark.parametrize("dtype, accuracy", [(torch.float32, 0.01), (torch.float64, 1e-7)])
@torch.no_grad()
def test_invertible_both_ways_after_training_and_at_extreme_inputs(trained, dtype, accuracy):
    model, x = copy.deepcopy(trained[0]).to(dtype), trained[1]
    model.logit.fit(x)  # again, in this dtype
    x = torch.stack([*x[:10], torch.zeros(784), torch.full((784,), 255), torch.arange(784) % 2 * 255]).to(dtype)
    for u in (0.001, 0.5, 0.999):
        z, ldj = encode(model, x + u)
        error = ((y := decode(model, z)) - x - u).abs()  # in grey levels; float32 misses some where the flow is flat
        n = 10 if dtype == torch.float32 else 13
        assert z.isfinite().all() and ldj.isfinite().all() and error[:n].max() < accuracy
        assert torch.minimum(error, (encode(model, y)[0] - z).abs()).max() < accuracy  # there z agrees
    z = sample_prior((100, 784)).to(dtype)
    back, ldj = encode(model, y := decode(model, z))
    inside = ((y % 1 > 1e-3) & (y % 1 < 1 - 1e-3)).all(1)  # so that no level is rounded to the next
    assert y.min() >= 0 and y.max() <= 256 and back.isfinite().all() and ldj.isfinite().all()
    assert inside.sum() >= 10 and (back - z)[inside].abs().max() < accuracy


@pytest.mark.parametrize("value", [0, 1, 128, 254, 255])
def test_log_p_and_its_gradients_are_finite_for_any_image(trained, value, monkeypatch):
    model = trained[0]
    for u in (0.0, 1 - 2 ** -24):  # the extremes of torch.rand
        monkeypatch.setattr(torch, "rand_like", lambda x, u=u: torch.full_like(x, u))
        model.zero_grad()
        log_p = model(torch.full((2, 784), value))
        log_p.sum().backward()
        assert log_p.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters())
