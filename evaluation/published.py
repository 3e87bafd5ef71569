"""The paper's numbers, and the words for the discriminator's measures that stand beside them."""

# Table 1 (MT-Bench) and Figure 4 (AlpacaEval: how often TLCR is preferred to the method, percent) of the paper.
PUBLISHED: dict[str, dict[str, float]] = {
    "SFT": {"turn 1": 4.78, "turn 2": 3.01, "overall": 3.90, "TLCR preferred, %": 84.89},
    "DPO": {"turn 1": 5.10, "turn 2": 3.56, "overall": 4.33, "TLCR preferred, %": 80.12},
    "FIGA": {"turn 1": 5.11, "turn 2": 3.57, "overall": 4.35, "TLCR preferred, %": 77.31},
    "PPO_synthetic": {"turn 1": 4.90, "turn 2": 3.53, "overall": 4.21},
    "PPO_seq": {"turn 1": 5.29, "turn 2": 4.08, "overall": 4.68, "TLCR preferred, %": 77.19},
    "ReMax": {"turn 1": 5.66, "turn 2": 3.86, "overall": 4.76, "TLCR preferred, %": 66.65},
    "TLCR_fixed": {"turn 1": 5.47, "turn 2": 4.30, "overall": 4.89, "TLCR preferred, %": 60.76},
    "TLCR": {"turn 1": 5.71, "turn 2": 4.38, "overall": 5.04},
}

# Figure 6: rewards per answer, as far as the paper gives numbers; its token rewards are sums of released-code rewards.
PUBLISHED_REWARDS: dict[str, dict[str, float]] = {
    "PPO_seq": {"sequence": 4.28, "discrete token": 25.7, "continuous token": 17.0},
    "TLCR": {"sequence": 4.13},
    "TLCR_fixed": {"sequence": 3.04},
}

# What is said of the discriminator, by its keys in results.json; the first two even where they are missing.
MEASURES = {
    "edited_accuracy": "accuracy on edited tokens (paper, 7.2: 0.814)",
    "majority_accuracy": "the same, always guessing the majority class",
    "three_class_accuracy": "accuracy on positive, neutral and negative tokens",
    "auroc": "AUROC, positive against negative tokens",
    "reward_positive": "mean reward 2D − 1 of positive tokens",
    "reward_neutral": "mean reward of neutral tokens",
    "reward_negative": "mean reward of negative tokens",
}
