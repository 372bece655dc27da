"""What the paper's models score on academic benchmarks (paper 2.3 and A.2.2, Tables 3, 4 and 19 to 25), as it prints it.

Everything is in percent. Of the other open models in these tables only Llama 1 in Table 3 is kept.
"""

import math
from dataclasses import dataclass

from llama_jax.config import LLAMA2_7B, LLAMA2_13B, LLAMA2_34B, LLAMA2_70B

PARAMETERS = {
    "7B": LLAMA2_7B.n_params,
    "13B": LLAMA2_13B.n_params,
    "34B": LLAMA2_34B.n_params,
    "70B": LLAMA2_70B.n_params,
}
SIZES = tuple(PARAMETERS)


@dataclass(frozen=True)
class Measure:
    """What is measured: a benchmark, under a protocol."""

    benchmark: str
    shots: int
    """Solved examples in the prompt."""
    metric: str
    """acc, em (exact match), f1, pass@k, or maj1@1, which is the accuracy of one greedy answer."""


# Table 3's columns.
GROUPS = {
    "code": "Code",
    "commonsense": "Commonsense reasoning",
    "world": "World knowledge",
    "reading": "Reading comprehension",
    "math": "Math",
    "mmlu": "MMLU",
    "bbh": "BBH",
    "agieval": "AGI Eval",
}

TABLE_3: dict[str, tuple[float, ...]] = {
    "Llama 1 7B": (14.1, 60.8, 46.2, 58.5, 6.95, 35.1, 30.3, 23.9),
    "Llama 1 13B": (18.9, 66.1, 52.6, 62.3, 10.9, 46.9, 37.0, 33.9),
    "Llama 1 33B": (26.0, 70.0, 58.4, 67.6, 21.4, 57.8, 39.8, 41.7),
    "Llama 1 65B": (30.7, 70.7, 60.5, 68.6, 30.8, 63.4, 43.5, 47.6),
    "Llama 2 7B": (16.8, 63.9, 48.9, 61.3, 14.6, 45.3, 32.6, 29.3),
    "Llama 2 13B": (24.5, 66.9, 55.4, 65.8, 28.7, 54.8, 39.4, 39.1),
    "Llama 2 34B": (27.8, 69.9, 58.7, 68.0, 24.2, 62.6, 44.1, 43.4),
    "Llama 2 70B": (37.5, 71.9, 63.6, 69.4, 35.2, 68.9, 51.2, 54.2),
}

# Where Table 3 contradicts the paper's own Table 25: what it prints for math at these sizes is GSM8K alone, not the mean of
# GSM8K and MATH as at 34B and 70B. These are the means.
MISPRINTS = {("math", "7B"): 8.55, ("math", "13B"): 16.3}

# Scores of the four sizes, 7B to 70B.
SCORES: dict[Measure, tuple[float, float, float, float]] = {
    # Table 19
    Measure("mmlu_humanities", 5, "acc"): (42.9, 52.8, 59.4, 65.0),
    Measure("mmlu_stem", 5, "acc"): (36.4, 44.1, 52.1, 58.0),
    Measure("mmlu_social_sciences", 5, "acc"): (51.2, 62.6, 71.8, 80.3),
    Measure("mmlu_other", 5, "acc"): (52.2, 61.1, 69.2, 74.6),
    # Table 20
    Measure("boolq", 0, "acc"): (77.4, 81.7, 83.7, 85.0),
    Measure("piqa", 0, "acc"): (78.8, 80.5, 81.9, 82.8),
    Measure("siqa", 0, "acc"): (48.3, 50.3, 50.9, 50.7),
    Measure("hellaswag", 0, "acc"): (77.2, 80.7, 83.3, 85.3),
    Measure("winogrande", 0, "acc"): (69.2, 72.8, 76.7, 80.2),
    Measure("arc_easy", 0, "acc"): (75.2, 77.3, 79.4, 80.2),
    Measure("arc_challenge", 0, "acc"): (45.9, 49.4, 54.5, 57.4),
    Measure("openbookqa", 0, "acc"): (58.6, 57.0, 58.2, 60.2),
    Measure("commonsense_qa", 7, "acc"): (57.8, 67.3, 74.3, 78.5),
    # Table 21: temperature 0.1 for pass@1 and 0.8 for the others, top-p 0.95.
    Measure("humaneval", 0, "pass@1"): (12.8, 18.3, 22.6, 29.9),
    Measure("humaneval", 0, "pass@100"): (45.6, 60.2, 77.2, 89.0),
    Measure("mbpp", 3, "pass@1"): (20.8, 30.6, 33.0, 45.0),
    Measure("mbpp", 3, "pass@80"): (62.8, 69.0, 76.1, 81.4),
    # Table 22; TriviaQA's Wikipedia part of its development set.
    Measure("nq", 0, "em"): (16.4, 16.1, 25.1, 25.3),
    Measure("nq", 1, "em"): (22.7, 28.0, 30.0, 33.0),
    Measure("nq", 5, "em"): (25.7, 31.2, 32.8, 39.5),
    Measure("nq", 64, "em"): (29.5, 34.6, 39.9, 44.3),
    Measure("triviaqa", 0, "em"): (65.8, 73.1, 81.0, 82.4),
    Measure("triviaqa", 1, "em"): (68.9, 77.2, 83.3, 85.0),
    Measure("triviaqa", 5, "em"): (72.1, 79.6, 84.5, 87.6),
    Measure("triviaqa", 64, "em"): (73.7, 79.4, 84.6, 87.5),
    # Table 23
    Measure("squad", 0, "em"): (67.2, 72.9, 77.4, 80.7),
    Measure("squad", 1, "em"): (72.3, 72.1, 78.8, 82.6),
    Measure("squad", 4, "em"): (72.6, 70.6, 77.5, 81.9),
    Measure("squad", 5, "em"): (72.5, 71.3, 77.5, 81.9),
    Measure("quac", 0, "f1"): (39.4, 42.7, 42.9, 42.4),
    Measure("quac", 1, "f1"): (39.7, 44.8, 44.4, 49.3),
    # Table 24. The paper says 3 to 5 shots and not which task has how many; 3 stands for it here.
    Measure("agieval_aqua_rat", 3, "acc"): (23.2, 21.7, 19.3, 23.2),
    Measure("agieval_logiqa_en", 3, "acc"): (31.0, 38.1, 40.7, 48.8),
    Measure("agieval_lsat_ar", 3, "acc"): (23.9, 23.0, 21.3, 25.7),
    Measure("agieval_lsat_lr", 3, "acc"): (22.4, 41.0, 47.5, 70.2),
    Measure("agieval_lsat_rc", 3, "acc"): (32.7, 54.6, 62.1, 76.6),
    Measure("agieval_sat_en", 3, "acc"): (43.2, 62.1, 77.2, 86.9),
    Measure("agieval_sat_en_without_passage", 3, "acc"): (37.4, 46.1, 49.0, 53.4),
    Measure("agieval_sat_math", 3, "acc"): (28.2, 27.3, 32.7, 41.8),
    # Table 25
    Measure("gsm8k", 8, "maj1@1"): (14.6, 28.7, 42.2, 56.8),
    Measure("math", 4, "maj1@1"): (2.5, 3.9, 6.24, 13.5),
    # Table 3; the paper has no table of its tasks.
    Measure("bbh", 3, "em"): (32.6, 39.4, 44.1, 51.2),
}

# Table 4, 70B beside closed models; None where it has none.
CLOSED_MODELS = ("GPT-3.5", "GPT-4", "PaLM", "PaLM-2-L", "Llama 2 70B")
TABLE_4: dict[str, tuple[float | None, ...]] = {
    "MMLU (5-shot)": (70.0, 86.4, 69.3, 78.3, 68.9),
    "TriviaQA (1-shot)": (None, None, 81.4, 86.1, 85.0),
    "Natural Questions (1-shot)": (None, None, 29.3, 37.5, 33.0),
    "GSM8K (8-shot)": (57.1, 92.0, 56.5, 80.7, 56.8),
    "HumanEval (0-shot)": (48.1, 67.0, 26.2, None, 29.9),
    "BIG-Bench Hard (3-shot)": (None, None, 52.3, 65.7, 51.2),
}


def paper_value(benchmark: str, size: str, shots: int, metric: str) -> float | None:
    """What the paper prints for a benchmark under a protocol, percent; None where it prints nothing.

    Args:
      benchmark: as in `Benchmark.name`.
      size: 7B, 13B, 34B or 70B.
      shots: solved examples in the prompt.
      metric: as in `Measure.metric`.
    """
    scores = SCORES.get(Measure(benchmark, shots, metric))
    return None if scores is None else scores[SIZES.index(size)]


def paper_average(group: str, size: str) -> float:
    """A group's average in Table 3, percent, corrected where the paper's other tables contradict it (`MISPRINTS`)."""
    return MISPRINTS.get((group, size), TABLE_3[f"Llama 2 {size}"][list(GROUPS).index(group)])


def nearest_size(parameter_count: int) -> str:
    """The size of Llama 2 nearest to a model of so many parameters, by their ratio."""
    return min(SIZES, key=lambda size: abs(math.log(PARAMETERS[size] / parameter_count)))
