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
import glob
import inspect
import math
import os
import re
import textwrap
from dataclasses import dataclass, field, fields

from storage.files import CONFIGS, UserError

# what a value must be beside its type; a limit that is no key here lists its words: "'on' or 'off'"
LIMITS = {
    "at least 1": lambda v: v >= 1,
    "0 or more": lambda v: v >= 0,
    "above 0": lambda v: v > 0,
    "from 0 up to, not including, 1": lambda v: 0 <= v < 1,
    "from 0 to a million": lambda v: 0 <= v <= 1_000_000,
}


def setting(default, limit=None, role=None, gated=False):
    """A field of Config.

    limit  of its value: a key of LIMITS, or the words that it may be
    role   'shape'  of the model: taken over from a parent, and fixed
           'fixed'  start and target: no run may change it on its way
           'free'   may differ when a run goes on; what has no role only if --init_from=resume says so
    gated  a dense run ignores it
    """
    return field(default=default, metadata={"limit": limit, "role": role, "gated": gated})


@dataclass
class Config:
    """Every setting: default, unit, meaning. Where the paper has a rule, the default is the paper's.

    A config file's lines `name = value` win over it, the command line over both.
    """

    # --- where a run starts, what it reads, where it ends up
    # 'scratch'; 'resume'; a run's folder; a config file, whose run is trained first if need be; OpenAI's
    # 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl'; an OLMo such as 'allenai/OLMo-1B-hf'; or a checkpoint: a
    # .pt file, or a file or folder of transformers
    init_from: str = setting("scratch")
    # folder of the run; '' is out/<name of the config file>, with -seed<N> behind it unless N is 1
    out_dir: str = setting("", role="free")
    dataset: str = setting("addition", role="fixed")  # data/<dataset>, made by prepare_data.py
    # of initialisation, data order and gates; passed on to a parent that is trained first
    seed: int = setting(1, "from 0 to a million")
    # --- how it is computed
    # 'auto' is cuda, else cpu; 'cpu', 'cuda', 'cuda:N'; 'mps', which nobody has tried yet, only on request
    device: str = setting("auto", role="free")
    # torch.compile: 'on', 'off', or 'auto', where it works: on cuda; on a CPU, gated models and OLMos with
    # contexts of 64 and more
    compile: str = setting("auto", "'auto', 'on' or 'off'", "free")
    # of gated attention: 'plain', the formula; 'tiled', for CPUs; 'triton', for GPUs; 'auto' is the fastest
    # that fits (gate.py)
    attention_impl: str = setting("auto", "'auto', 'plain', 'tiled' or 'triton'", "free")
    # of matrix products: 'float32', 'bfloat16', or 'auto', bfloat16 where the hardware has it. Judged in
    # float32 always (but see base_dtype)
    dtype: str = setting("float32", "'auto', 'float32' or 'bfloat16'", "free")
    # sequences per forward pass; 0 is a process's whole share. Smaller needs less memory (gradient
    # accumulation)
    micro_batch_size: int = setting(0, "0 or more", "free")
    # how several processes share the work: 'ddp', each holds the whole model, or 'fsdp', each a part
    # (parallel.py)
    parallel: str = setting("ddp", "'ddp' or 'fsdp'", "free")
    # make a block's activations again in the backward pass instead of keeping them: less memory, a third more
    # time
    recompute_activations: bool = setting(False, role="free")
    # --- the model; a run that starts from another run takes these from there
    # of a run from scratch: 'gpt2' (model.py), 'olmo' or 'olmo2' (olmo.py)
    architecture: str = setting("gpt2", "'gpt2', 'olmo' or 'olmo2'", "shape")
    n_layer: int = setting(4, "at least 1", "shape")
    n_head: int = setting(1, "at least 1", "shape")
    n_embd: int = setting(64, "at least 1", "shape")  # C, width of the residual stream
    # tokens of context; a child of an OLMo may have less than its parent
    block_size: int = setting(11, "at least 1", "shape")
    dropout: float = setting(0.0, "from 0 up to, not including, 1", "shape")  # GPT-2 only
    # 'tanh', GPT-2's approximation, or 'none', the exact one, nanoGPT's, which a CPU computes faster; GPT-2
    # only
    gelu: str = setting("tanh", "'tanh' or 'none'", "shape")
    # --- adapters (lora.py)
    # train adapters of this rank and freeze the model; 0 trains all weights
    lora_rank: int = setting(0, "0 or more", "fixed")
    # matrices and RMSNorms that get one, by the last part of their name; 'all' is all but embeddings, which
    # are added by name: 'all,embed_tokens'
    lora_targets: str = setting("q_proj,k_proj", role="fixed")
    # in which frozen weights are kept: 'float32' or 'bfloat16', half the memory; then the dense model is
    # judged in it, too
    base_dtype: str = setting("float32", "'float32' or 'bfloat16'", "fixed")
    # --- the gates, and the constraint that shuts them
    gated: bool = setting(False, role="fixed")  # False is an ordinary dense run; it ignores this block
    # b in sigmoid(a + b); above 0 the edges start open
    gate_bias: float = setting(3.0, role="fixed", gated=True)
    gate_temperature: float = setting(1.0, "above 0", "fixed", gated=True)  # of the straight-through gradient
    # attention weight above which edges start open, by a shift of the key biases, or of each head's gates
    # (handover.py); 0 is off
    open_above: float = setting(0.0, "from 0 up to, not including, 1", "fixed", gated=True)
    # of KL(dense || gated), nats, added to the loss that is trained on; the constraint and the judgement stay
    # without
    distill_weight: float = setting(0.0, "0 or more", gated=True)
    # first steps, under the penalty that pulls at wide-open edges too (gate.py)
    linear_penalty_steps: int = setting(0, "0 or more", gated=True)
    # last steps, in which gates are not drawn but thresholds, as when they are judged; gradients stay
    # straight-through
    noise_free_steps: int = setting(0, "0 or more", gated=True)
    # nats above the dense loss that count as equal
    loss_slack: float = setting(0.001, "0 or more", "fixed", gated=True)
    # nats, held out: a target of its own, such as a control's loss; 0 is the dense model's loss + loss_slack
    target_loss: float = setting(0.0, "0 or more", "fixed", gated=True)
    # nats of further slack for the constraint while the learning rate is at its peak; it goes to 0 along the
    # same cosine. At a high learning rate no model is as good as it can be, gates or none
    peak_slack: float = setting(0.0, "0 or more", gated=True)
    # gates under which the constraint's loss is taken: 'sampled', or 'deterministic', as a run is judged
    constraint_gates: str = setting("sampled", "'deterministic' or 'sampled'", gated=True)
    # steps between two measurements of the constraint
    constraint_interval: int = setting(4, "at least 1", gated=True)
    # compare with the dense model on the very same batch: a batch's luck is ten times a slack of 0.01 nats
    constraint_paired: bool = setting(False, gated=True)
    # nats; a violation of this size moves lambda at full speed. No larger than loss_slack where the loss
    # cannot fall far below its target (geco.py)
    constraint_scale: float = setting(0.001, "above 0", gated=True)
    # largest relative change of lambda per measurement
    lambda_rate: float = setting(0.03, "above 0", gated=True)
    # where lambda starts: high, for the loss jumps when the gates begin to sample; while the penalty is
    # linear also its cap, so that edges go
    lambda_init: float = setting(4.0, "above 0", gated=True)
    # the floor: a low lambda cuts edges faster than the constraint can tell which were needed
    lambda_min: float = setting(0.2, "above 0", gated=True)
    # the cap: a high lambda lets nothing be shut for a long time after an error is gone
    lambda_max: float = setting(4.0, "above 0", gated=True)
    # --- optimisation
    batch_size: int = setting(128, "at least 1")  # sequences per step, of all processes together
    max_steps: int = setting(4500, "at least 1")
    # of a gated run that has met its target: steps without an edge less after which it stops. 0 is off
    patience: int = setting(0, "0 or more", gated=True)
    learning_rate: float = setting(1e-3, "above 0")  # peak
    min_lr: float = setting(0.0, "0 or more")  # at the end of the cosine
    warmup_steps: int = setting(100, "0 or more")
    # on matrices; it pulls q and k, and with them the gates, towards 0
    weight_decay: float = setting(0.0, "0 or more")
    # of the moving average of the weights that is judged and kept (Polyak): 0.99 is about the last 100 steps;
    # 0 is off
    average_decay: float = setting(0.0, "from 0 up to, not including, 1", "fixed")
    # of a dense run: nats, held out; at this loss, and with all answers right, it is ready and stops; no
    # child starts from it before. 0 is off
    ready_loss: float = setting(0.0, "0 or more")
    # --- evaluation
    eval_interval: int = setting(100, "at least 1")  # steps
    eval_batch_size: int = setting(1000, "at least 1", "fixed")  # sequences
    eval_batches: int = setting(0, "0 or more", "fixed")  # batches of each split; 0 is all of it

    # what follows from the settings, or is the same in all runs
    beta1 = 0.9  # of AdamW
    grad_clip = 1.0  # largest norm of the gradient

    @property
    def beta2(self):
        """Of AdamW: nanoGPT's value for steps of many tokens, 2^14 and more, and that for few."""
        return 0.95 if self.batch_size * self.block_size >= 2**14 else 0.99

    @property
    def init_std(self):
        """Of random weights. 0.02 is made for 768 channels and leaves the attention of a narrow GPT uniform
        for a thousand steps: there it is 0.6 / sqrt(C) to two digits, 0.07 at most. OLMos have norms enough.
        """
        narrow = min(0.07, round(0.6 / math.sqrt(self.n_embd), 2))
        return max(0.02, narrow) if self.architecture == "gpt2" else 0.02

    @property
    def lora_alpha(self):
        """Adapters are scaled by lora_alpha / lora_rank."""
        return 2.0 * self.lora_rank


def having(role):
    return tuple(f.name for f in fields(Config) if f.metadata["role"] == role)


SETTINGS = {f.name: f for f in fields(Config)}
SHAPE, FIXED, FREE = having("shape"), having("shape") + having("fixed"), having("free")
GATED_ONLY = tuple(name for name, f in SETTINGS.items() if f.metadata["gated"])


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
    values = read_config_file(path) if path else {}
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


def check_together(c, processes=1):
    """Raise UserError if settings contradict each other, or so many processes cannot share them."""
    if c.init_from == "scratch":
        check_shape(c)
    if c.base_dtype != "float32" and not c.lora_rank:
        raise UserError("base_dtype is that of frozen weights: it needs lora_rank")
    if c.average_decay and c.parallel == "fsdp":
        raise UserError("average_decay holds a second copy of the whole model: it does not go with "
                        "parallel='fsdp'. Set it to 0")
    if c.gated and not c.lambda_min <= c.lambda_init <= c.lambda_max:
        raise UserError(f"lambda_init={c.lambda_init} must lie between lambda_min={c.lambda_min} and "
                        f"lambda_max={c.lambda_max}")
    micro = micro_batch_size(c, processes)
    if not micro or c.batch_size % (micro * processes):
        raise UserError(f"batch_size={c.batch_size} does not divide into {processes} process(es) times "
                        f"micro-batches of micro_batch_size={micro}")


def check_shape(c):
    """Of a run from scratch; one that starts from a model has its shape."""
    if c.gated:
        raise UserError("a gated run needs a dense model whose loss it is to keep: set init_from to the run "
                        "folder or the config file of one")
    if c.lora_rank:
        raise UserError("lora_rank adds adapters to a model that is there already: set init_from, or leave "
                        "lora_rank away")
    turns_pairs = c.architecture != "gpt2"
    if c.n_embd % c.n_head or turns_pairs and c.n_embd // c.n_head % 2:
        even = "an even" if turns_pairs else "a"
        raise UserError(f"n_embd={c.n_embd} must be {even} multiple of n_head={c.n_head}: the heads share "
                        f"the width{', and RoPE turns pairs' if turns_pairs else ''}")


def micro_batch_size(c, processes):
    """Sequences of one forward pass."""
    return c.micro_batch_size or c.batch_size // processes


# ------------------------------------------------------------------------------------------------------------
# The runs of a command

# settings that a run hands to a parent that is trained first, where they were set
PASSED_ON = ("seed", "device", "compile", "dtype")


def parent_run(config, given):
    """The run of the config file that `config` starts from: (Config, names of its settings)."""
    return make_config(config.init_from, {key: getattr(config, key) for key in PASSED_ON if key in given})


def lineage_of(config, given):
    """All runs that training `config` takes, in their order: those of the config files that it starts from,
    then its own. A list of (Config, names of the settings that were set).

    A run that has begun knows its parent's checkpoint: it stands alone. Raises UserError.
    """
    source = config.init_from
    if os.path.exists(os.path.join(config.out_dir, "last.pt")) or not source.endswith(".py"):
        return [(config, given)]
    parent, names = parent_run(config, given)
    if config.gated and parent.gated:
        raise UserError(f"init_from={source} is a gated run. Start from a dense one: its loss is the target")
    refuse_same_folder(parent.out_dir, config)
    lineage = lineage_of(parent, names)
    first = lineage[0][0]  # whose shape all have
    for key in SHAPE if first.init_from == "scratch" else ():
        here, there = getattr(config, key), getattr(first, key)
        # an OLMo's positions are no weights: its context may be shorter
        shorter = key == "block_size" and first.architecture != "gpt2" and here < there
        if key in given and here != there and not shorter:
            raise UserError(f"{key}={here!r}, but {source} has {key}={there!r}: a run that starts from "
                            f"another keeps its shape. Train the parent with --{key}={here} and another "
                            f"--out_dir, then this one with --init_from=THAT and without --{key}")
    return [*lineage, (config, given)]


def refuse_same_folder(folder, config):
    """Raise UserError if a run's folder were its parent's as well."""
    if os.path.realpath(folder) == os.path.realpath(config.out_dir):
        raise UserError(f"{folder} is the run's own folder and its parent's as well. Give it another with "
                        "--out_dir=out/NEW")


# ------------------------------------------------------------------------------------------------------------
# Reading and checking. What follows knows no setting by name

EXAMPLES = {int: "1000", float: "1e-3", bool: "True or False", str: "auto"}


def described():
    """All settings in words, for --help: their defaults, the comments beside and above them. A comment
    `# --- words` begins a group.
    """
    lines, said = [], []
    for line in inspect.getsource(Config).splitlines():
        comment = line.partition("  # ")[2]
        found = re.match(r" +(\w+): \w+ = setting", line)
        if comment.startswith("--- "):
            lines += ["", comment.removeprefix("--- ") + ":"]
        elif found:
            name = found[1]
            words = " ".join([*said, comment]).strip()
            said = []
            begin = f"  --{name}={SETTINGS[name].default}".ljust(34) + "  "
            lines += textwrap.wrap(words, 100, initial_indent=begin, subsequent_indent=36 * " ") or [begin]
        elif comment:
            said.append(comment)
    return "\n".join(lines).strip()


def parse_command_line(arguments):
    """`[FILE.py] [--key=value ...]` -> the file's path or None, and a dict of the settings that were given.

    Raises UserError.
    """
    path, values = None, {}
    for argument in arguments:
        key, equals, text = argument.removeprefix("--").partition("=")
        if argument.startswith("--"):
            if not equals:
                raise UserError(f"{argument} has no value: write {argument}=VALUE")
            try:
                value = text if Config.__annotations__.get(key) is str else ast.literal_eval(text)
            except (ValueError, SyntaxError):
                value = text  # no Python literal: `check` will say what is expected
            values[key] = check(key, value, "on the command line")
        elif path is None:
            path = os.path.expanduser(argument)
        else:
            raise UserError(f"one config file at a time, not both {path} and {argument}. Settings are "
                            "written --key=value")
    return path, values


def read_config_file(path):
    """The settings in a config file, as a dict. Nothing in it is executed. Raises UserError, with the line's
    number.

    `base = 'config/other.py'` takes over the settings of another file; the file's own win.
    """
    try:
        with open(path, encoding="utf-8-sig") as f:  # some editors put a mark at the beginning
            statements = ast.parse(f.read()).body
    except FileNotFoundError as error:
        raise UserError(f"there is no config file {path}.{file_like(path)}") from error
    except SyntaxError as error:
        raise UserError(f"{path}, line {error.lineno}: {error.msg}") from error
    except ValueError as error:
        raise UserError(f"{path} is no config file: it is not even text") from error
    values, base = {}, {}
    for node in statements:
        where = f"in {path}, line {node.lineno}"
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
            raise UserError(f"{where}: a config file holds comments and lines `name = value`, nothing else")
        key = node.targets[0].id
        try:
            value = ast.literal_eval(node.value)
        except ValueError as error:
            raise UserError(f"{key} {where}: write a plain value, such as 3, 1e-3, True or 'text'") from error
        if key == "base":
            base = read_config_file(beside(path, value))
        else:
            values[key] = check(key, value, where)
    return base | values


def beside(path, other):
    """Where another config file lies that the one at path names: as it is written, from the current folder;
    else in the folder of the file that names it.
    """
    other = os.path.expanduser(other)
    neighbour = os.path.join(os.path.dirname(path), os.path.basename(other))
    return other if os.path.exists(other) or not os.path.exists(neighbour) else neighbour


def file_like(path):
    """` Did you mean config/addition.py?`, or nothing if no file has a name like this one's."""
    name = os.path.basename(path.replace("\\", "/")).removesuffix(".py") + ".py"
    files = {}
    for place in CONFIGS, "config", os.path.dirname(path) or ".":
        files |= {os.path.basename(file): file for file in glob.glob(f"{place}/*.py")}
    near = difflib.get_close_matches(name, files, n=1, cutoff=0.7)
    return f" Did you mean {os.path.normpath(files[near[0]])}?" if near else ""


def check(key, value, where):
    """Return value, an int made a float where a float is wanted; raise UserError if key, type or range is
    wrong.
    """
    if key not in SETTINGS:
        near = difflib.get_close_matches(key, SETTINGS, n=1, cutoff=0.5)
        guess = f" Did you mean {near[0]}?" if near else ""
        raise UserError(f"unknown setting {key} {where}.{guess} `python train.py --help` lists all settings")
    wanted, limit = SETTINGS[key].type, SETTINGS[key].metadata["limit"]
    if wanted is float and type(value) is int:
        value = float(value)
    if type(value) is not wanted:
        raise UserError(f"{key} {where} is {value!r}: it takes {wanted.__name__}, such as {EXAMPLES[wanted]}")
    fits = LIMITS.get(limit) or re.findall("'(.*?)'", limit or "").__contains__
    if limit and not fits(value):
        raise UserError(f"{key} {where} is {value!r}: it must be {limit}")
    return value
