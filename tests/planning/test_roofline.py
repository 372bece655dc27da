"""Times over published peaks: matmuls, memory and collectives whose time follows from a chip's data sheet by hand."""

from types import SimpleNamespace

import numpy as np
import pytest

from llama_jax.planning.program_cost import Collective, ProgramCost
from llama_jax.planning.roofline import Placement, collective_seconds, place, roofline
from llama_jax.planning.topology import parse_topology

GB = 1e9


def placed(text: str, slices: int = 1) -> Placement:
    """Devices in the order of their coordinates, slice by slice."""
    topology = parse_topology(text, slices)
    coords = np.stack(np.meshgrid(*map(np.arange, topology.shape), indexing="ij"), -1).reshape(-1, len(topology.shape))
    return Placement(topology, np.tile(coords, (slices, 1)), np.repeat(np.arange(slices), len(coords)))


def seconds(kind: str, n_bytes: float, placement: Placement, groups, times: int = 1) -> tuple[float, float]:
    return collective_seconds(Collective(kind, n_bytes, np.array(groups), times), placement)


def test_the_longest_resource_is_the_bound():
    cost = ProgramCost(459e12, 0.0, 2 * 2.77e12, (), 0.0)
    times = roofline(cost, placed("v5p:2x2x1"))
    assert (times.compute, times.hbm, times.links, times.network) == (1.0, 2.0, 0.0, 0.0)
    assert (times.binds, times.bound, times.unhidden) == ("HBM", 2.0, 3.0)


ALL = np.arange(256)[None]
RING = np.arange(256).reshape(16, 16)  # along the second direction of v5e:16x16, all of its 16 chips
HALF = RING.reshape(32, 8)  # half of it, which no link closes


@pytest.mark.parametrize(
    ("kind", "groups", "expected"),
    [
        # v5e: 50 GB/s a link. A ring has two links a chip, a line has one; two directions have twice as many.
        ("all-gather", RING, 15 / 16 / (2 * 50)),
        ("all-gather", HALF, 7 / 8 / 50),
        ("all-gather", ALL, 255 / 256 / (4 * 50)),
        ("reduce-scatter", RING, 15 / 16 / (2 * 50)),
        ("all-reduce", RING, 2 * 15 / 16 / (2 * 50)),
        # Half of each half's data crosses the middle: 16 chips' GB / 4 over two links.
        ("all-to-all", RING, 16 / 4 / (2 * 50)),
        ("collective-permute", [[0, 1], [1, 0]], 1 / 50),
        ("all-gather", np.arange(256)[:, None], 0.0),  # alone
    ],
)
def test_a_collectives_time_on_v5e(kind, groups, expected):
    assert seconds(kind, GB, placed("v5e:16x16"), groups) == (pytest.approx(expected), 0.0)


def test_three_directions_of_a_cube_work_at_once():
    # v5p: 100 GB/s a link, six of them in a slice of whole cubes.
    everyone = np.arange(64)[None]
    assert seconds("all-gather", GB, placed("v5p:4x4x4"), everyone)[0] == pytest.approx(63 / 64 / 600)
    assert seconds("all-gather", GB, placed("v5p:4x4x4"), everyone, times=80)[0] == pytest.approx(80 * 63 / 64 / 600)


def test_between_slices_each_chip_sends_its_part():
    """An all-reduce over two slices: all of it within a slice, and a chip's sixteenth over the network."""
    placement = placed("v5e:4x4", 2)
    ici, dcn = seconds("all-reduce", GB, placement, np.arange(32)[None])
    assert ici == pytest.approx(2 * 15 / 16 / (2 * 50))  # 4 chips are a line: one link in each of two directions
    assert dcn == pytest.approx(2 * (1 / 16) * (1 / 2) / 3.125)
    pairs = np.arange(32).reshape(2, 16).T
    assert seconds("all-reduce", GB, placement, pairs) == (0.0, pytest.approx(2 * (1 / 2) / 3.125))
    assert seconds("collective-permute", GB, placement, [[0, 16]]) == (0.0, pytest.approx(1 / 3.125))


def gpus(text: str) -> Placement:
    topology = parse_topology(text)
    numbers = np.arange(topology.chips)
    return Placement(topology, numbers[:, None] % topology.shape[0], numbers // topology.shape[0])


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        # H100: 450 GB/s to the other GPUs of a host, in one direction; 50 GB/s to other hosts.
        ("all-gather", "h100:8", (7 / 8 / 450, 0)),
        ("all-gather", "h100:2", (1 / 2 / 450, 0)),
        ("all-reduce", "h100:8", (2 * 7 / 8 / 450, 0)),
        ("all-to-all", "h100:8", (7 / 8 / 450, 0)),  # through switches: there is no middle
        ("all-gather", "h100:32", (7 / 8 / 450, 1 / 8 * 3 / 4 / 50)),  # an eighth of it by each GPU's own port
        ("reduce-scatter", "a100:16", (7 / 8 / 300, 1 / 8 * 1 / 2 / 25)),
    ],
)
def test_a_collectives_time_on_gpus(kind, text, expected):
    placement = gpus(text)
    everyone = np.arange(placement.topology.chips)[None]
    assert seconds(kind, GB, placement, everyone) == pytest.approx(expected)


def test_gpus_stand_on_their_hosts_by_number_and_their_links_have_names():
    """Sixteen devices of a mesh, in an order of its own."""
    topology = parse_topology("h100:16")
    order = [3, 12, *(number for number in range(16) if number not in (3, 12))]
    placement = place(np.array([SimpleNamespace(id=number) for number in order]).reshape(2, 8), topology)
    assert placement.slice_of[:3].tolist() == [0, 1, 0] and placement.coords[:3].tolist() == [[3], [4], [0]]
    times = roofline(ProgramCost(989e12, 0.0, 3.35e12, (), 0.0), placement)
    assert times.times == {"compute": 1.0, "HBM": 1.0, "NVLink": 0.0, "network": 0.0}
    assert set(roofline(ProgramCost(0.0, 0.0, 0.0, (), 0.0), gpus("l4:2")).times) == {
        "compute",
        "HBM",
        "PCIe",
        "network",
    }
