"""What each idea of the flow is worth: train it for a short while without each of them.

    python3 ablations.py        # writes figures/nf/ablations.csv, in about an hour on one core

Every run has the same budget, two epochs of 20,000 images, and but for one the same seed. The
models are changed from outside, by replacing constants and classes of a3_nf.py. Bits per dimension
are those of the validation images; the test images are not used.
"""

import argparse
import csv
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
import torch.nn as nn

REPORT = Path(__file__).resolve().parent
sys.path.insert(0, str(REPORT.parent / "code"))

import a3_nf  # noqa: E402


class PlainLogit(a3_nf.GreyLevels):
    """z = logit(y / 256), the hand-out's: all grey levels have the same share."""

    def fit(self, images):
        self.set_shares(torch.full((256,), 1 / 256).double())


class NoisyFeatures(a3_nf.GreyLevels):
    """The networks are given h, with the dequantization noise in it, four times."""

    def features(self, h):
        return torch.stack([h] * self.n_features, dim=1)


class NoCommonLevels(a3_nf.Mixture):
    """All learned components are logistic: those of the levels have no weight."""

    def components(self, parameters):
        log_weights, means, log_scales = parameters.split(self.sizes, dim=1)
        of_logistics, of_levels = log_weights.tensor_split([self.n_mixtures], dim=1)
        log_weights = torch.cat([of_logistics, torch.full_like(of_levels, -100)], dim=1)
        return super().components(torch.cat([log_weights, means, log_scales], dim=1))


class Affine:
    """RealNVP's map y = x * exp(s) + t in place of the mixture."""

    n_parameters = 2

    def __init__(self, n_mixtures, grey_levels):
        self.grey_levels = grey_levels

    def initial_parameters(self):
        return torch.zeros(2)

    def transform(self, x, parameters):
        s, t = parameters.unbind(1)
        s = 2 * torch.tanh(s / 2)
        return x * torch.exp(s) + t, s

    def inverse(self, y, parameters):
        s, t = parameters.unbind(1)
        s = 2 * torch.tanh(s / 2)
        return (y - t) * torch.exp(-s), -s


class CouplingsOnly(a3_nf.MultiscaleFlow):
    """Couplings down to the last pixel in place of the autoregressive layer."""

    def __init__(self, grey_levels, n_hidden_coarse=32, n_mixtures=6):
        super().__init__(grey_levels, n_hidden_coarse=n_hidden_coarse, n_mixtures=n_mixtures)
        mixture = a3_nf.Mixture(n_mixtures, grey_levels)

        def coupling(seen, changed):
            return a3_nf.MixtureCoupling(seen, changed, n_hidden_coarse, mixture)

        def three_couplings(a, b, c, d):
            return [coupling([a, b, d], c), coupling([a, d], b), coupling([a], d)]

        a, _, _, d = a3_nf.quarters(torch.arange(784).view(28, 28)[0::2, 0::2])  # [7, 7]
        layers = [coupling([a], d)]
        layers.append(coupling([a[0:-1:2], a[2::2]], a[1::2]))  # a row given its two neighbours
        a = a[0::2]                                             # [4, 7]
        layers.append(coupling([a[:, 0:-1:2], a[:, 2::2]], a[:, 1::2]))  # and a column
        a = a[:, 0::2]                                          # [4, 4]
        for _ in range(2):                                      # [2, 2], then [1, 1]
            a, b, c, d = a3_nf.quarters(a)
            layers += three_couplings(a, b, c, d)
        last = a3_nf.AutoregressiveLayer(a.flatten(), 8, 8, mixture)
        self.layers = nn.ModuleList([*self.layers[:-1], *layers, last])


class WithPosition(a3_nf.MixtureCoupling):
    """The network is also told the rows and columns of the pixels that it changes."""

    def __init__(self, seen, changed, n_hidden, mixture):
        super().__init__(seen, changed, n_hidden, mixture)
        n_features = mixture.grey_levels.n_features * len(seen)
        net = a3_nf.residual_network(n_features + 2, n_hidden, mixture.n_parameters)
        net[-1].bias.data = mixture.initial_parameters()
        position = torch.stack([changed // 28, changed % 28]) / 14 - 1  # [2, H, W]
        self.net = AppendPosition(position, net)


class AppendPosition(nn.Module):
    def __init__(self, position, net):
        super().__init__()
        self.register_buffer("position", position, persistent=False)
        self.net = net

    def forward(self, features):
        position = self.position.expand(len(features), -1, -1, -1)  # [B, 2, H, W]
        return self.net(torch.cat([features, position], dim=1))


ABLATIONS = {  # name: what is replaced in a3_nf.py
    "as it is": {},
    "as it is, seed 1": {},  # tells how much chance there is in a difference
    "RealNVP": {},
    "plain logit": {"GreyLevels": PlainLogit},
    "features with the noise": {"GreyLevels": NoisyFeatures},
    "no common levels": {"Mixture": NoCommonLevels},
    "affine map": {"Mixture": Affine},
    "couplings only": {"MultiscaleFlow": CouplingsOnly},
    "with position": {"MixtureCoupling": WithPosition},
    "no standard logistic": {"STANDARD_WEIGHT": 0.0},
}
FLAGS = {"as it is, seed 1": ["--seed", "1"], "RealNVP": ["--n_mixtures", "0"]}


def measure(name, args):
    """Train the model of this name: validation bits per dimension and CPU seconds."""
    cpu_seconds = 0

    def load_less(*_):
        data = load(args.dataset, args.data_dir)
        train = data.train._replace(images=data.train.images[:args.n_images])
        val = data.val._replace(images=data.val.images[:args.n_images])
        unused = data.test._replace(images=val.images[:1])
        return data._replace(train=train, val=val, test=unused)

    def timed_epoch(*arguments):
        nonlocal cpu_seconds
        start = time.process_time()
        result = run_epoch(*arguments)
        cpu_seconds += time.process_time() - start
        return result

    load, run_epoch = a3_nf.load, a3_nf.run_epoch
    replaced = {**ABLATIONS[name], "load": load_less, "run_epoch": timed_epoch,
                "save_samples": lambda *_: None}  # which nobody looks at
    with tempfile.TemporaryDirectory() as folder, mock.patch.multiple(a3_nf, **replaced):
        flags = ["--epochs", "2", "--device", "cpu", "--out_dir", folder, *FLAGS.get(name, [])]
        a3_nf.main(a3_nf.parse_args(flags))
        results = json.loads((Path(folder) / "results.json").read_text())
    return results["val_bpd"], cpu_seconds


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n_images", type=int, default=20_000, help="(default: %(default)s)")
    parser.add_argument("--dataset", choices=["mnist", "glyphs"], default="mnist")
    parser.add_argument("--data_dir", type=a3_nf.user_path, default=a3_nf.DATA_DIR)
    parser.add_argument("--out", type=a3_nf.user_path,
                        default=REPORT / "figures" / "nf" / "ablations.csv")
    args = parser.parse_args()
    torch.set_num_threads(1)

    rows = []
    for name in ABLATIONS:
        print(f"--- {name}")
        try:
            val_bpd, cpu_seconds = measure(name, args)
        except FloatingPointError:
            val_bpd, cpu_seconds = float("nan"), float("nan")  # the loss was not finite
        rows.append({"model": name, "val_bpd": val_bpd, "cpu_seconds": cpu_seconds})
    with open(args.out, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    print(f"{args.out} is written")


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    # Ignore the user's matplotlib settings, which could stop a run.
    os.environ["MPLBACKEND"] = "agg"
    import matplotlib
    matplotlib.rcdefaults()
    main()
