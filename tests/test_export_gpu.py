"""On a GPU, flash-linear-attention's classes and the exported model in PyTorch compute what we do, in bfloat16."""

from __future__ import annotations

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory of the same GPU

import jax
import numpy as np
import pytest

from jaxlin.config import ModelConfig
from jaxlin.export import export
from jaxlin.model import init_params
from jaxlin.student import init_student
from tests.exported import student
from tests.models import STUDENT_MIXERS, logits, student_of

pytestmark = pytest.mark.gpu
torch = pytest.importorskip("torch", reason="torch is not installed")

TOLERANCE = 2e-2  # of the logits' norm
# What FLA has: the preset, options beside it, and so many heads that each is of 64 after merging.
FLA = {
    "gated_deltanet": ("paper_code", {}, 4),
    "deltanet": ("paper_code", {}, 16),
    "gla": ("paper_code", {}, 4),
    "retnet": ("paper_code", {"conv_size": 0}, 8),
    "kda": ("paper", {}, 4),
}


@pytest.fixture(scope="module")
def few_configurations():
    """Triton chooses between two configurations of a kernel of FLA's, not thirty: results are asked for, not times."""
    autotuner = pytest.importorskip("triton.runtime.autotuner", reason="triton is not installed")
    before = autotuner.Autotuner.__init__

    def init(self, fn, arg_names, configs, *args, **kwargs):
        before(self, fn, arg_names, configs, *args, **kwargs)
        self.configs = self.configs[:2]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autotuner.Autotuner, "__init__", init)
        yield


@pytest.fixture(autouse=True)
def needs_cuda():
    """Skips where torch finds no GPU."""
    if not torch.cuda.is_available():
        pytest.skip("torch finds no GPU")


def made_from_a_teacher(mixer, preset, options, heads):
    """A student of a random teacher with heads of 64, its parameters in bfloat16 and none at its initial value."""
    teacher = ModelConfig(
        vocab_size=512, hidden_size=64 * heads, intermediate_size=128 * heads, num_hidden_layers=2,
        num_attention_heads=heads, num_key_value_heads=heads // 2, head_dim=64, dtype="bfloat16",
    )  # fmt: skip
    config = student_of(mixer, preset, teacher, **options)
    params = init_student(init_params(teacher, jax.random.key(0)), config, jax.random.key(1))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [a + 0.02 * jax.random.normal(key, a.shape) for a, key in zip(leaves, keys, strict=True)]
    params = jax.tree.unflatten(tree, [a.astype("bfloat16") for a in moved])
    if mixer == "mlstm" and preset == "paper_code":
        # With a bias of 0 it forgets half at each token, and what it reads is all but one (q . k) v: where q . k is
        # near 0, a sign is left of it behind the norm, and that is rounding. This forget gate keeps many tokens.
        params["layers"]["block_0"]["mixer"]["fgate_proj"]["bias"] += 4
    return config, params


def compare(config, params, folder, format):
    """The logits of the exported folder's class against ours, 2 x 128 tokens."""
    from transformers import AutoModelForCausalLM

    export(student(config, params), folder, format=format)
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=format == "jaxlin", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(report.values())
    # With other tokens GLA's first output, (q . k) v, has a q . k near 0: its norm is a sign, and that is rounding.
    tokens = np.random.RandomState(1).randint(0, config.vocab_size, (2, 128))
    with torch.no_grad():
        found = model.eval().cuda()(torch.from_numpy(tokens).cuda(), use_cache=False).logits.float().cpu().numpy()
    expected = np.asarray(logits(config, params, tokens.astype(np.int32)))
    assert np.linalg.norm(found - expected) <= TOLERANCE * np.linalg.norm(expected)


@pytest.mark.usefixtures("few_configurations")
@pytest.mark.parametrize("mixer", FLA)
def test_fla_computes_the_same(mixer, tmp_path):
    pytest.importorskip("fla.models", reason="flash-linear-attention is not installed")
    compare(*made_from_a_teacher(mixer, *FLA[mixer]), tmp_path / "out", "fla")


@pytest.mark.parametrize("preset", ["recommended", "paper_code"])
@pytest.mark.parametrize("mixer", STUDENT_MIXERS)
def test_our_class_computes_the_same(mixer, preset, tmp_path):
    compare(*made_from_a_teacher(mixer, preset, {}, FLA.get(mixer, (0, 0, 4))[2]), tmp_path / "out", "jaxlin")
