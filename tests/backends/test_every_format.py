"""Every format from INT2 to INT16: reference, cpu and fake execution give the same bits."""

from __future__ import annotations

import pytest
import torch
from helpers import KINDS, bound_rule, rule_inputs, run

from qdeltanet.backends import get_backend
from qdeltanet.core import IntegerArithmetic
from qdeltanet.inverse import plan


@pytest.mark.parametrize("kind", ["per_head", "finest dynamic"])
@pytest.mark.parametrize("bits", range(2, 17))
def test_three_executions_agree(bits: int, kind: str) -> None:
    inputs, merge = rule_inputs(), plan("block_merge", 64)
    scheme, scales = bound_rule(inputs, merge, bits, KINDS[kind])
    outputs = [
        run(inputs, merge, IntegerArithmetic(scheme, scales, get_backend(b))) for b in ("reference", "cpu", "fake")
    ]
    for other in outputs[1:]:
        assert torch.equal(outputs[0][0], other[0])
