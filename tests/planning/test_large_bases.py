"""Plans for 8B and 70B against numbers worked out by hand, written out beside each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, Qwen3MoeConfig

from rlprompt.engines.native import NativeSettings
from rlprompt.errors import InputError
from rlprompt.model.forward.adapter_hooks import linear_shapes
from rlprompt.planning.plan import Plan, plan
from rlprompt.planning.shapes import shape_of_config
from rlprompt.planning.tables import DEVICES, SHAPES
from rlprompt.planning.trained import trained_parameters
from rlprompt.prompts.adapter import AdapterSettings
from rlprompt.prompts.layer_adapters import LoRA, LoRASettings
from rlprompt.recipe.schema import load_recipe
from tests.cli.runs import rlprompt
from tests.fixtures.tiny import CONFIGS, save_tiny, tiny_base

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "distributed" / "two_nodes.yaml"
PLAIN = "distributed.secondary_shards=null"
H100 = DEVICES["h100"]
P8, P70 = 8_030_261_248, 70_553_706_496
LORA = "prompt={type: adapter, method: {type: lora, rank: 64}}"


def planned(size: str, *overrides: str, ranks: int = 16, **device: Any) -> Plan:
    return plan(load_recipe(RECIPE, overrides), SHAPES[size], ranks, replace(H100, **device))


@pytest.mark.parametrize(
    ("size", "prompt", "trained"),
    [
        # A layer of 70B: q 8192 + 8192, k and v 8192 + 1024 each, o 8192 + 8192, gate, up and down
        # 8192 + 28672 each, so 161,792 inputs and outputs, times rank 64 and 80 layers.
        ("70b", LORA, 161_792 * 64 * 80),
        # Of 8B: 8192 + 2 * 5120 + 8192 + 3 * 18432 = 81,920, times 64 and 32.
        ("8b", LORA, 81_920 * 64 * 32),
        ("8b", "prompt={type: adapter, method: {type: lora, rank: 8, target_modules: [q_proj]}}",
         8 * 32 * 8192),
        # Keys and values of 1024 and inputs of the MLP of 14336, in 32 layers.
        ("8b", "prompt={type: adapter, method: {type: ia3}}", 32 * (1024 + 1024 + 14336)),
        # Keys and values of 8 heads of 128, for 16 positions of 80 layers.
        ("70b", "prompt={type: prefix, num_virtual_tokens: 16}", 2 * 80 * 8 * 128 * 16),
        ("70b", "prompt={type: prefix, num_virtual_tokens: 16, rank: 4}",
         2 * 80 * 4 * (16 + 8 * 128)),
        ("70b", "prompt={type: soft, num_virtual_tokens: 16}", 16 * 8192),
        ("8b", "prompt={type: sequence, parts: [{type: text, text: Be brief.}, "
         "{type: soft, num_virtual_tokens: 8}]}", 8 * 4096),
    ],
    ids=["lora-70b", "lora-8b", "lora-q", "ia3", "prefix", "prefix-rank", "soft", "sequence"],
)  # fmt: skip
def test_what_a_prompt_trains(size: str, prompt: str, trained: int) -> None:
    made = planned(size, PLAIN, prompt)
    # Weight, gradient and two moments, 4 bytes each.
    assert made.memory["prompt, gradient, moments"] == 16 * trained
    recipe = load_recipe(RECIPE, [PLAIN, prompt])
    assert trained_parameters(recipe.prompt, SHAPES[size]) == trained


def test_a_lora_of_rank_64_on_70b_is_13_gb() -> None:
    made = planned("70b", PLAIN, LORA)
    assert made.memory["prompt, gradient, moments"] == pytest.approx(13.25e9, rel=1e-3)
    soft = planned("70b", PLAIN)
    activations = "activations of a micro-batch"
    assert made.memory[activations] > soft.memory[activations]


def test_what_an_adapter_trains_is_what_is_counted() -> None:
    shapes = linear_shapes(tiny_base().model)
    settings = AdapterSettings(method=LoRASettings(rank=4))
    assert isinstance(settings.method, LoRASettings)
    made = LoRA.create(settings.method, shapes, 0)
    counted = trained_parameters(settings, shape_of_config(tiny_base().model.config))
    assert counted == sum(weight.numel() for weight in made.weights.values())


def test_offload_leaves_the_gpu_and_takes_the_host() -> None:
    plain, off = planned("70b", PLAIN), planned("70b", PLAIN, "distributed.offload=cpu")
    assert plain.memory["base, at rest"] == P70 * 2 / 16 == off.host_bytes
    assert off.memory["base, at rest"] == 0 and plain.host_bytes == 0
    own = off.traffic["base, own shares from the host"]
    received = sum(off.traffic[f"base, for the {part}"] for part in ("rollout", "update"))
    assert own == pytest.approx(received / 15)  # of 16 shares, 15 come from others and 1 from here
    assert planned("70b", PLAIN, "distributed.offload=cpu", host=1e9).bounds["traffic"] == (
        pytest.approx(own / 1e9, rel=1e-3)
    )


def test_second_shards_cost_memory_and_keep_backward_passes_in_the_node() -> None:
    with_them, without = planned("70b"), planned("70b", PLAIN)
    assert with_them.memory["base, second shards"] == P70 * 2 / 8
    assert "base, second shards" not in without.memory or not without.memory["base, second shards"]
    rollout = "base, for the rollout"
    assert with_them.traffic[rollout] == without.traffic[rollout]
    slow = [planned("70b", *words, network=1e9).bounds["traffic"] for words in ((), (PLAIN,))]
    assert slow[0] < slow[1]


def test_what_comes_from_other_nodes_comes_over_their_adapters() -> None:
    whole = sum(
        size for part, size in planned("8b", PLAIN).traffic.items() if part.startswith("base")
    ) * 16 / 15  # fmt: skip
    # Two nodes: half of everything comes from the other one, over eight adapters of 1 GB/s.
    slow = planned("8b", PLAIN, network=1e9).bounds["traffic"]
    assert slow == pytest.approx(whole / 2 / 8e9, rel=1e-4)
    # One node of 16: all but a share, over the link of 450 GB/s.
    inside = planned("8b", PLAIN, network=1e9, per_node=16).bounds["traffic"]
    assert inside == pytest.approx(whole * 15 / 16 / 450e9, rel=1e-4)


def test_tokens_per_second_count_the_traffic_of_the_rollout() -> None:
    made, slow = planned("70b", PLAIN), planned("70b", PLAIN, network=1e9)
    recipe = load_recipe(RECIPE)
    tokens = recipe.training.queries_per_step * recipe.algorithm.group_size  # type: ignore[attr-defined]
    tokens *= recipe.sampling.max_tokens
    assert made.decode_tokens_per_second < tokens / made.bounds["rollout"]
    # 80 layers of 855,654,400 parameters in bfloat16 for each token, half of them over 8 GB/s.
    layers = 80 * 855_654_400 * 2
    assert isinstance(recipe.engine, NativeSettings)
    turns = -(-tokens // recipe.sampling.max_tokens // recipe.engine.max_rows)
    seconds = turns * recipe.sampling.max_tokens * layers / 2 / 8e9
    assert slow.decode_tokens_per_second == pytest.approx(tokens / seconds, rel=0.03)


def test_zero_3_is_told_where_it_stops_being_practical() -> None:
    (told,) = planned("70b", PLAIN).advice
    assert "137 GB on every GPU" in told and "vLLM with tensor parallel over 4 GPUs" in told
    assert planned("8b", PLAIN).advice == ()  # gathered whole, once per rollout


def test_a_cache_that_does_not_fit_says_how_many_rows_do() -> None:
    words = [PLAIN, "sampling.max_tokens=16000", "engine.max_rows=256"]
    made = planned("70b", *words)
    assert made.rollout_bytes > H100.memory
    told = next(line for line in made.advice if "engine.max_rows" in line)
    assert f"engine.max_rows={made.fitting_rows} does" in told
    fewer = planned("70b", *words[:2], f"engine.max_rows={made.fitting_rows}")
    more = planned("70b", *words[:2], f"engine.max_rows={made.fitting_rows + 1}")
    assert fewer.rollout_bytes <= H100.memory < more.rollout_bytes
    whole = plan(load_recipe(ROOT / "recipes" / "distributed" / "one_node.yaml"),
                 SHAPES["70b"], 8, H100)  # fmt: skip
    assert whole.fitting_rows == 0 and "not even one row" in whole.advice[0]


def test_any_config_has_a_shape() -> None:
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    made, table = shape_of_config(config), SHAPES["8b"]
    assert made.parameters == made.active_parameters == table.parameters == P8
    for name in ("layer_parameters", "end_parameters", "kv_elements", "mlp", "width", "tied"):
        assert getattr(made, name) == getattr(table, name), name
    assert dict(made.linears) == dict(table.linears)


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_parameters_of_every_family_are_counted(family: str) -> None:
    base = tiny_base(family)
    assert shape_of_config(base.model.config).parameters == sum(
        parameter.numel() for parameter in base.model.parameters()
    )


def test_a_token_meets_the_experts_that_are_chosen() -> None:
    heads: Any = {"head_dim": 16}
    config = Qwen3MoeConfig(
        vocab_size=512, hidden_size=64, intermediate_size=96, moe_intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, **heads,
        num_experts=8, num_experts_per_tok=2, decoder_sparse_step=1,
    )  # fmt: skip
    made = shape_of_config(config)
    # Gate, up and down of an expert are 64 x 32; a token meets 2 of 8, in 2 layers.
    assert made.parameters - made.active_parameters == 2 * 6 * 3 * 64 * 32


def test_the_command_takes_a_model_and_links(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    (model / "model.safetensors").unlink()
    shown = rlprompt("plan", RECIPE, "--model", model, "--gpus", 16, "--network", 1,
                     "--gpus-per-node", 4, "--json")  # fmt: skip
    assert shown.code == 0, shown.err
    assert '"fitting_rows"' in shown.out and '"advice"' in shown.out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--model", "m", "--model-size", "8b"), "both name the base"),
        (("--model", "/nowhere/at/all"), "no folder with a config.json"),
        (("--network", "0"), "--network is 0"),
        (("--model-size", "9b"), "there is no size '9b'"),
    ],
    ids=["two-bases", "no-model", "no-network", "no-size"],
)
def test_wrong_bases_and_links_are_told(words: tuple[str, ...], told: str) -> None:
    shown = rlprompt("plan", RECIPE, *words)
    assert shown.code == 2 and told in shown.err


def test_recomputing_costs_a_forward_of_the_layers() -> None:
    plain, again = (
        planned("70b", PLAIN, f"training.gradient_checkpointing={on}") for on in ("false", "true")
    )
    # Of each rank: four groups of a query of 64 tokens and eight completions of 63 that predict.
    tokens = 4 * (64 + 8 * 63)
    assert plain.bounds["update"] == pytest.approx(tokens * 2 * 2 * P70 / H100.flops)
    # Embedding and LM head, 128,256 x 8192 each, are not run again.
    layers = 70_553_706_496 - 2_101_346_304
    more = again.bounds["update"] - plain.bounds["update"]
    assert more == pytest.approx(tokens * 2 * layers / H100.flops, rel=1e-6)
    assert again.bounds["update"] / plain.bounds["update"] == pytest.approx(1.485, abs=1e-3)
    # It happens while the layers are there for the backward (counted in test_plan.py).
    assert again.traffic == plain.traffic
    assert again.memory["activations of a micro-batch"] < plain.memory[
        "activations of a micro-batch"
    ]  # fmt: skip


def test_ranks_share_a_group_where_there_are_more_of_them_than_queries() -> None:
    # 64 queries on 128 ranks: four of eight completions on each, 16 + 64 + 64 columns.
    two = planned("8b", PLAIN, ranks=128)
    column = 2 * 32 * 8 * 128 * 2  # keys and values of 32 layers, 8 heads of 128, bfloat16
    assert two.memory["cache of a rollout"] == 4 * 144 * column
    assert two.bounds["update"] == pytest.approx((64 + 4 * 63) * 4 * P8 / H100.flops)
    # On 200 some groups have four ranks and some three, so three completions are the most.
    assert planned("8b", PLAIN, ranks=200).memory["cache of a rollout"] == 3 * 144 * column
    assert planned("8b", PLAIN, ranks=512).memory["cache of a rollout"] == 1 * 144 * column


def test_more_ranks_than_completions_stay_refused() -> None:
    with pytest.raises(InputError, match="nothing to do"):
        planned("8b", PLAIN, ranks=4096)
