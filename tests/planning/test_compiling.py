"""What is said when a program does not fit, and when there is no compiler."""

import importlib.util

import jax
import pytest

from llama_jax.errors import UserError
from llama_jax.planning.compiling import ENVIRONMENT, compile_for, parse_refusal, prepare_environment
from llama_jax.planning.hardware import H100, V5E

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
    prepare_environment(V5E, environment)
    assert environment == ENVIRONMENT | {"TPU_MIN_LOG_LEVEL": "0"}
    assert environment["ALLOW_MULTIPLE_LIBTPU_LOAD"] == environment["TPU_SKIP_MDS_QUERY"] == "1"
    assert environment["JAX_PLATFORMS"] == "cpu"


@pytest.mark.parametrize(("chip", "extra"), [(V5E, "tpu"), (H100, "cuda12")])
def test_without_its_compiler_the_command_is_named(monkeypatch, chip, extra):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"-m pip install 'jax\[{extra}\]'"):
        prepare_environment(chip, {})


def test_without_cudnn_the_command_and_another_attention_are_named():
    class Step:
        def lower(self, *arguments):
            raise RuntimeError("cuDNN not found.")

    with pytest.raises(UserError, match=r"pip install 'jax\[cuda12\]'; or --compute.attention xla"):
        compile_for(Step(), jax.make_mesh((1,), ("fsdp",)), ())
