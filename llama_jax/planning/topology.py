"""TPU slices by name: how many chips one has, how they are linked, and which exist.

`v5p:4x4x4` names a shape of chips. `v5p-128` is the cloud's name of the same slice: for v4 and v5p it counts cores, two a
chip, for v5e (`v5e-16`, `v5litepod-16`) and v6e chips.
"""

import math
import re
from dataclasses import dataclass

from llama_jax.errors import UserError
from llama_jax.planning.hardware import V4, V5E, V5P, V6E, Chip

# The shapes that Google lists, smallest first. Those of whole cubes are the usual ones; others of multiples of 4 exist.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = (
    *("2x2x1", "2x2x2", "2x2x4", "2x4x4"),
    *("4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16"),
)
SHAPES = {"v4": _DEEP, "v5e": _FLAT, "v5p": (*_DEEP, "16x16x24"), "v6e": _FLAT}
_CHIPS: dict[str, Chip] = {chip.name: chip for chip in (V4, V5E, V5P, V6E)}
_CORES_IN_NAME = {"v4": 2, "v5p": 2}
_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "trillium": "v6e"}


@dataclass(frozen=True)
class Topology:
    """One or several slices of the same shape."""

    chip: Chip
    shape: tuple[int, ...]
    """Chips along each dimension of a slice."""
    slices: int = 1

    @property
    def name(self) -> str:
        """As the compiler takes it: v5p:4x4x4."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        """In all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def closes(self) -> tuple[bool, ...]:
        """Which dimensions are rings, whose last chip is linked to the first, instead of lines.

        v5e and v6e close at 16 chips, v4 and v5p where a slice is made of whole cubes of 4x4x4.
        """
        if len(self.shape) == 2:
            return tuple(size == 16 for size in self.shape)
        return (all(size % 4 == 0 for size in self.shape),) * len(self.shape)

    def __str__(self) -> str:
        several = f"{self.slices} slices of " if self.slices > 1 else ""
        return f"{several}{self.name}, {self.chips} chip{'s' * (self.chips > 1)}"


def parse_topology(text: str, slices: int = 1) -> Topology:
    """Reads `v5p:4x4x4` or a cloud name such as `v5p-128`, for one or several slices.

    Raises:
      UserError: there is no such chip, shape or count; lists those that there are.
    """
    if slices < 1:
        raise UserError(f"--slices is {slices}; it must be 1 or more")
    match = re.fullmatch(r"([a-z]\w*)(?:-(\d+)|:(\d+(?:x\d+)*))", text.strip().lower())
    name = _ALIASES.get(match[1], match[1]) if match else ""
    if match is None or name not in _CHIPS:
        raise UserError(f"--topology {text!r} is not known; {_known()}")
    found = _of_count(name, int(match[2])) if match[2] else _of_shape(name, match[3])
    if found is None:
        raise UserError(f"--topology {text!r} is no shape of {name}; {_known((name,))}")
    return Topology(_CHIPS[name], found, slices)


def _of_count(name: str, count: int) -> tuple[int, ...] | None:
    chips, rest = divmod(count, _CORES_IN_NAME.get(name, 1))
    shapes = (tuple(map(int, shape.split("x"))) for shape in SHAPES[name])
    return next((shape for shape in shapes if math.prod(shape) == chips and not rest), None)


def _of_shape(name: str, text: str) -> tuple[int, ...] | None:
    shape = tuple(map(int, text.split("x")))
    largest = tuple(map(int, SHAPES[name][-1].split("x")))
    whole_cubes = len(shape) == 3 and all(size and size % 4 == 0 for size in shape) and list(shape) == sorted(shape)
    if text in SHAPES[name] or (len(largest) == 3 and whole_cubes and math.prod(shape) <= math.prod(largest)):
        return shape
    return None


def _cloud_name(name: str, shape: str) -> str:
    return f"{name}-{math.prod(map(int, shape.split('x'))) * _CORES_IN_NAME.get(name, 1)}"


def _known(names: tuple[str, ...] = tuple(SHAPES)) -> str:
    listed = (
        f"{name}: {', '.join(f'{shape} ({_cloud_name(name, shape)})' for shape in SHAPES[name])}" for name in names
    )
    return "known are CHIP:SHAPE or the name behind it. " + "; ".join(listed)
