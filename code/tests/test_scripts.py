"""The three scripts as programs: what a user types, what they write, and what they do when something goes wrong."""

import json
import math
import runpy
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import a3_gan
import a3_nf
import a3_vae
from conftest import CODE, mnist_dir, needs_mnist

# `flags` are those of its small runs, `setting` is what rebuilds the model, `files` are written by it alone, `curve`
# and `sign` say which column of metrics.csv should be high (1) or low (-1), `results` are the keys of its own
Script = namedtuple("Script", "module name flags setting files columns curve sign results run_dir")
SCRIPTS = [
    Script(a3_vae, "a3_vae", ["--zdim", 2, "--batch_size", 16], {"zdim": 2}, {"elbo.pdf", "manifold.png"},
           ["train_elbo", "val_elbo"], "val_elbo", 1, ["test_elbo", "test_log_px", "binarization"], "vae_z2"),
    Script(a3_gan, "a3_gan", ["--latent_dim", 7, "--batch_size", 16, "--lr", 2e-3], {"latent_dim": 7},
           {"losses.pdf", "interpolation.png", "mnist_generator.pt"}, ["loss_D", "loss_G", "val_fid"], "val_fid", -1,
           ["fid", "fid_floor", "coverage", "class_shares"], "gan"),
    Script(a3_nf, "a3_nf", ["--n_mixtures", 2, "--batch_size", 8], {"n_mixtures": 2}, {"bpd.pdf"},
           ["train_bpd", "val_bpd"], "val_bpd", -1, ["test_bpd", "test_bpd_iw", "seconds_to_1_85"], "nf")]
FILES = {"samples_start.png", "samples_half.png", "samples_end.png", "metrics.csv", "results.json",
         "checkpoint.pt", "weights.pt"}


@pytest.fixture(scope="session", params=SCRIPTS, ids=[script.name for script in SCRIPTS])
def script(request):
    return request.param


@pytest.fixture(scope="session")
def common(glyphs_dir):
    return ["--dataset", "glyphs", "--device", "cpu", "--data_dir", glyphs_dir]


@pytest.fixture(scope="session")
def finished(script, common, tmp_path_factory):
    """The folder of a finished dry run, which a process has written, from another working directory."""
    folder = tmp_path_factory.mktemp(script.name)
    command = [sys.executable, CODE / f"{script.name}.py", "--dry_run", *common, *script.flags, "--out_dir", "run"]
    process = subprocess.run([*map(str, command)], cwd=folder, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0 and process.stderr == ""
    return folder / "run"


def start(script, *argv):
    """Run it in this process, without what its last lines do about errors."""
    script.module.main(script.module.parse_args([*map(str, argv)]))


def run(script, capsys, *argv):
    """Run it as a program, but in this process: the exit status and what it writes to stderr."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script.name}.py", *map(str, argv)])
        status = 0
        try:
            runpy.run_path(str(CODE / f"{script.name}.py"), run_name="__main__")
        except SystemExit as stop:
            status = stop.code
    stderr = capsys.readouterr().err
    return (1, stderr + status + "\n") if isinstance(status, str) else (status or 0, stderr)


def fails(script, capsys, *argv, status=1):
    """Run it as a program; it must fail with one line, which is returned."""
    actual, stderr = run(script, capsys, *argv)
    assert actual == status and stderr.count("\n") == 1 and stderr.startswith(f"{script.name}.py: error: ")
    return stderr


def load(path):
    return torch.load(path, weights_only=True)


def results(folder):
    return json.loads((folder / "results.json").read_text())


def is_same(a, b):
    """Bit for bit, but for times and memory."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(is_same(a[key], b[key]) for key in a if not (
            "seconds" in str(key) or key in ("images_per_s", "peak_memory_mb")))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(is_same, a, b))
    return a == b or (a != a and b != b)  # NaN


def assert_same_run(folder_a, folder_b):
    for name in ("checkpoint.pt", "weights.pt"):
        assert is_same(load(folder_a / name), load(folder_b / name)), name
    assert is_same(results(folder_a), results(folder_b))
    for path in folder_a.glob("*.png"):
        assert path.read_bytes() == (folder_b / path.name).read_bytes(), path.name


# ------------------------------------------------------------------------------------------------- what a run leaves
def test_a_run_leaves_its_files(script, finished):
    assert {path.name for path in finished.iterdir()} == FILES | script.files
    for path in finished.glob("*.png"):
        image = np.asarray(Image.open(path))
        assert min(image.shape[:2]) > 80 and len(np.unique(image)) > 2
    assert all(path.read_bytes().startswith(b"%PDF") for path in finished.glob("*.pdf"))
    rows = [line.split(",") for line in (finished / "metrics.csv").read_text().splitlines()]
    assert rows[0] == ["epoch", *script.columns, "seconds", "images_per_s", "learning_rate"]
    assert [row[0] for row in rows[1:]] == ["1", "2"] and all(math.isfinite(float(x)) for x in rows[1] + rows[2])


def test_results_say_what_was_run(script, finished):
    found, rows = results(finished), np.genfromtxt(finished / "metrics.csv", delimiter=",", names=True)
    for key in ("dataset", "dataset_md5", "seed", "epochs", "device", "parameters", "train_seconds", "images_per_s",
                "peak_memory_mb", "batch_size", "lr", "processor", "python", "torch", *script.setting, *script.results):
        assert key in found and (found[key] is not None or key == "seconds_to_1_85"), key
    assert (found["dataset"], found["seed"], found["epochs"], found["device"]) == ("glyphs", 42, 2, "cpu")
    assert script.setting.items() <= found.items() and 100 < found["peak_memory_mb"] < 20_000
    assert found["train_seconds"] == pytest.approx(rows["seconds"].sum(), rel=1e-6)
    best = (script.sign * rows[script.curve]).argmax()
    assert found["best_epoch"] == best + 1 and found[script.curve] == pytest.approx(rows[script.curve][best], rel=1e-6)
    n_parameters = sum(p.numel() for p in script.module.load_model(finished / "weights.pt").parameters())
    assert n_parameters == found["parameters_generator" if script.module is a3_gan else "parameters"]


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


def test_best_weights_are_those_of_the_best_epoch(script, common, tmp_path, monkeypatch):
    """The first of two epochs is made the best one, after which the weights must be kept."""
    monkeypatch.setattr(a3_vae, "IW_SAMPLES", 1)
    monkeypatch.setattr(a3_gan, "FID_EVERY", 1)
    monkeypatch.setattr(a3_gan, "BATCH_NORM_EPOCHS", 1)
    seen = []

    def spy(content, path, save=script.module.save):
        seen.append(path.name)
        save(content, path)
    monkeypatch.setattr(script.module, "save", spy)
    if script.module is a3_gan:
        values = iter([9.0, 5.0, 7.0, 1.0, 2.0])  # floor, epochs 1 and 2, test images, floor of the test images
        monkeypatch.setattr(a3_gan, "frechet_distance", lambda a, b: next(values))
    else:
        values = iter([5.0, 5.0 + script.sign * -2])
        monkeypatch.setattr(script.module, "run_epoch", lambda *args, run_epoch=script.module.run_epoch: (
            run_epoch(*args)[0], next(values)))
    start(script, "--dry_run", *common, *script.flags, "--out_dir", tmp_path)
    assert seen[:2] == ["checkpoint.pt", "checkpoint.pt"]
    assert seen[-1] == "weights.pt"
    assert results(tmp_path)["best_epoch"] == 1 and results(tmp_path)[script.curve] == 5
    last = load(tmp_path / "checkpoint.pt")
    assert is_same(last["best"], load(tmp_path / "weights.pt")["best"])
    assert not is_same(last["best"], last["averaged"])
    if script.module is a3_gan:  # batch norm has seen the four batches of the first epoch, and is frozen in the second
        assert load(tmp_path / "checkpoint.pt")["generator"]["net.1.num_batches_tracked"] == 4


def test_another_seed_gives_other_numbers(script, common, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(a3_vae, "IW_SAMPLES", 1)
    seeds = [[], []]
    for i in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "manual_seed", lambda seed, i=i, f=torch.manual_seed: seeds[i].append(seed) or f(seed))
            start(script, "--dry_run", *common, *script.flags, "--out_dir", tmp_path / str(i), "--seed", 1 + i)
    assert len(set(seeds[0])) > 3 and set(seeds[0]) & set(seeds[1]) <= {0}  # of pictures and of the classifier
    a, b = load(tmp_path / "0" / "checkpoint.pt"), load(tmp_path / "1" / "checkpoint.pt")
    for part in {"model", "generator", "discriminator"} & a.keys():
        assert not any(torch.equal(p, b[part][key]) for key, p in a[part].items() if "weight" in key and p.dim() > 1)
    if script.module is not a3_nf:  # which starts as the same map for all seeds
        pictures = [(tmp_path / str(i) / "samples_start.png").read_bytes() for i in range(2)]
        assert pictures[0] != pictures[1]


# -------------------------------------------------------------------------------------------- interrupted and resumed
KILLED = """
import os, runpy, signal, sys
from pathlib import Path
import torch
number, checkpoint, sys.argv = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
lerp_ = torch.Tensor.lerp_
def lerp_or_die(*args):
    if checkpoint.exists():
        os.kill(os.getpid(), number)
    return lerp_(*args)
torch.Tensor.lerp_ = lerp_or_die
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job ignores
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_killed(script, number, folder, *argv):
    """Run it as a program that gets a signal in the first update after there is a checkpoint."""
    command = [sys.executable, "-c", KILLED, int(number), folder / "checkpoint.pt",
               CODE / f"{script.name}.py", *argv, "--out_dir", folder]
    process = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    return process.returncode, process.stderr


def test_killed_again_and_again_it_ends_like_an_uninterrupted_run(script, common, finished, tmp_path):
    """Ctrl-C, SIGTERM and kill -9 in epoch 2. Flags given with --resume do not count."""
    status, stderr = run_killed(
        script, signal.SIGINT, tmp_path, "--dry_run", *common, *script.flags)
    assert status == 130
    assert stderr.count("\n") == 1
    assert f'--resume --out_dir "{tmp_path}"' in stderr
    for number in (signal.SIGTERM, signal.SIGKILL):
        assert len(load(tmp_path / "checkpoint.pt")["rows"]) == 1
        assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 2
        assert not (tmp_path / "results.json").exists()
        assert run_killed(script, number, tmp_path, "--resume", *common)[0] == -number
    setting, value = script.flags[:2]
    others = [setting, value + 1, "--batch_size", 99, "--lr", 0.5, "--seed", 7, "--epochs", 1]
    start(script, "--resume", *common, "--out_dir", tmp_path, *others)
    assert_same_run(tmp_path, finished)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_write_that_breaks_off_leaves_a_checkpoint_that_loads(script, common, tmp_path, monkeypatch):
    writes = []

    def break_off(content, file, save=torch.save):
        writes.append(file)
        if len(writes) == 2:  # the checkpoint of epoch 2
            Path(file).write_bytes(b"PK\x03\x04 half of it")
            raise KeyboardInterrupt
        save(content, file)
    monkeypatch.setattr(torch, "save", break_off)
    monkeypatch.setattr(a3_vae, "IW_SAMPLES", 1)
    with pytest.raises(KeyboardInterrupt):
        start(script, "--dry_run", *common, *script.flags, "--out_dir", tmp_path)
    script.module.load_model(tmp_path / "checkpoint.pt")
    assert len(load(tmp_path / "checkpoint.pt")["rows"]) == 1


def test_a_new_run_keeps_the_checkpoint_of_an_unfinished_one(script, common, finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(a3_vae, "IW_SAMPLES", 1)
    shutil.copy(finished / "checkpoint.pt", tmp_path)
    argv = "--dry_run", *common, *script.flags, "--out_dir", tmp_path, "--epochs", 1, "--seed", 5
    start(script, *argv)
    assert "unfinished" in capsys.readouterr().err
    kept, = tmp_path.glob("checkpoint-*.pt")
    assert kept.read_bytes() == (finished / "checkpoint.pt").read_bytes()
    assert kept.read_bytes() != (tmp_path / "checkpoint.pt").read_bytes()
    start(script, *argv)  # over a finished one
    assert capsys.readouterr().err == ""
    assert len(list(tmp_path.glob("checkpoint-*.pt"))) == 1


def test_a_loss_that_is_not_finite_ends_the_run_with_one_line(
        script, common, tmp_path, monkeypatch, capsys):
    lerp_ = torch.Tensor.lerp_

    def spoil(average, *args):
        if (tmp_path / "checkpoint.pt").exists():  # in epoch 2
            return average.fill_(math.nan)
        return lerp_(average, *args)
    monkeypatch.setattr(torch.Tensor, "lerp_", spoil)
    err = fails(script, capsys, "--dry_run", *common, *script.flags, "--out_dir", tmp_path)
    assert "epoch 2" in err
    assert "not finite" in err
    model = script.module.load_model(tmp_path / "checkpoint.pt")
    assert all(p.isfinite().all() for p in model.parameters())
    assert len(load(tmp_path / "checkpoint.pt")["rows"]) == 1
    assert not (tmp_path / "results.json").exists()


# ------------------------------------------------------------------------------------------------------- command line
def test_sample_needs_nothing_but_weights(script, finished, tmp_path, capsys):
    shutil.copy(finished / "weights.pt", tmp_path)
    drawn = []
    for seed in (42, 42, 1):
        assert run(script, capsys, "--sample", 5, "--device", "cpu", "--out_dir", tmp_path, "--seed", seed) == (0, "")
        with np.load(tmp_path / "samples.npz") as arrays:
            drawn.append(arrays["samples"])
    assert drawn[0].dtype == np.uint8 and drawn[0].shape == (5, 28, 28) and drawn[0].std() > 10
    assert np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])
    assert {path.name for path in tmp_path.iterdir()} == {"weights.pt", "samples.npz", "samples.png"}
    image = 255 - np.asarray(Image.open(tmp_path / "samples.png"))[..., 0]  # 5 images of 84 pixels, 2 between them
    assert np.array_equal([image[3:86:3, 86 * i + 3:86 * i + 86:3] for i in range(5)], drawn[2])


def test_committed_weights_draw_the_committed_samples(script, tmp_path):
    folder = script.module.run_dir(script.module.parse_args(["--device", "cpu"]))
    script.module.save_samples(script.module.load_model(folder / "weights.pt"), tmp_path / "samples_end.png")
    drawn, committed = (np.asarray(Image.open(f / "samples_end.png")).astype(int) for f in (tmp_path, folder))
    assert (abs(drawn - committed) > 4).mean() < 0.003  # rounding differs between machines


def test_help_is_grouped_and_shows_defaults(script, capsys):
    assert run(script, capsys, "-h") == (0, "")
    with pytest.raises(SystemExit):
        script.module.parse_args(["-h"])
    text = " ".join(capsys.readouterr().out.split())  # as if there were no ends of lines
    for flag in ("--epochs", "--batch_size", "--lr", "--seed", "--device", "--dataset", "--data_dir", "--out_dir",
                 "--dry_run", "--resume", "--sample", script.flags[0]):
        assert flag in text
    defaults = script.module.parse_args([])
    assert text.count("(default: ") >= 7 and f"(default: {defaults.lr}" in text and "model and training:" in text
    assert defaults.seed == 42 and defaults.epochs == (200 if script.module is a3_gan else 40)
    assert script.module.parse_args(["--n_epochs", "3"]).epochs == 3 or script.module is not a3_gan


@pytest.mark.parametrize("argv", [
    ["--epochs", "0"], ["--epochs", "-3"], ["--epochs", "many"], ["--epochs", "100000000000"], ["--batch_size", "0"],
    ["--lr", "nan"], ["--lr", "0"], ["--lr", "inf"], ["--seed", "-1"], ["--sample", "0"], ["--dataset", "cifar"],
    ["--device", "cuda:99"], ["--device", "toaster"], ["--device", "meta"], ["--unknown"], ["FIRST", "-1"]])
def test_a_bad_flag_is_named_in_one_line(script, capsys, argv, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{script.name}.py"])
    argv = [script.flags[0] if arg == "FIRST" else arg for arg in argv]
    with pytest.raises(SystemExit) as stop:
        script.module.parse_args(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and argv[0] in err and "error: " in err


class Evil(namedtuple("Evil", "path")):
    """Its pickle creates a file when it is loaded without weights_only=True."""
    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_bad_checkpoint_is_one_line_and_runs_no_code(script, common, finished, tmp_path, capsys):
    good = load(finished / "checkpoint.pt")
    other = SCRIPTS[SCRIPTS.index(script) - 1].module.FORMAT
    contents = {"missing": None, "truncated": (finished / "checkpoint.pt").read_bytes()[:-2000], "text": b"hello",
                "empty": b"", "list": [1, 2], "foreign": good | {"format": other}, "unnamed": {"best": {}},
                "newer": good | {"format": "a3 99"}, "hostile": good | {"rows": Evil(tmp_path / "it ran")}}
    for name, content in contents.items():
        (folder := tmp_path / name).mkdir()
        for path in (folder / "checkpoint.pt", folder / "weights.pt") if content is not None else ():
            path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        before = sorted(folder.iterdir())
        assert str(folder / "checkpoint.pt") in fails(script, capsys, "--resume", *common, "--out_dir", folder)
        assert str(folder / "weights.pt") in fails(script, capsys, "--sample", 5, "--out_dir", folder)
        assert sorted(folder.iterdir()) == before
        with pytest.raises(OSError):
            script.module.load_model(folder / "checkpoint.pt")
    assert not (tmp_path / "it ran").exists()
    torch.save(good | {"settings": good["settings"] | {"dataset_md5": "0"}}, tmp_path / "checkpoint.pt")
    assert "other images" in fails(script, capsys, "--resume", *common, "--out_dir", tmp_path)


def test_mnist_by_name_without_a_network_is_one_line(script, tmp_path, offline, capsys):
    err = fails(script, capsys, "--dataset", "mnist", "--data_dir", tmp_path / "empty", "--out_dir", tmp_path / "run",
                "--device", "cpu")
    assert "no network" in err and "--dataset glyphs" in err and not (tmp_path / "run").exists()


def test_without_a_network_a_dry_run_uses_glyphs_and_a_temporary_folder(
        script, glyphs_dir, tmp_path, offline, monkeypatch, capsys):
    monkeypatch.setattr(a3_vae, "IW_SAMPLES", 1)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    start(script, "--dry_run", "--data_dir", glyphs_dir, "--device", "cpu", "--epochs", 1, *script.flags)
    assert "NO MNIST" in capsys.readouterr().err
    folder, = tmp_path.iterdir()
    assert results(folder)["dataset"] == "glyphs" and len(results(folder)["dataset_md5"]) == 32


def test_glyphs_have_a_folder_of_their_own(script):
    figures = CODE.parent / "report" / "figures"
    for dataset, suffix in (("auto", ""), ("mnist", ""), ("glyphs", "_glyphs")):
        args = script.module.parse_args([*map(str, script.flags), "--dataset", dataset, "--device", "cpu"])
        assert script.module.run_dir(args) == figures / (script.run_dir + suffix)
    assert script.module.run_dir(script.module.parse_args(["--out_dir", "x"])) == Path("x")


# ---------------------------------------------------------------------------------------------------------- real MNIST
@needs_mnist
def test_on_real_mnist(script, tmp_path, monkeypatch):
    """One epoch (two of the GAN, which needs them for digits), of the flow on a tenth of the images."""
    def load_less(*args, load=a3_nf.load):
        data = load(*args)
        train, val, test = (split._replace(images=split.images[:n]) for split, n in zip(
            data[1:4], (5000, 1000, 1000), strict=True))
        return data._replace(train=train, val=val, test=test)
    monkeypatch.setattr(a3_nf, "load", load_less)
    monkeypatch.setattr(a3_vae, "IW_SAMPLES", 2)
    start(script, "--epochs", 1 + (script.module is a3_gan), "--dataset", "mnist", "--data_dir", mnist_dir(),
          "--out_dir", tmp_path)
    assert (found := results(tmp_path))["dataset"] == "mnist"
    if script.module is a3_vae:
        assert found["binarization"] == "larochelle" and -130 < found["test_elbo"] < found["test_log_px"] < -90
    if script.module is a3_gan:
        assert found["classifier_test_accuracy"] > 0.985 and 0.3 < found["fid_floor"] < 2
        assert found["fid"] < 60 and found["coverage"] > 0.1 and min(found["class_shares"]) > 0.01
    if script.module is a3_nf:
        assert 1 < found["test_bpd_iw"] < found["test_bpd"] < 1.4 and found["seconds_to_1_85"] is not None
