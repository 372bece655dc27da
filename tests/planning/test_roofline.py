"""Times over published peaks: matmuls, memory and collectives whose time follows from a chip's data sheet by hand."""

import numpy as np
import pytest

from llama_jax.planning.program_cost import Collective, ProgramCost
from llama_jax.planning.roofline import Placement, collective_seconds, roofline
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
