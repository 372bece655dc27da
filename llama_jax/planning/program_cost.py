"""What one device does in one call of a compiled program: FLOPs, bytes through main memory, and collectives.

FLOPs are those of matmuls (and of kernels, by formula), which is what the matrix units do; elementwise work is not counted.
Bytes are what instructions outside fusions read and write in main memory: what a fusion only slices counts as its slice, what
it passes on as nothing. Loop bodies count as often as they run.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llama_jax.planning.hlo import Computation, Instruction, Program

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all", "collective-permute")
# Names, views and control: nothing moves. (What a loop or a call does is counted inside it.)
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "after-all"),
    *("partition-id", "replica-id", "iota", "domain", "opt-barrier", "add-dependency", "async-start", "async-update"),
    *("send", "recv"),
}
_CUBLAS = 'custom_call_target="__cublas$'
# Custom calls whose FLOPs a formula has to give.
_KERNELS = r'custom_call_target="(tpu_custom_call|__cudnn\$\w+)"'
# Custom calls that compute nothing: allocations, hints to the compiler, and the two ends of a collective.
_MARKERS = ("AllocateBuffer", "ConcatBitcast", "Assume", "AsyncCollective", "Sharding", "SPMD", "annotate")


@dataclass(frozen=True)
class Collective:
    """One exchange between devices, as often as it happens."""

    kind: str
    """One of COLLECTIVES."""
    bytes: float
    """Of the whole array among the devices of a group, once: what an all-gather or an all-reduce leaves on each device,
    what a reduce-scatter takes from each, what a permutation or an all-to-all sends from each.
    """
    groups: np.ndarray
    """Numbers of the devices that exchange, (groups, members); of a permutation (pairs, 2), from and to."""
    times: int
    """How often, in one call of the program."""

    @property
    def hbm_bytes(self) -> float:
        """What a device reads and writes for it once, whatever passes in between."""
        is_part = self.kind in ("all-gather", "reduce-scatter")
        return self.bytes * (1 + (1 / self.groups.shape[1] if is_part else 1))

    def axes(self, mesh: dict[str, int]) -> tuple[str, ...]:
        """The axes of a mesh, sizes in order, along which it happens."""
        places = np.stack(np.unravel_index(self.groups, tuple(mesh.values())))
        varies = (places != places[:, :, :1]).any((1, 2))
        return tuple(axis for axis, moved in zip(mesh, varies, strict=True) if moved)


@dataclass(frozen=True)
class ProgramCost:
    """Of one device, in one call."""

    matmul_flops: float
    """Of matmuls in the program's text."""
    kernel_flops: float
    """Of attention kernels, by the formulas of `splash_flops` and `cudnn_flops`."""
    hbm_bytes: float
    collectives: tuple[Collective, ...]
    estimated_cycles: float
    """The compiler's own estimate for what it fused, collectives and kernels not in it; 0 where it makes none."""
    unknown_kernels: tuple[str, ...] = ()
    """Kernels whose FLOPs are not known, and so not counted."""

    @property
    def flops(self) -> float:
        """Of matmuls and kernels."""
        return self.matmul_flops + self.kernel_flops


def program_cost(program: Program, n_devices: int) -> ProgramCost:
    """Adds up what a program does. `n_devices` are those of the mesh, for collectives over all of them."""
    matmul_flops = kernel_flops = hbm_bytes = cycles = 0.0
    collectives: dict[tuple, Collective] = {}
    unknown: set[str] = set()
    for computation, one, times in program.running():
        for inside, inner in _with_fused(program, computation, one):
            if inner.opcode in ("dot", "convolution") or _CUBLAS in inner.attributes:
                matmul_flops += times * matmul_flops_of(inside, inner)
            elif kind := collective_kind(inside, inner):
                # A collective that runs beside matmuls is written into each fusion that it runs beside, as links of one chain.
                # (Not so its channel: what kernels sum over devices all has the same one.)
                chain = re.search(r'chain_id="(\d+)"', inner.attributes)
                key = (computation.name, kind, chain[1] if chain else inner.name)
                if key not in collectives:
                    collectives[key] = _collective(kind, inside, inner, n_devices, times)
        if one.opcode == "custom-call" and (kernel := re.search(_KERNELS, one.attributes)):
            flops = (splash_flops if kernel[1] == "tpu_custom_call" else cudnn_flops)(computation, one)
            if flops is None:
                unknown.add(re.sub(r"[.\d]+$", "", one.name))
            kernel_flops += times * (flops or 0.0)
        hbm_bytes += times * hbm_bytes_of(program, computation, one)
        if found := re.search(r'"estimated_cycles":"(\d+)"', one.attributes):
            cycles += times * int(found[1])
    moved = sum(exchange.times * exchange.hbm_bytes for exchange in collectives.values())
    return ProgramCost(
        matmul_flops, kernel_flops, hbm_bytes + moved, tuple(collectives.values()), cycles, tuple(sorted(unknown))
    )


def _with_fused(
    program: Program, computation: Computation, one: Instruction
) -> Iterator[tuple[Computation, Instruction]]:
    """An instruction, or those that it fuses, with the computation that each stands in."""
    yield computation, one
    fused = program.called(one) if one.opcode == "fusion" else None
    for inner in fused.instructions.values() if fused else ():
        yield from _with_fused(program, fused, inner)


def matmul_flops_of(computation: Computation, one: Instruction) -> float:
    """FLOPs of a dot, of a call of cuBLAS or of a convolution: two per product that is summed. TPUs write every matmul as a
    convolution, whose padding takes no part.
    """
    left, right = (operand.shapes[0] for operand in computation.operands(one)[:2])
    if one.opcode != "convolution":
        contracted = re.search(r"lhs_contracting_dim(?:s=\{|ensions\":\[)([\d,\"]*)", one.attributes)
        summed = math.prod(left.dims[int(d)] for d in re.findall(r"\d+", contracted[1])) if contracted else 1
        return 2.0 * one.shapes[0].elements * summed
    inputs, kernel, outputs = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes).groups()
    out = one.shapes[0].dims
    window = _window(one, sum(label.isdigit() for label in kernel))
    products = 1
    for spatial, fields in enumerate(window):
        label = str(spatial)
        products *= _products(left.dims[inputs.index(label)], out[outputs.index(label)], **fields)
    groups = int((re.search(r"batch_group_count=(\d+)", one.attributes) or (0, 1))[1])
    summed = right.dims[kernel.index("i")]  # of one feature group
    return 2.0 * products * summed * out[outputs.index("f")] * left.dims[inputs.index("b")] / groups


def _window(one: Instruction, spatial: int) -> list[dict[str, int]]:
    """Size, stride, padding and dilations of a convolution, per spatial dimension."""
    text = (re.search(r"window=\{([^}]*)\}", one.attributes) or ("", ""))[1]
    values = dict(part.split("=") for part in text.split())

    def each(name: str, default: str) -> list[str]:
        return values[name].split("x") if name in values else [default] * spatial

    fields = zip(
        *(each(*pair) for pair in (("size", "1"), ("stride", "1"), ("pad", "0_0"), ("lhs_dilate", "1"))),
        each("rhs_dilate", "1"),
        strict=True,
    )
    return [
        {
            "size": int(size),
            "stride": int(stride),
            "pad": int(pad.split("_")[0]),
            "spread": int(spread),
            "gap": int(gap),
        }
        for size, stride, pad, spread, gap in fields
    ]


def _products(extent: int, out: int, size: int, stride: int, pad: int, spread: int, gap: int) -> int:
    """Pairs of an output's place and a window's place that meet an element of the input, and not padding."""
    where = np.arange(out)[:, None] * stride + np.arange(size) * gap - pad
    return int(((where >= 0) & (where < (extent - 1) * spread + 1) & (where % spread == 0)).sum())


def splash_flops(computation: Computation, one: Instruction) -> float | None:
    """FLOPs of a splash attention kernel, by formula: two per product of each matmul, over the blocks that a causal mask
    leaves; None for another kernel.

    Forward: scores and values. Backward for queries: scores, the softmax's gradient, queries. Backward for keys and values:
    scores, the softmax's gradient, keys, values. Where queries are split over devices, the count is that of the last span,
    which the others wait for.
    """
    match = re.match(r"splash_m[hq]a_(fwd|dq|dkv)", one.name)
    if not match:
        return None
    matmuls = {"fwd": 2, "dq": 3, "dkv": 4}[match[1]]
    # Before queries, keys and values stand only tables of integers; (batch, heads, tokens, head size), or no batch of one.
    operands = [operand.shapes[0] for operand in computation.operands(one)]
    floats = [shape.dims for shape in operands if "f" in shape.dtype and len(shape.dims) > 2]
    if len(floats) < 3:
        return None
    queries, keys = floats[:2]
    suffix = {"fwd": "", "dq": "_dq", "dkv": "_dkv"}[match[1]]
    blocks = [re.search(rf"block_{side}{suffix}\W+(\d+)", one.attributes) for side in ("q", "kv")]
    block_q, block_kv = (int(block[1]) if block else 1 for block in blocks)
    first = keys[-2] - queries[-2]  # where the last span of queries begins
    ends = [first + block_q * (i + 1) for i in range(queries[-2] // block_q)]
    pairs = sum(block_q * block_kv * math.ceil(end / block_kv) for end in ends)
    return 2.0 * matmuls * math.prod(queries[:-2]) * queries[-1] * pairs


def cudnn_flops(computation: Computation, one: Instruction) -> float | None:
    """FLOPs of cuDNN's attention: two matmuls forward, and five backward, which computes the scores again; half of each
    under a causal mask. None for another of cuDNN's kernels.
    """
    match = re.search(r'custom_call_target="__cudnn\$fmha\w*?Softmax(Backward)?"', one.attributes)
    if not match:
        return None
    queries, keys = (
        operand.shapes[0].dims for operand in computation.operands(one)[:2]
    )  # (batch, tokens, heads, size)
    causal = re.search(r'"mask_type":\s*"\w*CAUSAL"', one.attributes)
    matmuls = 5 if match[1] else 2
    return 2.0 * matmuls * math.prod(queries) * keys[1] / (2 if causal else 1)


def collective_kind(computation: Computation, one: Instruction) -> str | None:
    """Which collective an instruction is or begins, if any.

    libtpu writes a reduce-scatter as a fusion of an all-reduce and the slice that is kept, and what goes from slice to slice of a
    pod as sending to its host, with the collective's name beside it.
    """
    if one.opcode == "send":
        kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', one.attributes)
        return kind and kind[1].lower().replace("_", "-")
    name = one.opcode.removesuffix("-start")
    if name == "all-reduce" and all(user.opcode == "dynamic-slice" for user in _behind_views(computation, one)):
        return "reduce-scatter"
    return name if name in COLLECTIVES else None


def _behind_views(computation: Computation, one: Instruction) -> list[Instruction]:
    """What reads a value of a fusion, seen through bitcasts; itself where it is the result or stands in no fusion."""
    if one.is_root or not computation.root.opcode.startswith("dynamic-slice"):
        return [one]
    users = computation.users[one.name]
    return [
        behind
        for user in users
        for behind in (_behind_views(computation, user) if user.opcode == "bitcast" else [user])
    ]


def _collective(kind: str, computation: Computation, one: Instruction, n_devices: int, times: int) -> Collective:
    sent = sum(operand.bytes for operand in computation.operands(one))
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", one.attributes)
        numbers = np.array(re.findall(r"\d+", pairs[1]), int) if pairs else np.zeros(0, int)
        groups = numbers.reshape(-1, 2)
    elif one.opcode == "send":
        slices = _numbers(re.search(r'_xla_megascale_target="\{([^}]*)\}', one.attributes)[1])
        groups = np.arange(n_devices).reshape(slices, -1).T
        sent = one.shapes[0].bytes
    else:
        groups = replica_groups(one.attributes, n_devices)
    whole = sent * groups.shape[1] if kind == "all-gather" else sent
    return Collective(kind, whole, groups, times)


def _numbers(text: str) -> int:
    """How many numbers `1,2` or `0:3` stand for."""
    spans = (part.split(":") for part in text.split(","))
    return sum(int(span[-1]) - int(span[0]) + 1 for span in spans)


def replica_groups(attributes: str, n_devices: int) -> np.ndarray:
    """The groups of devices of a collective, (groups, members), in any of the forms that they are written in."""
    if mesh := re.search(r"replica_groups=@?mesh\[([^\]]*)\](?:, device_ids=\(([^)]*)\))? \{([^}]*)\}", attributes):
        axes = {name: int(size) for name, size in re.findall(r"'?(\w+)'?=(\d+)", mesh[1])}
        devices = _iota(mesh[2]) if mesh[2] else np.arange(math.prod(axes.values()))
        return _mesh_groups(axes, devices, re.findall(r"'?(\w+)'?(?::\((\d+)\)(\d+))?", mesh[3]))
    if listed := re.search(r"replica_groups=\{(\{[\d,{}\s]*\})\}", attributes):
        return np.array([re.findall(r"\d+", group) for group in re.findall(r"\{([\d,\s]+)\}", listed[1])], int)
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        return _iota(iota[2]).reshape([int(size) for size in iota[1].split(",")])
    return np.arange(n_devices)[None]


def _iota(text: str) -> np.ndarray:
    """`[2,4]T(1,0)`: numbers in order, laid out, transposed, and read off."""
    sizes, order = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    numbers = np.arange(math.prod(map(int, sizes.split(",")))).reshape([int(size) for size in sizes.split(",")])
    return (numbers.transpose([int(axis) for axis in order.split(",")]) if order else numbers).ravel()


def _mesh_groups(axes: dict[str, int], devices: np.ndarray, chosen: list[tuple[str, str, str]]) -> np.ndarray:
    """Groups along some axes of a mesh, of which one may be split: `axis:(before)size`."""
    sizes: list[int] = []
    moved: list[int] = []
    parts = {name: (int(before or 1), int(size)) if size else (1, axes[name]) for name, before, size in chosen}
    for name, whole in axes.items():
        before, size = parts.get(name, (whole, 1))
        if name in parts:
            moved.append(len(sizes) + 1)
        sizes += [before, size, whole // before // size]
    kept = [place for place in range(len(sizes)) if place not in moved]
    laid = devices.reshape(sizes).transpose(*kept, *moved)
    return laid.reshape(-1, math.prod(sizes[place] for place in moved))


def hbm_bytes_of(program: Program, computation: Computation, one: Instruction) -> float:
    """Bytes that an instruction outside fusions reads from and writes to main memory; collectives are counted apart."""
    if one.opcode in _FREE or _is_collective(one) or one.opcode.endswith(("-done", "-update")):
        return 0.0
    operands = computation.operands(one)
    match one.opcode:
        case "custom-call" if any(marker in one.attributes for marker in _MARKERS):
            return 0.0
        case "custom-call" if _CUBLAS in one.attributes:  # its second result is workspace, which it need not touch
            return one.shapes[0].hbm_bytes + sum(operand.hbm_bytes for operand in operands)
        case "fusion":
            return _fusion_bytes(program, one, operands)
        case "copy-start" | "slice-start" | "dynamic-slice" | "slice" | "gather":
            # An asynchronous one's result is (destination, source, context), a slice's ((source), slice, context).
            shapes = {"copy-start": one.shapes[:1], "slice-start": one.shapes[1:2]}.get(one.opcode, one.shapes)
            moved = sum(shape.bytes for shape in shapes)
            from_hbm = any(shape.in_hbm for operand in operands[:1] for shape in operand.shapes)
            return moved * from_hbm + sum(shape.hbm_bytes for shape in shapes)
        case "dynamic-update-slice":
            return 2 * operands[1].hbm_bytes
        case "scatter":
            return one.hbm_bytes + sum(operand.hbm_bytes for operand in operands[1:])
        case _:
            return one.hbm_bytes + sum(operand.hbm_bytes for operand in operands)


def _fusion_bytes(program: Program, one: Instruction, operands: list[Instruction]) -> float:
    fused = program.called(one)
    read = sum(
        min(_read(program, fused, fused.parameters[number]), operand.hbm_bytes)
        for number, operand in enumerate(operands)
        if number in fused.parameters and operand.hbm_bytes
    )
    results = fused.operands(fused.root) if fused.root.opcode == "tuple" else [fused.root]
    if len(results) != len(one.shapes):
        return read + one.hbm_bytes
    return read + sum(
        min(_written(program, fused, result), shape.bytes)
        for result, shape in zip(results, one.shapes, strict=True)
        if shape.in_hbm
    )


def _read(program: Program, fused: Computation, value: Instruction) -> float:
    """How much of a fused value is read: the slices of what is only sliced, nothing of what is only updated or passed on."""
    total = 0.0
    for user in fused.users[value.name]:
        match user.opcode:
            case "bitcast" | "reshape" | "get-tuple-element":
                total += _read(program, fused, user)
            case "dynamic-slice" | "slice" | "gather" if user.operands[0] == value.name:
                total += user.bytes
            case "dynamic-update-slice" if user.operands[0] == value.name:
                pass
            case "tuple" if user.is_root:
                pass
            case "fusion":
                inner = program.called(user)
                places = [place for place, name in enumerate(user.operands) if name == value.name]
                total += sum(_read(program, inner, inner.parameters[place]) for place in places)
            case _ if _is_collective(user) or _is_marker(user):
                pass
            case _:
                return value.bytes
    return total


def _written(program: Program, fused: Computation, result: Instruction) -> float:
    """How much of a fusion's result is written: the update of what is updated in place, nothing of what is passed on."""
    while result.opcode in ("bitcast", "reshape"):
        (result,) = fused.operands(result)
    if result.opcode == "dynamic-update-slice":
        return fused.operands(result)[1].bytes
    if result.opcode == "fusion" and (inner := program.called(result)).root.opcode != "tuple":
        return _written(program, inner, inner.root)
    passed_on = result.opcode == "parameter" or _is_collective(result) or _is_marker(result)
    return 0.0 if passed_on else result.bytes


def _is_collective(one: Instruction) -> bool:
    return one.opcode.removesuffix("-start") in COLLECTIVES


def _is_marker(one: Instruction) -> bool:
    return one.opcode == "custom-call" and any(marker in one.attributes for marker in _MARKERS)
