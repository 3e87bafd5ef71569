"""Model loading: strict about keys, the same under ZeRO-3, Hugging Face classes throughout.

A discriminator is a token classifier with 2 labels (0 negative, 1 positive); a critic or sequence reward model has 1
label. A sequence classifier with 1 label, other libraries' form of reward models, is loaded as such: its score is its
head's value at the last token.
"""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.integrations import HfDeepSpeedConfig
from transformers.modeling_outputs import TokenClassifierOutput
from transformers.models.opt.modeling_opt import OPTModel, OPTPreTrainedModel
from transformers.utils import (
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_torch_flex_attn_available,
    logging,
)

from deepspeed_chat_tlcr.chat_format import classifier_class, critic_state_dict, is_chat_critic
from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.model_folders import check_folder, loading

NEGATIVE, POSITIVE = 0, 1
TOKEN_AGGREGATE = "token_aggregate"  # in the config of a model whose one label is each token's reward
TOKEN_LABELS = {NEGATIVE: "NEGATIVE", POSITIVE: "POSITIVE"}
_HEAD_NAMES = ("score", "classifier")
_OF_TOKENS, _OF_SEQUENCES = "ForTokenClassification", "ForSequenceClassification"


class OPTForTokenClassification(OPTPreTrainedModel):
    """OPT with a linear head on every token. transformers has this class for the other families."""

    def __init__(self, config: OPTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = OPTModel(config)
        self.dropout = nn.Dropout(getattr(config, "classifier_dropout", 0.0) or 0.0)
        # Not hidden_size: OPT-350m projects its last hidden state down to the embedding's width.
        self.score = nn.Linear(config.word_embed_proj_dim, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """``logits`` is ``(B, T, K)``."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        outputs = self.model(**inputs, return_dict=True, **kwargs)
        return TokenClassifierOutput(logits=self.score(self.dropout(outputs.last_hidden_state)))


# Without exist_ok transformers silently ignores registrations for its own config classes.
AutoModelForTokenClassification.register(OPTConfig, OPTForTokenClassification, exist_ok=True)


@contextlib.contextmanager
def partitioned_loading(ds_config: dict[str, Any] | None) -> Iterator[None]:
    """Within it, ``from_pretrained`` partitions parameters as they load if ``ds_config`` is ZeRO-3."""
    keep_alive = None
    if ds_config is not None and ds_config["zero_optimization"]["stage"] == 3:
        # transformers holds only a weak reference: this one keeps ZeRO-3 loading switched on.
        keep_alive = HfDeepSpeedConfig(ds_config)
    try:
        yield
    finally:
        del keep_alive


def load_config(path: str, dropout: float | None = None) -> PretrainedConfig:
    """Load a model's config; ``dropout`` replaces every dropout probability in it. Raises ``InputError``."""
    check_folder(path)
    with loading("model", path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    text = config.get_text_config()
    if text.pad_token_id is not None and not 0 <= text.pad_token_id < text.vocab_size:
        text.pad_token_id = None  # -1 in early conversions; padding comes from the tokenizer
    if dropout is not None:
        for name in dropout_names(config):
            setattr(config, name, dropout)
    return config


def embedding_rows(path: str) -> int:
    """The number of token ids that a model has an embedding for."""
    return load_config(path).get_text_config().vocab_size


_LEARNT_POSITIONS = ("biogpt", "gpt2", "gpt_bigcode", "gpt_neo", "openai-gpt", "opt")


def require_positions(path: str, length: int, flags: str) -> None:
    """Raise ``InputError`` if a model with learnt position embeddings has fewer than ``length`` of them."""
    known = trained_positions(path)
    if known and length > known and load_config(path).model_type in _LEARNT_POSITIONS:
        raise InputError(f"{flags}: {length} tokens are more than the {known} positions that {path!r} knows")


def trained_positions(path: str) -> int | None:
    """The length that a model's positions were made for; None where its config names none."""
    return getattr(load_config(path).get_text_config(), "max_position_embeddings", None)


def require_attention(name: str, precision: str) -> None:
    """Raise ``InputError`` for an ``--attn_implementation`` that does not work on this machine or in this precision."""
    packages = {
        "flash_attention_2": (is_flash_attn_2_available, "the package flash-attn (pip install flash-attn)"),
        "flash_attention_3": (is_flash_attn_3_available, "FlashAttention 3, built from its sources, and a Hopper GPU"),
        "flex_attention": (is_torch_flex_attn_available, "a PyTorch that has it"),
    }
    available, needs = packages.get(name, (lambda: True, ""))
    if not available():
        raise InputError(f"--attn_implementation {name}: needs {needs}, on a GPU; use sdpa")
    if name.startswith("flash") and precision == "fp32":
        raise InputError(f"--attn_implementation {name}: has 16-bit kernels only; use sdpa with --dtype fp32")


def dropout_names(config: PretrainedConfig) -> list[str]:
    """Names of the config's dropout probabilities (``dropout``, ``attention_dropout``, ``resid_pdrop``, …)."""
    return [
        name
        for name, value in config.to_dict().items()
        if re.search(r"(drop|dropout|pdrop)$", name) and isinstance(value, (int, float)) and name != "layerdrop"
    ]


def load_causal_lm(
    path: str,
    dtype: torch.dtype,
    ds_config: dict[str, Any] | None = None,
    dropout: float | None = None,
    attention: str = "sdpa",
) -> PreTrainedModel:
    """Load a causal language model. Raises ``InputError`` listing missing or unexpected keys."""
    config = load_config(path, dropout)
    config.use_cache = False
    with partitioned_loading(ds_config):
        model, info = _from_pretrained(AutoModelForCausalLM, path, config=config, dtype=dtype, **_kernels(attention))
    _require_keys(path, info, missing=(), unexpected=())
    return model


def load_token_classifier(
    path: str,
    num_labels: int,
    dtype: torch.dtype,
    ds_config: dict[str, Any] | None = None,
    dropout: float | None = None,
    new_head: bool = False,
    zero_head: bool = False,
    attention: str = "sdpa",
) -> PreTrainedModel:
    """Load a discriminator (2 labels), critic or sequence reward model (1 label; also a sequence classifier).

    ``new_head``: start from a causal LM or a classifier with another head, whose backbone must be complete; the head is
    initialised anew (``zero_head``: to zero, so that a critic's first values are 0). Raises ``InputError`` listing
    missing or unexpected keys, or for a head of another size.
    """
    config = load_config(path, dropout)
    from_chat, of_sequences = is_chat_critic(path), _kind(config).endswith(_OF_SEQUENCES)
    if not new_head:
        saved_labels = 1 if from_chat else _labels_of(config)
        wanted = "discriminator (2 labels)" if num_labels == 2 else "reward model or critic (1 label)"
        if saved_labels is None:
            raise InputError(f"{path!r} is a {_kind(config)}, not a trained {wanted}; step 2 trains one")
        if saved_labels != num_labels:
            raise InputError(f"{path!r} has {saved_labels} label(s), which is no {wanted}")
    head_size = config.num_labels if of_sequences or _kind(config).endswith(_OF_TOKENS) else None
    head_size = 1 if from_chat else head_size
    config.use_cache = False
    config.num_labels = num_labels if head_size is None else head_size
    # Rewards must not be noisy: transformers' default is a dropout of 0.1 before the head.
    config.classifier_dropout = 0.0
    source: dict[str, Any] = {"auto_class": AutoModelForTokenClassification, "path": path}
    if from_chat:
        # The family's class and no path: that is how transformers builds a model from a state dict.
        weights = critic_state_dict(path, config, _head_name(config))
        source = {"auto_class": classifier_class(config), "path": None, "state_dict": weights}
    elif of_sequences:
        source["key_mapping"] = {r"^score\.": f"{_head_name(config)}."}
    with partitioned_loading(ds_config):
        model, info = _from_pretrained(**source, config=config, dtype=dtype, **_kernels(attention))
    head_is_missing = new_head and head_size is None
    lacking = f"{head_of(model)[0]}.{'' if head_is_missing else 'bias'}"
    _require_keys(
        path,
        info,
        missing=(lacking,) if head_is_missing or of_sequences else (),
        unexpected=("lm_head.", "embed_out.") if head_is_missing else (),
    )
    if of_sequences:
        _zero_head_bias(model)
    if model.config.num_labels != num_labels or (of_sequences and new_head):
        _replace_head(model, num_labels, ds_config)
    if num_labels == 2:
        model.config.id2label = dict(TOKEN_LABELS)
        model.config.label2id = {name: label for label, name in TOKEN_LABELS.items()}
    if new_head and zero_head:
        _fill_head(model, std=0.0)
    return model


def _kernels(attention: str) -> dict[str, str]:
    # By default transformers takes sdpa if the family has it; asked for by name, it would refuse other families.
    return {} if attention == "sdpa" else {"attn_implementation": attention}


def _replace_head(model: PreTrainedModel, num_labels: int, ds_config: dict[str, Any] | None) -> None:
    """Give a token classifier a new head for ``num_labels``, partitioned like the rest of it."""
    name, old = head_of(model)
    partitioned = ds_config is not None and ds_config["zero_optimization"]["stage"] == 3
    with deepspeed.zero.Init(config_dict_or_path=ds_config) if partitioned else contextlib.nullcontext():
        new = nn.Linear(old.in_features, num_labels, bias=old.bias is not None, dtype=model.dtype)
    setattr(model, name, new)
    model.config.num_labels = num_labels
    model.num_labels = num_labels  # type: ignore[assignment]
    _fill_head(model, std=getattr(model.config, "initializer_range", 0.02))


def _fill_head(model: PreTrainedModel, std: float) -> None:
    """Head weights from a normal distribution, biases 0; works on partitioned parameters."""
    head = head_of(model)[1]
    with deepspeed.zero.GatheredParameters([head.weight], modifier_rank=0), torch.no_grad():
        head.weight.normal_(0.0, std) if std else head.weight.zero_()
    _zero_head_bias(model)


def scale_head(model: PreTrainedModel, factor: float) -> None:
    """Multiply what a token classifier says of every token by ``factor``; works on partitioned parameters."""
    parameters = list(head_of(model)[1].parameters())
    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0), torch.no_grad():
        for parameter in parameters:
            parameter.mul_(factor)


def _zero_head_bias(model: PreTrainedModel) -> None:
    bias = head_of(model)[1].bias
    if bias is not None:
        with deepspeed.zero.GatheredParameters([bias], modifier_rank=0), torch.no_grad():
            bias.zero_()


def fit_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Grow the embedding, to a multiple of 8 as in DeepSpeed-Chat, if it lacks rows for tokens of --add_eot_token."""
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:  # type: ignore[operator]
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=8)


def _head_name(config: PretrainedConfig) -> str:
    with torch.device("meta"):
        return head_of(AutoModelForTokenClassification.from_config(config))[0]


def head_of(model: PreTrainedModel) -> tuple[str, nn.Linear]:
    """Name and module of a token classifier's linear head."""
    for name in _HEAD_NAMES:
        if hasattr(model, name):
            return name, getattr(model, name)
    raise InputError(f"{type(model).__name__} has no token-classification head that is known here")


def label_count(path: str) -> int | None:
    """Labels of a token classifier; 1 for DeepSpeed-Chat's critics and one-label sequence classifiers; else None."""
    return 1 if is_chat_critic(path) else _labels_of(load_config(path))


def squash(scores: torch.Tensor) -> torch.Tensor:
    """Token rewards between 0 and about 1, smoothly, in fp32 (preference-grounded guidance, Yang et al., 2023)."""
    below_one = 1 - F.softplus(1 - scores.float())
    return 1e-8 + F.softplus(below_one - 1e-8)


def token_aggregate(path: str) -> str | None:
    """How a token reward model (``--objective token_pairs``) sums up its tokens; None for any other model."""
    return getattr(load_config(path), TOKEN_AGGREGATE, None)


def freeze_head_bias(model: PreTrainedModel) -> None:
    """Freeze the bias of a token classifier's head at 0: ``--save_format deepspeed_chat`` has no place for one.

    Raises ``InputError`` if it is not 0.
    """
    bias = head_of(model)[1].bias
    if bias is None:
        return
    with deepspeed.zero.GatheredParameters([bias]):
        learnt = bool(bias.count_nonzero())
    if learnt:
        raise InputError(
            "--save_format deepspeed_chat: the model's head has a bias, which DeepSpeed-Chat has no place for; "
            "train it with --save_format deepspeed_chat from the start, or keep --save_format huggingface"
        )
    bias.requires_grad_(False)


def _labels_of(config: PretrainedConfig) -> int | None:
    # A sequence classifier's one score is a value like a critic's; several classes of sequences are of no use here.
    usable = _kind(config).endswith(_OF_TOKENS) or (_kind(config).endswith(_OF_SEQUENCES) and config.num_labels == 1)
    return config.num_labels if usable else None


def _kind(config: PretrainedConfig) -> str:
    return (config.architectures or ["unknown"])[0]


def _from_pretrained(auto_class: Any, path: str | None, **kwargs: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    # Keys and shapes are checked by _require_keys; transformers' own report would only confuse.
    how = {"output_loading_info": True, "ignore_mismatched_sizes": True, "trust_remote_code": False}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with loading("model", path):
            return auto_class.from_pretrained(path, **how, **kwargs)
    finally:
        logging.set_verbosity(verbosity)


def _require_keys(path: str, info: dict[str, Any], missing: tuple[str, ...], unexpected: tuple[str, ...]) -> None:
    """Raise ``InputError`` for missing or unexpected keys, but for those with an allowed prefix."""
    misfits = {
        "missing": [key for key in info["missing_keys"] if not key.startswith(missing)],
        "unexpected": [key for key in info["unexpected_keys"] if not key.startswith(unexpected)],
        "of another shape": [str(key) for key, *_ in info["mismatched_keys"]],
    }
    problems = [
        f"{len(keys)} {what}: {', '.join(sorted(keys)[:4])}{' …' if len(keys) > 4 else ''}"
        for what, keys in misfits.items()
        if keys
    ]
    if problems:
        raise InputError(f"the checkpoint {path!r} does not fit its config, keys " + "; ".join(problems))
