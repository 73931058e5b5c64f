"""Read machine code (SASS) as nvdisasm lists it: its loops, their multiply-adds, and their loads and stores.

A listing has labels, such as ``.L_x_3:``, and instructions with an address, a predicate, a name and operands::

    /*0210*/  @!P0 BRA `(.L_x_0) ;
    /*0220*/       LDG.E.128 R4, desc[UR10][R18.64] ;

A register of a thread has 32 bits; R4 with a load of 128 bits means R4 to R7.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.kernels.flow import Loop, loop_nest, reachable
from bench.records.kernels import CodeCounts, MachineCode

LABEL = re.compile(r"([.$\w]+):")
INSTRUCTION = re.compile(r"/\*[0-9a-f]+\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
TARGET = re.compile(r"[.$\w]+")
REGISTER = re.compile(r"\bR(\d+)(\.64)?")
MULTIPLY_ADDS = {"FFMA": 1, "FFMA32I": 1, "FFMA2": 2}
MEMORY = ("LDG", "LDS", "STG", "STS", "LD", "ST", "LDL", "STL")
ENDS = ("EXIT", "RET", "KILL")
JUMPS = ("BRA", "BRX", "JMP", "JMX")


@dataclass(frozen=True)
class Instruction:
    """One instruction; the predicate is empty if it always executes."""

    predicate: str
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        """``LDG`` for ``LDG.E.128``."""
        return self.opcode.partition(".")[0]

    @property
    def bits(self) -> int:
        """What a load or store moves for a thread."""
        sizes = {"8": 8, "U8": 8, "S8": 8, "16": 16, "U16": 16, "S16": 16, "64": 64, "128": 128}
        return next((sizes[part] for part in self.opcode.split(".")[1:] if part in sizes), 32)

    @property
    def conditional(self) -> bool:
        """Whether the next instruction can follow a jump or an exit: for a predicate, also among the operands."""
        alone = re.fullmatch(r"`?\(?[.$\w]+\)?", self.operands) is not None
        return bool(self.predicate) or (self.name in JUMPS and self.name != "BRX" and not alone)


def machine_code(listing: str) -> MachineCode:
    """Count the instructions of a kernel, loop by loop; ``listing`` starts with the kernel's entry.

    What cannot be reached without a call is left out: subroutines, and the padding at the end.
    """
    blocks, successors = _flow_graph(listing)
    nest = loop_nest(successors)
    loops: list[CodeCounts] = []

    def add(loop: Loop, parent: int | None) -> None:
        place = len(loops)
        loops.append(_count(_instructions(blocks, loop.own), parent, turns=2))
        for inner in sorted(loop.inner, key=lambda loop: min(loop.blocks)):
            add(inner, place)

    for loop in sorted(nest, key=lambda loop: min(loop.blocks)):
        add(loop, None)
    straight = set(reachable(successors)).difference(*(loop.blocks for loop in nest))
    return MachineCode(_count(_instructions(blocks, straight), None, turns=1), loops)


def _flow_graph(listing: str) -> tuple[list[list[Instruction]], list[list[int]]]:
    """The basic blocks, and the numbers of the blocks that can follow each one."""
    blocks: list[list[Instruction]] = [[]]
    starts: dict[str, int] = {}
    for raw in listing.splitlines():
        line = raw.strip()
        if label := LABEL.match(line):
            if blocks[-1]:
                blocks.append([])
            starts[label[1]] = len(blocks) - 1
        elif found := INSTRUCTION.match(line):
            blocks[-1].append(Instruction(found[1] or "", found[2], found[3]))
            if blocks[-1][-1].name in (*ENDS, *JUMPS):
                blocks.append([])
    successors = []
    for number, block in enumerate(blocks, 1):
        last = block[-1] if block else Instruction("", "NOP", "")
        following = []
        if last.name in JUMPS:
            following = [starts[word] for word in TARGET.findall(last.operands) if word in starts]
        if number < len(blocks) and (last.name not in (*ENDS, *JUMPS) or last.conditional):
            following.append(number)
        successors.append(following)
    return blocks, successors


def _instructions(blocks: Sequence[list[Instruction]], numbers: Iterable[int]) -> list[Instruction]:
    return [instruction for number in sorted(numbers) for instruction in blocks[number]]


def _count(code: list[Instruction], parent: int | None, turns: int) -> CodeCounts:
    memory = Counter(f"{each.name}.{each.bits}" for each in code if each.name in MEMORY)
    return CodeCounts(
        instructions=len(code),
        ffma=sum(MULTIPLY_ADDS.get(each.name, 0) for each in code),
        memory=dict(sorted(memory.items())),
        loads_together=_loads_together(code * turns),
        parent=parent,
    )


def _loads_together(code: list[Instruction]) -> int:
    """The most global loads on their way when the value of one of them is needed, or at the end of the code.

    The code is read from top to bottom, whatever the branches. A value is also needed where its register is written
    again. A loop is read twice: it may load in one turn what it needs in the next.
    """
    waiting: list[set[int]] = []  # the registers of each load on its way
    most = 0
    for each in code:
        used = _registers(each)
        needed = [load for load in waiting if load & used]
        if needed:
            most = max(most, len(waiting))
            waiting = [load for load in waiting if not load & used]
        if each.name in ("LDG", "LD"):
            first, _, _ = each.operands.partition(",")
            if target := _wide(first, each.bits):
                waiting.append(target)
    return max(most, len(waiting))


def _registers(instruction: Instruction) -> set[int]:
    """Every register that an instruction reads or writes, as far as its text says."""
    used = set()
    for number, pair in REGISTER.findall(instruction.operands):
        used |= {int(number), int(number) + 1} if pair else {int(number)}
    if instruction.name in MEMORY:
        value = instruction.operands.split(",")[-1 if instruction.name.startswith("ST") else 0]
        used |= _wide(value, instruction.bits)
    return used


def _wide(operand: str, bits: int) -> set[int]:
    """The registers of a value of so many bits; none for RZ, which is always zero."""
    found = REGISTER.match(operand.strip())
    return set(range(int(found[1]), int(found[1]) + max(1, bits // 32))) if found else set()
