"""Every setting of jaxlin, with its unit and its default, declared once.

This module is a leaf: it imports no more of jaxlin than another one, so anything may import it. `command_line.py` reads
settings.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jaxlin.pattern import mixers_of, pattern_of

PRESETS = ("recommended", "paper", "paper_code")
Switch = Annotated[tyro.conf.UseCounterAction[int], tyro.conf.arg(help_behavior_hint="(default: off)")]
"""A flag without a value. tyro counts how often it is there; that twice is once need not stand in its help."""
INF = float("inf")
SHARE, COUNT, SOME = (0, 1), (1, INF), (0, INF)
STAGE_LIMITS = dict(
    batch_size=COUNT, accumulation=COUNT, tokens=SOME, lr=SOME, lr_new=SOME, warmup=SHARE, stable=SHARE, decay=SHARE,
    weight_decay=SOME, clip=SOME, kl_weight=SOME, ce_weight=SOME, temperature=(0.01, INF), chunk_tokens=COUNT,
)  # fmt: skip
DATA_LIMITS = dict(seq_len=(2, INF), heldout_fraction=SHARE, eval_tokens=COUNT, workers=SOME)
RUN_LIMITS = dict(log_every=COUNT, save_every=COUNT, keep=COUNT, milestone_tokens=SOME, seed=(0, 2**32 - 1))
"""From where to where numbers may be."""


class UserError(Exception):
    """A mistake the user can mend: shown as one line, exit code 2."""


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency scaling of rotary embeddings (HF `rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class MixerOptions:
    """How a student's token mixer is built.

    None leaves a choice to the preset, which may differ by mixer: see `PRESETS` in the mixer's file, where options that
    a mixer does not have are None in every preset.
    """

    heads: Literal["teacher", "fla"] | None = None
    """Head layout: the teacher's heads, or the head counts flash-linear-attention defaults to (merged heads)."""
    expand_kv: bool | None = None
    """Repeat the teacher's key/value heads into the weights (True), or keep them and repeat activations (False)."""
    gqa_bug_compat: bool | None = None
    """With expand_kv: unroll with the authors' hard-coded head size of 32. Only to measure what that did."""
    rope: Literal["teacher", "own", "none"] | None = None
    """Rotary embedding of q and k: with the teacher's frequencies, with base 10,000, or none."""
    conv_size: int | None = None
    """Taps of the causal short convolution on q, k and v; 0 leaves it out."""
    conv_init: Literal["identity", "random"] | None = None
    """Short convolution at initialisation: passes its input through, or random."""
    conv_activation: Literal["none", "silu"] | None = None
    """Nonlinearity after the short convolution."""
    feature_map: Literal["hedgehog", "hadamard", "elu", "relu", "identity"] | None = None
    """Feature map of linear attention's q and k."""
    feature_dim: int | None = None
    """Features of the hedgehog map before [+, -] doubles them; 0 means half the head size."""
    normalize: bool | None = None
    """Divide linear attention's output by the running sum of its weights."""
    qk_rmsnorm: bool | None = None
    """RMS-normalise q and k per head (with a learned weight) before the delta rule's L2 norm, behind any qk_norm."""
    out_norm: Literal["none", "rms", "calibrated", "layernorm"] | None = None
    """Norm per head before o_proj; "calibrated" sets an RMS norm's weight to the teacher's scale."""
    out_gate: Literal["none", "neutral", "random", "added"] | None = None
    """Output gate: none, 1 at the start, random, or added before the norm (the authors' KDA)."""
    gate_activation: Literal["silu", "sigmoid"] | None = None
    """Activation of the output gate."""
    gate_rank: int | None = None
    """Rank of the output gate's projection; 0 is full rank."""
    decay_rank: int | None = None
    """Rank of the decay projection of GLA and KDA; 0 is full rank."""
    decay_range: tuple[float, float] | None = None
    """Initial range: A of Gated DeltaNet and KDA and the gate bias of GLA are drawn from it uniformly; the forget
    biases of mLSTM's heads divide it evenly."""
    input_bias: float | None = None
    """Initial bias of mLSTM's input gate."""
    gate_soft_cap: float | None = None
    """mLSTM: gate pre-activations x become c tanh(x / c); 0 leaves them alone."""
    allow_neg_eigval: bool | None = None
    """Delta rules: beta in (0, 2) instead of (0, 1)."""


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of the Llama family (Llama, Mistral, Qwen2, Qwen3); teacher and student differ in `mixer` only.

    Field names are Hugging Face's.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    """Biases of q_proj, k_proj and v_proj."""
    attention_out_bias: bool = False
    """A bias of o_proj: Llama has it with the others, Qwen2 without."""
    qk_norm: bool = False
    """RMS norm of each query and key head before the rotary embedding, with one weight for all heads (Qwen3)."""
    mlp_bias: bool = False
    mixer: tuple[str, ...] = ("softmax",)
    """Mixer ids of one period; the layers repeat it."""
    options: tuple[MixerOptions, ...] = (MixerOptions(),)
    """Resolved options, one for each entry of `mixer`."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Compute dtype of matrix products; norms, gates, softmax and losses are float32 regardless."""

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_key_value_heads={self.num_key_value_heads} does not divide "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.num_hidden_layers % len(self.mixer):
            raise UserError(
                f"--mixer {pattern_of(self.mixer)} has a period of {len(self.mixer)}, which does not divide "
                f"the {self.num_hidden_layers} layers; give one that does, or all layers"
            )

    def described(self) -> dict[str, Any]:
        """The fields as hashes of older versions have them: those that these lacked only where they are set."""
        newer = ("attention_out_bias", "qk_norm")
        return {key: value for key, value in asdict(self).items() if value or key not in newer}

    @property
    def period(self) -> int:
        """Layers in one period of the mixer pattern."""
        return len(self.mixer)


@dataclass(frozen=True)
class StageConfig:
    """What the three stages share: budget, batch, optimizer, schedule, clipping."""

    tokens: int = 80_000_000
    """Token positions to train on (padding included); 0 skips the stage."""
    batch_size: int = 32
    """Sequences per optimizer step, over all devices."""
    accumulation: int = 1
    """Micro-batches a step is split into."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW; or Muon for the projections of mixers and MLPs, with AdamW for the rest, at the same learning rates."""
    lr: float = 1e-3
    """Peak learning rate of parameters copied from the teacher."""
    lr_new: float = 1e-3
    """Peak learning rate of parameters the teacher does not have (gates, convolutions, feature maps, norms)."""
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    """Shape of the schedule after warm-up; wsd is flat, then falls linearly."""
    warmup: float = 0.02
    """Warm-up, as a fraction of the stage's steps."""
    stable: float = 0.0
    """Flat part of wsd, as a fraction of the stage's steps; 0 is what warm-up and decay leave."""
    decay: float = 0.1
    """Final decay of wsd, as a fraction of the stage's steps; cut short where the shares exceed 1."""
    lr_min: float = 0.01
    """Learning rate at the end, as a fraction of the peak."""
    weight_decay: float = 0.1
    """AdamW's decoupled decay."""
    decayed: Literal["matrices", "all_but_norms", "all"] = "matrices"
    """What decays: projections, embeddings and feature maps; all but norms and biases; or every parameter."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's moment decays; Muon's momentum is the first."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    clip: float = 1.0
    """Largest gradient norm; 0 does not clip."""
    clip_per_layer: bool = True
    """One norm per layer (stages 1 and 2); otherwise one over all parameters."""
    on_bad_step: Literal["stop", "skip"] = "stop"
    """Loss or gradient not finite: stop the run; or take no such step (optimizer and schedule wait), and report it."""
    spike_factor: float = 0.0
    """With skip: also where the gradient norm is more than this times the median of the last 64 steps; 0 is never."""
    layers: tuple[int, ...] = ()
    """Aligned layers, from 0 (the sets L1 and L2 of equations 2 and 4); empty means all. Stage 3 ignores it."""
    layer_reduction: Literal["sum", "mean"] = "sum"
    """How the losses of the aligned layers become one number."""

    def check(self, flag: str) -> None:
        """Refuse values out of range; `flag` names the stage on the command line."""
        _require_within(STAGE_LIMITS, self, f"{flag}.")


@dataclass(frozen=True)
class Stage1Config(StageConfig):
    """Attention-output alignment (paper, equations 1 and 2)."""

    lr: float = 2e-3
    """Peak learning rate of parameters copied from the teacher."""
    lr_new: float = 2e-3
    """Peak learning rate of parameters the teacher does not have (gates, convolutions, feature maps, norms)."""
    width_reduction: Literal["mean", "sum"] = "mean"
    """Squared errors over the model width: averaged (the authors' code) or summed (equation 1)."""


@dataclass(frozen=True)
class Stage2Config(StageConfig):
    """Hidden-state alignment (paper, equations 3 and 4)."""

    tokens: int = 160_000_000
    """Token positions to train on (padding included); 0 skips the stage."""
    squared: bool = False
    """Square the L2 norm of equation 3."""
    scale: Literal["none", "rsqrt_width"] = "none"
    """Multiply the norm by width ** -0.5."""
    train_mlp: bool = True
    """Train the MLP of each block as well."""
    post_norm_target: bool = False
    """Compare the last layer after the teacher's final norm, as the authors' code does by accident."""


@dataclass(frozen=True)
class Stage3Config(StageConfig):
    """End-to-end distillation (paper, equations 5 and 6)."""

    tokens: int = 2_760_000_000
    """Token positions to train on (padding included); 0 skips the stage."""
    batch_size: int = 128
    """Sequences per optimizer step, over all devices."""
    lr: float = 3e-4
    """Peak learning rate of parameters copied from the teacher."""
    lr_new: float = 3e-4
    """Peak learning rate of parameters the teacher does not have."""
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "wsd"
    """Shape of the schedule after warm-up; wsd is flat, then falls linearly."""
    warmup: float = 0.05
    """Warm-up, as a fraction of the stage's steps."""
    clip_per_layer: bool = False
    """One norm per layer; otherwise one over all parameters."""
    kl_weight: float = 1.0
    """lambda of equation 5."""
    ce_weight: float = 0.0
    """Weight of the next-token cross-entropy."""
    kl_reduction: Literal["token_mean", "sequence_sum"] = "token_mean"
    """Mean over tokens (equation 6), or summed over a sequence and averaged over sequences (the authors' code)."""
    temperature: float = 1.0
    """Softmax temperature of both models in the KL term."""
    chunk_tokens: int = 512
    """Tokens whose logits exist at one time, on each device."""
    loss_on: Literal["all", "assistant"] = "all"
    """Tokens of conversations to predict, in KL and cross-entropy: all, or what assistants wrote."""
    unroll: bool = False
    """Compile each layer for itself instead of one for all, so that what the backward pass needs is not copied into
    arrays of all layers. Faster on GPUs, by 7 % at 1.7B, after minutes of compilation."""


@dataclass(frozen=True)
class DataConfig:
    """Text to packed batches."""

    seq_len: int = 512
    """Tokens in a sequence."""
    text_field: str = "text"
    """Field of a record that holds its text."""
    separate_documents: bool = True
    """Put the end-of-text token between documents and reset state, convolution and positions there."""
    shuffle: bool = True
    """Shuffle documents, anew each epoch."""
    heldout: tuple[str, ...] = ()
    """Held-out text for evaluation, as --text; empty keeps back heldout_fraction of --text."""
    heldout_fraction: float = 0.02
    """Documents kept back for evaluation when no held-out text is given."""
    eval_tokens: int = 16_384
    """Held-out tokens that an evaluation reads."""
    workers: int = 0
    """Processes that tokenize ahead of the training loop; 0 uses a thread."""


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; their product is the number of devices."""

    data: int = -1
    """Copies of the parameters, each with its share of the batch; -1 takes the devices left over."""
    fsdp: int = 1
    """Shards of parameters and optimizer state, each with its share of the batch."""
    tensor: int = 1
    """Shards of heads, MLP width and vocabulary."""
    sequence: int = 1
    """Pieces of each sequence, one a device: states, not tokens, pass between them (softmax: keys and values)."""


@dataclass(frozen=True)
class DistributedConfig:
    """How several processes find each other; Cloud TPU pods and SLURM need none of it."""

    coordinator: str = ""
    """HOST:PORT of process 0, the port a free one; or JAX_COORDINATOR_ADDRESS."""
    processes: int | None = None
    """Number of processes; or JAX_NUM_PROCESSES."""
    process: int | None = None
    """Number of this process, from 0; or JAX_PROCESS_ID."""


@dataclass(frozen=True)
class RunConfig:
    """One linearization run."""

    mixer: str = "gated_deltanet"
    """Token mixer of the student; names joined by + repeat over the layers (gated_deltanet+softmax, or
    3xgated_deltanet+softmax for three to one). Commas separate students that are trained at once, on the teacher's
    forward passes that they share (gla,mlstm)."""
    preset: Literal["recommended", "paper", "paper_code"] = "recommended"
    """Recipe: recommended, paper (equations 1 to 6 as printed) or paper_code (what the authors' code does)."""
    config: str = "demo"
    """Config file: a name in configs/ or a path; applied over the preset, under the command line."""
    teacher: str = "demo"
    """Teacher: "demo", a Hugging Face name or folder, a .gguf file, or "random" (teacher_config's shape)."""
    text: tuple[str, ...] = ()
    """Training text: files, folders, hf:NAME[:SUBSET], tfds:NAME; empty uses Python's own documentation."""
    conversations: tuple[str, ...] = ()
    """What stage 3 trains on instead of text: .jsonl (.zst, .gz), .parquet, folders of those, hf:NAME[:SUBSET], with a
    list `messages` of {role, content} in each record, rendered with the teacher's chat template."""
    init_from: str = ""
    """Run folder whose student the run starts from; mixer, preset, model, teacher and dtypes default to that run's."""
    stage: tuple[int, ...] = (1, 2, 3)
    """Stages to run, in order."""
    tokens: int | None = None
    """Total token positions, split between the stages in the config's proportions; each takes one step at least."""
    epochs: float | None = None
    """Passes over the conversations: stage 3's budget in place of stage3.tokens; tokens, where given, wins."""
    run_dir: str = ""
    """Run folder; empty means runs/CONFIG-PRESET-MIXER. Of several students the folder that theirs are in, by mixer."""
    model: MixerOptions = field(default_factory=MixerOptions)
    """The student's mixer."""
    stage1: Stage1Config = field(default_factory=Stage1Config)
    """Stage 1, attention outputs."""
    stage2: Stage2Config = field(default_factory=Stage2Config)
    """Stage 2, hidden states."""
    stage3: Stage3Config = field(default_factory=Stage3Config)
    """Stage 3, logits."""
    data: DataConfig = field(default_factory=DataConfig)
    """Text to packed batches."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """The device mesh."""
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    """Several processes."""
    seed: int = 0
    """Seed of initialisation and of the order of the text."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of matrix products; norms, gates, states, losses and Adam moments stay float32."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the student's trained parameters and Adam moments."""
    remat: Literal["none", "block", "states", "dots"] = "block"
    """Stage 3: what the backward pass finds kept of each block and need not compute again: everything (none); its input
    alone (block); besides, states between chunks and outputs of the recurrence, so that it does not run again, but for
    linear attention and mLSTM, which divide by a sum (states); or besides, what projections and MLP put out (dots)."""
    log_every: int = 10
    """Steps between lines of metrics."""
    save_every: int = 500
    """Steps between checkpoints; a stage's end is always saved."""
    keep: int = 2
    """Rotating checkpoints kept."""
    milestone_tokens: int = 0
    """Tokens between checkpoints that are never deleted; 0 keeps none."""
    wandb: str = ""
    """Weights & Biases project, or ENTITY/PROJECT, that metrics go to too; needs `pip install wandb`, and an account or
    WANDB_MODE=offline."""
    profile: str = ""
    """START:COUNT: write a profiler trace of COUNT steps of each stage, from its step START, into the run folder."""
    plan: str = ""
    """Train nothing: compile each stage for TPUs (v5e:4x4), GPUs (h100:8) or the GPUs of this host (gpu), print memory,
    traffic and time; exit code 1 if it does not fit."""
    teacher_config: Annotated[ModelConfig | None, tyro.conf.Suppress] = None
    """Architecture the teacher must have; gives plans and random teachers their shape."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.run_dir or f"runs/{Path(self.config).stem}-{self.preset}-{self.mixer}")

    @property
    def period(self) -> tuple[str, ...]:
        """Mixer ids of one period of layers."""
        return mixers_of(self.mixer)

    def kind(self, stage: int) -> Literal["text", "conversations"]:
        """What stage number `stage` trains on, and is measured on."""
        return "conversations" if stage == 3 and self.conversations else "text"

    def students(self) -> tuple[RunConfig, ...]:
        """The run of each student: this one, or one for each mixer between commas, as if it were trained alone."""
        names = [name.strip() for name in self.mixer.split(",")]
        if len(names) == 1:
            return (self,)
        if self.init_from:
            raise UserError(f"--init-from {self.init_from}: holds one student; give --mixer one name, not {self.mixer}")
        if "" in names:
            raise UserError(f"--mixer {self.mixer}: a name is missing beside a comma")
        if twice := [name for i, name in enumerate(names) if name in names[:i]]:
            raise UserError(f"--mixer {self.mixer}: {twice[0]} is there twice; name every student once")
        home = Path(self.run_dir)
        return tuple(replace(self, mixer=name, run_dir=str(home / name) if self.run_dir else "") for name in names)

    def stages(self, epoch_tokens: int | None = None) -> dict[int, StageConfig]:
        """The stages to run, with `tokens` shared out between them. Raises UserError for values out of range.

        `epoch_tokens`, where they are known, are the token positions of one pass over the conversations.
        """
        every = {1: self.stage1, 2: self.stage2, 3: self.stage3}
        for n, stage in every.items():
            stage.check(f"--stage{n}")
        _require_within(DATA_LIMITS, self.data, "--data.")
        _require_within(RUN_LIMITS, self, "--")
        if self.epochs is not None and (self.epochs <= 0 or not self.conversations):
            need = "must be above 0" if self.epochs <= 0 else "counts passes over --conversations: give some"
            raise UserError(f"--epochs {self.epochs}: {need}")
        if unknown := [s for s in self.stage if s not in every]:
            raise UserError(f"--stage {unknown[0]}: stages are 1, 2 and 3")
        chosen = {s: every[s] for s in sorted(set(self.stage))}
        if self.tokens is not None:
            total = sum(s.tokens for s in chosen.values())
            if self.tokens <= 0 or total <= 0:
                raise UserError(f"--tokens {self.tokens}: give a positive number, for stages that have a budget")
            share = self.tokens / total  # a stage that has a budget keeps at least one step
            chosen = {n: replace(s, tokens=max(min(1, s.tokens), round(s.tokens * share))) for n, s in chosen.items()}
        elif self.epochs is not None and epoch_tokens and chosen.get(3) and chosen[3].tokens:
            chosen[3] = replace(chosen[3], tokens=max(1, round(self.epochs * epoch_tokens)))
        chosen = {n: s for n, s in chosen.items() if s.tokens > 0}
        if not chosen:
            raise UserError("no stage has tokens to train on: set --tokens or --stageN.tokens above 0")
        return chosen


def _require_within(limits: dict[str, Any], settings: Any, prefix: str) -> None:
    for name, (least, most) in limits.items():
        value = getattr(settings, name, least)  # not every stage has all of them
        if not least <= value <= most:  # which refuses nan too
            wanted = f"at least {least}" if most == INF else f"from {least} to {most}"
            raise UserError(f"{prefix}{name.replace('_', '-')} {value}: must be {wanted}")
