"""Energy, carbon and cost of a run (paper 2.2.1), from chip-hours.

The paper counts the power that its GPUs may draw and the data centre's losses, and nothing of hosts: Table 2's 1,720,320 hours
of the 70B at 400 W, times a power usage effectiveness of 1.1, at 0.385 kg CO2eq a kWh, are its 291.42 t.
"""

from dataclasses import dataclass

from llama_jax.planning.hardware import Chip

PUE = 1.1
"""Power usage effectiveness: what the data centre draws over what its chips do."""
KG_PER_KWH = 0.385
"""Carbon intensity, kg CO2eq per kWh."""
PAPER_WATTS = 400.0
"""Power of the paper's A100s, which stands in for chips that none is published for."""


@dataclass(frozen=True)
class Footprint:
    """What a run takes."""

    chip_hours: float
    watts: float
    """Assumed of a chip."""
    watts_from: str
    """Where that number is from."""
    price_per_chip_hour: float | None
    """In whatever currency the user thinks in."""
    pue: float = PUE
    """Power usage effectiveness of the data centre."""
    kg_per_kwh: float = KG_PER_KWH
    """Carbon intensity of its electricity."""

    @property
    def kwh(self) -> float:
        """Of the chips, with the data centre's losses."""
        return self.chip_hours * self.watts * self.pue / 1000

    @property
    def tonnes(self) -> float:
        """CO2eq, in tonnes."""
        return self.kwh * self.kg_per_kwh / 1000

    @property
    def cost(self) -> float | None:
        """What the chip-hours cost, if a price is given."""
        return None if self.price_per_chip_hour is None else self.chip_hours * self.price_per_chip_hour


def footprint(chip: Chip, chip_hours: float, price: float | None = None, watts: float | None = None) -> Footprint:
    """The footprint of chip-hours; `watts` and `price` (per chip-hour) are the user's where given."""
    if watts is not None:
        return Footprint(chip_hours, watts, "as given", price)
    if chip.watts:
        source = "the most its data sheet allows" if chip.is_gpu else "published, the most that was measured"
        return Footprint(chip_hours, chip.watts, source, price)
    return Footprint(
        chip_hours, PAPER_WATTS, f"assumed: none is published for {chip.name}; an A100's, as the paper", price
    )
