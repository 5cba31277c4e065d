"""A student of an instruct teacher: stages 1 and 2 on 200M and 800M tokens of FineWeb, stage 3 on conversations.

Command:  python3 train.py --config instruct --mixer gated_deltanet
          stage 3 alone, from another run's student: --init-from RUN --stage 3
          without the hub: --teacher demo --text FILES... --conversations chats.jsonl --tokens N
Hardware: as for the teacher's own config. Time and result: not measured at this budget.

Stages 1 and 2 as in the paper; of stage 3 it says that it is on SmolTalk. The KL to the teacher is over all tokens of
the conversations (--stage3.loss-on assistant: over the answers), in the teacher's chat template.
"""

from dataclasses import replace

from jaxlin.config import RunConfig

FINEWEB = "hf:HuggingFaceFW/fineweb:sample-10BT"
SMOLTALK = "hf:HuggingFaceTB/smoltalk:all"


def config(base: RunConfig) -> RunConfig:
    """--tokens shares itself out as if an epoch of conversations were a billion tokens."""
    return replace(
        base,
        teacher="HuggingFaceTB/SmolLM2-1.7B-Instruct",
        text=(FINEWEB,),
        conversations=(SMOLTALK,),
        epochs=1.0,
        stage1=replace(base.stage1, tokens=200_000_000),
        stage2=replace(base.stage2, tokens=800_000_000),
        stage3=replace(base.stage3, tokens=1_000_000_000),
        data=replace(base.data, seq_len=2048),
    )
