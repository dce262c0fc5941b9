#!/usr/bin/env bash
# The whole thing, small, on this machine's CPU: sets up, makes a tiny base model and its data (once), trains
# branches with CoPD, merges them, and prints the evaluation table.
#
#   launchers/quickstart.sh [key=value ...]           text, image and video: a tiny Qwen3-VL, three branches
#   launchers/quickstart.sh --text [key=value ...]    two kinds of text: a tiny Qwen3, two branches
#
# key=value changes a setting, such as run.seed=2 or schedule.cycles=4. Runs in the project folder; relative
# paths among the arguments start there.
#
#   COPD_VENV        see launchers/setup.sh
#   COPD_TINY_BASE   folder of the tiny base model; default .cache/tiny_vl, with --text .cache/tiny_text
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=setup.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
kind=vl config=configs/three_branch_tiny.yaml
case ${1-} in
    --text)
        kind=text config=configs/two_branch_tiny.yaml
        shift
        ;;
    -h | --help)
        copd_help "$0"
        exit 0
        ;;
    -*)
        echo "quickstart: unknown option $1. Use --text or none, then key=value settings." >&2
        exit 2
        ;;
esac
cd -- "$COPD_ROOT"
copd_setup cpu

# Everything it needs is local from here on.
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 TOKENIZERS_PARALLELISM=false

base=${COPD_TINY_BASE:-.cache/tiny_$kind}
python tools/make_tiny_base.py --kind "$kind" --out "$base"
exec copd train "$config" "model.path=$base" "$@"
