"""The paper's tables beside those of benchmarks: models, carbon, preferences, reward models, tools, ablations, as it prints them.

Tables 1, 2, 6 to 8, 15 to 18, 26, 28, 29 and 32. Shares are in percent; None is a cell without a number.
"""

from dataclasses import dataclass

Cell = str | float | int | None


@dataclass(frozen=True)
class PrintedTable:
    """A table of the paper."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()
    """What is to be known of it, among it where its numbers contradict each other."""


# Comparisons of Meta's that were collected together, in their order.
META_BATCHES = (5561, 17072, 30146, 36206, 49375, 57746, 84388, 95235, 127235, 136729, 136868, 181293, 210881, 249356)
STRENGTHS = ("significantly better", "better", "slightly better", "negligibly better or unsure")

TABLES = {
    1: PrintedTable(
        "The family",
        ("model", "parameters", "context", "GQA", "tokens", "peak learning rate"),
        (
            ("Llama 1", "7B", "2k", "no", "1.0T", "3.0e-4"),
            ("Llama 1", "13B", "2k", "no", "1.0T", "3.0e-4"),
            ("Llama 1", "33B", "2k", "no", "1.4T", "1.5e-4"),
            ("Llama 1", "65B", "2k", "no", "1.4T", "1.5e-4"),
            ("Llama 2", "7B", "4k", "no", "2.0T", "3.0e-4"),
            ("Llama 2", "13B", "4k", "no", "2.0T", "3.0e-4"),
            ("Llama 2", "34B", "4k", "yes", "2.0T", "1.5e-4"),
            ("Llama 2", "70B", "4k", "yes", "2.0T", "1.5e-4"),
        ),
    ),
    2: PrintedTable(
        "Carbon emitted in pretraining",
        ("model", "GPU hours", "watts a GPU", "tCO2eq"),
        (
            ("7B", 184320, 400, 31.22),
            ("13B", 368640, 400, 62.44),
            ("34B", 1038336, 350, 153.90),
            ("70B", 1720320, 400, 291.42),
            ("total", 3311616, None, 539.00),
        ),
    ),
    6: PrintedTable(
        "Preference data",
        ("data set", "comparisons", "turns a dialogue", "tokens an example", "tokens a prompt", "tokens a response"),
        (
            ("Anthropic Helpful", 122387, 3.0, 251.5, 17.7, 88.4),
            ("Anthropic Harmless", 43966, 3.0, 152.5, 15.7, 46.4),
            ("OpenAI Summarize", 176625, 1.0, 371.1, 336.0, 35.1),
            ("OpenAI WebGPT", 13333, 1.0, 237.2, 48.3, 188.9),
            ("StackExchange", 1038480, 1.0, 440.2, 200.1, 240.2),
            ("Stanford SHP", 74882, 1.0, 338.3, 199.5, 138.8),
            ("Synthetic GPT-J", 33139, 1.0, 123.3, 13.0, 110.3),
            ("Meta", 1418091, 3.9, 798.5, 31.4, 234.1),
            ("total", 2919326, 1.6, 595.7, 108.2, 216.9),
        ),
        ("The comparisons add up to 2,920,903, not to the total that the paper prints.",),
    ),
    7: PrintedTable(
        "Accuracy of reward models",
        (
            "model",
            "Meta Helpful",
            "Meta Safety",
            "Anthropic Helpful",
            "Anthropic Harmless",
            "OpenAI Summarize",
            "Stanford SHP",
            "average",
        ),
        (
            ("SteamSHP-XL", 52.8, 43.8, 66.8, 34.2, 54.7, 75.7, 55.3),
            ("Open Assistant", 53.8, 53.4, 67.7, 68.4, 71.7, 55.0, 63.0),
            ("GPT-4", 58.6, 58.1, None, None, None, None, None),
            ("Safety RM", 56.2, 64.5, 55.4, 74.7, 71.7, 65.2, 64.3),
            ("Helpfulness RM", 63.2, 62.8, 72.0, 71.0, 75.5, 80.0, 70.6),
        ),
        ("The average is not the mean of the columns before it.",),
    ),
    8: PrintedTable(
        "Accuracy of reward models by strength of preference",
        ("model and test set", *STRENGTHS, "average"),
        (
            ("Safety RM on Meta Safety", 94.3, 76.3, 65.7, 55.3, 64.5),
            ("Helpfulness RM on Meta Safety", 89.9, 73.2, 63.8, 54.5, 62.8),
            ("Safety RM on Meta Helpful", 64.6, 57.5, 53.8, 52.2, 56.2),
            ("Helpfulness RM on Meta Helpful", 80.7, 67.5, 60.9, 54.7, 63.2),
        ),
    ),
    15: PrintedTable(
        "Arithmetic with tools",
        ("model", "ASDiv", "SVAMP", "MAWPS"),
        (
            ("GPT-3", 14.0, 10.0, 19.8),
            ("Toolformer", 40.4, 29.4, 44.0),
            ("Llama 2-Chat with a calculator", 67.1, 69.2, 82.4),
        ),
    ),
    16: PrintedTable(
        "Context of 2k and 4k tokens, on long tasks, after 150B tokens",
        (
            "context",
            "NarrativeQA (F1)",
            "Qasper",
            "QuALITY",
            "QMSum (ROUGE-1)",
            "QMSum (ROUGE-2)",
            "QMSum (ROUGE-L)",
            "ContractNLI",
            "SQuAD (EM)",
            "SQuAD (F1)",
        ),
        (
            ("2k", 0.21, 0.71, 26.1, 0.13, 0.01, 0.12, 11.76, 57.23, 62.89),
            ("4k", 17.26, 18.52, 29.6, 15.08, 3.55, 12.16, 16.33, 57.99, 64.46),
        ),
    ),
    17: PrintedTable(
        "Context of 2k and 4k tokens, on general tasks, after 150B tokens",
        ("context", "HellaSwag", "NQ (64-shot)", "TriviaQA (64-shot)", "GSM8K", "HumanEval"),
        (
            ("2k", 75.1, 25.5, 53.7, 4.9, 7.9),
            ("4k", 74.8, 25.5, 52.2, 6.5, 7.3),
        ),
    ),
    18: PrintedTable(
        "Attention of a 30B model after 150B tokens",
        (
            "attention",
            "BoolQ",
            "PIQA",
            "SIQA",
            "HellaSwag",
            "ARC-e",
            "ARC-c",
            "NQ",
            "TriviaQA",
            "MMLU",
            "GSM8K",
            "HumanEval",
        ),
        (
            ("MHA", 71.0, 79.3, 48.2, 75.1, 71.2, 43.0, 12.4, 44.7, 28.0, 4.9, 7.9),
            ("MQA", 70.6, 79.0, 47.9, 74.5, 71.6, 41.9, 14.5, 42.8, 26.5, 4.8, 7.3),
            ("GQA", 69.4, 78.8, 48.6, 75.4, 72.1, 42.5, 14.0, 46.2, 26.9, 5.3, 7.9),
        ),
        ("The feed-forward is 1.33 times as wide for MQA, and 1.3 times for GQA with 8 heads.",),
    ),
    26: PrintedTable(
        "Meta's preference data by batch",
        ("batch", "comparisons"),
        tuple(enumerate(META_BATCHES, 1)),
        ("The table's columns on turns and tokens are not kept here.",),
    ),
    28: PrintedTable(
        "Margins of the ranking loss: accuracy of the helpfulness reward model on Meta Helpful",
        ("margin", *STRENGTHS, "average"),
        (
            ("none", 79.1, 66.9, 59.8, 54.5, 62.5),
            ("small", 80.4, 67.3, 60.4, 55.0, 63.0),
            ("large", 80.7, 67.5, 60.5, 54.3, 62.9),
        ),
    ),
    29: PrintedTable(
        "The auxiliary loss of the safety reward model",
        ("loss", "average", "safe against unsafe", "both safe", "both unsafe", "recall of unsafe answers"),
        (
            ("without", 63.7, 93.0, 56.0, 59.5, 73.0),
            ("with", 64.5, 94.3, 56.9, 59.9, 90.4),
        ),
    ),
    32: PrintedTable(
        "Prompts of the human evaluation",
        ("compared with", "single-turn", "multi-turn"),
        (
            ("ChatGPT", 1917, 2256),
            ("PaLM", 1869, 2143),
            ("Falcon", 1917, 1960),
            ("MPT", 1917, 1293),
            ("Vicuna", 1917, 1390),
        ),
    ),
}
