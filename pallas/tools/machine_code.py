"""What is read from a kernel's machine code (SASS): is a register operand of a product still there when it is read?

A product (HGMMA) may take its left operand from registers. ptxas 13.0 can give one that was made before a loop the same
registers as another that is made in the loop: from the second iteration on the first is lost, and the kernel is
silently wrong, the same bits every time (LOG.md, 2026-11-27; tests/tools/register_operands.py is a small example).
None of our loops carries a register operand from one iteration to the next. So wherever an instruction of a loop writes
what a product reads in the next iteration, and not what it reads in the same one, an operand has been lost.
"""

import re
from typing import NamedTuple

WITHOUT_RESULT = (
    *("ST", "SYNCS", "BAR", "BRA", "EXIT", "UTMA", "MEMBAR", "FENCE", "WARP", "DEPBAR", "ISETP", "FSETP", "PLOP3"),
    *("RED", "NOP", "U", "R2UR", "CCTL", "ERRBAR", "HSETP", "BSYNC", "BSSY", "R2P", "BREAK", "ACQBULK", "CALL", "RET"),
)  # in a general register; of what begins so


class Instruction(NamedTuple):
    address: str
    guard: str  # a predicate, or ""
    name: str
    operands: str

    @property
    def writes(self) -> range:
        """The general registers it writes."""
        found = re.match(r"R(\d+)\b", self.operands)
        if found is None or self.name.startswith(WITHOUT_RESULT):
            return range(0)
        first = int(found[1])
        return range(first, first + self._width)

    @property
    def _width(self) -> int:
        if self.name.startswith("HGMMA"):
            return int(re.findall(r"x(\d+)x", self.name)[0]) // 2  # float32 sums of 64 rows, by 128 threads
        if self.name.startswith("LDSM"):
            return int(self.name.rpartition(".")[2])
        if ".128" in self.name:
            return 4
        return 2 if "WIDE" in self.name or ".64" in self.name else 1

    @property
    def left_operand(self) -> range:
        """The registers that a product takes its left operand from, if it takes it from there."""
        words = self.operands.split(",")
        found = re.match(r"\s*R(\d+)\b", words[1]) if self.name.startswith("HGMMA") else None
        return range(0) if found is None else range(int(found[1]), int(found[1]) + 4)


def lost_operands(listing: str) -> list[str]:
    """The products of a kernel whose left operand another iteration of their loop has overwritten."""
    code, targets = _read(listing)
    after = [_successors(place, code, targets) for place in range(len(code))]
    before: list[list[int]] = [[] for _ in code]
    for place, successors in enumerate(after):
        for successor in successors:
            before[successor].append(place)
    back_edges = _back_edges(after)
    lost = []
    for place, product in enumerate(code):
        if any(_overwritten(place, register, code, before, back_edges) for register in product.left_operand):
            lost.append(f"{product.address}: {product.name} {product.operands}")
    return lost


def num_products(listing: str) -> int:
    """Products in the machine code."""
    return sum(instruction.name.startswith("HGMMA") for instruction in _read(listing)[0])


def _read(listing: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions, and where each label points."""
    code, targets = [], {}
    for line in listing.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            targets[label[1]] = len(code)
        elif found := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@(\S+)\s+)?(\S+)\s*(.*?)\s*;", line):
            code.append(Instruction(found[1], found[2] or "", found[3], found[4]))
    return code, targets


def _successors(place: int, code: list[Instruction], targets: dict[str, int]) -> list[int]:
    instruction, following = code[place], [place + 1] if place + 1 < len(code) else []
    kind = instruction.name.partition(".")[0]
    if kind in ("EXIT", "RET"):
        return following if instruction.guard else []
    if kind != "BRA":
        return following
    label = re.search(r"\.L_x_\d+", instruction.operands)
    target = [targets[label[0]]] if label and targets.get(label[0], len(code)) < len(code) else []
    conditional = instruction.guard or re.match(r"!?U?P\d", instruction.operands)
    return target + (following if conditional else [])


def _back_edges(after: list[list[int]]) -> set[tuple[int, int]]:
    """Edges that lead back to the path of a depth-first search from the entry: those that begin another iteration."""
    found, state, path = set(), [0] * len(after), [(0, iter(after[0]))] if after else []
    if after:
        state[0] = 1
    while path:
        place, successors = path[-1]
        successor = next(successors, None)
        if successor is None:
            state[place] = 2
            path.pop()
        elif state[successor] == 0:
            state[successor] = 1
            path.append((successor, iter(after[successor])))
        elif state[successor] == 1:
            found.add((place, successor))
    return found


def _overwritten(place: int, register: int, code, before, back_edges) -> bool:
    """Does the product at this place read what an instruction wrote in an earlier iteration and not in this one?"""
    written: dict[bool, set[int]] = {False: set(), True: set()}  # by whether a back edge lies between
    seen, left = set(), [(other, (other, place) in back_edges) for other in before[place]]
    while left:
        one = left.pop()
        if one in seen:
            continue
        seen.add(one)
        where, earlier = one
        if register in code[where].writes:
            written[earlier].add(where)
            if not code[where].guard:
                continue
        left += [(other, earlier or (other, where) in back_edges) for other in before[where]]
    return bool(written[True] - written[False])
