"""Energy and carbon of runs that were made, in the form of the paper's Table 2 (2.2.1)."""

from collections.abc import Sequence
from dataclasses import dataclass

from llama_jax.evaluation.report import cell, table
from llama_jax.evaluation.runs import Run
from llama_jax.planning.carbon import KG_PER_KWH, PUE, Footprint
from llama_jax.planning.hardware import chip_of_kind

NOT_KNOWN = "not known"


@dataclass(frozen=True)
class Assumptions:
    """What the carbon of a run depends on and its folder does not hold."""

    power_w: float | None = None
    """Of a device, in watts; what is published for it, if not given."""
    kg_per_kwh: float = KG_PER_KWH
    """Carbon intensity of the electricity."""
    pue: float = PUE
    """Power usage effectiveness of the data centre."""


def footprint_of(device: str, device_hours: float, assumed: Assumptions) -> tuple[Footprint | None, float]:
    """The footprint of device-hours, None if the device's power is not known; and the hours of chips, of which several devices
    may be one.
    """
    chip = chip_of_kind(device)
    hours = device_hours / (chip.devices if chip else 1)
    if assumed.power_w is not None and device:
        power, source = assumed.power_w, "as given"
    elif chip and chip.watts:
        power, source = chip.watts, "published"
    else:
        return None, hours
    return Footprint(hours, power, source, None, assumed.pue, assumed.kg_per_kwh), hours


def energy_section(runs: Sequence[Run], assumed: Assumptions) -> str:
    """The table, a line for each run and device, and what was assumed."""
    rows: list[tuple[str, ...]] = []
    spent: list[Footprint | None] = []
    for run in runs:
        for device in dict.fromkeys(one.device for one in run.spells):
            own = [one for one in run.spells if one.device == device]
            footprint, hours = footprint_of(device, sum(one.device_hours for one in own), assumed)
            spent.append(footprint)
            rows.append((cell(run.name), cell(device) or NOT_KNOWN, *_amounts(hours if device else None, footprint)))
    if len(rows) > 1:
        rows.append(_total(spent))
    header = ("run", "device", "time (device hours)", "power (W)", "energy (kWh)", "carbon (tCO2eq)")
    parts = [table(header, rows), _assumptions(assumed)] if rows else []
    if None in spent:
        parts.append(
            f"Where power is {NOT_KNOWN}, none is published for the device, or the run does not say what it ran on; "
            "`--power-w` gives that of a device that is named."
        )
    if untimed := [cell(run.name) for run in runs if not run.spells]:
        parts.append(f"No time is known of {', '.join(untimed)}: they logged none, as stages that only generate.")
    return "\n\n".join(parts)


def _amounts(hours: float | None, footprint: Footprint | None) -> tuple[str, ...]:
    if hours is None:
        return (NOT_KNOWN,) * 4
    if footprint is None:
        return (amount(hours), *(NOT_KNOWN,) * 3)
    return amount(hours), f"{footprint.watts:g}", amount(footprint.kwh), amount(footprint.tonnes)


def _total(spent: Sequence[Footprint | None]) -> tuple[str, ...]:
    known = [one for one in spent if one is not None]
    if len(known) < len(spent):
        return "total", "", NOT_KNOWN, "", NOT_KNOWN, NOT_KNOWN
    hours, kwh, tonnes = (sum(getattr(one, name) for one in known) for name in ("chip_hours", "kwh", "tonnes"))
    return "total", "", amount(hours), "", amount(kwh), amount(tonnes)


def _assumptions(assumed: Assumptions) -> str:
    power = "of a device as given" if assumed.power_w is not None else "the most that is published for the device"
    return (
        "Time is that of the runs' loops by the clock, from each start to its last log, compilation, evaluation and work that was "
        f"lost included. As in the paper, power is what the devices may draw ({power}), hosts and network are not counted, and "
        f"energy is time x power x the data centre's losses (PUE {assumed.pue:g}), at {assumed.kg_per_kwh:g} kg CO2eq a kWh: "
        f"{assumed.pue * assumed.kg_per_kwh:.4g} kg a kWh of the devices. The defaults, {PUE} and {KG_PER_KWH}, are those that the "
        "paper's Table 2 comes to; `--power-w`, `--pue` and `--kg-per-kwh` change them. Nothing is offset."
    )


def amount(value: float) -> str:
    """A quantity with two decimals, as the paper has them, or with three digits where that would say nothing."""
    return f"{value:,.2f}" if value >= 1 or not value else f"{value:.3g}"
