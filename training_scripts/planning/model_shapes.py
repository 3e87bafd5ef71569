"""The sizes of a model without loading it: from its config.json, or by its well-known name."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.records import read_json


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What parameter counts and memory follow from; the units are features, layers, heads and tokens.

    The defaults are Llama's: RMS norms, three matrices in the MLP, no biases, rotary positions.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    head_size: int
    tied: bool = False  # the output projection is the embedding
    gated: bool = True  # gate, up and down projections; else up and down alone
    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    head_bias: bool = False  # of the output projection (Phi)
    norms: int = 2  # in a block
    norm_bias: bool = False  # layer norms, which have a bias; else RMS norms
    qk_norm: bool = False
    embedding_norm: bool = False  # behind the embedding (Bloom)
    final_norm: bool = True  # behind the last block
    positions: int = 0  # rows of learnt position embeddings; 0: rotary or ALiBi
    embedding: int = 0  # width of the embedding where it is not `hidden` (OPT-350m); 0: `hidden`
    mlp_kept: int = 4  # tensors as wide as the MLP that autograd keeps of one: by the activation function
    scores_kept: bool = False  # whether attention stores its (T, T) scores (Bloom's does)
    experts: int = 0  # MLPs `intermediate` wide in a block, of which a token passes `experts_used`; 0: one, no router
    experts_used: int = 1
    shared_expert: int = 0  # width of the MLP that all tokens pass besides
    dense_blocks: int = 0  # blocks among those with experts that have one MLP, `dense_width` wide, instead
    dense_width: int = 0
    counted_layer: int = 0  # a block's parameters where they were counted on the model itself
    counted_rest: int = 0  # and what it has beyond what follows from these sizes
    counted_idle: int = 0  # and how many of its parameters a token does not pass

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_size

    @property
    def layer_parameters(self) -> int:
        """Weights of one transformer block."""
        if self.counted_layer:
            return self.counted_layer
        h, i, attention, kv = self.hidden, self.intermediate, self.heads * self.head_size, self.kv_size
        matrices = 2 * h * attention + 2 * h * kv + max(1, self.experts) * self._mlp(i) + self.experts * h
        if self.shared_expert:
            matrices += self._mlp(self.shared_expert) + h
        biases = self.qkv_bias * (attention + 2 * kv) + self.output_bias * h
        biases += self.mlp_bias * ((2 if self.gated else 1) * i + h)
        return matrices + biases + self.norms * self._norm(h) + 2 * self.qk_norm * self._norm(self.head_size)

    def _mlp(self, width: int) -> int:
        return (3 if self.gated else 2) * self.hidden * width

    def _norm(self, width: int) -> int:
        return width * (2 if self.norm_bias else 1)

    @property
    def backbone_parameters(self) -> int:
        """Everything but the output projection."""
        width = self.embedding or self.hidden
        total = self.vocabulary * width + self.positions * self.hidden + self.layers * self.layer_parameters
        if width != self.hidden:
            total += 2 * width * self.hidden  # projections into and out of the blocks
        if self.dense_blocks:
            experts = self.experts * (self._mlp(self.intermediate) + self.hidden)
            experts += self._mlp(self.shared_expert) + self.hidden * bool(self.shared_expert)
            total += self.dense_blocks * (self._mlp(self.dense_width) - experts)
        total += self.counted_rest
        return total + (self.embedding_norm + self.final_norm) * self._norm(self.hidden)

    @property
    def causal_parameters(self) -> int:
        """Parameters of the language model (actor, reference)."""
        bias = self.vocabulary * self.head_bias
        return self.backbone_parameters + bias + (0 if self.tied else self.vocabulary * self.hidden)

    @property
    def idle_parameters(self) -> int:
        """Parameters of the experts that a token does not pass: they take memory, not time."""
        unused = max(0, self.experts - self.experts_used) * self._mlp(self.intermediate)
        return (self.layers - self.dense_blocks) * unused + self.counted_idle

    def classifier_parameters(self, labels: int) -> int:
        """Parameters of the token classifier: 2 labels for the discriminator, 1 for the critic."""
        return self.backbone_parameters + labels * ((self.embedding or self.hidden) + 1)


BIASED = {"gated": False, "qkv_bias": True, "output_bias": True, "mlp_bias": True, "norm_bias": True}
"""Blocks as GPT-2's, OPT's, Bloom's, GPT-NeoX's and Phi's: layer norms, two matrices in the MLP, biases everywhere."""
BLOOM = {"embedding_norm": True, "mlp_kept": 2, "scores_kept": True}


def _llama(hidden, layers, heads, kv_heads, intermediate, vocabulary, **more) -> ModelShape:
    sizes = {"head_size": hidden // heads, **more}
    return ModelShape(
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        intermediate=intermediate,
        vocabulary=vocabulary,
        **sizes,
    )


def _biased(hidden, layers, heads, vocabulary, **more) -> ModelShape:
    sizes = {"intermediate": 4 * hidden, "head_size": hidden // heads, "tied": True, **BIASED, **more}
    return ModelShape(hidden=hidden, layers=layers, heads=heads, kv_heads=heads, vocabulary=vocabulary, **sizes)


def _opt(hidden, layers, heads, embedding=0) -> ModelShape:
    sizes = {"positions": 2050, "embedding": embedding, "final_norm": not embedding, "mlp_kept": 1}
    return _biased(hidden, layers, heads, 50272, **sizes)


KNOWN_MODELS = {
    "llama-2-7b": _llama(4096, 32, 32, 32, 11008, 32000),
    "llama-2-13b": _llama(5120, 40, 40, 40, 13824, 32000),
    "llama-2-70b": _llama(8192, 80, 64, 8, 28672, 32000),
    "llama-3-8b": _llama(4096, 32, 32, 8, 14336, 128256),
    "llama-3.1-8b": _llama(4096, 32, 32, 8, 14336, 128256),
    "llama-3-70b": _llama(8192, 80, 64, 8, 28672, 128256),
    "llama-3.1-70b": _llama(8192, 80, 64, 8, 28672, 128256),
    "llama-3.2-1b": _llama(2048, 16, 32, 8, 8192, 128256, tied=True),
    "llama-3.2-3b": _llama(3072, 28, 24, 8, 8192, 128256, tied=True),
    "tinyllama-1.1b": _llama(2048, 22, 32, 4, 5632, 32000),
    "mistral-7b": _llama(4096, 32, 32, 8, 14336, 32000),
    "qwen2.5-0.5b": _llama(896, 24, 14, 2, 4864, 151936, tied=True, qkv_bias=True),
    "qwen2.5-1.5b": _llama(1536, 28, 12, 2, 8960, 151936, tied=True, qkv_bias=True),
    "qwen2.5-7b": _llama(3584, 28, 28, 4, 18944, 152064, qkv_bias=True),
    "opt-125m": _opt(768, 12, 12),
    "opt-350m": _opt(1024, 24, 16, embedding=512),
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-2.7b": _opt(2560, 32, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "opt-13b": _opt(5120, 40, 40),
    "opt-30b": _opt(7168, 48, 56),
    "opt-66b": _opt(9216, 64, 72),
    "qwen3-8b": _llama(4096, 36, 32, 8, 12288, 151936, qk_norm=True),
    "gemma-7b": _llama(3072, 28, 16, 16, 24576, 256000, head_size=256, tied=True),
    "gpt2-xl": _biased(1600, 48, 25, 50257, positions=1024, mlp_kept=5),
    "pythia-1.4b": _biased(2048, 24, 16, 50304, tied=False, mlp_kept=2),
    "bloom-560m": _biased(1024, 24, 16, 250880, **BLOOM),
    "bloom-7b1": _biased(4096, 30, 32, 250880, **BLOOM),
    "mixtral-8x7b": _llama(4096, 32, 32, 8, 14336, 32000, experts=8, experts_used=2),
    "phi-2": _biased(2560, 32, 32, 51200, tied=False, norms=1, head_bias=True, mlp_kept=5),
}
"""By a part of the hub name: "meta-llama/Llama-2-7b-chat-hf" is "llama-2-7b"."""


def shape_of(model: str, config: str = "") -> ModelShape:
    """The shape of a local model folder, of ``config`` (a config.json or its folder), or of a well-known name.

    Raises ``InputError`` for a config that only transformers could count where it is not installed, and for a hub name
    that is not known here.
    """
    for place in (config, model):
        path = Path(place) / "config.json" if place and Path(place).is_dir() else Path(place)
        if place and path.is_file():
            return _from_config(path)
        if place and place == config:
            raise InputError(f"MODEL_CONFIG {config}: no such file; it is the model's config.json")
    for name, shape in KNOWN_MODELS.items():
        if re.search(rf"(?<![a-z0-9]){re.escape(name)}(?![a-z0-9.])", model.lower()):
            return shape
    raise InputError(
        f"the sizes of the model {model!r} are not known here: give its config.json with MODEL_CONFIG=PATH "
        f"(known by name: {', '.join(KNOWN_MODELS)})"
    )


def _rotary(config: dict[str, Any], **more: Any) -> ModelShape:
    """Llama's names for the sizes, which Mistral, Qwen, Gemma, Phi and GPT-NeoX share."""
    heads = config["num_attention_heads"]
    sizes = {
        "hidden": config["hidden_size"],
        "layers": config["num_hidden_layers"],
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "intermediate": config["intermediate_size"],
        "vocabulary": config["vocab_size"],
        "head_size": config.get("head_dim") or config["hidden_size"] // heads,
        "tied": config.get("tie_word_embeddings", False),
    }
    return ModelShape(**sizes | more)


def _llama_like(config: dict[str, Any], **more: Any) -> ModelShape:
    biased = config.get("attention_bias", False)
    flags = {"qkv_bias": biased, "output_bias": biased, "mlp_bias": config.get("mlp_bias", False)}
    return _rotary(config, **flags | more)


def _plain(config: dict[str, Any], **more: Any) -> ModelShape:
    """GPT-2's, Bloom's and OPT's kind: as many keys as queries, an MLP four times as wide, the embedding used twice."""

    def first(*names: str) -> int:
        return next((config[name] for name in names if name in config), None) or config[names[0]]

    hidden = first("hidden_size", "n_embd", "n_embed")
    heads = first("num_attention_heads", "n_head")
    tied = config.get("tie_word_embeddings", True)
    intermediate = {"intermediate": config.get("n_inner") or 4 * hidden}
    layers, vocabulary = first("num_hidden_layers", "n_layer"), config["vocab_size"]
    shape = _biased(hidden, layers, heads, vocabulary, **{"tied": tied} | intermediate)
    return replace(shape, **more)


def _gemma(config: dict[str, Any], **more: Any) -> ModelShape:
    return _llama_like(config, tied=config.get("tie_word_embeddings", True), mlp_bias=False, **more)


def _mixture(config: dict[str, Any], **more: Any) -> ModelShape:
    """Qwen's kind: blocks of experts, one in ``decoder_sparse_step``, among blocks with one MLP."""
    layers, step = config["num_hidden_layers"], config.get("decoder_sparse_step", 1)
    dense = [i for i in range(layers) if i in (config.get("mlp_only_layers") or []) or (i + 1) % step]
    return _rotary(
        config,
        intermediate=config["moe_intermediate_size"],
        experts=config["num_experts"] if "num_experts" in config else config["num_local_experts"],
        experts_used=config["num_experts_per_tok"],
        dense_blocks=len(dense),
        dense_width=config["intermediate_size"],
        **more,
    )


def _falcon(config: dict[str, Any]) -> ModelShape:
    heads, biased = config["num_attention_heads"], config.get("bias", False)
    new, parallel = config.get("new_decoder_architecture", False), config.get("parallel_attn", True)
    kv_heads = 1 if config.get("multi_query", True) and not new else heads
    norms = (config.get("num_ln_in_parallel_attn") or 2) if new else 2 - parallel
    return _plain(
        config,
        intermediate=config.get("ffn_hidden_size") or 4 * config["hidden_size"],
        kv_heads=(config.get("num_kv_heads") or heads) if new else kv_heads,
        norms=norms,
        mlp_kept=2,
        **dict.fromkeys(("qkv_bias", "output_bias", "mlp_bias"), biased),
    )


FAMILIES: dict[str, Callable[[dict[str, Any]], ModelShape]] = {
    "llama": _llama_like,
    "mistral": _rotary,
    "qwen2": lambda config: _rotary(config, qkv_bias=True),
    "qwen3": lambda config: _llama_like(config, qk_norm=True, mlp_bias=False),
    "gemma": _gemma,
    "gemma2": lambda config: _gemma(config, norms=4),
    "gemma3_text": lambda config: _gemma(config, norms=4, qk_norm=True),
    "phi3": _rotary,
    "mixtral": lambda config: _rotary(
        config, experts=config["num_local_experts"], experts_used=config["num_experts_per_tok"]
    ),
    "qwen2_moe": lambda config: _mixture(
        config, qkv_bias=config.get("qkv_bias", True), shared_expert=config["shared_expert_intermediate_size"]
    ),
    "qwen3_moe": lambda config: _mixture(
        config,
        qk_norm=True,
        **dict.fromkeys(("qkv_bias", "output_bias"), config.get("attention_bias", False)),
    ),
    "falcon": _falcon,
    "phi": lambda config: _rotary(
        config, **BIASED, norms=1, head_bias=True, mlp_kept=5, qk_norm=config.get("qk_layernorm", False)
    ),
    "gpt_neox": lambda config: _rotary(
        config,
        **BIASED | {"mlp_kept": 2} | dict.fromkeys(("qkv_bias", "output_bias"), config.get("attention_bias", True)),
    ),
    "gpt2": lambda config: _plain(config, positions=config["n_positions"], mlp_kept=5),
    "bloom": lambda config: _plain(config, **BLOOM),
    "opt": lambda config: _plain(
        config,
        intermediate=config["ffn_dim"],
        positions=config["max_position_embeddings"] + 2,
        embedding=config.get("word_embed_proj_dim", 0),
        # OPT-350m has its norms behind attention and MLP, so none is left for the end.
        final_norm=config.get("do_layer_norm_before", True) and not config.get("_remove_final_layer_norm", False),
        mlp_kept=1,
    ),
}
"""By a config's ``model_type``."""


def _from_config(path: Path) -> ModelShape:
    """By formula where the family is known and the file complete (on the hub many are not), else by counting."""
    try:
        config = read_json(path)
        kind = config["model_type"]
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable config.json ({error})") from None
    except (KeyError, TypeError):
        raise InputError(f"{path}: has no 'model_type', so it is not a model's config.json") from None
    try:
        return FAMILIES[kind](config)
    except (KeyError, TypeError, ZeroDivisionError):
        return _counted(config, path)


def _counted(config: dict[str, Any], path: Path) -> ModelShape:
    """The shape of any model that transformers knows, its parameters counted on a model without memory."""
    kind = config["model_type"]
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise InputError(
            f"{path}: the sizes of this {kind!r} model are counted by transformers, and {error.name} is missing; "
            f"install the requirements (without them: {', '.join(FAMILIES)}, with all sizes in the file)"
        ) from None
    try:
        whole = AutoConfig.for_model(**config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(whole)
    except Exception as error:  # whatever a family's own code makes of such a file
        raise InputError(f"{path}: transformers makes no language model of this {kind!r} config ({error})") from None
    text = whole.get_text_config()
    heads, hidden = getattr(text, "num_attention_heads", 0), text.hidden_size  # Mamba has no heads
    names = ("intermediate_size", "ffn_dim", "n_inner")
    counts = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((count for name in counts if (count := getattr(text, name, 0))), 0)
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    blocks = max(lists, key=lambda one: (len(one) == text.num_hidden_layers, len(one)))  # not the blocks for images
    in_experts = sum(weight.numel() for name, weight in blocks.named_parameters() if ".experts." in name)
    used = getattr(text, "num_experts_per_tok", experts)
    output = model.get_output_embeddings()
    shape = ModelShape(
        hidden=hidden,
        layers=len(blocks),
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        intermediate=next((size for name in names if (size := getattr(text, name, None))), 4 * hidden),
        vocabulary=text.vocab_size,
        head_size=getattr(text, "head_dim", None) or hidden // max(1, heads),
        tied=output is None or output.weight is model.get_input_embeddings().weight,
        counted_layer=sum(weight.numel() for weight in blocks.parameters()) // len(blocks),
        counted_idle=in_experts * (experts - used) // experts if experts else 0,
    )
    return replace(shape, counted_rest=model.num_parameters() - shape.causal_parameters)
