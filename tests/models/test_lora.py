"""LoRA: adapters change nothing at first, merge exactly, can be switched off, and are all that is saved."""

import copy
import functools
import os

import pytest
import torch

import prepare_data
from helpers import count_dataset, metrics, stopped_after, theirs
from model import GPT, GPTConfig
from models import lora
from models.checkpoint import (
    checkpoint_of,
    fingerprint,
    load_checkpoint,
    model_of,
    read_checkpoint,
    save_checkpoint,
)
from models.olmo import OLMo, OLMoConfig
from storage.files import UserError
from train import train
from training import parallel
from training.config import make_config
from training.judge import evaluate
from training.steps import averaged, update_average

torch.manual_seed(0)


def small_olmo(**changes):
    return OLMo(OLMoConfig(**{"generation": 2, "block_size": 16, "vocab_size": 11, "n_layer": 2, "n_head": 4,
                              "n_kv_head": 2, "n_embd": 32, "n_hidden": 48} | changes))


MODELS = [(GPT(GPTConfig(block_size=16, vocab_size=11, n_layer=2, n_head=2, n_embd=16)), "c_attn,c_fc"),
          (small_olmo(), "q_proj,k_proj,v_proj")]
MODELS.append((MODELS[1][0], "all,embed_tokens"))  # tied: one adapter for input and output
IDX = torch.randint(0, 11, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=MODELS, ids=["gpt2", "olmo", "olmo with norms and embeddings"])
def run(request, workplace):
    """A base on disk, and the model with adapters that training would start from, gates on."""
    base, targets = request.param
    save_checkpoint("base.pt", checkpoint_of(base, step=7))
    settings = {"rank": 3, "alpha": 6.0, "targets": targets}
    model = model_of(read_checkpoint("base.pt"), "base.pt", prepare=lambda model: lora.add(model, **settings),
                     gated=True, gate_bias=0.1)
    return base.eval(), model, {"lora": settings, "base": "base.pt",
                                "base_fingerprint": fingerprint(read_checkpoint("base.pt"))}


@pytest.mark.parametrize("kind", ["gpt2", "olmo", "base"])
def test_a_model_compiled_in_place_can_be_called_as_it_is_written(kind):
    """The judge and the hand-over look inside, which would compile every look anew. An OLMo has a part called
    `model`, as a Base has.
    """
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    model = copy.deepcopy(MODELS[kind != "gpt2"][0]).eval()
    model.compile(backend=backend)
    called = lora.Base(model) if kind == "base" else model
    with parallel.uncompiled(called):
        called(IDX)
    assert not compiled
    called(IDX)
    assert compiled


def zero_at_first(layer):
    return layer.lora_d if isinstance(layer, lora.LoRANorm) else layer.lora_b


def moved(model):
    """As after some training."""
    torch.manual_seed(1)
    for layer in lora.adapters_of(model).values():
        torch.nn.init.normal_(zero_at_first(layer), std=0.3)
    return model


def test_adapters_start_as_nothing_and_train_alone(run):
    _, model, _ = run
    assert torch.equal(model(IDX)[0],
                       model_of(read_checkpoint("base.pt"), "base.pt", gated=True, gate_bias=0.1)(IDX)[0])
    trained = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    assert trained == set(lora.state_of(model)) and len(trained) == sum(
        1 if isinstance(layer, lora.LoRANorm) else 2 for layer in lora.adapters_of(model).values()
    )
    _, loss, density = model.train()(IDX, IDX)
    (loss + density).backward()
    for layer in lora.adapters_of(model).values():
        assert layer.weight.grad is None
        assert zero_at_first(layer).grad.abs().sum() > 0
        assert isinstance(layer, lora.LoRANorm) or layer.scale == 2.0


def test_merged_is_unmerged(run):
    _, model, _ = run
    moved(model).double()
    before = model(IDX)[0]  # alpha / r is 2
    weight = {name: layer.weight + (layer.lora_d if isinstance(layer, lora.LoRANorm)
                                    else 2 * layer.lora_b @ layer.lora_a)
              for name, layer in lora.adapters_of(model).items()}
    names = set(lora.merge(model).state_dict())
    assert not lora.adapters_of(model) and not any("lora" in name for name in names)
    assert (model(IDX)[0] - before).abs().max() < 1e-10
    assert all(torch.equal(model.state_dict()[f"{name}.weight"], value) for name, value in weight.items())


def test_switched_off_it_is_the_dense_base_and_leaves_no_trace(run):
    base, model, _ = run
    moved(model).train()
    teacher = lora.Base(model)
    assert not teacher.config.gated and next(teacher.parameters()) is next(model.parameters())
    assert torch.equal(teacher(IDX)[0], base(IDX)[0]) and teacher.eval() is teacher and not teacher.training
    assert model.config.gated
    assert model.training
    assert all(layer.on for layer in lora.adapters_of(model).values())
    assert not torch.equal(model.eval()(IDX)[0], base(IDX)[0])


def test_only_the_adapters_are_saved_and_they_know_their_base(run, workplace):
    base, model, about = run
    moved(model)
    save_checkpoint("adapters.pt", checkpoint_of(model, **about))
    assert os.path.getsize("adapters.pt") < 0.6 * os.path.getsize("base.pt")
    assert set(read_checkpoint("adapters.pt")["model"]) == set(lora.state_of(model))
    merged = load_checkpoint("adapters.pt")
    beside = model_of(read_checkpoint("adapters.pt"), "adapters.pt", merged=False)
    assert not lora.adapters_of(merged) and lora.adapters_of(beside) and merged.config.gated
    for again, saved in ((merged, lora.merge(copy.deepcopy(model))), (beside, model)):
        assert (again(IDX)[0] - saved(IDX)[0]).abs().max() < 1e-5
    # a matrix that adapters change, as trained with other settings, to the same step
    base.get_submodule(next(iter(lora.adapters_of(model)))).weight.data[0] += 1
    save_checkpoint("base.pt", checkpoint_of(base, step=7))
    with pytest.raises(UserError, match="adapters for base.pt, which holds other weights now"):
        load_checkpoint("adapters.pt")
    os.remove("base.pt")
    with pytest.raises(UserError, match="base.pt, from which this model was trained, is gone"):
        load_checkpoint("adapters.pt")


def test_frozen_weights_in_half_precision_keep_adapters_in_full():
    model = small_olmo(generation=1, n_layer=1).bfloat16()
    lora.add(model, 2, 4.0, "q_proj")
    layer = next(iter(lora.adapters_of(model).values()))
    assert layer.lora_a.dtype == torch.float32 and layer.weight.dtype == torch.bfloat16
    for name, tensor in layer.initial().items():
        getattr(layer, name).data = tensor
    model(IDX, IDX)[1].backward()
    assert layer.lora_b.grad.dtype == torch.float32


def test_what_gets_an_adapter():
    def with_adapters(targets, tied=True):
        model = small_olmo(tied=tied, n_layer=1)
        return model, set(lora.adapters_of(lora.add(model, 2, 4.0, targets)))

    assert with_adapters("up_proj, norm")[1] == {"model.layers.0.mlp.up_proj", "model.norm"}
    blocks = {name for name in with_adapters("all")[1] if name.startswith("model.layers.0.")}
    assert len(blocks) == 7 + 4 and with_adapters("all")[1] == blocks | {"model.norm"}
    for targets in ("lm_head", "embed_tokens"):  # one matrix, one change of it
        model, names = with_adapters(targets)
        assert names == {"lm_head", "model.embed_tokens"}
        assert model.lm_head.lora_b is model.model.embed_tokens.lora_b
        assert len([p for p in model.parameters() if p.requires_grad]) == 2
        assert len(with_adapters(targets, tied=False)[1]) == 1
    with pytest.raises(UserError, match="no Linear, Embedding or RMSNorm layer 'q_proj'. It has c_attn, "
                                        "c_fc, c_proj, lm_head, wpe, wte"):
        lora.add(GPT(MODELS[0][0].config), 2, 4.0, "c_attn, q_proj")


# ------------------------------------------------------------------------------------------------------------
# A run


RUN = {"init_from": "hf", "dataset": "count", "gated": True, "block_size": 8, "lora_rank": 2, "batch_size": 8,
       "max_steps": 12, "warmup_steps": 2, "learning_rate": 3e-3, "eval_interval": 6, "eval_batch_size": 7,
       "eval_batches": 3, "open_above": 0.02, "distill_weight": 0.5, "constraint_paired": True,
       "linear_penalty_steps": 4, "constraint_gates": "deterministic", "device": "cpu"}


@pytest.fixture
def olmo(workplace):
    """An OLMo on disk as transformers writes it, with a longer context than the run wants."""
    count_dataset()
    theirs("Olmo", vocab_size=10).save_pretrained("hf")


def run_it(**given):
    config, names = make_config(None, RUN | given)
    train(config, names)
    return read_checkpoint(f"{config.out_dir}/last.pt"), metrics(config.out_dir)


def test_a_run_with_adapters_on_an_olmo_from_hugging_face(olmo, capsys):
    last, lines = run_it(out_dir="out/lora")
    assert "2,048 weights to train" in capsys.readouterr().out  # 4 layers, 2 matrices, 2 (64 + 64) each
    assert set(last["model"]) == {f"model.layers.{i}.self_attn.{name}_proj.lora_{ab}" for i in range(4)
                                  for name in "qk" for ab in "ab"}
    assert last["base"] == "hf"
    assert last["model_args"]["block_size"] == 8
    assert len(last["model_args"]["gate_bias"]) == 4
    assert os.path.getsize("out/lora/last.pt") < 0.3 * os.path.getsize("hf/model.safetensors")
    teacher = load_checkpoint("hf", block_size=8)
    data = prepare_data.load("count")
    assert lines[0]["target_loss"] == pytest.approx(evaluate(teacher, data, "val", 7, 3)["loss"] + 0.001,
                                                    abs=1e-6)
    child = load_checkpoint("out/lora/last.pt")
    assert evaluate(child, data, "val", 7, 3)["loss"] == pytest.approx(lines[-1]["val_loss"], abs=1e-5)
    assert lines[-1]["density"] < lines[1]["density"] and lines[-1]["lambda"] != lines[0]["lambda"]
    again, _ = run_it(out_dir="out/again", recompute_activations=True)
    assert all(torch.allclose(last["model"][name], again["model"][name], atol=1e-6) for name in last["model"])


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_it_goes_on_exactly(olmo, decay):
    whole, _ = run_it(out_dir="out/whole", average_decay=decay)
    with stopped_after(8), pytest.raises(SystemExit):
        run_it(out_dir="out/parts", average_decay=decay)
    assert read_checkpoint("out/parts/last.pt")["step"] == 8
    parts, _ = run_it(out_dir="out/parts", average_decay=decay)
    assert all(torch.equal(whole["model"][name], parts["model"][name]) for name in whole["model"])


def test_adapters_are_averaged_and_frozen_weights_shared(run):
    _, model, _ = run
    average, before = averaged(model, 0.75), copy.deepcopy(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight += weight.requires_grad
    update_average(average, model, 0.75)
    for name, weight in average.named_parameters():
        was = before.get_parameter(name)
        if weight.requires_grad:
            assert torch.allclose(weight, was + 0.25)
        else:
            assert weight is model.get_parameter(name) and torch.equal(weight, was)


@pytest.mark.slow
def test_compiled_it_is_the_same_run(olmo):
    """One model runs with and without adapters and gates, and the compiler has to tell them apart."""
    theirs("Olmo", vocab_size=10, num_hidden_layers=1).save_pretrained("hf")
    settings = {"max_steps": 4, "eval_interval": 2, "noise_free_steps": 2}
    plain = run_it(out_dir="out/plain", **settings)[1]
    compiled = run_it(out_dir="out/compiled", compile="on", **settings)[1]
    for a, b in zip(plain, compiled):
        for key in ("val_loss", "density", "constraint_loss", "target_loss", "batch_loss"):
            assert a[key] == b[key] or a[key] == pytest.approx(b[key], abs=1e-5), key


@pytest.mark.slow
def test_the_compiler_never_gives_up(olmo, monkeypatch):
    """Every way in which a run uses its model is compiled anew; past a limit PyTorch would silently compile
    no more.
    """
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        settings = {"compile": "on", "linear_penalty_steps": 2, "max_steps": 6, "eval_interval": 2}
        run_it(out_dir="out/control", gated=False, lora_rank=0, **settings)
        run_it(out_dir="out/compiled", constraint_gates="sampled", noise_free_steps=2, **settings)


def test_adapters_on_adapters_are_refused(olmo):
    run_it(out_dir="out/dense", gated=False, max_steps=4, learning_rate=1e-2)
    with pytest.raises(UserError, match="out/dense/best.pt holds adapters itself"):
        run_it(out_dir="out/child", init_from="out/dense")


def test_frozen_weights_in_bfloat16_and_settings_that_do_not_fit(olmo):
    last, lines = run_it(out_dir="out/half", base_dtype="bfloat16", max_steps=2)
    assert all(tensor.dtype == torch.float32 for tensor in last["model"].values()) and lines[-1]["step"] == 2
    for given, message in (
        ({"lora_targets": "c_attn"},
         "no Linear, Embedding or RMSNorm layer 'c_attn'. It has down_proj, embed_tokens, gate_proj"),
        ({"block_size": 65}, "block_size=65"),
        ({"n_layer": 3}, "n_layer=3, but hf has n_layer=4"),
        ({"architecture": "gpt2"}, "architecture='gpt2', but hf has architecture='olmo'"),
    ):
        with pytest.raises(UserError, match=message):
            run_it(out_dir="out/wrong", **given)
    with pytest.raises(UserError, match="lora_rank adds adapters to a model that is there already"):
        run_it(out_dir="out/wrong", init_from="scratch", gated=False)
