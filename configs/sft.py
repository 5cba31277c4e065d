"""Supervised fine-tuning of a student, or of a teacher itself, on conversations: cross-entropy alone, one epoch.

Command:  python3 train.py --config sft --init-from RUN                                      a student
          python3 train.py --config sft --mixer softmax --teacher HuggingFaceTB/SmolLM2-1.7B the teacher, as a baseline
          other conversations: --conversations chats.jsonl; assistants' tokens alone: --stage3.loss-on assistant
          for a moment on a CPU: --tokens 20_000 --data.seq-len 256 --stage3.batch-size 4
Hardware: as for stage 3 of the model, whose teacher does not run. Time and result: not measured at this budget.

The alignment handbook's recipe for SmolLM2, whose SFT the paper follows for one epoch instead of two; its batches are
4 sequences x 4 steps x 8 GPUs. AdamW's settings are those of transformers' trainer.
"""

from dataclasses import replace

from jaxlin.config import RunConfig

SMOLTALK = "hf:HuggingFaceTB/smoltalk:all"


def config(base: RunConfig) -> RunConfig:
    """Stage 3 with the conversations' own tokens as targets. --tokens replaces the epoch."""
    stage3 = replace(
        base.stage3,
        batch_size=128,
        lr=3e-4,
        lr_new=3e-4,
        schedule="cosine",
        warmup=0.1,
        lr_min=0.0,
        weight_decay=0.0,
        betas=(0.9, 0.999),
        clip=1.0,
        kl_weight=0.0,
        ce_weight=1.0,
        loss_on="all",
    )
    data = replace(base.data, seq_len=2048)
    return replace(base, conversations=(SMOLTALK,), stage=(3,), epochs=1.0, stage3=stage3, data=data)
