"""Optimizers."""

from __future__ import annotations

import torch
from torch import nn

from bnexp.config.schema import OptimizerConfig
from bnexp.torch_internals import without_compiler


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer over the model's trainable parameters, weight decay on weights alone.

    BN parameters and biases (everything with fewer than two dimensions) are not decayed: decaying
    a scale that the next layer's normalization undoes regularizes nothing.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    fused = parameters[0].device.type in ("cpu", "cuda")
    if config.name == "adamw":
        return without_compiler(torch.optim.AdamW)(
            groups, lr=config.lr, betas=config.betas, fused=fused
        )
    return without_compiler(torch.optim.SGD)(
        groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=fused
    )
