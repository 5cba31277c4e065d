"""The paper's numbers (arXiv 2504.14366), in percent, typed from its tables.

What the tables say about themselves, checked in tests: averages of Table 5 are over its seven tasks, BEAR included;
the students' averages of Table 4 ("LLM AVG") are over the six tasks of Table 6 without BEAR. Its two teachers'
averages (70.24 and 70.57) do not follow from Table 6, which gives 64.21 and 64.07; nor does DeltaNet's average over
needles in regime B (40.10) from Table 7, which gives 44.18. In regime A, GLA's four instruction columns equal Gated
DeltaNet's: one of the two rows is probably a slip.
"""

from __future__ import annotations

from dataclasses import dataclass

MIXER_TITLES = {
    "gated_deltanet": "Gated DeltaNet",
    "mlstm": "xLSTM",
    "kda": "Kimi",
    "gla": "GLA",
    "retnet": "RetNet",
    "deltanet": "DeltaNet",
    "linear_attention": "Linear Attn",
}
# The harness's metric for each task of the paper's average; LAMBADA is the mean of its two variants.
METRICS = {
    "lambada": "acc",
    "winogrande": "acc",
    "arc_easy": "acc_norm",
    "arc_challenge": "acc_norm",
    "piqa": "acc_norm",
    "hellaswag": "acc_norm",
    "bear": "acc",
}
TASKS = tuple(METRICS)
SCALES = {"140M": 135e6, "360M": 360e6, "1.7B": 1.7e9}  # parameters of each scale's teacher
NIAH_TASKS = ("niah_single_1", "niah_single_2", "niah_single_3")
NIAH_LENGTHS = (512, 1024, 2048, 4096)
NIAH_COLUMNS = tuple(f"{task}_{length}" for task in NIAH_TASKS for length in NIAH_LENGTHS)
INSTRUCTION_TASKS = ("average", "niah", "ifeval", "gsm8k", "swde", "longbench")

Rows = dict[str, tuple[float, ...]]  # model ("teacher" or a mixer) to its row

# Table 5: zero-shot, 3B tokens. Columns: TASKS, average, recovery.
ZERO_SHOT: dict[str, Rows] = {
    "140M": {
        "teacher": (39.16, 51.93, 58.67, 29.61, 68.01, 43.23, 21.84, 44.64, 100.0),
        "gated_deltanet": (22.92, 51.85, 51.89, 28.24, 65.40, 38.10, 18.17, 39.51, 88.52),
        "mlstm": (27.39, 50.91, 54.12, 28.84, 66.54, 39.10, 22.28, 41.31, 92.55),
        "kda": (22.28, 53.20, 51.47, 28.58, 65.45, 37.81, 23.11, 40.27, 90.22),
        "gla": (22.04, 52.25, 51.52, 27.13, 65.29, 37.19, 18.35, 39.11, 87.62),
        "retnet": (17.02, 53.35, 49.96, 26.54, 64.69, 35.81, 21.54, 38.42, 86.06),
        "deltanet": (17.09, 51.38, 49.96, 27.90, 65.29, 35.66, 18.63, 37.99, 85.10),
        "linear_attention": (9.51, 50.75, 42.85, 22.35, 61.86, 30.88, 10.56, 32.68, 73.21),
    },
    "360M": {
        "teacher": (49.29, 58.72, 68.22, 37.88, 71.98, 56.33, 29.45, 53.12, 100.0),
        "gated_deltanet": (31.79, 55.17, 60.19, 32.34, 69.80, 49.80, 25.14, 46.32, 87.19),
        "mlstm": (37.30, 56.43, 60.06, 32.76, 71.38, 51.24, 24.80, 47.71, 89.81),
        "kda": (26.96, 52.01, 57.70, 30.38, 69.64, 47.09, 23.81, 43.94, 82.71),
        "gla": (29.85, 55.88, 59.81, 31.31, 70.08, 48.13, 24.15, 45.60, 85.84),
        "retnet": (26.06, 54.06, 56.86, 30.29, 68.99, 46.23, 23.23, 43.67, 82.21),
        "deltanet": (23.02, 51.78, 54.38, 28.92, 68.34, 44.61, 19.07, 41.45, 78.02),
        "linear_attention": (16.95, 50.99, 49.33, 25.60, 65.51, 37.74, 14.37, 37.21, 70.05),
    },
    "1.7B": {
        "teacher": (64.95, 65.82, 73.32, 47.18, 77.37, 71.40, 39.93, 62.85, 100.0),
        "gated_deltanet": (55.90, 64.80, 69.10, 41.90, 76.10, 66.80, 39.93, 59.22, 94.22),
        "mlstm": (52.70, 63.30, 67.10, 39.80, 75.80, 64.90, 39.25, 57.55, 91.56),
        "kda": (42.20, 57.50, 60.70, 35.30, 73.40, 59.70, 31.89, 51.53, 81.98),
        "gla": (50.10, 57.20, 64.60, 37.20, 74.60, 62.70, 34.29, 54.38, 86.53),
        "retnet": (50.00, 58.60, 65.80, 38.80, 74.80, 62.90, 32.44, 54.76, 87.13),
        "deltanet": (51.00, 61.20, 67.70, 39.80, 73.70, 63.20, 33.11, 55.67, 88.58),
        "linear_attention": (30.90, 53.70, 55.10, 31.30, 69.60, 52.50, 18.94, 44.58, 70.92),
    },
}

# Table 3: base students of 1.7B after 10B tokens. Columns: NIAH_COLUMNS.
NIAH: Rows = {
    "gated_deltanet": (99.4, 97.8, 81.8, 29.8, 99.0, 93.4, 55.0, 15.6, 16.4, 3.2, 1.2, 0.4),
    "mlstm": (95.8, 78.0, 25.2, 8.4, 98.6, 82.2, 32.0, 8.6, 6.2, 0.4, 0.0, 0.0),
    "deltanet": (98.8, 96.2, 0.0, 0.0, 99.2, 77.0, 24.6, 0.0, 1.8, 0.0, 0.0, 0.0),
    "kda": (33.4, 7.4, 2.0, 0.8, 91.8, 15.2, 7.8, 3.4, 0.0, 0.0, 0.0, 0.0),
    "gla": (10.6, 1.0, 0.0, 0.0, 50.0, 13.0, 3.0, 1.6, 0.0, 0.0, 0.0, 0.0),
    "retnet": (10.4, 0.0, 0.0, 0.0, 30.2, 10.2, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    "linear_attention": (0.0,) * 12,
}

# Table 4: 1.7B after instruction tuning. Columns: INSTRUCTION_TASKS. "post": tuned; "chat": distilled.
INSTRUCTION: dict[str, Rows] = {
    "post": {
        "teacher": (70.24, 99.31, 56.71, 42.08, 23.85, 17.45),
        "gated_deltanet": (61.07, 57.33, 40.89, 8.28, 13.33, 17.74),
        "mlstm": (60.52, 47.15, 45.08, 10.17, 14.03, 16.68),
        "gla": (56.59, 10.78, 40.89, 8.28, 13.33, 17.74),
        "deltanet": (56.29, 39.38, 36.21, 9.72, 3.62, 2.27),
        "retnet": (56.29, 6.28, 32.61, 6.39, 9.67, 2.05),
        "kda": (50.68, 17.36, 32.61, 8.01, 14.31, 6.82),
        "linear_attention": (44.70, 0.00, 24.46, 1.62, 2.21, 0.00),
    },
    "chat": {
        "teacher": (70.57, 98.06, 60.19, 49.51, 22.32, 25.64),
        "gated_deltanet": (55.35, 47.33, 47.12, 20.02, 10.08, 15.24),
        "deltanet": (55.34, 40.10, 42.17, 13.12, 9.36, 13.23),
        "retnet": (53.69, 10.61, 31.06, 2.81, 7.11, 7.98),
        "mlstm": (51.64, 10.41, 41.73, 13.50, 8.10, 14.91),
        "gla": (49.11, 4.35, 29.50, 5.84, 5.13, 10.79),
        "kda": (44.38, 4.48, 30.58, 6.07, 6.30, 8.91),
        "linear_attention": (31.28, 0.00, 22.78, 0.00, 1.40, 2.00),
    },
}

# Table 6: zero-shot after instruction tuning, 1.7B. Columns: TASKS.
TUNED_ZERO_SHOT: dict[str, Rows] = {
    "post": {
        "teacher": (61.61, 67.25, 66.46, 42.58, 76.55, 70.82, 36.94),
        "linear_attention": (26.11, 52.09, 45.16, 29.35, 66.81, 48.67, 25.21),
        "retnet": (48.01, 61.56, 55.85, 36.01, 74.05, 62.26, 32.19),
        "gla": (49.48, 60.30, 56.19, 35.75, 74.37, 63.47, 32.67),
        "mlstm": (54.62, 65.43, 63.59, 37.63, 75.30, 66.58, 37.49),
        "deltanet": (47.33, 58.09, 59.89, 36.95, 73.23, 62.25, 29.57),
        "gated_deltanet": (54.41, 65.11, 64.77, 39.85, 75.30, 66.97, 36.87),
        "kda": (40.03, 56.99, 44.95, 32.08, 70.62, 59.39, 28.66),
    },
    "chat": {
        "teacher": (61.10, 68.19, 63.13, 44.03, 76.12, 71.82, 39.06),
        "linear_attention": (0.38, 50.12, 33.08, 20.39, 55.55, 28.16, 5.49),
        "retnet": (43.14, 59.98, 60.19, 34.04, 72.63, 52.16, 25.97),
        "gla": (28.28, 54.22, 55.85, 32.42, 69.15, 54.75, 17.60),
        "mlstm": (41.19, 60.14, 52.10, 31.14, 68.17, 57.07, 20.51),
        "deltanet": (41.89, 58.41, 59.97, 37.80, 72.42, 61.70, 27.21),
        "gated_deltanet": (41.93, 57.93, 60.10, 37.97, 72.36, 61.83, 27.04),
        "kda": (12.48, 50.59, 53.32, 32.42, 68.06, 49.43, 11.29),
    },
}

# Table 7: needles after instruction tuning, 1.7B. Columns: NIAH_COLUMNS.
TUNED_NIAH: dict[str, Rows] = {
    "post": {
        "teacher": (100, 100, 100, 100, 100, 100, 99.8, 99.8, 100, 99.8, 97.4, 95.0),
        "linear_attention": (0.0,) * 12,
        "retnet": (12.4, 1.0, 0.0, 0.0, 47.8, 13.8, 0.4, 0.0, 0.0, 0.0, 0.0, 0.0),
        "mlstm": (99.2, 93.8, 64.6, 17.6, 99.4, 89.4, 48.8, 15.2, 30.2, 3.8, 3.2, 0.6),
        "gla": (18.2, 7.0, 0.6, 0.4, 76.4, 20.8, 4.0, 2.0, 0.0, 0.0, 0.0, 0.0),
        "deltanet": (98.6, 99.4, 0.0, 0.0, 99.6, 92.8, 62.4, 0.0, 18.2, 1.6, 0.0, 0.0),
        "gated_deltanet": (99.8, 99.4, 98.0, 65.8, 99.4, 95.0, 58.2, 21.6, 32.2, 12.0, 4.6, 2.0),
        "kda": (57.2, 9.6, 2.6, 0.6, 97.4, 25.4, 11.4, 4.2, 0.0, 0.0, 0.0, 0.0),
    },
    "chat": {
        "teacher": (99.8, 99.8, 98.2, 100, 100, 86.6, 98.6, 99.6, 100, 94.4, 100, 99.8),
        "retnet": (13.4, 0.2, 0.0, 0.0, 89.0, 24.8, 0.0, 0.2, 0.0, 0.0, 0.0, 0.0),
        "gla": (1.4, 0.0, 0.0, 0.0, 49.4, 1.4, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
        "mlstm": (19.8, 3.4, 1.0, 0.8, 70.0, 26.0, 2.2, 1.8, 0.0, 0.0, 0.0, 0.0),
        "deltanet": (98.0, 94.2, 63.2, 22.2, 99.0, 90.8, 50.6, 11.6, 0.6, 0.0, 0.0, 0.0),
        "gated_deltanet": (98.6, 98.0, 72.4, 24.0, 99.6, 91.8, 59.0, 17.0, 7.6, 0.0, 0.0, 0.0),
        "kda": (0.4, 0.0, 0.0, 0.0, 52.2, 1.2, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    },
}


@dataclass(frozen=True)
class Reference:
    """A number of the paper, in percent, and where it stands."""

    value: float
    table: int
    what: str  # the model that it was measured on


def scale_of(parameters: float) -> str:
    """The paper's scale whose teacher is nearest in size (by ratio) to a teacher of so many parameters."""
    return min(SCALES, key=lambda name: max(parameters / SCALES[name], SCALES[name] / parameters))


def reference(column: str, model: str, parameters: float) -> Reference | None:
    """The paper's number for a column of `compare`, or None where it gives none.

    `model` is "teacher" or a mixer; `parameters` the teacher's size, for the zero-shot tasks. Of what the paper ran on
    base and on tuned models the base model's number is given; of the rest, the post-trained model's.
    """
    if column in (*TASKS, "average"):
        scale = scale_of(parameters)
        row = ZERO_SHOT[scale].get(model)
        what = f"SmolLM2 {scale}" if model == "teacher" else f"SmolLM2 {scale}, 3B tokens"
        return Reference(row[(*TASKS, "average").index(column)], 5, what) if row else None
    if column in NIAH_COLUMNS:
        at = NIAH_COLUMNS.index(column)
        if model == "teacher":
            return Reference(TUNED_NIAH["post"][model][at], 7, "SmolLM2 1.7B, tuned")
        return Reference(NIAH[model][at], 3, "SmolLM2 1.7B, 10B tokens") if model in NIAH else None
    if column in INSTRUCTION_TASKS:
        row = INSTRUCTION["post"].get(model)
        return Reference(row[INSTRUCTION_TASKS.index(column)], 4, "SmolLM2 1.7B, post-trained") if row else None
    return None
