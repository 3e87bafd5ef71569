"""docs/flags.md from the options' declarations: every flag of every program, and what became of the peers' flags.

``python -m docs.flags`` prints it; a test compares the file with it, so neither can go stale.
"""

import importlib
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field

from deepspeed_chat_tlcr.arguments import OptionGroup, default_of, groups_of

# The flags of the peers' programs, by name. "-x" takes a flag away from what stands before it.
_LAUNCHER = "deepspeed deepspeed_config deepscale deepscale_config local_rank"
_STEP_1 = (
    "data_path data_split sft_only_data_path data_output_path model_name_or_path per_device_train_batch_size "
    "per_device_eval_batch_size max_seq_len learning_rate weight_decay num_train_epochs gradient_accumulation_steps "
    "lr_scheduler_type num_warmup_steps output_dir seed gradient_checkpointing dropout offload dtype zero_stage "
    "lora_dim lora_module_name only_optimize_lora lora_learning_rate compute_fp32_loss enable_tensorboard "
    f"tensorboard_path add_eot_token eot_token print_loss {_LAUNCHER}"
)
_FORK = "-dropout -dtype -compute_fp32_loss -add_eot_token -eot_token data_seed disable_dropout bf16"
_STEP_2 = f"{_STEP_1} -sft_only_data_path -eot_token -print_loss num_padding_at_beginning eval_interval eval_iters"
_DPO = f"{_STEP_1} -sft_only_data_path -eot_token beta label_smoothing offload_reference_model"
_FORK_STEP_2 = f"{_STEP_1} {_FORK} -sft_only_data_path num_padding_at_beginning"
_TLCR_STEP_2 = (
    f"{_FORK_STEP_2} token_level_reward reward_aggregate_top_k bidirectional_reward bidirectional_layer_num "
    "custom_template discriminate_reward holistic_reward do_eval uni_discriminator_head modification_train_data_path "
    "modification_eval_data_path"
)
_STEP_3 = (
    "data_path data_split data_output_path unsupervised_dataset_name unsupervised_dataset_config_name unsup_coef "
    "actor_model_name_or_path critic_model_name_or_path num_padding_at_beginning per_device_generation_batch_size "
    "per_device_training_batch_size generation_batches ppo_epochs max_prompt_seq_len max_answer_seq_len "
    "actor_learning_rate critic_learning_rate actor_weight_decay critic_weight_decay num_train_epochs "
    "lr_scheduler_type gradient_accumulation_steps num_warmup_steps output_dir seed preprocessing_num_workers "
    "enable_hybrid_engine unpin_actor_parameters release_inference_cache inference_tp_size tp_gather_partition_size "
    "offload dtype offload_reference_model offload_reward_model actor_zero_stage critic_zero_stage "
    "actor_gradient_checkpointing critic_gradient_checkpointing actor_dropout critic_dropout actor_lora_dim "
    "actor_lora_module_name critic_lora_dim critic_lora_module_name only_optimize_lora actor_lora_learning_rate "
    "critic_lora_learning_rate enable_ema enable_mixed_precision_lora compute_fp32_loss enable_tensorboard "
    "tensorboard_path add_eot_token align_overflow print_answers print_answers_interval enable_test_mode "
    f"test_stop_step {_LAUNCHER}"
)
_FORK_STEP_3 = (
    f"{_STEP_3} -dtype -actor_dropout -critic_dropout -compute_fp32_loss -add_eot_token -print_answers_interval "
    "algo data_seed per_device_eval_batch_size actor_bf16 reference_zero_stage reward_zero_stage "
    "disable_actor_dropout penalty kl_ctl gamma save_answers"
)
_TLCR_STEP_3 = (
    f"{_FORK_STEP_3} offload_param offload_critic_model critic_bf16 disable_critic_dropout lam save_model "
    "custom_template discriminate_reward use_negative_reward_only use_positive_reward_only holistic_reward "
    "uni_discriminator_head random_dense_reward fixed_reward fixed_positive_reward fixed_negative_reward "
    "sum_to_one_reward"
)
_REMAX_STEP_3 = (
    f"{_FORK_STEP_3} -critic_model_name_or_path -critic_learning_rate -critic_weight_decay -critic_zero_stage "
    "-critic_gradient_checkpointing -critic_lora_dim -critic_lora_module_name -critic_lora_learning_rate "
    "-align_overflow reward_model_name_or_path memory_efficient_linear reward_bf16 disable_reward_dropout target_kl "
    "save_at_final normalize_kl entropy_coef clip_reward_value"
)


def _names(text: str) -> frozenset[str]:
    names: dict[str, None] = {}
    for word in text.split():
        if word.startswith("-"):
            names.pop(word[1:], None)
        else:
            names[word] = None
    return frozenset(names)


@dataclass(frozen=True)
class Program:
    """An entry point here, and the flags of the peers' programs whose place it takes."""

    module: str
    path: str
    peers: dict[str, frozenset[str]] = field(default_factory=dict)

    @property
    def options(self) -> type:
        return importlib.import_module(self.module).Options


_CHAT, _TLCR, _REMAX = "DeepSpeed-Chat", "RLHF-TLCR", "ReMax"
_FORK_STEP_1 = _names(f"{_STEP_1} {_FORK}")

PROGRAMS = (
    Program(
        "step1_sft.main",
        "step1_sft/main.py",
        {_CHAT: _names(_STEP_1), _REMAX: _FORK_STEP_1, _TLCR: _FORK_STEP_1 | {"num_inner_step"}},
    ),
    Program(
        "step2_discriminator.main",
        "step2_discriminator/main.py",
        {_CHAT: _names(_STEP_2), _REMAX: _names(_FORK_STEP_2), _TLCR: _names(_TLCR_STEP_2)},
    ),
    Program("step2_grm.main", "step2_grm/main.py"),
    Program("baselines.dpo.main", "baselines/dpo/main.py", {_CHAT: _names(_DPO)}),
    Program("baselines.figa.main", "baselines/figa/main.py"),
    Program(
        "step3_ppo_tlcr.main",
        "step3_ppo_tlcr/main.py",
        {_CHAT: _names(_STEP_3), _REMAX: _names(_REMAX_STEP_3), _TLCR: _names(_TLCR_STEP_3)},
    ),
)


def _shown(value: object) -> str:
    if value is MISSING:
        return "required"
    if value is None or value is False or value == "" or value == []:
        return "off" if value is False else "unset"
    shown = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"`{shown}`".replace("|", "\\|")


def _state(entry, origin: str) -> str:
    if entry.metadata["no_effect"]:
        return f"**no effect**: {entry.metadata['no_effect']}"
    if entry.metadata["better"]:
        return f"better: {entry.metadata['better']}"
    return "same" if origin else "new"


def _rows(program: Program, group: OptionGroup) -> Iterator[str]:
    for entry in group.entries:
        names = [entry.name, *(flag.lstrip("-") for flag in entry.metadata["flags"])]
        origin = next((peer for peer, flags in program.peers.items() if flags & set(names)), "")
        cells = (
            ", ".join(f"`--{name}`" for name in names),
            _shown(default_of(program.options, entry)),
            entry.metadata["help"].replace("|", "\\|"),
            origin,
            _state(entry, origin),
        )
        yield f"| {' | '.join(cells)} |"


def table(program: Program) -> str:
    """A Markdown section: each group's flags with default, meaning, where the name comes from, and what it is here."""
    lines = [f"## {program.path}", ""]
    for group in groups_of(program.options):
        lines += [f"### {group.title}", "", "| flag | default | meaning | name from | here |", "|---|---|---|---|---|"]
        lines += [*_rows(program, group), ""]
    return "\n".join(lines)


INTRODUCTION = """\
# Flags

Written by `python -m docs.flags > docs/flags.md` from the declarations that the programs parse with.

"name from" is the first of DeepSpeed-Chat, ReMax and RLHF-TLCR that has a flag of this name; its meaning there is kept:
**same**, **better** (how), or **no effect** (why: giving it prints one warning). "new" flags are this project's.
"""


def document() -> str:
    return "\n".join([INTRODUCTION, *map(table, PROGRAMS)]).rstrip() + "\n"


if __name__ == "__main__":
    print(document(), end="")
