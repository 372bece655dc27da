"""Shares, means and their intervals: against scipy, and by how often they hold the truth."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from llama_jax.evaluation.comparisons import Comparison, Line, mean_line, mean_over, percent_line
from llama_jax.evaluation.intervals import wilson
from llama_jax.evaluation.safety_paper_values import PaperModel


def test_a_mean_has_the_normal_interval_of_its_standard_error():
    values = [0.3, -0.2, 0.9, 0.1, 0.15]
    line = mean_line("x", values, paper=0.2)
    low, high = stats.norm.interval(0.95, loc=np.mean(values), scale=stats.sem(values))
    assert (line.value, line.low, line.high) == pytest.approx((np.mean(values), low, high), abs=1e-12)
    assert mean_line("x", [0.5]) == Line("x", 1, 0.5) and mean_line("x", []) == Line("x", 0, None)


def test_one_group_alone_is_its_own_mean():
    line = percent_line("a", [True, False, False, True, False])
    over = mean_over("a", [line])
    assert (over.n, over.value) == (5, line.value)
    assert (over.low, over.high) == pytest.approx((line.low, line.high), abs=1e-12)


def test_groups_weigh_the_same_whatever_their_size_and_empty_ones_nothing():
    lines = [percent_line("a", [True] * 2), percent_line("b", [False] * 98), percent_line("c", [])]
    over = mean_over("mean", lines, paper=7.0)
    assert over.value == 50 and over.n == 100 and over.paper == 7.0
    assert mean_over("mean", lines[2:]) == Line("mean", 0, None)


def test_the_interval_of_a_mean_over_groups_has_a_width_at_zero_and_holds_the_truth():
    none = mean_over("mean", [percent_line("a", [False] * 100)] * 13)
    assert none.value == none.low == 0 and none.high == pytest.approx(100 * wilson(0, 100)[1] / math.sqrt(13))
    rng = np.random.default_rng(0)
    shares = np.linspace(0.02, 0.4, 13)
    held = 0
    for _ in range(1000):
        hits = rng.binomial(60, shares)
        line = mean_over("mean", [percent_line("", [True] * k + [False] * (60 - k)) for k in hits.tolist()])
        held += line.low <= 100 * shares.mean() <= line.high
    assert 0.93 <= held / 1000 <= 0.97


def test_a_table_says_what_is_known_and_leaves_the_rest_empty():
    lines = (percent_line("some", [True, False, False, False], 30.0), percent_line("none", []), Line("bare", 1, 2.0))
    one = Comparison("Title", "toxic, %", 2, PaperModel("13B", True), lines, ("a note",))
    assert one.markdown().splitlines() == [
        "## Title",
        "",
        "|  | n | toxic, % | 95% interval | paper, 13B chat | difference |",
        "| --- | --- | --- | --- | --- | --- |",
        "| some | 4 | 25.00 | 4.56 to 69.94 | 30.00 | -5.00 |",
        "| none | 0 |  |  |  |  |",
        "| bare | 1 | 2.00 |  |  |  |",
        "",
        "- a note",
    ]
    read = json.loads(json.dumps(one.as_json(), allow_nan=False))
    assert read["paper_model"] == "13B chat" and read["lines"][0]["value"] == 25.0 and read["lines"][1]["value"] is None
