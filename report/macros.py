"""Turn the scripts' results into LaTeX macros, so that no number in the report is typed by hand.

    python3 macros.py > numbers.tex

Each entry of figures/<run>/results.json becomes a macro, named after the run and the entry:
test_elbo of vae_z20 is \\vaeTestElbo. Entries of the last row of metrics.csv get "Last":
\\nfLastTrainBpd. Means and standard deviations over seeds get "Mean" and "Std": \\vaeTestElboMean.
What `python a3_gan.py --score` says of a run's samples.npz, in scores.json, becomes \\nfSamplesFid
and \\nfValidationImagesFid. The rows of ablations.csv become \\ablationPlainLogit and so on. Needs
nothing but Python.
"""

import csv
import json
import math
import re
import statistics
import sys
from pathlib import Path

FIGURES = Path(__file__).resolve().parent / "figures"
RUNS = {  # prefix of the macros: folder, the command that fills it, its result, other seeds
    "vae": ("vae_z20", "python a3_vae.py --zdim 20", "test_elbo", [1, 2]),
    "vaeTwo": ("vae_z2", "python a3_vae.py --zdim 2", "test_elbo", [1, 2]),
    "gan": ("gan", "python a3_gan.py --n_epochs 200", "fid", [1, 2]),
    "nf": ("nf", "python a3_nf.py", "test_bpd", [1, 2]),
}  # the runs of the other seeds are in vae_z20_seed1 and so on
SCORED = ["vae", "gan", "nf"]  # those whose samples are scored
DIGITS = ["Zero", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine"]


def macro_name(prefix, key):
    """vae, test_log_px -> vaeTestLogPx; LaTeX's names have no digits, so 85 becomes EightFive."""
    name = "".join(word[:1].upper() + word[1:] for word in re.findall("[A-Za-z0-9]+", key))
    return prefix + re.sub(r"\d", lambda digit: DIGITS[int(digit[0])], name)


def text(key, value):
    """A value as the report prints it."""
    if isinstance(value, str):
        return value.replace("_", r"\_")
    if isinstance(value, int):
        return f"{value:,}".replace(",", r"\,") if value >= 10_000 else str(value)
    if key == "lr":
        return f"{value:g}"
    if "share" in key:
        return rf"{100 * value:.0f}\%"
    digits = 2
    if value > 100 or key == "seconds_to_1_85":
        digits = 0
    elif key in ("test_bpd_mean", "test_bpd_std"):
        digits = 4
    elif any(word in key for word in ("bpd", "coverage", "loss")):
        digits = 3
    return f"{value:.{digits}f}".replace("-", r"\ensuremath{-}")


BROKEN = OSError, ValueError, LookupError, TypeError, AttributeError  # what a bad file can raise


def fail(path, error, command):
    reason = str(error).splitlines()[0]
    sys.exit(f"macros.py: error: {path} is missing or broken ({type(error).__name__}: {reason}): "
             f"make it in code/ with {command}")


def read(folder, command):
    """The results of a run, and the rows of its metrics."""
    path = FIGURES / folder / "results.json"
    try:
        results = json.loads(path.read_text())
        if results["dataset"] != "mnist":
            raise ValueError("not a run on MNIST")
        path = FIGURES / folder / "metrics.csv"
        rows = [*csv.DictReader(path.read_text().splitlines())]
        if int(rows[-1]["epoch"]) != results["epochs"]:
            raise ValueError("a run that is not finished")
    except BROKEN as error:
        fail(path, error, command)
    return results, rows


def read_scores(folder, command):
    """The entries of scores.json in a run's folder, as {"samples_fid": ...}."""
    path = FIGURES / folder / "scores.json"
    weights = FIGURES / folder / "weights.pt"
    try:
        scores = json.loads(path.read_text())
        # In a clone all files have nearly the same time.
        if weights.exists() and path.stat().st_mtime < weights.stat().st_mtime - 60:
            raise ValueError("scores.json is older than weights.pt")
        values = {}
        for name, entries in scores.items():
            for key, value in entries.items():
                values[f"{name.replace(' ', '_')}_{key}"] = value
        if not any(key.endswith("_fid") for key in values):
            raise ValueError("no scores in it")
    except BROKEN as error:
        fail(path, error, command)
    return values


def scoring(folder, command):
    """The commands that make a run's scores.json."""
    samples = f"../report/figures/{folder}/samples.npz"
    return f"{command} --sample 10000, then python a3_gan.py --score {samples}"


def read_ablations():
    """Bits per dimension of each model in ablations.csv, and how many more than "as it is"."""
    path = FIGURES / "nf" / "ablations.csv"
    try:
        rows = [*csv.DictReader(path.read_text().splitlines())]
        bits = {row["model"]: float(row["val_bpd"]) for row in rows}
        unchanged = bits["as it is"]
        values = {}
        for name, bpd in bits.items():
            values[name] = f"{bpd:.3f}"
            difference = bpd - unchanged
            values[f"{name}_more"] = rf"\ensuremath{{{difference:+.3f}}}"
            values[f"{name}_difference"] = f"{abs(difference):.3f}"
    except BROKEN as error:
        fail(path, error, "python ../report/ablations.py")
    return values


def add_mean(values, key, runs):
    """Mean and standard deviation over the runs of one entry of their results."""
    figures = [results[key] for results in runs]
    values[f"{key}_mean"] = statistics.mean(figures)
    values[f"{key}_std"] = statistics.stdev(figures)


def in_words(items):
    """[42, 1, 2] -> "42, 1 and 2"."""
    *others, last = map(str, items)
    return f"{', '.join(others)} and {last}" if others else last


def show(prefix, values):
    """Print the macros of a run."""
    for key, value in sorted(values.items()):
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            print(rf"\newcommand{{\{macro_name(prefix, key)}}}{{{text(key, value)}}}")


def read_runs(prefix):
    """The results of the run that is shown, those of all seeds, and the last row of its metrics."""
    folder, command, _, seeds = RUNS[prefix]
    values, rows = read(folder, command)
    runs = [values]
    for seed in seeds:
        name = f"{folder}_seed{seed}"
        command_of_seed = f"{command} --seed {seed} --out_dir ../report/figures/{name}"
        other, _ = read(name, command_of_seed)
        if prefix == "nf":
            other |= read_scores(name, scoring(name, command_of_seed))
        runs.append(other)
    if prefix in SCORED:
        values |= read_scores(folder, scoring(folder, command))
    return values, runs, rows[-1]


def add_derived(values, prefix, runs, last_row):
    """Add what follows from the results of a run and of the other seeds."""
    values |= {f"last_{key}": float(value) for key, value in last_row.items() if value}
    add_mean(values, RUNS[prefix][2], runs)
    values["seeds"] = in_words(run["seed"] for run in runs)
    values["best_epochs"] = in_words(run["best_epoch"] for run in runs)
    values["million_parameters"] = values["parameters"] / 1e6
    values["half_epoch"] = (values["epochs"] + 1) // 2
    values["train_minutes"] = round(values["train_seconds"] / 60)
    if prefix in ("vae", "vaeTwo"):  # so that the numbers add up as they are printed
        reconstruction = round(values["test_log_p_x_given_z"], 2)
        values["test_kl"] = reconstruction - round(values["test_elbo"], 2)
    if prefix == "gan":
        generator = values["parameters_generator"]
        values["parameters_discriminator"] = values["parameters"] - generator
        values["classifier_percent"] = f"{100 * values['classifier_test_accuracy']:.1f}"
        for n_sets in (20, 5):  # the standard error of a mean over so many sets
            values[f"fid_error_of_{n_sets}_sets"] = values["fid_set_std"] / math.sqrt(n_sets)
        values["rarest_percent"] = f"{100 * min(values['class_shares']):.1f}"
        values |= {f"reference_{key}": value for key, value in values["reference"].items()}
        values["from_digit"], values["to_digit"] = values["interpolation"]["digits"]
    if prefix == "nf":
        for key in ("fid", "coverage", "confident_share"):
            add_mean(values, f"samples_{key}", runs)
        values["gap_bits"] = f"{values['val_bpd'] - values['last_train_bpd']:.3f}"
        values["test_bpd_of_seeds"] = (f"{values['test_bpd_mean']:.4f}"
                                       rf"\ensuremath{{\pm{values['test_bpd_std']:.4f}}}")


def main():
    for prefix, (folder, command, _, _) in RUNS.items():
        values, runs, last_row = read_runs(prefix)
        try:
            add_derived(values, prefix, runs, last_row)
        except BROKEN as error:
            fail(f"a file in {FIGURES / folder}", error, command)
        show(prefix, values)
    show("binarized", read_scores("binarized", "the command in README.md"))
    show("ablation", read_ablations())


if __name__ == "__main__":
    main()
