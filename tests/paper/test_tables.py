"""The paper's numbers: what it prints twice agrees, averages reproduce, and the rest is as it was read a second time."""

from collections.abc import Iterator, Mapping

import pytest

from llama_jax import config
from llama_jax.errors import UserError
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
    nearest_size,
    paper_average,
    paper_value,
)
from llama_jax.evaluation.paper_studies import META_BATCHES, TABLES
from llama_jax.evaluation.paper_tables import COMMANDS, LAST_TABLE, table_as_text
from llama_jax.planning.carbon import footprint
from llama_jax.planning.hardware import V5P

REPRODUCIBLE = tuple(group for group in GROUPS if group != "bbh")  # which the paper has no tasks of
Scores = Mapping[Measure, tuple[float, ...]]


def printed(group: str, size: str) -> float:
    return TABLE_3[f"Llama 2 {size}"][list(GROUPS).index(group)]


def average(group: str, size: str, scores: Scores = SCORES) -> float:
    results = {one.name: scores[one.measure][SIZES.index(size)] for one in SUITE if one.measure in scores}
    return group_average(group, results)


def agrees(average: float, printed: float) -> bool:
    """Whether a number may be the other one, rounded to one digit; ties go either way, as what is averaged is rounded too."""
    return abs(average - printed) <= 0.05 + 1e-9


def is_a_share(percent: float, questions: int) -> bool:
    """Whether some number of right answers to so many questions is this, rounded to one digit."""
    return agrees(100 * round(percent / 100 * questions) / questions, percent)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("group", REPRODUCIBLE)
def test_averages_of_the_tasks_are_those_of_table_3(group, size):
    assert agrees(average(group, size), printed(group, size)) != ((group, size) in MISPRINTS)
    assert agrees(average(group, size), paper_average(group, size))


def test_math_is_gsm8k_alone_where_table_3_errs():
    assert set(MISPRINTS) == {("math", "7B"), ("math", "13B")}
    for (group, size), mean in MISPRINTS.items():
        assert printed(group, size) == paper_value("gsm8k", size, 8, "maj1@1")
        assert mean == pytest.approx(average(group, size))


def test_questions_weigh_in_mmlu_and_agieval_alone():
    """By hand: the plain means of the 70B are 69.475 and 53.325, which are not what the paper prints."""
    mmlu = (65.0 * 4705 + 58.0 * 3153 + 80.3 * 3077 + 74.6 * 3107) / 14042
    agieval = 23.2 * 254 + 48.8 * 651 + 25.7 * 230 + 70.2 * 510 + 76.6 * 269 + 86.9 * 206 + 53.4 * 206 + 41.8 * 220
    assert average("mmlu", "70B") == pytest.approx(mmlu) and agrees(mmlu, 68.9) and not agrees(69.475, 68.9)
    assert average("agieval", "70B") == pytest.approx(agieval / 2546) and not agrees(53.325, 54.2)
    assert {one.group for one in SUITE if one.questions} == {"mmlu", "agieval"}
    assert group_average("code", {"humaneval": 20.0, "mbpp": 40.0, "piqa": 0.0}) == 30.0
    assert group_average("code", {"humaneval": 20.0}) is None


def test_every_score_of_agieval_is_a_share_of_its_questions():
    for one in SUITE:
        if one.group == "agieval":
            assert all(is_a_share(score, one.questions) for score in SCORES[one.measure]), one.name


def mutants(group: str) -> Iterator[tuple[Measure, str, float, Scores]]:
    """The scores of a group with one of them wrong by a point, for each."""
    for one in SUITE:
        if one.group != group:
            continue
        for n, size in enumerate(SIZES):
            for wrong in (-1.0, 1.0):
                row = list(SCORES[one.measure])
                row[n] += wrong
                yield one.measure, size, wrong, {**SCORES, one.measure: tuple(row)}


def test_a_typo_in_any_task_of_a_group_is_caught():
    """But for two of 232: 206 questions of 2,546 move the 70B's average by less than its last digit."""
    tried, missed = 0, []
    questions = {one.measure: one.questions for one in SUITE if one.group == "agieval"}
    for group in REPRODUCIBLE:
        for measure, size, wrong, scores in mutants(group):
            tried += 1
            caught = not agrees(average(group, size, scores), paper_average(group, size))
            if measure in questions:
                caught |= not is_a_share(scores[measure][SIZES.index(size)], questions[measure])
            if not caught:
                missed.append((measure.benchmark, size, wrong))
    assert tried == 2 * 4 * sum(one.group in REPRODUCIBLE for one in SUITE)
    assert missed == [("agieval_sat_en", "70B", -1.0), ("agieval_sat_en_without_passage", "70B", -1.0)]


def test_table_4_repeats_the_70b():
    ours = {name: scores[CLOSED_MODELS.index("Llama 2 70B")] for name, scores in TABLE_4.items()}
    assert ours == {
        "MMLU (5-shot)": paper_average("mmlu", "70B"),
        "TriviaQA (1-shot)": paper_value("triviaqa", "70B", 1, "em"),
        "Natural Questions (1-shot)": paper_value("nq", "70B", 1, "em"),
        "GSM8K (8-shot)": paper_value("gsm8k", "70B", 8, "maj1@1"),
        "HumanEval (0-shot)": paper_value("humaneval", "70B", 0, "pass@1"),
        "BIG-Bench Hard (3-shot)": paper_value("bbh", "70B", 3, "em"),
    }
    assert [paper_value("bbh", size, 3, "em") for size in SIZES] == [printed("bbh", size) for size in SIZES]


# A second reading, in another order than the data's: what an average hides, and what none repeats.
READ_AGAIN = {
    "humaneval": "12.8 45.6; 18.3 60.2; 22.6 77.2; 29.9 89.0",
    "mbpp": "20.8 62.8; 30.6 69.0; 33.0 76.1; 45.0 81.4",
    "nq": "16.4 22.7 25.7 29.5; 16.1 28.0 31.2 34.6; 25.1 30.0 32.8 39.9; 25.3 33.0 39.5 44.3",
    "triviaqa": "65.8 68.9 72.1 73.7; 73.1 77.2 79.6 79.4; 81.0 83.3 84.5 84.6; 82.4 85.0 87.6 87.5",
    "squad": "67.2 72.3 72.6 72.5; 72.9 72.1 70.6 71.3; 77.4 78.8 77.5 77.5; 80.7 82.6 81.9 81.9",
    "quac": "39.4 39.7; 42.7 44.8; 42.9 44.4; 42.4 49.3",
}
# MMLU, Table 20, AGI Eval, GSM8K and MATH of each size; BBH stands in Table 3 alone.
SIZES_READ_AGAIN = {
    "7B": "42.9 36.4 51.2 52.2 77.4 78.8 48.3 77.2 69.2 75.2 45.9 58.6 57.8 23.2 31.0 23.9 22.4 32.7 43.2 37.4 28.2 14.6 2.5",
    "13B": "52.8 44.1 62.6 61.1 81.7 80.5 50.3 80.7 72.8 77.3 49.4 57.0 67.3 21.7 38.1 23.0 41.0 54.6 62.1 46.1 27.3 28.7 3.9",
    "34B": "59.4 52.1 71.8 69.2 83.7 81.9 50.9 83.3 76.7 79.4 54.5 58.2 74.3 19.3 40.7 21.3 47.5 62.1 77.2 49.0 32.7 42.2 6.24",
    "70B": "65.0 58.0 80.3 74.6 85.0 82.8 50.7 85.3 80.2 80.2 57.4 60.2 78.5 23.2 48.8 25.7 70.2 76.6 86.9 53.4 41.8 56.8 13.5",
}
# The other tables column after column, without those of text; Table 3, group after group.
COLUMNS_READ_AGAIN = {
    4: "70.0 57.1 48.1; 86.4 92.0 67.0; 69.3 81.4 29.3 56.5 26.2 52.3; 78.3 86.1 37.5 80.7 65.7; 68.9 85.0 33.0 56.8 29.9 51.2",
    6: "122387 43966 176625 13333 1038480 74882 33139 1418091 2919326; 3.0 3.0 1.0 1.0 1.0 1.0 1.0 3.9 1.6; "
    "251.5 152.5 371.1 237.2 440.2 338.3 123.3 798.5 595.7; 17.7 15.7 336.0 48.3 200.1 199.5 13.0 31.4 108.2; "
    "88.4 46.4 35.1 188.9 240.2 138.8 110.3 234.1 216.9",
    7: "52.8 53.8 58.6 56.2 63.2; 43.8 53.4 58.1 64.5 62.8; 66.8 67.7 55.4 72.0; 34.2 68.4 74.7 71.0; "
    "54.7 71.7 71.7 75.5; 75.7 55.0 65.2 80.0; 55.3 63.0 64.3 70.6",
    8: "94.3 89.9 64.6 80.7; 76.3 73.2 57.5 67.5; 65.7 63.8 53.8 60.9; 55.3 54.5 52.2 54.7; 64.5 62.8 56.2 63.2",
    15: "14.0 40.4 67.1; 10.0 29.4 69.2; 19.8 44.0 82.4",
    16: "0.21 17.26; 0.71 18.52; 26.1 29.6; 0.13 15.08; 0.01 3.55; 0.12 12.16; 11.76 16.33; 57.23 57.99; 62.89 64.46",
    17: "75.1 74.8; 25.5 25.5; 53.7 52.2; 4.9 6.5; 7.9 7.3",
    18: "71.0 70.6 69.4; 79.3 79.0 78.8; 48.2 47.9 48.6; 75.1 74.5 75.4; 71.2 71.6 72.1; 43.0 41.9 42.5; "
    "12.4 14.5 14.0; 44.7 42.8 46.2; 28.0 26.5 26.9; 4.9 4.8 5.3; 7.9 7.3 7.9",
    28: "79.1 80.4 80.7; 66.9 67.3 67.5; 59.8 60.4 60.5; 54.5 55.0 54.3; 62.5 63.0 62.9",
    29: "63.7 64.5; 93.0 94.3; 56.0 56.9; 59.5 59.9; 73.0 90.4",
    32: "1917 1869 1917 1917 1917; 2256 2143 1960 1293 1390",
}
TABLE_3_READ_AGAIN = (
    "14.1 18.9 26.0 30.7 16.8 24.5 27.8 37.5; 60.8 66.1 70.0 70.7 63.9 66.9 69.9 71.9; "
    "46.2 52.6 58.4 60.5 48.9 55.4 58.7 63.6; 58.5 62.3 67.6 68.6 61.3 65.8 68.0 69.4; "
    "6.95 10.9 21.4 30.8 14.6 28.7 24.2 35.2; 35.1 46.9 57.8 63.4 45.3 54.8 62.6 68.9; "
    "30.3 37.0 39.8 43.5 32.6 39.4 44.1 51.2; 23.9 33.9 41.7 47.6 29.3 39.1 43.4 54.2"
)


def numbers(text: str) -> list[list[float]]:
    return [[float(number) for number in part.split()] for part in text.split(";")]


@pytest.mark.parametrize("benchmark", READ_AGAIN)
def test_scores_by_shots_and_tries_are_as_read_again(benchmark):
    rows = [scores for measure, scores in SCORES.items() if measure.benchmark == benchmark]
    assert [list(column) for column in zip(*rows, strict=True)] == numbers(READ_AGAIN[benchmark])


@pytest.mark.parametrize("size", SIZES)
def test_scores_of_each_size_are_as_read_again(size):
    others = {*READ_AGAIN, "bbh"}
    scores = [row[SIZES.index(size)] for measure, row in SCORES.items() if measure.benchmark not in others]
    assert [scores] == numbers(SIZES_READ_AGAIN[size])


def test_other_tables_are_as_read_again():
    tables = {4: list(TABLE_4.values()), **{number: [row[1:] for row in one.rows] for number, one in TABLES.items()}}
    for number, text in COLUMNS_READ_AGAIN.items():
        columns = [[cell for cell in column if cell is not None] for column in zip(*tables[number], strict=True)]
        assert columns == numbers(text), f"Table {number}"
    assert [list(column) for column in zip(*TABLE_3.values(), strict=True)] == numbers(TABLE_3_READ_AGAIN)


def test_sums_of_the_preference_tables():
    """Meta's batches are its comparisons; the total over data sets is not what its table prints."""
    comparisons = {name: count for name, count, *_ in TABLES[6].rows}
    assert sum(META_BATCHES) == comparisons["Meta"] and list(META_BATCHES) == sorted(META_BATCHES)
    total = comparisons.pop("total")
    assert (sum(comparisons.values()), total) == (2_920_903, 2_919_326)
    assert "2,920,903" in table_as_text(6)


def test_tables_of_reward_models_repeat_each_other():
    """Accuracies on Meta's sets stand in Tables 7 and 8."""
    accuracy = {row[0]: row[1:] for row in TABLES[7].rows}
    by_strength = {row[0]: row[-1] for row in TABLES[8].rows}
    for model in ("Safety RM", "Helpfulness RM"):
        both = (by_strength[f"{model} on Meta Helpful"], by_strength[f"{model} on Meta Safety"])
        assert accuracy[model][:2] == both


def test_hours_and_watts_of_table_2_are_its_carbon():
    *sizes, (_, hours, _, tonnes) = TABLES[2].rows
    assert sum(row[1] for row in sizes) == hours and sum(row[3] for row in sizes) == pytest.approx(tonnes, abs=0.05)
    for _, hours, watts, tonnes in sizes:
        assert footprint(V5P, hours, watts=watts).tonnes == pytest.approx(tonnes, rel=1e-3)


def test_table_1_is_what_the_presets_are():
    for family, size, context, grouped, *_ in TABLES[1].rows:
        preset = getattr(config, f"{family.upper().replace(' ', '')}_{size}")
        assert context == f"{preset.context_length // 1024}k"
        assert grouped == ("yes" if preset.n_kv_heads < preset.n_heads else "no")


def test_every_benchmark_of_the_suite_has_its_value_in_the_paper():
    """But for word problems, which Table 15 has with tools alone."""
    for one in SUITE:
        value = paper_value(one.name, "13B", one.shots, one.metric)
        assert (value is None) == (one.group == "word problems"), one.name
    assert paper_value("piqa", "13B", 0, "acc") == 80.5
    assert paper_value("piqa", "13B", 5, "acc") is None
    assert {one.group for one in SUITE} == {*GROUPS, "word problems"}
    assert len({one.name for one in SUITE}) == len(SUITE)
    assert {measure.benchmark for measure in SCORES} <= {one.name for one in SUITE}


def test_the_nearest_size_goes_by_ratio():
    exact = {"7B": 6_738_415_616, "13B": 13_015_864_320, "34B": 33_743_970_304, "70B": 68_976_648_192}
    assert {size: nearest_size(count) for size, count in exact.items()} == {size: size for size in exact}
    assert nearest_size(260_000) == "7B" and nearest_size(405_000_000_000) == "70B"
    # Between 34B and 70B the halves meet at 51.4B, the ratios at 48.2B.
    assert (nearest_size(48_000_000_000), nearest_size(48_500_000_000)) == ("34B", "70B")


def cells(text: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]


def test_table_3_as_text_with_a_line_of_ones_own():
    measured = {one.measure: 10.0 for one in SUITE if one.name != "quac"} | {Measure("mbpp", 3, "pass@1"): 25.08}
    header, _, *rows = cells(table_as_text(3, measured, "runs/mine"))
    assert header == ["model", *GROUPS.values()]
    assert rows[7] == ["Llama 2 70B", "37.5", "71.9", "63.6", "69.4", "35.2", "68.9", "51.2", "54.2"]
    assert rows[8:] == [["runs/mine", "17.5", "10.0", "10.0", "-", "10.0", "10.0", "10.0", "10.0"]]
    assert "8.55 and 16.3" in table_as_text(3) and len(cells(table_as_text(3))) == 2 + 8


def test_tables_of_tasks_as_text_keep_shots_apart():
    header, _, *rows = cells(table_as_text(22, {Measure("nq", 5, "em"): 1.25}))
    assert header[3] == "Natural Questions (5-shot, em)" and rows[1][:5] == [
        "Llama 2 13B",
        "16.1",
        "28.0",
        "31.2",
        "34.6",
    ]
    assert rows[4] == ["measured", "-", "-", "1.2", *["-"] * 5]
    header, _, *rows = cells(table_as_text(24))
    assert header[1] == "AQuA-RAT (3-5-shot, acc)" and rows[3][-1] == "54.2"
    stem = {one.measure: 50.0 if one.name == "mmlu_stem" else 40.0 for one in SUITE}
    # 40 and 10 more in 3,153 of 14,042 questions.
    assert cells(table_as_text(19, stem))[-1] == ["measured", "40.0", "50.0", "40.0", "40.0", "42.2"]
    header, _, *rows = cells(table_as_text(20))
    assert header[1] == "BoolQ (0-shot, acc)" and rows[0][1:3] == ["77.4", "78.8"]


def test_tables_whose_numbers_the_code_has_elsewhere():
    assert cells(table_as_text(27))[2:] == [["small", "1", "0.667", "0.333", "0"], ["large", "3", "2", "1", "0"]]
    assert cells(table_as_text(30))[3] == ["4", "10%", "100%"]
    assert cells(table_as_text(44))[-1] == ["Llama 2 70B chat", "64.14", "67.07", "97.06"]
    header, _, *rows = cells(table_as_text(47))
    assert header[1:] == ["American_actors", "American_actresses"] and rows[0][1:] == ["0.29", "0.42"]
    assert ["- she", "28.45"] in cells(table_as_text(9)) and ["en", "89.7"] in cells(table_as_text(10))


def test_any_table_can_be_asked_for_and_names_its_command():
    with_numbers = {*range(1, 5), *range(6, 11), *range(15, 31), 32, *range(44, 51)}
    for number in range(1, LAST_TABLE + 1):
        text = table_as_text(number)
        assert bool(cells(text)) == (number in with_numbers), number
        assert (f"`{COMMANDS[number]}`" if number in COMMANDS else "Not made here") in text
    for number in (0, LAST_TABLE + 1):
        with pytest.raises(UserError, match=f"no table {number}; the paper's are 1 to 52"):
            table_as_text(number)
