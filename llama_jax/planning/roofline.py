"""How long a step takes at least: each resource's work over its peak, on the chips and links of a slice.

Compute and main memory are FLOPs and bytes over the chip's published peaks. Collectives are timed as if every link that a
group of chips spans were busy all the time:

  within a slice, an array of b bytes over n chips takes (n - 1)/n * b / (a chip's links in the group * a link's bandwidth) to
  gather or to reduce and scatter, twice that to do both (an all-reduce); the links are two for each direction in which the
  group is a closed ring, one where it is a line
  an all-to-all is what crosses the middle of the group's longest direction; a permutation goes over one link
  between slices, an all-reduce is done of each chip's part, after that part was reduced within its slice
  GPUs of a host reach each other through switches, each over its whole bandwidth; between hosts it is as between slices

Resources work side by side at best and one after the other at worst: the longest is the bound, the sum its opposite.
"""

from dataclasses import dataclass

import numpy as np

from llama_jax.planning.hardware import Chip
from llama_jax.planning.program_cost import Collective, ProgramCost
from llama_jax.planning.topology import Topology

# How often an array passes a chip's links, as a multiple of (n - 1)/n of its bytes.
_PASSES = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2}


@dataclass(frozen=True)
class Placement:
    """Where the devices of a mesh stand, in the mesh's order."""

    topology: Topology
    coords: np.ndarray
    """Of each device within its slice or host, (devices, dimensions)."""
    slice_of: np.ndarray
    """Number of each device's slice, or host of GPUs."""


@dataclass(frozen=True)
class Roofline:
    """Seconds that each resource is busy in one step, at its peak."""

    compute: float
    hbm: float
    links: float
    """Between the chips of a slice (ICI), or the GPUs of a host."""
    network: float
    """Between slices (DCN), or hosts of GPUs."""
    link_name: str = "ICI"
    network_name: str = "DCN"

    @property
    def times(self) -> dict[str, float]:
        """By the name of the resource."""
        return {
            "compute": self.compute,
            "HBM": self.hbm,
            self.link_name: self.links,
            self.network_name: self.network,
        }

    @property
    def binds(self) -> str:
        """The resource that is busy longest."""
        return max(self.times, key=self.times.__getitem__)

    @property
    def bound(self) -> float:
        """The least time of a step: everything else hides behind the busiest resource."""
        return max(self.times.values())

    @property
    def unhidden(self) -> float:
        """The time of a step in which nothing hides behind anything."""
        return sum(self.times.values())


def place(devices: np.ndarray, topology: Topology) -> Placement:
    """Reads where the devices of a mesh stand, from the devices themselves."""
    flat = list(devices.flat)
    if topology.chip.is_gpu:
        numbers = np.array([device.id for device in flat])
        return Placement(topology, numbers[:, None] % topology.shape[0], numbers // topology.shape[0])
    dims = len(topology.shape)
    coords = np.array([device.coords[:dims] for device in flat])
    return Placement(topology, coords, np.array([getattr(device, "slice_index", 0) or 0 for device in flat]))


def roofline(cost: ProgramCost, placement: Placement) -> Roofline:
    """The busy time of each resource of a device, for what a program costs it."""
    chip = placement.topology.chip
    times = [collective_seconds(exchange, placement) for exchange in cost.collectives]
    return Roofline(
        cost.flops / chip.device_peak_bf16_flops,
        cost.hbm_bytes / chip.hbm_bytes_per_s,
        sum(links for links, _ in times),
        sum(network for _, network in times),
        *((("NVLink" if chip.network_bytes_per_s else "PCIe"), "network") if chip.is_gpu else ()),
    )


def collective_seconds(exchange: Collective, placement: Placement) -> tuple[float, float]:
    """Seconds of an exchange on the links within a slice and on the network between slices, all its times together."""
    chip, times = placement.topology.chip, exchange.times
    if not exchange.groups.size or exchange.groups.shape[1] < 2:
        return 0.0, 0.0
    if exchange.kind == "collective-permute":
        crosses = (placement.slice_of[exchange.groups].T[0] != placement.slice_of[exchange.groups].T[1]).any()
        seconds = times * exchange.bytes / (chip.network_bytes_per_s if crosses else chip.link_bytes_per_s)
        return (0.0, seconds) if crosses else (seconds, 0.0)
    group = exchange.groups[0]
    slices = len(set(placement.slice_of[group].tolist()))
    within = len(group) // slices
    # A chip's part is what a slice's chips share the network for.
    part = exchange.bytes / within
    links = network = 0.0
    if exchange.kind.endswith("all-to-all"):
        network = exchange.bytes * (slices - 1) / slices / chip.network_bytes_per_s
        links = _all_to_all_seconds(
            exchange.bytes, group[placement.slice_of[group] == placement.slice_of[group[0]]], placement
        )
    else:
        passes = _PASSES[exchange.kind]
        here = group[placement.slice_of[group] == placement.slice_of[group[0]]]
        if within > 1:
            links = passes * exchange.bytes * (within - 1) / within / _bandwidth(here, placement)
        if slices > 1:
            network = passes * part * (slices - 1) / slices / chip.network_bytes_per_s
    return times * links, times * network


def _extents(group: np.ndarray, placement: Placement) -> list[tuple[int, int]]:
    """Of the directions in which a group of chips spreads: how many chips, and whether one or two links serve each chip."""
    found = []
    for size, closes, values in zip(
        placement.topology.shape, placement.topology.closes, placement.coords[group].T, strict=True
    ):
        chips = len(set(values.tolist()))
        if chips > 1:
            found.append((chips, 2 if closes and chips == size else 1))
    return found or [(2, 1)]  # devices of one chip


def _bandwidth(group: np.ndarray, placement: Placement) -> float:
    """Bytes/s that a chip of a group receives from the others, over all links of the directions in which it spreads."""
    return placement.topology.chip.link_bytes_per_s * sum(links for _, links in _extents(group, placement))


def _all_to_all_seconds(sent: float, group: np.ndarray, placement: Placement) -> float:
    """Half of a half's chips' data crosses the middle of the longest direction; what a GPU sends to others, its link."""
    link = placement.topology.chip.link_bytes_per_s
    if placement.topology.chip.is_gpu:
        return sent * (len(group) - 1) / len(group) / link
    return max(sent * chips / 4 / (links * link) for chips, links in _extents(group, placement))


def cycles_seconds(cost: ProgramCost, chip: Chip) -> float:
    """The compiler's estimated cycles, and kernels at the chip's peak, in seconds; 0 where it estimates nothing."""
    if not cost.estimated_cycles:
        return 0.0
    return cost.estimated_cycles / chip.clock_hz + cost.kernel_flops / chip.device_peak_bf16_flops
