"""The arithmetic of PPO and of step 2, against numbers done by hand and slow loops."""

import math
from dataclasses import replace

import pytest
import torch

from deepspeed_chat_tlcr.generation import Decoding
from step2_discriminator.objectives import diverging_pair_loss, end_scores, pair_loss, token_loss
from step3_ppo_tlcr.logprobs import entropy, full_kl, token_logprobs
from step3_ppo_tlcr.objectives import adapted_beta, gae, k1, k3, kl_penalised, masked_mean, policy_loss, value_loss
from step3_ppo_tlcr.rewards import (
    continuous_reward,
    fixed_reward,
    last_action,
    negative_only_reward,
    positive_only_reward,
    random_reward,
    released_code_reward,
    sequence_reward,
    sum_at_the_end,
)


def close(actual: torch.Tensor, expected: list) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=actual.dtype), rtol=1e-5, atol=1e-6)


# Row 0 ends in the middle of the batch, row 1 fills it (no EOS), row 2 is one token, row 3 is empty.
MASK = torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]])


def test_continuous_reward_is_2d_minus_1_on_every_counted_token():
    probs = torch.tensor([[1.0, 0.5, 0.9, 0.9], [0.0, 0.25, 0.75, 0.6], [0.1, 1, 1, 1], [1, 1, 1, 1]])
    close(continuous_reward(probs, MASK), [[1, 0, 0, 0], [-1, -0.5, 0.5, 0.2], [-0.8, 0, 0, 0], [0, 0, 0, 0]])


def test_fixed_reward_is_neutral_below_the_threshold():
    probs = torch.tensor([[0.61, 0.59, 0.41, 0.39]])
    close(fixed_reward(probs, torch.ones(1, 4)), [[1, 0, 0, -1]])
    close(fixed_reward(probs, torch.ones(1, 4), threshold=0.5), [[1, 1, -1, -1]])
    close(fixed_reward(probs, torch.tensor([[0.0, 1, 1, 0]])), [[0, 0, 0, 0]])


def test_ablations_keep_one_sign():
    probs, mask = torch.tensor([[0.9, 0.2, 0.5]]), torch.ones(1, 3)
    close(positive_only_reward(probs, mask), [[0.8, 0, 0]])
    close(negative_only_reward(probs, mask), [[0, -0.6, 0]])


def test_the_sum_of_all_token_rewards_on_the_last_action():
    """r = .5, -.5, 1 and 0 is 1 in sum; of the second row only 2 x .75 - 1 counts."""
    probs = torch.tensor([[0.75, 0.25, 1.0, 0.5], [0.75, 0.9, 0.9, 0.9]])
    mask = torch.tensor([[1.0, 1, 1, 1], [1, 0, 0, 0]])
    close(sum_at_the_end(probs, mask), [[0, 0, 0, 1.0], [0.5, 0, 0, 0]])


def test_released_code_squashes_twice_and_comes_one_action_late():
    # Soft-max of (p, 1 - p) once more: p' = sigmoid(2p - 1); 2p' - 1 is .380 where p is .9, .0997 where it is .6.
    probs = torch.tensor([[0.9, 0.6, 0.1, 0.9]])
    late = released_code_reward(probs, torch.tensor([[1.0, 1, 1, 0]]))
    close(late, [[0, 0.379949, 0.099668, 0]])


def test_sequence_reward_sits_on_the_last_action_and_is_clipped():
    scores = torch.tensor([[1.0, 2, 3, 4], [1, 2, 3, 9], [0.5, 7, 7, 7], [7, 7, 7, 7]])
    close(sequence_reward(scores, MASK), [[0, 2, 0, 0], [0, 0, 0, 5], [0.5, 0, 0, 0], [0, 0, 0, 0]])
    close(last_action(MASK), [[0, 1, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]])


def test_random_reward_is_bounded_masked_and_differs_by_token():
    rewards = random_reward(MASK)
    assert (rewards.abs() <= 1).all()
    assert (rewards[MASK == 0] == 0).all()
    assert len(rewards[MASK == 1].unique()) == 7


def test_kl_penalty_is_per_token():
    logprobs, ref_logprobs, mask = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-3.0, -1.0]]), torch.ones(1, 2)
    rewards = kl_penalised(torch.tensor([[1.0, 0.5]]), k1(logprobs, ref_logprobs), mask, 0.1)
    close(rewards, [[1 - 0.1 * 2, 0.5 + 0.1]])
    close(k3(logprobs, ref_logprobs), [[math.exp(-2) - 1 + 2, math.e - 1 - 1]])


def test_full_kl_is_the_mean_of_k1_and_of_k3_under_the_policy():
    torch.manual_seed(0)
    logits, ref_logits = torch.randn(2, 1, 3, 6).double()
    # At half the temperature the logits are twice as large; EOS cannot be the first action's token.
    exact = full_kl(logits, ref_logits, Decoding(max_new_tokens=8, temperature=0.5, min_new_tokens=1), EOS)
    logits[0, 0, EOS] = ref_logits[0, 0, EOS] = -1e3
    logprobs, ref_logprobs = (2 * logits).log_softmax(-1), (2 * ref_logits).log_softmax(-1)
    probs = logprobs.exp()
    for estimate in (k1, k3):
        torch.testing.assert_close(
            (probs * estimate(logprobs, ref_logprobs)).sum(-1).float(), exact, atol=1e-5, rtol=1e-5
        )


def test_adapted_beta_moves_towards_the_target():
    # twice the target: the error is clipped to 20 %, over a tenth of the horizon
    assert adapted_beta(0.1, kl=12.0, target=6.0, sequences=100, horizon=1000) == pytest.approx(0.1 * 1.02)
    assert adapted_beta(0.1, kl=5.4, target=6.0, sequences=100, horizon=1000) == pytest.approx(0.1 * 0.99)
    assert adapted_beta(0.1, kl=0.0, target=6.0, sequences=8, horizon=1) == pytest.approx(0.05), "never below 0"


def test_gae_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 100.0]])
    values = torch.tensor([[0.5, 1.0, 50.0]])
    mask = torch.tensor([[1.0, 1.0, 0.0]])
    # delta_1 = 2 - 1 = 1; delta_0 = 1 + 0.9 * 1 - 0.5 = 1.4; A_0 = 1.4 + 0.9 * 0.5 * 1 = 1.85
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=0.5)
    close(advantages, [[1.85, 1.0, 0.0]])
    close(returns, [[2.35, 2.0, 0.0]])


def test_gae_of_the_end_is_not_touched_by_what_follows_it():
    # PEERS: the released code's EOS advantage took in a transition past the end; here only r - V of EOS counts.
    advantages, _ = gae(torch.tensor([[0.3, -0.5]]), torch.tensor([[0.01, 5.0]]), torch.tensor([[1.0, 0.0]]), 1.0, 0.95)
    close(advantages, [[0.29, 0.0]])


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.99, 0.0), (0.9, 1.0)])
def test_gae_against_the_sum_over_later_deltas(gamma, lam):
    torch.manual_seed(0)
    rewards, values = torch.randn(4, 4), torch.randn(4, 4)
    advantages, returns = gae(rewards, values, MASK, gamma, lam)
    for row, length in enumerate(MASK.sum(1).int().tolist()):
        r, v = rewards[row].tolist(), [*values[row].tolist()[:length], 0.0]
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        expected = [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, length)) for t in range(length)]
        close(advantages[row, :length], expected)
        close(returns[row, :length], [a + b for a, b in zip(expected, v, strict=False)])
        assert (advantages[row, length:] == 0).all()
        assert (returns[row, length:] == 0).all()


def test_a_reward_moves_to_the_action_that_chose_its_token():
    """Only the second token is good: with lambda 0 and V = 0 only the second action's advantage is positive."""
    probs = torch.tensor([[0.5, 1.0, 0.5]])
    advantages, _ = gae(continuous_reward(probs, torch.ones(1, 3)), torch.zeros(1, 3), torch.ones(1, 3), 1.0, 0.0)
    close(advantages, [[0, 1, 0]])


def test_policy_loss_clips_both_ways_and_averages_over_counted_tokens():
    old = torch.zeros(1, 4)
    new = torch.log(torch.tensor([[1.5, 1.5, 0.5, 9.0]]))
    advantages = torch.tensor([[1.0, -1.0, -1.0, 1.0]])
    mask = torch.tensor([[1.0, 1, 1, 0]])
    # min(1.5, 1.2) = 1.2; min(-1.5, -1.2) = -1.5; min(-0.5, -0.8) = -0.8
    assert policy_loss(new, old, advantages, mask, 0.2).item() == pytest.approx(-(1.2 - 1.5 - 0.8) / 3)


def test_policy_loss_on_policy_has_the_plain_policy_gradient():
    logprobs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    policy_loss(logprobs, logprobs.detach(), torch.tensor([[2.0, -4.0]]), torch.ones(1, 2), 0.2).backward()
    close(logprobs.grad, [[-1.0, 2.0]])


def test_policy_loss_ignores_infinities_in_the_padding():
    logprobs = torch.tensor([[-1.0, -math.inf]], requires_grad=True)
    loss = policy_loss(logprobs, torch.zeros(1, 2), torch.ones(1, 2), torch.tensor([[1.0, 0.0]]), 0.2)
    loss.backward()
    assert math.isfinite(loss.item())
    assert torch.isfinite(logprobs.grad).all()


def test_value_loss_takes_the_worse_of_clipped_and_unclipped():
    values, old = torch.tensor([[1.0, 0.0, 7.0]]), torch.tensor([[0.0, 0.0, 0.0]])
    returns, mask = torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([[1.0, 1.0, 0.0]])
    # first: clipped V = 0.2, error 0.64 > 0; second: not clipped, error 1. Half their mean.
    assert value_loss(values, old, returns, mask, 0.2).item() == pytest.approx(0.5 * (0.64 + 1.0) / 2)


def test_masked_mean_of_nothing_is_zero():
    assert masked_mean(torch.ones(2, 2), torch.zeros(2, 2)).item() == 0.0


PLAIN = Decoding(max_new_tokens=8)
EOS = 3


def test_logprobs_and_their_gradient_are_those_of_log_softmax():
    torch.manual_seed(0)
    logits = torch.randn(3, 4, 7, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(7, (3, 4))
    weights = torch.randn(3, 4)
    ours = token_logprobs(logits, tokens, PLAIN, EOS)
    (gradient,) = torch.autograd.grad((ours * weights).sum(), logits)
    reference = logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    (expected,) = torch.autograd.grad((reference * weights).sum(), logits)
    torch.testing.assert_close(ours, reference.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


def test_bf16_logits_lose_nothing_on_the_way_to_logprobs():
    torch.manual_seed(0)
    logits = (4 * torch.randn(2, 3, 50)).to(torch.bfloat16)
    tokens = torch.randint(50, (2, 3))
    expected = logits.float().log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(token_logprobs(logits, tokens, PLAIN, EOS), expected)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 0.5}, [0.16 / 0.30, 0.09 / 0.30, 0.04 / 0.30, 0.01 / 0.30]),
        ({"top_k": 2}, [4 / 7, 3 / 7, None, None]),
        ({"top_p": 0.65}, [4 / 7, 3 / 7, None, None]),
        ({"top_p": 0.71}, [4 / 9, 3 / 9, 2 / 9, None]),
        ({"top_k": 3, "top_p": 0.7}, [4 / 7, 3 / 7, None, None]),
    ],
)
def test_logprobs_belong_to_the_distribution_sampled_from(settings, expected):
    logits = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.1])).view(1, 1, 4)
    decoding = Decoding(max_new_tokens=8, **settings)
    for token, probability in enumerate(expected):
        if probability is not None:
            logprob = token_logprobs(logits, torch.tensor([[token]]), decoding, EOS)
            assert logprob.exp().item() == pytest.approx(probability, rel=1e-5)


def test_eos_is_impossible_before_the_minimum_length():
    logits = torch.zeros(1, 2, 4)
    decoding = Decoding(max_new_tokens=8, min_new_tokens=1)
    logprobs = token_logprobs(logits, torch.tensor([[0, 0]]), decoding, EOS)
    close(logprobs.exp(), [[1 / 3, 1 / 4]])
    close(entropy(logits, torch.tensor([[0, 0]]), decoding, EOS), [[math.log(3), math.log(4)]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_barred_end_in_logprobs_and_gradient_leaves_the_logits_as_they_were(dtype):
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 7).to(dtype).requires_grad_()
    before = logits.detach().clone()
    tokens, weights = torch.randint(EOS, (2, 4)), torch.randn(2, 4)
    ours = token_logprobs(logits, tokens, Decoding(max_new_tokens=8, min_new_tokens=3, temperature=0.5), EOS)
    (gradient,) = torch.autograd.grad((ours * weights).sum(), logits)
    barred = torch.zeros(4, 7, dtype=torch.bool)
    barred[:3, EOS] = True
    reference = (logits.float() / 0.5).masked_fill(barred, -torch.inf).log_softmax(-1)
    reference = reference.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    (expected,) = torch.autograd.grad((reference * weights).sum(), logits)
    assert logits.detach().equal(before)
    assert gradient[:, :3, EOS].eq(0).all()
    torch.testing.assert_close(ours, reference)
    torch.testing.assert_close(gradient, expected)


def test_a_token_outside_a_later_nucleus_keeps_a_finite_logprob():
    logits = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.1])).view(1, 1, 4).requires_grad_()
    logprob = token_logprobs(logits, torch.tensor([[3]]), Decoding(max_new_tokens=8, top_p=0.5), EOS)
    logprob.sum().backward()
    assert logprob.exp().item() == pytest.approx(0.1 / 0.8, rel=1e-5)
    assert torch.isfinite(logits.grad).all()


def test_entropy_is_that_of_the_distribution_sampled_from():
    first, plain = torch.tensor([[0]]), Decoding(max_new_tokens=8)
    assert entropy(torch.zeros(1, 1, 8), first, plain, EOS).item() == pytest.approx(math.log(8))
    assert entropy(torch.tensor([[[100.0, 0.0]]]), first, plain, EOS).item() == pytest.approx(0.0, abs=1e-6)
    logits = torch.log(torch.tensor([0.4, 0.4, 0.15, 0.05])).view(1, 1, 4)
    assert entropy(logits, first, replace(plain, top_k=2), EOS).item() == pytest.approx(math.log(2))
    assert entropy(logits, first, replace(plain, top_p=0.5), EOS).item() == pytest.approx(math.log(2))
    assert entropy(logits, first, replace(plain, temperature=1e3), EOS).item() == pytest.approx(math.log(4), abs=1e-4)


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def test_token_loss_by_hand():
    # Two sequences of 2 and 1 response tokens; D = .8, .5 | .25; targets 1, .5 | 0.
    logits = torch.zeros(2, 3, 2)
    logits[0, 1, 1], logits[1, 1, 1] = logit(0.8), logit(0.25)
    targets = torch.tensor([[0.5, 1.0, 0.5], [0.5, 0.0, 0.5]])
    mask = torch.tensor([[0, 1, 1], [0, 1, 0]])
    first = (-math.log(0.8) - math.log(0.5)) / 2  # a neutral token at D = .5 still costs log 2
    assert token_loss(logits, targets, mask).item() == pytest.approx((first - math.log(0.75)) / 2)
    ignoring = (-math.log(0.8) - math.log(0.75)) / 2
    assert token_loss(logits, targets, mask, neutral_weight=0.0).item() == pytest.approx(ignoring)


def test_token_loss_without_a_weighted_token_is_zero_not_nan():
    loss = token_loss(torch.randn(1, 2, 2), torch.full((1, 2), 0.5), torch.ones(1, 2), neutral_weight=0.0)
    assert loss.item() == 0.0


def test_token_loss_equals_the_two_class_soft_cross_entropy():
    torch.manual_seed(0)
    logits, targets, mask = (
        torch.randn(3, 5, 2),
        torch.tensor([0.0, 0.5, 1.0])[torch.randint(3, (3, 5))],
        torch.ones(3, 5),
    )
    two_class = torch.stack([1 - targets, targets], -1)
    expected = -(two_class * logits.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(token_loss(logits, targets, mask), expected)


def test_end_scores_and_pair_losses():
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    mask = torch.tensor([[0, 1, 0], [0, 1, 1]])
    close(end_scores(values, mask), [2.0, 6.0])
    assert pair_loss(torch.tensor([1.0]), torch.tensor([1.0])).item() == pytest.approx(math.log(2))
    # Ids differ from position 1 on; the other sequence is longer, so positions 1 and 2 count.
    ids, others = torch.tensor([[7, 8, 0]]), torch.tensor([[7, 9, 9]])
    loss = diverging_pair_loss(
        torch.tensor([[5.0, 1.0, 0.0]]),
        torch.tensor([[0.0, 1.0, 0.0]]),
        ids,
        others,
        torch.tensor([[1, 1, 0]]),
        torch.tensor([[1, 1, 1]]),
    )
    assert loss.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_what_stands_behind_the_end_never_counts(garbage):
    torch.manual_seed(0)
    probs, rewards, values, logprobs, old = (torch.rand(4, 4) for _ in range(5))
    spoil = [x.masked_fill(MASK == 0, garbage) for x in (probs, rewards, values, logprobs, old)]

    def everything(probs, rewards, values, logprobs, old):
        penalised = kl_penalised(continuous_reward(probs, MASK), k1(logprobs, old), MASK, 0.1)
        advantages, returns = gae(rewards, values, MASK, 0.9, 0.8)
        losses = policy_loss(logprobs, old, advantages, MASK, 0.2), value_loss(values, values, returns, MASK, 0.2)
        named = [reward(probs, MASK) for reward in (fixed_reward, released_code_reward, sequence_reward)]
        return *named, penalised, advantages, returns, *losses

    for clean, spoilt in zip(everything(probs, rewards, values, logprobs, old), everything(*spoil), strict=True):
        torch.testing.assert_close(spoilt, clean, rtol=0, atol=0)
