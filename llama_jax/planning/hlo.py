"""A compiled program's text (HLO) as values: computations of instructions, with shapes in bytes and loops' trip counts.

Only what costs are counted from is read. The text is what `jax.stages.Compiled.as_text` gives, after the compiler's passes.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

_BITS = {"pred": 8, "token": 0, "opaque": 0} | {"s4": 4, "u4": 4, "s2": 2, "u2": 2, "f4e2m1fn": 4}
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_NAME = r"%?([\w.\-]+)"


@dataclass(frozen=True)
class Shape:
    """One array of an instruction's result."""

    dtype: str
    dims: tuple[int, ...]
    in_hbm: bool = True
    """Whether it lies in the device's main memory, not in memory on the chip or the host's."""

    @property
    def elements(self) -> int:
        """How many numbers it has."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        """Its size, padding aside."""
        bits = _BITS.get(self.dtype) if self.dtype in _BITS else int(re.search(r"\d+", self.dtype).group())
        return self.elements * bits / 8

    @property
    def hbm_bytes(self) -> float:
        """Its size, if it lies in main memory."""
        return self.bytes if self.in_hbm else 0.0


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    """Its result; several arrays are a tuple, flattened."""
    operands: tuple[str, ...]
    arguments: str
    """What stands between its parentheses."""
    attributes: str
    """What stands behind them."""
    is_root: bool

    def attribute(self, name: str) -> str | None:
        """The value of an attribute that is a word or stands in braces: `body`, `window`, `dim_labels`."""
        match = re.search(rf"\b{name}=(\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}}|%?[\w.\->]+)", self.attributes)
        return match and match[1].lstrip("%")

    @property
    def hbm_bytes(self) -> float:
        """Of its result, in main memory."""
        return sum(shape.hbm_bytes for shape in self.shapes)

    @property
    def bytes(self) -> float:
        """Of its result, wherever it lies."""
        return sum(shape.bytes for shape in self.shapes)


@dataclass(frozen=True)
class Computation:
    """A function of the program: instructions by name, in order."""

    name: str
    instructions: dict[str, Instruction]

    @cached_property
    def root(self) -> Instruction:
        """What it returns."""
        return next((one for one in self.instructions.values() if one.is_root), list(self.instructions.values())[-1])

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that read each instruction."""
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for one in self.instructions.values():
            for operand in dict.fromkeys(one.operands):
                found.get(operand, []).append(one)
        return found

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Its parameters by number."""
        return {int(one.arguments): one for one in self.instructions.values() if one.opcode == "parameter"}

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """The instructions that an instruction reads."""
        return [self.instructions[name] for name in instruction.operands if name in self.instructions]


@dataclass(frozen=True)
class Program:
    """Every computation, and the one that runs first."""

    computations: dict[str, Computation]
    entry: str
    data_loops: int | None = None
    """How often a loop runs whose number the data decides, if that is known."""

    def called(self, instruction: Instruction, name: str = "calls") -> Computation | None:
        """The computation that an attribute of an instruction names."""
        return self.computations.get(instruction.attribute(name) or "")

    def running(self) -> Iterator[tuple[Computation, Instruction, int]]:
        """Every instruction outside fusions, with its computation and how often it runs in one call of the program.

        A branch of a conditional counts as if it were always taken.
        """
        yield from self._running(self.computations[self.entry], 1)

    def _running(self, computation: Computation, times: int) -> Iterator[tuple[Computation, Instruction, int]]:
        for one in computation.instructions.values():
            yield computation, one, times
            match one.opcode:
                case "while":
                    yield from self._running(self.called(one, "body"), times * self.trip_count(computation, one))
                case "call":
                    yield from self._running(self.called(one, "to_apply"), times)
                case "conditional":
                    names = re.findall(_NAME, one.attribute("branch_computations") or "")
                    names += [one.attribute(name) or "" for name in ("true_computation", "false_computation")]
                    for name in filter(None, names):
                        yield from self._running(self.computations[name], times)
                case "async-start" if self.called(one):
                    yield from self._running(self.called(one), times)

    def trip_count(self, computation: Computation, loop: Instruction) -> int:
        """How often a loop's body runs: said by the compiler, read from a counter that runs up to a constant, or `data_loops`.

        Raises:
          ValueError: it is none of these.
        """
        if known := re.search(r'"?known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes):
            return int(known[1])
        condition, body = self.called(loop, "condition"), self.called(loop, "body")
        try:
            limit, place = self._limit(condition)
        except ValueError:
            if self.data_loops is None:
                raise
            return self.data_loops
        (state,) = computation.operands(loop)
        start = _constant(computation, computation.operands(state)[place]) if state.opcode == "tuple" else 0
        step, new = 1, body.operands(body.root)[place] if body.root.opcode == "tuple" else None
        while new is not None and new.opcode in ("copy", "bitcast"):
            (new,) = body.operands(new)
        if new is not None and new.opcode == "add":
            step = next((n for n in (_constant(body, one) for one in body.operands(new)) if n is not None), 1)
        return max(math.ceil((limit - (start or 0)) / step), 0)

    def _limit(self, condition: Computation) -> tuple[int, int]:
        """The constant up to which a condition lets a counter run, and the counter's place in the loop's state."""
        root, inside = condition.root, condition
        outer = list(root.operands)
        if root.opcode == "fusion":
            inside = self.called(root)
            root = inside.root
        if root.opcode != "compare" or "direction=LT" not in root.attributes:
            raise ValueError(f"the condition {condition.name} does not compare a counter with a constant")
        limit = place = None
        for one in inside.operands(root):
            if one.opcode == "parameter" and inside is not condition:
                one = condition.instructions[outer[int(one.arguments)]]
            if one.opcode == "get-tuple-element":
                place = int(re.search(r"index=(\d+)", one.attributes)[1])
            else:
                limit = _constant(condition if one.name in condition.instructions else inside, one)
        if limit is None or place is None:
            raise ValueError(f"the condition {condition.name} does not compare a counter with a constant")
        return limit, place


def parse(text: str) -> Program:
    """Reads the text of a program."""
    computations: dict[str, Computation] = {}
    entry, name, lines = "", None, {}
    # What a kernel says of itself may have line breaks.
    for line in re.sub(
        r"\n(?! *(?:ROOT )?%?[\w.\-]+ = |\}$|\} //|ENTRY|%?[\w.\-]+ \(|$)", " ", text, flags=re.M
    ).splitlines():
        if name is None:
            header = re.match(rf"(ENTRY )?{_NAME} \(.*\{{$", line)
            if header:
                name, lines = header[2], {}
                entry = name if header[1] else entry
        elif line.rstrip() == "}" or line.startswith("} //"):
            computations[name] = Computation(name, lines)
            name = None
        elif instruction := _instruction(line):
            lines[instruction.name] = instruction
    return Program(computations, entry or list(computations)[-1])


def _instruction(line: str) -> Instruction | None:
    head = re.match(rf"\s+(ROOT )?{_NAME} = ", line)
    if not head:
        return None
    at = head.end()
    end = _closing(line, at) if line[at] == "(" else line.index(" ", at)
    shapes = tuple(_shapes(line[at:end]))
    call = re.compile(r"\s*([\w\-]+)\(").match(line, end)
    if not call:
        return None
    close = _closing(line, call.end() - 1)
    arguments, attributes = line[call.end() : close - 1], line[close:]
    operands = () if call[1] in ("constant", "parameter") else tuple(re.findall(r"%([\w.\-]+)", arguments))
    return Instruction(head[2], call[1], shapes, operands, arguments, attributes, bool(head[1]))


def _closing(line: str, at: int) -> int:
    """The place behind the parenthesis that closes the one at `at`."""
    depth = 0
    for place in range(at, len(line)):
        depth += (line[place] == "(") - (line[place] == ")")
        if not depth:
            return place + 1
    return len(line)


def _shapes(text: str) -> Iterator[Shape]:
    for dtype, dims, layout in _SHAPE.findall(text):
        sizes = tuple(int(size.removeprefix("<=")) for size in dims.split(",") if size)
        # S(0) is HBM; others are on the chip (vector, scalar memory, flags), and 5 is the host's.
        space = re.search(r"S\((\d+)\)", layout)
        yield Shape(dtype, sizes, not space or space[1] == "0")


def _constant(computation: Computation, one: Instruction) -> int | None:
    """The number that an instruction is known to be."""
    while one.opcode in ("copy", "bitcast", "convert") and (operands := computation.operands(one)):
        (one,) = operands
    return int(one.arguments) if one.opcode == "constant" and re.fullmatch(r"-?\d+", one.arguments) else None
