"""Operations, estimated cycles and collectives of a compiled program, read from its text."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from titok_jax.runtime.chips import Chip


@dataclasses.dataclass
class Cost:
    """The cost of one run of a computation on one device.

    Attributes:
      cycles: the TPU compiler's estimate, without waiting for other devices. Infinite if any part is estimated as infinite.
        The compiler has none for a Pallas kernel: its cycles are ours (`_kernel_cycles`).
      bytes: {kind of collective: bytes of its results}. For an all-gather this is the full array on every device; an
        all-reduce sends its bytes about twice.
      count: {kind of collective: number of executions}.
      arrays: the shapes of the results of collectives, each once.
      unknown_loops: number of loops whose trip count is unknown. They count as one iteration.
    """

    cycles: float = 0.0
    bytes: dict[str, float] = dataclasses.field(default_factory=dict)
    count: dict[str, float] = dataclasses.field(default_factory=dict)
    arrays: set[tuple[str, tuple[int, ...]]] = dataclasses.field(default_factory=set)
    unknown_loops: int = 0

    def add(self, other: "Cost", times: float = 1.0, cycles: bool = True) -> None:
        self.cycles += other.cycles * times if cycles else 0.0
        for mine, theirs in ((self.bytes, other.bytes), (self.count, other.count)):
            for kind, value in theirs.items():
                mine[kind] = mine.get(kind, 0.0) + value * times
        self.arrays |= other.arrays
        self.unknown_loops += other.unknown_loops

    @property
    def sent(self) -> float:
        """Approximate number of bytes that a device sends. An all-reduce counts as a reduce-scatter plus an all-gather."""
        return sum(value * (2 if kind == "all-reduce" else 1) for kind, value in self.bytes.items())


class _Instruction(NamedTuple):
    name: str
    opcode: str
    shapes: list[tuple[str, tuple[int, ...]]]  # (type, dimensions) of the result; a tuple is flattened
    text: str


_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
_LANES = 1024  # of a TensorCore's vector unit
_VECTOR_CYCLES = 2.0
_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16}


def num_bytes(shape: tuple[str, tuple[int, ...]]) -> float:
    kind, dims = shape
    bits = _BITS.get(kind) or int(re.search(r"\d+", kind)[0])
    return math.prod(dims) * bits / 8


def _computations(hlo: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Parses the text of an HLO module: the instructions of each computation, and the name of the entry computation."""
    found: dict[str, list[_Instruction]] = {}
    entry, current = "", None
    for line in hlo.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if header:
            current = found.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
            continue
        instruction = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(", line)
        if instruction and current is not None:
            shapes = [
                (kind, tuple(int(n) for n in dims.split(",") if n))
                for kind, dims in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", instruction[2])
            ]
            current.append(_Instruction(instruction[1], instruction[3], shapes, line))
    return found, entry


def _operands(instruction: _Instruction) -> list[str]:
    inside = instruction.text.split(f" {instruction.opcode}(", 1)[1].split(")", 1)[0]
    return re.findall(r"%([\w.\-]+)", inside)


def _rounds(loop: _Instruction, computations: Mapping[str, list[_Instruction]]) -> float | None:
    """The trip count of a `while` loop that counts up from 0; None for any other loop."""
    known = re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.text)
    if known:
        return float(known[1])
    names = {key: re.search(rf"{key}=%([\w.\-]+)", loop.text)[1] for key in ("condition", "body")}
    condition, body = ({i.name: i for i in computations[names[key]]} for key in ("condition", "body"))

    def constant(name: str, of: Mapping[str, _Instruction]) -> int | None:
        value = name in of and re.search(r" constant\((\d+)\)", of[name].text)
        return int(value[1]) if value else None

    test = next((i for i in reversed(condition.values()) if i.text.lstrip().startswith("ROOT")), None)
    if test is None or test.opcode != "compare" or "direction=LT" not in test.text:
        return None
    counter, limit = _operands(test)
    limit = constant(limit, condition)
    index = counter in condition and re.search(r"index=(\d+)", condition[counter].text)
    result = next(i for i in reversed(body.values()) if i.text.lstrip().startswith("ROOT"))
    if limit is None or not index or result.opcode != "tuple":
        return None
    step = body.get(_operands(result)[int(index[1])])
    while step is not None and step.opcode in ("copy", "bitcast"):
        step = body.get(_operands(step)[0])
    if step is None or step.opcode != "add":
        return None
    increment = next((n for n in (constant(name, body) for name in _operands(step)) if n is not None), None)
    return None if not increment else math.ceil(limit / increment)


def _kernel_cycles(call: str, chip: Chip) -> float:
    """Our estimate for a Pallas kernel, from the `pl.CostEstimate` that it was given: the time for its operations at the
    chip's peak and then for its exponentials, or for its bytes if that is longer.

    An exponential stands for all that a softmax and its gradient compute per score outside of products. `_VECTOR_CYCLES`
    fits the compiler's own schedules of attention's kernel for a v5e.
    """
    flops, exponentials, moved = (
        float(found[1]) if (found := re.search(rf'"{key}": ?"?(\d+)', call)) else 0.0
        for key in ("flops", "transcendentals", "bytes_accessed")
    )
    hertz = chip.clock_ghz * 1e9
    computing = flops / (chip.tflops * 1e12) * hertz + exponentials / (_LANES * chip.cores) * _VECTOR_CYCLES
    return max(computing, moved / (chip.bandwidth * 1e9) * hertz)


def program_cost(hlo: str, chip: Chip | None = None) -> Cost:
    """Computes the cost of a TPU program from the text of its optimised HLO.

    The body of a loop is multiplied by its trip count. A conditional costs as much as its most expensive branch.

    Args:
      chip: the one that the program was compiled for; without it, Pallas kernels take no cycles.
    """
    computations, entry = _computations(hlo)
    costs: dict[str, Cost] = {}

    def cost(name: str) -> Cost:
        if name in costs:
            return costs[name]
        total = costs[name] = Cost()
        for instruction in computations[name]:
            cycles = re.search(r'"estimated_cycles":"(\d+)"', instruction.text)
            total.cycles += (math.inf if int(cycles[1]) >= 2**63 - 1 else float(cycles[1])) if cycles else 0.0
            opcode, text = instruction.opcode, instruction.text
            if chip and not cycles and opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in text:
                total.cycles += _kernel_cycles(text, chip)
            kind = opcode.removesuffix("-start")
            if kind in _COLLECTIVES:
                shapes = instruction.shapes
                if opcode.endswith("-start") and kind != "all-reduce":  # (operands, results, two counters)
                    shapes = [shape for shape in shapes if shape != ("u32", ())]
                    shapes = shapes[len(shapes) // 2 :]
                total.add(Cost(bytes={kind: sum(map(num_bytes, shapes))}, count={kind: 1}, arrays=set(shapes)))
            elif opcode == "while":
                rounds = _rounds(instruction, computations)
                total.unknown_loops += rounds is None
                total.add(cost(re.search(r"body=%([\w.\-]+)", text)[1]), times=rounds or 1)
            elif opcode == "conditional":
                branches = re.search(r"branch_computations=\{([^}]*)\}", text)
                names = branches[1] if branches else " ".join(re.findall(r"(?:true|false)_computation=%[\w.\-]+", text))
                found = [cost(branch) for branch in re.findall(r"%([\w.\-]+)", names)]
                total.add(max(found, key=lambda branch: branch.cycles))
            elif opcode in ("fusion", "call", "async-start"):
                called = re.search(r"(?:calls|to_apply)=%([\w.\-]+)", text)
                if called:  # the estimate of a fusion already includes these cycles
                    total.add(cost(called[1]), cycles=opcode != "fusion")
        return total

    return cost(entry)
