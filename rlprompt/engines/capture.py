"""Recording a function of fixed memory once, to call it again without Python: CUDA graphs.

What is recorded is the launches of kernels, with the addresses of their tensors. So a function can
be recorded that uses the same tensors each time and takes no decision by numbers on the device.
Whoever records knows a `Capture` only. A plain call of the function is one too: that is how
everything around it runs, and is tested, without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Function = Callable[[], None]
Capture = Callable[[Function, Function], Function]
"""(a function, what undoes one call of it) -> what does the same as the function, faster. It may
call the function, and undoes every call."""


class HostDecisionError(RuntimeError):
    """A function waits for numbers from the device, by which Python would go on."""


class _NoHostDecisions(TorchDispatchMode):
    """Refuses operators whose result or shape Python can only know by waiting for the device.

    In a recording, the driver refuses them too, after which some of its state is lost.
    """

    _TAGS = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if self._TAGS & set(func.tags):
            raise HostDecisionError(f"{func} makes Python wait for numbers from the device")
        with self:  # in inference mode an operator made of others arrives whole
            made = func.decompose(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if made is NotImplemented else made


def call_plainly(function: Function, undo: Function) -> Function:
    """The function itself: a `Capture` that records nothing."""
    del undo
    return function


def warm_up(function: Function, undo: Function) -> None:
    """Call a function twice before it is recorded: kernels are compiled, and it proves that it can.

    Args:
        function: what will be recorded.
        undo: what undoes one call of it.

    Raises:
        HostDecisionError: the function waits for numbers from the device.
    """
    function()
    undo()
    with _NoHostDecisions():  # type: ignore[no-untyped-call]  # torch has no types there
        function()
    undo()


class CudaCapture:
    """Records CUDA graphs, which share one pool of memory: no two of them run at once.

    Other threads may go on launching and allocating meanwhile.
    """

    def __init__(self, device: torch.device) -> None:
        """Record on a device; no memory is taken before the first recording."""
        self._device = device
        self._pool: Any = None

    def __call__(self, function: Function, undo: Function) -> Function:
        """Record a function.

        Raises:
            RuntimeError: it cannot be recorded; nothing of it is left.
        """
        with torch.cuda.device(self._device):
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
            stream.wait_stream(current)
            try:
                with torch.cuda.stream(stream):
                    warm_up(function, undo)
            finally:
                current.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            recording: AbstractContextManager[Any] = torch.cuda.graph(
                graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"
            )
            with recording:
                function()
        return graph.replay
