"""Reading a mesh, refusing one that does not fit with the sizes that would, and laying batches on it."""

import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax.parallel.mesh as mesh_module
from llama_jax.config import LLAMA2_7B, LLAMA2_13B, LLAMA2_70B
from llama_jax.errors import UserError
from llama_jax.parallel.mesh import (
    MESH_AXES,
    RULES,
    batch_rows_of_process,
    check_divides,
    compiler_options,
    format_mesh,
    gathered,
    global_array,
    make_mesh,
    mesh_sizes,
    mesh_sizes_of,
    parse_mesh,
    per_device,
    platform,
    sharding,
    ways,
)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("auto", (1, 8, 1, 1)),
        ("fsdp=8", (1, 8, 1, 1)),
        ("tensor=4,fsdp=2", (1, 2, 1, 4)),
        ("data=2, fsdp=-1, tensor=2", (2, 2, 1, 2)),
        ("context=-1", (1, 1, 8, 1)),
    ],
)
def test_a_mesh_is_read(text, sizes):
    assert tuple(parse_mesh(text, 8).values()) == sizes
    assert mesh_sizes(make_mesh(text)) == dict(zip(MESH_AXES, sizes, strict=True))


@pytest.mark.parametrize("text", ["data=2,fsdp=4", "tensor=8", "data=1"])
def test_a_mesh_is_written_as_it_is_read(text):
    assert format_mesh(parse_mesh(text, 1 if text == "data=1" else 8)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fspd=8", r"cannot read 'fspd=8'; expected 'auto' or AXIS=SIZE .* data, fsdp, context, tensor"),
        ("fsdp=0", "cannot read 'fsdp=0'"),
        ("fsdp:8", "cannot read 'fsdp:8'"),
        ("", "cannot read ''"),
        ("data=-1,fsdp=-1", "only one axis may be -1, found data, fsdp"),
        ("fsdp=3", "asks for 3 devices, but 8 are present; try --mesh auto"),
        ("fsdp=1", "asks for 1 device, but 8 are present"),
        ("fsdp=-1,tensor=3", "asks for 3 devices or a multiple, but 8 are present"),
    ],
)
def test_a_mesh_that_cannot_be_read_or_does_not_fit_says_why(text, message):
    with pytest.raises(UserError, match=message):
        parse_mesh(text, 8)


def test_forty_heads_do_not_divide_over_sixteen():
    with pytest.raises(
        UserError, match=r"n_heads 40 does not divide over tensor = 16 devices; tensor may be one of \[1, 2, 4, 8\]"
    ):
        check_divides(parse_mesh("fsdp=2,tensor=16", 32), LLAMA2_13B)
    check_divides(parse_mesh("fsdp=4,tensor=8", 32), LLAMA2_13B)


@pytest.mark.parametrize(
    ("mesh_text", "arguments", "message"),
    [
        ("tensor=16", {}, r"n_kv_heads 8 does not divide .* \[1, 2, 4, 8\]"),
        (
            "fsdp=16",
            {"rows": 24},
            r"sequences in a micro-batch 24 does not divide over data\*fsdp = 16 .* \[1, 2, 4, 8\]",
        ),
        ("context=16", {"length": 1000}, r"sequence length 1000 does not divide over context = 16 .* \[1, 2, 4, 8\]"),
    ],
)
def test_what_does_not_divide_is_named_with_the_sizes_that_would(mesh_text, arguments, message):
    with pytest.raises(UserError, match=message):
        check_divides(parse_mesh(mesh_text, 16), LLAMA2_70B, **arguments)


@pytest.mark.parametrize("mesh_text", ["fsdp=32", "tensor=32", "data=2,fsdp=4,context=2,tensor=2"])
def test_the_7b_divides_over_the_usual_meshes(mesh_text):
    check_divides(parse_mesh(mesh_text, 32), LLAMA2_7B, rows=32, length=4096)


def test_every_rule_names_axes_of_the_mesh_and_no_array_uses_one_twice():
    assert all(axis in MESH_AXES for axes in RULES.values() for axis in axes)
    mesh = make_mesh("data=1,fsdp=2,context=2,tensor=2")
    for axes in [("layer", "embed", "heads", "head_dim"), ("vocab", "embed"), ("batch", "length", "heads", "head_dim")]:
        sharding(mesh, *axes)  # raises where an axis of the mesh comes twice


@pytest.mark.parametrize("mesh_text", ["auto", "data=2,fsdp=2,tensor=2", "data=2,context=4", "tensor=8"])
def test_a_global_batch_round_trips(mesh_text):
    mesh = make_mesh(mesh_text)
    rows = np.arange(16 * 12, dtype=np.int32).reshape(16, 12)
    assert batch_rows_of_process(mesh, 16) == slice(0, 16)
    array = global_array(mesh, rows, "batch", "length", rows=16)
    np.testing.assert_array_equal(array, rows)
    ways_of_rows = math.prod(mesh_sizes(mesh)[axis] for axis in RULES["batch"])
    assert array.addressable_shards[0].data.shape == (16 // ways_of_rows, 12 // mesh_sizes(mesh)["context"])


class FeignedDevice:
    """A device of some process, laid out as a real one."""

    def __init__(self, process_index: int):
        self.process_index = process_index


@pytest.mark.parametrize(("mesh_text", "expected"), [("data=2,fsdp=4", slice(8, 16)), ("context=8", slice(0, 16))])
def test_a_process_provides_the_rows_of_its_own_devices(mesh_text, expected, monkeypatch):
    real = make_mesh(mesh_text)
    feigned = [
        FeignedDevice(process_index=i // 4) for i in range(8)
    ]  # two processes of four devices; this is the second
    indices = [sharding(real, "batch").devices_indices_map((16,))[d] for d in real.devices.flat]
    layout = SimpleNamespace(devices_indices_map=lambda shape: dict(zip(feigned, indices, strict=True)))
    monkeypatch.setattr(mesh_module, "sharding", lambda mesh, *axes: layout)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert batch_rows_of_process(SimpleNamespace(devices=np.array(feigned)), 16) == expected


def test_each_device_runs_a_kernel_on_its_own_part():
    mesh = make_mesh("data=2,fsdp=2,context=2")
    x = np.arange(8 * 6, dtype=np.float32).reshape(8, 6)
    seen = []

    def double(part):
        seen.append(part.shape)
        return 2 * part

    spec = sharding(mesh, "batch", "length").spec
    np.testing.assert_array_equal(per_device(double, in_specs=(spec,), out_specs=spec)(x), 2 * x)
    with jax.set_mesh(mesh):
        assert (ways("batch"), ways("length"), ways("heads"), platform()) == (4, 2, 1, "cpu")
        np.testing.assert_array_equal(jax.jit(per_device(double, in_specs=(spec,), out_specs=spec))(x), 2 * x)
    assert seen == [(8, 6), (2, 3)]
    assert ways("batch") == 1


def devices_of_slices(slices: int, chips: int) -> list:
    """Fake TPU devices in a line, slice by slice."""
    return [
        SimpleNamespace(
            platform="tpu",
            device_kind="TPU v5 lite",
            id=n,
            process_index=n // 4,
            slice_index=n // chips,
            coords=(n % chips, 0, 0),
            core_on_chip=0,
        )
        for n in range(slices * chips)
    ]


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("auto", (2, 8, 1, 1)),
        ("data=4,fsdp=-1", (4, 4, 1, 1)),
        ("data=2,fsdp=4,tensor=2", (2, 4, 1, 2)),
    ],
)
def test_slices_lie_along_data(text, sizes, monkeypatch):
    """Only `data`, whose devices exchange gradients and nothing else, spans two slices: each of its parts lies within one."""
    kept = []
    monkeypatch.setattr(mesh_module, "Mesh", lambda devices, axes, axis_types: kept.append(devices))
    make_mesh(text, devices_of_slices(2, 8))
    (laid,) = kept
    assert laid.shape == sizes
    slices = np.vectorize(lambda device: device.slice_index)(laid)
    assert (slices == np.sort(slices, axis=0)).all() and all(len(np.unique(part)) == 1 for part in slices)


@pytest.mark.parametrize(
    ("slices", "text"), [(1, "fsdp=32,context=2"), (1, "fsdp=8,tensor=8"), (2, "data=2,fsdp=32,tensor=2")]
)
def test_an_axis_may_end_within_a_dimension_of_a_slice(slices, text, monkeypatch):
    """Of 4x4x4 chips: pairs of neighbours, and eights of 4x2."""
    devices = [
        SimpleNamespace(**vars(device) | {"device_kind": "TPU v5p", "coords": (n % 4, n // 4 % 4, n // 16 % 4)})
        for n, device in enumerate(devices_of_slices(slices, 64))
    ]
    kept = []
    monkeypatch.setattr(mesh_module, "Mesh", lambda devices, axes, axis_types: kept.append(devices))
    make_mesh(text, devices)
    (laid,) = kept
    assert laid.shape == tuple(mesh_sizes_of(text, 64 * slices, slices).values())
    assert sorted(device.id for device in laid.flat) == list(range(64 * slices))
    groups = np.array([device.coords for device in laid.flat]).reshape(-1, max(laid.shape[2:]), 3)
    extents = np.ptp(groups, axis=1).sum(1)  # in links, from corner to corner
    assert (extents == {2: 1, 8: 4}[groups.shape[1]]).all()


def test_slices_that_data_does_not_span_are_refused():
    with pytest.raises(UserError, match="mesh fsdp=16: data must be a multiple of the 2 slices, which it spans"):
        make_mesh("fsdp=16", devices_of_slices(2, 8))


def test_a_weight_is_whole_where_it_is_multiplied_and_its_gradient_is_not():
    """A constraint alone would have the gradient's transposed to itself: summed whole on every device."""
    with jax.set_mesh(make_mesh("fsdp=4,tensor=2")):

        def loss(w_DF):
            return (jnp.ones((4, 8)) @ gathered(w_DF, ("embed", "ffn"))).sum()

        text = str(jax.make_jaxpr(jax.grad(loss))(jnp.ones((8, 8))))
    forward, backward = re.findall(r"sharding_constraint\[.*?spec=P\((.*?)\)\)\n", text, re.S)
    assert (forward, backward) == ("None, 'tensor'", "('fsdp', 'context'), 'tensor'")


def test_what_the_compiler_is_told_on_hosts_of_gpus_and_what_is_left_to_the_user(monkeypatch):
    def options(platform, hosts):
        devices = [SimpleNamespace(platform=platform, process_index=host) for host in range(hosts) for _ in range(8)]
        return compiler_options(SimpleNamespace(devices=np.array(devices)))

    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_pipelined_all_reduce=false")
    assert options("gpu", 2) == {
        "xla_gpu_enable_pipelined_all_gather": True,
        "xla_gpu_enable_pipelined_reduce_scatter": True,
        "xla_gpu_enable_while_loop_double_buffering": True,
    }
    assert options("gpu", 1) == options("tpu", 2) == options("cpu", 2) == {}
