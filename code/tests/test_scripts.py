"""The three scripts as programs: what a user types, what they write, and what goes wrong."""

import csv
import errno
import json
import math
import os
import runpy
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._pytree import tree_map

import a3_gan
import a3_nf
import a3_vae
import datasets
from conftest import CODE, mnist_dir, needs_mnist


@dataclass
class Script:
    module: ModuleType
    flags: list     # of its small runs
    setting: dict   # rebuilds the model
    files: set      # that it alone writes
    columns: list   # of metrics.csv
    curve: str      # the column by which the best epoch is chosen
    sign: int       # 1 if that column should be high, -1 if it should be low
    results: list   # entries of results.json that it alone has
    run_dir: str
    each_update: str    # a function of torch that is called in each update, and only there

    @property
    def name(self):
        return self.module.__name__

    @property
    def path(self):
        return CODE / f"{self.name}.py"


SCRIPTS = [
    Script(
        module=a3_vae,
        flags=["--zdim", 2, "--batch_size", 16],
        setting={"zdim": 2},
        files={"elbo.pdf", "manifold.png"},
        columns=["train_elbo", "val_elbo"],
        curve="val_elbo",
        sign=1,
        results=["test_elbo", "test_log_px", "binarization"],
        run_dir="vae_z2",
        each_update="torch.nn.utils.clip_grad_norm_"),
    Script(
        module=a3_gan,
        flags=["--latent_dim", 7, "--batch_size", 16, "--lr", 2e-3],
        setting={"latent_dim": 7},
        files={"losses.pdf", "interpolation.png", "mnist_generator.pt"},
        columns=["loss_D", "loss_G", "val_fid"],
        curve="val_fid",
        sign=-1,
        results=["fid", "reference", "coverage", "class_shares"],
        run_dir="gan",
        each_update="torch.Tensor.lerp_"),
    Script(
        module=a3_nf,
        flags=["--n_mixtures", 0, "--batch_size", 8],  # RealNVP, which draws samples faster
        setting={"n_mixtures": 0},
        files={"bpd.pdf"},
        columns=["train_bpd", "val_bpd"],
        curve="val_bpd",
        sign=-1,
        results=["test_bpd", "test_bpd_iw", "seconds_to_1_85"],
        run_dir="nf_affine",
        each_update="torch.nn.utils.clip_grad_norm_"),
]
FILES = {
    "samples_start.png",
    "samples_half.png",
    "samples_end.png",
    "metrics.csv",
    "results.json",
    "checkpoint.pt",
    "weights.pt",
}


@pytest.fixture(scope="session", params=SCRIPTS, ids=[script.name for script in SCRIPTS])
def script(request):
    return request.param


@pytest.fixture(scope="session")
def common(glyphs_dir):
    """Flags for a run on glyphs."""
    return ["--dataset", "glyphs", "--device", "cpu", "--data_dir", glyphs_dir]


@pytest.fixture
def fewer_draws(monkeypatch):
    """The VAE's importance-weighted bound with one sample, which is faster."""
    monkeypatch.setattr(a3_vae, "IW_SAMPLES", 1)


@pytest.fixture(scope="session")
def finished(script, common, tmp_path_factory):
    """The folder of a finished dry run, by a process in another working directory.

    The user has settings for matplotlib that would fail, and a console that knows no accents.
    """
    folder = tmp_path_factory.mktemp(script.name)
    (folder / "matplotlibrc").write_text("text.usetex: True\n")
    environment = {**os.environ, "MPLBACKEND": "inline", "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, script.path, "--dry_run", *common, *script.flags, "--out_dir", "run"]
    process = subprocess.run([*map(str, command)], cwd=folder, env=environment,
                             capture_output=True, text=True, timeout=300)
    assert process.returncode == 0
    assert process.stderr == ""
    return folder / "run"


def start(script, *argv):
    """Run it in this process, without what its last lines do about errors."""
    args = script.module.parse_args([*map(str, argv)])
    script.module.main(args)


def run(script, capsys, *argv):
    """Run it as a program, but in this process: the exit status and what it writes to stderr."""
    capsys.readouterr()
    status = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script.path.name, *map(str, argv)])
        try:
            runpy.run_path(str(script.path), run_name="__main__")
        except SystemExit as stop:
            status = stop.code or 0
    stderr = capsys.readouterr().err
    if isinstance(status, str):  # a message, which Python prints before it exits with status 1
        return 1, f"{stderr}{status}\n"
    return status, stderr


def fails(script, capsys, *argv):
    """Run it as a program; it must fail with one line, which is returned."""
    status, stderr = run(script, capsys, *argv)
    assert status == 1
    assert stderr.count("\n") == 1
    assert stderr.startswith(f"{script.path.name}: error: ")
    return stderr


def load(path):
    return torch.load(path, weights_only=True)


def results(folder):
    return json.loads((folder / "results.json").read_text())


def metrics(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def pixels_of(path):
    return np.asarray(Image.open(path)).astype(int)


MEASURED = "seconds", "images_per_s", "peak_memory_mb", "train_seconds", "seconds_to_1_85"


def is_same(a, b):
    """Bit for bit, but for times and memory."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        keys = a.keys() - set(MEASURED)
        return a.keys() == b.keys() and all(is_same(a[key], b[key]) for key in keys)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(is_same, a, b))
    both_are_nan = a != a and b != b
    return a == b or both_are_nan


def assert_same_run(folder_a, folder_b):
    for name in ("checkpoint.pt", "weights.pt"):
        assert is_same(load(folder_a / name), load(folder_b / name)), name
    assert is_same(results(folder_a), results(folder_b))
    for path in folder_a.glob("*.png"):
        assert path.read_bytes() == (folder_b / path.name).read_bytes(), path.name


# ----------------------------------------------------------------------------- what a run leaves
def test_a_run_leaves_its_files(script, finished):
    assert {path.name for path in finished.iterdir()} == FILES | script.files
    for path in finished.glob("*.png"):
        image = pixels_of(path)
        assert min(image.shape[:2]) > 80
        assert len(np.unique(image)) > 2
    for path in finished.glob("*.pdf"):
        assert path.read_bytes().startswith(b"%PDF")
        assert b"/Type3" not in path.read_bytes()  # fonts that publishers refuse


def test_metrics_have_a_row_for_each_epoch(script, finished):
    rows = metrics(finished)
    columns = ["epoch", *script.columns, "seconds", "images_per_s", "learning_rate"]
    assert list(rows[0]) == columns
    assert [row["epoch"] for row in rows] == ["1", "2"]
    for row in rows:
        assert all(math.isfinite(float(value)) for value in row.values())


def test_results_say_what_was_run(script, finished):
    found = results(finished)
    for key in ("dataset", "dataset_md5", "seed", "epochs", "device", "processor", "python",
                "torch", "parameters", "train_seconds", "images_per_s", "peak_memory_mb",
                "batch_size", "lr", *script.setting, *script.results):
        assert key in found
        assert found[key] is not None or key == "seconds_to_1_85"
    assert found["dataset"] == "glyphs"
    assert found["seed"] == 42
    assert found["epochs"] == 2
    assert found["device"] == "cpu"
    assert found["torch"] == torch.__version__
    assert 100 < found["peak_memory_mb"] < 20_000
    assert script.setting.items() <= found.items()
    model = script.module.load_model(finished / "weights.pt")
    key = "parameters_generator" if script.module is a3_gan else "parameters"
    assert found[key] == sum(p.numel() for p in model.parameters())


def test_results_agree_with_the_metrics(script, finished):
    found = results(finished)
    rows = metrics(finished)
    seconds = sum(float(row["seconds"]) for row in rows)
    assert found["train_seconds"] == pytest.approx(seconds, rel=1e-6)
    curve = [float(row[script.curve]) for row in rows]
    best = max(curve, key=lambda value: script.sign * value)
    assert found["best_epoch"] == curve.index(best) + 1
    assert found[script.curve] == pytest.approx(best, rel=1e-6)


def test_load_model_takes_both_files(script, finished):
    for name in ("checkpoint.pt", "weights.pt"):
        model = script.module.load_model(finished / name)
        content = load(finished / name)
        assert not model.training
        assert is_same(dict(model.state_dict()), content["best"])
        assert script.setting.items() <= content.items()
    assert content.keys() == {"format", "best", *script.setting}  # no more than rebuilds the model
    if script.module is a3_gan:
        assert is_same(load(finished / "mnist_generator.pt"), content["best"])


def test_best_weights_are_those_of_the_best_epoch(
        script, common, tmp_path, monkeypatch, fewer_draws):
    """The first of two epochs is made the best one, after which the weights must be kept."""
    monkeypatch.setattr(a3_gan, "FID_EVERY", 1)
    if script.module is a3_gan:
        # epochs 1 and 2; then, in the test, the samples and the validation images
        values = iter([5.0, 7.0, 1.0, 2.0])
        monkeypatch.setattr(
            a3_gan, "frechet_distance_per_set", lambda real, fake: np.array([next(values)]))
    else:
        values = iter([5.0, 5.0 - 2 * script.sign])
        run_epoch = script.module.run_epoch

        def run_epoch_with_other_value(*args):
            train_value, _ = run_epoch(*args)
            return train_value, next(values)
        monkeypatch.setattr(script.module, "run_epoch", run_epoch_with_other_value)
    start(script, "--dry_run", *common, *script.flags, "--out_dir", tmp_path)
    assert results(tmp_path)["best_epoch"] == 1
    assert results(tmp_path)[script.curve] == 5
    last = load(tmp_path / "checkpoint.pt")
    assert is_same(last["best"], load(tmp_path / "weights.pt")["best"])
    current = last["model"] if script.module is a3_nf else last["averaged"]
    assert not is_same(last["best"], current)


def test_another_seed_gives_other_weights_and_pictures(
        script, common, finished, tmp_path, fewer_draws):
    start(script, "--dry_run", *common, *script.flags, "--out_dir", tmp_path, "--seed", 1)
    a = load(finished / "checkpoint.pt")
    b = load(tmp_path / "checkpoint.pt")
    for part in {"model", "generator", "discriminator"} & a.keys():
        for key, weight in a[part].items():
            if key.endswith("weight") and weight.dim() > 1:
                assert not torch.equal(weight, b[part][key])
    pictures = [(folder / "samples_end.png").read_bytes() for folder in (finished, tmp_path)]
    assert pictures[0] != pictures[1]


# ------------------------------------------------------------------------ interrupted and resumed
KILLED = """
import os, pkgutil, runpy, signal, sys
from pathlib import Path
from unittest import mock
import torch
number, checkpoint, each_update, *sys.argv = sys.argv[1:]
original = pkgutil.resolve_name(each_update)
def original_or_die(*args):
    if Path(checkpoint).exists():
        os.kill(os.getpid(), int(number))
    return original(*args)
mock.patch(each_update, original_or_die).start()
sys.path.insert(0, os.path.dirname(sys.argv[0]))
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job ignores
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_killed(script, number, folder, *argv):
    """Run it as a program that gets a signal in the first update after there is a checkpoint."""
    checkpoint = folder / "checkpoint.pt"
    command = [sys.executable, "-c", KILLED, int(number), checkpoint, script.each_update,
               script.path, *argv, "--out_dir", folder]
    environment = {**os.environ}
    environment.pop("PYTHONUNBUFFERED", None)
    process = subprocess.run([*map(str, command)], env=environment,
                             capture_output=True, text=True, timeout=300)
    return process.returncode, process.stdout, process.stderr


def test_killed_again_and_again_it_ends_like_an_uninterrupted_run(
        script, common, finished, tmp_path):
    """Ctrl-C, SIGTERM and kill -9 in epoch 2. Flags given with --resume do not count."""
    status, _, stderr = run_killed(
        script, signal.SIGINT, tmp_path, "--dry_run", *common, *script.flags)
    assert status == 130
    assert stderr.count("\n") == 1
    assert f'--resume --out_dir "{tmp_path}" --data_dir "{common[-1]}"' in stderr
    for number in (signal.SIGTERM, signal.SIGKILL):
        assert len(load(tmp_path / "checkpoint.pt")["rows"]) == 1
        assert len(metrics(tmp_path)) == 1
        assert not (tmp_path / "results.json").exists()
        status, stdout, _ = run_killed(script, number, tmp_path, "--resume", *common)
        assert status == -number
        assert "parameters" in stdout  # what was printed is seen at once
    setting, value = script.flags[:2]
    others = [setting, value + 1, "--batch_size", 99, "--lr", 0.5, "--seed", 7, "--epochs", 1]
    start(script, "--resume", *common, "--out_dir", tmp_path, *others)
    assert_same_run(tmp_path, finished)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_run_goes_on_where_tensors_have_another_memory_format(
        script, common, finished, tmp_path):
    """A GPU can store them in another order, which must not mix up the moments of the weights."""
    save = torch.save

    def contiguous(x):
        return x.contiguous() if isinstance(x, torch.Tensor) else x

    def save_once(content, file):
        if (tmp_path / "checkpoint.pt").exists():
            raise KeyboardInterrupt  # in epoch 2
        save(tree_map(contiguous, content), file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", save_once)
        with pytest.raises(KeyboardInterrupt):
            start(script, "--dry_run", *common, *script.flags, "--out_dir", tmp_path)
    start(script, "--resume", *common, "--out_dir", tmp_path)
    assert_same_run(tmp_path, finished)


def test_a_resumed_run_says_which_settings_count(script, common, finished, tmp_path, capsys):
    shutil.copy(finished / "checkpoint.pt", tmp_path)
    start(script, "--resume", *common, "--out_dir", tmp_path, "--epochs", 9, "--seed", 7)
    printed = capsys.readouterr().out
    assert "the run continues with its own settings" in printed
    assert "'epochs': 2" in printed
    assert "'seed': 42" in printed
    setting, value = script.flags[:2]
    assert f"'{setting.lstrip('-')}': {value}" in printed


def test_two_runs_in_one_folder_each_test_their_own_model(
        script, common, finished, tmp_path, monkeypatch):
    """Between the epochs of one, the other begins and ends."""
    write_metrics = script.module.write_metrics
    argv = ["--dry_run", *common, *script.flags, "--out_dir", tmp_path]
    others = []

    def write_and_run_another(rows, path):
        write_metrics(rows, path)
        if not others:
            others.append("begun")
            start(script, *argv, "--seed", 7, "--epochs", 1)
            others.append(load(tmp_path / "weights.pt"))
    monkeypatch.setattr(script.module, "write_metrics", write_and_run_another)
    start(script, *argv)
    weights = load(tmp_path / "weights.pt")
    assert is_same(weights, load(finished / "weights.pt"))
    assert is_same(results(tmp_path), results(finished))
    assert not is_same(weights, others[1])


def test_ctrl_c_before_there_is_a_checkpoint_promises_nothing(
        script, common, tmp_path, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt
    monkeypatch.setattr(script.each_update, interrupt)  # in the first update
    status, stderr = run(
        script, capsys, "--dry_run", *common, *script.flags, "--out_dir", tmp_path)
    assert status == 130
    assert stderr == "interrupted\n"


def test_ctrl_c_before_a_run_begins_does_not_promise_to_continue_another(
        script, capsys, tmp_path, monkeypatch):
    """The default folder has an unfinished run, but this one would get a temporary folder."""
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt
    monkeypatch.setattr(Path, "exists", lambda self: self.name == "checkpoint.pt")
    monkeypatch.setattr(datasets, "load_glyphs", interrupt)
    status, stderr = run(script, capsys, "--dry_run", "--dataset", "glyphs", "--device", "cpu")
    assert status == 130
    assert stderr == "interrupted\n"


def test_ctrl_c_over_a_finished_run_does_not_promise_to_continue_that_one(
        script, common, finished, tmp_path, capsys, monkeypatch):
    for name in ("checkpoint.pt", "results.json"):
        shutil.copy(finished / name, tmp_path)

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt
    monkeypatch.setattr(script.each_update, interrupt)
    status, stderr = run(
        script, capsys, "--dry_run", *common, *script.flags, "--out_dir", tmp_path)
    assert status == 130
    assert stderr == "interrupted\n"


def test_a_write_that_breaks_off_leaves_a_checkpoint_that_loads(
        script, common, tmp_path, monkeypatch, fewer_draws):
    save = torch.save
    writes = []

    def break_off(content, file):
        writes.append(file)
        if len(writes) == 2:  # the checkpoint of epoch 2
            Path(file).write_bytes(b"PK\x03\x04 half of it")
            raise KeyboardInterrupt
        save(content, file)
    monkeypatch.setattr(torch, "save", break_off)
    with pytest.raises(KeyboardInterrupt):
        start(script, "--dry_run", *common, *script.flags, "--out_dir", tmp_path)
    script.module.load_model(tmp_path / "checkpoint.pt")
    assert len(load(tmp_path / "checkpoint.pt")["rows"]) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot limit the size of files")
def test_a_full_disk_is_an_error_that_names_the_file(script, tmp_path):
    """A limit of the size of files stands for the disk's."""
    import resource
    path = tmp_path / "checkpoint.pt"
    script.module.save({"old": 1}, path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"checkpoint.pt cannot be written .*is the disk full\?"):
            script.module.save({"new": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load(path) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_of_the_disk_names_the_folder(script, common, tmp_path, capsys, monkeypatch):
    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(csv, "DictWriter", fail)
    err = fails(script, capsys, "--dry_run", *common, *script.flags, "--out_dir", tmp_path)
    assert f"No space left on device, in {tmp_path}" in err


def test_a_new_run_keeps_the_checkpoint_of_an_unfinished_one(
        script, common, finished, tmp_path, capsys, fewer_draws):
    shutil.copy(finished / "checkpoint.pt", tmp_path)
    argv = ["--dry_run", *common, *script.flags, "--out_dir", tmp_path, "--epochs", 1]
    start(script, *argv, "--seed", 5)
    assert "unfinished" in capsys.readouterr().err
    kept, = tmp_path.glob("checkpoint-*.pt")
    assert kept.read_bytes() == (finished / "checkpoint.pt").read_bytes()
    assert kept.read_bytes() != (tmp_path / "checkpoint.pt").read_bytes()
    start(script, *argv)  # over a finished one
    assert capsys.readouterr().err == ""
    assert len(list(tmp_path.glob("checkpoint-*.pt"))) == 1


def test_a_loss_that_is_not_finite_ends_the_run_with_one_line(
        script, common, tmp_path, monkeypatch, capsys):
    def spoil(weights, *args):
        if (tmp_path / "checkpoint.pt").exists():  # in epoch 2
            tensors = [weights] if isinstance(weights, torch.Tensor) else weights
            for tensor in tensors:
                tensor.data.fill_(math.nan)
    monkeypatch.setattr(script.each_update, spoil)
    err = fails(script, capsys, "--dry_run", *common, *script.flags, "--out_dir", tmp_path)
    assert "epoch 2" in err
    assert "not finite" in err
    model = script.module.load_model(tmp_path / "checkpoint.pt")
    assert all(p.isfinite().all() for p in model.parameters())
    assert len(load(tmp_path / "checkpoint.pt")["rows"]) == 1
    assert not (tmp_path / "results.json").exists()


# ----------------------------------------------------------------------------------- command line
def draw(script, capsys, folder, seed):
    """The samples of --sample 5."""
    argv = ["--sample", 5, "--device", "cpu", "--out_dir", folder, "--seed", seed]
    assert run(script, capsys, *argv) == (0, "")
    with np.load(folder / "samples.npz") as arrays:
        return arrays["samples"]


def test_sample_needs_nothing_but_weights(script, finished, tmp_path, capsys):
    shutil.copy(finished / "weights.pt", tmp_path)
    other = draw(script, capsys, tmp_path, seed=1)
    samples = draw(script, capsys, tmp_path, seed=42)
    again = draw(script, capsys, tmp_path, seed=42)
    assert samples.dtype == np.uint8
    assert samples.shape == (5, 28, 28)
    assert samples.std() > 10
    assert np.array_equal(samples, again)
    assert not np.array_equal(samples, other)
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"weights.pt", "samples.npz", "samples.png"}

    picture = 255 - pixels_of(tmp_path / "samples.png")[..., 0]
    for i, sample in enumerate(samples):  # 84 pixels each, and 2 between them
        left = 86 * i + 2
        shown = picture[2:86, left:left + 84]
        assert np.array_equal(shown, sample.repeat(3, axis=0).repeat(3, axis=1))


def test_committed_weights_draw_the_committed_samples(script, tmp_path):
    args = script.module.parse_args(["--device", "cpu"])
    folder = script.module.run_dir(args)
    model = script.module.load_model(folder / "weights.pt")
    script.module.save_samples(model, tmp_path / "samples_end.png")
    drawn = pixels_of(tmp_path / "samples_end.png")
    committed = pixels_of(folder / "samples_end.png")
    assert (abs(drawn - committed) > 4).mean() < 0.003  # rounding differs between machines


def test_help_is_grouped_and_shows_defaults(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script.module.parse_args(["-h"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())  # as if there were no ends of lines
    for flag in ("--epochs", "--batch_size", "--lr", "--seed", "--device", "--dataset",
                 "--data_dir", "--out_dir", "--dry_run", "--resume", "--sample", script.flags[0]):
        assert flag in text
    assert "model and training:" in text
    assert text.count("(default: ") >= 7
    defaults = script.module.parse_args([])
    assert f"(default: {defaults.lr}" in text
    assert defaults.seed == 42
    assert defaults.epochs == {a3_vae: 40, a3_gan: 200, a3_nf: 16}[script.module]
    assert script.module.parse_args(["--n_epochs", "3"]).epochs == 3


@pytest.mark.parametrize("argv", [
    ["--epochs", "0"],
    ["--epochs", "-3"],
    ["--epochs", "many"],
    ["--epochs", "100000000000"],
    ["--batch_size", "0"],
    ["--lr", "nan"],
    ["--lr", "0"],
    ["--lr", "inf"],
    ["--seed", "-1"],
    ["--sample", "0"],
    ["--dataset", "cifar"],
    ["--device", "cuda:99"],
    ["--device", "toaster"],
    ["--device", "meta"],
    ["--unknown"],
    ["--zdim", "-1"],
    ["--latent_dim", "-1"],
    ["--n_mixtures", "-1"],
], ids=" ".join)
def test_a_bad_flag_is_named_in_one_line(script, capsys, argv, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script.path.name])
    with pytest.raises(SystemExit) as stop:
        script.module.parse_args(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.count("\n") == 1
    assert argv[0] in err
    assert "error: " in err


def test_a_gpu_that_does_not_work_is_not_used_unless_somebody_asks(script, capsys, monkeypatch):
    def zeros(*size, device):
        if device == "cuda":
            raise RuntimeError("CUDA error: no kernel image is available\nfor this device")
        return torch.tensor([0.0])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", zeros)
    assert script.module.parse_args([]).device == "cpu"
    err = capsys.readouterr().err
    fault = "CUDA error: no kernel image is available"
    assert err == f"cuda cannot be used, using the CPU instead: {fault}\n"
    with pytest.raises(SystemExit) as stop:
        script.module.parse_args(["--device", "cuda"])
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.count("\n") == 1
    assert "no kernel image is available" in err
    assert "--device cpu" in err


@pytest.mark.parametrize("error", [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    RuntimeError("MPS backend out of memory (MPS allocated: 5.05 GB).")], ids=["cuda", "mps"])
def test_a_gpu_without_memory_is_one_line(script, common, tmp_path, capsys, monkeypatch, error):
    def fail(*args):
        raise error
    monkeypatch.setattr(script.each_update, fail)
    err = fails(script, capsys, "--dry_run", *common, *script.flags, "--out_dir", tmp_path)
    assert "out of memory" in err
    assert "--batch_size" in err


def test_folders_can_begin_with_a_tilde(script, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = script.module.parse_args(["--data_dir=~/a", "--out_dir=~/b"])
    assert args.data_dir == tmp_path / "a"
    assert args.out_dir == tmp_path / "b"
    assert script.module.parse_args(["--out_dir=~nobody-here/c"]).out_dir.name == "c"


class Evil:
    """Its pickle creates a file when it is loaded without weights_only=True."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", [
    "missing", "truncated", "text", "empty", "a list", "of another script", "without a format",
    "of a later version", "hostile"])
def test_a_bad_checkpoint_is_one_line_and_runs_no_code(
        script, common, finished, tmp_path, capsys, kind):
    good = load(finished / "checkpoint.pt")
    other_script = SCRIPTS[SCRIPTS.index(script) - 1]
    contents = {
        "a list": [1, 2],
        "of another script": good | {"format": other_script.module.FORMAT},
        "without a format": {"best": {}},
        "of a later version": good | {"format": "a3 99"},
        "hostile": good | {"rows": Evil(tmp_path / "it ran")},
    }
    raw = {
        "truncated": (finished / "checkpoint.pt").read_bytes()[:-2000],
        "text": b"hello",
        "empty": b"",
    }
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("checkpoint.pt", "weights.pt"):
        if kind in raw:
            (folder / name).write_bytes(raw[kind])
        elif kind in contents:
            torch.save(contents[kind], folder / name)
    before = sorted(folder.iterdir())
    err = fails(script, capsys, "--resume", *common, "--out_dir", folder)
    assert str(folder / "checkpoint.pt") in err
    err = fails(script, capsys, "--sample", 5, "--out_dir", folder)
    assert str(folder / "weights.pt") in err
    with pytest.raises(OSError):
        script.module.load_model(folder / "checkpoint.pt")
    assert sorted(folder.iterdir()) == before
    assert not (tmp_path / "it ran").exists()


def test_a_run_does_not_go_on_with_other_images(script, common, finished, tmp_path, capsys):
    checkpoint = load(finished / "checkpoint.pt")
    checkpoint["settings"]["dataset_md5"] = "0"
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    err = fails(script, capsys, "--resume", *common, "--out_dir", tmp_path)
    assert "other images" in err


def test_mnist_by_name_without_a_network_is_one_line(script, tmp_path, offline, capsys):
    err = fails(script, capsys, "--dataset", "mnist", "--data_dir", tmp_path / "empty",
                "--out_dir", tmp_path / "run", "--device", "cpu")
    assert "no network" in err
    assert "--dataset glyphs" in err
    assert not (tmp_path / "run").exists()


def test_without_a_network_a_dry_run_uses_glyphs_and_a_temporary_folder(
        script, glyphs_dir, tmp_path, offline, monkeypatch, capsys, fewer_draws):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    start(script, "--dry_run", "--data_dir", glyphs_dir, "--device", "cpu", "--epochs", 1,
          *script.flags)
    assert "NO MNIST" in capsys.readouterr().err
    folder, = tmp_path.iterdir()
    assert results(folder)["dataset"] == "glyphs"
    assert len(results(folder)["dataset_md5"]) == 32


@pytest.mark.parametrize("dataset, suffix", [("auto", ""), ("mnist", ""), ("glyphs", "_glyphs")])
def test_glyphs_have_a_folder_of_their_own(script, dataset, suffix):
    argv = [*script.flags, "--dataset", dataset, "--device", "cpu"]
    args = script.module.parse_args([*map(str, argv)])
    figures = CODE.parent / "report" / "figures"
    assert script.module.run_dir(args) == figures / (script.run_dir + suffix)


def test_out_dir_names_the_folder(script):
    args = script.module.parse_args(["--out_dir", "x", "--dataset", "glyphs"])
    assert script.module.run_dir(args) == Path("x")


# ------------------------------------------------------------------------------------- real MNIST
@needs_mnist
def test_the_vae_on_real_mnist(tmp_path, monkeypatch):
    monkeypatch.setattr(a3_vae, "IW_SAMPLES", 2)
    start(SCRIPTS[0], "--epochs", 1, "--dataset", "mnist", "--data_dir", mnist_dir(),
          "--out_dir", tmp_path)
    found = results(tmp_path)
    assert found["dataset"] == "mnist"
    assert found["binarization"] == "larochelle"
    assert -130 < found["test_elbo"] < found["test_log_px"] < -90


@needs_mnist
def test_the_gan_on_real_mnist(tmp_path):
    """Two epochs, which it needs for digits."""
    start(SCRIPTS[1], "--epochs", 2, "--dataset", "mnist", "--data_dir", mnist_dir(),
          "--out_dir", tmp_path)
    found = results(tmp_path)
    assert found["dataset"] == "mnist"
    assert found["classifier_test_accuracy"] > 0.985
    assert 0.3 < found["reference"]["fid"] < 2
    assert found["fid"] < 60
    assert found["coverage"] > 0.1
    assert min(found["class_shares"]) > 0.01


@needs_mnist
def test_the_flow_on_real_mnist(tmp_path, monkeypatch):
    """On a tenth of the images."""
    data = a3_nf.load("mnist", mnist_dir())
    less = data._replace(
        train=data.train._replace(images=data.train.images[:5000]),
        val=data.val._replace(images=data.val.images[:1000]),
        test=data.test._replace(images=data.test.images[:1000]))
    monkeypatch.setattr(a3_nf, "load", lambda *args: less)
    start(SCRIPTS[2], "--epochs", 1, "--out_dir", tmp_path)
    found = results(tmp_path)
    assert found["dataset"] == "mnist"
    assert 1 < found["test_bpd_iw"] < found["test_bpd"] < 1.4
    assert found["seconds_to_1_85"] is not None
