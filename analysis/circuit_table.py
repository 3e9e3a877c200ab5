"""What `analyze.py circuit` prints: attention edges, component edges and heads in one table, then controls.

result: the dict of compare.py, as in circuit-<task>.json. Without runs it prints tasks and their prompts.
"""

from circuits.attention_edges import LEVELS
from circuits.tasks import LOGIT, PROBABILITY, TASKS, make_pairs, vocabulary
from storage.files import UserError

# what the metric of clean prompts must be above that of corrupted ones, or a circuit means little
MARGINS = {LOGIT: 0.5, PROBABILITY: 0.1}
ABLATED = {"zero": "cut to zero", "interchange": "as in the corrupted run"}


def number(x):
    """`12.3`, `1,234`; `-` for None."""
    if x is None:
        return "-"
    return f"{x:.1f}" if x < 100 else f"{x:,.0f}"


def row(label, dense, sparse, with_ratio=True):
    """One line of the table. dense, sparse: numbers or None."""
    ratio = (f"{dense / sparse:.1f}x" if dense and sparse else "-") if with_ratio else ""
    return f"{label:58} {number(dense):>9} {number(sparse):>9} {ratio:>8}".rstrip()


def table(result):
    """The table as text."""
    lines = [f"{result['task']}, {result['metric']}; {result['pairs']} pairs to rank, "
             f"{result['pairs_to_test']} others to test", f"{'':58} {'dense':>9} {'sparse':>9} {'fewer':>8}"]
    for key in ("clean", "corrupted"):
        metrics = [f"{result[model]['metric'][key]:9.2f}" for model in ("dense", "sparse")]
        lines.append(f"{'the metric, ' + key:58} {' '.join(metrics)}")
    lines += doubts(result)
    for ablation, found in result["attention_edges"].items():
        lines += attention_edges(ablation, found)
    lines += component_edges(result)
    return "\n".join([*lines, "", *controls(result)])


def doubts(result):
    """A line for every model that hardly knows the task: its circuit is that of next to nothing."""
    lines, margin = [], MARGINS[result["metric"]]
    for model in ("dense", "sparse"):
        metric = result[model]["metric"]
        if metric["clean"] - metric["corrupted"] < margin:
            lines.append(f"the {model} model hardly knows the task: clean and corrupted prompts differ by "
                         f"less than {margin:g}")
    return lines


def attention_edges(ablation, found):
    """The lines of one ablation. found: of prompt_circuits.compare."""
    known, tested = found["pairs"]
    lines = ["", f"attention edges, {ABLATED[ablation]}; a prompt, {known} of {tested} that both know"]
    if "dense" not in found:
        return lines
    dense, sparse = found["dense"], found["sparse"]
    lines.append(row("  there are", dense["edges"], sparse["edges"]))
    for kind, words in (("within", "to be within {off:.0f} % of the effect"),
                        ("reaches", "to reach {at:.0f} % of it")):
        for level in LEVELS if kind == "within" else (0.9,):
            one, other = dense[kind][str(level)], sparse[kind][str(level)]
            label = words.format(off=100 - 100 * level, at=100 * level)
            lines.append(row(f"  {label}, mean", one["mean"], other["mean"]))
            if level == 0.9:
                lines.append(row(f"  {label}, median", one["median"], other["median"]))
    fewest = [min(sizes["reaches"] for sizes in found[model]["rankings"].values())
              for model in ("dense", "sparse")]
    lines.append(row("  to reach 90 % by the ranking best at that, where chosen", *fewest))
    lines.append(f"{'  ranked by':58} {dense['ranking']:>9.12} {sparse['ranking']:>9.12}")
    return lines


def component_edges(result):
    """The lines of heads and of component edges."""
    dense, sparse = result["dense"], result["sparse"]
    lines = ["", "component edges and heads, as in the corrupted run; all prompts together"]
    lines.append(row("  component edges there are", dense["edges"], sparse["edges"]))
    lines.append(row("  heads that open on these prompts", dense["heads"], sparse["heads"]))
    for by, label in (("by_edges", "component edges"), ("by_heads", "heads")):
        for level in LEVELS:
            needed = [model[by]["needed"][str(level)] for model in (dense, sparse)]
            lines.append(row(f"  {label} for {100 * level:.0f} % of the effect", *needed))
    return lines


def controls(result):
    """The lines of the controls: shares of the effect, in percent."""
    lines = ["what else carries of the effect, %"]
    grains = [(f"attention edges, {ABLATED[ablation]}", found)
              for ablation, found in result["attention_edges"].items() if "dense" in found]
    grains.append(("component edges", result))
    def in_percent(label, shares):
        return f"    {label:54} {100 * shares[0]:9.0f} {100 * shares[1]:9.0f}"

    for name, found in grains:
        models = [found[model] for model in ("dense", "sparse")]
        lines.append(f"  {name}")
        for control in models[0]["controls"]:
            another = f"the circuit of {result['another']}"
            lines.append(in_percent(another if control.startswith("another") else control,
                                    [model["controls"][control] for model in models]))
        if "nonsense" in models[0]:
            lines.append(in_percent("prompts on which as few edges say a nonsense answer, %",
                                    [model["nonsense"] for model in models]))
        lines.append(row("    an untrained model of the shape: its circuit",
                         *[model["untrained"] for model in models], with_ratio=False))
    return lines


# ------------------------------------------------------------------------------------------------------------
# Without runs


def lines_of_tasks():
    """All tasks, a list of lines."""
    return [f"{name:13} {', '.join(fit or 'any' for fit in fits):16} {metric:24} "
            f"{make_prompts.__doc__.splitlines()[0]}" for name, (make_prompts, fits, metric) in TASKS.items()]


def lines_of_prompts(task, n, seed, vocabulary_name):
    """n pairs of a task's prompts, a list of lines. vocabulary_name: None is the first that the task fits."""
    if n < 1:
        raise UserError("--n must be at least 1")
    if task not in TASKS:
        raise UserError(f"there is no task {task!r}. There are {', '.join(TASKS)}")
    tokens = vocabulary(vocabulary_name or TASKS[task][1][0])
    pairs, metric = make_pairs(task, n, seed, tokens)
    lines, show = [f"{task}, {metric}"], tokens.decode
    for pair in pairs:
        lines.append(f"\nclean      {show(pair.clean)!r}\ncorrupted  {show(pair.corrupted)!r}")
        for position, right, wrong in zip(pair.positions, pair.right, pair.wrong):
            right, wrong = first_few(right, show), first_few(wrong, show)
            lines.append(f"at {position:3d}     right {right}; wrong {wrong}")
    return lines


def first_few(ids, show, most=4):
    """The first tokens of a list, in quotes."""
    words = ", ".join(repr(show([i])) for i in ids[:most])
    return words + " ..." if len(ids) > most else words
