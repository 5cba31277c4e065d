"""The paper's comparison at 135M, and three puzzles put to runs: sixteen students, three of them with two seeds.

Command:  python -m jaxlin.study --config study_135m --text TRAIN... --heldout HELDOUT --data DATA
          one job a host: add --shard I/N (configs/study.slurm, configs/study.gke.yaml); several students in one
          process: --together 3
Hardware: GPUs with 40 GiB or more. Time: two students together trained in 15 to 19 minutes on an H200, one in 7 to 9.
Result:   docs/results.md has what was run.

Disk:     1.7 GB a checkpoint; a run keeps two, and that of 30M tokens.

The budget is split between the stages as the paper splits its own (80 : 160 : 2,760). The teacher is not the paper's
base model but SmolLM2-135M-Instruct, at about 4.5 bits a weight.

(a) The authors' code repeats key and value heads in blocks of 32 rows, whatever the head size, in all students but
    mLSTM, which keeps the teacher's heads. `gqa_error` does so; `paper_code` alone repeats them rightly (and mLSTM
    not at all, so that its own counterpart is `gqa`, which repeats rightly).
(b) In the authors' KDA the gate is added before the norm, where Kimi's multiplies after it: `paper_code` against
    `gated`, and `recommended` against `no_gate`.
(c) The authors' linear attention keeps no state between the tokens that it writes; here every student's is carried.
"""

from dataclasses import replace

from jaxlin.study.design import Arm, Contrast, Study, Suite

SETTINGS = (
    "--config", "smollm2_135m", "--teacher", "demo", "--stage3.batch-size", "64", "--remat", "dots",
    "--data.eval-tokens", "131072", "--save-every", "1000",
)  # fmt: skip
GQA_ERROR = ("--model.expand-kv", "True", "--model.gqa-bug-compat", "True")
ZERO_SHOT = "average without bear"
NEEDLES = tuple(f"niah_single_{kind}_{length}" for kind in (1, 2, 3) for length in (512, 1024, 2048))

PUZZLES = (
    Contrast(
        "a: the lead with the error",
        "Is mLSTM ahead of Gated DeltaNet where the latter's heads are repeated as in the authors' code?",
        "paper_code-60M/mlstm", "paper_code-gqa_error-60M/gated_deltanet", ZERO_SHOT,
    ),
    Contrast(
        "a: the lead without it",
        "Is mLSTM ahead of Gated DeltaNet where both have the teacher's heads?",
        "paper_code-60M/mlstm", "paper_code-60M/gated_deltanet", ZERO_SHOT,
    ),
    Contrast(
        "a: the lead with the error in both",
        "Is mLSTM ahead of Gated DeltaNet where both have their heads repeated as in the authors' code?",
        "paper_code-gqa_error-60M/mlstm", "paper_code-gqa_error-60M/gated_deltanet", ZERO_SHOT,
    ),
    Contrast(
        "a: what the error costs Gated DeltaNet",
        "Is Gated DeltaNet worse with the authors' repetition than without?",
        "paper_code-gqa_error-60M/gated_deltanet", "paper_code-60M/gated_deltanet", ZERO_SHOT,
    ),
    Contrast(
        "a: what the error costs mLSTM",
        "Is mLSTM worse with the authors' repetition, which they did not give it, than with the right one?",
        "paper_code-gqa_error-60M/mlstm", "paper_code-gqa-60M/mlstm", ZERO_SHOT,
    ),
    Contrast(
        "a: the lead by the recommended preset",
        "Is mLSTM ahead of Gated DeltaNet by the recommended preset?",
        "recommended-60M/mlstm", "recommended-60M/gated_deltanet", ZERO_SHOT,
    ),
    Contrast(
        "b: added or multiplied",
        "Is the authors' KDA worse for adding its gate before the norm?",
        "paper_code-60M/kda", "paper_code-gated-60M/kda", ZERO_SHOT,
    ),
    Contrast(
        "b: gate or none",
        "Is KDA worse without an output gate?",
        "recommended-no_gate-60M/kda", "recommended-60M/kda", ZERO_SHOT,
    ),
    Contrast(
        "c: needles of linear attention",
        "With its state carried, does the authors' linear attention find fewer needles in 256 tokens than ours?",
        "paper_code-60M/linear_attention", "recommended-60M/linear_attention", "niah_single_1_256",
    ),
    Contrast(
        "c: needles in longer texts",
        "The same, in 512 tokens?",
        "paper_code-60M/linear_attention", "recommended-60M/linear_attention", "niah_single_1_512",
    ),
    Contrast(
        "the preset",
        "Is Gated DeltaNet worse by the authors' preset than by the recommended one?",
        "paper_code-60M/gated_deltanet", "recommended-60M/gated_deltanet", ZERO_SHOT,
    ),
)  # fmt: skip


def study() -> Study:
    """Equal budgets of 60M tokens, with milestones; puzzles (a) and (b) are put to the benchmarks and to the KL."""
    return Study(
        name="Seven mixers from SmolLM2-135M-Instruct, 60M tokens each",
        settings=SETTINGS,
        arms=(
            Arm(("gated_deltanet", "mlstm", "kda", "gla", "retnet", "deltanet", "linear_attention")),
            Arm(("gated_deltanet", "mlstm", "kda"), seeds=(1,)),
            Arm(("gated_deltanet", "mlstm", "kda", "linear_attention"), preset="paper_code"),
            Arm(("gated_deltanet", "mlstm"), preset="paper_code", variant="gqa_error", options=GQA_ERROR),
            Arm(("mlstm",), preset="paper_code", variant="gqa", options=("--model.expand-kv", "True")),
            Arm(("kda",), preset="paper_code", variant="gated", options=("--model.out-gate", "random")),
            Arm(("kda",), variant="no_gate", options=("--model.out-gate", "none")),
        ),
        milestone_tokens=30_000_000,
        suites=(
            Suite("zero_shot", limit=1000),
            Suite("niah_short", limit=100),
            Suite("niah", limit=100, tasks=NEEDLES),
            Suite("bear", limit=40),
        ),
        contrasts=(
            *PUZZLES,
            *(replace(p, name=f"{p.name}, KL", metric="kl") for p in PUZZLES if p.metric == ZERO_SHOT),
        ),
    )
