"""What is said when a program does not fit, and when there is no compiler."""

import importlib.util

import pytest

from llama_jax.errors import UserError
from llama_jax.planning.compiling import ENVIRONMENT, parse_refusal, prepare_environment

GIB = 2**30


@pytest.mark.parametrize(
    ("message", "asked", "available"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (19.53G) exceeds "
            "available HBM (15.75G).",
            19.53 * GIB,
            15.75 * GIB,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.11G of 15.75G hbm. Exceeded hbm capacity by 4.36G.",
            20.11 * GIB,
            15.75 * GIB,
        ),
        ("RESOURCE_EXHAUSTED: something new\nand more", 0, 0),
    ],
)
def test_a_refusal_says_how_much_was_asked(message, asked, available):
    refused = parse_refusal(message)
    assert (refused.asked, refused.available) == (pytest.approx(asked), pytest.approx(available))
    assert refused.message == message.splitlines()[0]


def test_the_environment_lets_two_plans_run_and_looks_for_no_tpu():
    environment = {"JAX_PLATFORMS": "tpu", "TPU_MIN_LOG_LEVEL": "0"}
    prepare_environment(environment)
    assert environment == ENVIRONMENT | {"TPU_MIN_LOG_LEVEL": "0"}
    assert environment["ALLOW_MULTIPLE_LIBTPU_LOAD"] == environment["TPU_SKIP_MDS_QUERY"] == "1"
    assert environment["JAX_PLATFORMS"] == "cpu"


def test_without_libtpu_the_command_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"-m pip install 'jax\[tpu\]'"):
        prepare_environment({})
