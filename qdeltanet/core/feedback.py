"""Error feedback: what a state's codes leave out, kept as codes of a finer step.

The residual of codes with scale s has step s * 2^-bits, so that a format of `bits` bits just holds half a step of the
codes. It adds no arithmetic of its own: the residual of a sum is one more requantization of the same terms, with the
codes just made as the last, negative term. A power of two stays one. Clipping is not counted: a residual clips where
its codes do, and those are counted, and by one of its steps where it is exactly half a step of theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from .backend import Backend
from .formats import IntFormat
from .operand import Operand
from .quantize import round_half_even, saturate
from .requantize import Target
from .terms import Term


def entered_residual(codes: Operand, x: Tensor, feedback: IntFormat | None) -> Operand:
    """The codes of a float32 tensor x with the residual that they leave; as they are without feedback."""
    if feedback is None:
        return codes
    assert codes.scale is not None
    left = (x / codes.scale - codes.codes) * 2.0**feedback.bits
    return codes.with_residual(saturate(round_half_even(left, new=True), feedback)[0], feedback)


def stored_residual(
    codes: Operand, terms: Sequence[Term], target: Target, feedback: IntFormat | None, backend: Backend
) -> Operand:
    """The codes that terms were requantized to with the residual that they leave; as they are without feedback.

    The terms must not be `fresh`: the first requantization would have written to them.
    """
    if feedback is None:
        return codes
    assert codes.scale is not None
    assert codes.format is not None
    kept = Term(codes.codes, (codes.scale,), -1, codes.format.qmax)
    finer = replace(target, format=feedback, scale=codes.scale * 2.0**-feedback.bits)
    return codes.with_residual(backend.requantize([*terms, kept], finer).codes, feedback)
