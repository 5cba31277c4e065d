"""Reading HF folders: configs, safetensors and .bin files, and one clear error for whatever is wrong with them."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxlin.config import RopeScaling, UserError
from jaxlin.convert import export_hf, load_teacher
from jaxlin.hf_config import config_from_hf
from tests.tiny_llama import BIASED, CONFIG, assert_same, random_params, word_tokenizer


def edit_config(folder, **changes):
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def edit_tensors(folder, **changes):
    """Replace tensors of model.safetensors (dots are written __); None removes one."""
    file = folder / "model.safetensors"
    tensors = load_file(file) | {name.replace("__", "."): t for name, t in changes.items()}
    save_file({name: t for name, t in tensors.items() if t is not None}, file, metadata={"format": "pt"})


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
QWEN3 = dict(model_type="qwen3", num_key_value_heads=2)
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
    ("kind", "expected"),
    [
        (dict(model_type="llama", qk_norm=True), (False, False, False)),
        (dict(model_type="llama", attention_bias=True), (True, True, False)),
        (dict(model_type="mistral", sliding_window=None, attention_bias=True), (False, False, False)),
        (dict(model_type="qwen2", attention_bias=False, sliding_window=64), (True, False, False)),
        (dict(model_type="qwen3", use_sliding_window=False, sliding_window=64), (False, False, True)),
        (dict(model_type="qwen3", use_sliding_window=True, max_window_layers=2), (False, False, True)),
        (dict(model_type="qwen3", use_sliding_window=True, layer_types=["full_attention"] * 2), (False, False, True)),
        (dict(model_type="qwen3", attention_bias=True), (True, True, True)),
    ],
)
def test_families(kind, expected):
    """Biases and norms are those of transformers' class, whatever else config.json says."""
    config = config_from_hf(HF | dict(num_key_value_heads=2) | kind, "config.json")
    assert (config.attention_bias, config.attention_out_bias, config.qk_norm) == expected
    assert config.head_dim == (128 if kind["model_type"] == "qwen3" else 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(model_type="gemma"),
            r"config.json: model_type='gemma' is not supported; .* \(llama, mistral, qwen2, qwen3\)",
        ),
        (dict(model_type="mistral", num_key_value_heads=2), "sliding_window=4096 is not supported; where no sequence"),
        (
            dict(model_type="qwen2", num_key_value_heads=2, use_sliding_window=True, max_window_layers=1),
            "window=4096 is",
        ),
        (
            dict(
                model_type="qwen2",
                num_key_value_heads=2,
                use_sliding_window=True,
                max_window_layers=1,
                sliding_window=9,
            ),
            "sliding_window=9 is not supported",
        ),
        (
            QWEN3 | dict(use_sliding_window=True, layer_types=["full_attention", "sliding_attention"]),
            "sliding_window=4096 is not supported",
        ),
        (QWEN3 | dict(attention_bias="no"), "attention_bias='no' should be true or false"),
        (dict(model_type="qwen3"), "config.json has no num_key_value_heads"),
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
