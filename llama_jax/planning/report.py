"""A plan for people: every number with its unit, and whether it is exact, counted or estimated."""

from collections.abc import Sequence

from llama_jax.parallel.mesh import format_mesh
from llama_jax.planning.carbon import KG_PER_KWH, PUE, Footprint
from llama_jax.planning.compiling import Refused
from llama_jax.planning.plan import Plan
from llama_jax.training.metrics import format_count

_ALWAYS = ("parameters", "temporary")


def format_plan(plan: Plan, footprint: Footprint | None) -> str:
    """The whole plan; `footprint` is that of the run, where its length is known."""
    if not plan.fits:
        return "\n".join([*_head(plan), _line("memory", format_refusal(plan))])
    lines = [*_head(plan), *_costs(plan), *_times(plan)]
    if footprint is not None:
        lines += _run(plan, footprint)
    made = ", ".join(f"{name} {version}" for name, version in plan.versions.items())
    host = f"in {plan.compile_seconds:.0f} s with {_size(plan.host_bytes)} of this machine's memory"
    return "\n".join([*lines, _line("flags", plan.flags()), _line("made by", f"{made} {host}")])


def format_iteration(plans: Sequence[Plan], answers: int) -> str:
    """What the programs of an iteration come to, one after the other, each at its bound."""
    seconds = sum(plan.runs * plan.seconds.bound for plan in plans)
    most = max(plans, key=lambda plan: plan.memory.total)
    lines = [
        _line(
            "iteration" * (not number),
            f"{plan.stage}: {plan.runs:,} times {plan.seconds.bound:.3g} s, {plan.runs * plan.seconds.bound:.3g} s or "
            f"{plan.runs * plan.seconds.bound / seconds:.0%}",
        )
        for number, plan in enumerate(plans)
    ]
    return "\n".join(
        [
            *lines,
            _line("", f"{seconds:.3g} s for {answers:,} answers at the bound, {answers / seconds:.3g} answers/s"),
            _line("most memory", f"{_size(most.memory.total)} of {_size(most.usable_bytes)} a chip, in {most.stage}"),
        ]
    )


def format_refusal(plan: Plan) -> str:
    """By how much a plan does not fit."""
    refused: Refused = plan.refused
    if not refused.asked:
        return f"does not fit; the compiler says: {refused.message}"
    over = refused.asked - refused.available
    return (
        f"does not fit: {_size(refused.asked)} asked of {_size(refused.available)} a chip (exact: the compiler's), "
        f"{_size(over)} too much"
        + f"; {_size(refused.beside)} of it is kept for the run's other programs"
        * bool(refused.beside)
    )


def _head(plan: Plan) -> list[str]:
    several = f"{plan.slices} slices of " if plan.slices > 1 else ""
    lines = [
        _line(
            "plan",
            f"{plan.stage} on {several}{plan.topology}, {_count(plan.chips, 'chip')}; mesh {format_mesh(plan.mesh)}"
            + f", {plan.micro_batches} micro-batch{'es' * (plan.micro_batches > 1)}, remat {plan.remat}"
            * bool(plan.remat),
        ),
        _line(
            "step",
            f"{_count(plan.rows, 'sequence')} of {_count(plan.length, 'token')}: {_count(plan.tokens_per_step, 'token')} through "
            f"{format_count(plan.parameters)} parameters",
        ),
    ]
    return lines + [_line("assumed", text) for text in plan.assumptions]


def _costs(plan: Plan) -> list[str]:
    own, flops = plan.memory, plan.matmul_flops + plan.kernel_flops
    total = f"{_size(own.total)} of {_size(plan.usable_bytes)} that a program may have of a chip"
    lines = [
        _line("memory", f"{total} (exact: the compiler's{'; workspace of cuBLAS and cuDNN not in it' * plan.on_gpus})"),
        _line("", ", ".join(f"{name} {_size(value)}" for name, value in vars(own).items() if value or name in _ALWAYS)),
        _line(
            "FLOPs",
            f"{flops:.3g} a chip and step: matmuls {plan.matmul_flops:.3g} (exact), attention kernels "
            f"{plan.kernel_flops:.3g} (by formula); the model's own are {plan.model_flops:.3g}",
        ),
        _line("HBM", f"{_size(plan.bytes_through_hbm)} a chip and step (counted in the compiled program)"),
    ]
    if plan.offloaded:
        lines.insert(
            2,
            _line(
                "",
                f"and {_size(plan.offloaded)} of the host's for each chip: the optimizer's moments, whose way there and back is in no time below",
            ),
        )
    if plan.unknown_kernels:
        lines.append(_line("", f"not counted, FLOPs not known: {', '.join(plan.unknown_kernels)}"))
    for title, exchange in zip(["collectives"] + [""] * len(plan.exchanges), plan.exchanges, strict=False):
        network = f", {exchange.seconds_dcn:.3g} s {plan.seconds.network_name}" if exchange.seconds_dcn else ""
        over = f"{exchange.kind} over {exchange.axes}"
        seconds = f"{exchange.seconds_ici:8.3g} s {plan.seconds.link_name}{network}"
        lines.append(_line(title, f"{over:<34} {_size(exchange.bytes):>11} (counted) {seconds}"))
    return lines


def _times(plan: Plan) -> list[str]:
    seconds = plan.seconds
    busy = ", ".join(
        f"{name} {value:.3g} s" for name, value in seconds.times.items() if value or name != seconds.network_name
    )
    bound = f"{seconds.bound:.3g} s if all else hides behind that"
    lines = [
        _line("roofline", f"{busy} (estimated: over published peaks); {seconds.binds} binds"),
        _line("", f"a step takes {bound}, {seconds.unhidden:.3g} s if nothing does"),
    ]
    if plan.seconds_by_compiler:
        second = f"{plan.seconds_by_compiler:.3g} s by the compiler's cycles, collectives left out"
        lines.append(_line("", f"a second estimate: {second}"))
    rates = f"{format_count(plan.tokens_per_s / plan.chips)} tokens/s a chip, {format_count(plan.tokens_per_s)} in all"
    return [*lines, _line("speed", f"at the bound {plan.mfu:.1%} causal MFU, {rates}")]


def _run(plan: Plan, run: Footprint) -> list[str]:
    lines = [
        _line(
            "run",
            f"{format_count(plan.total_tokens)} tokens at the bound: {plan.days:,.1f} days, {format_count(run.chip_hours)} "
            "chip-hours (at the least: no pause, no evaluation)",
        ),
        _line(
            "energy",
            f"{format_count(run.kwh / 1000)} MWh, {run.tonnes:,.3g} t CO2eq ({run.watts:.0f} W a chip, {run.watts_from}; "
            f"PUE {PUE}; {KG_PER_KWH} kg/kWh; hosts not counted)",
        ),
    ]
    if run.cost is None:
        lines.append(_line("cost", "--price-per-chip-hour gives it"))
    else:
        lines.append(_line("cost", f"{run.cost:,.0f} at {run.price_per_chip_hour:g} a chip-hour"))
    return lines


def _line(title: str, text: str) -> str:
    return f"{title:<12}{text}"


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' * (n > 1)}"


def _size(n: float) -> str:
    unit, size = next(((unit, size) for unit, size in (("GB", 1e9), ("MB", 1e6)) if n >= size / 10), ("kB", 1e3))
    return f"{n / size:,.2f} {unit}"
