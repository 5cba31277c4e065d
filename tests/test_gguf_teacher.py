"""GGUF files: tensors, config, tokenizer."""

import json
from dataclasses import replace
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlin import gguf_teacher
from jaxlin.config import RopeScaling, UserError
from jaxlin.convert import end_of_text_id, load_config, load_teacher, load_tokenizer
from jaxlin.gguf_teacher import pre_tokenizer, unpermute
from tests.tiny_llama import BIASED, CONFIG, assert_same, hf_tensors, random_params

GOLDEN = json.loads((Path(__file__).parent / "goldens" / "smollm_tokenizer.json").read_text())
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
NAMES = {hf: name for name, hf in gguf_teacher._TENSORS.items()}


def gguf_name(name):
    """An HF tensor name in GGUF."""
    *front, kind = name.split(".")
    if front[:2] == ["model", "layers"]:
        return f"blk.{front[2]}.{NAMES['.'.join(front[3:])]}.{kind}"
    return f"{NAMES['.'.join(front)]}.{kind}"


def permute(rows, heads):
    """What llama.cpp's converter does to q and k: rows i and i + d/2 of a head become neighbours."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(rows.shape)


def byte_tokens():
    """A byte-level vocabulary of 48 tokens: the specials, some characters, two merges."""
    characters = [*"abcdefghijklmnopqrstuvwxyz", "Ġ", "Ċ", *"0123456789", *".,!"]
    return [*SPECIAL, *characters, "Ġa", "12", "lo", "low"][:48]


def write_gguf(path, config, params, *, kind=gguf.GGMLQuantizationType.F32, fields=(), drop=(), factors=None):
    """Write a Llama as llama.cpp's converter would; `fields` are extra or changed metadata (None leaves one out)."""
    writer = gguf.GGUFWriter(path, "llama")
    data = {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": config.rope_theta,
        "llama.rope.dimension_count": config.head_dim,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": byte_tokens(),
        "tokenizer.ggml.token_type": [3] * 3 + [1] * 45,
        "tokenizer.ggml.merges": ["Ġ a", "1 2", "l o", "lo w"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ messages[0].content }}",
    }
    for key, value in (data | dict(fields)).items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    for name, tensor in hf_tensors(config, params).items():
        if name in drop:
            continue
        if ".q_proj." in name or ".k_proj." in name:
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            tensor = permute(tensor, heads)
        if tensor.ndim == 2 and kind != gguf.GGMLQuantizationType.F32:
            writer.add_tensor(gguf_name(name), gguf.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), np.ascontiguousarray(tensor))
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


# ---- tensors and config ----------------------------------------------------------------------------------------------


def test_unpermute():
    """Row 2i of a permuted head is row i, row 2i + 1 is row i + d/2."""
    rows = np.arange(12).reshape(12, 1) * np.ones(3)
    assert permute(rows, 2)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert np.array_equal(unpermute(permute(rows, 2), 2), rows)
    assert np.array_equal(unpermute(permute(rows[:, 0], 2), 2), rows[:, 0])


@pytest.mark.parametrize("config", [CONFIG, BIASED, replace(CONFIG, head_dim=12)])
def test_float32_file(config, tmp_path):
    params = random_params(config)
    fields = {"llama.attention.key_length": config.head_dim} if config.head_dim != 8 else {}
    path = write_gguf(tmp_path / "t.gguf", config, params, fields=fields)
    found_config, found, tokenizer = load_teacher(path)
    assert found_config == config
    assert_same(found, params)
    assert end_of_text_id(tokenizer) == 0


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0"])
def test_stored_types(kind, tmp_path):
    """Every stored type comes back as the values that it stands for."""
    kind = gguf.GGMLQuantizationType[kind]
    params = random_params(CONFIG)
    expected = hf_tensors(CONFIG, params)
    for name, tensor in expected.items():
        if tensor.ndim == 2:
            expected[name] = gguf.dequantize(gguf.quantize(tensor, kind), kind)
    _, found, _ = load_teacher(write_gguf(tmp_path / "t.gguf", CONFIG, params, kind=kind))
    for name, tensor in hf_tensors(CONFIG, found).items():
        assert np.array_equal(tensor, expected[name]), name
    _, found, _ = load_teacher(str(tmp_path / "t.gguf"), dtype="bfloat16")
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(found))


def llama3_factors(scaling, theta, head_dim):
    """The divisors that llama.cpp's converter writes for Llama 3.1, written out frequency by frequency."""
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * theta ** (i / head_dim)
        turns = scaling.original_max_position_embeddings / wavelength
        if turns < scaling.low_freq_factor:
            factors.append(scaling.factor)
        elif turns > scaling.high_freq_factor:
            factors.append(1.0)
        else:
            smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
            factors.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return np.array(factors)


def test_llama3_rope(tmp_path):
    """Llama 3's scaling is recovered from the divisors, and others are refused."""
    config = replace(CONFIG, head_dim=64, rope_theta=500000.0, rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192))
    factors = llama3_factors(config.rope_scaling, 500000.0, 64)
    assert len(set(factors)) > 4
    fields = {"llama.attention.key_length": 64}
    params = random_params(config)
    path = write_gguf(tmp_path / "t.gguf", config, params, fields=fields, factors=factors)
    assert load_config(path) == config
    path = write_gguf(tmp_path / "t.gguf", config, params, fields=fields, factors=factors**2)
    with pytest.raises(UserError, match=r"rope_freqs\.weight is not Llama 3's rope scaling"):
        load_config(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"llama.embedding_length": None}, "t.gguf has no hidden_size"),
        (
            {"llama.feed_forward_length": 60},
            r"model\.layers\.0\.mlp\.gate_proj\.weight has shape \(64, 32\), but .* \(60, 32\)",
        ),
        ({"llama.block_count": 3}, r"missing tensors: model\.layers\.2\."),
        (
            {"llama.attention.head_count": [4, 4]},
            r"llama\.attention\.head_count=\[4, 4\] should be one positive integer",
        ),
        ({"llama.attention.head_count": 0}, r"llama\.attention\.head_count=0 should be one positive integer"),
        ({"llama.rope.dimension_count": 4}, r"llama\.rope\.dimension_count=4 should be the head size 8"),
        ({"llama.rope.scaling.type": "yarn"}, "rope type 'yarn' is not supported"),
        ({"llama.expert_count": 8}, "mixtures of experts"),
        ({"tokenizer.ggml.pre": "qwen2"}, r"tokenizer\.ggml\.pre='qwen2' is not known here \(smollm, .*llama-bpe"),
        ({"tokenizer.ggml.pre": None}, r"tokenizer\.ggml\.pre=None is not known"),
        ({"tokenizer.ggml.model": "llama"}, r"tokenizer\.ggml\.model='llama' cannot be read from GGUF"),
        ({"tokenizer.ggml.merges": ["zz qq"]}, "the tokenizer in it cannot be built"),
        ({"tokenizer.ggml.token_type": [1]}, "tokenizer.ggml.token_type has 1 entries for 48 tokens"),
        (
            {
                "tokenizer.ggml.tokens": byte_tokens()[:30],
                "tokenizer.ggml.token_type": [1] * 30,
                "tokenizer.ggml.merges": ["a b"],
            },
            r"the tokenizer in it cannot be built \(.*`ab` out of vocabulary",
        ),
        (
            {"tokenizer.ggml.tokens": [*byte_tokens(), "zz"], "tokenizer.ggml.token_type": [1] * 49},
            "the tokenizer has 49 tokens but the model's vocab_size is 48",
        ),
    ],
)
def test_bad_metadata(fields, message, tmp_path):
    path = write_gguf(tmp_path / "t.gguf", CONFIG, random_params(CONFIG), fields=fields)
    with pytest.raises(UserError, match=message) as error:
        load_teacher(path)
    assert len(str(error.value).splitlines()) == 1


def test_bad_files(tmp_path):
    path = tmp_path / "t.gguf"
    with pytest.raises(UserError, match=r"t\.gguf: no such file"):
        load_teacher(str(path))
    write_gguf(path, CONFIG, random_params(CONFIG), drop=("model.norm.weight", "model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(
        UserError, match=r"missing tensors: model\.layers\.1\.mlp\.up_proj\.weight, model\.norm\.weight"
    ):
        load_teacher(str(path))
    write_gguf(path, CONFIG, random_params(CONFIG))
    whole = path.read_bytes()
    for keep in (0, 3, 20, 500, len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:keep])
        with pytest.raises(UserError, match=r"t\.gguf is truncated or not what its name says"):
            load_teacher(str(path))
    gguf_writer = gguf.GGUFWriter(path, "qwen2")
    gguf_writer.write_header_to_file()
    gguf_writer.write_kv_data_to_file()
    gguf_writer.close()
    with pytest.raises(UserError, match=r"general\.architecture='qwen2' is not supported"):
        load_teacher(str(path))


# ---- tokenizer -------------------------------------------------------------------------------------------------------


def test_pre_tokenizer_golden():
    """Text is cut as SmolLM2's own tokenizer cuts it (make_tokenizer_goldens.py)."""
    cut = pre_tokenizer("smollm")
    for case in GOLDEN:
        assert [piece for piece, _ in cut.pre_tokenize_str(case["text"])] == case["pieces"], case["text"]


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["x", "Ġ", "1", "2", "3", "4", "Ċ", "Ċ", "it", "'s", "ĠĠ", "Ġy"]),
        ("gpt-2", ["x", "Ġ1234", "Ċ", "Ċ", "it", "'s", "ĠĠ", "Ġy"]),
        ("default", ["x", "Ġ1234", "Ċ", "Ċ", "it", "'s", "ĠĠ", "Ġy"]),
        ("llama-bpe", ["x", "Ġ", "123", "4", "ĊĊ", "it", "'s", "ĠĠ", "Ġy"]),
    ],
)
def test_pre_tokenizers(pre, pieces):
    assert [p for p, _ in pre_tokenizer(pre).pre_tokenize_str("x 1234\n\nit's   y")] == pieces


def test_tokenizer_of_a_file(tmp_path):
    """Merges, specials, ids and the chat template come out of the metadata."""
    path = tmp_path / "t.gguf"
    params = random_params(CONFIG)
    tokenizer = load_tokenizer(write_gguf(path, CONFIG, params, fields={"tokenizer.ggml.unknown_token_id": 0}))
    assert tokenizer.tokenize("low a12") == ["low", "Ġa", "1", "2"]
    assert tokenizer.tokenize("a<|im_end|>b") == ["a", "<|im_end|>", "b"]
    assert tokenizer.decode(tokenizer("low a12").input_ids) == "low a12"
    assert tokenizer.decode([2, 3], skip_special_tokens=True) == "a"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<|im_start|>", "<|im_end|>", SPECIAL[0])
    assert tokenizer.pad_token is None
    assert tokenizer.chat_template == "{{ messages[0].content }}"
    fields = {"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": True}
    tokenizer = load_tokenizer(write_gguf(path, CONFIG, params, fields=fields))
    assert tokenizer.convert_ids_to_tokens(tokenizer("a12").input_ids) == ["<|im_start|>", "a", "12"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("a12", add_special_tokens=False).input_ids) == ["a", "12"]
