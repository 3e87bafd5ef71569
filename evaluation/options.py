"""The options of the evaluation's parts, in a room of their own: --help and a wrong flag do without PyTorch."""

from dataclasses import MISSING, dataclass

from deepspeed_chat_tlcr.arguments import AttentionName, Dtype, option, seed_option
from deepspeed_chat_tlcr.asking.client import EndpointOptions

CURVES = {
    "policy/perplexity": ("Perplexity of responses", ""),
    "rollout/response_length": ("Response length", "tokens"),
    "policy/kl": ("KL to SFT", "nats per response"),
    "reward/per_token": ("Reward per token", "mean"),
}
"""Metrics of the curves in the paper's order, with their charts' titles and units; docs/metrics.md explains each."""


@dataclass(frozen=True, kw_only=True)
class OutOptions:
    """output"""

    out: str = option(MISSING, "folder for answers, verdicts, results and report.html; an earlier run continues")


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """device"""

    dtype: Dtype = option("auto", "precision; auto: bf16 where the accelerator has it, else fp16; fp32 on CPU")
    attn_implementation: AttentionName = option(
        "sdpa", "what computes attention in every model; sdpa: PyTorch's kernels, eager in a family that has none"
    )

    def __post_init__(self):
        """Raises ``InputError`` for an attention that this machine or precision cannot have."""
        if self.attn_implementation != "sdpa":
            from deepspeed_chat_tlcr.models import require_attention
            from deepspeed_chat_tlcr.runtime import resolve_dtype

            require_attention(self.attn_implementation, resolve_dtype(self.dtype))


@dataclass(frozen=True, kw_only=True)
class NodeOptions(DeviceOptions):
    """processes"""

    num_processes: int = option(
        0, "processes that answer and score, each on a GPU of its own; 0: as many as there are GPUs, one on a CPU"
    )


@dataclass(frozen=True, kw_only=True)
class PolicyOptions(NodeOptions, OutOptions):
    """models"""

    models: list[str] = option([], "NAME=FOLDER of each model: Hugging Face folders or hub names")
    generation_batch_size: int = option(16, "answers written at once")
    max_new_tokens: int = option(1024, "longest answer, tokens (FastChat's default)")
    seed: int = seed_option(1234, "seed of sampled answers")


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """prompts"""

    prompts: str | None = option(None, "file of records with 'instruction' (plain text) or 'prompt' (with its markers)")
    data_path: list[str] = option([], "instead: data sets or files of preferences, whose held-out RL prompts are taken")
    data_split: str = option("2,4,4", "shares of SFT, reward and RL data")
    data_seed: int = seed_option(1234, "seed of the split; the same in every stage")
    prompt_count: int = option(128, "most prompts; 0: all", least=0)
    temperature: float = option(1.0, "sampling temperature of the answers; 0: the likeliest token")
    max_answer_seq_len: int = option(256, "longest answer to these prompts, tokens (step 3's)")


@dataclass(frozen=True, kw_only=True)
class JudgeOptions(EndpointOptions):
    """judge"""

    judge: str | None = option(None, "the judging model, such as gpt-6-luna; unset: answers are not judged")
    judge_temperature: float | None = option(0.0, "sampling temperature of the judge, where it takes one", most=2)
    judge_max_tokens: int = option(2048, "most tokens of a verdict")


@dataclass(frozen=True, kw_only=True)
class MtBenchOptions:
    """MT-Bench"""

    mt_bench_dir: str | None = option(None, "FastChat's checkout or llm_judge/data: questions, prompts, references")


@dataclass(frozen=True, kw_only=True)
class AlpacaOptions:
    """AlpacaEval"""

    judge_prompts: str | None = option(None, "file of FastChat's form with the prompt pair-v2; unset: our own prompt")
    annotators_config: str | None = option(
        None,
        "judge with the package alpaca_eval too: deepspeed_chat_tlcr_gpt-6-luna (ours), a name that it knows, a folder",
    )
    reference_outputs: str | None = option(None, "the package's reference answers; unset: the first model's")
    length_controlled: bool = option(
        False, "the package's length-controlled win rates too; AlpacaEval's own prompts only, in their order"
    )


@dataclass(frozen=True, kw_only=True)
class DiscriminatorPath:
    """reward models"""

    discriminator: str | None = option(None, "folder of the token discriminator (step 2)")
    scoring_batch_size: int = option(16, "texts judged by a reward model at once")


@dataclass(frozen=True, kw_only=True)
class RewardOptions(DiscriminatorPath):
    """rewards"""

    sequence_reward: str | None = option(None, "folder of a sequence reward model (step 2 --objective sequence)")


@dataclass(frozen=True, kw_only=True)
class CurveOptions:
    """curves"""

    runs: list[str] = option([], "NAME=PATH of each run: its metrics.jsonl, or the folder with it")
    metrics: list[str] = option(list(CURVES), "keys of metrics.jsonl, a chart each")
    frontier: list[str] = option(
        [], "two keys of metrics.jsonl, such as reward/tlcr reward/tlcr_2: a dot for each run, a line through the best"
    )
    smoothing: float = option(
        0.8, "weight of a point's neighbours, in [0, 1); raw values are drawn behind; 0: not smoothed", below=1
    )


@dataclass(frozen=True, kw_only=True)
class DiscriminatorOptions(DiscriminatorPath):
    """discriminator"""

    revisions: list[str] = option([], "revisions.jsonl files of labeling/main.py")
    eval_share: float = option(
        0.05, "share of prompts that step 2 held out (its own --eval_share); 1: all are held out", above=0, most=1
    )
    max_seq_len: int = option(512, "longest prompt plus response, tokens, as in step 2")
    error_spans: str | None = option(None, "QA-feedback file with the error spans that people marked in y_r")


@dataclass(frozen=True, kw_only=True)
class SideOptions(DiscriminatorPath):
    """side by side"""

    show: list[str] = option([], "prompts to answer, plain texts; unset: the first --shown of --prompts or --data_path")
    shown: int = option(6, "how many prompts of a file are shown")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """run"""

    run_options: str | None = option(
        None, "step 3's run_options.json: data, split and seed are taken from it where --data_path is unset"
    )


@dataclass(frozen=True, kw_only=True)
class Everything(
    RunOptions,
    MtBenchOptions,
    AlpacaOptions,
    RewardOptions,
    CurveOptions,
    DiscriminatorOptions,
    SideOptions,
    PromptOptions,
    PolicyOptions,
    JudgeOptions,
):
    """Evaluate models as the paper does."""
