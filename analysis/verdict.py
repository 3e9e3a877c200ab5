"""What became of a run, in a sentence, and what to do about it: the headline of its report, and advice.

    a gated run    meets its target, or MISSED it: by how much, why, and what to type instead
    a dense run    is ready to be a parent, or not; and whether it was still learning when it ended

Notable:
- A run that never met its target is known by the evaluation that came closest, closest.pt: first the fewest
  answers lost, then the fewest nats too many.
- Advice depends on the cause. A run that lost answers while its loss was met needs a tighter slack; one whose
  lambda stood at its cap a higher cap; one that was still on its way more steps.
- "Still learning" is a fall of the held-out loss that noise does not explain:

      fall = loss three quarters through the run - loss at its end
      noise = 2 std(changes from one evaluation to the next)

  Where the learning rate has come down to its end, the loss falls with it: only a control, the run trained on
  for as long, can tell what is left to learn (docs/text.md).

This file reads numbers, of `evaluate`, of metrics.jsonl and of report.json.
"""

import statistics
from typing import NamedTuple

from storage.files import typed
from training.judge import train_on

# nats; a loss that falls by less in the last quarter of a run has settled: the slack that addition's child is
# given
SETTLED = 0.001
COOLED = 0.2  # of its peak; a learning rate that ends below has come down
AT_CAP = 0.99  # of lambda_max, and more, is the cap
# of the dense loss; a child that falls below by more has a parent that was not there yet. To train on for as
# long, with gates or without, brought finished parents at most 2 % (docs/text.md)
FAR = 0.05


class Learning(NamedTuple):
    """How the held-out loss moved in the last quarter of a run, nats."""

    fall: float
    noise: float  # a fall of this size can be luck

    @property
    def is_falling(self):
        return self.fall > max(self.noise, SETTLED)


def learning(metrics):
    """Learning at the end of a run, of the lines of metrics.jsonl; None if there are too few to tell."""
    end = metrics[-1]["step"]
    before = [m["val_loss"] for m in metrics if m["step"] <= 0.75 * end][-1:]
    losses = before + [m["val_loss"] for m in metrics if m["step"] > 0.75 * end]
    changes = [later - earlier for earlier, later in zip(losses, losses[1:])]
    if len(changes) < 2:
        return None
    return Learning(losses[0] - losses[-1], 2 * statistics.stdev(changes))


def still_learning(metrics, config):
    """Did a run end before its held-out loss had settled? False also where nobody can tell."""
    moved = learning(metrics)
    has_cooled = (metrics[-1]["step"] >= config["max_steps"]
                  and config["min_lr"] < COOLED * config["learning_rate"])
    return moved is not None and moved.is_falling and not has_cooled


class Parent(NamedTuple):
    """The run that a gated run started from."""

    folder: str
    config: dict  # of config.json
    metrics: list  # lines of metrics.jsonl


def is_one_checkpoint(report):
    """Is this the report of a file that somebody named, which says nothing of its run as a whole?"""
    return report["run"].endswith(".pt")


# ------------------------------------------------------------------------------------------------------------
# The headline


def headline(report, config, metrics):
    """The first line of a report.

    report: that of report.py so far; config: of config.json; metrics: lines of metrics.jsonl.
    """
    if not report["sparse"]:
        return headline_of_dense(report, config, metrics)
    run, step, end = report["run"], metrics[-1]["step"], config["max_steps"]
    stalled = config["patience"] and step - report["step"] >= config["patience"]  # if it met its target
    so_far = "" if step >= end or stalled else f" so far (step {step} of {end})"
    edges = f"{report['edges']['open']:.2f} of {report['edges']['total']} edges open"
    if report["meets_target"]:
        return f"{run} meets its target{so_far}: {edges}{right(report['sparse'])}"
    if not report["step"]:
        return f"NOT TRAINED: {run} is at its start, step 0 of {end}; no pictures are drawn of that"
    if is_one_checkpoint(report):
        return f"{run} misses its target: {edges}, {distance_in_words(report)}"
    return (f"MISSED: no evaluation of {run} met its target{so_far}. The closest, of step {report['step']}: "
            f"{edges}, {distance_in_words(report)}. Table and pictures show that one")


def distance_in_words(report):
    """`3 answers lost, 0.0004 nats too many`: what the closest evaluation of a gated run lacks."""
    lost, nats = report["closest"]["answers_lost"], report["closest"]["nats_too_many"]
    words = [f"{lost:,} answers lost"] if lost else []
    return ", ".join([*words, f"{nats:.2g} nats too many" if nats else "its loss within the target"])


def right(judged):
    """`, 9,918 of 10,000 answers right`, or nothing for a text. judged: a side of a report."""
    if judged["correct"] is None:
        return ""
    return f", {judged['correct']:,} of {judged['examples']:,} answers right"


def headline_of_dense(report, config, metrics):
    """What `headline` says of a dense run."""
    run, wanted, moved = report["run"], config["ready_loss"], learning(metrics)
    state = f"held-out loss {report['dense']['val_loss']:.4f}{right(report['dense'])}"
    if wanted:
        what = "is ready to be a parent" if report["ready"] else "is no parent yet"
        return f"{'' if report['ready'] else 'NOT READY: '}{run} {what}: {state}; ready_loss is {wanted:g}"
    if moved is None:
        return f"{run}: {state}; too few evaluations to tell whether it was still learning"
    if still_learning(metrics, config):
        return (f"{run} was STILL LEARNING at its end: {state}. The loss fell by {moved.fall:.2g} nats in "
                f"the last quarter of the run, where noise explains {moved.noise:.1g}")
    if moved.is_falling:
        return (f"{run}: {state}, at the end of its learning rate. What more steps would have brought, only "
                "a control can tell: docs/text.md")
    return (f"{run} has settled: {state}. The loss moved by {abs(moved.fall):.1g} nats in the last quarter "
            "of the run")


# ------------------------------------------------------------------------------------------------------------
# The advice


def advice(report, config, metrics, parent=None):
    """What to do about a run that is not what it was to become: a list of sentences, each with what to type;
    empty if there is nothing to do. parent: of a gated run its Parent, or None.
    """
    run, is_at_end = report["run"], metrics[-1]["step"] >= config["max_steps"]
    if is_one_checkpoint(report):
        return []
    if report["sparse"]:
        if report["meets_target"]:
            return remarks_on_met(report, config, metrics, parent)
        if not is_at_end:
            return [f"It is not at its end. To go on: {train_on(run)}"]
        return unfinished(parent, run) + advice_for_missed(report, config, metrics)
    if config["ready_loss"] and not report["ready"]:
        return ["No child can start from it. Train it on: "
                + train_on(run, config["max_steps"] * (2 if is_at_end else 1))]
    if not config["ready_loss"] and still_learning(metrics, config):
        return ["A child that keeps its loss keeps that of an unfinished model. Train it on: "
                + train_on(run, 2 * config["max_steps"])]
    return []


def unfinished(parent, run):
    """[what to do about a gated run's Parent that was still learning], or [] if there is none such."""
    if not parent or not still_learning(parent.metrics, parent.config):
        return []
    return ["Its parent was still learning when it ended: the target is an unfinished model's loss. "
            f"{train_again(parent, run)}"]


def train_again(parent, run):
    """How to train a gated run's Parent on, and then the run anew."""
    longer = train_on(parent.folder, 2 * parent.metrics[-1]["step"])
    return (f"To train that on: {longer}; then the same command as for this run with "
            + typed(f"--init_from={parent.folder}", f"--out_dir={run}-again"))


def remarks_on_met(report, config, metrics, parent):
    """What to know of a gated run that met its target: how much the target is worth, and an early best."""
    remarks = unfinished(parent, report["run"])
    loss, childs = report["dense"]["val_loss"], report["sparse"]["val_loss"]
    moved = learning(metrics)
    if loss - childs > max(FAR * loss, SETTLED, moved.noise if moved else 0):
        longer = train_again(parent, report["run"]) if parent else "Train that longer first"
        remarks = [f"The dense model was hardly trained: its held-out loss is {loss:.4g}, the child's "
                   f"{childs:.4g}, so the target asks for little. {longer}"]
    if report["step"] < config["max_steps"] / 4:
        remarks.append(f"best.pt is of step {report['step']} of {config['max_steps']}: no later evaluation "
                       "met the target with fewer edges (the green dots in training.png)")
    return remarks


def advice_for_missed(report, config, metrics):
    """The advice for a gated run that came to its end and never met its target: by cause."""
    def again(name, **changed):
        flags = [f"--{key}={value if isinstance(value, int) else format(value, '.4g')}"
                 for key, value in changed.items()]
        return " ".join(["the same command with", *flags, typed(f"--out_dir={report['run']}-{name}")])

    slack, steps = config["loss_slack"], 2 * config["max_steps"]
    if not report["closest"]["nats_too_many"] and slack:
        tight = {key: float(f"{config[key] / 3:.1g}") for key in ("loss_slack", "constraint_scale")}
        return ["Answers were lost while the loss was met, so the slack is too wide: "
                + again("tight", **tight)]
    higher = better_lambda_init(config, metrics)
    if higher:
        return [f"Lambda began too low, at {config['lambda_init']:g}, and was on its way up for most of the "
                f"run: meanwhile edges went that it needs. So {again('higher', lambda_init=higher)}, or with "
                f"more steps: {again('longer', max_steps=steps)}"]
    if was_lost_late(report, config, metrics):
        return [f"It was closest at step {report['step']} and lost that again: an edge that it needs was "
                "shut for good. Smaller steps and a higher floor take more care: "
                + again("careful", **smaller_steps_and_higher_floor(config))]
    at_cap, moved, sentences = is_at_cap_throughout(config, metrics), learning(metrics), []
    if at_cap:
        sentences.append("Lambda stood at its cap throughout, so edges went faster than training could "
                         "repair: " + again("slower", lambda_max=3 * config["lambda_max"]))
    if moved and moved.fall > moved.noise:
        twice = {key: 2 * config[key] for key in ("max_steps", "noise_free_steps") if config[key]}
        sentences.append("Its loss was still falling at the end, so more time may do: "
                         + again("longer", **twice))
    elif not at_cap:
        sentences.append("Its loss came no closer at the end, and lambda was not at its cap throughout: the "
                         "target is tighter than this training can meet. Allow more loss: "
                         + again("loose", loss_slack=3 * slack or 0.01))
    return sentences


def smaller_steps_and_higher_floor(config):
    """{setting: value}: half the learning rate, twice lambda's floor, and what would lie beyond these."""
    rate, floor = config["learning_rate"] / 2, 2 * config["lambda_min"]
    limits = {"min_lr": min(config["min_lr"], rate), "lambda_init": max(config["lambda_init"], floor),
              "lambda_max": max(config["lambda_max"], floor)}
    return {"learning_rate": rate, "lambda_min": floor} | {
        key: value for key, value in limits.items() if value != config[key]}


def was_lost_late(report, config, metrics):
    """Was a gated run much closer to its target in the first three quarters than at its end?

    By held-out loss, or by answers (one in a hundred).
    """
    last, target = metrics[-1], report["target_loss"]
    closest = next((m for m in metrics if m["step"] == report["step"]), last)
    if closest["step"] > 0.75 * last["step"]:
        return False
    if last["accuracy"] is not None and closest["accuracy"] - last["accuracy"] > 0.01:
        return True
    return last["val_loss"] - target > 2 * max(closest["val_loss"] - target, config["loss_slack"])


def better_lambda_init(config, metrics):
    """The lambda to begin with, of a run whose lambda began too low: it took more than half of the run to
    come to half of its highest, the loss so far above its target that lambda rose at half its speed or more.
    Else None.
    """
    highest = min(config["lambda_max"], max(m["lambda"] for m in metrics))
    there = next(i for i, m in enumerate(metrics) if m["lambda"] >= highest / 2)
    way = metrics[1:there]
    was_long = bool(way) and way[-1]["step"] > metrics[-1]["step"] / 2
    return highest if was_long and statistics.mean(m["violation"] for m in way) > 0.5 else None


def is_at_cap_throughout(config, metrics):
    """Was lambda at its cap in nine of ten evaluations after the start?"""
    behind = [m for m in metrics[1:] if m["step"] > config["linear_penalty_steps"]]  # before, it may not rise
    at_cap = [m["lambda"] >= AT_CAP * config["lambda_max"] for m in behind]
    return sum(at_cap) >= 0.9 * len(at_cap) > 0
