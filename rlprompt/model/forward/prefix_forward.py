"""Forwards of a frozen base under a prompt: the one door between rlprompt and transformers.

Letters: N packed tokens, P prefix tokens, d model width, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from rlprompt.errors import InputError
from rlprompt.kernels.cpu.ops import choose
from rlprompt.kernels.lm_head import Head, head_logits
from rlprompt.model.base import FrozenBase, longest_sequence
from rlprompt.model.cpu.fused_modules import FusedModules, allow_kernel, fuse_modules
from rlprompt.model.cpu.packed_linear import head_of, pack_linears
from rlprompt.model.files.fetch import cache_dir
from rlprompt.model.forward.attention import (
    ATTENTION_NAME,
    AttentionContext,
    CausalContext,
    register,
)
from rlprompt.model.forward.comparison import (
    PROBE_TOKENS,
    Expected,
    Gap,
    Probe,
    probes,
    roughened,
    tolerance,
)
from rlprompt.model.forward.forest import ForestContext, build_forest
from rlprompt.model.forward.tree import TreeContext, build_tree
from rlprompt.model.sharded.shards import gathered
from rlprompt.types import Adapter, PrefixKV

logger = logging.getLogger(__name__)


class PrefixForward:
    """A frozen base whose attention goes through contexts.

    Construction switches the model's attention to rlprompt's, packs its linear layers and puts C++
    kernels in the place of known modules where that pays, and compares log-probabilities with the
    model's own forward. Where they differ with the kernels only, it goes on without them and says
    so; an architecture whose result differs all the same is refused.
    """

    def __init__(self, base: FrozenBase) -> None:
        """Take over `base.model`.

        Raises:
            InputError: the architecture cannot be run exactly (see the class docstring).
        """
        self.base = base
        self._adapter: Adapter | None = None
        self._detach: Callable[[], None] | None = None
        self.body: nn.Module = base.model.get_decoder()
        if self.body is base.model:
            raise InputError(
                f"the layers of {base.id} cannot be run without its head; choose a base of a "
                "supported family (docs/models.md)"
            )
        output = base.model.get_output_embeddings()
        if output is None or getattr(output, "bias", None) is not None:
            raise InputError(
                f"the LM head of {base.id} is missing or has a bias, which rlprompt does not "
                "support; choose another base model"
            )
        if base.shards is not None:
            self.body = base.shards.body
        before = base.model.config._attn_implementation
        expected = self._expected() if before != ATTENTION_NAME else None
        if expected is not None:
            register()
            base.model.set_attn_implementation(ATTENTION_NAME)
            packed = pack_linears(base.model)
            logger.info("%s: %d linear layers packed", base.id, packed)
        wanted = "off" if base.shards is not None else base.cpu_kernels
        self._set_kernels(choose(wanted, cache_dir() / "kernels", base.dtype, base.device))
        if expected is not None:
            try:
                self._join(expected)
            except BaseException:
                # Left switched, the model would pass for compared at the next attempt.
                base.model.set_attn_implementation(before)
                raise

    def _set_kernels(self, on: bool) -> None:
        """Let attention and head run by the C++ kernels, or not."""
        self.cpp = on
        self.head = self._head()
        self.head = self.head._replace(cpp=on and self.head.softcap is None)

    def _join(self, expected: Sequence[Expected]) -> None:
        """Replace modules by stand-ins and compare; without the kernels where these are wrong.

        Raises:
            InputError: the results are not those of the model's own forward.
        """
        base, fused = self.base, FusedModules()
        if self.cpp:
            fused = fuse_modules(self.body)
            allow_kernel(base.model)
            logger.info("%s: %d modules replaced by CPU kernels", base.id, len(fused))
        wrong = self._differs(expected)
        if wrong is not None and self.cpp and base.cpu_kernels == "on":
            raise InputError(
                f"model.cpu_kernels is on, but with the C++ kernels {base.id} computes something "
                f"else ({_described(wrong)}); set it to auto"
            )
        if wrong is not None and self.cpp:
            fused.undo()
            allow_kernel(base.model, allowed=False)
            self._set_kernels(False)
            without = self._differs(expected)
            if without is None:
                logger.warning(
                    "%s: the C++ kernels are off, because with them %s", base.id, _described(wrong)
                )
            wrong = without
        if wrong is not None:
            half = base.dtype in (torch.float16, torch.bfloat16)
            way_out = "set model.dtype: float32, or choose" if half else "choose"
            raise InputError(
                f"{base.id} computes something that rlprompt's forward does not "
                f"({_described(wrong)}); {way_out} another base (docs/models.md)"
            )

    @property
    def max_positions(self) -> int:
        """The longest sequence that the base computes exactly; see `longest_sequence`."""
        return min(self.base.max_positions, longest_sequence(self.base.model.config))

    def _head(self) -> Head:
        config = self.base.model.config.get_text_config()
        softcap = getattr(config, "final_logit_softcapping", None)
        output = self.base.model.get_output_embeddings()
        assert output is not None
        return head_of(output, softcap, _logit_scale(config))

    def _expected(self) -> list[Expected]:
        """What the model's own forward gives; under shards, its body with its own attention."""
        config = self.base.model.config.get_text_config()
        windows = [_layer_window(config, layer)[1] for layer in range(self.base.num_layers)]
        small = [w for w in windows if w is not None and PROBE_TOKENS <= w < self.max_positions]
        window = min(small, default=None)
        self.head = self._head()
        found = []
        for number, probe in enumerate(probes(self.base.vocab_size, window, self.device)):
            embeddings = self.embed(probe.token_ids)
            own = self._own_logits(probe, embeddings)
            passes = tolerance(own, self._own_logits(probe, roughened(embeddings)))
            if number == 0 and self.base.shards is None:
                # The whole model once, for what it does before and behind its layers.
                own = self._own_logits(probe, None)
            found.append(Expected(probe, own, passes, self._rounded_scores(probe)))
        return found

    def _rounded_scores(self, probe: Probe) -> Tensor | None:
        """[N, V] by the model's plain attention, where that differs from the one it has."""
        model = self.base.model
        before = model.config._attn_implementation
        half = self.dtype in (torch.float16, torch.bfloat16)
        if not half or self.base.shards is not None or before == "eager":
            return None
        model.set_attn_implementation("eager")
        try:
            return self._own_logits(probe, self.embed(probe.token_ids))
        finally:
            model.set_attn_implementation(before)

    def _own_logits(self, probe: Probe, embeddings: Tensor | None) -> Tensor:
        """[N, V] of the compared tokens, by the model's own forward.

        Args:
            probe: the tokens.
            embeddings: what goes into the layers, whose output our head reads; None = the whole
                model reads the tokens.
        """
        count = probe.num_compared
        with torch.no_grad():
            if embeddings is None:
                ids = probe.token_ids[None]
                logits: Tensor = self.base.model(input_ids=ids, use_cache=False).logits
                return logits[0, -count:]
            states = self.body(inputs_embeds=embeddings[None], use_cache=False).last_hidden_state
            return head_logits(states[0, -count:], self.head)

    def _differs(self, expected: Sequence[Expected]) -> Gap | None:
        """The first gap that rounding does not explain; None = there is none."""
        for each in expected:
            found = each.gap(self._our_logits(each.probe))
            if not found.is_fine:
                return found
        return None

    def _our_logits(self, probe: Probe) -> Tensor:
        """[N, V] through a tree: state that layers carry beside keys and values would show."""
        prompt, query, completion = probe
        with torch.no_grad():
            start = CausalContext()
            self.hidden(self.embed(prompt), torch.arange(len(prompt)), start)
            self._check_layers(start)
            answers = [[*completion.tolist(), 0]]  # the last token predicts nothing
            tree = build_tree([query.tolist()], [answers], len(prompt), self.device)
            context = TreeContext(tree, start.prefix())
            hidden = self.hidden(self.embed(tree.token_ids), tree.positions, context)
            return head_logits(hidden, self.head)

    def _check_layers(self, context: CausalContext) -> None:
        """Refuse what a short probe cannot show: layers without keys, and windows kept from us."""
        config = self.base.model.config.get_text_config()
        if [layer for layer, _ in context.layers] != list(range(self.base.num_layers)):
            raise InputError(
                f"{self.base.id} has layers without keys and values of their own, which a shared "
                "prefix needs; choose a base of a supported family (docs/models.md)"
            )
        for layer, window in context.layers:
            kind, needed = _layer_window(config, layer)
            known = kind == "full_attention" or needed == window
            if not known and (needed is None or needed < self.max_positions):
                raise InputError(
                    f"layer {layer} of {self.base.id} has {kind} that it does not tell rlprompt's "
                    "attention of; choose a base of a supported family (docs/models.md)"
                )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the base computes in."""
        return self.base.dtype

    @property
    def device(self) -> torch.device:
        """Where the base lives."""
        return self.base.device

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether activations are recomputed layer by layer in the backward."""
        modules = self.base.model.modules()
        return any(getattr(module, "gradient_checkpointing", False) for module in modules)

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        model = self.base.model
        # transformers 5.23 has a new name for the switch, and warns of the old one.
        name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
        if on:
            settings = {
                "use_reentrant": False,
                "context_fn": self._recompute_contexts,
                # Nothing is drawn in a layer, and rewards may draw in another thread meanwhile.
                "preserve_rng_state": False,
            }
            getattr(model, f"{name}_checkpointing_enable")(settings)
        else:
            getattr(model, f"{name}_checkpointing_disable")()
        # transformers recomputes only in layers that are in training mode. The flag is set on the
        # layer alone: its submodules stay in evaluation mode, so none of their dropout wakes up.
        layers = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
        if on and any(_own_dropout(layer) for layer in layers):
            self.gradient_checkpointing = False
            raise InputError(
                f"layers of {self.base.id} drop activations out while they are recomputed; turn "
                "gradient checkpointing off"
            )
        for layer in layers:
            layer.training = on

    def adapted(self, adapter: Adapter | None) -> AbstractContextManager[None]:
        """A context in which an adapter, and no other, is on in the layers; None = none is."""
        return _Adapted(self, adapter)

    def switch_adapter(self, adapter: Adapter | None) -> Adapter | None:
        """Put an adapter in the place of the one that is on; returns that one."""
        previous = self._adapter
        if adapter is not previous:
            if self._detach is not None:
                self._detach()
            self._detach = None if adapter is None else adapter.attach(self.base.model)
            self._adapter = adapter
        return previous

    def _recompute_contexts(
        self,
    ) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """A layer is recomputed in the backward under the adapter that it was computed under."""
        return nullcontext(), self.adapted(self._adapter)

    def embed(self, token_ids: Sequence[int] | Tensor) -> Tensor:
        """Input embeddings [n, d] of tokens, scaled as the architecture scales them.

        They carry no gradient, though transformers lets embeddings want one when it recomputes.
        """
        ids = torch.as_tensor(token_ids, dtype=torch.int64, device=self.device)
        embedding = self.base.model.get_input_embeddings()
        assert embedding is not None
        if self.base.shards is None:
            return embedding(ids).detach()  # type: ignore[no-any-return]
        with gathered(embedding.parameters()):  # past the module's hooks, which would gather too
            return embedding.forward(ids).detach()  # type: ignore[no-any-return]

    def hidden(self, embeddings: Tensor, positions: Tensor, context: AttentionContext) -> Tensor:
        """Final hidden states of packed tokens.

        Args:
            embeddings: [N, d].
            positions: int64 [N], explicit; never derived from a mask by the model.
            context: what the tokens attend to.

        Returns:
            [N, d], after the final norm, in the base's dtype.
        """
        arguments: dict[str, Any] = {"attention_context": context, "use_cache": False}
        if self.cpp:
            arguments["cpp_attention"] = True
        out = self.body(
            inputs_embeds=embeddings.to(self.dtype)[None],
            position_ids=positions.to(self.device)[None],
            **arguments,
        )
        states: Tensor = out.last_hidden_state[0]
        return states

    def prefill(
        self,
        embeddings: Tensor,
        after: PrefixKV | None = None,
        adapter: Adapter | None = None,
    ) -> PrefixKV:
        """Keys and values of a prompt, with gradients back to its embeddings.

        Args:
            embeddings: [n, d] of head and slot together, or of what follows `after`; n may be 0 (a
                plain template without a system message).
            after: what stands before; it is part of the result, and gradients reach it.
            adapter: what is on in the layers; the result carries it.
        """
        if embeddings.shape[0] == 0:
            # One token, for the shapes.
            whole = after or self.prefill(self.embed([0])).cut(0)
            return PrefixKV(whole.keys, whole.values, adapter)
        context = CausalContext(after)
        start = 0 if after is None else after.num_tokens
        positions = torch.arange(start, start + embeddings.shape[0])
        with self.adapted(adapter):
            self.hidden(embeddings, positions, context)
        made = context.prefix()
        return PrefixKV(made.keys, made.values, adapter)

    @torch.no_grad()
    def prefill_each(self, embeddings: Sequence[Tensor]) -> list[PrefixKV]:
        """Keys and values of several prompts in one forward, without gradients or an adapter.

        Args:
            embeddings: [n, d] of head and slot of each prompt, n at least 1, lengths may differ.
        """
        lengths = [len(each) for each in embeddings]
        forest = build_forest(lengths, self.device)
        context = ForestContext(forest)
        with self.adapted(None):
            self.hidden(torch.cat(list(embeddings)), forest.positions, context)
        return context.row_prefixes()


class _Adapted(AbstractContextManager[None]):
    """Switches an adapter on and back; may be entered again, as recomputation may."""

    def __init__(self, forward: PrefixForward, adapter: Adapter | None) -> None:
        self._forward = forward
        self._adapter = adapter
        self._previous: list[Adapter | None] = []

    def __enter__(self) -> None:
        self._previous.append(self._forward.switch_adapter(self._adapter))

    def __exit__(self, *error: object) -> None:
        self._forward.switch_adapter(self._previous.pop())


def _described(wrong: Gap) -> str:
    """A gap in words."""
    return (
        f"log-probabilities differ by {wrong.nats:.3g} on average, and the distributions by "
        f"{wrong.divergence:.3g} nats where rounding explains {wrong.tolerance:.3g}"
    )


def _logit_scale(config: Any) -> float:
    """What an architecture multiplies its logits by: Cohere's scale, Granite's divisor."""
    scale = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    return float(scale) / float(divisor)


def _own_dropout(layer: nn.Module) -> bool:
    """Whether a layer applies dropout itself rather than through a submodule."""
    own = [value for name, value in vars(layer).items() if "drop" in name]
    return any(isinstance(value, float) and value > 0.0 for value in own)


def _layer_window(config: Any, layer: int) -> tuple[str, int | None]:
    """A layer's kind of attention by its config, and its sliding window."""
    window: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return ("full_attention" if window is None else "sliding_attention"), window
    return kinds[layer], window if kinds[layer] == "sliding_attention" else None
