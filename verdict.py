"""What became of a run, in a sentence or two, and what to do about it: the headline of its report.

    a gated run    meets its target, or MISSED it: by how much, why, and what to type instead
    a dense run    is ready to be a parent, or not; and whether it was still learning when it ended

Notable: the advice depends on the cause. A run that lost answers while its loss was met needs a tighter slack; one whose lambda
stood at its cap needs a higher cap; one that was still on its way needs more steps.
This file reads the numbers of analyze.report and metrics.jsonl; it imports no other file of ours.
"""

SETTLED = 0.002  # nats per fifth of a run: a held-out loss that falls by less than this has settled


def still_learning(metrics):
    """By how many nats the held-out loss of a dense run fell in the last fifth of its steps; None if it has too few evaluations to tell.

    metrics: the lines of metrics.jsonl. The lowest loss before the last fifth is compared with the lowest of all.
    """
    end = metrics[-1]["step"]
    before = [m["val_loss"] for m in metrics if m["step"] <= 0.8 * end]
    if len(before) < 3 or before[-1] is None:
        return None
    return min(before) - min(m["val_loss"] for m in metrics)


def of_dense(report):
    """The sentence for a dense run; report: analyze.report's dict. None if there is nothing to say."""
    run, learning = report["run"], report["still_learning"]
    if report["ready"]:
        return f"{run} is ready to be a parent: every answer is right, and its held-out loss is {report['dense']['val_loss']:.1e}"
    if report["ready"] is False:
        return (f"NOT READY: {run} is no parent yet: {right(report['dense'])}its held-out loss is {report['dense']['val_loss']:.4f}, "
                f"ready_loss is {report['ready_loss']:g}. Train it on with --init_from=resume and more --max_steps")
    if learning is None:
        return None
    if learning > SETTLED:
        return (f"{run} was still learning: its held-out loss fell by {learning:.4f} nats in the last fifth of the run. "
                "A child that keeps its loss keeps that of an unfinished model")
    return f"{run} has settled: its held-out loss fell by {max(0.0, learning):.4f} nats in the last fifth of the run"


def right(judged):
    """'9,918 of 10,000 answers are right, ', or nothing for a text."""
    if judged["correct"] is None:
        return ""
    return f"{judged['correct']:,} of {judged['examples']:,} answers are right, "


def of_missed(report, config, metrics):
    """The headline and the advice for a gated run that never met its target after the start, two strings."""
    run, sparse = report["run"], report["sparse"]
    excess = sparse["val_loss"] - report["target_loss"]
    loss = f"{excess:.4f} nats above the target" if excess > 0 else "its loss within the target"
    lost = (report["dense"]["correct"] or 0) - (sparse["correct"] or 0)
    answers = f", {lost:,} answers lost" if sparse["correct"] is not None else ""
    headline = (f"MISSED: no evaluation of {run} met its target. The closest, step {report['step']}: "
                f"{report['edges']['open']:.1f} open edges{answers}, {loss}. The table and the pictures show that one")
    return headline, "What to try: " + advice(report, config, metrics, excess)


def advice(report, config, metrics, excess):
    """What fits the cause, as a command's ending."""
    run = report["run"]
    if metrics[-1]["step"] < config["max_steps"]:
        return f"the run is at step {metrics[-1]['step']} of {config['max_steps']}. The same command goes on"
    if excess <= 0:
        return (f"the loss was met while answers were lost, so the slack is too wide: "
                f"--loss_slack={config['loss_slack'] / 3:.1g} --constraint_scale={config['constraint_scale'] / 3:.1g} --out_dir={run}-tight")
    late = [m["lambda"] for m in metrics[len(metrics) // 2:]]
    if sum(lam >= 0.99 * config["lambda_max"] for lam in late) > len(late) / 2:
        return (f"lambda stood at its cap, so edges went faster than training could repair: "
                f"--lambda_max={3 * config['lambda_max']:g} --out_dir={run}-slower")
    return f"lambda was inside its bounds, so more time may do: --max_steps={2 * config['max_steps']} --out_dir={run}-longer"
