"""The table of generations: names mean what the cloud means by them, and the flags are those the compiler takes."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from llama_jax.errors import UserError
from llama_jax.planning.hardware import CHIPS
from tpu_setup.generations import load_table, locked_libtpu

ROOT = Path(__file__).resolve().parents[2]
TABLE = load_table()


@pytest.mark.parametrize(
    ("text", "accelerator", "topology", "chips", "hosts", "machine"),
    [
        ("v5e-16", "v5litepod-16", "4x4", 16, 4, "ct5lp-hightpu-4t"),
        ("v5litepod-256", "v5litepod-256", "16x16", 256, 64, "ct5lp-hightpu-4t"),
        ("v5e-8", "v5litepod-8", "2x4", 8, 1, "ct5lp-hightpu-8t"),
        ("v5e:1x1", "v5litepod-1", "1x1", 1, 1, "ct5lp-hightpu-1t"),
        ("v4-128", "v4-128", "4x4x4", 64, 16, "ct4p-hightpu-4t"),
        ("v5p-128", "v5p-128", "4x4x4", 64, 16, "ct5p-hightpu-4t"),
        ("v5p:8x8x8", "v5p-1024", "8x8x8", 512, 128, "ct5p-hightpu-4t"),
        ("V6E-256", "v6e-256", "16x16", 256, 64, "ct6e-standard-4t"),
        ("tpu7x-128", "tpu7x-128", "4x4x4", 64, 16, "tpu7x-standard-4t"),
        ("v5p:4x4x12", None, "4x4x12", 192, 48, "ct5p-hightpu-4t"),
    ],
)
def test_names_mean_what_the_cloud_means(text, accelerator, topology, chips, hosts, machine):
    one = TABLE.find(text)
    assert (one.accelerator_type, one.topology, one.chips, one.hosts) == (accelerator, topology, chips, hosts)
    assert one.machine_type == machine


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("v9-16", ["v4, v5e, v5p, v6e, v7x", "v5p:4x4x4"]),
        ("v5e", ["GENERATION-NUMBER"]),
        ("v5e-17", ["v5litepod-16 (4x4)", "v5litepod-256 (16x16)"]),
        ("v5p-127", ["v5p-128 (4x4x4)"]),
        ("v5p:4x4", ["3 sides", "4x4x4"]),
        ("v5p:1x1x3", ["whole hosts"]),
        ("v5p:0x4x4", ["whole hosts"]),
    ],
)
def test_what_is_no_slice_is_refused_with_what_is(text, names):
    with pytest.raises(UserError) as error:
        TABLE.find(text)
    assert all(name in str(error.value) for name in names)


def test_every_generation_is_a_chip_whose_peaks_are_known():
    assert set(TABLE.generations) <= {chip.name for chip in CHIPS}


def test_flags_that_a_version_of_libtpu_refuses_are_absent():
    """0.0.50.1 ends compiles with collective fusion everywhere but on v5e; 0.0.42.1 takes it."""
    fusion = "--xla_tpu_enable_async_collective_fusion=true"
    for generation in ("v4", "v5p", "v6e", "v7x"):
        assert fusion not in TABLE.libtpu_args(generation, "0.0.50.1")
    assert fusion in TABLE.libtpu_args("v5e", "0.0.50.1")
    assert fusion in TABLE.libtpu_args("v5p", "0.0.42.1") and fusion in TABLE.libtpu_args("v6e", "0.0.49")
    assert "scoped_vmem_limit_kib=98304" in TABLE.libtpu_args("v6e", "0.0.50.1")


def test_versions_are_numbers_not_text():
    assert TABLE.libtpu_args("v5p", "0.0.100") == TABLE.libtpu_args("v5p", "0.0.50")
    with pytest.raises(UserError, match="--libtpu 0.0.42.1"):
        TABLE.libtpu_args("v5p", "newest")


def test_several_slices_end_when_one_hangs():
    assert "--megascale_abort_on_hangs=true" in TABLE.libtpu_args("v5e", "0.0.42.1", slices=2)
    assert "megascale" not in TABLE.libtpu_args("v5e", "0.0.42.1")


def test_a_file_is_laid_over_the_table_key_by_key(tmp_path):
    over = tmp_path / "over.toml"
    over.write_text('[generations.v5e]\nruntime_version = "v3"\n[flag_groups]\ndata_parallel = ["--mine"]\n')
    table = load_table(str(over))
    assert table.generations["v5e"]["runtime_version"] == "v3"
    assert table.generations["v5e"]["accelerator"] == "v5litepod"
    assert table.libtpu_args("v5p", "0.0.50").startswith("--mine ")
    over.write_text("[generations")
    with pytest.raises(UserError, match=r"over\.toml cannot be read.*generations\.toml shows the form"):
        load_table(str(over))


def test_the_hosts_flags_are_those_of_the_libtpu_that_the_lock_installs():
    assert locked_libtpu(ROOT / "requirements.lock") == version("libtpu")


# A sharded gather in a scanned layer: what collective fusion is about, at the least size.
COMPILE = """
import sys, jax, jax.numpy as jnp, numpy as np
from jax.experimental.topologies import get_topology_desc
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
devices = get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices
mesh = Mesh(np.array(devices), ("fsdp",))
def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P(*(None,) * (len(shape) - 2), "fsdp")))
def layer(x, w):
    return jnp.tanh(x @ jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))), None
def loss(w, x):
    return jax.lax.scan(layer, x, w)[0].astype(jnp.float32).sum()
jax.jit(jax.grad(loss)).lower(array(2, 1024, 1024), array(1024, 1024)).compile()
"""


def compile_under(flags: str, topology: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"LIBTPU_INIT_ARGS": flags, "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    words = [sys.executable, "-W", "ignore", "-c", COMPILE, topology]
    return subprocess.run(words, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("generation", ["v5p", "v6e"])
def test_the_compiler_takes_the_flags(generation):
    """The two whose flags depend on the version of libtpu; a flag that it does not know or refuses ends the compile."""
    topology = {"v5p": "v5p:2x2x2", "v6e": "v6e:4x4"}[generation]
    flags = TABLE.libtpu_args(generation, version("libtpu"), slices=2)
    result = compile_under(flags, topology)
    assert result.returncode == 0, result.stderr[-1000:]
