"""Linearize a pretrained Transformer: `python3 train.py --mixer gated_deltanet`. See `--help` for every setting."""

import sys

from jaxlin.command_line import parse_run, run_main


def main() -> None:
    """Train, then measure; or plan."""
    run = parse_run()  # before JAX is imported: --help and mistakes answer at once
    if run.plan:
        from jaxlin.plan import plan

        sys.exit(0 if plan(run) else 1)

    from jaxlin import processes

    processes.start(run.distributed)  # before anything asks for devices

    from jaxlin.evaluation.report import report_run
    from jaxlin.runs import alone
    from jaxlin.trainer import Trainer

    with alone(run):
        Trainer(run).train()
        for student in run.students():
            report_run(student.folder, run.mesh)


if __name__ == "__main__":
    run_main(main, resumes="the same command goes on from the last checkpoint, if there is one")
