"""Exported students in PyTorch compute what they compute here: logits, padding, cache, and the text that they write."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlin.config import RopeScaling
from jaxlin.generate import generate
from jaxlin.model import forward
from tests.exported import folder_of
from tests.models import STUDENT_MIXERS, TEACHER, logits, random_params, student_of

torch = pytest.importorskip("torch", reason="torch is not installed")

TOLERANCE = 1e-4  # relative to the largest logit, float32
LENGTH = 150  # more than two chunks, and a part of one
BIASED = replace(
    TEACHER, attention_bias=True, attention_out_bias=True, mlp_bias=True, tie_word_embeddings=False, rope_theta=500.0,
    head_dim=24, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32),
)  # fmt: skip
PRESETS = [(mixer, preset, {}) for mixer in STUDENT_MIXERS for preset in ("recommended", "paper_code")]
OPTIONS = [
    ("kda", "paper", {}),
    ("gated_deltanet+softmax", "recommended", {}),
    ("deltanet", "recommended", {"allow_neg_eigval": True, "qk_rmsnorm": True}),
    ("linear_attention", "recommended", {"feature_map": "elu", "conv_size": 0, "rope": "none"}),
]
MORE_OPTIONS = [
    ("gla+softmax+mlstm+kda", "paper_code", {"conv_size": 2}),
    ("linear_attention", "recommended", {"feature_map": "relu", "normalize": False, "out_gate": "none"}),
    ("linear_attention", "recommended", {"feature_map": "identity", "feature_dim": 5, "out_norm": "rms"}),
    ("linear_attention", "recommended", {"feature_dim": 5, "normalize": False}),
    ("retnet", "recommended", {"rope": "own", "out_norm": "none", "gate_rank": -1}),
    ("retnet", "paper_code", {"heads": "teacher", "expand_kv": False, "gate_activation": "sigmoid"}),
    ("gla", "recommended", {"decay_rank": 0, "expand_kv": True, "gqa_bug_compat": False}),
    ("mlstm", "paper_code", {"gate_soft_cap": 0.0, "conv_size": 4, "conv_activation": "silu", "rope": "teacher"}),
    ("gated_deltanet", "recommended", {"allow_neg_eigval": True, "qk_rmsnorm": True, "conv_size": 1}),
    ("kda", "paper_code", {"decay_rank": 0, "heads": "teacher", "expand_kv": False}),
]


def slow(cases):
    """Cases that take too long together."""
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]


FEW = [("gated_deltanet", "recommended"), ("mlstm", "paper_code"), ("gla+softmax", "recommended")]
EVERY = pytest.mark.parametrize("mixer", [*STUDENT_MIXERS, "gated_deltanet+softmax"])


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small products are not worth more; what transformers says of remote code is no test's business."""
    from transformers.utils import logging

    before = torch.get_num_threads(), logging.get_verbosity()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    torch.set_num_threads(before[0])
    logging.set_verbosity(before[1])
    logging.enable_progress_bar()


@pytest.fixture
def load(tmp_path, monkeypatch):
    """A function from a student's config to its model in PyTorch, which must find every tensor and no other."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))

    def load(config, dtype="float32"):
        from transformers import AutoModelForCausalLM

        folder = folder_of(config, tmp_path / "student", dtype=dtype)
        model, report = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
        assert not any(report.values())
        assert model.dtype == getattr(torch, dtype)
        return model.eval()

    return load


def tokens_of(rows, length, seed=0):
    return np.random.RandomState(seed).randint(3, TEACHER.vocab_size, (rows, length)).astype(np.int32)


def read(model, tokens, **kwargs):
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long(), **kwargs)


def assert_close(found, expected, tolerance=TOLERANCE):
    found = found.float().numpy() if torch.is_tensor(found) else found
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def left_padded(lengths, seed=0):
    """Tokens, and 1 where there are some: rows that end together."""
    tokens, mask = tokens_of(len(lengths), max(lengths), seed), np.zeros((len(lengths), max(lengths)), np.int32)
    for row, length in enumerate(lengths):
        mask[row, -length:] = 1
    return tokens * mask, mask


@pytest.mark.parametrize(("mixer", "preset", "options"), [*PRESETS, *OPTIONS, *slow(MORE_OPTIONS)])
def test_logits(mixer, preset, options, load):
    """Also of left-padded rows; a row without padding is the same alone."""
    layers = 4 if mixer.count("+") == 3 else 2
    config = student_of(mixer, preset, replace(TEACHER, num_hidden_layers=layers), **options)
    tokens, mask = left_padded([5, LENGTH, 1, 67])
    model = load(config)
    expected = np.asarray(logits(config, random_params(config), tokens, jnp.asarray(mask)))
    found = read(model, tokens, attention_mask=torch.from_numpy(mask)).logits.numpy()
    assert_close(found[mask == 1], expected[mask == 1])
    assert_close(read(model, tokens[1:2]).logits, expected[1:2])


@pytest.mark.parametrize(
    ("mixer", "teacher", "options"),
    [
        ("gated_deltanet+softmax", BIASED, {}),
        ("retnet", BIASED, {}),
        ("gla+softmax", replace(TEACHER, attention_bias=True), {}),
        ("linear_attention+softmax", replace(TEACHER, qk_norm=True, head_dim=24), {"conv_size": 0}),
        ("deltanet", replace(TEACHER, qk_norm=True), {"qk_rmsnorm": True, "conv_activation": "silu"}),
    ],
)
def test_logits_of_other_teachers(mixer, teacher, options, load):
    """Biases, an untied head, heads of another size than width / heads, Llama 3's rotary scaling; Qwen2 and Qwen3."""
    config = student_of(mixer, "recommended", teacher, **options)
    tokens = tokens_of(2, 70)
    assert_close(read(load(config), tokens).logits, np.asarray(logits(config, random_params(config), tokens)))


@pytest.mark.parametrize("mixer", ["gated_deltanet", "mlstm", "linear_attention"])
def test_bfloat16(mixer, load):
    """Rounded at the same places: as far from each other as two orders of the same sums are."""
    config = student_of(mixer, "recommended")
    # Other tokens may begin with q . k near 0: what its norm leaves of the first output, (q . k) v, is a rounded sign.
    tokens = tokens_of(2, LENGTH, seed=1)
    rounded = jax.tree.map(lambda a: a.astype(jnp.bfloat16), random_params(config))
    expected = np.asarray(logits(replace(config, dtype="bfloat16"), rounded, tokens))
    assert_close(read(load(config, "bfloat16"), tokens).logits, expected, 3e-2)


@EVERY
def test_padding_anywhere(mixer, load):
    """A row's tokens give what they give without the padding between them."""
    model = load(student_of(mixer))
    tokens, mask = tokens_of(3, 90), np.random.RandomState(1).randint(0, 2, (3, 90))
    found = read(model, tokens, attention_mask=torch.from_numpy(mask)).logits.numpy()
    for row, chosen in enumerate(mask == 1):
        assert_close(found[row, chosen], read(model, tokens[row : row + 1, chosen]).logits[0].numpy())


@pytest.mark.parametrize(
    ("mixer", "preset"),
    [*FEW, *((m, "recommended") for m in STUDENT_MIXERS if m != "gated_deltanet")],
)
def test_cache(mixer, preset, load):
    """Pieces of any length, the first one padded, give what one pass gives; a state does not grow."""
    config = student_of(mixer, preset)
    model = load(config)
    tokens, mask = left_padded([40, 90, 71])
    whole = read(model, tokens, attention_mask=torch.from_numpy(mask)).logits.numpy()
    cache, pieces, sizes, start = None, [], [], 0
    for end in (60, 61, 62, 90):
        out = read(
            model, tokens[:, start:end], attention_mask=torch.from_numpy(mask[:, :end]), cache=cache, use_cache=True
        )
        cache, start = out.cache, end
        assert cache.get_seq_length() == end
        pieces.append(out.logits.numpy())
        sizes.append(sum(t.numel() for state in cache.layers for t in _tensors(state)))
    assert_close(np.concatenate(pieces, 1)[mask == 1], whole[mask == 1])
    assert np.array_equal(cache.positions.numpy(), [40, 90, 71])
    if "softmax" not in mixer:
        assert len(set(sizes)) == 1


def _tensors(state):
    if torch.is_tensor(state):
        return [state]
    values = state.values() if isinstance(state, dict) else state
    return [t for value in values for t in _tensors(value)]


@pytest.mark.parametrize(("mixer", "preset"), [*FEW, *slow((m, p) for m, p, _ in PRESETS if (m, p) not in FEW)])
def test_generate(mixer, preset, load):
    """Greedy text from left-padded prompts is ours, 64 tokens long, for nine prompts of ten at least."""
    config = student_of(mixer, preset)
    model = load(config)
    model.generation_config.eos_token_id = None
    lengths = [3, 17, 40, 9, 25, 66, 1, 12, 31, 8]
    tokens, mask = left_padded(lengths)
    prompts = [row[-n:].tolist() for row, n in zip(tokens, lengths, strict=True)]
    expected = generate(config, random_params(config), prompts, max_new_tokens=64)
    write = partial(model.generate, torch.from_numpy(tokens).long(), attention_mask=torch.from_numpy(mask))
    found = write(max_new_tokens=64, do_sample=False, pad_token_id=0)[:, tokens.shape[1] :].tolist()
    assert sum(a == b for a, b in zip(found, expected, strict=True)) >= 9


@pytest.mark.parametrize("mixer", ["mlstm", "gated_deltanet+softmax"])
def test_beams(mixer, load):
    """Beam search moves states between rows as it would recompute them."""
    model = load(student_of(mixer))
    tokens, mask = left_padded([20, 33])
    write = partial(model.generate, torch.from_numpy(tokens).long(), attention_mask=torch.from_numpy(mask), num_beams=3)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "length_penalty": 0.0}
    assert torch.equal(write(**options), write(**options, use_cache=False))


def test_conversation(load):
    """A cache that the caller keeps: generate reads what is new in a longer text."""
    model = load(student_of("gated_deltanet"))
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    first = model.generate(torch.from_numpy(tokens_of(1, 20)).long(), **options)
    cache = first.cache
    text = torch.cat([first.sequences, torch.from_numpy(tokens_of(1, 9, seed=5)).long()], 1)
    read_before = cache.get_seq_length()
    again = model.generate(text, **options, cache=cache).sequences
    assert torch.equal(again, model.generate(text, **options).sequences)
    assert (read_before, cache.get_seq_length()) == (27, 44)


@EVERY
def test_training(mixer, load):
    """Labels give the mean cross-entropy, with finite gradients everywhere, padding or not."""
    model = load(student_of(mixer)).train()
    tokens, mask = left_padded([30, 70])
    ids = torch.from_numpy(tokens).long()
    labels = torch.where(torch.from_numpy(mask) == 1, ids, -100)
    out = model(ids, attention_mask=torch.from_numpy(mask), labels=labels)
    out.loss.backward()
    assert out.cache is None
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    log_probs = out.logits.detach().log_softmax(-1)[:, :-1]
    chosen = log_probs.gather(-1, ids[:, 1:, None])[..., 0]
    assert out.loss.item() == pytest.approx(-chosen[labels[:, 1:] != -100].mean().item(), rel=1e-5)


def test_hidden_states(load):
    config = student_of("gla")
    model, tokens = load(config), tokens_of(2, 20)
    found = read(model, tokens, output_hidden_states=True).hidden_states
    out = forward(config, random_params(config), tokens, collect=("hidden_states",))
    assert_close(torch.stack(found[:-1]), np.asarray(out.collected["hidden_states"])[:-1])
    assert_close(found[-1], np.asarray(out.hidden))


def test_refuses(load):
    model = load(student_of("gla"))
    with pytest.raises(ValueError, match=r"attention_mask should be \[batch, tokens\], not \(1, 1, 4, 4\)"):
        read(model, tokens_of(1, 4), attention_mask=torch.ones(1, 1, 4, 4))
    kind = type(model.config)
    with pytest.raises(ValueError, match="mixer 'mamba' is unknown: expected one of softmax, linear_attention"):
        kind(mixer=["mamba"], options=[{}])
    with pytest.raises(ValueError, match="options should be one for each of the 2 mixers, not 1"):
        kind(mixer=["gla", "softmax"], options=[{}])
    with pytest.raises(ValueError, match="num_hidden_layers=3 is not a multiple of the 2 mixers"):
        kind(mixer=["gla", "softmax"], options=[{}, {}], num_hidden_layers=3)
