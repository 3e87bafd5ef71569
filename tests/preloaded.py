"""What warm.py's process imports before its first fork: all that takes seconds, and nothing that starts a thread."""

import gc

import datasets  # noqa: F401
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  any ZeRO stage imports it, and it half of TorchInductor
import openai  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
import transformers.models.llama.modeling_llama
import transformers.trainer  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import step3_ppo_tlcr.main  # noqa: F401

get_checkpoint_conversion_mapping("llama")  # it makes a table of all families at the first call
gc.freeze()  # so that no fork's collector looks at all this again, and copies it by that
