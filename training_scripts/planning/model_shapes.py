"""The sizes of a model without its weights: counted on its config.json, or known by its name."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.records import read_json


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What memory, time and disk follow from, in features, layers, heads, tokens and parameters."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int  # width of the MLP, or of one expert
    vocabulary: int
    embedding: int  # width of the embedding and of what a head reads: `hidden`, but for OPT-350m
    # ---- counted parameters
    layer_parameters: int  # of the largest block
    backbone_parameters: int  # everything but the output projection
    causal_parameters: int  # the language model (actor, reference)
    idle_parameters: int = 0  # of the experts that a token does not pass: they take memory, not time
    # ---- what autograd keeps of a block (memory.layer_activations)
    gated: bool = True  # gate, up and down projections in the MLP; else up and down alone
    norms: int = 2
    qk_norm: bool = False
    mlp_kept: int = 4  # tensors as wide as the MLP that autograd keeps of one: by the activation function
    scores_kept: bool = False  # whether attention stores its (T, T) scores, as eager attention does (Bloom)
    experts_used: int = 1  # MLPs `intermediate` wide that a token passes
    shared_expert: int = 0  # width of the MLP that all tokens pass besides

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_size

    def classifier_parameters(self, labels: int) -> int:
        """Parameters of the token classifier: 2 labels for the discriminator, 1 for the critic."""
        return self.backbone_parameters + labels * (self.embedding + 1)


KNOWN_MODELS = {
    name: ModelShape(**sizes) for name, sizes in read_json(Path(__file__).with_name("known_models.json")).items()
}
"""By a part of the hub name: "meta-llama/Llama-2-7b-chat-hf" is "llama-2-7b". Fields as ``counted`` gives them."""


def shape_of(model: str, config: str = "") -> ModelShape:
    """The shape of a local model folder, of ``config`` (a config.json or its folder), or of a well-known name.

    Raises ``InputError`` for a config where transformers, which counts it, is not installed or knows no such model, and
    for a hub name that is not known here.
    """
    for place in (config, model):
        path = Path(place) / "config.json" if place and Path(place).is_dir() else Path(place)
        if place and path.is_file():
            return counted(path)
        if place and place == config:
            raise InputError(f"MODEL_CONFIG {config}: no such file; it is the model's config.json")
    for name, shape in KNOWN_MODELS.items():
        if re.search(rf"(?<![a-z0-9]){re.escape(name)}(?![a-z0-9.])", model.lower()):
            return shape
    raise InputError(
        f"the sizes of the model {model!r} are not known here: give its config.json with MODEL_CONFIG=PATH "
        f"(known by name: {', '.join(KNOWN_MODELS)})"
    )


def counted(path: Path) -> ModelShape:
    """The shape of any model that transformers knows, by its config.json, counted on a model without memory."""
    try:
        config = read_json(path)
        kind = config["model_type"]
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable config.json ({error})") from None
    except (KeyError, TypeError):
        raise InputError(f"{path}: has no 'model_type', so it is not a model's config.json") from None
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise InputError(
            f"{path}: the sizes of this {kind!r} model are counted by transformers, and {error.name} is missing; "
            f"install the requirements (without them: {', '.join(KNOWN_MODELS)}, by name)"
        ) from None
    try:
        whole = AutoConfig.for_model(**config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(whole)
    except Exception as error:  # whatever a family's own code makes of such a file
        raise InputError(f"{path}: transformers makes no language model of this {kind!r} config ({error})") from None
    text = whole.get_text_config()
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    blocks = max(lists, key=lambda one: (len(one) == text.num_hidden_layers, len(one)))  # not the blocks for images
    embedding, output = model.get_input_embeddings().weight, model.get_output_embeddings()
    heads = getattr(text, "num_attention_heads", 0)  # Mamba has none
    shared_keys = getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False)
    experts = _first(text, "num_experts", "num_local_experts", "n_routed_experts") or 0
    used = getattr(text, "num_experts_per_tok", experts)
    in_experts = sum(weight.numel() for name, weight in blocks.named_parameters() if ".experts." in name)
    total = model.num_parameters()
    untied = [w for w in output.parameters() if w is not embedding] if output is not None else []
    norms = [name for name, part in blocks[0].named_modules() if "norm" in type(part).__name__.lower()]
    gated = any("gate_" in name for name, _ in blocks[0].named_parameters())
    activation = _first(text, "hidden_act", "hidden_activation", "activation_function", "activation")
    return ModelShape(
        hidden=text.hidden_size,
        layers=len(blocks),
        heads=heads,
        kv_heads=1 if shared_keys else _first(text, "num_key_value_heads", "num_kv_heads") or heads,
        head_size=getattr(text, "head_dim", None) or text.hidden_size // max(1, heads),
        intermediate=_first(text, "moe_intermediate_size", "intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")
        or 4 * text.hidden_size,
        vocabulary=text.vocab_size,
        embedding=embedding.shape[1],
        layer_parameters=max(sum(weight.numel() for weight in block.parameters()) for block in blocks),
        backbone_parameters=total - sum(weight.numel() for weight in untied),
        causal_parameters=total,
        idle_parameters=in_experts * (experts - used) // experts if experts else 0,
        gated=gated,
        norms=sum("." not in name for name in norms),
        qk_norm=any("." in name for name in norms),
        mlp_kept=4 if gated else {"relu": 1, "gelu_new": 5}.get(activation, 2),
        scores_kept=not model._supports_sdpa,
        experts_used=used if experts else 1,
        shared_expert=getattr(text, "shared_expert_intermediate_size", 0),
    )


def _first(config: Any, *names: str) -> Any:
    """The first of a config's attributes that is there and set; families name the same size differently."""
    return next((value for name in names if (value := getattr(config, name, None))), None)
