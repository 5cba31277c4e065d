"""Stage 3 in PyTorch, to set beside jaxlin's tokens/s: `python -m benchmarks.torch_baseline --config smollm2_1_7b`.

The same step on one GPU with random weights and random full sequences: a frozen teacher in bfloat16 (Hugging Face's
Llama, PyTorch's own attention); a student that is the same Llama with flash-linear-attention's layers for attention,
with the teacher's heads and that library's defaults; the KL of whole next-token distributions, a chunk of tokens at a
time; AdamW on float32 parameters under bfloat16 autocast. Needs torch, transformers and flash-linear-attention (written
for 0.6.0). Prints tokens/s of optimizer steps, the median after --warmup steps, and the peak of the GPU's memory.
"""

from __future__ import annotations

import importlib.metadata
import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from jaxlin.command_line import load_config_file, parse, preset, run_main
from jaxlin.config import ModelConfig, UserError
from jaxlin.kernels.bench_torch import compile_side_by_side

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Settings:
    """Tokens/s and memory of stage 3 in PyTorch."""

    config: str = "smollm2_1_7b"
    """Config file whose teacher_config gives the shapes."""
    mixer: Literal["deltanet", "gated_deltanet", "kda", "softmax"] = "gated_deltanet"
    """Student's attention: a layer of flash-linear-attention, or the teacher's own."""
    batch_size: int = 128
    """Sequences per optimizer step."""
    accumulation: int = 1
    """Micro-batches a step is split into."""
    seq_len: int = 512
    """Tokens in a sequence."""
    chunk_tokens: int = 4096
    """Tokens whose logits exist at one time."""
    recompute: bool = True
    """Recompute each of the student's blocks in the backward pass."""
    warmup: int = 5
    """Steps before those that are timed."""
    steps: int = 20
    """Steps that are timed."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Where; cpu only to try it out."""


def llama(shape: ModelConfig, dtype: torch.dtype) -> Any:
    """Hugging Face's Llama of this shape without a head (which is the embedding), randomly initialised."""
    import torch
    from transformers import LlamaConfig, LlamaModel

    for name in ("attention_bias", "mlp_bias", "qk_norm", "rope_scaling"):
        if getattr(shape, name):
            raise UserError(
                f"--config: its {name} is not in the baseline, a plain Llama; choose another, as smollm2_1_7b"
            )
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings",
    )  # fmt: skip
    config = LlamaConfig(
        **{name: getattr(shape, name) for name in names},
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        attn_implementation="sdpa",
        use_cache=False,
    )
    torch.manual_seed(0)
    return LlamaModel(config).to(dtype)


def replace_attention(model: Any, shape: ModelConfig, mixer: str) -> None:
    """Put flash-linear-attention's layer, with the teacher's heads, where each block has its attention."""
    import torch
    from fla import layers

    class Mixer(torch.nn.Module):
        """The interface of Hugging Face's attention."""

        def __init__(self, layer: torch.nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
            return self.layer(hidden_states)[0], None

    heads = dict(hidden_size=shape.hidden_size, num_heads=shape.num_attention_heads, expand_v=1.0)
    made = {
        "deltanet": lambda i: layers.DeltaNet(**heads, expand_k=1.0, layer_idx=i),
        "gated_deltanet": lambda i: layers.GatedDeltaNet(**heads, head_dim=shape.head_dim, layer_idx=i),
        "kda": lambda i: layers.KimiDeltaAttention(**heads, head_dim=shape.head_dim, layer_idx=i),
    }[mixer]
    for i, block in enumerate(model.layers):
        block.self_attn = Mixer(made(i))


def chunked_kl(
    student: torch.Tensor, teacher: torch.Tensor, head: torch.Tensor, teacher_head: torch.Tensor, chunk_tokens: int
) -> torch.Tensor:
    """KL(teacher || student) in nats, the mean over tokens, of final hidden states [N, D] and heads [V, D].

    Logits of `chunk_tokens` tokens exist at one time: the backward pass computes them again.
    """
    import torch
    from torch.nn.functional import kl_div, log_softmax
    from torch.utils.checkpoint import checkpoint

    def chunk(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        found = log_softmax((student @ head.to(student.dtype).T).float(), -1)
        wanted = log_softmax((teacher @ teacher_head.T).float(), -1)
        return kl_div(found, wanted, reduction="sum", log_target=True)

    total = torch.zeros((), device=student.device)
    for rows in zip(student.split(chunk_tokens), teacher.split(chunk_tokens), strict=True):
        total = total + checkpoint(chunk, *rows, use_reentrant=False)
    return total / student.shape[0]


def make_step(settings: Settings, shape: ModelConfig) -> Any:
    """The optimizer step: tokens [B, T] -> the loss."""
    import torch

    teacher = llama(shape, torch.bfloat16).to(settings.device).requires_grad_(False).eval()
    student = llama(shape, torch.float32)
    if settings.mixer != "softmax":
        replace_attention(student, shape, settings.mixer)
    student = student.to(settings.device).train()
    if settings.recompute:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    decayed = [p for p in student.parameters() if p.ndim > 1]
    rest = [p for p in student.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=2e-4, betas=(0.9, 0.95), fused=settings.device == "cuda")

    def step(tokens: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), device=tokens.device)
        for part in tokens.chunk(settings.accumulation):
            with torch.no_grad():
                target = teacher(input_ids=part).last_hidden_state.flatten(0, 1)
            with torch.autocast(settings.device, torch.bfloat16):
                hidden = student(input_ids=part).last_hidden_state.flatten(0, 1)
                heads = student.embed_tokens.weight, teacher.embed_tokens.weight
                loss = chunked_kl(hidden, target, *heads, settings.chunk_tokens) / settings.accumulation
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step


def measure(settings: Settings) -> dict[str, Any]:
    """Time steps on random tokens."""
    shape = load_config_file(settings.config, preset("recommended")).teacher_config
    if shape is None:
        raise UserError(f"--config {settings.config}: gives no teacher_config")
    if settings.accumulation < 1 or settings.batch_size % settings.accumulation:
        raise UserError(f"--batch-size {settings.batch_size}: must be a multiple of --accumulation")
    try:
        import torch
    except ImportError:
        raise UserError("needs torch, transformers and flash-linear-attention: pip install them") from None
    cuda = settings.device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here")
    if cuda:
        compile_side_by_side()
    step = make_step(settings, shape)
    size, taken, loss = (settings.batch_size, settings.seq_len), [], float("nan")
    for _ in range(settings.warmup + settings.steps):
        tokens = torch.randint(shape.vocab_size, size, device=settings.device)
        began = time.perf_counter()
        loss = float(step(tokens))  # waits for the device
        if cuda:
            torch.cuda.synchronize()  # the update too
        taken.append(time.perf_counter() - began)
    median = sorted(taken[settings.warmup :])[settings.steps // 2]
    versions = {name: _version(name) for name in ("torch", "transformers", "flash-linear-attention")}
    return {
        "config": settings.config,
        "mixer": settings.mixer,
        "batch_size": settings.batch_size,
        "recompute": settings.recompute,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "tokens_per_second": settings.batch_size * settings.seq_len / median,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "loss": loss,
        **versions,
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    """Print one line for people and one of JSON."""
    found = measure(parse(Settings))
    peak = f"{found['peak_gib']:.1f} GiB at the peak" if found["peak_gib"] else "memory not measured"
    print(f"{found['config']}, {found['mixer']}, {found['device']}: {found['tokens_per_second']:,.0f} tokens/s, {peak}")
    print(json.dumps(found))


if __name__ == "__main__":
    run_main(main)
