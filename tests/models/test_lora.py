"""Adapters against PEFT's on the same weights: logits, gradients, folders; and frozen bases in few bits."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

from jaxdistill.export import export_adapter, export_hf
from jaxdistill.models import Lora, adapters, load_hf, merge_lora, params_of, split_params, with_lora, with_params
from jaxdistill.models.load import init_model
from jaxdistill.models.lora import LORA_A, LORA_B
from jaxdistill.models.quantize import dense, quantize
from jaxdistill.parallel.mesh import make_mesh
from tests.export.tiny import make_tokenizer_folder
from tests.models import tiny

TARGETS = ("q_proj", "v_proj", "o_proj", "down_proj")


# ways to begin that change the base's matrices, or how many ranks a layer has
INITIALIZED = (
    "pissa",
    "pissa_niter_16",
    "olora",
    "corda",
    "eva",
    "lora_ga",
    "loftq",
    "orthogonal",
    "next_year",
)
CHANGED = (
    {"use_dora": True},
    {"use_qalora": True},
    {"lora_bias": True},
    {"bias": "all"},
    {"fan_in_fan_out": True},
    {"alora_invocation_tokens": [1, 2]},
    {"alora_invocation_tokens": []},
    {"kasa_config": {"beta": 1e-4}},
    {"arrow_config": {"top_k": 2}},
    {"eva_config": {"rho": 2.0}},
    {"corda_config": {"corda_method": "ipm"}},
    {"lora_ga_config": {"direction": "ArB2r"}},
    {"velora_config": {"num_groups": 2}},
    {"monteclora_config": {"num_samples": 2}},
    {"use_bdlora": {"nblocks": 2}},
    {"loftq_config": {"loftq_bits": 4}},
    {"megatron_config": {"hidden_size": 8}},
    {"rank_pattern": {"q_proj": 8}},
    {"alpha_pattern": {"q_proj": 8}},
    {"layers_to_transform": 0},
    {"layers_to_transform": [0]},
    {"layer_replication": [[0, 3], [1, 3]]},
    {"modules_to_save": ["lm_head"]},
    {"exclude_modules": ["k_proj"]},
    {"target_parameters": ["experts.down_proj"]},
    {"trainable_token_indices": [3]},
    {"ensure_weight_tying": True},
    {"task_type": "SEQ_CLS"},
    {"task_type": "FEATURE_EXTRACTION"},
    {"a_setting_of_next_year": "on"},
    {"a_setting_of_next_year": 1},
    {"a_setting_of_next_year": [1]},
)
OTHERS = ("IA3", "VERA", "ADALORA", "LOHA", "OFT", "PROMPT_TUNING", "XLORA", "SHIRA", "NEXT_YEAR", "None")


def tokens_of(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 97, shape)


def trained(model, seed=1):
    """The same model with adapters as training would leave them: B is not zero any more."""
    params = params_of(model)
    keys = iter(jax.random.split(jax.random.key(seed), 20))
    layers = {
        name: 0.2 * jax.random.normal(next(keys), p.shape) if name.endswith(LORA_B) else p
        for name, p in params["layers"].items()
    }
    return with_params(model, params | {"layers": layers})


def build(family, folder):
    """(our model with trained adapters, PEFT's model from our adapter folder); the base is in `folder / "base"`."""
    tiny.make(family, folder / "base", vocab_size=98)
    tiny.tokenizer(folder / "tokenizer", family)
    ours = trained(with_lora(load_hf(folder / "base"), Lora.of(3, 5.0, 0.0, TARGETS), seed=0))
    more = {"base": str(folder / "base"), "revision": None, "tokenizer": folder / "tokenizer", "card": "# card"}
    export_adapter(ours, folder / "adapter", **more)
    base = tiny.FAMILIES[family][1].from_pretrained(folder / "base")
    return ours, peft.PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True).eval()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma3")
    ours, theirs = build("gemma3_text", folder)
    return ours, folder, theirs


def logits_of(reference, ids):
    with torch.no_grad():
        return reference(torch.from_numpy(ids)).logits.numpy()


def close(got, want, share=1e-4):
    np.testing.assert_allclose(got, want, atol=share * np.abs(want).max())


def test_new_adapters_change_nothing(pair):
    _, folder, _ = pair
    base = load_hf(folder / "base")
    ids = jnp.asarray(tokens_of((2, 20)))
    np.testing.assert_array_equal(with_lora(base, Lora.of(4, 8.0), seed=3)(ids), base(ids))


def test_logits_are_those_of_peft(pair):
    ours, folder, theirs = pair
    ids = tokens_of((2, 40))
    want = logits_of(theirs, ids)
    assert np.abs(want - logits_of(theirs.get_base_model(), ids)).max() == 0  # PEFT adapts it in place
    with theirs.disable_adapter():
        assert np.abs(want - logits_of(theirs, ids)).max() > 0.1
    close(ours(jnp.asarray(ids)), want)
    close(load_hf(folder / "adapter")(jnp.asarray(ids)), want)


def test_logits_are_those_of_peft_with_biases_too(tmp_path):
    ours, theirs = build("qwen2", tmp_path)
    ids = tokens_of((1, 20))
    close(ours(jnp.asarray(ids)), logits_of(theirs, ids))


def test_the_adapter_folder_says_what_it_is(pair):
    _, folder, _ = pair
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 3 and config["lora_alpha"] == 5.0 and set(config["target_modules"]) == set(TARGETS)
    assert (folder / "adapter" / "README.md").read_text() == "# card"
    tokenizer = {f.name for f in (folder / "tokenizer").iterdir()}
    assert {f.name for f in (folder / "adapter").iterdir()} - tokenizer == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_gradients_are_those_of_peft(pair):
    ours, _, theirs = pair
    ids = tokens_of((2, 33))
    theirs.zero_grad()
    labels = torch.from_numpy(ids)
    theirs(labels, labels=labels).loss.backward()
    adapters, frozen = split_params(params_of(ours))

    def loss(adapters):
        params = frozen | {"layers": frozen["layers"] | adapters["layers"]}
        logits = with_params(ours, params)(jnp.asarray(ids))[:, :-1]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(ids)[:, 1:, None], axis=-1).mean()

    gradient = jax.grad(loss)(adapters)["layers"]
    assert len(gradient) == 2 * len(TARGETS)
    named = {n: p.grad.numpy().T for n, p in theirs.named_parameters() if p.grad is not None}
    assert len(named) == 2 * len(TARGETS) * 3
    for target in TARGETS:
        for half, letter in ((LORA_A, "A"), (LORA_B, "B")):
            found = [g for n, g in sorted(named.items()) if f".{target}.lora_{letter}." in n]
            got = gradient[target.removesuffix("_proj") + half]
            close(got, np.stack(found), 2e-4)


def test_a_merged_export_is_an_ordinary_model(pair, tmp_path):
    ours, _, theirs = pair
    make_tokenizer_folder(tmp_path / "tokenizer")
    export_hf(merge_lora(ours), tmp_path / "out", tokenizer=tmp_path / "tokenizer", card="")
    ids = tokens_of((1, 30))
    close(load_hf(tmp_path / "out")(jnp.asarray(ids)), logits_of(theirs, ids))


def test_adapters_over_a_mesh_are_the_same_numbers(pair):
    ours, folder, _ = pair
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    over = trained(with_lora(load_hf(folder / "base", mesh), Lora.of(3, 5.0, 0.0, TARGETS), seed=0))
    ids = jnp.asarray(tokens_of((4, 24)))
    close(jax.jit(lambda m, i: with_params(over, m)(i))(params_of(over), ids), np.asarray(ours(ids)), 2e-5)


def test_dropout_is_of_the_adapters_alone_and_of_the_key(pair):
    _, folder, _ = pair
    base = load_hf(folder / "base")
    ids = jnp.asarray(tokens_of((2, 24)))
    fresh = with_lora(base, Lora.of(3, 5.0, 0.5, TARGETS), seed=0)
    np.testing.assert_array_equal(fresh(ids, dropout_key=jax.random.key(0)), base(ids))
    model = trained(fresh)
    one, same, other = (model(ids, dropout_key=jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert float(jnp.abs(one - other).max()) > 0.01
    assert float(jnp.abs(one - model(ids)).max()) > 0.01  # without a key, nothing is dropped


@pytest.mark.parametrize(("qtype", "error"), [("int8", 0.006), ("nf4", 0.16)])
def test_a_quantized_base_is_near_and_computes_what_its_numbers_say(tmp_path, qtype, error):
    matrix = jax.random.normal(jax.random.key(0), (3, 128, 40))
    stored = quantize(matrix, qtype)
    assert float(jnp.abs(dense(stored) - matrix).max()) <= error * float(jnp.abs(matrix).max())
    assert stored.qvalue.dtype.itemsize == 1 and stored.scale.shape == (3, 2, 40)

    tiny.make("qwen3", tmp_path, hidden_size=64, intermediate_size=128)
    model = load_hf(tmp_path, param_dtype=qtype)
    params = params_of(model)
    assert params["layers"]["q"].qvalue.shape[:2] == (3, 64) and params["embed"].dtype == jnp.bfloat16
    layers = {n: dense(p).astype(jnp.float32) for n, p in params["layers"].items()}
    plain = with_params(load_hf(tmp_path), params | {"layers": layers})
    ids = jnp.asarray(tokens_of((2, 20)))
    close(model(ids), np.asarray(plain(ids)), 1e-5)
    adapted = trained(with_lora(model, Lora.of(2, 4.0), seed=0))
    close(adapted(ids), np.asarray(merge_lora(trained(with_lora(plain, Lora.of(2, 4.0), seed=0)))(ids)), 1e-4)
    # merging rounds to the base's own bf16
    close(merge_lora(adapted)(ids), np.asarray(adapted(ids)), 0.05)


def test_starting_points_depend_on_the_seed_and_not_on_other_targets(tmp_path):
    config = load_hf("demo").config
    model = init_model(config, 0)
    all_of_them, some = (params_of(with_lora(model, Lora.of(2, 2.0, 0.0, t), seed=0)) for t in ("all-linear", ["v"]))
    np.testing.assert_array_equal(all_of_them["layers"]["v" + LORA_A], some["layers"]["v" + LORA_A])
    other = params_of(with_lora(model, Lora.of(2, 2.0), seed=1))
    assert float(jnp.abs(other["layers"]["v" + LORA_A] - some["layers"]["v" + LORA_A]).max()) > 0
    bound = config.hidden_size**-0.5
    assert 0.9 * bound < float(jnp.abs(some["layers"]["v" + LORA_A]).max()) <= bound


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((0, 1.0), "rank is 0"),
        ((4, 1.0, 1.0), "dropout is 1.0"),
        ((4, 1.0, 0.0, ["q_proj", "gates_proj"]), "did you mean gate_proj"),
        ((4, 1.0, 0.0, []), "no targets"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        Lora.of(*arguments)


def test_what_peft_itself_writes_of_a_plain_adapter_is_read(pair, tmp_path):
    _, folder, theirs = pair
    theirs.save_pretrained(tmp_path)
    assert len(json.loads((tmp_path / "adapter_config.json").read_text())) > 30
    ids = tokens_of((1, 9))
    np.testing.assert_array_equal(load_hf(tmp_path)(jnp.asarray(ids)), load_hf(folder / "adapter")(jnp.asarray(ids)))


def test_a_folder_with_a_whole_model_too_or_without_weights_is_refused(pair, tmp_path):
    """unslothai/unsloth#1848: one folder with both configs; which of the two is meant cannot be known."""
    _, folder, _ = pair
    shutil.copytree(folder / "base", tmp_path / "both")
    shutil.copytree(folder / "adapter", tmp_path / "both", dirs_exist_ok=True)
    with pytest.raises(ValueError, match=r"both: a whole model and adapter_config\.json"):
        load_hf(tmp_path / "both")
    # the base's config alone is no model
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    shutil.copy(folder / "base" / "config.json", tmp_path / "adapter")
    load_hf(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"its weights are adapter_model\.bin.*PeftModel"):
        load_hf(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.bin").unlink()
    with pytest.raises(
        ValueError, match=r"an adapter without weights \(adapter_model\.safetensors\); save it again with"
    ):
        load_hf(tmp_path / "adapter")
    # what trainers leave beside adapters is no model, and weights under another name are none of adapters
    (tmp_path / "adapter" / "training_args.bin").write_bytes(b"")
    shutil.copy(folder / "adapter" / "adapter_model.safetensors", tmp_path / "adapter" / "adapter_0.safetensors")
    with pytest.raises(ValueError, match=r"an adapter without weights \(adapter_model\.safetensors\)"):
        load_hf(tmp_path / "adapter")
    shutil.copy(folder / "adapter" / "adapter_model.safetensors", tmp_path / "adapter")
    load_hf(tmp_path / "adapter")
    (tmp_path / "adapter" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"adapter: a whole model and adapter_config\.json"):
        load_hf(tmp_path / "adapter")
    for name in ("pytorch_model.bin", "config.json", "adapter_config.json"):
        (tmp_path / "adapter" / name).unlink()
    with pytest.raises(ValueError, match=r"adapters and no adapter_config\.json, which says what they are"):
        load_hf(tmp_path / "adapter")


def test_adapters_that_compute_something_else_are_refused(pair, tmp_path):
    """Whatever is not known to leave a plain LoRA, by its name.

    huggingface/peft#2184: PiSSA changes the matrices of the base, so that its adapters fit no other; so does what is
    initialized likewise. invergent-ai/surogate#173: without lora_alpha, an adapter was loaded to no effect.
    """
    _, folder, _ = pair
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    weights = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    for change, said in (
        *(({"init_lora_weights": how}, f"init_lora_weights='{how}' is not supported") for how in INITIALIZED),
        *((change, f"{next(iter(change))}=.* is not supported") for change in CHANGED),
        *(({"peft_type": kind, "feedforward_modules": []}, f"peft_type='?{kind}'? is not supp") for kind in OTHERS),
        ({"r": 4}, "expected rank 4"),
        ({"r": 0}, "r=0, .* a whole number above 0"),
        ({"r": "8"}, "r='8'"),
        ({"lora_alpha": None}, "lora_alpha=None, "),
        ({"lora_alpha": True}, "lora_alpha=True, "),
        ({"use_rslora": "false"}, "use_rslora='false'; it has to be true or false"),
        ({"target_modules": ["lm_head"]}, "adapter_config.json: target_modules: LoRA: no linear layer 'lm_head'"),
        ({"target_modules": ["model.layers.0.self_attn.q_proj"]}, "no linear layer 'model.layers.0.self_attn.q_proj'"),
        (
            {"base_model_name_or_path": "no/such/folder"},
            "'no/such/folder', and the base cannot be had .* absolute",
        ),
        ({"base_model_name_or_path": "../nowhere"}, "'../nowhere', and the base cannot be had .* absolute path"),
        ({"base_model_name_or_path": str(tmp_path)}, "which is an adapter itself; merge that one"),
        ({"target_modules": ["q_proj"]}, "has no place in an adapter"),
        ({"target_modules": ["q_proj", "k_proj"]}, "is missing"),
        ({"base_model_name_or_path": None}, "no base_model_name_or_path"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
        (tmp_path / "adapter_model.safetensors").write_bytes(weights)
        with pytest.raises(ValueError, match=said) as error:
            load_hf(tmp_path)
        assert str(error.value).startswith(str(tmp_path)), said


def test_every_setting_of_peft_is_known_or_off():
    """A plain adapter of the PEFT that is installed passes."""
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], task_type="CAUSAL_LM").to_dict()
    config |= {"peft_type": "LORA", "task_type": "CAUSAL_LM"}
    asked = [key for key, value in config.items() if key not in adapters._READ | adapters._ANY]
    assert len(asked) > 25, "PEFT keeps its settings elsewhere now"
    assert [key for key in asked if not adapters._is_off(key, config[key])] == []


@pytest.mark.parametrize(
    "change",
    [
        # scaled by alpha / sqrt(r): vllm-project/vllm#10798, sgl-project/sglang#40835, NVIDIA/TensorRT-LLM#1668
        {"use_rslora": True},
        # a pattern, as unsloth writes it (vllm-project/vllm#9275), and ends of paths
        {"target_modules": r"(?:.*?self_attn\.(?:q_proj|v_proj|o_proj))|(?:.*?mlp\.down_proj)"},
        {"target_modules": ["self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj"]},
        {"init_lora_weights": "gaussian", "rank_pattern": {}, "modules_to_save": [], "lora_bias": False},
    ],
)
def test_what_is_plain_is_what_peft_makes_of_it(pair, tmp_path, change):
    _, folder, _ = pair
    shutil.copytree(folder / "adapter", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    base = tiny.FAMILIES["gemma3_text"][1].from_pretrained(folder / "base")
    ids = tokens_of((2, 20))
    close(load_hf(tmp_path)(jnp.asarray(ids)), logits_of(peft.PeftModel.from_pretrained(base, tmp_path).eval(), ids))
