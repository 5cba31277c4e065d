"""Linearize a pretrained Transformer: `python3 train.py --mixer gated_deltanet`. See `--help` for every setting."""

from jaxlin.config import parse_run, run_main


def main() -> None:
    """Train, then measure."""
    run = parse_run()  # before JAX is imported: --help and mistakes answer at once

    from jaxlin.evaluation.report import report_run
    from jaxlin.trainer import Trainer

    Trainer(run).train()
    report_run(run.folder)


if __name__ == "__main__":
    run_main(main)
