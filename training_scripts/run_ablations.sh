#!/usr/bin/env bash
# The paper's ablations (7.3 and Eq. 2), and two controls, with three seeds -> OUTPUT/seed-N. They differ from tlcr in
# the reward alone, so SFT, labelling and discriminator are made once a seed; run_table1.sh's are used where it ran.
#
# Hardware: 8 x A100 80GB with the defaults. Time: days.
# Launch:   bash training_scripts/run_ablations.sh [OUTPUT]

export METHODS=${METHODS:-tlcr tlcr_fixed tlcr_positive_only tlcr_negative_only tlcr_released_code random}
exec bash "$(dirname "${BASH_SOURCE[0]}")/run_table1.sh" "$@"
