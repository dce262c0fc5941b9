#!/usr/bin/env bash
# The whole method at small scale on this machine's CPU: sets up, makes a tiny base model and its data (once),
# trains branches with CoPD, merges them, and prints the evaluation table.
#
#   launchers/quickstart.sh [key=value ...]           text, image and video: a tiny Qwen3-VL, three branches
#   launchers/quickstart.sh --text [key=value ...]    two kinds of text: a tiny Qwen3, two branches
#
# key=value changes a setting, for example run.seed=2 or schedule.cycles=4. The script runs in the project
# folder; relative paths among the arguments start there. It needs about 8 GB of disk for the packages and 9 GB
# of memory, and takes 5 to 12 minutes on two cores, not counting the download of the packages.
#
#   COPD_VENV        see launchers/setup.sh
#   COPD_TINY_BASE   folder of the tiny base model; default .cache/tiny_vl, with --text .cache/tiny_text
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=setup.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
kind=vl config=configs/three_branch_tiny.yaml
case ${1-} in
    -h | --help)
        copd_manual "${BASH_SOURCE[0]}"
        exit 0
        ;;
    --text)
        kind=text config=configs/two_branch_tiny.yaml
        shift
        ;;
    -*)
        echo "quickstart: unknown option $1. Use --text, --help or none, then key=value settings." >&2
        exit 2
        ;;
esac
say() { printf 'quickstart: %s\n' "$@"; }

cd -- "$COPD_ROOT"
copd_setup cpu

# Everything it needs is local from here on.
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 TOKENIZERS_PARALLELISM=false

base=${COPD_TINY_BASE:-.cache/tiny_$kind}
say "1 of 2: a tiny base model and its data"
python tools/make_tiny_base.py --kind "$kind" --out "$base"

say "2 of 2: training. The engines start and the base model is evaluated first (one to three minutes); then" \
    "there is a line for every branch and step."
# setpriv ties the run to this script: if the script is killed, the run is told to save and stop.
tied=()
if setpriv --pdeathsig TERM true 2>/dev/null; then tied=(setpriv --pdeathsig TERM); fi
status=0
"${tied[@]}" copd train "$config" "model.path=$base" "$@" || status=$?
if [[ $status != 0 ]]; then exit "$status"; fi

run=runs/$(basename -- "$config" .yaml)
for setting in "$@"; do
    case $setting in
        run.name=*) run=runs/${setting#*=} ;;
        run.dir=*) run=${setting#*=} ;;
    esac
done
cat <<END

The base model differs from one kind of CPU to another, and so do the rows of this table. With the default settings,
the run did what it should if the merged model is far above the base, at a mean of about 95 or more.

Next, in $COPD_ROOT:
  . ${VIRTUAL_ENV#"$COPD_ROOT/"}/bin/activate     puts the copd command on the PATH of this shell
  copd report $run     these tables again, and the page $run/report.html
  copd train $config --dry-run     every setting, the layout and the memory estimate
END
