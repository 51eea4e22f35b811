"""Checks before the first step: a run that cannot learn refuses to start."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rlprompt.errors import InputError
from rlprompt.policy import Policy, SharedPrefix
from rlprompt.types import Completion, Query

_PROBE = 4
"""Completion tokens of the probe."""


def check_trainable(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    query: Query,
    others: Sequence[Sequence[torch.nn.Parameter]] = (),
) -> None:
    """Prove that the prompt acts and can be learned.

    A probe completion is scored under the prompt. At its start every parameter must get a finite
    gradient that is not zero, except those that a zero multiplies there
    (`Prompt.gated_parameters`). A change of the parameters must change the log-probabilities, and
    after it every parameter without exception must have such a gradient. No parameter of the base
    may have one, and the optimizer must hold exactly the prompt's parameters and the algorithm's
    own.

    Args:
        policy: the policy with the prompt that is trained.
        optimizer: the optimizer over its parameters.
        query: any training query.
        others: the algorithm's own parameters; only that the optimizer holds them is checked.

    Raises:
        InputError: the prompt cannot be learned with these settings.
        RuntimeError: a defect of rlprompt: the base would be trained, or the optimizer holds
            something else.
    """
    parameters = policy.parameters()
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if held != {id(p) for group in (parameters, *others) for p in group}:
        raise RuntimeError("the optimizer does not hold exactly the prompt's parameters")
    before = _probe(policy, query)
    gated = {id(p) for p in policy.prompt.gated_parameters()}
    _check_gradients(policy, [p for p in parameters if id(p) not in gated])
    if any(p.grad is not None or p.requires_grad for p in policy.base.model.parameters()):
        raise RuntimeError("a parameter of the frozen base wants a gradient")
    saved = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for parameter in parameters:
            # Signs change too: a norm would undo a change of length alone.
            parameter.mul_(-1.5).add_(_noise(parameter, policy.prompt.scale(policy)))
    try:
        after = _probe(policy, query)
        if torch.equal(before, after):
            raise InputError(
                f"changing the {policy.prompt.kind} prompt does not change what {policy.base.id} "
                "says; choose another base"
            )
        _check_gradients(policy, parameters)
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, saved, strict=True):
                parameter.copy_(value)
                parameter.grad = None


def _check_gradients(policy: Policy, parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        grad = parameter.grad
        if grad is None or not bool(grad.isfinite().all()) or not bool((grad != 0).any()):
            raise InputError(
                f"the {policy.prompt.kind} prompt gets no usable gradient from {policy.base.id}; "
                "choose another base, dtype or start"
            )
    for parameter in policy.parameters():
        parameter.grad = None


def _noise(parameter: Tensor, scale: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(parameter.shape, generator=generator)
    return drawn.to(parameter) * (0.1 * scale)


def _probe(policy: Policy, query: Query) -> Tensor:
    """Log-probabilities of the probe; adds their gradient to the parameters'."""
    token = next(iter(policy.stop_ids), 0)
    completion = Completion((token,) * _PROBE, (0.0,) * _PROBE, "", False)
    shared = SharedPrefix(policy.prefix())
    tree = policy.tree([query], [[completion]], shared.leaves)
    logprobs = policy.logprobs(tree, shared.leaves).logprobs
    logprobs.sum().backward()
    shared.backward()
    return logprobs.detach()
