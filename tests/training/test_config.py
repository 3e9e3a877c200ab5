"""Every mistake in a setting ends in a line that says what to type; a config file is read, never run."""

import glob
import os
import re

import pytest

from conftest import REPOSITORY
from gate import GateConfig
from helpers import call
from model import GPTConfig
from models.olmo import OLMoConfig
from storage.files import UserError
from train import main, train
from training.config import (
    SETTINGS,
    Config,
    check_together,
    lineage_of,
    make_config,
    parse_command_line,
    read_config_file,
)


def test_values_and_words():
    path, given = parse_command_line(["config/x.py", "--learning_rate=2e-3", "--device=cpu", "--gated=True",
                                      "--seed=3", "--weight_decay=1"])
    assert path == "config/x.py"
    assert given == {"learning_rate": 2e-3, "device": "cpu", "gated": True, "seed": 3, "weight_decay": 1.0}
    assert type(given["weight_decay"]) is float


@pytest.mark.parametrize("argument, message", [
    ("--learning_rte=1e-3", "unknown setting learning_rte on the command line. Did you mean learning_rate?"),
    ("--zzz=1", "unknown setting zzz"),
    ("--seed", "--seed has no value: write --seed=VALUE"),
    ("--max_steps=many", "max_steps on the command line is 'many': it takes int, such as 1000"),
    ("--max_steps=10.5", "takes int"),
    ("--gated=1", "takes bool, such as True or False"),
    ("--learning_rate=fast", "takes float, such as 1e-3"),
    ("--learning_rate=-1", "must be above 0"),
    ("--max_steps=0", "must be at least 1"),
    ("--dropout=1.0", "must be from 0 up to, not including, 1"),
    ("--constraint_gates=both", "'deterministic' or 'sampled'"),
    ("--seed=1700000000000000000", "from 0 to a million"),
])
def test_mistakes_on_the_command_line(argument, message):
    with pytest.raises(UserError) as error:
        parse_command_line([argument])
    assert message in str(error.value)


@pytest.mark.parametrize("content, message", [
    ("max_stepps = 10", "unknown setting max_stepps in my.py, line 1. Did you mean max_steps?"),
    ("# fine\nmax_steps = 'ten'", "max_steps in my.py, line 2 is 'ten'"),
    ("import os", "line 1: a config file holds comments and lines `name = value`"),
    ("max_steps = 5 * 10", "max_steps in my.py, line 1: write a plain value"),
    ("max_steps = open('harm', 'w')", "write a plain value"),
    ("max_steps = (", "my.py, line 1"),
    ("\0", "my.py"),
])
def test_mistakes_in_a_config_file(workplace, content, message):
    (workplace / "my.py").write_text(content)
    with pytest.raises(UserError) as error:
        read_config_file("my.py")
    assert message in str(error.value)
    assert not (workplace / "harm").exists()


GATED = {"gated": True, "init_from": "out/dense"}


@pytest.mark.parametrize("given, message", [
    ({"n_head": 5}, "n_embd=64 must be a multiple of n_head=5"),
    ({"gated": True}, "a gated run needs a dense model"),
    ({**GATED, "lambda_init": 5.0}, "lambda_init=5.0 must lie between lambda_min=0.2 and lambda_max=4.0"),
    ({"architecture": "olmo", "n_head": 4, "n_embd": 60}, "an even multiple of n_head"),
    ({"base_dtype": "bfloat16"}, "it needs lora_rank"),
    ({"lora_rank": 4}, "set init_from, or leave lora_rank away"),
])
def test_settings_that_contradict_each_other(workplace, given, message):
    with pytest.raises(UserError, match=message):
        train(*make_config(None, given))
    assert not glob.glob("out/*")


def test_out_dir_is_named_after_file_and_seed(workplace):
    (workplace / "mine.py").write_text("n_layer = 2  # a comment\n")
    assert make_config("mine.py", {})[0].out_dir == "out/mine"
    assert make_config("mine.py", {"seed": 4})[0].out_dir == "out/mine-seed4"
    assert make_config("mine.py", {"seed": 4, "out_dir": "here/"})[0].out_dir == "here"
    assert parse_command_line(["--out_dir=2024"])[1] == {"out_dir": "2024"}


def test_a_tilde_is_the_home_folder_in_every_path(workplace, monkeypatch):
    monkeypatch.setenv("HOME", str(workplace))
    (workplace / "mine.py").write_text("base = '~/other.py'\nout_dir = '~/runs/x'\ninit_from = '~/parent'")
    (workplace / "other.py").write_text("n_head = 2")
    path, given = parse_command_line(["~/mine.py"])
    assert path == f"{workplace}/mine.py"
    found = [getattr(make_config(path, given)[0], key) for key in ("out_dir", "init_from", "n_head")]
    assert found == [f"{workplace}/runs/x", f"{workplace}/parent", 2]
    assert make_config(*parse_command_line(["--out_dir=~/y"]))[0].out_dir == f"{workplace}/y"


@pytest.mark.parametrize("name", sorted(name[:-3] for name in os.listdir(os.path.join(REPOSITORY, "config"))))
def test_the_projects_own_config_files_are_right(name, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    config, _ = make_config(f"config/{name}.py", {})
    assert config.out_dir == f"out/{name}"
    assert config.gated == (name.split("_")[-1] not in ("dense", "control"))
    check_together(config)
    if name == "gpt2":  # one file for one GPU and for eight
        assert config.batch_size % (8 * config.micro_batch_size) == 0


@pytest.mark.parametrize("name, besides", [("stdlib", set()), ("python", set()),
                                           ("gpu_text", {"eval_interval"})])
def test_a_child_and_its_control_differ_in_the_gates_alone(name, besides, monkeypatch):
    """Or the control would control nothing."""
    monkeypatch.chdir(REPOSITORY)
    child, control = (vars(make_config(f"config/{name}{of}.py", {})[0]) for of in ("", "_control"))
    assert {key for key in child if child[key] != control[key]} <= {"gated", "out_dir"} | besides


@pytest.mark.parametrize("name, besides", [
    ("python", set()), ("python512", set()), ("olmo_tiny", set()), ("olmo_tiny_lora", set()),
    ("gpu_text", {"constraint_interval", "lambda_rate"}),
])
def test_the_text_configurations_have_one_constraint(name, besides, monkeypatch):
    """Its bounds leave lambda free, so that no hand decides how many edges stay."""
    monkeypatch.chdir(REPOSITORY)
    stdlib, other = (vars(make_config(f"config/{of}.py", {})[0]) for of in ("stdlib", name))
    about = {key for key in other if key.startswith(("lambda", "constraint", "loss", "peak"))}
    assert {key for key in about if other[key] != stdlib[key]} == besides
    assert stdlib["lambda_max"] / stdlib["lambda_min"] == pytest.approx(1e6)


@pytest.mark.parametrize("arguments", [
    [f"{REPOSITORY}/config/addition.py", "--learning_rte=1e-3"], ["config/nothing.py"], ["--dataset=nothing"],
    ["--init_from=resume", "--out_dir=none"], ["--init_from=nowhere", "--gated=True"], ["--device=gpu"],
])
def test_the_whole_program_answers_in_two_lines(workplace, arguments):
    done = call(main, *arguments)
    assert done.returncode == 1 and done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) <= 2
    assert not glob.glob("out/*")


def test_help_lists_every_setting():
    done = call(main, "--help")
    assert done.returncode == 0
    for name, field in SETTINGS.items():
        assert re.search(rf"^  --{name}={re.escape(str(field.default))} ", done.stdout, re.M), name
    assert "sequences per step, of all processes" in done.stdout and "setting(" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 110


def test_a_config_file_says_what_differs_from_its_base(workplace, tmp_path_factory, monkeypatch):
    """And is found from elsewhere: the base lies beside the file that names it."""
    os.makedirs("config")
    for name, text in (("small", "n_layer = 2\nlearning_rate = 0.1\n"),
                       ("middle", "base = 'config/small.py'\nn_layer = 3\n"),
                       ("large", "n_head = 4\nbase = 'config/middle.py'\n")):
        (workplace / f"config/{name}.py").write_text(text)
    expected = {"n_layer": 3, "learning_rate": 0.1, "n_head": 4}
    assert read_config_file("config/large.py") == expected
    config, given = make_config("config/large.py", {"n_layer": 5})
    assert (config.n_layer, config.n_head, config.learning_rate) == (5, 4, 0.1)
    assert config.out_dir == os.path.normpath("out/large") and given == set(expected)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert read_config_file(str(workplace / "config/large.py")) == expected


@pytest.mark.parametrize("base, message", [
    ("'smal.py'", "there is no config file smal.py. Did you mean small.py?"),
    ("'wrong.py'", "unknown setting n_layers in wrong.py, line 2. Did you mean n_layer"),
])
def test_a_mistake_in_a_base_is_named_where_it_stands(workplace, base, message):
    for name, text in (("small", "n_layer = 2\n"), ("wrong", "# a comment\nn_layers = 2\n"),
                       ("own", f"base = {base}\n")):
        (workplace / f"{name}.py").write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        read_config_file("own.py")


@pytest.mark.parametrize("path", ["addition", "config/adition.py", "config\\addition.py", "addition.py"])
def test_a_config_that_is_not_there_is_guessed(workplace, path):
    with pytest.raises(UserError, match=f"no config file .* Did you mean .*config{os.sep}addition.py"):
        make_config(path, {})


def test_a_config_is_found_from_its_own_folder_with_its_parent(workplace, monkeypatch):
    monkeypatch.chdir(os.path.join(REPOSITORY, "config"))
    config, given = make_config("addition.py", {"out_dir": str(workplace / "run")})
    assert lineage_of(config, given)[0][0].ready_loss == 0.0003


def test_every_field_of_the_gate_is_a_setting_with_the_same_default():
    """A new one in gate.GateConfig must be one in training/config.py: then both architectures take it."""
    gate = GateConfig()
    assert {key: getattr(Config(), key) for key in vars(gate)} == vars(gate)
    assert isinstance(GPTConfig(), GateConfig)
    assert isinstance(OLMoConfig(), GateConfig)


def test_what_follows_from_the_settings_is_no_setting():
    narrow, wide = Config(), Config(n_embd=768, block_size=1024, lora_rank=4)
    check_together(Config(init_from="gpt2", n_head=12))  # which has 768 channels: the model is asked
    assert (narrow.init_std, narrow.beta2, narrow.lora_alpha) == (0.07, 0.99, 0)
    assert (wide.init_std, wide.beta2, wide.lora_alpha) == (0.02, 0.95, 8)
    assert not {"beta1", "beta2", "init_std", "lora_alpha", "grad_clip"} & set(SETTINGS)
