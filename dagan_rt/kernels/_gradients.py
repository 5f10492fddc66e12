"""Operations that have no backward kernel say so, rather than cut a gradient off in silence."""

from __future__ import annotations

import sys
from typing import Any

from dagan_rt.errors import InputError


def refuse(**arrays: Any) -> None:
    """Raise InputError if PyTorch is to record a gradient through one of these arrays."""
    for name, array in arrays.items():
        if getattr(array, "requires_grad", False) and sys.modules["torch"].is_grad_enabled():
            raise InputError(
                f"{name} requires a gradient, which this kernel does not give: call it under torch.no_grad(), "
                "or with reference=True"
            )
