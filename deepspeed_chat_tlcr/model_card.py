"""The model card of a saved model: README.md with the metadata that the Hugging Face Hub reads, and the licence."""

import re
import shutil
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, hf_hub_download

from deepspeed_chat_tlcr.arguments import default_of

LICENCE_FILES = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*")
_TAG = "deepspeed-chat-tlcr"
_UNKNOWN = "unknown: that of the base model"
_NOT_SHOWN = {"output_dir", "local_rank", "resume", "report_to", "push_to_hub", "deepspeed", "max_faults"}
_NOT_SHOWN |= {"tensorboard_path", "enable_tensorboard", "data_output_path", "save_total_limit", "print_loss"}
_NOT_SHOWN |= {"span_base_url", "span_api_key_env"}  # an address may hold a password
_KINDS = {
    "sft": "Language model after supervised fine-tuning",
    "step2_token": "Token discriminator: POSITIVE has D, the probability that a token is good; its reward is 2D - 1",
    "step2_token_pairs": "Token reward model: squash(value) of every token is its reward, learnt from whole pairs",
    "step2_sequence": "Sequence reward model: the head's value at the last token scores a whole response",
    "step2_grm": "Generative reward model of RLMEC: a language model that rewrites answers with few edits",
    "dpo": "Language model after direct preference optimisation (DPO)",
    "figa": "Language model after fine-grained quality signals (FIGA)",
    "ppo": "Language model after PPO with token-level rewards",
    "remax": "Language model after ReMax",
    "critic": "Critic of PPO: the head's value at a token is the return expected from there on",
}
_FOLDERS = re.compile(r"(?:^|(?<=:))(?:~|\.{1,2})?/(?:[^/:]+/)*")
_CLASSIFIERS = ("step2_token", "step2_token_pairs", "step2_sequence", "critic")
_CITATION = """\
@inproceedings{yoon-etal-2024-tlcr,
  title = {{TLCR}: Token-Level Continuous Reward for Fine-grained Reinforcement Learning from Human Feedback},
  author = {Yoon, Eunseop and Yoon, Hee Suk and Eom, SooHwan and Han, Gunsoo and Nam, Daniel Wontae and Jo, Daejin and
            On, Kyoung-Woon and Hasegawa-Johnson, Mark and Kim, Sungwoong and Yoo, Chang D.},
  booktitle = {Findings of the Association for Computational Linguistics: ACL 2024},
  year = {2024}
}"""


@dataclass(frozen=True)
class Card:
    """The facts for a model's card. ``kind``: a stage's name in results.json, or critic."""

    kind: str
    base: str  # folder or hub name of the model that training started from
    options: Any
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """The options that differ from their defaults. Only the last part of a path is shown."""
        given = {}
        for entry in fields(self.options):
            value = getattr(self.options, entry.name)
            default = default_of(type(self.options), entry)
            if entry.name not in _NOT_SHOWN and (default is MISSING or value != default):
                given[entry.name] = [_public(one) for one in value] if isinstance(value, list) else _public(value)
        return given

    @property
    def data(self) -> list[str]:
        """Names of the data sets, or of the files with revisions or spans, that it learnt from."""
        labels = (getattr(self.options, name, None) for name in ("revisions", "spans", "data_path"))
        names: list[str] = next(filter(None, labels), [])
        return [str(_public(name)) for name in names]


def write_card(folder: Path, card: Card) -> None:
    """Write README.md into a saved model's folder, and copy the licence files of a base model in a local folder.

    Licence and base model come from the base model's own card: for a hub name the cached one, or the Hub's if it can
    be reached. An unknown licence is named as unknown.
    """
    parent = _card_of(card.base)
    local = Path(card.base).is_dir()
    saved_here = _TAG in (parent.tags or [])  # then name its own base model, as for a policy SFT's
    base = parent.base_model if saved_here and parent.base_model else _public(card.base)
    licence = parent.license or "other"
    data = ModelCardData(
        base_model=base,
        library_name="transformers",
        license=licence,
        license_name=parent.license_name or ("unknown" if licence == "other" else None),
        license_link=parent.license_link,
        pipeline_tag="token-classification" if card.kind in _CLASSIFIERS else "text-generation",
        tags=[_TAG, card.kind],
    )
    shown = parent.license_name or (_UNKNOWN if licence == "other" else licence)
    (folder / "README.md").write_text(f"---\n{data.to_yaml()}\n---\n\n{_text(folder, card, base, shown)}", "utf-8")
    if local and Path(card.base).resolve() != folder.resolve():
        for pattern in LICENCE_FILES:
            for file in Path(card.base).glob(pattern):
                if file.is_file():
                    shutil.copy(file, folder / file.name)


def _text(folder: Path, card: Card, base: str | list[str], licence: str) -> str:
    given = {k: " ".join(map(str, v)) if isinstance(v, list) else str(v) for k, v in card.settings.items()}
    cells = {name: shown.replace("|", "\\|").replace("\n", " ") for name, shown in given.items()}
    settings = "\n".join(f"| `--{name}` | {cell} |" for name, cell in cells.items())
    numbers = {k: v for k, v in card.results.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    measured = "\n".join(f"| {name} | {value:.5g} |" for name, value in numbers.items())
    facts = f"- Base model: {base}\n- Data: {', '.join(card.data) or 'not named'}\n- Licence: {licence}\n"
    facts += f"- Trained with {_TAG}, which implements the paper below for DeepSpeed-Chat"
    table = f"Options that were not left at their defaults:\n\n| option | value |\n|---|---|\n{settings}"
    parts = [f"# {folder.resolve().name}", f"{_KINDS[card.kind]}.", facts, f"## Settings\n\n{table}"]
    if measured:
        parts.append(f"## Measured at the end of training\n\n| number | value |\n|---|---|\n{measured}")
    parts.append(f"## Citation\n\n```bibtex\n{_CITATION}\n```")
    return "\n\n".join(parts) + "\n"


def _public(value: Any) -> Any:
    """A local path without its parent folders, also in a term of ``--reward``."""
    if not isinstance(value, str):
        return value
    return Path(value).name if Path(value).exists() else _FOLDERS.sub("", value.rstrip("/"))


def _card_of(base: str) -> ModelCardData:
    """The metadata of a model's own card; empty if there is none."""
    try:
        folder = Path(base)
        file = folder / "README.md" if folder.is_dir() else Path(hf_hub_download(base, "README.md"))
        return ModelCard.load(file, ignore_metadata_errors=True).data
    except Exception:  # no card, an odd one, no network: a model is saved without them too
        return ModelCardData()
