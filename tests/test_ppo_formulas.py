"""Our arithmetic beside DeepSpeed-Chat's, computed here from its description: equal, except where docs/ppo.md says.

DeepSpeed-Chat works on *transitions*: transition t of a padded sequence predicts token t + 1, so a prompt of P tokens
starts its actions at transition P - 1. Its reward loop ends one transition too late (``ends = start + n + 1`` where the
answer, end of sequence included, has n tokens that are not padding).
"""

import pytest
import torch

from step3_ppo_tlcr.objectives import gae, k1, kl_penalised, policy_loss, value_loss
from step3_ppo_tlcr.rewards import sequence_reward

BETA, CLIP, GAMMA, LAM = 0.1, 5.0, 1.0, 0.95
PROMPT, LENGTHS, ACTIONS = 3, [4, 2, 1], 4


def chat_rewards(logprobs, ref_logprobs, scores, past_the_end: int) -> torch.Tensor:
    """Per transition: -beta KL everywhere, the clamped score added to the last one that its loop takes in."""
    rewards = -BETA * (logprobs - ref_logprobs)
    start = PROMPT - 1
    for row, length in enumerate(LENGTHS):
        end = start + length + past_the_end
        rewards[row, start:end][-1] += min(max(scores[row].item(), -CLIP), CLIP)
    return rewards


def chat_advantages(values, rewards, past_the_end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """GAE over all transitions from the first action on, with what lies behind the loop's end set to zero."""
    start = PROMPT - 1
    values, rewards = values.clone(), rewards.clone()
    for row, length in enumerate(LENGTHS):
        values[row, start + length + past_the_end :] = 0
        rewards[row, start + length + past_the_end :] = 0
    advantages, last = [], torch.zeros(len(LENGTHS))
    for t in reversed(range(start, values.size(1))):
        following = values[:, t + 1] if t + 1 < values.size(1) else torch.zeros(len(LENGTHS))
        last = rewards[:, t] + GAMMA * following - values[:, t] + GAMMA * LAM * last
        advantages.insert(0, last)
    advantages = torch.stack(advantages, 1)
    return advantages, advantages + values[:, start:]


def chat_actor_loss(logprobs, old_logprobs, advantages, mask) -> torch.Tensor:
    ratio = torch.exp((logprobs - old_logprobs) * mask)
    return (torch.max(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)) * mask).sum() / mask.sum()


def chat_critic_loss(values, old_values, returns, mask) -> torch.Tensor:
    clipped = values.clamp(old_values - 0.2, old_values + 0.2)
    return 0.5 * (torch.max((values - returns) ** 2, (clipped - returns) ** 2) * mask).sum() / mask.sum()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)

    def noise() -> torch.Tensor:
        # One more transition than tokens have: what its loop reaches past the end of the longest answer.
        return torch.randn(len(LENGTHS), PROMPT - 1 + ACTIONS + 1, generator=generator)

    mask = (torch.arange(ACTIONS) < torch.tensor(LENGTHS).unsqueeze(1)).float()
    return noise(), noise(), noise(), noise(), noise(), 4 * torch.randn(len(LENGTHS), generator=generator), mask


def ours(logprobs, ref_logprobs, values, scores, mask):
    at = slice(PROMPT - 1, PROMPT - 1 + ACTIONS)
    rewards = sequence_reward(scores.unsqueeze(1).expand(-1, ACTIONS), mask, CLIP)
    rewards = kl_penalised(rewards, k1(logprobs[:, at], ref_logprobs[:, at]), mask, BETA)
    return rewards, *gae(rewards, values[:, at], mask, GAMMA, LAM)


def test_everything_equals_deepspeed_chat_on_the_exact_actions(batch):
    """With its loop ending where the answer ends, all numbers are the same."""
    old_logprobs, ref_logprobs, old_values, logprobs, values, scores, mask = batch
    rewards, advantages, returns = ours(old_logprobs, ref_logprobs, old_values, scores, mask)
    at = slice(PROMPT - 1, PROMPT - 1 + ACTIONS)
    their_rewards = chat_rewards(old_logprobs, ref_logprobs, scores, past_the_end=0)
    their_advantages, their_returns = chat_advantages(old_values, their_rewards, past_the_end=0)
    torch.testing.assert_close(rewards, their_rewards[:, at] * mask)
    torch.testing.assert_close(advantages, their_advantages[:, :ACTIONS] * mask)
    torch.testing.assert_close(returns, their_returns[:, :ACTIONS] * mask)
    torch.testing.assert_close(
        policy_loss(logprobs[:, at], old_logprobs[:, at], advantages, mask, 0.2),
        chat_actor_loss(logprobs[:, at], old_logprobs[:, at], advantages, mask),
    )
    torch.testing.assert_close(
        value_loss(values[:, at], old_values[:, at], returns, mask, 0.2),
        chat_critic_loss(values[:, at], old_values[:, at], returns, mask),
    )


def test_the_transition_past_the_end_is_left_out_here(batch):
    """There, the score lands behind the end of sequence and the padding's value leaks into every advantage."""
    old_logprobs, ref_logprobs, old_values, _, _, scores, mask = batch
    _, advantages, _ = ours(old_logprobs, ref_logprobs, old_values, scores, mask)
    their_rewards = chat_rewards(old_logprobs, ref_logprobs, scores, past_the_end=1)
    theirs = chat_advantages(old_values, their_rewards, past_the_end=1)[0]
    for row, length in enumerate(LENGTHS):
        last, behind = PROMPT - 2 + length, PROMPT - 1 + length
        # Of the last action: what is behind it counts with V there, and with the lambda-discounted delta there.
        kl_behind = BETA * (old_logprobs - ref_logprobs)[row, behind]
        score = scores[row].clamp(-CLIP, CLIP)
        delta_behind = score - kl_behind - old_values[row, behind]
        expected = advantages[row, length - 1] - score + old_values[row, behind] + LAM * delta_behind
        torch.testing.assert_close(theirs[row, length - 1], expected)
        assert not torch.isclose(theirs[row, length - 1], advantages[row, length - 1])
        assert last == behind - 1


def test_both_ends_agree_where_nothing_stands_past_the_end(batch):
    """Zero value and KL in the padding and lambda 1: the late reward reaches every action undiminished."""
    old_logprobs, ref_logprobs, old_values, _, _, scores, mask = batch
    for row, length in enumerate(LENGTHS):
        old_values[row, PROMPT - 1 + length :] = 0
        ref_logprobs[row, PROMPT - 1 + length :] = old_logprobs[row, PROMPT - 1 + length :]
    at = slice(PROMPT - 1, PROMPT - 1 + ACTIONS)
    rewards = sequence_reward(scores.unsqueeze(1).expand(-1, ACTIONS), mask, CLIP)
    rewards = kl_penalised(rewards, k1(old_logprobs[:, at], ref_logprobs[:, at]), mask, BETA)
    advantages, _ = gae(rewards, old_values[:, at], mask, 1.0, 1.0)
    theirs = chat_rewards(old_logprobs, ref_logprobs, scores, past_the_end=1)
    for row, length in enumerate(LENGTHS):
        for action in range(length):
            t = PROMPT - 1 + action
            undiminished = theirs[row, t:].sum() - old_values[row, t]  # gamma = lambda = 1: rewards to come minus V
            torch.testing.assert_close(advantages[row, action], undiminished)


def test_a_token_weighs_the_same_in_a_short_answer_and_a_long_one():
    """Two micro-batches of 1 and 3 tokens: 4 equal shares here; there each micro-batch is averaged first."""
    losses = [torch.tensor([1.0]), torch.tensor([5.0, 5.0, 5.0])]
    tokens = torch.tensor([float(len(loss)) for loss in losses])
    shares = tokens / tokens.sum() * len(losses)  # as Trainer._optimiser_step gives them to the engine, which averages
    ours = sum(loss.mean() * share for loss, share in zip(losses, shares, strict=True)) / len(losses)
    assert ours.item() == pytest.approx(16 / 4)
    assert sum(loss.mean() for loss in losses).item() / 2 == pytest.approx(3.0)  # DeepSpeed-Chat's
