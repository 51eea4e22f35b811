"""Shapes of bases and data sheets of devices: what `rlprompt plan` computes with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple


class Linears(NamedTuple):
    """Linear layers of one name."""

    inputs: int
    """Of each."""
    outputs: int
    """Of each."""
    number: int
    """How many the base has."""


@dataclass(frozen=True)
class Shape:
    """A decoder-only base of the Llama family."""

    layers: int
    width: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool

    @property
    def layer_parameters(self) -> int:
        """Query, key, value and output projections, the gated MLP, and two norms."""
        attention = self.width * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.width * self.mlp + 2 * self.width

    @property
    def end_parameters(self) -> int:
        """Embedding and LM head, one matrix when they are tied."""
        return self.vocab * self.width * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """P, with the final norm."""
        return self.layers * self.layer_parameters + self.end_parameters + self.width

    @property
    def active_parameters(self) -> int:
        """Parameters that one token meets; fewer than all where experts are chosen from."""
        return self.parameters

    @property
    def linears(self) -> Mapping[str, Linears]:
        """The linear layers, by the last part of their names."""
        attended, kept = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": Linears(self.width, attended, self.layers),
            "k_proj": Linears(self.width, kept, self.layers),
            "v_proj": Linears(self.width, kept, self.layers),
            "o_proj": Linears(attended, self.width, self.layers),
            "gate_proj": Linears(self.width, self.mlp, self.layers),
            "up_proj": Linears(self.width, self.mlp, self.layers),
            "down_proj": Linears(self.mlp, self.width, self.layers),
        }

    @property
    def kv_elements(self) -> int:
        """Elements of keys and values per token, over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim


SHAPES = {
    "135m": Shape(30, 576, 1536, 9, 3, 64, 49152, True),  # SmolLM2
    "1b": Shape(16, 2048, 8192, 32, 8, 64, 128256, True),  # Llama 3.2
    "3b": Shape(28, 3072, 8192, 24, 8, 128, 128256, True),  # Llama 3.2
    "8b": Shape(32, 4096, 14336, 32, 8, 128, 128256, False),  # Llama 3.1
    "70b": Shape(80, 8192, 28672, 64, 8, 128, 128256, False),  # Llama 3.1
}
"""By `--model-size`."""


@dataclass(frozen=True)
class Device:
    """One accelerator, by its data sheet."""

    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes per second of its memory."""
    flops: float
    """Dense bfloat16 operations per second."""
    link: float
    """Bytes per second from another device of the node, one direction."""
    network: float
    """Bytes per second from another node, its share of the node's adapters."""
    host: float
    """Bytes per second from the memory of its host."""
    disk: float = 6e9
    """Bytes per second from a local disk (NVMe on four lanes of PCIe 4), of the whole node."""
    per_node: int = 8
    """Devices of a node."""
    is_cpu: bool = False
    """Ranks are processes on CPUs: gloo holds what it receives twice, and attention its weights."""


DEVICES = {
    "a100": Device(80e9, 2.04e12, 312e12, 300e9, network=25e9, host=32e9),
    "h100": Device(80e9, 3.35e12, 989e12, 450e9, network=50e9, host=64e9),
    "h200": Device(141e9, 4.8e12, 989e12, 450e9, network=50e9, host=64e9),
    "l40s": Device(48e9, 0.864e12, 362e12, 32e9, network=12.5e9, host=32e9),
    "cpu": Device(24e9, 22e9, 0.15e12, 1e9, network=1e9, host=22e9, is_cpu=True),
}
"""By `--gpu`: SXM versions; the L40S is linked over PCIe 4. Networks are those of usual nodes: an
adapter per GPU of 200 (A100), 400 (H100, H200) or 100 Gbit/s. `cpu` is the machine with two cores
on which plans are checked, with its rates in float32 (docs/design/README.md)."""
