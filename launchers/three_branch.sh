#!/usr/bin/env bash
#SBATCH --job-name=copd_three_branch
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Trains three branches as a SLURM job, from any folder; by default on 3 nodes of 8 H100 or H200 GPUs.
#
#   sbatch launchers/three_branch.sh [CONFIG.yaml] [key=value ...]
#   sbatch --nodes=1 --time=1-0 launchers/three_branch.sh my.yaml run.seed=2
#   sbatch --array=1-4 launchers/three_branch.sh               four runs with four seeds
#   launchers/three_branch.sh [CONFIG.yaml] [key=value ...]    outside SLURM: a local torchrun
#
# CONFIG.yaml replaces configs/three_branch_qwen3_vl_4b.yaml, key=value changes a setting of it. Relative paths
# start at the folder from which you submit. Options given to sbatch override the #SBATCH lines of this file:
# --account and --partition, which most clusters ask for, --time, --nodes. The job's log is
# copd_three_branch-<job>.log in that folder; the run's own files are in runs/<run.name>.
#
# Ten minutes before its time limit the job saves, stops, goes back into the queue and later continues from
# there. After a failure it starts again from the newest valid checkpoint (checkpoint.save_period). If the
# number of nodes does not fit the branches, the job ends before anything starts and says which number does.
# Containers, sweeps and other settings by environment variables: see launchers/slurm.sh.
set -euo pipefail

# sbatch runs a copy of this file; SLURM knows where the original is.
submitted=$(scontrol show job "${SLURM_JOB_ID:-none}" 2>/dev/null |
    sed -n 's|^ *Command=\(/.*/\)[a-z_]*_branch\.sh\( .*\)\{0,1\}$|\1|p' | head -n 1 || true)
for launchers in "${COPD_ROOT:+$COPD_ROOT/launchers}" "$(dirname -- "${BASH_SOURCE[0]}")" "$submitted" \
    "${SLURM_SUBMIT_DIR-}" "${SLURM_SUBMIT_DIR-}/launchers"; do
    if [[ -n $launchers && -f $launchers/slurm.sh && -f $launchers/setup.sh ]]; then break; fi
    launchers=""
done
if [[ -z $launchers ]]; then
    echo "three_branch.sh: the project's folder was not found; set COPD_ROOT to it (sbatch --export=ALL,COPD_ROOT=...)" >&2
    exit 2
fi
# shellcheck source-path=SCRIPTDIR source=setup.sh
. "$launchers/setup.sh"
if [[ ${1-} == -h || ${1-} == --help ]]; then
    copd_manual "${BASH_SOURCE[0]}"
    exit 0
fi
# shellcheck source-path=SCRIPTDIR source=slurm.sh
. "$launchers/slurm.sh"
copd_job configs/three_branch_qwen3_vl_4b.yaml "$@"
