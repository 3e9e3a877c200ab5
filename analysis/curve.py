"""What sparsity costs on a text: open edges over the loss above the parent's, for runs with several slacks.

    for s in 0.003 0.03; do python analyze.py seeds config/python.py --seeds=2-4 --loss_slack=$s; done
    python analyze.py seeds config/python_control.py --seeds=2-4
    python analyze.py curve out/python-* --controls out/python_control-*

A point says little: how many edges are open depends on how much loss one allows. So here is the curve, with
every run that was named, also those that missed their target (hollow), and with its *control*: the same
parent trained on for as many steps without gates. What it gains, its child could have gained as well, so a
fair price is counted from there.

Notable:
- A share of open edges depends on the context, edges per head and token does not: the axis shows the latter.
- What `baselines` cut by another rule, and trained on for as many steps as the run, has a mark of its own in
  the picture.
- Who decided how sparse a run became? Lambda, if it stayed off its bounds. The table shows the smallest and
  the largest of the second half of the run.
"""

import os

from matplotlib import pyplot as plt

from analysis.baselines import place_of, read_rows
from analysis.figures import GREY, save
from analysis.rules import RULES
from analysis.seeds import aligned
from analysis.verdict import AT_CAP
from models.checkpoint import read_checkpoint
from models.sources import checkpoint_named, from_here
from storage.files import UserError, read_json, typed, write_json
from training.folder import read_metrics, settings_of

MARKS = dict(zip(RULES, "^x+s*d"))  # of other rules in the picture


def read_report(folder):
    """report.json of a run. Raises UserError."""
    path = os.path.join(folder, "report.json")
    if not os.path.exists(path):
        raise UserError(f"{folder} has no report yet: {typed('python', 'analyze.py', 'report', folder)}")
    return read_json(path)


def lambda_of(folder, config):
    """{low, high, inside}: lambda over the second half of a run, and whether it stayed off its bounds."""
    metrics = read_metrics(os.path.join(folder, "metrics.jsonl"))
    half = [m["lambda"] for m in metrics if m["step"] >= metrics[-1]["step"] / 2]
    low, high = min(half), max(half)
    inside = low > config["lambda_min"] / AT_CAP and high < config["lambda_max"] * AT_CAP
    return {"low": low, "high": high, "inside": inside}


def point_of(folder, controls):
    """A run as a point of the curve, a dict. controls: of `controls_of`.

    Losses in nats, held out, all on the same windows; control_gain: how far the control is below the parent;
    above_control: how far the run is above the control; both None without one.
    """
    report, config = read_report(folder), settings_of(folder)
    if not report["sparse"]:
        raise UserError(f"{folder} is a dense run. Controls go behind --controls")
    edges, loss, dense = report["edges"], report["sparse"]["val_loss"], report["dense"]["val_loss"]
    tokens, heads = len(edges["by_distance"]), sum(map(len, edges["per_head"]))
    parent, steps = from_here(report["parent"], folder, report["run"]), config["max_steps"]
    control = controls.get((parent, steps))
    return {
        "run": folder, "seed": report["seed"], "parent": parent, "steps": steps,
        "slack": config["loss_slack"], "met": report["meets_target"],
        "parent_loss": dense, "above_parent": loss - dense,
        "control_gain": None if control is None else dense - control,
        "above_control": None if control is None else loss - control,
        "percent": 100 * edges["fraction"], "per_token": edges["open"] / tokens,
        "per_head_and_token": edges["open"] / tokens / heads, "context": tokens,
        "lambda": lambda_of(folder, config),
        "other_rules": list(read_rows(place_of(folder, steps)).values()),
    }


def controls_of(folders):
    """{(parent's checkpoint, steps): the control's loss, nats}."""
    found = {}
    for folder in folders:
        report, parent = read_report(folder), read_checkpoint(checkpoint_named(folder))["parent"]
        if report["sparse"] or not parent:
            raise UserError(f"{folder} is no control: a dense run that was trained on from a parent")
        found[parent, settings_of(folder)["max_steps"]] = report["dense"]["val_loss"]
    return found


def table(points):
    """The points as text, by parent and by loss."""
    rows = [["run", "steps", "slack", "target", "above parent", "above control", "open", "a token",
             "a head, token", "lambda, second half"]]
    for p in points:
        low, high, inside = p["lambda"].values()
        above_control = "-" if p["above_control"] is None else f"{p['above_control']:+.4f}"
        rows.append([p["run"], f"{p['steps']:,}", f"{p['slack']:g}", "met" if p["met"] else "MISSED",
                     f"{p['above_parent']:+.4f}", above_control, f"{p['percent']:.2f} %",
                     f"{p['per_token']:.1f}", f"{p['per_head_and_token']:.2f}",
                     f"{low:.2g} to {high:.2g}" + ("" if inside else " AT A BOUND")])
    lines = [aligned(rows)]
    gains = {(p["parent"], p["steps"]): p["control_gain"] for p in points if p["control_gain"] is not None}
    for (parent, steps), gain in gains.items():
        lines.append(f"the control of {parent} gains {gain:.4f} nats in {steps:,} steps")
    return "\n".join(lines)


def draw_line(ax, points, color, label):
    """Runs of one parent and length. Left of 0 a dotted line says what their control gains."""
    x, y = [p["above_parent"] for p in points], [p["per_head_and_token"] for p in points]
    ax.plot(x, y, "-", color=color, lw=1, label=label)
    for p, *at in zip(points, x, y):
        ax.plot(*at, "o", color=color, mfc=color if p["met"] else "white")
        for row in p["other_rules"]:
            if row["rule"] in MARKS:
                ax.plot(row["above_parent"], row["edges"], MARKS[row["rule"]], ms=6, color=color)
    if points[0]["control_gain"] is not None:
        ax.axvline(-points[0]["control_gain"], color=color, lw=1, ls=":")


def draw(path, points):
    """The curve, a line for every parent and number of steps."""
    figure, ax = plt.subplots(figsize=(7, 5), layout="constrained")
    groups = {}
    for p in sorted(points, key=lambda p: (p["seed"], p["steps"], p["above_parent"])):
        groups.setdefault((p["parent"], p["steps"]), []).append(p)
    one_length = len({p["steps"] for p in points}) == 1
    for number, own in enumerate(groups.values()):
        length = "" if one_length else f", {own[0]['steps']:,} steps"
        draw_line(ax, own, f"C{number % 10}", f"seed {own[0]['seed']}{length}")
    shown = {row["rule"] for p in points for row in p["other_rules"]}
    for rule, mark in MARKS.items():
        if rule in shown:
            ax.plot([], [], mark, ms=6, color=GREY, label=f"{rule}, trained on")
    ax.axvline(0, color=GREY, lw=1, zorder=0)
    some = any(p["control_gain"] is not None for p in points)
    with_controls = "; dotted: what the parent would have gained without gates" if some else ""
    y = [p["per_head_and_token"] for p in points]
    ax.set(yscale="log", ylim=(max(1e-3, min(y) / 3), max(1e-2, max(y) * 3)),  # close points look close
           xlabel="held-out loss above the parent's (nats)", ylabel="open edges per head and token",
           title="What sparsity costs" + with_controls)
    share = 100 * 2 / (points[0]["context"] + 1)  # percent of the edges that one edge per head and token is
    right = ax.secondary_yaxis("right", functions=(lambda y: y * share, lambda y: y / share))
    right.set_ylabel(f"% open at a context of {points[0]['context']}")
    for axis in (ax.yaxis, right.yaxis):
        axis.set_major_formatter(lambda y, _: f"{y:g}")
        axis.set_minor_formatter(lambda y, _: f"{y:g}" if f"{y:e}"[0] in "25" else "")
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, title_fontsize=8,
                  title="circles: gated runs; filled: target met")
    ax.grid(alpha=0.3)
    save(figure, path)


def add_arguments(parser):
    parser.add_argument("runs", nargs="+", metavar="RUN", help="gated runs with one context")
    parser.add_argument("--controls", nargs="*", default=[], metavar="RUN", help="controls of their parents")
    parser.add_argument("--to", default="out/curve", metavar="PATH", help="PATH.png and PATH.json")


def run(options, settings):
    """`analyze.py curve`."""
    # out/x-* also names the logs and tables that `seeds` leaves beside the runs
    runs, controls = ([name.rstrip("/") for name in names if not os.path.isfile(name)]
                      for names in (options.runs, options.controls))
    if not runs:
        raise UserError(f"none of {' '.join(options.runs)} is a run's folder")
    controls = controls_of(controls)
    points = [point_of(folder, controls) for folder in runs]
    if len({p["context"] for p in points}) > 1:
        raise UserError("these runs have different contexts: a curve of each, please")
    points.sort(key=lambda p: (p["parent"], p["above_parent"]))
    print(table(points))
    write_json(options.to + ".json", points)
    draw(options.to + ".png", points)
    print(f"the curve: {options.to}.png; as numbers: {options.to}.json")
