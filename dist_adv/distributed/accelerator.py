"""Accelerate's Accelerator for engines with mixed precision of their own."""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import convert_outputs_to_fp32
from torch import nn


class EngineAccelerator(Accelerator):
    """Accelerate's, whose own ways of mixed precision are off: each engine has another.

    Networks compute under autocast instead (`autocast`), in fp32 weights, as under DDP.
    """

    def __init__(self, precision: str, **arguments: Any) -> None:
        self._computes_in = precision
        super().__init__(mixed_precision="no", **arguments)

    @property
    def mixed_precision(self) -> str:
        return self._computes_in.replace("fp32", "no")

    def autocast(self, *_: Any) -> torch.autocast:
        """Return what the engine's networks compute under, where another computes beside them."""
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.mixed_precision == "bf16"
        )


def autocast(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """Wrap a model as `accelerator.prepare` does under DDP, which leaves its weights in fp32.

    Parts of parameters are parts of rows: channels cannot be last.
    """
    if accelerator.mixed_precision == "bf16":
        model.forward = convert_outputs_to_fp32(accelerator.autocast()(model.forward))
    return model.to(memory_format=torch.contiguous_format)
