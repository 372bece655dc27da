"""What a slice is made of: the table of generations, and what a name such as v5e-16 or v5p:4x4x4 means by it."""

import math
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from llama_jax.errors import UserError

TABLE = Path(__file__).with_name("generations.toml")
HOST_CHIPS = 4


@dataclass(frozen=True)
class Slice:
    """One slice: chips that share their own network."""

    generation: str
    topology: str
    """Chips along each side, such as "4x4x8"."""
    row: dict
    """The generation's entry in the table."""

    @property
    def chips(self) -> int:
        """Chips of the whole slice."""
        return math.prod(map(int, self.topology.split("x")))

    @property
    def chips_per_host(self) -> int:
        """Chips that one host sees."""
        return self.chips if str(self.chips) in self.row["machine_types"] else HOST_CHIPS

    @property
    def hosts(self) -> int:
        """Machines of the slice."""
        return self.chips // self.chips_per_host

    @property
    def accelerator_type(self) -> str | None:
        """The slice's name in the cloud, such as v5litepod-16; None for a topology that has none of its own."""
        if self.topology not in self.row["topologies"]:
            return None
        return f"{self.row['accelerator']}-{self.chips * self.row['name_counts']}"

    @property
    def machine_type(self) -> str:
        """The hosts' machine type."""
        return self.row["machine_types"][str(self.chips_per_host)]


@dataclass(frozen=True)
class Table:
    """The generations, by name, and the groups of flags that they use."""

    generations: dict[str, dict]
    flag_groups: dict[str, list[str]]

    def find(self, text: str) -> Slice:
        """The slice of a name: GENERATION-NUMBER as the cloud counts, or GENERATION:TOPOLOGY.

        Raises:
          UserError: with the names that are known.
        """
        match = re.fullmatch(r"([a-z0-9]+?)(?:-([1-9]\d*)|:(\d+(?:x\d+){1,2}))", text.strip().lower())
        named = {name: name for name in self.generations} | {
            row["accelerator"]: n for n, row in self.generations.items()
        }
        if match is None or match[1] not in named:
            raise UserError(
                f"--tpu {text} is no slice; give GENERATION-NUMBER or GENERATION:TOPOLOGY, such as v5e-16, v5p-128 or "
                f"v5p:4x4x4, of the generations {', '.join(self.generations)}"
            )
        name, row = named[match[1]], self.generations[named[match[1]]]
        shapes = [Slice(name, topology, row) for topology in row["topologies"]]
        if match[2]:
            found = [one for one in shapes if one.accelerator_type == f"{row['accelerator']}-{match[2]}"]
            if not found:
                known = ", ".join(f"{one.accelerator_type} ({one.topology})" for one in shapes)
                raise UserError(f"--tpu {text} has no standard topology; {name} has {known}, or give {name}:TOPOLOGY")
            return found[0]
        one, dimensions = Slice(name, match[3], row), shapes[0].topology.count("x") + 1
        whole = one.chips and (str(one.chips) in row["machine_types"] or one.chips % HOST_CHIPS == 0)
        if match[3].count("x") + 1 != dimensions or not whole:
            known = ", ".join(shape.topology for shape in shapes)
            raise UserError(
                f"--tpu {text} is no topology of {name}: it has {dimensions} sides and whole hosts: {known}"
            )
        return one

    def libtpu_args(self, generation: str, version: str, slices: int = 1) -> str:
        """LIBTPU_INIT_ARGS for a generation under a version of libtpu."""
        entries = [one for one in self.generations[generation]["libtpu"] if release(one["since"]) <= release(version)]
        groups = [*entries[-1]["groups"], *(["multislice"] if slices > 1 else [])]
        return " ".join(flag for group in groups for flag in self.flag_groups[group])


def release(version: str) -> list[int]:
    """The numbers of a version, to compare."""
    if not re.fullmatch(r"\d+(\.\d+)*", version):
        raise UserError(f"{version} is no version of libtpu; give numbers, such as --libtpu 0.0.42.1")
    return [int(part) for part in version.split(".")]


def load_table(over: str | None = None) -> Table:
    """The table, with a user's file of the same form laid over it where one is given."""
    table = tomllib.loads(TABLE.read_text())
    if over:
        try:
            table = _laid_over(table, tomllib.loads(Path(over).read_text()))
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise UserError(f"--generations {over} cannot be read: {error}; {TABLE} shows the form") from error
    return Table(table["generations"], table["flag_groups"])


def _laid_over(under: dict, over: dict) -> dict:
    both = {key: _laid_over(under[key], over[key]) for key in under.keys() & over.keys() if isinstance(over[key], dict)}
    return {**under, **over, **both}


def locked_libtpu(lock: Path) -> str:
    """The libtpu that requirements.lock installs."""
    found = re.search(r"^libtpu==(\S+)$", lock.read_text(), re.M)
    if not found:
        raise UserError(f"{lock} pins no libtpu; say which one the hosts have, such as --libtpu 0.0.42.1")
    return found[1]
