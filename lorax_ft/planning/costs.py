"""What a compiled program costs: bytes of memory and of links that it moves, and a TPU's cycles."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

from lorax_ft.planning.hlo import Array, Computation, Instruction, Program

# What names or aliases arrays and moves nothing; what runs other computations is told by those.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "opt-barrier", "domain"),
    *("while", "conditional", "call", "after-all", "partition-id", "replica-id"),
    *("async-start", "async-update", "async-done", "copy-done", "slice-done"),
}
_ESTIMATE = re.compile(r'"estimated_cycles":"(\d+)"')
_UNKNOWN = 2**63 - 1  # what stands there where the compiler has no estimate
_KERNEL_FLOPS = re.compile(r'"cost_estimate":\{"flops":"(\d+)"')
_KERNEL_LABELS = re.compile(r"dim_labels=\w+_(\w+)->")
_FUSIONS = ("fusion", "fusion-start")  # the second, since JAX 0.11, runs beside others
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")
_NAMES = {"AllocateBuffer", "ConcatBitcast"}  # calls that only say where arrays lie
_SLICES = ("dynamic-slice", "gather", "slice")


def _all(n: int) -> float:
    return (n - 1) / n


# Bytes that a device sends for each byte of the larger of operand and result, among n devices in a
# ring: the least that any algorithm sends.
COLLECTIVES: Mapping[str, Callable[[int], float]] = {
    "all-gather": _all,
    "reduce-scatter": _all,
    "all-to-all": _all,
    "ragged-all-to-all": _all,
    "all-reduce": lambda n: 2 * _all(n),
    "collective-permute": lambda n: 1.0,
    "collective-broadcast": lambda n: 1.0,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """All the communications of one kind, of one type of element, in a step."""

    kind: str
    dtype: str
    count: int
    bytes: int  # of the larger of operand and result, on one device, all of them together
    sent: float  # bytes that a device sends at least


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cycles:
    """The TPU compiler's own estimate: of its compute units, on one device, nothing overlapped."""

    total: int
    by_kind: Mapping[str, int]
    without: Mapping[str, int]  # calls of kernels that carry no estimate, and how often


def collectives(program: Program, devices: int) -> tuple[Collective, ...]:
    """A step's communication, the most bytes first; scanned layers count as often as they run."""
    found: dict[tuple[str, str], list[float]] = {}
    for place, one, times in _communications(program):
        kind = one.opcode.removesuffix("-start")
        operands, results = _joined(place, one)
        size = max(_bytes(arrays, any_space=True) for arrays in (operands, results))
        largest = max((*operands, *results), key=lambda array: array.bytes)
        row = found.setdefault((kind, largest.dtype), [0, 0, 0.0])
        row[0] += times
        row[1] += size * times
        row[2] += size * times * COLLECTIVES[kind](_group_size(one, devices))
    rows = [
        Collective(kind=kind, dtype=dtype, count=int(count), bytes=int(size), sent=sent)
        for (kind, dtype), (count, size, sent) in found.items()
    ]
    return tuple(sorted(rows, key=lambda row: -row.bytes))


def traffic(program: Program) -> int:
    """Bytes that a step reads and writes in a device's main memory, each array of a fusion once.

    Of an array that is only sliced or looked up, what is taken counts, and of one that is updated
    in place, what is put in. A communication counts once, whatever parts it is sent in.
    """
    computed = sum(
        times * _moved(program, instruction, computation)
        for instruction, computation, times in program.executed()
    )
    communicated = sum(
        times * _bytes(arrays)
        for place, one, times in _communications(program)
        for arrays in _joined(place, one)
    )
    return computed + communicated


def cycles(program: Program, flops_per_cycle: float | None = None) -> Cycles | None:
    """The sum of the TPU compiler's estimates; None for a program of another compiler.

    Kernels written in Pallas carry none, nor do products that a communication is sent beside.
    Those whose FLOPs are known count as these take at `flops_per_cycle`, where it is given; the
    others are named in `without`.
    """
    by_kind: collections.Counter[str] = collections.Counter()
    for instruction, estimate, times in estimates(program):
        by_kind[_kind(instruction)] += estimate * times
    if not by_kind:
        return None
    without: collections.Counter[str] = collections.Counter()
    for instruction, flops, times in kernels(program):
        if flops and flops_per_cycle:
            by_kind[_kind(instruction)] += round(flops / flops_per_cycle) * times
        else:
            without[_target(instruction) or _kind(instruction)] += times
    return Cycles(
        total=sum(by_kind.values()), by_kind=dict(by_kind.most_common()), without=dict(without)
    )


def estimates(program: Program) -> Iterator[tuple[Instruction, int, int]]:
    """(instruction, cycles of one run, how often it runs) of all that the compiler has told."""
    for instruction, _, times in program.executed():
        if (cycles := _estimate(instruction)) not in (None, _UNKNOWN):
            yield instruction, cycles, times


def kernels(program: Program) -> Iterator[tuple[Instruction, int | None, int]]:
    """(instruction, FLOPs of one run if they are known, how often it runs) of all other calls, and
    of what the compiler says it has no estimate of."""
    for instruction, _, times in program.executed():
        cycles = _estimate(instruction)
        if cycles == _UNKNOWN:
            yield instruction, _product_flops(program, instruction), times
        elif cycles is None and _target(instruction) not in ("", *_NAMES):
            told = _KERNEL_FLOPS.search(instruction.attributes)
            yield instruction, int(told.group(1)) if told else None, times


def _estimate(instruction: Instruction) -> int | None:
    found = _ESTIMATE.search(instruction.attributes)
    return int(found.group(1)) if found else None


def _product_flops(program: Program, fusion: Instruction) -> int | None:
    """Of the convolutions in a fusion, as which TPUs compute all products; None without one."""
    inner = [program.computations.get(name, {}) for name in fusion.called]
    return (
        sum(
            2 * result.size * kernel.size // kernel.shape[labels.group(1).index("o")]
            for computation in inner
            for one in computation.values()
            if (labels := _KERNEL_LABELS.search(one.attributes)) and one.opcode == "convolution"
            for (result,), (kernel,) in [(one.arrays, computation[one.operands[1]].arrays)]
        )
        or None
    )


def _target(instruction: Instruction) -> str:
    found = re.search(r'custom_call_target="([^"]+)"', instruction.attributes)
    return found.group(1) if found else ""


def _kind(instruction: Instruction) -> str:
    return re.sub(r"[.\d]+$", "", instruction.name)


def _communications(program: Program) -> Iterator[tuple[Computation, Instruction, int]]:
    """Each collective with the computation that it stands in, and how often it runs.

    A TPU sends in parts beside arithmetic, and each part is a fusion that shows the whole: what has
    one channel is one, as often as the part that runs least.
    """
    by_channel: dict[str, dict[str, tuple[Computation, Instruction]]] = {}
    runs: collections.Counter[str] = collections.Counter()
    for instruction, computation, times in program.executed():
        inside = (
            program.computations.get(name, {})
            for name in instruction.called
            if instruction.opcode in _FUSIONS
        )
        within = [(computation, instruction), *((c, i) for c in inside for i in c.values())]
        for place, one in within:
            if one.opcode.removesuffix("-start") in COLLECTIVES:
                channel = _CHANNEL.search(one.attributes)
                parts = by_channel.setdefault(channel.group(1) if channel else one.name, {})
                parts[one.name] = place, one
                runs[one.name] += times
    for parts in by_channel.values():
        name = min(parts, key=lambda name: runs[name])
        yield (*parts[name], runs[name])


def _group_size(instruction: Instruction, devices: int) -> int:
    """How many devices one collective joins, by its `replica_groups` in any of their forms."""
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", instruction.attributes):
        return int(found.group(2))
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", instruction.attributes):
        return len(found.group(1).split(","))
    if found := _MESH_GROUPS.search(instruction.attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found.group(1)))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", found.group(2)))
    return max(devices, 1)


def _joined(place: Computation, one: Instruction) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """What a communication takes and gives, on one device."""
    operands = tuple(a for name in one.operands if name in place for a in place[name].arrays)
    # the type of one that is started holds its operands first, but for an all-reduce's
    starts = one.opcode.endswith("-start") and one.opcode != "all-reduce-start"
    return operands, one.arrays[len(operands) if starts else 0 :]


def _moved(program: Program, instruction: Instruction, computation: Computation) -> int:
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done") or _target(instruction) in _NAMES:
        return 0
    if _communicates(instruction):
        return 0  # `traffic` counts it apart
    operands = [computation[name] for name in instruction.operands if name in computation]
    if opcode in _FUSIONS:
        inner = program.computations.get(next(iter(instruction.called), ""), {})
        # the type of one that is started holds the operands, the results and its own context
        held = sum(len(operand.arrays) for operand in operands) if opcode != "fusion" else 0
        return _fusion(inner, instruction.arrays[held:], operands)
    if opcode == "slice-start":  # its type holds the operand, what it cuts and a context
        return _bytes(instruction.arrays[1:2], any_space=True) + _bytes(instruction.arrays[1:2])
    if opcode in _SLICES:
        return 2 * _bytes(instruction.arrays)
    if opcode == "dynamic-update-slice":
        return 2 * _bytes(operands[1].arrays)
    written = instruction.arrays[:1] if opcode.endswith("-start") else instruction.arrays
    return _bytes(written) + sum(_bytes(operand.arrays) for operand in operands)


def _fusion(inner: Computation, outer: tuple[Array, ...], operands: list[Instruction]) -> int:
    """What a fusion reads of each operand, and what it writes of `outer`, its results."""
    users: dict[str, list[Instruction]] = {}
    for instruction in inner.values():
        for name in instruction.operands:
            users.setdefault(name, []).append(instruction)
    parameters = [i for i in inner.values() if i.opcode == "parameter"]
    total = 0
    for parameter, operand in zip(_in_order(parameters), operands):
        total += min(_read(inner, users, parameter.name), _bytes(operand.arrays))
    roots = [i for i in inner.values() if i.is_root]
    results = [
        inner[name] for r in roots if r.opcode == "tuple" for name in r.operands if name in inner
    ]
    for result, array in zip(results or roots, outer):
        if array.space:
            continue
        updated = _through_bitcasts(inner, result)
        if updated.opcode == "parameter" or _communicates(updated):
            continue  # handed on as it came
        in_place = updated.opcode == "dynamic-update-slice"
        total += _bytes(inner[updated.operands[1]].arrays) if in_place else array.bytes
    return total


def _read(inner: Computation, users: Mapping[str, list[Instruction]], name: str) -> int:
    """The bytes of a parameter that its users take."""
    total = 0
    for user in users.get(name, ()):
        if user.opcode == "bitcast":
            total += _read(inner, users, user.name)
        elif user.opcode in _SLICES and user.operands[0] == name:
            total += _bytes(user.arrays, any_space=True)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            continue  # stays where it is
        elif _communicates(user) or (user.is_root and user.opcode == "tuple"):
            continue  # handed on as it is
        else:
            return _bytes(inner[name].arrays, any_space=True)
    return total


def _communicates(instruction: Instruction) -> bool:
    """Whether it is a communication or where one begins or ends, which `traffic` counts apart."""
    kind = instruction.opcode.removesuffix("-start")
    return kind in COLLECTIVES or _target(instruction).startswith("AsyncCollective")


def _through_bitcasts(inner: Computation, instruction: Instruction) -> Instruction:
    while instruction.opcode == "bitcast" and instruction.operands[0] in inner:
        instruction = inner[instruction.operands[0]]
    return instruction


def _in_order(parameters: list[Instruction]) -> list[Instruction]:
    """A computation's parameters by their numbers."""
    return sorted(parameters, key=lambda p: int(re.findall(r"\d+", p.attributes)[0]))


def _bytes(arrays: Iterable[Array], any_space: bool = False) -> int:
    return sum(array.bytes for array in arrays if any_space or not array.space)
