# shellcheck shell=bash
# The recipe: every variable of these scripts with its default, then what the scripts share.
#
# Sourced by all of them, never run. A variable set in the environment, or by a script before it sources this file,
# wins over the default, so nothing is written twice: run_tiny.sh is this recipe with other variables. The defaults
# are the paper's (section 5 and appendix B) for Llama-2-7B on 8 x A100 80GB; "1" switches a thing on, "0" off.

set -euo pipefail

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Called from elsewhere, relative paths such as OUTPUT stay relative to the caller; only the programs are ours.
[[ $PWD == "$project" ]] && at= || at=$project/

set -a # all that follows is exported: the stages' scripts, the preflight and the plan read it from the environment

# ---- what is trained, on what ----
: "${MODEL:=meta-llama/Llama-2-7b-hf}"      # base model: a local folder or a Hugging Face name
: "${MODEL_CONFIG:=}"                       # its config.json, for PLAN=1 with a hub model that the plan does not know
: "${DATA:=Dahoas/full-hh-rlhf}"            # data sets: names, .jsonl/.parquet files or folders; blanks between them
: "${MADE_HERE:=}"                          # 1: the run itself makes MODEL, DATA and what labels (run_tiny.sh)
: "${DATA_SPLIT:=2,4,4}"                    # shares of the data for SFT, the discriminator and PPO
: "${DATA_SEED:=1234}"                      # seed of that split, the same in every stage
: "${OUTPUT:=output/llama2-7b}"             # folder of the run; a stage writes to the sub-folder with its name
: "${SEED:=1234}"                           # seed of initialisation, shuffling and sampling
: "${DTYPE:=bf16}"                          # bf16, fp16, fp32 or auto

: "${ATTENTION:=sdpa}"                       # what computes attention: sdpa, flash_attention_2, flash_attention_3, …

: "${STAGES:=step1 label step2 step3}"       # the run's stages, by their scripts' names (run_method.sh sets it)

# ---- the machine ----
: "${NUM_GPUS=8}"                           # processes on each node, one per GPU (on CPU: ranks); empty: all it has
: "${HOSTFILE:=}"                           # several nodes: DeepSpeed's hostfile, lines of "name slots=8"
: "${MASTER_PORT:=29500}"                   # a free TCP port on the first node
: "${GPU_MEMORY_GB:=80}"                    # memory of one GPU, for the plan (the preflight measures it)
: "${GPU_CARD:=A100}"                       # for the plan's hours: A100, H100 or H200
: "${GPU_HOUR_USD:=}"                       # what one GPU costs an hour, for the plan; empty: no price
: "${PREFLIGHT:=1}"                         # 0: nothing is looked at before the start
: "${PLAN:=0}"                              # 1: run nothing; print the commands, the cost, the memory, the disk

# ---- label.sh: an external model revises the rejected responses (4.1) ----
: "${LABEL_BASE_URL:=}"                     # another OpenAI-compatible endpoint, such as a vLLM server; empty: OpenAI's
[[ -n $LABEL_BASE_URL ]] || : "${LABEL_MODEL:=gpt-6-luna}"
: "${LABEL_MODEL:=}"                        # the model that revises; empty: the only one that LABEL_BASE_URL serves
: "${LABEL_EFFORT:=lowest}"                 # its hidden reasoning: none, low, … or lowest, the least that it has
: "${LABEL_BATCH:=0}"                       # 1: OpenAI's Batch API, half the price, up to a day
: "${LABEL_MAX_USD=100}"                    # labelling stops before it could cost more; empty: it asks
: "${LABEL_PRICE:=}"                        # "IN,OUT" in US$ per million tokens, of a model that prices.json lacks
: "${LABEL_MAX_FAILURE_SHARE:=0.2}"         # with more pairs failed than that, nothing is trained on the others
: "${LABEL_TOKENIZER:=}"                    # for data of chat messages: the model whose template makes their prompts
: "${API_KEY_ENV:=OPENAI_API_KEY}"          # name of the variable that holds the key

# ---- step1.sh: supervised fine-tuning ----
: "${SFT_BATCH_SIZE:=16}"                   # sequences per GPU and micro-batch
: "${SFT_ACCUMULATION_STEPS:=1}"            # micro-batches per optimiser step
: "${SFT_EPOCHS:=2}"
: "${SFT_LEARNING_RATE:=1e-5}"
: "${SFT_WEIGHT_DECAY:=0}"
: "${SFT_ZERO_STAGE:=2}"
: "${SFT_OFFLOAD:=0}"                       # optimiser (ZeRO-3: parameters too) in host memory
: "${SFT_GRADIENT_CHECKPOINTING:=1}"
: "${SFT_TOKENS_PER_MICRO_BATCH:=0}"        # packs of so many tokens, unpadded; 0: padded, 2 % of the tokens at most
: "${MAX_SEQ_LEN:=512}"                     # steps 1 and 2: tokens of prompt and response together

# ---- step2.sh: the token-level discriminator (4.2) ----
: "${DISCRIMINATOR_BATCH_SIZE:=16}"         # revisions per GPU and micro-batch
: "${DISCRIMINATOR_ACCUMULATION_STEPS:=1}"
: "${DISCRIMINATOR_EPOCHS:=2}"
: "${DISCRIMINATOR_LEARNING_RATE:=1e-5}"
: "${DISCRIMINATOR_WEIGHT_DECAY:=0.1}"
: "${DISCRIMINATOR_ZERO_STAGE:=2}"
: "${DISCRIMINATOR_OFFLOAD:=0}"
: "${DISCRIMINATOR_GRADIENT_CHECKPOINTING:=1}"
: "${DISCRIMINATOR_TOKENS_PER_MICRO_BATCH:=1024}" # packs of so many tokens, a pair's prompt in them once; 0: padded

# ---- step2_sequence.sh: the sequence reward model of PPO_seq, PPO_synthetic and ReMax ----
: "${SEQUENCE_OBJECTIVE:=sequence}"         # sequence; token_pairs: a reward for each token, from the same pairs
: "${SEQUENCE_PAIRS:=preferences}"          # preferences: chosen over rejected; modified: modified over rejected
: "${SEQUENCE_FOLDER:=step2_sequence}"      # sub-folder of OUTPUT
: "${SEQUENCE_BATCH_SIZE:=16}"              # pairs per GPU and micro-batch
: "${SEQUENCE_ACCUMULATION_STEPS:=1}"
: "${SEQUENCE_EPOCHS:=2}"
: "${SEQUENCE_LEARNING_RATE:=1e-5}"
: "${SEQUENCE_WEIGHT_DECAY:=0.1}"
: "${SEQUENCE_ZERO_STAGE:=2}"
: "${SEQUENCE_OFFLOAD:=0}"
: "${SEQUENCE_GRADIENT_CHECKPOINTING:=1}"
: "${SEQUENCE_TOKENS_PER_MICRO_BATCH:=1024}" # as DISCRIMINATOR_TOKENS_PER_MICRO_BATCH

# ---- step2_grm.sh: RLMEC's model that rewrites answers (its release's epochs and learning rate) ----
: "${GRM_BATCH_SIZE:=8}"                    # rewritten answers per GPU and micro-batch
: "${GRM_ACCUMULATION_STEPS:=2}"
: "${GRM_EPOCHS:=3}"
: "${GRM_LEARNING_RATE:=2e-5}"
: "${GRM_ZERO_STAGE:=2}"
: "${GRM_OFFLOAD:=0}"
: "${GRM_GRADIENT_CHECKPOINTING:=1}"
: "${GRM_MAX_SEQ_LEN:=1024}"                # tokens of conversation, two answers and the rewritten one

# ---- dpo.sh (docs/methods.md says where these come from) ----
: "${DPO_BATCH_SIZE:=8}"                    # pairs per GPU and micro-batch
: "${DPO_ACCUMULATION_STEPS:=1}"
: "${DPO_EPOCHS:=1}"
: "${DPO_LEARNING_RATE:=9.65e-6}"
: "${DPO_WEIGHT_DECAY:=0.1}"
: "${DPO_BETA:=0.1}"
: "${DPO_ZERO_STAGE:=3}"
: "${DPO_OFFLOAD:=1}"
: "${DPO_GRADIENT_CHECKPOINTING:=1}"

# ---- figa.sh ----
: "${FIGA_BATCH_SIZE:=4}"                   # revisions per GPU and micro-batch
: "${FIGA_ACCUMULATION_STEPS:=4}"
: "${FIGA_EPOCHS:=5}"
: "${FIGA_LEARNING_RATE:=1e-5}"
: "${FIGA_ZERO_STAGE:=3}"
: "${FIGA_OFFLOAD:=0}"
: "${FIGA_GRADIENT_CHECKPOINTING:=1}"

# ---- step3.sh: PPO with a reward for every token (4.3) ----
: "${ALGO:=ppo}"                            # ppo, or remax: a greedy answer's score as baseline, no critic
: "${PPO_FOLDER:=step3_ppo_tlcr}"           # sub-folder of OUTPUT
: "${REWARD:=tlcr}"                         # terms that are summed, blanks between; step3_ppo_tlcr/main.py --help lists them
: "${GENERATION_BATCH_SIZE:=16}"            # prompts per GPU that are scored at a time
: "${GENERATION_BATCHES:=1}"                # such batches in one set of rollouts, all decoded together
: "${ROLLOUT:=loop}"                        # what writes PPO's answers: loop, or vllm (docs/vllm.md)
: "${ROLLOUT_HOSTS:=}"                      # addresses of running servers, blanks between: http://10.0.0.7:8000
: "${ROLLOUT_AHEAD:=0}"                     # 1: servers write the next answers meanwhile, one update stale
: "${DECODE_BATCH_SIZE:=0}"                 # prompts per GPU decoded at a time; 0: the whole set
: "${PPO_BATCH_SIZE:=16}"                   # sequences per GPU and PPO micro-batch
: "${PPO_ACCUMULATION_STEPS:=1}"
: "${PPO_TOKENS_PER_MICRO_BATCH:=2048}"     # step 3 scores and learns in packs of so many tokens, unpadded; 0: padded
: "${PROMPT_EPOCHS:=1}"                     # passes over the prompts
: "${MAX_PROMPT_LEN:=256}"                  # tokens; longer prompts are left out
: "${MAX_ANSWER_LEN:=256}"                  # tokens; longer answers are cut
: "${ACTOR_LEARNING_RATE:=1e-6}"
: "${CRITIC_LEARNING_RATE:=1e-6}"
: "${PPO_PRESET:=none}"                     # step 3's --preset, for what has no variable here
: "${PPO_WARMUP_STEPS:=0}"                  # optimiser steps of linear warm-up
: "${KL_COEFFICIENT:=0.1}"
: "${GAMMA:=1}"                             # discount of later rewards
: "${ACTOR_WEIGHT_DECAY:=0}"
: "${WHITEN_ADVANTAGES:=0}"                 # advantages scaled to mean 0, deviation 1 (not in the paper)
: "${PPO_EMA:=0}"                           # also save actor_ema, a running average of the actor's weights
: "${ACTOR_ZERO_STAGE:=2}"
: "${CRITIC_ZERO_STAGE:=2}"
: "${REFERENCE_ZERO_STAGE:=3}"
: "${REWARD_ZERO_STAGE:=3}"
: "${PPO_OFFLOAD:=auto}"                    # actor's and critic's optimisers in host memory; auto: where they must be
: "${PPO_GRADIENT_CHECKPOINTING:=1}"
: "${PPO_SAVE_ANSWERS:=0}"                # every answer that it learns from, in PPO_FOLDER/answers-RANK.jsonl
: "${PPO_SAVE_INTERVAL:=50}"                # steps between checkpoints to continue from; 0: an epoch

# ---- where one stage finds what another made; set them to start from something of your own ----
: "${SFT_MODEL:=$OUTPUT/step1_sft}"
: "${REFERENCE_MODEL:=}"                    # what step 3's KL is measured from; empty: SFT_MODEL
: "${REVISIONS:=$OUTPUT/labeling/revisions.jsonl}" # several files: blanks between them
: "${EVAL_REVISIONS:=}"                     # held-out revisions; empty: step 2 holds out 5 % of the prompts
: "${DISCRIMINATOR_MODEL:=$OUTPUT/step2_discriminator}" # of token rewards; ppo_seq, ppo_synthetic, remax: SEQUENCE_MODEL

set +a

# ---- what the scripts share ----

KNOWN_STAGES="step1 label step2 step2_sequence step2_grm step3 dpo figa"

# Finds or makes the Python environment (PLAN=1 needs none) and fills the arrays `launcher` and `data`.
prepare() {
  # shellcheck source=training_scripts/setup.sh
  source "$project/training_scripts/setup.sh"
  launcher=(deepspeed --log_level warning)
  [[ -z $HOSTFILE ]] || launcher+=(--hostfile "$HOSTFILE")
  if [[ -n ${CUDA_VISIBLE_DEVICES:-} && -z $HOSTFILE && ${DS_ACCELERATOR:-cuda} == cuda ]]; then
    local gpus
    gpus=$(visible_gpus) # the launcher would take others with --num_gpus
    launcher+=(--include "localhost:$gpus")
  elif [[ -n $NUM_GPUS ]]; then
    launcher+=(--num_gpus "$NUM_GPUS")
  fi
  launcher+=(--master_port "$MASTER_PORT")
  tell_nodes
  # shellcheck disable=SC2034 # the stages' scripts use it
  read -ra data <<<"$DATA"
  local stage
  for stage in $STAGES; do # each becomes the name of a script to run
    [[ " $KNOWN_STAGES " == *" $stage "* ]] || {
      printf 'error: STAGES has no stage "%s"; known: %s\n' "$stage" "$KNOWN_STAGES" >&2
      exit 2
    }
  done
}

# add_training PREFIX FOLDER SCHEDULE…: adds to the array `command` what a stage that trains one model reads, by the
# variables of its PREFIX, with the options of its schedule in between.
add_training() {
  local -n batch_size=$1_BATCH_SIZE accumulation_steps=$1_ACCUMULATION_STEPS epochs=$1_EPOCHS
  local -n learning_rate=$1_LEARNING_RATE zero_stage=$1_ZERO_STAGE
  command+=(
    --data_path "${data[@]}"
    --data_split "$DATA_SPLIT"
    --data_seed "$DATA_SEED"
    --max_seq_len "$MAX_SEQ_LEN"
    --per_device_train_batch_size "$batch_size"
    --per_device_eval_batch_size "$batch_size"
    --gradient_accumulation_steps "$accumulation_steps"
    --num_train_epochs "$epochs"
    --learning_rate "$learning_rate"
    "${@:3}"
    --zero_stage "$zero_stage"
    --dtype "$DTYPE"
    --seed "$SEED"
    --output_dir "$OUTPUT/$2"
  )
}

# add_switches PREFIX: adds to such a stage's `command` packs, attention, checkpointing and offload, where they are set.
add_switches() {
  local -n packs=$1_TOKENS_PER_MICRO_BATCH checkpointing=$1_GRADIENT_CHECKPOINTING offload=$1_OFFLOAD
  [[ ${packs:-0} == 0 ]] || command+=(--tokens_per_micro_batch "$packs")
  attend
  switch --gradient_checkpointing "$checkpointing"
  switch --offload "$offload"
}

# attend: adds ATTENTION to the array `command`; sdpa is every program's own.
attend() {
  [[ $ATTENTION == sdpa ]] || command+=(--attn_implementation "$ATTENTION")
}

# DeepSpeed's launcher hands other nodes the variables of Python, NCCL and few more; the others that a stage reads come
# from the file that DS_ENV_FILE names. It is written here, unless DS_ENV_FILE is set: without secrets, which would show
# in the nodes' lists of processes, and with the lines of the user's own .deepspeed_env files last, so that they win.
tell_nodes() {
  [[ -n $HOSTFILE && $PLAN != 1 && -z ${DS_ENV_FILE:-} ]] || return 0
  mkdir -p "$OUTPUT"
  DS_ENV_FILE=$(cd "$OUTPUT" && pwd)/.deepspeed_env
  export DS_ENV_FILE
  local name value
  {
    while read -r name; do
      value=${!name}
      [[ $value != *$'\n'* ]] || continue # the file has one variable a line
      printf '%s=%s\n' "$name" "$value"
    done < <(compgen -e | grep -E '^(OMP_NUM_THREADS$|DS_ACCELERATOR$|(HF|WANDB|NCCL|GLOO|PYTORCH|TORCH)_)' |
      grep -vE 'TOKEN|KEY|SECRET|PASSWORD') | sed 's/[\\"$`]/\\&/g' # the launcher puts values in double quotes
    cat ~/.deepspeed_env .deepspeed_env 2>/dev/null || true
  } | grep . >"$DS_ENV_FILE" || true # an empty line would stop the launcher
}

# The first NUM_GPUS of CUDA_VISIBLE_DEVICES, all where NUM_GPUS is empty.
visible_gpus() {
  local all
  IFS=, read -ra all <<<"$CUDA_VISIBLE_DEVICES"
  [[ $CUDA_VISIBLE_DEVICES =~ ^[0-9]+(,[0-9]+)*$ ]] ||
    die "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES: DeepSpeed's launcher knows GPUs by number, as in 2,3"
  ((PLAN == 1 || ${NUM_GPUS:-0} <= ${#all[@]})) ||
    die "NUM_GPUS=$NUM_GPUS, but CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES has ${#all[@]}: set NUM_GPUS=${#all[@]}"
  local IFS=,
  echo "${all[*]:0:${NUM_GPUS:-${#all[@]}}}"
}

# switch FLAG VALUE: adds FLAG to the array `command` where VALUE is 1.
switch() {
  case $2 in
    1) command+=("$1") ;;
    0) ;;
    *)
      printf 'error: %s is switched on with 1 and off with 0, not with "%s"\n' "$1" "$2" >&2
      exit 2
      ;;
  esac
}

# A command as it could be typed: the launcher on one line, then one option of the program a line.
show_command() {
  local word line='' seen_program=''
  for word in "$@"; do
    if [[ -n $seen_program && $word == --* ]]; then
      printf '%s \\\n    ' "$line"
      line=''
    fi
    [[ $word != *.py ]] || seen_program=1
    # An address may hold a password or a key: neither the terminal nor a log gets it.
    [[ ! $word =~ ^([a-z]+://)[^/]*@(.*)$ ]] || word="${BASH_REMATCH[1]}SECRET@${BASH_REMATCH[2]}"
    [[ ! $word =~ ^([a-z]+://[^?]*)\?. ]] || word="${BASH_REMATCH[1]}?SECRET"
    [[ $word =~ ^[A-Za-z0-9_./:,=@%+-]+$ ]] || printf -v word %q "$word"
    line+=${line:+ }$word
  done
  printf '%s\n' "$line"
}

# What decides a command's result: its program and options, wherever OUTPUT lies. Not the number of GPUs or of processes
# that answer, a labelling endpoint's address and key (its model counts), or how much it may cost.
settings_of() {
  while [[ $1 != *.py ]]; do shift; done
  local word shown words=() skip=''
  for word in "$@"; do
    case $skip$word in
      skip* | --yes | --batch) skip='' ;;
      --base_url | --api_key_env | --max_cost_usd | --price | --max_failure_share | --num_processes) skip=skip ;;
      --span_base_url | --span_api_key_env | --span_max_cost_usd | --span_price) skip=skip ;;
      *) words+=("$word") ;;
    esac
  done
  shown=$(show_command "${words[@]}")
  shown=${shown//"$OUTPUT"/OUTPUT}
  printf '%s\n' "${shown#"$at"}"
}

# run_stage NAME DONE COMMAND…: run a stage, its output to the terminal and to OUTPUT/NAME/training.log, unless the
# command DONE says that it is finished. A stage that was finished with other settings is an error.
run_stage() {
  local folder=$OUTPUT/$1 finished=$2 settings
  shift 2
  if [[ $PLAN == 1 ]]; then
    printf '\n# %s\n' "$(basename "$folder")"
    show_command "$@"
    return
  fi
  settings=$(settings_of "$@")
  if $finished "$folder"; then
    if [[ -f $folder/settings.txt && $settings != "$(<"$folder/settings.txt")" ]]; then
      printf 'error: %s was made with other settings:\n' "$folder" >&2
      diff "$folder/settings.txt" - <<<"$settings" >&2 || true
      printf 'choose another OUTPUT, or delete that folder (and those of later stages) to make it again\n' >&2
      exit 2
    fi
    echo "$folder: complete, skipped"
    return
  fi
  local stage
  stage=$(basename "$0" .sh)
  [[ " $KNOWN_STAGES " != *" $stage "* ]] || STAGES=$stage preflight # by itself; a run's preflight was before all stages
  mkdir -p "$folder"
  printf '%s\n' "$settings" >"$folder/settings.txt"
  printf '\n%s\n' "$folder" | tee -a "$folder/training.log"
  show_command "$@" | tee -a "$folder/training.log"
  attended logged "$folder/training.log" "$@"
  # A launcher that is ended itself, or a stage that was asked to stop and has saved, leaves status 0.
  $finished "$folder" || {
    printf 'error: %s: ended without its results; the same command continues it\n' "$folder" >&2
    exit 1
  }
}

# Interrupts are for the stage alone: tee ignores them, to log the stage's last words.
logged() {
  local log=$1
  shift
  "$@" 2>&1 | (trap '' INT TERM && exec tee -a "$log")
}

# attended COMMAND…: run it, and end it too when SIGTERM ends this script. Bash handles signals at once only while it
# waits for a background job, so the command is one, but with the terminal's input and its Ctrl-C.
attended() {
  local job='' status=0
  # Before the start: a signal that comes with it finds the job by bash's own $!.
  trap '[[ -z ${job:-${!-}} ]] || terminate "${job:-$!}"; trap - TERM; kill -TERM $$' TERM
  trap : INT # the terminal sends it to the command too; how that ends is up to the command
  (trap - INT TERM && "$@") <&0 &
  job=$!
  wait "$job" || status=$?
  while kill -0 "$job" 2>/dev/null; do
    status=0
    wait "$job" || status=$?
  done
  trap - TERM INT
  return "$status"
}

# SIGTERM to a process and to all it started: DeepSpeed's launcher does not pass it on to the ranks. It stands still
# meanwhile, or it could start another process behind our back.
terminate() {
  local child children=()
  kill -STOP "$1" 2>/dev/null || true
  read -ra children -d '' < <(cat "/proc/$1/task/"*/children 2>/dev/null) || true
  for child in "${children[@]}"; do terminate "$child"; done
  kill -TERM "$1" 2>/dev/null || true
  kill -CONT "$1" 2>/dev/null || true
}

has_results() {
  [[ -f $1/results.json ]]
}

# has FILE FOLDER
has() {
  [[ -f $2/$1 ]]
}

# is_newer_than STAGE… FOLDER: whether OUTPUT's own results were made after those of all the stages.
is_newer_than() {
  local stage
  for stage in "${@:1:$#-1}"; do
    [[ $OUTPUT/results.json -nt $OUTPUT/$stage/results.json ]] || return 1
  done
}

is_labelled() {
  [[ -f $1/run.json ]] &&
    python3 -c 'import json, sys; sys.exit(not json.load(open(sys.argv[1])).get("complete"))' "$1/run.json"
}

# Looks for all that could stop the run before it starts. A plan runs nothing and checks nothing.
preflight() {
  [[ $PLAN == 1 || $PREFLIGHT == 0 ]] || attended python3 -m training_scripts.planning.preflight ${MADE_HERE:+--without_inputs}
  PREFLIGHT=0 # for the stages, which would ask the same again
}

# With PLAN=1 of several methods that share stages: takes those out of STAGES that the file PLANNED lists already, and adds
# the others to that file.
without_planned() {
  [[ $PLAN == 1 && -n ${PLANNED:-} ]] || return 0
  local stage made left=()
  for stage in $STAGES; do
    made="$OUTPUT $stage"
    [[ $stage != step2_sequence ]] || made+=" $SEQUENCE_FOLDER"
    [[ $stage != step3 ]] || made+=" $PPO_FOLDER"
    if grep -qxF "$made" "$PLANNED"; then
      echo "# $stage: planned above, made once"
    else
      left+=("$stage")
      echo "$made" >>"$PLANNED"
    fi
  done
  STAGES=${left[*]}
}

# The run's STAGES, in order. What you bring yourself (SFT_MODEL, REVISIONS, DISCRIMINATOR_MODEL) is not made again.
train() {
  local stage
  for stage in $STAGES; do
    case $stage in
      step1) [[ $SFT_MODEL == "$OUTPUT/step1_sft" ]] || continue ;;
      label) [[ $REVISIONS == "$OUTPUT/labeling/revisions.jsonl" ]] || continue ;;
      step2) [[ $DISCRIMINATOR_MODEL == "$OUTPUT/step2_discriminator" ]] || continue ;;
    esac
    attended bash "$project/training_scripts/$stage.sh"
  done
}

# With PLAN=1, after the commands: what they will cost.
plan() {
  [[ $PLAN != 1 ]] || { echo && "$plan_python" -m training_scripts.planning.plan; }
}
