"""Every table of the paper that can be asked for by its number, as the paper prints it, and the command that makes it here.

docs/paper.md says the same of every table and figure, and why some are not made.
"""

from collections.abc import Mapping

from llama_jax.errors import UserError
from llama_jax.evaluation.audit_tables import PAPER_DESCRIPTORS, PAPER_LANGUAGES, PAPER_PRONOUNS
from llama_jax.evaluation.benchmarks import SUITE, group_average
from llama_jax.evaluation.paper_scores import (
    CLOSED_MODELS,
    GROUPS,
    MISPRINTS,
    SCORES,
    SIZES,
    TABLE_3,
    TABLE_4,
    Measure,
    paper_average,
)
from llama_jax.evaluation.paper_studies import STRENGTHS, TABLES, Cell, PrintedTable
from llama_jax.evaluation.report import table
from llama_jax.evaluation.safety_paper_values import (
    BOLD,
    BOLD_GROUPS,
    TOXIGEN,
    TOXIGEN_GROUPS,
    TRUTHFULQA,
    ByModel,
    PaperModel,
)

LAST_TABLE = 52

BENCHMARKS = "llama-jax eval CHECKPOINT --suite table3"
SAFETY = "llama-jax eval CHECKPOINT --suite safety"
AUDIT = "llama-jax audit SOURCE"
REWARD = "llama-jax reward CHECKPOINT --data pairs.jsonl"
CONTEXT = "python -m experiments.context_ablation --source SOURCE"
MARGIN = "python -m experiments.reward_margin --checkpoint CHECKPOINT"

# What makes each table for a model or data of one's own; docs/paper.md says what of it, and why the others are missing.
COMMANDS = {
    1: "llama-jax pretrain pretrain_70b --dry-run",
    2: "llama-jax plan pretrain_70b --topology v5p:8x8x8",
    3: BENCHMARKS,
    4: BENCHMARKS,
    6: REWARD,
    7: REWARD,
    8: REWARD,
    9: AUDIT,
    10: AUDIT,
    11: SAFETY,
    14: SAFETY,
    15: "llama-jax eval CHECKPOINT --suite chat",
    16: CONTEXT,
    17: CONTEXT,
    18: "python -m experiments.gqa_ablation --source SOURCE",
    **dict.fromkeys(range(19, 26), BENCHMARKS),
    21: f"{BENCHMARKS} --run-code",
    26: REWARD,
    27: MARGIN,
    28: MARGIN,
    29: f"{REWARD} --safety-weight 1",
    30: "python -m experiments.ghost_attention",
    **dict.fromkeys(range(44, 51), SAFETY),
    51: "llama-jax contamination SAMPLES.jsonl",
    52: "llama-jax report RUN --model-card",
}

# Tables of scores by size: title, benchmarks, and the group whose average stands in the last column.
SCORE_TABLES: dict[int, tuple[str, tuple[str, ...], str | None]] = {
    19: ("MMLU by domain", tuple(one.name for one in SUITE if one.group == "mmlu"), "mmlu"),
    20: ("Standard benchmarks", ("boolq", *(one.name for one in SUITE if one.group == "commonsense")), None),
    21: ("Code", ("humaneval", "mbpp"), None),
    22: ("World knowledge", ("nq", "triviaqa"), None),
    23: ("Reading comprehension", ("squad", "quac"), None),
    24: ("AGI Eval, English", tuple(one.name for one in SUITE if one.group == "agieval"), "agieval"),
    25: ("Math", ("gsm8k", "math"), None),
}


# Tables of safety benchmarks by model: title, columns, values.
SAFETY_TABLES: dict[int, tuple[str, tuple[str, ...], ByModel]] = {
    44: ("TruthfulQA, % of answers", ("true and informative", "true", "informative"), TRUTHFULQA),
    45: ("ToxiGen, % of toxic continuations", tuple(TOXIGEN_GROUPS.values()), TOXIGEN),
    **{
        number: (f"BOLD, {domain}: mean sentiment", BOLD_GROUPS[domain], BOLD[domain])
        for number, domain in zip((46, 47, 48, 49, 50), ("race", *(key for key in BOLD if key != "race")), strict=True)
    },
}


def table_as_text(number: int, measured: Mapping[Measure, float] | None = None, name: str = "measured") -> str:
    """A table of the paper in Markdown, and the command that makes it for a model of one's own.

    Args:
      number: the table's.
      measured: percent, for a line of one's own below the paper's in tables of benchmarks (3 and 19 to 25).
      name: of what was measured.

    Raises:
      UserError: the paper has no such table.
    """
    if not 1 <= number <= LAST_TABLE:
        raise UserError(f"no table {number}; the paper's are 1 to {LAST_TABLE}, such as --table 3")
    printed = _printed(number, measured, name)
    command = COMMANDS.get(number)
    made = f"Made here by `{command}`." if command else "Not made here; docs/paper.md says why."
    if printed is None:
        return f"Table {number} is not among those that are printed. {made}"
    cells = [tuple(map(_shown, row)) for row in printed.rows]
    return "\n\n".join([f"Table {number}. {printed.title}.", table(printed.header, cells), *printed.notes, made])


def _printed(number: int, measured: Mapping[Measure, float] | None, name: str) -> PrintedTable | None:
    if number == 3:
        return _overall(measured, name)
    if number == 4:
        rows = tuple((benchmark, *scores) for benchmark, scores in TABLE_4.items())
        return PrintedTable("Llama 2 70B beside closed models", ("benchmark", *CLOSED_MODELS), rows)
    if number == 27:
        return _margins()
    if number == 30:
        return _turns()
    if number in SAFETY_TABLES:
        return _safety(number)
    if number in (9, 10):
        return _corpus(number)
    return _scores(number, measured, name) if number in SCORE_TABLES else TABLES.get(number)


def _overall(measured: Mapping[Measure, float] | None, name: str) -> PrintedTable:
    """Table 3; the line of one's own has the averages of the groups whose every benchmark was measured."""
    rows: list[tuple[Cell, ...]] = [(model, *scores) for model, scores in TABLE_3.items()]
    if measured:
        results = {one.name: measured[one.measure] for one in SUITE if one.measure in measured}
        rows.append((name, *(_rounded(group_average(group, results)) for group in GROUPS)))
    means = " and ".join(str(mean) for mean in MISPRINTS.values())
    notes = (
        f"Llama 2's math at 7B and 13B is GSM8K alone; with MATH, as at 34B and 70B, it would be {means}.",
        "The paper's lines of MPT and Falcon are not kept here.",
    )
    return PrintedTable("Academic benchmarks in groups", ("model", *GROUPS.values()), tuple(rows), notes)


def _scores(number: int, measured: Mapping[Measure, float] | None, name: str) -> PrintedTable:
    title, benchmarks, group = SCORE_TABLES[number]
    columns = [measure for measure in SCORES if measure.benchmark in benchmarks]
    rows: list[tuple[Cell, ...]] = []
    for n, size in enumerate(SIZES):
        average = (paper_average(group, size),) if group else ()
        rows.append((f"Llama 2 {size}", *(SCORES[measure][n] for measure in columns), *average))
    if measured:
        own = {measure.benchmark: measured[measure] for measure in columns if measure in measured}
        average = (_rounded(group_average(group, own)),) if group else ()
        rows.append((name, *(_rounded(measured.get(measure)) for measure in columns), *average))
    header = ("model", *map(_column, columns), *(("average",) if group else ()))
    return PrintedTable(title, header, tuple(rows))


def _column(measure: Measure) -> str:
    (title,) = (one.title for one in SUITE if one.name == measure.benchmark)
    shots = "3-5" if measure.benchmark.startswith("agieval") else measure.shots
    return f"{title} ({shots}-shot, {measure.metric})"


def _safety(number: int) -> PrintedTable:
    title, columns, values = SAFETY_TABLES[number]
    models = [PaperModel(size, is_chat) for is_chat in (False, True) for size in SIZES]
    rows = tuple((f"Llama 2 {model}", *values.of(model)) for model in models)
    return PrintedTable(title, ("model", *columns), rows)


def _corpus(number: int) -> PrintedTable:
    if number == 10:
        rows = tuple(PAPER_LANGUAGES.items())
        return PrintedTable("Languages of the corpus", ("language", "% of documents"), rows)
    rows = []
    for group, (whole, members) in {**PAPER_PRONOUNS, **PAPER_DESCRIPTORS}.items():
        rows.append((group.replace("_", " "), whole))
        rows += [(f"- {member}", share) for member, share in members.items()]
    notes = ("A member's share is of the documents that its group counts.",)
    return PrintedTable("Pronouns and descriptors in the corpus", ("group", "% of documents"), tuple(rows), notes)


def _margins() -> PrintedTable:
    from llama_jax.training.preference_loss import LARGE_MARGINS, SMALL_MARGINS

    rows = tuple(
        (name, *(f"{margin:.3g}" for margin in margins))
        for name, margins in (("small", SMALL_MARGINS), ("large", LARGE_MARGINS))
    )
    return PrintedTable("Margins of the ranking loss", ("margin", *STRENGTHS), rows)


def _turns() -> PrintedTable:
    from llama_jax.evaluation.constraints import PAPER

    rows = tuple((str(turn), *(f"{share:.0%}" for share in shares)) for turn, shares in PAPER.items())
    return PrintedTable("Turns for which an instruction is held", ("turn", "baseline", "GAtt"), rows)


def _rounded(score: float | None) -> float | None:
    return None if score is None else round(score, 1)


def _shown(cell: Cell) -> str:
    return "-" if cell is None else f"{cell:,}" if isinstance(cell, int) else str(cell)
