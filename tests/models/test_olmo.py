"""OLMo: models that the transformers package writes are computed alike by ours, and back; the gate, the hooks
and the trainer's arguments as in GPT-2.
"""

import json
import os

import pytest
import safetensors.torch
import torch

from circuits.attribution import attribute_edges, batches, effects, metric_of
from circuits.graph import CircuitRun, ComponentGraph, Watch
from circuits.induction import copying_scores
from circuits.patching import patched
from circuits.tasks import Pair
from fast import attention as fast_attention
from helpers import apart, theirs
from models import olmo, olmo_files
from models.checkpoint import load_checkpoint, model_of, new_model, read_checkpoint
from models.olmo import OLMo, OLMoConfig
from storage.files import UserError
from training.config import Config

transformers = pytest.importorskip("transformers", reason="pip install -r tests/requirements.txt")
YARN = {"sliding_window": 32, "rope_scaling": {"rope_type": "yarn", "factor": 4.0,
                                               "original_max_position_embeddings": 16,
                                               "attention_factor": 1.2, "beta_fast": 32, "beta_slow": 1}}


def stretched(**settings):
    """Settings of an Olmo3 whose full layers are stretched by YaRN, those by layer type as transformers 5 has
    them.
    """
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "original_max_position_embeddings": 16} | settings
    default = {"rope_type": "default", "rope_theta": 1e4}
    return {"sliding_window": 32, "rope_parameters": {"full_attention": yarn, "sliding_attention": default}}


KINDS = [
    ("Olmo", {}), ("Olmo", {"clip_qkv": 0.05, "tie_word_embeddings": True}),
    ("Olmo", {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    ("Olmo2", {}), ("Olmo2", {"num_key_value_heads": 2, "tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    ("Olmo3", YARN), ("Olmo3", {"sliding_window": 32, "num_key_value_heads": 1}),
    ("Olmo2", {"clip_qkv": 0.05}),
    # flat settings beside those by layer, as transformers writes them; it ignores the flat ones
    ("Olmo3", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                                   "original_max_position_embeddings": 16}}),
    ("Olmo3", stretched(factor=4.0, mscale=2.0, mscale_all_dim=0.5)),
    ("Olmo3", stretched(factor=0.5)),
    ("Olmo3", stretched(factor=4.0)),
]


@pytest.mark.parametrize("architecture, std", [("gpt2", 0.07), ("olmo", 0.02), ("olmo2", 0.02)])
def test_random_weights_are_as_large_as_the_width_wants(architecture, std):
    model = new_model(Config(architecture=architecture, n_embd=64), vocab_size=50, gate_settings={})
    assert model.embeddings()[0].std().item() == pytest.approx(std, rel=0.1)


def ours(generation=2, **changes):
    return OLMo(OLMoConfig(**{"generation": generation, "block_size": 16, "vocab_size": 11, "n_layer": 2,
                              "n_head": 4, "n_kv_head": 2, "n_embd": 32, "n_hidden": 48} | changes))


@torch.no_grad()
def assert_same_logits(model, other, T=30):
    idx = torch.randint(0, model.config.vocab_size, (2, T))
    assert (model(idx)[0] - other(idx).logits).abs().max() < 1e-4


@pytest.mark.parametrize("kind, settings", KINDS)
def test_what_transformers_writes_gives_its_logits_and_goes_back_unchanged(workplace, kind, settings):
    model, shards = theirs(kind, **settings), "clip_qkv" in settings  # of some kinds in several files
    model.save_pretrained("hf", **({"max_shard_size": "100KB"} if shards else {}))
    assert os.path.exists("hf/model.safetensors.index.json") == shards
    checkpoint = read_checkpoint("hf")
    loaded = model_of(checkpoint, "hf")
    assert_same_logits(loaded, model)
    assert_same_logits(load_checkpoint("hf", gated=True, gate_bias=100.0), model)  # all edges open
    olmo_files.write("back", loaded.state_dict(), vars(loaded.config))
    with open("back/config.json") as f:
        [name] = json.load(f)["architectures"]
    assert name == f"{kind}ForCausalLM" or kind == "Olmo3" and not loaded.config.yarn  # then it is an Olmo2
    again = getattr(transformers, name).from_pretrained("back").eval()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert_same_logits(loaded, again)
    assert model_of(read_checkpoint("back"), "back").config == loaded.config


def test_wrong_files_are_named(workplace):
    model = theirs("Olmo2")
    model.save_pretrained("hf", max_shard_size="100KB")
    with open("hf/config.json") as f:
        config = json.load(f)

    def fails(message, path="hf", **settings):
        with open("hf/config.json", "w") as f:
            json.dump({key: value for key, value in (config | settings).items() if value != "gone"}, f)
        with pytest.raises(UserError, match=message):
            load_checkpoint(path)

    fails("config.json has no hidden_size", hidden_size="gone")
    fails("hidden_act='relu'", hidden_act="relu")
    fails("attention_bias=True", attention_bias=True)
    fails("rope_type='llama3'", rope_parameters={"rope_type": "llama3", "rope_theta": 1e4})
    fails("partial_rotary_factor=0.5", rope_parameters={"partial_rotary_factor": 0.5, "rope_theta": 1e4})
    fails("head_dim=8", head_dim=8)
    fails("rope_type='yarn' of full_attention", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4})
    full = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    fails("rope_type='yarn' of sliding_attention", model_type="olmo3",
          rope_parameters={"full_attention": full, "sliding_attention": full})
    fails("truncate=False", model_type="olmo3",
          rope_parameters={"full_attention": full, "sliding_attention": {}, "truncate": False})
    fails("layer_types with linear_attention", layer_types=["linear_attention"] * 4)
    fails(r"q_proj.weight is \(64, 64\), the model's is \(128, 128\)", hidden_size=128)
    fails("model.layers.4.* is missing", num_hidden_layers=5)
    fails("model.layers.3.* is extra", num_hidden_layers=3)
    fails("q_norm.weight is extra", model_type="olmo")
    fails("no GPT-2 that model.py can compute: model_type='llama'", model_type="llama")
    shard = sorted(name for name in os.listdir("hf") if name.startswith("model-0"))[1]
    with open(f"hf/{shard}", "r+b") as f:
        f.truncate(1000)
    fails(f"{shard} cannot be read .*truncated or damaged")
    os.remove(f"hf/{shard}")
    fails(f"there is no hf/{shard}")
    with pytest.raises(UserError, match="a model of type 'llama'; olmo.py computes olmo, olmo2, olmo3"):
        olmo_files.config_of({"model_type": "llama"}, "x")


def test_angles_that_old_files_hold_are_left_aside(workplace, capsys):
    model = theirs("Olmo2")
    model.save_pretrained("hf")
    tensors = safetensors.torch.load_file("hf/model.safetensors")
    angles = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(4)}
    safetensors.torch.save_file(tensors | angles, "hf/model.safetensors", metadata={"format": "pt"})
    assert_same_logits(load_checkpoint("hf"), model)
    assert capsys.readouterr().out.count("inv_freq is left aside") == 4


def test_a_name_is_downloaded_once_through_the_hubs_own_client(workplace, server):
    """Two shards from a localhost in Hugging Face's place; then without it; then with nothing there at all.
    """
    model, name = theirs("Olmo2"), "allenai/OLMo-2-0425-1B"
    folder = workplace / "served" / name / "resolve" / ("0" * 40)
    model.save_pretrained(folder, max_shard_size="200KB")
    # the last two are not there to be asked for
    files = [*os.listdir(folder), "README.md", "pytorch_model.bin"]
    api = workplace / f"served/api/models/{name}"
    for place, answer in (
        ("revision/main", {"id": name, "sha": "0" * 40, "siblings": [{"rfilename": file} for file in files]}),
        ("tree/" + "0" * 40, [{"type": "file", "path": file, "size": 1, "oid": "0" * 40} for file in files]),
    ):
        (api / place).parent.mkdir(parents=True)
        (api / place).write_text(json.dumps(answer))
    code = ("import sys, torch; from models.checkpoint import load_checkpoint; "
            "from storage.files import UserError\n"
            "try: print(load_checkpoint(sys.argv[1])(torch.arange(20)[None])[0].sum().item())\n"
            "except UserError as error: print('error:', error)")

    def ask(cache, offline):
        done = apart(code, name, HF_ENDPOINT=server.url, HF_HOME=cache, HF_HUB_DISABLE_XET="1",
                     HF_HUB_OFFLINE=offline)
        assert done.returncode == 0, done.stderr
        return done.stdout

    with torch.no_grad():
        online = ask("cache", "0")
        assert float(online) == pytest.approx(model(torch.arange(20)[None]).logits.sum().item(), abs=1e-2)
    asked = len(server.requests)
    assert ask("cache", "1") == online and len(server.requests) == asked
    answer = ask("empty", "1")
    assert answer.startswith(f"error: {name} cannot be downloaded") and "bring the folder by hand" in answer


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's high-water mark of a "
                                                                    "process")
def test_loading_needs_the_model_and_little_more(workplace):
    """A process of its own, whose high-water mark is read: 1.2 times the parameters at most, from several
    shards, in float32 from bfloat16.

    A tiny model first: what Python and torch load when they build one is not the model's memory.
    """
    theirs("Olmo", hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=4,
           vocab_size=20000).bfloat16().save_pretrained("hf", max_shard_size="60MB")
    theirs("Olmo").save_pretrained("tiny")
    done = apart("""
import safetensors.torch
from models.checkpoint import load_checkpoint
most = lambda: 1024 * int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])
load_checkpoint('tiny')
before = most()
m = load_checkpoint('hf')
print((most() - before) / sum(4 * p.numel() for p in m.parameters()))
""")
    assert done.returncode == 0, done.stderr
    assert 0.8 < float(done.stdout) < 1.2


@pytest.mark.parametrize("generation", [1, 2])
def test_the_gate_is_the_one_of_gate_py_on_rotated_and_normed_queries(generation):
    model = ours(generation, gated=True, gate_bias=[[0.5, -0.5, 1.0, 0.0], [0.1, -0.2, 0.0, 0.4]]).eval()
    attention, seen = model.attentions[1], {}
    attention.q_proj.weight.data *= 30  # scores that differ by more than the biases
    inner = attention.attend
    attention.attend = lambda q, k, v, **options: seen.update(q=q, k=k, v=v) or inner(q, k, v, **options)
    gates = {}
    model(torch.randint(0, 11, (2, 16)), record=lambda layer, found: gates.update({layer: found.open}))
    # heads 0 and 1 share keys, so do 2 and 3
    scores = seen["q"] @ seen["k"].repeat_interleave(2, dim=1).transpose(-2, -1) / 8**0.5
    wanted = (scores + torch.tensor([0.1, -0.2, 0.0, 0.4])[:, None, None] > 0) & torch.ones(
        16, 16
    ).tril().bool()
    assert seen["k"].shape == (2, 2, 16, 8)
    assert torch.equal(gates[1], wanted.float())
    assert 0.05 < wanted.float().mean() < 0.5


def test_training_arguments_do_what_they_do_in_gpt2():
    model, idx = ours(gated=True), torch.randint(0, 11, (2, 16))
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])  # sampled
    assert torch.equal(model(idx, gates="threshold")[0], model.eval()(idx)[0])  # thresholds
    _, loss, density = model.train()(idx, idx, linear_penalty=True)
    (loss + density).backward()
    for attention in model.attentions:
        assert attention.q_proj.weight.grad.abs().sum() > 0 and attention.k_proj.weight.grad.abs().sum() > 0
    keep = torch.zeros(2, 4, 16, 16, dtype=torch.bool)
    seen = []
    model.eval()(idx, keep=keep, record=lambda layer, gates: seen.append(gates.open.sum().item()))
    assert seen == [0, 0]
    with pytest.raises(ValueError, match="context of 17 tokens"):
        model(torch.zeros(1, 17, dtype=torch.long))
    with pytest.raises(ValueError, match="multiple"):
        ours(n_kv_head=3)


HOOKED = [{"generation": 1, "clip_qkv": 0.3}, {"generation": 2},
          {"generation": 2, "n_kv_head": 4, "gated": True, "gate_bias": [[0.5, -0.2, 0.0, 0.3]] * 2},
          {"generation": 1, "gated": True, "gate_bias": 0.1}]


def lively(**changes):
    """A random model whose heads differ and whose norms are not 1."""
    model = ours(**changes).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("changes", HOOKED)
@torch.no_grad()
def test_hooks_see_every_read_and_write_and_change_nothing_by_looking(changes):
    model, idx, graph = lively(**changes), torch.randint(0, 11, (3, 16)), ComponentGraph(2, 4)
    watch = Watch(graph)
    finals = []
    watch.read = lambda name, layer, x: (finals.append(x) if name == "final" else None, x)[1]
    assert (patched(model, idx, watch) - model(idx)[0]).abs().max() < 1e-5
    assert watch.writes.shape == (3, graph.W, 16, 32)
    assert (watch.writes.sum(dim=1, keepdim=True) - finals[0]).abs().max() < 1e-5


@pytest.mark.parametrize("changes", HOOKED)
def test_circuits_work_on_it_unchanged(changes):
    """All edges explain everything, none nothing; and an edge's attribution is the derivative by how far it
    is cut, for q, k and v of grouped heads.
    """
    torch.manual_seed(0)
    model = lively(**changes).double()
    pairs = [Pair(*(torch.randint(0, 11, (6,)).tolist() for _ in range(2)), [5], [[1]], [[2]])
             for _ in range(3)]
    graph = ComponentGraph(2, 4)
    clean, corrupted, values = effects(model, pairs, "logit difference",
                                       [graph.edges, torch.zeros_like(graph.edges)])
    assert torch.allclose(values[0], clean)
    assert torch.allclose(values[1], corrupted)
    assert (clean - corrupted).abs().max() > 1e-3
    # straight through the gates, too: with one token a pattern is always 1, and q and k matter for the gate
    # alone
    if model.config.gated:
        alone = attribute_edges(model, [Pair([3], [7], [0], [[1]], [[2]])], "logit difference")
        assert (max(alone[:, graph.reader[part, layer]].abs().max() for part in "qk"
                    for layer in range(2)) > 1e-4)
    # a threshold has no derivative to compare with; tests/circuits/test_attribution.py does by autograd
    model.config.gated = False
    scores = attribute_edges(model, pairs, "logit difference")

    def nudged(edge, step):
        class Nudge(CircuitRun):
            def read(self, name, layer, x):
                first, readers = self.graph.before[name, layer], self.graph.reader[name, layer]
                part = torch.zeros(first, readers.stop - readers.start, dtype=x.dtype)
                if edge[0] < first and readers.start <= edge[1] < readers.stop:
                    part[edge[0], edge[1] - readers.start] = step
                change = part.T @ self.differences[:first].flatten(1)
                return x + change.view(-1, *self.differences.shape[1:]).transpose(0, 1)

        total = 0.0
        with torch.no_grad():
            for before, after, group in batches(pairs, 8):
                watch = Watch(graph)
                patched(model, after, watch)
                total += (metric_of(patched(model, before, Nudge(graph, graph.edges, watch.writes)), group,
                                    "logit difference").sum().item())
        return total / len(pairs)

    for edge in [(0, graph.reader["q", 0].start + 1), (0, graph.reader["k", 1].start + 2),
                 (2, graph.reader["v", 1].start + 3), (3, graph.reader["mlp", 0].start), (7, graph.R - 1)]:
        assert (nudged(edge, 1e-5) - nudged(edge, -1e-5)) / 2e-5 == pytest.approx(
            scores[edge].item(), rel=1e-3, abs=1e-7
        )


@pytest.mark.parametrize("generation", [1, 2])
@torch.no_grad()
def test_copying_scores_by_hand(generation):
    """The eigenvalues of the whole V x V product, on a vocabulary small enough for it."""
    model = lively(generation=generation, tied=False)
    found = copying_scores(model)
    for layer, head in ((0, 1), (1, 3)):
        attention, block = model.attentions[layer], model.blocks[layer]
        value = attention.v_proj.weight.view(2, 8, 32)[head // 2]
        output = attention.o_proj.weight[:, 8 * head:8 * head + 8]
        unembed = model.lm_head.weight
        if generation == 2:
            output = block.post_attention_layernorm.weight[:, None] * output
            unembed = unembed * model.model.norm.weight
        values = torch.linalg.eigvals(unembed @ output @ value @ model.model.embed_tokens.weight.T)
        assert found[layer, head].item() == pytest.approx((values.sum().real / values.abs().sum()).item(),
                                                          abs=1e-4)


@pytest.mark.parametrize("gated", [False, True])
def test_a_norm_that_returns_float32_does_not_split_the_precisions(gated):
    """On a GPU autocast computes RMSNorm in float32, on a CPU it does not."""
    model, seen = ours(gated=gated).bfloat16(), []
    for attention in model.attentions:
        for norm in (attention.q_norm, attention.k_norm):
            norm.forward = lambda x, inner=norm.forward: inner(x).float()
        attention.attend = lambda q, k, v, inner=attention.attend, **options: (
            seen.append({q.dtype, k.dtype, v.dtype}) or inner(q, k, v, **options)
        )
    model(torch.randint(0, 11, (2, 16)))
    assert seen == [{torch.bfloat16}] * 2


@pytest.mark.slow
def test_the_rotations_are_an_operator_to_the_compiler():
    torch.library.opcheck(olmo.cos_and_sin, (torch.randn(3, 4),))
    model, idx = ours(), torch.randint(11, (2, 16))
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(idx)[0], model(idx)[0])


@pytest.mark.parametrize("impl", ["tiled", "triton"])
def test_the_fast_forms_take_olmos_shapes(impl):
    """Heads of width 128, grouped keys and values, a bias for each head, under RoPE's rotation: values and
    gradients are those of the formula.
    """
    if impl == "triton":
        pytest.importorskip("triton", reason="no Triton for this system")
    config, T = OLMoConfig(n_embd=512, n_head=4), 70
    q, k, v = (torch.randn(1, heads, T, 128) for heads in (4, 2, 2))
    results = []
    bias = torch.tensor([0.5, -0.5, 0.0, 1.0])[:, None, None]
    for how in ("plain", impl):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        rotation = olmo.rotations(config, T, "cpu")
        turned = (olmo.rotate(x, rotation) for x in inputs[:2])
        y, density, _ = fast_attention.attention(*turned, inputs[2], bias, impl=how)
        (y.square().sum() + 100 * density).backward()
        results.append([y.detach(), density.detach(), *(x.grad for x in inputs)])
    for plain, fast in zip(*results):
        assert torch.allclose(plain, fast, atol=2e-4, rtol=1e-3)
