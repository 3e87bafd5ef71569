"""The true score, by a function that is named as ``python:package.module:function``."""

import importlib
import inspect
import math

from deepspeed_chat_tlcr.errors import InputError, describe_error
from testbed.measures import Scorer

TESTBED = "python:testbed.world:true_score"


def load_scorer(name: str) -> Scorer:
    """Raises ``InputError`` for a name of another form, that cannot be imported, or that takes other arguments."""
    kind, _, path = name.partition(":")
    module, _, function = path.partition(":")
    if kind != "python" or not module or not function:
        raise InputError(f"--scorer {name}: expected python:package.module:function")
    try:
        scorer = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever a stranger's module raises
        raise InputError(f"--scorer {name}: {describe_error(error)}") from None
    try:
        inspect.signature(scorer).bind("prompt", "response", True)
    except (TypeError, ValueError) as error:
        raise InputError(f"--scorer {name}: {error}; expected a function of prompt, response, ended") from None
    return scorer


def checked(scorer: Scorer, name: str) -> Scorer:
    """``scorer``, but with ``InputError`` that names prompt and response where it fails or gives no finite number."""

    def scored(prompt: str, response: str, ended: bool) -> float:
        where = f"--scorer {name}, prompt {shortened(prompt)}, response {shortened(response)}, ended {ended}"
        try:
            score = float(scorer(prompt, response, ended))
        except Exception as error:
            raise InputError(f"{where}: {describe_error(error)}") from error
        if not math.isfinite(score):
            raise InputError(f"{where}: {score}; expected a finite number")
        return score

    return scored


def shortened(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:60] + "…")
