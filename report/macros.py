"""Turn the scripts' results into LaTeX macros, so that no number in the report is typed by hand.

    python3 macros.py > numbers.tex

Each entry of figures/<run>/results.json becomes a macro, named after the run and the entry:
test_elbo of vae_z20 is \\vaeTestElbo. Entries of the last row of metrics.csv get "Last":
\\nfLastTrainBpd. Mean and standard deviation over seeds get "Mean" and "Std": \\vaeTestElboMean.
Times are those of the median epoch of these runs, as others may use the machine as well. What
`python a3_gan.py --score` says of a run's samples.npz, in scores.json, becomes \\nfSamplesFid and
\\nfTrainingImagesFid. Needs nothing but Python.
"""

import csv
import json
import math
import re
import statistics
import sys
from pathlib import Path

RUNS = {  # prefix of the macros: folder, the command that fills it, its result, other seeds
    "vae": ("vae_z20", "python a3_vae.py --zdim 20", "test_elbo", [1, 2]),
    "vaeTwo": ("vae_z2", "python a3_vae.py --zdim 2", "test_elbo", [1, 2]),
    "gan": ("gan", "python a3_gan.py --n_epochs 200", "fid", [1, 2]),
    "nf": ("nf", "python a3_nf.py", "test_bpd", []),
}  # the runs of the other seeds are in vae_z20_seed1 and so on
DIGITS = ["Zero", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine"]


def macro_name(prefix, key):
    """vae, test_log_px -> vaeTestLogPx; LaTeX's names have no digits, so 85 becomes EightFive."""
    name = "".join(word[:1].upper() + word[1:] for word in key.split("_"))
    return prefix + re.sub(r"\d", lambda digit: DIGITS[int(digit[0])], name)


def text(key, value):
    """A value as the report prints it."""
    if isinstance(value, str):
        return value.replace("_", r"\_")
    if isinstance(value, int):
        return f"{value:,}".replace(",", r"\,") if value >= 10_000 else str(value)
    if key == "lr":
        return f"{value:g}"
    if key.endswith("share"):
        return rf"{100 * value:.0f}\%"
    digits = 2
    if value > 100 or key == "seconds_to_1_85":
        digits = 0
    elif key in ("test_bpd_mean", "test_bpd_std"):
        digits = 4
    elif any(word in key for word in ("bpd", "coverage", "loss")):
        digits = 3
    return f"{value:.{digits}f}".replace("-", r"\ensuremath{-}")


def read(folder, command):
    """The results of a run, and the rows of its metrics."""
    folder = Path(__file__).resolve().parent / "figures" / folder
    try:
        results = json.loads((folder / "results.json").read_text())
        rows = [*csv.DictReader((folder / "metrics.csv").read_text().splitlines())]
        if int(rows[-1]["epoch"]) != results["epochs"] or results["dataset"] != "mnist":
            raise ValueError("a run that is not finished, or not on MNIST")
    except (OSError, ValueError, LookupError) as error:
        sys.exit(f"macros.py: error: no results in {folder} ({error}): "
                 f"make them in code/ with {command}")
    return results, rows


def read_scores(folder):
    """The entries of scores.json in a run's folder, as {"samples_fid": ...}; none without it."""
    path = Path(__file__).resolve().parent / "figures" / folder / "scores.json"
    scores = json.loads(path.read_text()) if path.exists() else {}
    return {f"{name.replace(' ', '_')}_{key}": value
            for name, entries in scores.items() for key, value in entries.items()}


def show(prefix, values):
    """Print the macros of a run."""
    for key, value in sorted(values.items()):
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            print(rf"\newcommand{{\{macro_name(prefix, key)}}}{{{text(key, value)}}}")


def main():
    for prefix, (folder, command, mean_key, seeds) in RUNS.items():
        values, rows = read(folder, command)
        values.update({f"last_{key}": float(value) for key, value in rows[-1].items() if value})
        values.update(read_scores(folder))
        values["million_parameters"] = values["parameters"] / 1e6
        planned = values.get("planned_epochs", values["epochs"])  # of a run that was stopped
        values["half_epoch"] = (planned + 1) // 2
        if "test_kl" in values:  # so that the numbers add up as they are printed
            reconstruction = round(values["test_log_p_x_given_z"], 2)
            values["test_kl"] = reconstruction - round(values["test_elbo"], 2)
        if prefix == "gan":
            generator = values["parameters_generator"]
            values["parameters_discriminator"] = values["parameters"] - generator
            values["classifier_percent"] = f"{100 * values['classifier_test_accuracy']:.1f}"
            values["rarest_percent"] = f"{100 * min(values['class_shares']):.1f}"
            path = values["interpolation"]
            values["from_digit"], values["to_digit"] = path["digits"]
            start, end = path["probabilities"]
            values["from_probability"] = f"{start:.3f}"
            values["to_probability"] = f"{end:.3f}"
        if prefix == "nf":  # bits per dimension to nats per image
            gap = values["val_bpd"] - values["last_train_bpd"]
            values["gap_nats"] = round(gap * 784 * math.log(2))
        runs = [(values, rows)]
        for seed in seeds:
            other = f"{folder}_seed{seed}"
            runs.append(read(other, f"{command} --seed {seed} --out_dir ../report/figures/{other}"))
        if seeds:
            figures = [results[mean_key] for results, _ in runs]
            values[f"{mean_key}_mean"] = statistics.mean(figures)
            values[f"{mean_key}_std"] = statistics.stdev(figures)
            best_epochs = [results["best_epoch"] for results, _ in runs]
            values["best_epochs"] = "{}, {} and {}".format(*best_epochs)
        epoch_seconds = statistics.median(float(row["seconds"]) for _, rows in runs for row in rows)
        values["epoch_seconds"] = round(epoch_seconds)
        values["train_minutes"] = round(epoch_seconds * values["epochs"] / 60)
        show(prefix, values)
    show("binarized", read_scores("binarized"))  # of binarized training images, see README.md


if __name__ == "__main__":
    main()
