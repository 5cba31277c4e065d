"""The PyTorch baseline's loss and step, where torch is; its layers need a GPU."""

from __future__ import annotations

import warnings

import pytest

from benchmarks import torch_baseline as baseline
from jaxlin.command_line import parse
from jaxlin.config import UserError

torch = pytest.importorskip("torch")


def test_the_loss_in_chunks_is_the_loss():
    """Value and gradients, for chunks that divide the tokens and that do not."""
    torch.manual_seed(0)
    hidden, target, head, other = (torch.randn(n, 16, dtype=torch.float64) for n in (10, 10, 32, 32))
    wanted = torch.log_softmax(target @ other.T, -1)
    leaves = hidden.requires_grad_(), head.requires_grad_()
    whole = (wanted.exp() * (wanted - torch.log_softmax(hidden @ head.T, -1))).sum() / 10
    expected = torch.autograd.grad(whole, leaves)
    for chunk in (5, 4, 16):
        loss = baseline.chunked_kl(hidden, target, head, other, chunk)
        torch.testing.assert_close(loss.double(), whole, rtol=1e-5, atol=1e-6)
        for found, gradient in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
            torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-5)


def test_a_step_on_a_cpu():
    flags = "--config tiny --mixer softmax --device cpu --batch-size 4 --accumulation 2 --seq-len 16 --chunk-tokens 8"
    settings = parse(baseline.Settings, [*flags.split(), "--warmup", "1", "--steps", "2"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other libraries' own
        found = baseline.measure(settings)
    assert found["tokens_per_second"] > 0
    assert 0 < found["loss"] < 1  # equal weights, trained away from them for two steps


def test_mistakes():
    with pytest.raises(UserError, match="--device cuda: torch finds no GPU here"):
        baseline.measure(baseline.Settings(config="tiny"))
    with pytest.raises(UserError, match="--batch-size 128: must be a multiple of --accumulation"):
        baseline.measure(baseline.Settings(config="tiny", accumulation=3))
