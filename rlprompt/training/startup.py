"""Checks before the first step: a run that cannot learn refuses to start."""

from __future__ import annotations

from collections.abc import Sequence

import torch

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

    A probe completion is scored under the prompt: every parameter must get a finite gradient that
    is not zero, a change of the parameters must change the log-probabilities, no parameter of the
    base may have a gradient, and the optimizer must hold exactly the prompt's parameters and the
    algorithm's own.

    Args:
        policy: with the prompt that is trained.
        optimizer: over its parameters.
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
    before = _probe(policy, query, with_gradient=True)
    for parameter in parameters:
        grad = parameter.grad
        if grad is None or not bool(grad.isfinite().all()) or not bool((grad != 0).any()):
            raise InputError(
                f"the {policy.prompt.kind} prompt gets no usable gradient from {policy.base.id}; "
                "choose another base, dtype or init_text"
            )
        parameter.grad = None
    if any(p.grad is not None or p.requires_grad for p in policy.base.model.parameters()):
        raise RuntimeError("a parameter of the frozen base wants a gradient")
    saved = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(-1.5)  # the sign too: a norm would undo a change of length alone
        after = _probe(policy, query, with_gradient=False)
        for parameter, value in zip(parameters, saved, strict=True):
            parameter.copy_(value)
    if torch.equal(before, after):
        raise InputError(
            f"changing the {policy.prompt.kind} prompt does not change what {policy.base.id} says; "
            "choose another base"
        )


def _probe(policy: Policy, query: Query, with_gradient: bool) -> torch.Tensor:
    token = next(iter(policy.stop_ids), 0)
    completion = Completion((token,) * _PROBE, (0.0,) * _PROBE, "", False)
    with torch.set_grad_enabled(with_gradient):
        shared = SharedPrefix(policy.prefix())
        tree = policy.tree([query], [[completion]], shared.leaves)
        logprobs = policy.logprobs(tree, shared.leaves).logprobs
        if with_gradient:
            logprobs.sum().backward()
            shared.backward()
    return logprobs.detach()
