"""Linear layers of a frozen model: no weight gradients, and packed weights on a bf16 CPU.

oneDNN reorders a weight matrix into its own blocked layout at every call. A frozen weight never
changes, so it is reordered once, for the forward and (transposed) for the input gradient. This
costs two more copies of each linear weight in memory and saves a fifth to a third of the matrix
time (docs/log.md). The original parameters stay where they were, under their names: fingerprints
and `state_dict` do not change. Where they are pages of a mapped file, they leave memory once both
copies exist.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlprompt.kernels.cpu.low_rank import serves_widths
from rlprompt.kernels.cpu.product import MOST_ROWS, packed_product, product_chunk
from rlprompt.kernels.lm_head import Head
from rlprompt.model.cpu.low_rank import low_rank_product
from rlprompt.model.cpu.paging import page_out
from rlprompt.model.cpu.rollout_products import ProductRows
from rlprompt.model.sharded.shards import gathered
from rlprompt.types import LowRank

logger = logging.getLogger(__name__)

_PACK_ROWS = 64
"""The row count that oneDNN is told to expect; a layout chosen for it serves every other count."""


class PackedWeight:
    """A frozen linear map in oneDNN's layout, packed in each direction at its first use there.

    Several layers that share an input may be packed as one: their outputs stand side by side.
    """

    def __init__(self, layers: Sequence[nn.Linear | PackedLinear]) -> None:
        """Keep the layers; their parameters are read when packing, and never again."""
        self._layers = tuple(layers)
        self._forward: Tensor | None = None
        self._transposed: Tensor | None = None
        self._kernel = False
        self._kept = False
        self._chunk: int | None = None
        self.block_rows: int | None = None
        """Rows of every product of oneDNN's, see `row_blocks`; None = as many as there are."""
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        if len(biases) not in (0, len(layers)):
            raise ValueError("layers that are packed as one need a bias each, or none")
        self.bias = torch.cat(biases) if biases else None

    @property
    def forward_weight(self) -> Tensor:
        """What `mkldnn._linear_pointwise` takes."""
        if self._forward is None:
            self._forward = pack_weight(self._weight())
        return self._forward

    def allow_kernel(self, *, allowed: bool = True) -> None:
        """Let the C++ kernels, which are loaded, multiply few rows if that gives the same bits."""
        self._kernel = allowed

    @property
    def has_kernel(self) -> bool:
        """Whether the C++ kernels are loaded and may be used."""
        return self._kernel

    def keep_original(self) -> None:
        """Leave the parameters in memory: something else reads them too."""
        self._kept = True

    def forget(self) -> None:
        """Give the packed copies back; they are made again where they are used again."""
        self._forward = self._transposed = None

    @property
    def chunk(self) -> int:
        """Of `packed_product` with the forward weight; 0 = it is not used."""
        if not self._kernel:
            return 0
        if self._chunk is None:
            self._chunk = product_chunk(self.forward_weight, self.bias)
        return self._chunk

    def apply(self, x: Tensor, products: ProductRows | None = None) -> Tensor:
        """The product and what an adapter adds to it, with gradients of the input and of that.

        Args:
            x: [..., inputs].
            products: what is known of the outputs; None = all are computed.

        Returns:
            [..., outputs].
        """
        additions = [x.addition if isinstance(x, PackedLinear) else None for x in self._layers]
        if any(addition is not None for addition in additions):
            widths = [layer.out_features for layer in self._layers]
            return low_rank_product(x, self, widths, additions, products)
        if torch.is_grad_enabled() and x.requires_grad:
            out: Tensor = _PackedProduct.apply(x, self, products)  # type: ignore[no-untyped-call]
            return out
        return self.forward_or_take(x, products)[0]

    @property
    def layers(self) -> Sequence[nn.Linear | PackedLinear]:
        """The layers that are multiplied as one."""
        return self._layers

    @property
    def inputs(self) -> int:
        """Numbers that go in."""
        return self._layers[0].in_features

    @property
    def outputs(self) -> int:
        """Numbers that come out."""
        return sum(layer.out_features for layer in self._layers)

    def forward_or_take(self, x: Tensor, products: ProductRows | None) -> tuple[Tensor, int]:
        """The outputs without autograd, and how many of the first rows were computed.

        The rows behind these are those of `products`, with what an adapter adds to them.
        """
        taken = None if products is None else products.take(self)
        if products is None or taken is None:
            return self.forward(x), x.numel() // x.shape[-1]
        rows = x.reshape(-1, x.shape[-1])
        taken[: products.num_computed] = self.forward(rows[: products.num_computed])
        return taken.view(*x.shape[:-1], -1), products.num_computed

    def forward(self, x: Tensor) -> Tensor:
        """The product without autograd, in fresh memory."""
        if x.numel() <= MOST_ROWS * x.shape[-1] and self.chunk:
            rows = x.reshape(-1, x.shape[-1]).contiguous()
            few = packed_product(rows, self.forward_weight, self.bias, self.chunk)
            return few.view(*x.shape[:-1], -1)
        if self.block_rows is not None:
            return self._in_blocks(x, self.block_rows)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self.forward_weight, self.bias, "none", [], ""
        )
        return out

    def _in_blocks(self, x: Tensor, size: int) -> Tensor:
        """The product, so many rows at a time, the last ones filled up with zeros."""
        rows = x.reshape(-1, x.shape[-1])
        out = x.new_empty(len(rows), self.outputs)
        for first in range(0, len(rows), size):
            block = rows[first : first + size].contiguous()
            count = len(block)
            if count < size:
                block = torch.cat([block, block.new_zeros(size - count, block.shape[1])])
            made = torch.ops.mkldnn._linear_pointwise(
                block, self.forward_weight, self.bias, "none", [], ""
            )
            out[first : first + count] = made[:count]
        return out.view(*x.shape[:-1], -1)

    def input_gradient(self, grad: Tensor) -> Tensor:
        """The gradient of the input, grad @ W."""
        if self._transposed is None:
            self._transposed = pack_weight(self._weight().t().contiguous())
            if not self._kept:
                for layer in self._layers:
                    page_out(layer.weight)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(
            grad.contiguous(), self._transposed, None, "none", [], ""
        )
        return out

    def _weight(self) -> Tensor:
        weights = [layer.weight.detach() for layer in self._layers]
        return weights[0] if len(weights) == 1 else torch.cat(weights)


class _PackedProduct(torch.autograd.Function):
    """y = x W^T + b with packed W forward and packed W^T backward; nothing saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: PackedWeight, products: ProductRows | None) -> Tensor:
        ctx.packed = packed
        return packed.forward_or_take(x, products)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.packed.input_gradient(grads[0]), None, None


class PackedLinear(nn.Module):
    """A stand-in for a frozen bf16 `nn.Linear` on a CPU, with the same parameters and results."""

    def __init__(self, linear: nn.Linear) -> None:
        """Take over `linear`'s parameters; they are shared, not copied."""
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.packed = PackedWeight([self])
        self.addition: LowRank | None = None
        """What an adapter adds to the output; None = nothing. Only where `can_add`."""

    @property
    def can_add(self) -> bool:
        """Whether a kernel adds what `addition` says."""
        return self.packed.has_kernel and serves_widths(self.in_features, self.out_features)

    def forward(self, x: Tensor, products: ProductRows | None = None) -> Tensor:
        """Apply to [..., in_features]; gradients reach the input and the addition only.

        `products` = what is known of the outputs.
        """
        return self.packed.apply(x, products)

    def packed_forward(self, x: Tensor) -> Tensor:
        """The product without autograd."""
        return self.packed.forward(x)

    def packed_input_gradient(self, grad: Tensor) -> Tensor:
        """The gradient of the input, grad @ W; W^T is packed at the first backward."""
        return self.packed.input_gradient(grad)


def pack_weight(weight: Tensor) -> Tensor:
    """A bf16 weight [out, in] in oneDNN's layout, for `mkldnn._linear_pointwise` only."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_ROWS)
    return packed


def can_pack(model: nn.Module) -> bool:
    """Whether this build of torch packs the weights of this model exactly.

    True for a bf16 model on a CPU whose oneDNN does bf16, if the packed product of one real layer
    agrees with the plain one. The packed operators are internal to torch: a build that lacks them
    gives False, and the model runs unpacked.
    """
    linear = next((m for m in model.modules() if type(m) is nn.Linear), None)
    if linear is None or linear.weight.device.type != "cpu" or not linear.weight.numel():
        return False
    if linear.weight.dtype != torch.bfloat16:
        return False
    try:
        frozen = PackedLinear(linear)
        x = torch.randn(3, linear.in_features, generator=torch.Generator().manual_seed(0))
        packed = frozen.packed_forward(x.bfloat16())
        frozen.packed_input_gradient(packed)
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        logger.info("weights are not packed: this build of torch cannot (%s)", error)
        return False
    plain = nn.functional.linear(x.bfloat16(), linear.weight, linear.bias)
    return torch.allclose(packed.float(), plain.float(), rtol=2e-2, atol=2e-2)


def pack_linears(model: nn.Module) -> int:
    """Replace every `nn.Linear` of a frozen model by a `PackedLinear`, in place.

    Returns:
        How many layers were replaced; 0 where packing does not apply (see `can_pack`).
    """
    if not can_pack(model):
        return 0
    replaced = 0
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                frozen = PackedLinear(child)
                if id(child.weight) in tables:
                    frozen.packed.keep_original()
                setattr(parent, name, frozen)
                replaced += 1
    return replaced


def head_of(output: nn.Module, softcap: float | None, scale: float = 1.0) -> Head:
    """The LM head of a model after `pack_linears`, packed or plain.

    Args:
        output: the head, without bias.
        softcap: the soft cap, see `Head`.
        scale: factor on the logits, before the soft cap.
    """
    weight: Tensor = output.weight  # type: ignore[assignment]
    rows = int(output.out_features)  # type: ignore[arg-type]
    project, pull_back = _both_directions(output, weight)
    if scale == 1.0:
        return Head(project, pull_back, weight.dtype, rows, softcap)
    return Head(
        lambda hidden: project(hidden * scale),  # the narrow side: [M, d], not [M, V]
        lambda grad: pull_back(grad) * scale,
        weight.dtype,
        rows,
        softcap,
    )


def _both_directions(
    output: nn.Module, weight: Tensor
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    if isinstance(output, PackedLinear):
        return output.packed_forward, output.packed_input_gradient
    frozen = weight.detach()
    if frozen.numel():
        return lambda hidden: hidden @ frozen.t(), lambda grad: grad @ frozen

    # Sharded: whole only while it is used.
    def project(hidden: Tensor) -> Tensor:
        with gathered([weight]):
            return hidden @ weight.detach().t()

    def pull_back(grad: Tensor) -> Tensor:
        with gathered([weight]):
            return grad @ weight.detach()

    return project, pull_back
