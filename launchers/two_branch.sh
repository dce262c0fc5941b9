#!/usr/bin/env bash
#SBATCH --job-name=copd_two_branch
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Trains two branches as a SLURM job, from any folder; by default on 2 nodes of 8 H100 or H200 GPUs.
#
#   sbatch launchers/two_branch.sh [CONFIG.yaml] [key=value ...]
#   sbatch --nodes=1 --time=1-0 launchers/two_branch.sh my.yaml run.seed=2
#   sbatch --array=1-4 launchers/two_branch.sh               four seeds, each a run of its own
#   launchers/two_branch.sh [CONFIG.yaml] [key=value ...]    outside SLURM: a local torchrun
#
# CONFIG.yaml replaces configs/two_branch_qwen3_vl_4b.yaml, key=value changes a setting of it; relative
# paths start at the folder in which you submit. Everything above that begins with #SBATCH can be given to
# sbatch instead. Ten minutes before its time limit the job saves, stops, goes back into the queue, and goes
# on from there; after a failure it starts again from the newest valid checkpoint (checkpoint.save_period).
# A number of nodes that does not fit the branches is refused, with the right one, before anything starts.
# Containers, sweeps and the other settings by environment variables: see launchers/slurm.sh.
set -euo pipefail

# sbatch runs a copy of this file: SLURM knows where the original is.
submitted=$(scontrol show job "${SLURM_JOB_ID:-none}" 2>/dev/null |
    sed -n 's|^ *Command=\(/.*/\)[a-z_]*_branch\.sh\( .*\)\{0,1\}$|\1|p' | head -n 1 || true)
for launchers in "${COPD_ROOT:+$COPD_ROOT/launchers}" "$(dirname -- "${BASH_SOURCE[0]}")" "$submitted" \
    "${SLURM_SUBMIT_DIR-}" "${SLURM_SUBMIT_DIR-}/launchers"; do
    if [[ -n $launchers && -f $launchers/slurm.sh && -f $launchers/setup.sh ]]; then break; fi
    launchers=""
done
if [[ -z $launchers ]]; then
    echo "two_branch.sh: the project's folder was not found; set COPD_ROOT to it (sbatch --export=ALL,COPD_ROOT=...)" >&2
    exit 2
fi
# shellcheck source-path=SCRIPTDIR source=setup.sh
. "$launchers/setup.sh"
# shellcheck source-path=SCRIPTDIR source=slurm.sh
. "$launchers/slurm.sh"
copd_job configs/two_branch_qwen3_vl_4b.yaml "$@"
