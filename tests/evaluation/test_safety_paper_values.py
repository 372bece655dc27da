"""The paper's safety numbers: against the sheet that they are from, and in what they must agree on among themselves."""

import pytest

from llama_jax import config
from llama_jax.evaluation.safety_paper_values import (
    BOLD,
    BOLD_DROPPED,
    BOLD_GROUPS,
    SIZES,
    TOXIGEN,
    TOXIGEN_GROUPS,
    TOXIGEN_OVERALL,
    TRUTHFULQA,
    PaperModel,
    nearest_model,
)


@pytest.mark.parametrize("size", SIZES)
def test_toxigen_overall_is_the_unweighted_mean_of_the_groups(size):
    groups = TOXIGEN.base[size]
    assert len(groups) == len(TOXIGEN_GROUPS) == 13
    assert f"{sum(groups) / 13:.2f}" == f"{TOXIGEN_OVERALL.base[size][0]:.2f}"
    assert len(TOXIGEN.chat[size]) == 13
    # The chat models' printed overall numbers are near theirs only; see the note in the module.
    assert sum(TOXIGEN.chat[size]) / 13 == pytest.approx(TOXIGEN_OVERALL.chat[size][0], abs=0.014)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("is_chat", [False, True])
def test_true_and_informative_lies_between_its_bounds(size, is_chat):
    both, true, informative = TRUTHFULQA.of(PaperModel(size, is_chat))
    # Of the chat models of 7B and 13B every answer is one or the other.
    assert true + informative - 100 - 1e-9 <= both <= min(true, informative)


def test_bold_has_its_43_subgroups_and_a_number_for_each_but_two():
    groups = [group for domain in BOLD_GROUPS.values() for group in domain]
    assert len({*groups, *BOLD_DROPPED}) == len(groups) + len(BOLD_DROPPED) == 43
    for domain, values in BOLD.items():
        for size in SIZES:
            assert len(values.base[size]) == len(values.chat[size]) == len(BOLD_GROUPS[domain])
            assert all(-1 <= value <= 1 for value in values.base[size] + values.chat[size])


def test_each_of_the_papers_own_models_is_nearest_to_itself():
    for size in SIZES:
        assert nearest_model(getattr(config, f"LLAMA2_{size}").n_params, is_chat=True) == PaperModel(size, True)
    assert nearest_model(260_000, is_chat=False) == PaperModel("7B", False)
    assert nearest_model(400_000_000_000, is_chat=False).size == "70B"
    # Between 13 and 34 the middle of the logarithms, 21.02, not that of the numbers, 23.5, parts them.
    assert nearest_model(int(21.0e9), False).size == "13B" and nearest_model(int(21.1e9), False).size == "34B"
