"""The plots of README.md, each drawn from the tables or curves of results."""

import numpy as np
from common import tables
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#999999", "#E69F00")
NAMES = {"digits": "digits", "mnist": "MNIST"}
SYSTEMS = {
    "AdamW": "#D55E00",
    "SGD": "#999999",
    "IVON@mean": "#56B4E9",
    "IVON": "#0072B2",
}


def column(rows, name):
    """Return means and standard errors (2, rows) of a column."""
    return np.array([tables.mean_and_error(row[name]) for row in rows], float).T


def of_system(table, system):
    """Return the rows of a system."""
    return [row for row in table["rows"] if row["system"] == system]


def panels(count, width=3.6, height=3.2, rows=1, **options):
    """Return a figure and its axes, without lines at the top and at the right."""
    figure = Figure(figsize=(width * count, height * rows), layout="constrained")
    axes = figure.subplots(rows, count, **options)
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def legend_below(figure, axes, columns):
    """Put one legend under all panels."""
    handles = axes.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=columns, frameon=False)


def uncertainty(found):
    """NLL in domain, and AUROC of turned images, of all systems on two data sets."""
    figure, axes = panels(2, 5.0, 3.6, rows=2)
    for row, name in zip(axes, ("digits", "mnist"), strict=True):
        result = found[f"uncertainty_{name}"]["tables"]
        for axis, (title, score) in zip(
            row, (("in domain", "NLL"), ("turned", "AUROC %")), strict=True
        ):
            rows = result[title]["rows"]
            mean, error = column(rows, score)
            names = [r["system"] for r in rows]
            colors = ["#0072B2" if "IVON" in n else "#555555" for n in names]
            axis.errorbar(mean, range(len(rows)), xerr=error, fmt="none", ecolor="0.7")
            axis.scatter(mean, range(len(rows)), color=colors, zorder=3)
            axis.set_yticks(range(len(rows)), names)
            axis.invert_yaxis()
            better = "lower" if score == "NLL" else "higher"
            axis.set_xlabel(f"{NAMES[name]}, {title}: {score}, {better} is better")
    return figure


def ablations(found):
    """NLL by h_0, by samples in prediction and by severity of a shift."""
    figure, axes = panels(3, rows=2)
    for row, name in zip(axes, ("digits", "mnist"), strict=True):
        result = found[f"ablations_{name}"]["tables"]
        rows = result["h_0"]["rows"]
        hess_inits = [r["h_0"] for r in rows]
        for label, score in (("IVON@mean", "NLL at the mean"), ("IVON", "NLL")):
            mean, error = column(rows, score)
            style = {"color": SYSTEMS[label], "marker": "o", "ms": 4, "label": label}
            row[0].errorbar(hess_inits, mean, error, **style)
        row[0].set(xscale="log", yscale="log", xlabel="$h_0$")
        row[0].set_ylabel(f"{NAMES[name]}: NLL")
        row[0].yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 5)))
        for axis in (row[0].xaxis, row[0].yaxis):
            axis.set_major_formatter("{x:g}")
        row[0].minorticks_off()
        first, *rows = result["samples in prediction"]["rows"]
        mean, error = column(rows, "NLL")
        counts = [int(r["samples"]) for r in rows]
        row[1].errorbar(counts, mean, error, color=SYSTEMS["IVON"], marker="o", ms=4)
        at_mean = tables.mean(first["NLL"])
        row[1].axhline(at_mean, color=SYSTEMS["IVON@mean"], ls="--")
        row[1].set(xscale="log", xlabel="samples in prediction")
        row[1].set_xticks(counts, counts)
        row[1].set_xticks([], minor=True)
        for system, color in SYSTEMS.items():
            rows = of_system(result["shifted"], system)
            mean, error = column(rows, "NLL")
            severities = [r["severity"] for r in rows]
            style = {"color": color, "marker": "o", "ms": 4, "label": system}
            row[2].errorbar(severities, mean, error, **style)
        row[2].set(xlabel="severity of the shift")
    legend_below(figure, axes[0, 2], 4)
    return figure


def multi_ivon(found):
    """NLL, entropy and its epistemic part over the angle of digits."""
    table = found["multi_ivon"]["tables"]["turned digits"]
    figure, axes = panels(3)
    systems = "AdamW", "AdamW ensemble", "IVON", "Multi-IVON"
    for axis, score in zip(axes, ("NLL", "entropy", "epistemic"), strict=True):
        for system, color in zip(systems, COLORS, strict=False):
            rows = of_system(table, system)
            mean, error = column(rows, score)
            angles = [row["angle"] for row in rows]
            axis.plot(angles, mean, color=color, label=system)
            axis.fill_between(
                angles, mean - error, mean + error, color=color, alpha=0.2
            )
        axis.set(title=score, xlabel="angle (degrees)", ylim=(0, None))
        axis.set_xticks(range(0, 181, 45))
    axes[0].set_ylabel("nats")
    legend_below(figure, axes[0], 4)
    return figure


def pruned_weights(found):
    """Accuracy by the share of weights that is pruned."""
    table = found["pruned_weights"]["tables"]["accuracy %"]
    figure, axis = panels(1, 6.0, 3.6)
    shares = [name for name in table["rows"][0] if name.endswith("%")]
    kept = [1 - float(share.rstrip("%")) / 100 for share in shares]
    for row, color in zip(table["rows"], COLORS, strict=False):
        mean, error = np.array(
            [tables.mean_and_error(row[share]) for share in shares]
        ).T
        style = {"color": color, "marker": "o", "ms": 4, "label": row["pruned by"]}
        axis.errorbar(kept, mean, error, **style)
    axis.set(xscale="log", xlim=(1.1, 0.9 * kept[-1]), ylabel="accuracy (%)")
    axis.set_xticks(kept, shares)
    axis.set_xticks([], minor=True)
    axis.set_xlabel("weights pruned (log scale of those kept)")
    axis.legend(frameon=False)
    return figure


def task_sequence(found):
    """Accuracy on each of five tasks as training goes through them."""
    curves = next(iter(found["task_sequence"]["curves"].values()))
    curves = {name: np.array(c) for name, c in curves.items() if "joint" not in name}
    figure, axes = panels(len(curves), 3.0, sharey=True)
    for axis, (name, curve) in zip(axes, curves.items(), strict=True):
        time = np.linspace(0, 5, len(curve) + 1)[1:]
        for task, color in zip(range(5), COLORS, strict=False):
            begun = time > task
            label = f"task {task + 1}"
            axis.plot(time[begun], curve[begun, task], color=color, label=label)
        axis.set(title=name, ylim=(0, 100), xlim=(0, 5), xlabel="tasks trained on")
    axes[0].set_ylabel("test accuracy (%)")
    legend_below(figure, axes[0], 5)
    return figure


def leave_one_out_loss(found):
    """Training, leave-one-out and test loss at every epoch."""
    curves = found["leave_one_out_loss"]["curves"]["by epoch"]
    figure, axes = panels(2, 4.4, sharey=True)
    kinds = {"training loss": "#999999", "leave-one-out": "#0072B2"}
    for axis, system in zip(axes, ("IVON", "AdamW"), strict=True):
        for kind, color in (kinds | {"test loss": "#D55E00"}).items():
            runs = np.array(curves[f"{system}, {kind}"])
            epochs = np.arange(1, 1 + runs.shape[1])
            axis.plot(epochs, runs.mean(0), color=color, label=kind)
            low, high = runs.min(0), runs.max(0)
            axis.fill_between(epochs, low, high, color=color, alpha=0.2, lw=0)
        axis.set(title=system, xlabel="epoch", yscale="log")
        axis.set_yticks((0.1, 0.2, 0.5, 1, 2), ("0.1", "0.2", "0.5", "1", "2"))
        axis.minorticks_off()
    axes[0].set_ylabel("nats per example")
    axes[0].legend(frameon=False)
    return figure


def merged_networks(found):
    """Accuracy of the merged network by the scale of the merge."""
    curves = dict(found["merged_networks"]["curves"]["average accuracy % by scale"])
    scales = curves.pop("scale")
    figure, axis = panels(1, 6.0, 3.6)
    for (name, runs), color in zip(curves.items(), COLORS, strict=False):
        mean, error = np.array(
            [tables.mean_and_error(list(runs)) for runs in zip(*runs, strict=True)]
        ).T
        style = {"color": color, "marker": "o", "ms": 4, "label": name}
        axis.errorbar(scales, mean, error, **style)
    axis.set(xscale="log", xlabel="scale of the merge", ylabel="test accuracy (%)")
    axis.set_xticks((0.1, 0.2, 0.5, 1, 2, 4), ("0.1", "0.2", "0.5", "1", "2", "4"))
    axis.minorticks_off()
    axis.legend(frameon=False)
    return figure


TOP = 30  # %, of a histogram
CURVATURE = {"IVON": "#0072B2", "IVON, forgets faster": "#D55E00"}


def unknown_classes(found):
    """How undecided predictions are on MNIST, in domain and out of it."""
    shares = found["unknown_classes_mnist"]["curves"]["share of images by entropy"]
    figure, axes = panels(2, 4.0, sharey=True)
    for axis, system in zip(axes, ("AdamW", "IVON"), strict=True):
        for where, color in (("inside", "#0072B2"), ("outside", "#D55E00")):
            style = {"color": color, "fill": True, "alpha": 0.5}
            label = "known classes" if where == "inside" else "unknown classes"
            share = shares[f"{system}, {where}"]
            axis.stairs(share, shares["edges"], label=label, **style)
            if share[0] > TOP:
                note = f"↑ {share[0]:.0f} %"
                axis.text(shares["edges"][1], TOP, note, color=color, va="top")
        axis.set(title=system, xlabel="predictive entropy (nats)", ylim=(0, TOP))
    axes[0].set_ylabel("share of images (%)")
    axes[1].legend(frameon=False)
    return figure


def curvature(found):
    """H of each weight beside the exact diagonal of the Hessian, run after run."""
    runs = found["curvature"]["curves"]["weights of the first seed"]
    epochs = sorted({run["epochs"] for run in runs})
    figure, axes = panels(len(epochs), 3.4, sharex=True, sharey=True)
    for axis, count in zip(axes, epochs, strict=True):
        for run in (run for run in runs if run["epochs"] == count):
            color = CURVATURE.get(run["system"])
            if color:
                pair, style = (run["diagonal"], run["h"]), {"s": 3, "color": color}
                axis.scatter(*pair, **style, alpha=0.4, label=run["system"])
        axis.axline((1e-3, 1e-3), (1e-2, 1e-2), color="0.5", lw=1, label="equal")
        axis.set(xscale="log", yscale="log", xlim=(1e-5, 1), ylim=(1e-5, 1))
        axis.set(title=f"{count} epochs", xlabel="exact diagonal of the Hessian")
    axes[0].set_ylabel("h")
    legend_below(figure, axes[0], 3)
    return figure


REGIMES = {  # of small data
    "AdamW, stopped, scaled": "#D55E00",
    "Deep ensemble": "#E69F00",
    "MC dropout": "#CC79A7",
    "no noise": "#999999",
    "IVON": "#0072B2",
}
CHOICES = {  # of labels: color and line
    "AdamW, entropy": ("#D55E00", "-"),
    "MC dropout, BALD": ("#CC79A7", "-"),
    "no noise, entropy": ("#999999", "-"),
    "IVON, random": ("#0072B2", ":"),
    "IVON, BALD": ("#0072B2", "-"),
}
AGENTS = {
    "epsilon-greedy": "#D55E00",
    "bootstrap ensemble": "#E69F00",
    "dropout": "#CC79A7",
    "IVON, greedy": "#56B4E9",
    "constant noise": "#999999",
    "IVON": "#0072B2",
}


def regimes(found):
    """Small data by NLL, shift and effect of the posterior; labelling and decisions."""
    figure, axes = panels(3, 4.0, 3.4, rows=2)
    small = found["small_data"]["tables"]
    for axis, flip in zip(axes[0], (0, 40), strict=False):
        rows = [row for row in small["test"]["rows"] if row["flipped %"] == flip]
        lines_of_systems(axis, rows, "N")
        axis.set(title=f"{flip} % wrong labels", xscale="log")
        axis.set(xlabel="examples", ylabel="NLL")
    axes[0, 0].legend(frameon=False, fontsize="small")
    posterior_effect(axes[0, 2], small["effect of the posterior"]["rows"])
    lines_of_systems(axes[1, 0], small["shifted"]["rows"], "severity")
    axes[1, 0].set(title="1,000 examples, shifted", xlabel="severity", ylabel="NLL")
    accuracy = found["active_learning"]["curves"]["accuracy % by labels"]
    asked_labels(axes[1, 1], accuracy)
    regret(axes[1, 2], found["bandit"]["tables"]["regret"]["rows"])
    return figure


def lines_of_systems(axis, rows, by):
    """Draw the NLL of the systems of REGIMES by a column."""
    for system, color in REGIMES.items():
        some = [row for row in rows if row["system"] == system]
        mean, error = column(some, "NLL")
        style = {"color": color, "marker": "o", "ms": 4, "label": system}
        axis.errorbar([row[by] for row in some], mean, error, **style)


def posterior_effect(axis, rows):
    """Draw the intervals of IVON's NLL less that of its control without noise."""
    flips = sorted({row["flipped %"] for row in rows})
    for i, (flip, color) in enumerate(zip(flips, COLORS, strict=False)):
        some = [row for row in rows if row["flipped %"] == flip]
        ends = [row["less no noise"] for row in some]
        middle, low, high = (
            np.array([end[name] for end in ends])
            for name in ("difference", "low", "high")
        )
        sizes = np.array([row["N"] for row in some]) * 1.1 ** (i - 1)
        style = {"fmt": "o", "ms": 4, "color": color, "label": f"{flip} % wrong"}
        axis.errorbar(sizes, middle, (middle - low, high - middle), **style)
    axis.axhline(0, color="0.5", lw=1)
    axis.set(xscale="log", xlabel="examples", title="effect of the posterior")
    axis.set_ylabel("NLL of IVON, less no noise")
    axis.legend(frameon=False, fontsize="small")


def asked_labels(axis, curves):
    """Draw accuracy by the number of labels."""
    for name, (color, line) in CHOICES.items():
        mean = np.mean(curves[name], axis=0)
        axis.plot(curves["labels"], mean, line, color=color, label=name)
    axis.set(title="active learning", xlabel="labels", ylabel="accuracy (%)")
    axis.legend(frameon=False, fontsize="small")


def regret(axis, rows):
    """Draw the regret of the agents by the width of the wheel."""
    deltas = sorted({row["delta"] for row in rows})
    for i, (name, color) in enumerate(AGENTS.items()):
        mean, error = column(of_system({"rows": rows}, name), "regret %")
        places = np.arange(len(deltas)) + 0.1 * (i - 2.5)
        style = {"fmt": "o", "ms": 4, "color": color, "label": name}
        axis.errorbar(places, mean, error, **style)
    axis.set_xticks(range(len(deltas)), deltas)
    axis.set(title="wheel", xlabel="delta", ylabel="regret (% of random)", ylim=0)
    axis.legend(frameon=False, fontsize="small")


PLOTS = (
    uncertainty,
    ablations,
    multi_ivon,
    unknown_classes,
    leave_one_out_loss,
    merged_networks,
    task_sequence,
    pruned_weights,
    curvature,
    regimes,
)


def draw_all(found, folder):
    """Draw every plot into the folder."""
    folder.mkdir(exist_ok=True)
    for plot in PLOTS:
        plot(found).savefig(folder / f"{plot.__name__}.png", dpi=90)
