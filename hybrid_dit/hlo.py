"""What a compiled program does, read from its text: collectives with their bytes, and the compiler's own estimate.

XLA's `cost_analysis` counts the body of a loop once. Here every instruction counts as often as it runs: bodies of
`while` loops by their trip count, which XLA states on CPU and which on TPU is the constant that the loop's condition
compares a counter with (`lax.scan`, `lax.map` and `fori_loop` count 0, 1, ... in steps of 1).
"""

import dataclasses
import re
from collections.abc import Callable, Iterator

from hybrid_dit.errors import UserError

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_BYTES = {"pred": 1, "c64": 8, "c128": 16}  # the others say their bits in their name
_BRACES = re.compile(r"\{[^{}]*\}")  # layouts and attributes; innermost first
_LINE = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_CALLED = re.compile(r"(body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
# A TPU may run one collective in pieces beside several fused computations; each repeats it with the chain's number.
_CHAIN = re.compile(r'channel_id=(\d+),.*\bchain_id="(\d+)"')
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: without the leading "%".
        opcode: such as "fusion" or "all-gather-start".
        bytes: of its result; of all its parts for a tuple.
        operands: names of the operands in the same computation.
        text: the line.
        root: whether it is the computation's result.
    """

    name: str
    opcode: str
    bytes: int
    operands: tuple[str, ...]
    text: str
    root: bool


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program, per device.

    Attributes:
        computations: name -> {name: instruction}.
        entry: name of the computation that runs.
    """

    computations: dict[str, dict[str, Instruction]]
    entry: str

    def executed(self) -> Iterator[tuple[Instruction, dict[str, Instruction], int, bool]]:
        """Yields (instruction, its computation, how often it runs, whether that is known).

        All branches of a conditional count. Loops of unknown length count once and make what is in them not known.
        """
        yield from self._walk(self.entry, 1, True)

    def _walk(self, name: str, times: int, known: bool):
        inside = self.computations.get(name, {})
        for instruction in inside.values():
            yield instruction, inside, times, known
            if instruction.opcode.endswith(("-done", "-update")):  # they name what their start has named
                continue
            called = {kind: [target] for kind, target in _CALLED.findall(instruction.text)}
            called["branches"] = [
                branch.strip().lstrip("%")
                for group in _BRANCHES.findall(instruction.text)
                for branch in group.split(",")
            ]
            if instruction.opcode == "while":
                trips = self._trips(instruction, called["condition"][0])
                yield from self._walk(called["body"][0], times * (trips or 1), known and trips is not None)
            else:
                for target in sum(called.values(), []):
                    yield from self._walk(target, times, known)

    def _trips(self, loop: Instruction, condition: str) -> int | None:
        stated = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.text)
        if stated:
            return int(stated[1])
        inside = self.computations[condition]
        root = next(i for i in inside.values() if i.root)
        if root.opcode != "compare" or "direction=LT" not in root.text:
            return None
        limit = inside.get(root.operands[-1])
        value = limit and re.search(r"constant\((\d+)\)", limit.text)
        return int(value[1]) if value else None


def parse(text: str) -> Program:
    """Reads a compiled module (`jax.stages.Compiled.as_text()`).

    Raises:
        UserError: no entry computation in it.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, inside = None, None
    for line in text.splitlines():
        if inside is not None and line.startswith("}"):
            inside = None
        elif inside is None:
            header = _HEADER.match(line)
            if header:
                inside = computations[header[2]] = {}
                entry = header[2] if header[1] else entry
        else:
            instruction = _instruction(line)
            if instruction:
                inside[instruction.name] = instruction
    if entry is None:
        raise UserError("no entry computation in the compiled program's text")
    return Program(computations, entry)


def _instruction(line: str) -> Instruction | None:
    plain = line
    while _BRACES.search(plain):
        plain = _BRACES.sub("", plain)
    match = _LINE.match(plain)
    if not match:
        return None
    root, name, kind, opcode, rest = match.groups()
    operands = tuple(re.findall(r"%([\w.\-]+)", rest.split("), ", 1)[0]))
    return Instruction(name, opcode, _type_bytes(kind), operands, line, bool(root))


def _type_bytes(kind: str) -> int:
    """Bytes of "f32[2,3]" or of all parts of a tuple; tokens and the like have none."""
    total = 0
    for dtype, sizes in re.findall(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]", kind):
        bits = re.search(r"\d+", dtype)
        size = _BYTES.get(dtype, max(int(bits[0]) // 8, 1) if bits else 0)
        for n in filter(None, sizes.split(",")):
            size *= int(n)
        total += size
    return total


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The collectives of one kind in one run of a program, per device.

    Attributes:
        count: how many run.
        bytes: of the whole array of each, summed: what a device holds after an all-gather, gives into a
            reduce-scatter, and for the others the array itself. (On a ring, a share (n - 1) / n of it moves; twice that
            for an all-reduce.)
    """

    count: int
    bytes: int


def collectives(program: Program) -> tuple[dict[str, Traffic], int]:
    """Returns ({kind: traffic} of the kinds that occur, number of collectives in loops of unknown length)."""
    return _sum(program, lambda kind, instruction: kind)


def collectives_by_origin(program: Program) -> dict[tuple[str, str], Traffic]:
    """Returns {(kind, the JAX operation that it comes from): traffic}, the most bytes first."""
    name = re.compile(r'op_name="([^"]*)"')
    return _sum(program, lambda kind, i: (kind, match[1] if (match := name.search(i.text)) else ""))[0]


def _sum(program: Program, key: Callable) -> tuple[dict, int]:
    """Traffic by key(kind, instruction), the most bytes first, and how many are in loops of unknown length."""
    found: dict = {}
    unknown, chains = 0, set()
    for instruction, inside, times, known in program.executed():
        kind = instruction.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        chain = _CHAIN.search(instruction.text)
        if chain and chain.groups() in chains:
            continue
        if chain:
            chains.add(chain.groups())
        given = sum(inside[name].bytes for name in instruction.operands if name in inside)
        result = instruction.bytes
        if instruction.opcode == "all-gather-start":
            result -= given  # its type lists the operands too
        elif kind == "collective-permute":
            result = given  # as do these, with a few scalars beside
        name = key(kind, instruction)
        before = found.get(name, Traffic(0, 0))
        found[name] = Traffic(before.count + times, before.bytes + times * max(given, result))
        unknown += not known
    return dict(sorted(found.items(), key=lambda item: -item[1].bytes)), unknown


def estimated_cycles(program: Program) -> int:
    """Returns the sum of the TPU compiler's own cycle estimates, loops by their trip count; 0 on other platforms.

    Waiting for memory and for other chips is not in it: it compares programs and is not a time.
    """
    total = 0
    for instruction, _, times, _ in program.executed():
        cycles = re.search(r'"estimated_cycles":"(\d+)"', instruction.text)
        total += times * int(cycles[1]) if cycles else 0
    return total
