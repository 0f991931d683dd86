"""The VAE: its mathematics against numerical references, and the script as a user meets it."""

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
from scipy import integrate, stats

import a3_vae
import datasets
from a3_vae import (VAE, Decoder, Encoder, epoch_iter, evaluate, kl_divergence, load_model, log_p_x_given_z, run_epoch,
                    shift_some)
from conftest import locked_by_another, mnist_dir, needs_mnist, run_killed, run_script, start_script


def randomized(model, seed=0, scale=0.1):
    """Random weights everywhere, so that nothing is tested at a special initialisation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=generator))
    return model


def binary_images(n, seed=0):
    return (torch.rand(n, 784, generator=torch.Generator().manual_seed(seed)) < 0.2).float()


# ---------------------------------------------------------------------------------------------------- mathematics

@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (0.7, 0.3), (-3.0, 2.5), (0.1, 1e-3)])
def test_kl_against_numerical_integration(mean, std):
    def integrand(z):
        return stats.norm.pdf(z, mean, std) * (stats.norm.logpdf(z, mean, std) - stats.norm.logpdf(z))
    expected = integrate.quad(integrand, mean - 12 * std, mean + 12 * std, epsabs=1e-10)[0]
    actual = kl_divergence(torch.tensor([[mean, 0.0]]).double(), torch.tensor([[std, 1.0]]).double())
    assert actual.item() == pytest.approx(expected, abs=1e-6)


def test_kl_against_monte_carlo():
    torch.manual_seed(0)
    mean, std = torch.randn(3, 5), torch.rand(3, 5) + 0.2
    z = mean + std * torch.randn(200_000, 3, 5)
    log_ratio = stats.norm.logpdf(z, mean, std) - stats.norm.logpdf(z)
    error = log_ratio.sum(-1).std(0) / 200_000 ** 0.5
    assert np.all(np.abs(log_ratio.sum(-1).mean(0) - kl_divergence(mean, std).numpy()) < 5 * error)


def test_log_p_x_given_z_against_scipy():
    x, logits = binary_images(4), 3 * torch.randn(4, 784, generator=torch.Generator().manual_seed(1))
    expected = stats.bernoulli.logpmf(x.numpy(), logits.double().sigmoid().numpy()).sum(1)
    assert log_p_x_given_z(x, logits).numpy() == pytest.approx(expected, rel=1e-5)
    extreme = torch.full((1, 784), 200.0)  # sigmoid is 1 in float32: only logits survive
    assert log_p_x_given_z(torch.zeros(1, 784), extreme).item() == pytest.approx(-784 * 200)


@pytest.mark.parametrize("z_dim", [2, 20])
def test_shapes_and_ranges(z_dim):
    x = binary_images(3)
    mean, std = randomized(Encoder(z_dim=z_dim))(x)
    assert mean.shape == std.shape == (3, z_dim) and (std > 0).all()
    means = randomized(Decoder(z_dim=z_dim))(mean)
    assert means.shape == (3, 784) and (means > 0).all() and (means < 1).all()
    model = VAE(hidden_dim=30, z_dim=z_dim)
    assert model(x).shape == ()
    sampled_ims, im_means = model.sample(5)
    assert sampled_ims.shape == im_means.shape == (5, 784) and set(sampled_ims.unique().tolist()) == {0.0, 1.0}


def test_samples_are_bernoulli_draws_with_the_means_that_are_returned():
    model = randomized(VAE(z_dim=2), scale=0.15)
    sampled_ims, im_means = model.sample(3000, torch.Generator().manual_seed(0))
    z_scores = (sampled_ims - im_means).sum(0) / (im_means * (1 - im_means)).sum(0).sqrt()  # per pixel, N(0, 1)
    assert im_means.std() > 0.1 and abs(z_scores.mean()) < 0.2 and 0.9 < z_scores.std() < 1.1
    assert torch.equal(sampled_ims, model.sample(3000, torch.Generator().manual_seed(0))[0])


def test_elbo_with_means_one_half_is_784_log_2_plus_kl():
    model, x = randomized(VAE()), binary_images(50)
    last = [m for m in model.decoder.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))][-1]
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.zeros_(last.bias)
    kl = kl_divergence(*model.encoder(x)).mean().item()
    assert kl > 0.1
    assert model(x).item() == pytest.approx(784 * math.log(2) + kl, rel=1e-6)
    assert VAE()(x).item() == pytest.approx(784 * math.log(2), rel=0.05)  # untrained: nearly so


def test_elbo_is_an_unbiased_estimate():
    """The scalar that is trained on, averaged over noise, is E_q log p(x|z) - KL; E_q here by quadrature over z."""
    model, x = randomized(VAE(z_dim=1), scale=0.15), binary_images(1)
    mean, std = model.encoder(x)
    eps = torch.linspace(-7, 7, 4001).unsqueeze(1)
    with torch.no_grad():
        recon = log_p_x_given_z(x.expand(4001, -1), model.decoder.logits(mean + std * eps))
        weights = torch.exp(-0.5 * eps[:, 0] ** 2) / math.sqrt(2 * math.pi) * 14 / 4000
        expected = -((recon * weights).sum() - kl_divergence(mean, std)).item()
        losses = torch.stack([model(x.expand(500, -1)) for _ in range(20)])
    assert losses.mean().item() == pytest.approx(expected, abs=5 * losses.std().item() / 20 ** 0.5)
    assert recon.std() > 0.1  # the test is not about a constant


def test_importance_weighted_bound_tightens_to_the_exact_log_likelihood():
    """With one latent dimension log p(x) can be integrated: ELBO = the k=1 bound on average < k=5 < k=1000 = exact."""
    torch.manual_seed(0)
    model, x = randomized(VAE(hidden_dim=20, z_dim=1), seed=1, scale=0.16), binary_images(1)
    z = torch.linspace(-8, 8, 2001).unsqueeze(1)
    with torch.no_grad():
        log_joint = log_p_x_given_z(x.expand(2001, -1), model.decoder.logits(z)) \
            + torch.from_numpy(stats.norm.logpdf(z[:, 0].numpy()))
    exact = (log_joint.logsumexp(0) + math.log(16 / 2000)).item()
    many = evaluate(model, x.expand(4, -1), 1000)
    elbo, gap = many["test_elbo"], exact - many["test_elbo"]
    one, five = (evaluate(model, x.expand(400, -1), k)["test_log_px"] for k in (1, 5))  # averages over 400 draws
    assert gap > 0.5  # there is something to close
    assert one == pytest.approx(elbo, abs=0.3 * gap)
    assert elbo < five < many["test_log_px"] == pytest.approx(exact, abs=0.05 * gap)


def test_evaluate_terms_and_skipping_the_bound():
    model, x = randomized(VAE()), binary_images(7)
    scores = evaluate(model, x.to(torch.uint8), 0)
    assert scores["test_log_px"] is None
    assert scores["test_elbo"] == pytest.approx(scores["test_log_p_x_given_z"] - scores["test_kl"])
    assert scores["test_kl"] == pytest.approx(kl_divergence(*model.encoder(x)).mean().item(), rel=1e-5)


def test_gradients_reach_the_encoder_through_the_reparametrization():
    model = randomized(VAE())
    mean, std = model.encoder(binary_images(4))
    z = mean + std * torch.randn_like(std)
    log_p_x_given_z(binary_images(4), model.decoder.logits(z)).sum().backward()  # without the KL
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.encoder.parameters())


class AverageOfPixels(torch.nn.Module):
    """A stand-in whose loss is the batch's mean."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.weight * x.mean()


def test_epoch_average_is_weighted_by_batch_size():
    model = AverageOfPixels().eval()
    data = [torch.full((4, 784), 1.0), torch.full((1, 1, 28, 28), 6.0)]
    assert epoch_iter(model, data, None) == pytest.approx(-(4 * 1 + 1 * 6) / 5)
    assert epoch_iter(model, data[1:], None, losses=[(1.0, 4)]) == pytest.approx(-2)  # completes an interrupted pass
    assert model.weight.grad is None


def test_run_epoch_trains_on_the_first_and_measures_on_the_second():
    model = AverageOfPixels()
    data = [torch.full((2, 784), 1.0)], [torch.full((2, 784), 1.0)]
    train_elbo, val_elbo = run_epoch(model, data, torch.optim.SGD(model.parameters(), lr=0.25))
    assert (train_elbo, val_elbo, model.weight.item()) == (-1, -0.75, 0.75) and not model.training


def test_shift_some_moves_a_share_of_the_images_by_up_to_a_pixel():
    x = torch.zeros(900, 28, 28, dtype=torch.uint8)
    x[:, 10, 12] = 1
    moved = shift_some(x.flatten(1), 0.5, torch.Generator().manual_seed(0)).view(-1, 28, 28)
    assert moved.sum() == 900 and moved[:, 9:12, 11:14].sum() == 900 and x[:, 10, 12].all()
    assert moved[:, 10, 12].sum() == 450 + 50  # (0, 0) is one of the nine moves
    assert moved.sum(0)[9:12, 11:14].min() == 50
    again = shift_some(x.flatten(1), 0.5, torch.Generator().manual_seed(0))
    assert torch.equal(again, moved.flatten(1))


def test_it_learns():
    torch.manual_seed(0)
    model, x = VAE(), binary_images(8)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    model.train()
    curve = [epoch_iter(model, [x], optimizer) for _ in range(80)]
    assert curve[0] < -500 and curve[-1] > -330  # random pixels: 784 * entropy(0.2) = 392 nats, unless memorised


# ---------------------------------------------------------------------------------------------------- the script

FILES = {"samples_start.png", "samples_half.png", "samples_end.png", "elbo.png", "reconstructions.png", "metrics.csv",
         "results.json", "checkpoint.pt", "best.pt"}


def png_size(path):
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    return struct.unpack(">II", content[16:24])


def main(*args):
    """Run main in this process -> exit status."""
    try:
        a3_vae.main([str(arg) for arg in args])
    except SystemExit as stop:
        return stop.code or 0
    return 0


def dry_flags(out_dir, data_dir, *more):
    return ["--dry_run", "--dataset", "glyphs", "--data_dir", data_dir, "--out_dir", out_dir, "--iw_samples", 2,
            "--batch_size", 32, "--device", "cpu", *more]


def dry_run(out_dir, data_dir, *more):
    return main(*dry_flags(out_dir, data_dir, *more))


def one_line(capsys):
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("a3_vae.py: error: ")
    return err


def resume(path, data_dir, *more):
    return main("--resume", path, "--data_dir", data_dir, "--device", "cpu", *more)


def assert_same_run(folder_a, folder_b):
    """Both runs ended in the same state, bit for bit: weights, optimizer, random state, curves, test results."""
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
    assert (a["test_elbo"], a["test_log_px"], a["best_epoch"]) == (b["test_elbo"], b["test_log_px"], b["best_epoch"])


@pytest.fixture(autouse=True)
def coarse_figures(monkeypatch):
    """Of all tests but those of `finished`: else drawing is what takes the time."""
    monkeypatch.setitem(a3_vae.PRINT, "savefig.dpi", 50)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, glyphs_dir):
    """The folder of a finished dry run with --zdim 2."""
    folder = tmp_path_factory.mktemp("finished")
    assert dry_run(folder, glyphs_dir, "--zdim", 2) == 0
    return folder


def test_a_run_leaves_what_is_promised(finished):
    assert {path.name for path in finished.iterdir()} == FILES | {"manifold.png"}
    for path in finished.glob("*.png"):
        assert min(png_size(path)) > 400, path
    results = json.loads((finished / "results.json").read_text())
    for key in ("dataset", "seed", "epochs", "device", "parameters", "train_seconds", "images_per_s", "peak_memory_mb",
                "test_elbo", "test_log_px", "binarization", "iw_samples", "dataset_md5", "versions", "wall_seconds"):
        assert results[key] is not None, key
    assert results["dataset"] == "glyphs" and results["flags"]["zdim"] == 2 and results["test_elbo"] < 0
    assert results["test_elbo"] < results["test_log_px"] < 0
    with open(finished / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert list(rows[0]) == ["epoch", "train_elbo", "val_elbo", "seconds", "images_per_s", "learning_rate"]


def test_from_another_folder_with_every_flag_then_sample(tmp_path, glyphs_dir, monkeypatch):
    status, stdout, stderr = run_script(
        "a3_vae.py", "--zdim", 3, "--epochs", 1, "--batch_size", 64, "--lr", 1e-3, "--seed", 7, "--device", "cpu",
        "--iw_samples", 0, "--dataset", "glyphs", "--data_dir", glyphs_dir, "--out_dir", "run", "--dry_run",
        cwd=tmp_path)
    assert status == 0, stderr
    assert "glyphs, not MNIST" in stdout
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 2  # a header and one epoch
    monkeypatch.chdir(tmp_path)
    assert main("--resume", "run/checkpoint.pt", "--sample", 12, "--out_dir", "elsewhere") == 0
    samples = np.load(tmp_path / "elsewhere" / "samples.npz")["samples"]
    assert samples.dtype == np.uint8 and samples.shape == (12, 28, 28) and set(np.unique(samples)) == {0, 255}
    width, height = png_size(tmp_path / "elsewhere" / "samples.png")
    assert 25 < height < 0.3 * width  # two rows of ten leave no gap under the title


def test_help_names_every_flag_and_its_default(capsys):
    assert main("-h") == 0
    text = capsys.readouterr().out
    for flag in ("--zdim", "--epochs", "--batch_size", "--lr", "--seed", "--device", "--dataset", "--data_dir",
                 "--out_dir", "--resume", "--sample", "--dry_run", "--iw_samples"):
        assert flag in text
    assert text.count("default") >= 10


def test_offline_it_goes_on_with_glyphs_and_says_so_everywhere(tmp_path, glyphs_dir, offline, monkeypatch, capsys):
    monkeypatch.setattr(datasets.tempfile, "tempdir", str(tmp_path))
    assert main("--dry_run", "--data_dir", glyphs_dir, "--device", "cpu", "--iw_samples", 0) == 0
    out, err = capsys.readouterr()
    folder, = tmp_path.glob("a3_vae_*")
    results = json.loads((folder / "results.json").read_text())
    assert "NO MNIST" in err and "no network" in err and results["dataset"] == "glyphs"
    lines = [line for line in out.splitlines() if not line.startswith(("epoch", "downloading"))]
    assert len(lines) == 5 and all("[glyphs, not MNIST]" in line for line in lines)


def test_glyphs_do_not_replace_results_on_mnist(tmp_path, glyphs_dir, capsys):
    (tmp_path / "results.json").write_text(json.dumps({"dataset": "mnist"}, indent=2))
    assert dry_run(tmp_path, glyphs_dir) == 1
    assert "must not replace" in one_line(capsys) and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("updates", [1, 2, 3, 9, 10, 11, 20])
def test_any_number_of_updates(tmp_path, glyphs_dir, updates, monkeypatch):
    def no_training(model, data, optimizer, averaged, on_step, losses):
        for batch in data[0]:
            losses.append((2.0, len(batch)))
            optimizer.step()  # without gradients: nothing, but the schedule expects it
            on_step()
        return -2.0, -3.0
    monkeypatch.setattr(a3_vae, "run_epoch", no_training)
    monkeypatch.setattr(a3_vae, "evaluate", lambda *args: {"test_elbo": 0, "test_log_p_x_given_z": 0, "test_kl": 0})
    for name in ("save_samples", "save_reconstructions", "save_elbo_plot"):
        monkeypatch.setattr(a3_vae, name, lambda *args: None)
    assert main("--dataset", "glyphs", "--data_dir", glyphs_dir, "--out_dir", tmp_path, "--device", "cpu",
                "--epochs", 1, "--iw_samples", 0, "--batch_size", math.ceil(50_000 / updates)) == 0
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["schedule"]["last_epoch"] == updates


def test_load_model_gives_the_best_averaged_weights(finished):
    best = torch.load(finished / "checkpoint.pt", weights_only=True)["best"]["model"]
    for name in ("best.pt", "checkpoint.pt"):
        model = load_model(finished / name)
        assert not model.training and model.z_dim == 2
        assert all(torch.equal(value, best[key]) for key, value in model.state_dict().items())


def test_averaged_weights_follow_their_formula(tmp_path, glyphs_dir, monkeypatch):
    trail = []
    forward = VAE.forward

    def spy(model, x):
        if model.training:
            trail.append([p.detach().clone() for p in model.parameters()])
        return forward(model, x)
    monkeypatch.setattr(VAE, "forward", spy)
    assert dry_run(tmp_path, glyphs_dir) == 0
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    trail.append(list(checkpoint["model"].values()))
    average = trail[0]
    for n, weights in enumerate(trail[1:], 1):
        decay = min(0.999, (1 + n) / (10 + n))
        average = [decay * a + (1 - decay) * w for a, w in zip(average, weights)]
    for expected, actual in zip(average, checkpoint["averaged"].values()):
        assert torch.allclose(expected, actual, atol=1e-6)


@pytest.mark.parametrize("batch, number", [(2, signal.SIGINT), (3, signal.SIGTERM), (6, signal.SIGINT)])
def test_resumed_run_equals_an_uninterrupted_one(finished, tmp_path, glyphs_dir, monkeypatch, batch, number, capsys):
    """A signal in the middle of an epoch, in an epoch's last batch, or in the last batch of all (3 per epoch)."""
    calls, forward = [], VAE.forward

    def interrupted(model, x):
        calls.extend([1] * model.training)
        if model.training and len(calls) == batch:
            signal.raise_signal(number)
        return forward(model, x)
    monkeypatch.setattr(VAE, "forward", interrupted)
    assert dry_run(tmp_path, glyphs_dir, "--zdim", 2) == 128 + number
    assert "--resume" in capsys.readouterr().err
    assert not (tmp_path / "results.json").exists() and len(calls) == batch
    monkeypatch.setattr(VAE, "forward", forward)
    assert resume(tmp_path / "checkpoint.pt", glyphs_dir) == 0
    assert_same_run(tmp_path, finished)


def test_a_new_run_does_not_replace_one_that_is_not_finished(finished, tmp_path, glyphs_dir, capsys):
    for name in ("checkpoint.pt", "metrics.csv"):
        shutil.copy(finished / name, tmp_path)
    assert dry_run(tmp_path, glyphs_dir, "--seed", 1) == 1
    assert "--resume" in one_line(capsys)
    assert (tmp_path / "checkpoint.pt").read_bytes() == (finished / "checkpoint.pt").read_bytes()
    assert resume(tmp_path, glyphs_dir) == 0  # by its folder
    assert dry_run(tmp_path, glyphs_dir, "--seed", 1) == 0  # it is finished now


def test_an_interruption_does_not_touch_the_best_epoch(tmp_path, glyphs_dir, monkeypatch):
    """Epoch 1 is made the best; an interruption in epoch 2 must leave best.pt as epoch 1 left it."""
    calls, forward = [], VAE.forward

    def interrupted(model, x):
        calls.extend([1] * model.training)
        if model.training and len(calls) == 5:
            signal.raise_signal(signal.SIGINT)
        return forward(model, x)
    monkeypatch.setattr(VAE, "forward", interrupted)
    assert dry_run(tmp_path, glyphs_dir) == 130
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    assert best["losses"] == [] and best["epoch"] == best["best"]["epoch"] == 1
    assert len(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["losses"]) == 2


def test_same_seed_same_numbers_and_another_seed_others(finished, tmp_path, glyphs_dir):
    assert dry_run(tmp_path / "same", glyphs_dir, "--zdim", 2) == 0
    assert_same_run(tmp_path / "same", finished)
    assert dry_run(tmp_path / "other", glyphs_dir, "--zdim", 2, "--seed", 1) == 0
    weights, others = (torch.load(folder / "checkpoint.pt", weights_only=True)["model"].values()
                       for folder in (finished, tmp_path / "other"))
    assert not any(torch.equal(a, b) for a, b in zip(weights, others) if a.dim() > 1)
    start, other = (tmp_path / name / "samples_start.png" for name in ("same", "other"))
    assert start.read_bytes() != other.read_bytes()  # the weights at the start are others, too


def test_a_signal_to_a_real_process(tmp_path, glyphs_dir):
    """SIGTERM while it trains on all glyphs: it saves, and says how to go on."""
    process = start_script("a3_vae.py", "--dataset", "glyphs", "--device", "cpu", "--out_dir", "run",
                           "--data_dir", glyphs_dir, cwd=tmp_path)
    while not process.stdout.readline().startswith("epoch"):  # the header: training begins
        assert process.poll() is None, process.stderr.read()
    time.sleep(2)  # let it train a little
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert stderr.startswith(f"interrupted; to go on: {sys.executable} ") and stderr.count("\n") == 1
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert checkpoint["schedule"]["last_epoch"] > 0


def test_kill_9_while_a_checkpoint_is_written(finished, tmp_path, glyphs_dir):
    run_killed("a3_vae", *dry_flags(tmp_path, glyphs_dir, "--zdim", 2), cwd=tmp_path)
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
    ["--epochs", "0"], ["--epochs", "-3"], ["--epochs", "many"], ["--batch_size", "0"], ["--lr", "nan"], ["--lr", "0"],
    ["--zdim", "0"], ["--zdim", "1000000"], ["--seed", "-1"], ["--iw_samples", "-1"], ["--dataset", "cifar"],
    ["--device", "cuda:99"], ["--device", "toaster"], ["--device", "meta"], ["--sample", "5"], ["--unknown"],
    ["--epochs", "1000000000"], ["--lr", "1e9"], ["--lr", "-1"]])
def test_wrong_usage_exits_with_2_and_says_why(args, capsys):
    assert main(*args) == 2
    assert args[0] in one_line(capsys)


def test_resume_of_the_folder_one_is_in(finished, tmp_path, glyphs_dir, monkeypatch):
    shutil.copy(finished / "checkpoint.pt", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert resume(".", glyphs_dir, "--sample", 2) == 0  # "." is a name, too: not the default folder
    assert (tmp_path / "samples.npz").exists()


def test_resume_without_a_name_looks_in_the_default_folders(finished, tmp_path, glyphs_dir, monkeypatch):
    monkeypatch.setattr(datasets, "FIGURES", tmp_path)
    (tmp_path / "vae_z2_glyphs").mkdir()  # there is no vae_z2
    shutil.copy(finished / "checkpoint.pt", tmp_path / "vae_z2_glyphs")
    assert main("--zdim", 2, "--resume", "--sample", 2, "--device", "cpu") == 0
    assert (tmp_path / "vae_z2_glyphs" / "samples.npz").exists()


def test_resume_refuses_flags_that_would_change_the_run(finished, glyphs_dir, capsys):
    assert resume(finished / "checkpoint.pt", glyphs_dir, "--lr", 0.1, "--zdim", 20, "--out_dir", finished / "x") == 2
    assert "--zdim --lr --out_dir" in capsys.readouterr().err


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
    torch.save({"script": "a3_gan"}, tmp_path / "gan.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    checkpoint = torch.load(finished / "checkpoint.pt", weights_only=True)
    checkpoint["model"]["renamed"] = checkpoint["model"].popitem()[1]
    torch.save(checkpoint, tmp_path / "layers.pt")
    torch.save({"script": "a3_vae"}, tmp_path / "empty.pt")
    checkpoint = torch.load(finished / "checkpoint.pt", weights_only=True)
    torch.save(checkpoint | {"rows": Evil(tmp_path / "it ran")}, tmp_path / "code.pt")
    next(iter(checkpoint["averaged"].values())).view(-1)[0] = math.nan
    torch.save(checkpoint, tmp_path / "nan.pt")
    for name, words in (("truncated.pt", "truncated"), ("text.pt", "corrupt"), ("gan.pt", "a3_gan.py"),
                        ("list.pt", "not a checkpoint"), ("layers.pt", "this version"), ("empty.pt", "this version"),
                        ("code.pt", "not a checkpoint"),
                        ("nan.pt", "this version"), ("none.pt", "there is no")):
        assert resume(tmp_path / name, glyphs_dir) == 1
        err = one_line(capsys)
        assert words in err and name in err
        with pytest.raises(datasets.InputError):
            load_model(tmp_path / name)
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
    calls, forward = [], VAE.forward

    def diverging(model, x):
        calls.extend([1] * model.training)
        if ctrl_c and model.training and len(calls) == 5:
            signal.raise_signal(signal.SIGINT)  # in the middle of the epoch: its weights are bad already
        result = forward(model, x)
        if len(calls) >= 5 and where == "gradient":
            result.register_hook(lambda gradient: gradient * math.nan)  # the weights are, the loss is not
        return result * (math.nan if len(calls) >= 5 and where == "loss" else 1)
    monkeypatch.setattr(VAE, "forward", diverging)
    assert dry_run(tmp_path, glyphs_dir) == 1  # 3 batches per epoch: the fifth is in epoch 2
    err = one_line(capsys)
    assert "not finite" in err and "another --out_dir" in err and len(calls) == (5 if ctrl_c else 6)
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert checkpoint["epoch"] == 1 and all(p.isfinite().all() for p in checkpoint["model"].values())
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize("name", [
    "samples_start.png", "best.pt", "metrics.csv", "checkpoint.pt", "elbo.png", "results.json"])
def test_full_disk_is_one_line_and_the_run_can_go_on(finished, tmp_path, glyphs_dir, monkeypatch, capsys, name):
    """Whichever file cannot be written, the second time: if there is a checkpoint, it goes on from there."""
    replace, tried = datasets.os.replace, []

    def full(temporary, path):
        tried.append(path.name)
        if tried.count(name) == (2 if name in ("metrics.csv", "checkpoint.pt", "best.pt") else 1) and path.name == name:
            raise OSError(28, "No space left on device")
        replace(temporary, path)
    monkeypatch.setattr(datasets.os, "replace", full)
    assert dry_run(tmp_path, glyphs_dir, "--zdim", 2) == 1
    err = one_line(capsys)
    assert "No space left" in err and name in err and not list(tmp_path.glob("*.tmp"))
    monkeypatch.setattr(datasets.os, "replace", replace)
    if (tmp_path / "checkpoint.pt").exists():
        assert resume(tmp_path / "checkpoint.pt", glyphs_dir) == 0
        assert_same_run(tmp_path, finished)
        assert (tmp_path / "metrics.csv").read_text().count("\n") == 3
    else:
        assert name == "samples_start.png"


def test_missing_data_and_unusable_folder_are_one_line_and_exit_with_1(tmp_path, glyphs_dir, offline, capsys):
    assert main("--dataset", "mnist", "--data_dir", tmp_path / "empty") == 1
    assert "--data_dir" in one_line(capsys)
    (tmp_path / "file").write_text("not a folder")
    assert dry_run(tmp_path / "file" / "run", glyphs_dir) == 1
    assert "cannot write" in one_line(capsys)


def test_elbo_plot_as_the_template_calls_it(tmp_path):
    a3_vae.save_elbo_plot([-200.0], [-150.0], str(tmp_path / "one_epoch.pdf"))
    a3_vae.save_elbo_plot([-200.0, -110.0], [-150.0, -105.0], str(tmp_path / "elbo.pdf"))
    assert (tmp_path / "elbo.pdf").read_bytes().startswith(b"%PDF")


def test_manifold_covers_the_prior_by_its_percent_points(tmp_path):
    seen = []

    class Spy(VAE):
        def __init__(self):
            super().__init__(z_dim=2)
            self.decoder.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    a3_vae.save_manifold(Spy(), tmp_path / "manifold.png", n=20)
    u = stats.norm.cdf(seen[0].view(20, 20, 2))
    assert u[0, :, 0] == pytest.approx(np.linspace(0.01, 0.99, 20), abs=1e-6)  # z1 grows to the right
    assert u[:, 0, 1] == pytest.approx(np.linspace(0.99, 0.01, 20), abs=1e-6)  # z2 grows upwards


def test_torch_distributions_is_not_used():
    assert "torch.distributions" not in open(a3_vae.__file__).read()


@needs_mnist
def test_one_epoch_on_real_mnist(tmp_path):
    status, stdout, stderr = run_script("a3_vae.py", "--epochs", 1, "--iw_samples", 0, "--dataset", "mnist",
                                        "--data_dir", mnist_dir(), "--out_dir", tmp_path, cwd=tmp_path)
    assert status == 0, stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["dataset"] == "mnist" and -130 < results["test_elbo"] < -90
