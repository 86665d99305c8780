"""Residual features that rows of the batch may read of one another (Tumanyan et al. 2023)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from masafusion_lab.attention import Step, gather
from masafusion_lab.sites import Site


@contextmanager
def sharing(unet: nn.Module, sites: Sequence[Site], step: Step | None) -> Iterator[None]:
    """While it is open, residual blocks give each row the features that `feature` of its branch reads.

    A block is named by the self-attention layer that follows it; its features are what its second convolution gives,
    before the block's input is added.
    """
    with ExitStack() as stack:
        for site in sites if step is not None else ():
            assert step is not None
            if not site.cross and (rows := _sources(step, site)) != list(range(len(step.rows))):
                block = re.sub(r"attentions\.(\d+)\..*", r"resnets.\1.conv2", site.name)
                hook = unet.get_submodule(block).register_forward_hook(partial(_read, rows))
                stack.callback(hook.remove)
                stack.enter_context(torch.compiler.set_stance("force_eager"))  # compiled blocks know of no hook
        yield


def _sources(step: Step, site: Site) -> list[int]:
    """The row whose features each row has."""
    sources = []
    for name, half in step.rows:
        rule = step.branches[name].feature
        if rule.v is not None and step.i in rule.steps and site.depth in rule.layers and half in rule.halves:
            name, half = rule.v, "text" if rule.from_text else half
        sources.append(step.index[name, half])
    return sources


def _read(rows: list[int], conv: nn.Module, given: Any, features: Tensor) -> Tensor:
    return gather(features, rows, len(rows))
