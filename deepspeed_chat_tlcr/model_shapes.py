"""The sizes of a model without loading it: from its config.json, or by its well-known name."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from deepspeed_chat_tlcr.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What parameter counts and memory follow from; the units are features, layers, heads and tokens."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    head_size: int
    tied: bool = False  # the output projection is the embedding
    gated: bool = True  # gate, up and down projections (Llama); else up and down with biases (OPT)
    qkv_bias: bool = False
    qk_norm: bool = False
    positions: int = 0  # rows of learnt position embeddings; 0: rotary
    embedding: int = 0  # width of the embedding where it is not `hidden` (OPT-350m); 0: `hidden`

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_size

    @property
    def layer_parameters(self) -> int:
        """Weights of one transformer block."""
        h, attention, kv = self.hidden, self.heads * self.head_size, self.kv_size
        if self.gated:
            biases = (attention + 2 * kv) * self.qkv_bias
            norms = 2 * h + 2 * self.head_size * self.qk_norm
            return 2 * h * attention + 2 * h * kv + biases + 3 * h * self.intermediate + norms
        projections = 4 * (h * h + h)
        return projections + 2 * h * self.intermediate + self.intermediate + h + 2 * 2 * h

    @property
    def backbone_parameters(self) -> int:
        """Everything but the output projection."""
        width = self.embedding or self.hidden
        embeddings = self.vocabulary * width + self.positions * self.hidden
        if width != self.hidden:
            # OPT-350m: projections into and out of the blocks, and no norm behind the last one.
            return embeddings + self.layers * self.layer_parameters + 2 * width * self.hidden
        return embeddings + self.layers * self.layer_parameters + self.hidden * (1 if self.gated else 2)

    @property
    def causal_parameters(self) -> int:
        """Parameters of the language model (actor, reference)."""
        head = 0 if self.tied else self.vocabulary * self.hidden
        return self.backbone_parameters + head

    def classifier_parameters(self, labels: int) -> int:
        """Parameters of the token classifier: 2 labels for the discriminator, 1 for the critic."""
        return self.backbone_parameters + labels * ((self.embedding or self.hidden) + 1)


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


def _opt(hidden, layers, heads, embedding=0) -> ModelShape:
    return ModelShape(
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        intermediate=4 * hidden,
        vocabulary=50272,
        head_size=hidden // heads,
        tied=True,
        gated=False,
        positions=2050,
        embedding=embedding,
    )


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
}
"""By a part of the hub name: "meta-llama/Llama-2-7b-chat-hf" is "llama-2-7b"."""

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
"""The model types whose blocks this file counts as Llama's."""


def shape_of(model: str, config: str = "") -> ModelShape:
    """The shape of a local model folder, of ``config`` (a config.json or its folder), or of a well-known name.

    Raises ``InputError`` for a config of another family, and for a hub name that is not known here.
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


def _from_config(path: Path) -> ModelShape:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = config["model_type"]
        if kind == "opt":
            return ModelShape(
                hidden=config["hidden_size"],
                layers=config["num_hidden_layers"],
                heads=config["num_attention_heads"],
                kv_heads=config["num_attention_heads"],
                intermediate=config["ffn_dim"],
                vocabulary=config["vocab_size"],
                head_size=config["hidden_size"] // config["num_attention_heads"],
                tied=config.get("tie_word_embeddings", True),
                gated=False,
                positions=config["max_position_embeddings"] + 2,
                embedding=config.get("word_embed_proj_dim", 0),
            )
        if kind in LLAMA_LIKE:
            heads = config["num_attention_heads"]
            return ModelShape(
                hidden=config["hidden_size"],
                layers=config["num_hidden_layers"],
                heads=heads,
                kv_heads=config.get("num_key_value_heads") or heads,
                intermediate=config["intermediate_size"],
                vocabulary=config["vocab_size"],
                head_size=config.get("head_dim") or config["hidden_size"] // heads,
                tied=config.get("tie_word_embeddings", False),
                qkv_bias=config.get("attention_bias", kind == "qwen2"),
                qk_norm=kind == "qwen3",
            )
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable config.json ({error})") from None
    except KeyError as error:
        raise InputError(f"{path}: has no {error}, so it is not a model's config.json") from None
    raise InputError(f"{path}: memory is estimated for {', '.join(LLAMA_LIKE)} and opt models, not for {kind!r}")
