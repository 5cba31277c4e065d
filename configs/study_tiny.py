"""A random tiny teacher, two mixers, a few steps a stage: a study from end to end.

Command:  python -m jaxlin.study --config study_tiny
Hardware: any CPU. Time: two minutes. Result: a report whose numbers mean nothing.
"""

from jaxlin.study.design import Arm, Contrast, Study

SETTINGS = (
    "--config", "tiny", "--data.seq-len", "32", "--data.eval-tokens", "256", "--stage1.batch-size", "4",
    "--stage2.batch-size", "4", "--stage3.batch-size", "4", "--log-every", "1", "--save-every", "1",
)  # fmt: skip


def study() -> Study:
    """Two students, one of them with two seeds; milestones at the ends of stages 1 and 2."""
    return Study(
        name="A study in seconds",
        settings=SETTINGS,
        milestone_tokens=128,
        arms=(
            Arm(mixers=("retnet", "gated_deltanet"), tokens=(384,)),
            Arm(mixers=("retnet",), tokens=(384,), seeds=(1,)),
        ),
        contrasts=(
            Contrast(
                name="delta rule",
                question="Is Gated DeltaNet nearer to its teacher than RetNet?",
                a="recommended-384/gated_deltanet",
                b="recommended-384/retnet",
                metric="kl",
            ),
        ),
    )
