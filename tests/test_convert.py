"""HF folders to parameters and back: parity with transformers, exact round trips, and an error for every bad file."""

import json
import tracemalloc
from dataclasses import replace
from functools import partial
from pathlib import Path

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxlin.config import RopeScaling, UserError
from jaxlin.convert import (
    begin_ids,
    end_of_text_id,
    export_hf,
    load_config,
    load_teacher,
    load_tokenizer,
    params_from_tensors,
    table,
)
from jaxlin.hf_files import open_folder
from jaxlin.model import LanguageModel
from tests.goldens.make_llama_goldens import VARIANTS, make_model, run, sample_tokens
from tests.tiny_llama import BIASED, CONFIG, QWEN2, QWEN3, assert_same, random_params, word_tokenizer

GOLDENS = Path(__file__).parent / "goldens"
TOLERANCE = 1e-4  # relative to the largest value, float32


@partial(jax.jit, static_argnums=0)
def forward(config, params, tokens):
    return LanguageModel(config).apply({"params": params}, tokens, collect=("hidden_states",))


def assert_close(found, expected):
    assert found.shape == expected.shape
    assert np.abs(np.asarray(found) - expected).max() <= TOLERANCE * np.abs(expected).max()


# ---- parity ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_golden_parity(variant, tmp_path):
    """Hidden states and logits are those of transformers, from files it once wrote (make_llama_goldens.py)."""
    with np.load(GOLDENS / f"llama_{variant}.npz") as file:
        golden = dict(file)
    (tmp_path / "config.json").write_text(str(golden["config"]))
    save_file({k: w for k, w in golden.items() if k.endswith((".weight", ".bias"))}, tmp_path / "model.safetensors")
    config = load_config(str(tmp_path))
    params = params_from_tensors(open_folder(tmp_path), config)
    output = forward(config, params, golden["tokens"])
    assert_close(output.collected["hidden_states"], golden["hidden_states"])
    assert_close(output.logits, golden["logits"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_live_parity(variant, tmp_path):
    """The same, with the transformers installed here and other weights."""
    pytest.importorskip("torch", reason="torch is not installed")
    model, tokens = make_model(variant, seed=1), sample_tokens(1)
    model.save_pretrained(tmp_path)
    config = load_config(str(tmp_path))
    output = forward(config, params_from_tensors(open_folder(tmp_path), config), tokens)
    hidden, logits = run(model, tokens)
    assert_close(output.collected["hidden_states"], hidden)
    assert_close(output.logits, logits)


def test_table_is_the_models():
    """The table's paths and shapes are those that the model itself makes, tied or not, with biases or not."""
    for config in (CONFIG, BIASED, replace(CONFIG, **QWEN2), replace(CONFIG, **QWEN3)):
        tree = jax.eval_shape(LanguageModel(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
        flat = flax.traverse_util.flatten_dict(nn.unbox(tree)["params"])
        assert {path: leaf.shape for path, leaf in flat.items()} == {e.path: e.stacked_shape for e in table(config)}


# ---- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        BIASED,
        replace(CONFIG, head_dim=12, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32)),
        replace(CONFIG, **QWEN2),
        replace(CONFIG, **QWEN3),
        replace(CONFIG, attention_bias=True, attention_out_bias=True, **QWEN3),
    ],
)
@pytest.mark.parametrize("shard_bytes", [10**9, 8000])
def test_round_trip(config, dtype, shard_bytes, tmp_path):
    params = random_params(config, dtype)
    export_hf(params, config, tmp_path / "out", tokenizer=word_tokenizer(48), shard_bytes=shard_bytes)
    assert ((tmp_path / "out" / "model.safetensors.index.json").exists()) == (shard_bytes == 8000)
    found_config, found, tokenizer = load_teacher(str(tmp_path / "out"))
    assert found_config == config
    assert_same(found, params)
    assert tokenizer("w3 w4").input_ids == [3, 4]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("kind", "shard_bytes"), [("llama", 10**9), ("llama", 8000), ("qwen2", 10**9), ("qwen3", 8000)]
)
def test_transformers_loads_the_export(kind, shard_bytes, tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from transformers import AutoModelForCausalLM

    config = {"llama": BIASED, "qwen2": replace(CONFIG, **QWEN2), "qwen3": replace(CONFIG, **QWEN3)}[kind]
    config = replace(config, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32), rope_theta=500.0)
    params = random_params(config, "bfloat16")
    export_hf(params, config, tmp_path / "out", tokenizer=word_tokenizer(48), shard_bytes=shard_bytes)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    assert (model.config.model_type, model.dtype) == (kind, torch.bfloat16)
    assert (model.config.bos_token_id, model.config.eos_token_id) == (1, 2)
    assert model.config.rope_parameters["rope_type"] == "llama3"
    with torch.no_grad():
        expected = model.float()(torch.from_numpy(sample_tokens(0))).logits.numpy()
    params = jax.tree.map(lambda a: a.astype(jnp.float32), params)
    assert_close(forward(config, params, sample_tokens(0)).logits, expected)


def test_dtype(folder, tmp_path):
    """A dtype asked for is rounded to nearest; without one nothing is lost."""
    full = random_params(BIASED)
    _, params, _ = load_teacher(str(folder), dtype="bfloat16")
    assert_same(params, jax.tree.map(lambda a: a.astype(jnp.bfloat16), full))
    export_hf(jax.tree.map(lambda a: a.astype(jnp.float16), full), BIASED, tmp_path / "half")
    params = params_from_tensors(open_folder(tmp_path / "half"), BIASED)
    assert_same(params, jax.tree.map(lambda a: a.astype(jnp.float16).astype(jnp.float32), full))


def test_export_refuses(folder, tmp_path):
    params = random_params(CONFIG)
    with pytest.raises(UserError, match=r"mixer=gla cannot be written .* only softmax"):
        export_hf(params, replace(CONFIG, mixer=("gla",)), tmp_path / "out")
    neither = replace(CONFIG, mlp_bias=True, **QWEN2)
    with pytest.raises(UserError, match=r"no class of transformers has .* mlp_bias=True together"):
        export_hf(random_params(neither), neither, tmp_path / "out")
    with pytest.raises(UserError, match="exists already"):
        export_hf(params, CONFIG, folder)
    with pytest.raises(ValueError, match="params: embed_tokens/embedding has shape"):
        export_hf(params, replace(CONFIG, vocab_size=50), tmp_path / "out")
    with pytest.raises(ValueError, match="params has too many leaves for this config, for one lm_head/kernel"):
        export_hf(params | {"lm_head": {"kernel": jnp.zeros((32, 48))}}, CONFIG, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_failed_export_leaves_nothing(tmp_path):
    class Broken:
        def save_pretrained(self, path):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        export_hf(random_params(CONFIG), CONFIG, tmp_path / "out", tokenizer=Broken())
    assert not list(tmp_path.iterdir())


# ---- placing, memory -------------------------------------------------------------------------------------------------


def test_shardings(folder):
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def spec(entry):
        axes = {"q_proj": (None, "fsdp", "tensor"), "gate_proj": (None, "fsdp"), "embed_tokens": ("tensor", "fsdp")}
        last = entry.path[-2] if entry.path[-1] in ("kernel", "embedding") else ""
        return jax.NamedSharding(mesh, jax.P(*axes.get(last, ())))

    flat = {e.path: spec(e) for e in table(BIASED)}
    shardings = flax.traverse_util.unflatten_dict(flat)
    _, params, _ = load_teacher(str(folder), shardings=shardings)
    assert_same(params, random_params(BIASED))
    assert jax.tree.map(lambda a, s: a.sharding == s, params, shardings) == jax.tree.map(lambda a: True, params)
    kernel = params["layers"]["block_0"]["mixer"]["q_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 16, 1, 8)
    _, params, _ = load_teacher(str(folder), shardings=lambda config: jax.tree.map(lambda s: s, shardings))
    assert params["layers"]["block_0"]["mixer"]["q_proj"]["kernel"].sharding == kernel.sharding
    del shardings["norm"]
    with pytest.raises(ValueError, match="shardings lacks leaves for this config, for one norm/weight"):
        load_teacher(str(folder), shardings=shardings)


def test_memory(tmp_path):
    """While loading, host memory holds the parameters in their dtype, one stacked parameter and a few tensors."""
    config = replace(CONFIG, hidden_size=64, intermediate_size=256, num_hidden_layers=48)
    export_hf(random_params(config), config, tmp_path / "out")
    reader = open_folder(tmp_path / "out")
    tracemalloc.start()
    try:
        params = params_from_tensors(reader, config, dtype="bfloat16")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(params)]
    tensor = 4 * 64 * 256  # one float32 matrix
    assert peak <= sum(sizes) + max(sizes) + 4 * tensor


# ---- tokenizer -------------------------------------------------------------------------------------------------------


def test_beginning():
    from tokenizers.processors import TemplateProcessing

    tokenizer = word_tokenizer(48)
    assert begin_ids(tokenizer) == []
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="w1 $A", special_tokens=[("w1", 1)])
    assert begin_ids(tokenizer) == [1]
    tokenizer.bos_token = None
    assert begin_ids(tokenizer) == []


def test_end_of_text():
    tokenizer = word_tokenizer(48)
    assert end_of_text_id(tokenizer) == 2
    tokenizer.add_tokens(["<|endoftext|>"])
    assert end_of_text_id(tokenizer) == 48
    tokenizer = word_tokenizer(48)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"neither <\|endoftext\|> nor an end-of-sequence token"):
        end_of_text_id(tokenizer)


def test_tokenizer_class_does_not_replace_the_file(copy):
    """tokenizer.json decides, even where tokenizer_config.json names a class with a pre-tokenizer of its own."""
    from tokenizers import pre_tokenizers

    tokenizer = word_tokenizer(48)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), digits])
    tokenizer.save_pretrained(copy)
    file = copy / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "GPT2Tokenizer"}))
    found = load_tokenizer(str(copy)).backend_tokenizer.pre_tokenizer
    assert [piece for piece, _ in found.pre_tokenize_str("w12")] == ["w", "1", "2"]
