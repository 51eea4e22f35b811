"""GRPO on a page, bit for bit `rlprompt train`: python examples/grpo_loop.py RECIPE [key=value]"""

import math
import sys
from pathlib import Path

import torch

import rlprompt


def learn(path: Path, overrides: list[str]) -> rlprompt.LoadedPrompt:
    recipe = rlprompt.load_recipe(path, overrides)
    assert isinstance(recipe.algorithm, rlprompt.GRPOSettings)
    assert isinstance(recipe.prompt, rlprompt.SoftSettings)
    queries = rlprompt.load_queries(recipe.data, path.parent).train
    rewards = rlprompt.build_rewards(recipe.rewards, path.parent)
    policy = rlprompt.open_model(**recipe.model.model_dump()).policy
    prompt = policy.prompt = rlprompt.SoftPrompt.create(recipe.prompt, policy, recipe.seed)
    base, engine = rlprompt.NonePrompt(), rlprompt.NativeEngine(policy)
    training, sampling, size = recipe.training, recipe.sampling, recipe.algorithm.group_size
    sampler = rlprompt.QuerySampler(len(queries), training.queries_per_step, recipe.seed)
    peak = 0.05 * prompt.scale(policy)
    optimizer = torch.optim.AdamW(prompt.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0)
    for step in range(training.steps):
        engine.sync(prompt)  # a rollout: rewards count relative to those of the same query
        asked = [queries[i] for i in sampler.next()]
        groups = engine.generate(asked, size, sampling, seed=7919 * step + 1).groups
        drawn = [group.completions for group in groups]
        reward = rewards.score(groups, step=step).total.double().view(len(asked), size)
        gap = reward - reward.mean(1, keepdim=True)
        spread = (gap.square().sum(1, keepdim=True) / (size - 1)).sqrt() + 1e-4
        advantages = (gap / spread).view(-1, 1).float()
        with torch.no_grad():  # log-probabilities [B, T] under the base ...
            tree = policy.tree(asked, drawn, prefix := policy.prefix(base), base)
            ref = policy.logprobs(tree, prefix, sampling.temperature).logprobs
        shared = policy.shared_prefix()  # ... and under the prompt, which is prefilled once
        tree = policy.tree(asked, drawn, shared.leaves)
        scores = policy.logprobs(tree, shared.leaves, sampling.temperature)
        # The mean over completions of token means: policy gradient, and the KL to the base (k3).
        weights = scores.mask / (len(scores.mask) * scores.mask.sum(1, keepdim=True))
        ratio, gap = (scores.logprobs - scores.logprobs.detach()).exp(), scores.logprobs - ref
        kl = recipe.algorithm.kl_coef * (weights * ((-gap).exp() + gap - 1.0)).sum()
        (kl - (weights * (ratio * advantages)).sum()).backward()
        policy.finish_prefix(shared)  # one more backward, of the prompt's few tokens
        grad = prompt.embeddings.grad
        assert grad is not None
        grad.mul_(min(1.0, 1.0 / (float(grad.norm()) + 1e-6)))
        done = (step - 2) / max(1, training.steps - 2)
        cosine = 0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * done))
        optimizer.param_groups[0]["lr"] = peak * ((step + 1) / 2 if step < 2 else cosine)
        optimizer.step()
        optimizer.zero_grad()
        prompt.constrain()  # the trust region
        print(f"step {step + 1}: reward {reward.mean():.3f}", flush=True)
    return rlprompt.LoadedPrompt(policy, prompt, sampling)


if __name__ == "__main__":
    learn(Path(sys.argv[1]), sys.argv[2:]).save("runs/grpo_loop/artifact")
