"""``--push_to_hub``: upload saved models to the Hugging Face Hub, and check before training that it accepts them."""

import os
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HFValidationError

from deepspeed_chat_tlcr.errors import InputError, RunError, first_line
from deepspeed_chat_tlcr.model_card import LICENCE_FILES
from deepspeed_chat_tlcr.runtime import Runtime

TOKEN = "HF_TOKEN"
_UPLOADED = ["*.safetensors", "pytorch_model.bin", "*.index.json", "config.json", "generation_config.json"]
_UPLOADED += ["tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "*.jinja"]
_UPLOADED += ["README.md", "results.json", *LICENCE_FILES]


def require_repository(options: Any) -> None:
    """Create the repository of ``--push_to_hub``, private if it is new, so that a wrong token or name shows now.

    Only rank 0 asks. Raises ``InputError`` if the Hub refuses.
    """
    name = options.push_to_hub
    if not name or os.environ.get("RANK", "0") != "0":
        return
    if constants.is_offline_mode():
        raise InputError(f"--push_to_hub {name}: HF_HUB_OFFLINE is set; unset it, or leave --push_to_hub out")
    if not os.environ.get(TOKEN):
        raise InputError(f"--push_to_hub {name}: set {TOKEN} to a token that may write there")
    try:
        _api().create_repo(name, private=True, exist_ok=True)
        _api().auth_check(name, write=True)
    except HFValidationError:
        raise InputError(f"--push_to_hub {name}: no name of a repository; expected OWNER/NAME") from None
    except Exception as error:  # refused, or no connection, of which every HTTP client has errors of its own
        raise InputError(f"--push_to_hub {name}: {constants.ENDPOINT} refuses it: {_reason(error)}") from None


def upload(options: Any, runtime: Runtime) -> None:
    """Upload the models of a stage, if it has finished.

    Called after the ranks have left their group, so that none waits for an upload. Step 3's actor becomes the
    repository's model; its critic and actor_ema become folders there. Raises ``RunError`` on failure.
    """
    folder, name = Path(options.output_dir), options.push_to_hub
    if not (name and runtime.is_main and (folder / "results.json").is_file()):
        return
    roles = [role for role in ("actor", "critic", "actor_ema") if (folder / role / "config.json").is_file()]
    places = {folder / role: None if role == "actor" else role for role in roles}
    print(f"uploading to {constants.ENDPOINT}/{name}", flush=True)
    try:
        for source, place in (places or {folder: None}).items():
            _api().upload_folder(
                repo_id=name,
                folder_path=source,
                path_in_repo=place,
                allow_patterns=_UPLOADED,
                ignore_patterns=["*/*"],
                commit_message=f"Upload {source.name}",
            )
    except Exception as error:
        raise RunError(
            f"the models are saved in {folder}, but --push_to_hub {name} failed: {_reason(error)}; the same command "
            "uploads them without training again"
        ) from None
    print(f"uploaded to {constants.ENDPOINT}/{name}", flush=True)


def _api() -> HfApi:
    return HfApi(token=os.environ[TOKEN])


def _reason(error: Exception) -> str:
    """An error of the Hub or of the connection in one line. Neither contains the token."""
    return getattr(error, "server_message", None) or first_line(error)
