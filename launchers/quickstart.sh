#!/usr/bin/env bash
# The whole thing, small, on this machine's CPU: sets up, makes a tiny base model and its data (once), trains
# two branches with CoPD, merges them, and prints the evaluation table.
#
#   launchers/quickstart.sh [key=value ...]        such as run.seed=2 or schedule.cycles=4
#
# Runs in the project folder; relative paths among the arguments start there.
#
#   COPD_VENV        see launchers/setup.sh
#   COPD_TINY_BASE   folder of the tiny base model; default .cache/tiny_text
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=setup.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
cd -- "$COPD_ROOT"
copd_setup cpu

# Everything it needs is local from here on.
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 TOKENIZERS_PARALLELISM=false

base=${COPD_TINY_BASE:-.cache/tiny_text}
python tools/make_tiny_base.py --out "$base"
exec copd train configs/two_branch_tiny.yaml "model.path=$base" "$@"
