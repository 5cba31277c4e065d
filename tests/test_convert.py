"""HF folders to parameters and back: parity with transformers, exact round trips, and an error for every bad file."""

import json
import shutil
import sys
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
from safetensors.numpy import load_file, save_file

from jaxlin.config import RopeScaling, UserError
from jaxlin.convert import (
    end_of_text_id,
    export_hf,
    load_config,
    load_teacher,
    load_tokenizer,
    params_from_tensors,
    table,
)
from jaxlin.hf_files import config_from_hf, open_folder
from jaxlin.model import LanguageModel
from tests.goldens.make_llama_goldens import VARIANTS, make_model, run, sample_tokens
from tests.tiny_llama import BIASED, CONFIG, assert_same, random_params, word_tokenizer

GOLDENS = Path(__file__).parent / "goldens"
TOLERANCE = 1e-4  # relative to the largest value, float32


@partial(jax.jit, static_argnums=0)
def forward(config, params, tokens):
    return LanguageModel(config).apply({"params": params}, tokens, collect=("hidden_states",))


def assert_close(found, expected):
    assert found.shape == expected.shape
    assert np.abs(np.asarray(found) - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A good HF folder: safetensors, config and tokenizer."""
    path = tmp_path_factory.mktemp("teacher") / "tiny"
    export_hf(random_params(BIASED), BIASED, path, tokenizer=word_tokenizer(48))
    return path


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the good folder, to break."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def edit_config(folder, **changes):
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def edit_tensors(folder, **changes):
    """Replace tensors of model.safetensors (dots are written __); None removes one."""
    file = folder / "model.safetensors"
    tensors = load_file(file) | {name.replace("__", "."): t for name, t in changes.items()}
    save_file({name: t for name, t in tensors.items() if t is not None}, file, metadata={"format": "pt"})


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
    for config in (CONFIG, BIASED):
        tree = jax.eval_shape(LanguageModel(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
        flat = flax.traverse_util.flatten_dict(nn.unbox(tree)["params"])
        assert {path: leaf.shape for path, leaf in flat.items()} == {e.path: e.stacked_shape for e in table(config)}


# ---- configuration ---------------------------------------------------------------------------------------------------

HF = dict(
    model_type="llama",
    vocab_size=48,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    rms_norm_eps=1e-5,
)
SCALING = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)


def test_config_defaults_are_transformers():
    config = config_from_hf(HF, "config.json")
    assert (config.num_key_value_heads, config.head_dim, config.rope_theta) == (4, 8, 10000.0)
    assert (config.tie_word_embeddings, config.max_position_embeddings) == (False, 2048)


@pytest.mark.parametrize(
    "spelling",
    [
        dict(rope_theta=5e5, rope_scaling=dict(rope_type="llama3", **SCALING), torch_dtype="float32"),
        dict(rope_theta=5e5, rope_scaling=dict(type="llama3", **SCALING)),
        dict(rope_parameters=dict(rope_theta=5e5, rope_type="llama3", **SCALING), dtype="float32"),
    ],
)
def test_config_spellings(spelling):
    config = config_from_hf(HF | spelling, "config.json")
    assert config.rope_theta == 5e5
    assert config.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model_type="mistral", sliding_window=4096), "config.json: model_type='mistral' is not supported"),
        (dict(model_type="qwen3"), "model_type='qwen3' is not supported"),
        (dict(model_type=None), "model_type=None is not supported"),
        (dict(hidden_act="gelu"), "hidden_act='gelu'"),
        (dict(quantization_config=dict(bits=4)), "quantized"),
        (dict(rope_scaling=dict(type="linear", factor=2.0)), "rope type 'linear'"),
        (dict(rope_parameters=dict(rope_type="yarn", factor=2.0)), "rope type 'yarn'"),
        (dict(rope_scaling=dict(rope_type="llama3", factor=8.0)), "lacks low_freq_factor, high_freq_factor, orig"),
        (dict(rope_scaling="llama3"), "rope_scaling='llama3' should be an object"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
        (dict(vocab_size=None), "config.json has no vocab_size"),
        (dict(hidden_size="32"), "hidden_size='32' should be a positive integer"),
        (dict(num_hidden_layers=0), "num_hidden_layers=0 should be a positive integer"),
        (dict(num_attention_heads=5), "hidden_size=32 is not a multiple of num_attention_heads=5"),
        (dict(num_key_value_heads=3), "num_key_value_heads=3 does not divide"),
        (dict(rope_theta="big"), "rope_theta='big' should be a positive number"),
    ],
)
def test_config_errors(change, message):
    with pytest.raises(UserError, match=message):
        config_from_hf(HF | change, "config.json")


# ---- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "config", [CONFIG, BIASED, replace(CONFIG, head_dim=12, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32))]
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


@pytest.mark.parametrize("shard_bytes", [10**9, 8000])
def test_transformers_loads_the_export(shard_bytes, tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from transformers import LlamaForCausalLM

    config = replace(BIASED, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32), rope_theta=500.0)
    params = random_params(config, "bfloat16")
    export_hf(params, config, tmp_path / "out", tokenizer=word_tokenizer(48), shard_bytes=shard_bytes)
    model, report = LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    assert model.dtype == torch.bfloat16
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
    with pytest.raises(UserError, match="exists already"):
        export_hf(params, CONFIG, folder)
    with pytest.raises(ValueError, match="params: embed_tokens/embedding has shape"):
        export_hf(params, replace(CONFIG, vocab_size=50), tmp_path / "out")
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
    del shardings["norm"]
    with pytest.raises(ValueError, match="shardings is not a tree like the parameters: see norm/weight"):
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


# ---- other formats ---------------------------------------------------------------------------------------------------


def as_bin(folder, *, shards=1, **options):
    """Turn the folder's safetensors into pytorch_model.bin files."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    tensors = {name: torch.from_numpy(t) for name, t in load_file(folder / "model.safetensors").items()}
    if options.pop("bfloat16", False):
        tensors = {name: t.bfloat16() for name, t in tensors.items()}
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin", **options)
        return
    names = sorted(tensors)
    files = [f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin" for i in range(shards)]
    for i, file in enumerate(files):
        torch.save({n: tensors[n] for n in names[i::shards]}, folder / file, **options)
    weight_map = {n: files[i % shards] for i, n in enumerate(names)}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("options", [{}, {"shards": 2}, {"_use_new_zipfile_serialization": False}])
def test_bin(copy, options):
    as_bin(copy, **options)
    _, params, _ = load_teacher(str(copy))
    assert_same(params, random_params(BIASED))


def test_bin_bfloat16(copy):
    as_bin(copy, bfloat16=True)
    _, params, _ = load_teacher(str(copy))
    assert_same(params, jax.tree.map(lambda a: a.astype(jnp.bfloat16), random_params(BIASED)))


class Hostile:
    def __reduce__(self):
        return (print, ("code from the file ran",))


@pytest.mark.parametrize("content", [Hostile(), [1, 2], {"a": 1}])
def test_bin_other_content(copy, content, capsys):
    """Nothing in a .bin file is executed, and what is not a state dict is refused."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    (copy / "model.safetensors").unlink()
    torch.save(content, copy / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin"):
        load_teacher(str(copy))
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize("size", [0, 100, 20000])
def test_bin_truncated(copy, size):
    as_bin(copy)
    file = copy / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(UserError, match=r"pytorch_model\.bin is truncated or not what its name says"):
        load_teacher(str(copy))


def test_bin_without_torch(copy, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin can only be read with torch: pip install torch"):
        load_teacher(str(copy))


# ---- bad files -------------------------------------------------------------------------------------------------------


def refused(folder, message):
    """Loading raises one line that says `message`."""
    with pytest.raises(UserError, match=message) as error:
        load_teacher(str(folder))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_safetensors_truncated(copy, keep):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(copy, r"model\.safetensors is truncated or not what its name says \(.+\); fetch it again")


def test_wrong_shape_and_kind(copy):
    name = "model__layers__1__self_attn__k_proj__weight"
    edit_tensors(copy, **{name: np.zeros((32, 32), np.float32), "model__norm__weight": np.zeros(32, np.int8)})
    refused(
        copy, r"model\.layers\.1\.self_attn\.k_proj\.weight has shape \(32, 32\), but the config makes it \(16, 32\)"
    )
    refused(copy, r"model\.norm\.weight is stored as I8")


def test_missing_tensors_are_listed_together(copy):
    names = ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"]
    edit_tensors(copy, **{n.replace(".", "__"): None for n in names})
    refused(copy, f"missing tensors: {', '.join(names)}".replace(".", r"\."))


def test_config_of_another_model(copy):
    edit_config(copy, num_hidden_layers=3)
    refused(copy, r"missing tensors: model\.layers\.2\.input_layernorm\.weight, .* and 10 more")
    edit_config(copy, num_hidden_layers=1)
    refused(copy, r"tensors that the config does not account for: model\.layers\.1\.")
    edit_config(copy, num_hidden_layers=2, attention_bias=False)
    refused(copy, r"does not account for: model\.layers\.0\.self_attn\.k_proj\.bias")


def test_tied_head(copy):
    edit_config(copy, tie_word_embeddings=True)
    refused(copy, r"lm_head\.weight differs from the embedding, but the config has tie_word_embeddings=true")
    edit_tensors(copy, lm_head__weight=load_file(copy / "model.safetensors")["model.embed_tokens.weight"])
    config, params, _ = load_teacher(str(copy))
    assert config.tie_word_embeddings and "lm_head" not in params


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", r"config\.json is not valid JSON"), ("[]", "should hold a JSON object, not a list"), (None, "is missing")],
)
def test_bad_config_file(copy, text, message):
    file = copy / "config.json"
    file.unlink() if text is None else file.write_text(text)
    refused(copy, message)


def test_missing_files(copy, tmp_path):
    (copy / "tokenizer.json").unlink()
    refused(copy, r"copy holds no tokenizer: expected one of tokenizer\.json")
    (copy / "model.safetensors").unlink()
    refused(copy, r"copy holds no weights: expected one of model\.safetensors")
    refused(copy / "config.json", r"config\.json is a file: give the folder that holds it")
    refused(tmp_path / "a" / "b" / "c", "no such folder")


def test_bad_shards(tmp_path):
    path = tmp_path / "out"
    export_hf(random_params(CONFIG), CONFIG, path, tokenizer=word_tokenizer(48), shard_bytes=20000)
    index = path / "model.safetensors.index.json"
    good = index.read_text()
    data = json.loads(good)
    files = sorted(set(data["weight_map"].values()))
    data["weight_map"]["model.extra.weight"] = files[0]
    index.write_text(json.dumps(data))
    refused(path, r"index\.json places tensors in files that do not hold them: model\.extra\.weight")
    index.write_text("{}")
    refused(path, r"index\.json has no weight_map")
    index.write_text(good)
    (path / files[1]).unlink()
    refused(path, rf"index\.json names files that are absent: {files[1]}; fetch the model again")


@pytest.mark.parametrize("size", [49, 30])
def test_vocabulary_mismatch(copy, size):
    word_tokenizer(size).save_pretrained(copy)
    refused(copy, f"the tokenizer has {size} tokens but the model's vocab_size is 48")


def test_bad_tokenizer(copy):
    (copy / "tokenizer.json").write_text('{"version": ')
    refused(copy, "the tokenizer cannot be read")


def test_hub_errors(monkeypatch):
    """A hub name that cannot be fetched is one line, whatever the reason."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*args, **kwargs):
        raise LocalEntryNotFoundError("cannot find an appropriate cached snapshot folder\nfor the revision")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    refused(
        "nobody/nothing", r"teacher nobody/nothing: no such folder here, and it cannot be had from the hub \(cannot"
    )


def test_hub(copy, monkeypatch):
    """Safetensors are downloaded if there are any, otherwise .bin files; never both."""
    import huggingface_hub

    wanted = []

    def download(name, allow_patterns):
        wanted.append((name, allow_patterns[-1]))
        return str(copy)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    _, params, _ = load_teacher("some-org/Some.Model-1B")
    assert_same(params, random_params(BIASED))
    assert wanted == [("some-org/Some.Model-1B", "model*.safetensors")]
    (copy / "model.safetensors").unlink()
    refused("org/name", "holds no weights")
    assert wanted[1:] == [("org/name", "model*.safetensors"), ("org/name", "pytorch_model*.bin")]


# ---- tokenizer -------------------------------------------------------------------------------------------------------


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
