"""Every setting of a run: its default, its unit, its meaning; what makes sense, what may change later.

    python train.py --help                      prints what the dataclass below says
    python train.py config/x.py --key=value     a config file's lines win over the defaults, the command line
                                                over both

nanoGPT runs its config files with `exec` and accepts any name; a typo is silently ignored. Here a config file
is read, not run: lines `name = value` with plain Python values. An unknown name, a value of the wrong type or
out of range stops before anything is built, and the message names the nearest setting that exists. One name
is no setting: `base`, another config file, of which this one says only what differs.
"""

import ast
import difflib
import inspect
import math
import os
import re
import textwrap
from dataclasses import dataclass, fields

from gate import GateConfig
from storage.files import CONFIGS, UserError


@dataclass
class Config:
    """Every setting: default, unit, meaning. Where the paper has a rule, the default is the paper's.

    A config file's lines `name = value` win over it, the command line over both.
    """

    # --- where a run starts, what it reads, where it ends up
    # 'scratch'; 'resume'; a run's folder; a config file, whose run is trained first if need be; OpenAI's
    # 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl'; an OLMo such as 'allenai/OLMo-1B-hf'; or a checkpoint: a
    # .pt file, or a file or folder of transformers
    init_from: str = "scratch"
    # folder of the run; '' is out/<name of the config file>, with -seed<N> behind it unless N is 1
    out_dir: str = ""
    dataset: str = "addition"  # data/<dataset>, made by prepare_data.py
    seed: int = 1  # of initialisation, data order and gates; passed on to a parent that is trained first
    device: str = "auto"  # 'auto' is cuda, else cpu; mps, which nobody has tried yet, only on request
    # torch.compile: 'on', 'off', or 'auto', where it works: on cuda; on a CPU, gated models and OLMos with
    # contexts of 64 and more
    compile: str = "auto"
    # of gated attention: 'plain', the formula; 'tiled', for CPUs; 'triton', for GPUs; 'auto' is the fastest
    # that fits (gate.py)
    attention_impl: str = "auto"
    # of matrix products: 'float32', 'bfloat16', or 'auto', bfloat16 where the hardware has it. Judged in
    # float32 always (but see base_dtype)
    dtype: str = "float32"
    # how several processes share the work: 'ddp', each holds the whole model, or 'fsdp', each a part
    # (sharding.py)
    parallel: str = "ddp"
    # make a block's activations again in the backward pass instead of keeping them: less memory, a third more
    # time
    recompute_activations: bool = False
    # --- the model; a run that starts from another run takes these from there
    architecture: str = "gpt2"  # of a run from scratch: 'gpt2' (model.py), 'olmo' or 'olmo2' (olmo.py)
    n_layer: int = 4
    n_head: int = 1
    n_kv_head: int = 0  # OLMo: heads of k and v, each for several of q; 0 is n_head
    n_embd: int = 64  # C, width of the residual stream
    block_size: int = 11  # tokens of context; a child of an OLMo may have less than its parent
    dropout: float = 0.0  # GPT-2 only
    bias: bool = True  # biases in Linear and LayerNorm layers; GPT-2 only
    tied: bool = True  # input and output embedding are one matrix
    # 'tanh', GPT-2's approximation, or 'none', the exact one, nanoGPT's, which a CPU computes faster; GPT-2
    # only
    gelu: str = "tanh"
    # of random weights; GPT-2's is made for 768 channels, a narrow model wants about 0.6 / sqrt(n_embd)
    init_std: float = 0.02
    # --- adapters (lora.py)
    lora_rank: int = 0  # train adapters of this rank and freeze the model; 0 trains all weights
    lora_alpha: float = 32.0  # adapters are scaled by lora_alpha / lora_rank
    # matrices and RMSNorms that get one, by the last part of their name; 'all' is all but embeddings, which
    # are added by name: 'all,embed_tokens'
    lora_targets: str = "q_proj,k_proj"
    # in which frozen weights are kept: 'float32' or 'bfloat16', half the memory; then the dense model is
    # judged in it, too
    base_dtype: str = "float32"
    # --- the gates, and the constraint that shuts them
    gated: bool = False  # False is an ordinary dense run; it ignores this block
    gate_bias: float = 3.0  # b in sigmoid(a + b); above 0 the edges start open
    gate_temperature: float = 1.0  # of the straight-through gradient
    # attention weight above which edges start open, by a shift of the key biases, or of each head's gates
    # (handover.py); 0 is off
    open_above: float = 0.0
    # of KL(dense || gated), nats, added to the loss that is trained on; the constraint and the judgement stay
    # without
    distill_weight: float = 0.0
    # first steps, under the penalty that pulls at wide-open edges too (gate.py)
    linear_penalty_steps: int = 0
    # last steps, in which gates are not drawn but thresholds, as when they are judged; gradients stay
    # straight-through
    noise_free_steps: int = 0
    loss_slack: float = 0.001  # nats above the dense loss that count as equal
    # nats, held out: a target of its own, such as a control's loss; 0 is the dense model's loss + loss_slack
    target_loss: float = 0.0
    # gates under which the constraint's loss is taken: 'sampled', or 'deterministic', as a run is judged
    constraint_gates: str = "sampled"
    constraint_interval: int = 4  # steps between two measurements of the constraint
    # compare with the dense model on the very same batch: a batch's luck is ten times a slack of 0.01 nats
    constraint_paired: bool = False
    # nats below the dense loss + loss_slack at which training aims; what is gained on training text is not
    # all held-out gain
    constraint_margin: float = 0.0
    # nats of further slack for the constraint while the learning rate is at its peak; it goes to 0 along the
    # same cosine. At a high learning rate no model is as good as it can be, gates or none
    peak_slack: float = 0.0
    # nats; a violation of this size moves lambda at full speed. No larger than loss_slack where the loss
    # cannot fall far below its target (geco.py)
    constraint_scale: float = 0.001
    lambda_rate: float = 0.03  # largest relative change of lambda per measurement
    lambda_average: float = 0.9  # memory of the moving average of the violation
    # where lambda starts: high, for the loss jumps when the gates begin to sample; while the penalty is
    # linear also its cap, so that edges go
    lambda_init: float = 4.0
    # the floor: a low lambda cuts edges faster than the constraint can tell which were needed
    lambda_min: float = 0.2
    # the cap: a high lambda lets nothing be shut for a long time after an error is gone
    lambda_max: float = 4.0
    # --- optimisation
    batch_size: int = 128  # sequences per step, of all processes together
    # sequences per forward pass; 0 is a process's whole share. Smaller needs less memory (gradient
    # accumulation)
    micro_batch_size: int = 0
    max_steps: int = 4500
    # of a gated run that has met its target: steps without an edge less after which it stops. 0 is off
    patience: int = 0
    learning_rate: float = 1e-3  # peak
    min_lr: float = 0.0  # at the end of the cosine
    warmup_steps: int = 100
    weight_decay: float = 0.0  # on matrices; it pulls q and k, and with them the gates, towards 0
    beta1: float = 0.9
    beta2: float = 0.99
    grad_clip: float = 1.0  # largest norm of the gradient; 0 is off
    # of the moving average of the weights that is judged and kept (Polyak): 0.99 is about the last 100 steps;
    # 0 is off
    average_decay: float = 0.0
    # of a dense run: nats, held out; at this loss, and with all answers right, it is ready and stops; no
    # child starts from it before. 0 is off
    ready_loss: float = 0.0
    # --- evaluation
    eval_interval: int = 100  # steps
    eval_batch_size: int = 1000  # sequences
    eval_batches: int = 0  # batches of each split; 0 is all of it
    wandb: str = ""  # a project of Weights & Biases to log to as well; needs that package (log.py)


CHOICES = {
    "constraint_gates": "deterministic sampled",
    "compile": "auto on off",
    "attention_impl": "auto plain tiled triton",
    "parallel": "ddp fsdp",
    "architecture": "gpt2 olmo olmo2",
    "gelu": "tanh none",
    "base_dtype": "float32 bfloat16",
    "dtype": "auto float32 bfloat16",
}


def limits():
    """{setting: (words, test)}: what a value must be beside its type."""
    at_least_1 = (
        "n_layer n_head n_embd block_size constraint_interval batch_size max_steps "
        "eval_interval eval_batch_size"
    )
    positive = (
        "lora_alpha init_std gate_temperature constraint_scale lambda_rate "
        "lambda_init lambda_min lambda_max learning_rate"
    )
    not_negative = (
        "ready_loss n_kv_head lora_rank loss_slack linear_penalty_steps noise_free_steps min_lr warmup_steps "
        "weight_decay grad_clip eval_batches constraint_margin distill_weight micro_batch_size peak_slack "
        "target_loss patience"
    )
    fractions = "dropout average_decay lambda_average beta1 beta2 open_above"
    return {
        **{key: ("at least 1", lambda v: v >= 1) for key in at_least_1.split()},
        **{key: ("above 0", lambda v: v > 0) for key in positive.split()},
        **{key: ("0 or more", lambda v: v >= 0) for key in not_negative.split()},
        **{key: ("from 0 up to, not including, 1", lambda v: 0 <= v < 1) for key in fractions.split()},
        **{key: one_of(words) for key, words in CHOICES.items()},
        "device": (
            "'auto', 'cpu', 'mps', 'cuda' or 'cuda:N'",
            lambda v: re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", v) is not None,
        ),
        "seed": ("from 0 to a million", lambda v: 0 <= v <= 1_000_000),
    }


# what a run takes over from its parent
SHAPE = tuple(
    "architecture n_layer n_head n_kv_head n_embd block_size dropout bias tied gelu init_std".split()
)
GATE = tuple(f.name for f in fields(GateConfig))
# model, start and target: what no run may change on its way
FIXED = SHAPE + GATE + tuple(
    "average_decay lora_rank lora_alpha lora_targets base_dtype dataset open_above loss_slack target_loss "
    "constraint_margin eval_batches eval_batch_size".split()
)
# what may differ when a run goes on
FREE = tuple("out_dir wandb device compile attention_impl dtype micro_batch_size parallel "
             "recompute_activations".split())
SETTINGS = list(Config.__annotations__)
# the block that a dense run ignores
GATED_ONLY = SETTINGS[SETTINGS.index("gate_bias"):SETTINGS.index("lambda_max") + 1]


def forward_passes(c):
    """What a training step costs, in forward passes of the model: a backward pass is one by activations and
    one by weights, if they are trained.
    """
    gated = (c.distill_weight > 0) + (1 + c.constraint_paired) / c.constraint_interval if c.gated else 0
    return (2 if c.lora_rank else 3) + c.recompute_activations + gated


def make_config(path, given):
    """Config of a config file (or None) and a dict of settings that win over it; and the names of all that
    were set.
    """
    values = read_config_file(path, Config, limits()) if path else {}
    if values.get("init_from", "").endswith(".py"):
        values["init_from"] = beside(path, values["init_from"])
    values |= given
    for key in {"init_from", "out_dir"} & set(values):
        values[key] = os.path.expanduser(values[key])
    config = Config(**values)
    if not config.out_dir:
        name = os.path.splitext(os.path.basename(path))[0] if path else "run"
        config.out_dir = f"out/{name}" + (f"-seed{config.seed}" if config.seed != 1 else "")
    config.out_dir = os.path.normpath(config.out_dir)
    return config, set(values)


def check_together(config, processes=1):
    """Raise UserError if settings contradict each other, or so many processes cannot share them."""
    check_shape(config)
    check_adapters(config)
    if config.gated:
        check_constraint(config)
    micro = micro_batch_size(config, processes)
    if not micro or config.batch_size % (micro * processes):
        raise UserError(
            f"batch_size={config.batch_size} does not divide into {processes} process(es) times "
            f"micro-batches of micro_batch_size={micro}"
        )


def micro_batch_size(config, processes):
    """Sequences of one forward pass."""
    return config.micro_batch_size or config.batch_size // processes


def micro_batches_of(config, processes):
    """How many micro-batches a step has, over all processes."""
    return config.batch_size // micro_batch_size(config, processes)


def check_shape(config):
    """Of a run from scratch; one that starts from a model has its shape."""
    if config.init_from != "scratch":
        return
    n_head, n_embd = config.n_head, config.n_embd
    if n_embd % n_head:
        raise UserError(f"n_embd={n_embd} must be a multiple of n_head={n_head}: the heads share the width")
    if config.gated:
        raise UserError(
            "a gated run needs a dense model whose loss it is to keep: set init_from to the run folder or "
            "the config file of one"
        )
    if config.lora_rank:
        raise UserError(
            "lora_rank adds adapters to a model that is there already: set init_from, or leave lora_rank away"
        )
    if config.architecture == "gpt2":
        if config.n_kv_head:
            raise UserError("n_kv_head is OLMo's only: leave it away for a GPT-2")
        return
    if n_head % (config.n_kv_head or n_head) or n_embd // n_head % 2:
        raise UserError(
            f"n_head={n_head} must be a multiple of n_kv_head={config.n_kv_head}, and n_embd={n_embd} "
            "an even multiple of n_head: RoPE turns pairs"
        )
    if config.dropout:
        raise UserError("dropout is GPT-2's only: leave it away for an OLMo")


def check_adapters(config):
    """LoRA and sharding, and what does not go with them."""
    if config.base_dtype != "float32" and not config.lora_rank:
        raise UserError("base_dtype is that of frozen weights: it needs lora_rank")
    if config.average_decay and config.parallel == "fsdp":
        raise UserError(
            "average_decay holds a second copy of the whole model: it does not go with parallel='fsdp'. "
            "Set it to 0"
        )


def check_constraint(config):
    """The hand-over, and lambda's bounds."""
    if not config.lambda_min <= config.lambda_init <= config.lambda_max:
        raise UserError(
            f"lambda_init={config.lambda_init} must lie between lambda_min={config.lambda_min} and "
            f"lambda_max={config.lambda_max}"
        )


# ------------------------------------------------------------------------------------------------------------
# Reading and checking. What follows knows no setting by name


# what ast.literal_eval raises: TypeError of {[]: 1}, the last two of what is nested too deep
NO_LITERAL = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)
EXAMPLES = {int: "1000", float: "1e-3", bool: "True or False", str: "auto"}


def described(config_class):
    """All settings of a dataclass in words, for --help: its fields, their defaults, the comments beside and
    above them. A comment `# --- words` begins a group.
    """
    lines, said = [], []
    for line in inspect.getsource(config_class).splitlines():
        line = line.strip()
        field = re.fullmatch(r"(\w+): \w+ = (.+?)(?:  # (.*))?", line)
        if line.startswith("# --- "):
            lines += ["", line.removeprefix("# --- ") + ":"]
        elif line.startswith("# "):
            said.append(line[2:])
        elif field:
            name, default, beside_it = field.groups()
            words = " ".join([*said, *([beside_it] if beside_it else [])])
            said = []
            lines += textwrap.wrap(words, 100, initial_indent=f"  --{name}={default}".ljust(34) + "  ",
                                   subsequent_indent=" " * 36) or [f"  --{name}={default}"]
    return "\n".join(lines).strip()


def parse_command_line(arguments, config_class, limits):
    """`[FILE.py] [--key=value ...]` -> the file's path or None, and a dict of the settings that were given.

    config_class: a dataclass; limits: {key: (words, test)}, see `check`. Raises UserError.
    """
    path, values = None, {}
    for argument in arguments:
        key, equals, text = argument.removeprefix("--").partition("=")
        if argument.startswith("--"):
            if not equals:
                raise UserError(f"{argument} has no value: write {argument}=VALUE")
            try:
                value = text if config_class.__annotations__.get(key) is str else ast.literal_eval(text)
            except NO_LITERAL:
                value = text  # no Python literal: `check` will say what is expected
            values[key] = check(key, value, "on the command line", config_class, limits)
        elif path is None:
            path = os.path.expanduser(argument)
        else:
            raise UserError(
                f"one config file at a time, not both {path} and {argument}. Settings are written "
                "--key=value"
            )
    return path, values


def read_config_file(path, config_class, limits, inside=()):
    """The settings in a config file, as a dict. Nothing in it is executed. Raises UserError, with the line's
    number.

    `base = 'config/other.py'` takes over the settings of another file; the file's own win. inside: files that
    led here.
    """
    if os.path.realpath(path) in inside:
        raise UserError(f"{path} is its own base: a file that it names as its base leads back to it")
    values, base = {}, {}
    for key, node, where in lines_of(path):
        value = plain_value(key, node, where)
        if key == "base":
            if not isinstance(value, str):
                raise UserError(
                    f"base {where} is {value!r}: it takes another config file, such as 'config/stdlib.py'"
                )
            base = read_config_file(
                beside(path, value), config_class, limits, (*inside, os.path.realpath(path))
            )
        else:
            values[key] = check(key, value, where, config_class, limits)
    return base | values


def beside(path, other):
    """Where another config file lies that the one at path names: as it is written, from the current folder;
    else in the folder of the file that names it.
    """
    other = os.path.expanduser(other)
    neighbour = os.path.join(os.path.dirname(path), os.path.basename(other))
    return other if os.path.exists(other) or not os.path.exists(neighbour) else neighbour


def lines_of(path):
    """[(name, syntax tree of its value, where it stands)] of the lines `name = value` in a config file.

    Raises UserError.
    """
    try:
        with open(path, encoding="utf-8-sig") as f:  # some editors put a mark at the beginning
            statements = ast.parse(f.read()).body
    except IsADirectoryError as error:
        raise UserError(f"{path} is a folder. Name a config file: "
                        "python train.py config/addition.py") from error
    except FileNotFoundError as error:
        raise UserError(f"there is no config file {path}.{file_like(path)}") from error
    except SyntaxError as error:
        raise UserError(f"{path}, line {error.lineno}: {error.msg}") from error
    except ValueError as error:
        raise UserError(f"{path} is no config file: it is not even text") from error
    lines = []
    for node in statements:
        where = f"in {path}, line {node.lineno}"
        if is_docstring(node):
            continue
        targets = node.targets if isinstance(node, ast.Assign) else []
        if len(targets) != 1 or not isinstance(targets[0], ast.Name):
            raise UserError(f"{where}: a config file holds comments and lines `name = value`, nothing else")
        lines.append((targets[0].id, node.value, where))
    return lines


def is_docstring(node):
    """Is this statement a string, and nothing else?"""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def plain_value(key, node, where):
    """The Python value that a syntax tree stands for, if it is plain. Raises UserError."""
    try:
        return ast.literal_eval(node)
    except NO_LITERAL as error:
        raise UserError(f"{key} {where}: write a plain value, such as 3, 1e-3, True or 'text'") from error


def file_like(path):
    """` Did you mean config/addition.py?`, or nothing if no file has a name like this one's.

    Looked for in its folder and in config/.
    """
    folder, name = os.path.split(path.replace("\\", "/"))
    if not name.endswith(".py"):
        name += ".py"
    for place in dict.fromkeys((folder, "config", CONFIGS)):
        files = os.listdir(place or ".") if os.path.isdir(place or ".") else []
        files = [file for file in files if file.endswith(".py")]
        near = difflib.get_close_matches(name, files, n=1, cutoff=0.7)
        if near:
            return f" Did you mean {os.path.join(place, near[0])}?"
    return ""


def one_of(words):
    """("'a', 'b' or 'c'", test) of "a b c": a limit, for `check`."""
    *others, last = map(repr, words.split())
    return f"{', '.join(others)} or {last}", words.split().__contains__


def check(key, value, where, config_class, limits):
    """Return value, an int made a float where a float is wanted; raise UserError if key, type or range is
    wrong.

    limits[key] = (words, test): test(value) says whether the value makes sense, words complete "it must be
    ...".
    """
    types = config_class.__annotations__
    if key not in types:
        near = difflib.get_close_matches(key, types, n=1, cutoff=0.5)
        message = f"unknown setting {key} {where}."
        if near:
            message += f" Did you mean {near[0]}?"
        raise UserError(f"{message} `python train.py --help` lists all settings")
    wanted = types[key]
    if type(value) is int and abs(value) >= 2**63:
        raise UserError(f"{key} {where} is {value}: it must be less than 2^63")
    if wanted is float and type(value) is int:
        value = float(value)
    if type(value) is float and not math.isfinite(value):
        raise UserError(f"{key} {where} is {value!r}: it must be a finite number")
    if type(value) is not wanted:
        raise UserError(f"{key} {where} is {value!r}: it takes {wanted.__name__}, such as {EXAMPLES[wanted]}")
    words, test = limits.get(key, ("", lambda _: True))
    if not test(value):
        raise UserError(f"{key} {where} is {value!r}: it must be {words}")
    return value
