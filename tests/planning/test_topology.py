"""Topologies: both ways of naming a slice, and what is said to a name that is none."""

import pytest

from llama_jax.errors import UserError
from llama_jax.planning.topology import SHAPES, parse_topology


@pytest.mark.parametrize(
    ("text", "name", "chips"),
    [
        ("v5p:8x8x8", "v5p:8x8x8", 512),
        ("v5p-1024", "v5p:8x8x8", 512),  # v5p and v4 count cores, two a chip
        ("v5p-128", "v5p:4x4x4", 64),
        ("v4-8", "v4:2x2x1", 4),
        ("v5litepod-256", "v5e:16x16", 256),  # v5e and v6e count chips
        ("v5e-16", "v5e:4x4", 16),
        ("V6E-256", "v6e:16x16", 256),
        ("v5p:4x4x12", "v5p:4x4x12", 192),  # whole cubes that no list names
    ],
)
def test_a_slice_is_named_by_its_shape_or_by_its_count(text, name, chips):
    topology = parse_topology(text)
    assert (topology.name, topology.chips) == (name, chips)


def test_slices_multiply_chips_and_nothing_else():
    two = parse_topology("v5p:4x4x4", 2)
    assert (two.name, two.chips, str(two)) == ("v5p:4x4x4", 128, "2 slices of v5p:4x4x4, 128 chips")


@pytest.mark.parametrize(
    ("text", "name", "chips", "hosts"),
    [
        ("h200:1", "h200:1", 1, 1),
        ("H100:8", "h100:8", 8, 1),
        ("a100:3", "a100-80gb:3", 3, 1),
        ("h100:32", "h100:32", 32, 4),  # hosts of eight
    ],
)
def test_gpus_are_named_by_their_count(text, name, chips, hosts):
    topology = parse_topology(text)
    assert (topology.name, topology.chips, topology.hosts, topology.slices) == (name, chips, hosts, 1)


@pytest.mark.parametrize(
    ("text", "slices", "message"),
    [
        ("h100:12", 1, "N of 1 to 8 GPUs of a host, or a multiple of 8"),
        ("h100", 1, "expected h100:N"),
        ("h100:0", 1, "expected h100:N"),
        ("h100:2x4", 1, "expected h100:N"),
        ("t4:16", 1, "expected t4:N with N of 1 to 8 GPUs of a host$"),  # their hosts' network is not known
        ("h100:8", 2, "--slices is for TPUs; --topology h100:16"),
    ],
)
def test_gpus_that_no_hosts_have_are_refused(text, slices, message):
    with pytest.raises(UserError, match=message):
        parse_topology(text, slices)


@pytest.mark.parametrize("text", ["v9:2x2", "v5p", "4x4x4", "v5e-16x", "h100-8"])
def test_an_unknown_chip_is_refused_with_all_that_are_known(text):
    with pytest.raises(UserError) as caught:
        parse_topology(text)
    assert all(f"{chip}: {shapes[0]} (" in str(caught.value) for chip, shapes in SHAPES.items())


@pytest.mark.parametrize(
    "text", ["v5p:3x3x3", "v5e:4x8x8", "v5e:32x32", "v5p-7", "v5p-4096x", "v5p:16x16x32", "v5p:0x4x4"]
)
def test_an_unknown_shape_is_refused_with_those_of_its_chip(text):
    with pytest.raises(UserError, match=r"4x4") as caught:
        parse_topology(text)
    assert "v5litepod" not in str(caught.value)


def test_no_slices_is_refused():
    with pytest.raises(UserError, match="--slices is 0; it must be 1 or more"):
        parse_topology("v5e:4x4", 0)


def test_which_directions_are_rings():
    """v5e and v6e close at 16, v4 and v5p in whole cubes."""
    closes = {text: parse_topology(text).closes for text in ("v5e:8x16", "v6e:16x16", "v5p:2x2x4", "v4:4x4x8")}
    assert closes == {
        "v5e:8x16": (False, True),
        "v6e:16x16": (True, True),
        "v5p:2x2x4": (False,) * 3,
        "v4:4x4x8": (True,) * 3,
    }
