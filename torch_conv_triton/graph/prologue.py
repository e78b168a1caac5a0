"""Moves an activation from the end of one convolution to the beginning of those that read it, so that it is never stored.

A convolution whose output is both added to something later and activated for the next ones stores two tensors. Where the next
ones keep a tile of x for all taps, they can compute the activation of each element once, and only the other tensor is stored.
"""

from __future__ import annotations

from dataclasses import replace

from torch.fx import Graph, Node

from torch_conv_triton.dispatch import PREPARING
from torch_conv_triton.epilogue import Instruction, instructions_between, keep_outputs, keeps_zero
from torch_conv_triton.graph.call import CONVOLUTIONS, FUSED, OperatorCall
from torch_conv_triton.graph.convolution import value
from torch_conv_triton.graph.report import ConvRecord


def fold_prologues(graph: Graph, records: dict[Node, ConvRecord]) -> None:
    """Let convolutions compute what others of ours store for them beside something else.

    The records of the nodes are replaced by those of the calls that stand in for them.
    """
    # later ones first: a reader that is one of them has been done
    for node in sorted((node for node in records if node.target is FUSED[1]), reverse=True):
        call, outputs = OperatorCall.of(node), OperatorCall.outputs(node)
        if len(outputs) != 2:
            continue
        for stored, other in (outputs, outputs[::-1]):
            prologue = _prologue(call, outputs.index(other), outputs.index(stored))
            if prologue and all(_may_begin(reader, other, stored, prologue) for reader in other.users):
                names = " ".join(instruction.name for instruction in prologue)
                for reader in list(other.users):
                    prepared = _beginning(OperatorCall.of(reader), stored, prologue)
                    folded = records[reader].folded.removesuffix("reads rounded").removesuffix(", ")
                    prepared.take_place_of(reader, OperatorCall.outputs(reader), records, (folded, f"{names} before"))
                program = keep_outputs(call.program, [call.program.outputs[outputs.index(stored)]])
                folded = records[node].folded, f"{names} by its readers"
                replace(call, program=program).take_place_of(node, (stored,), records, folded)
                break


def _prologue(call: OperatorCall, made: int, of: int) -> tuple[Instruction, ...] | None:
    """The instructions that make one output of a call of the other, if a convolution may begin with them."""
    outputs = call.program.outputs
    found = instructions_between(call.program, outputs[of].value, outputs[made].value)
    return found if found and keeps_zero(found) and outputs[of].dtype == outputs[made].dtype else None


def _may_begin(node: Node, other: Node, stored: Node, prologue: tuple[Instruction, ...]) -> bool:
    """Whether a node that reads `other` can make it of what is stored."""
    if node.target not in (*CONVOLUTIONS, *FUSED) or not isinstance(value(other).shape[2], int):
        return False
    call = OperatorCall.of(node)
    plans = call.plan(), _beginning(call, stored, prologue).plan()
    read_once = other not in (call.weight, call.bias, *call.operands) and not call.program.prologue
    return read_once and all(plan.kernel in PREPARING for plan in plans)


def _beginning(call: OperatorCall, stored: Node, prologue: tuple[Instruction, ...]) -> OperatorCall:
    return replace(call, input=stored, program=replace(call.program, prologue=prologue), rounded=False)
