# shellcheck shell=bash
# What the job launchers share. Sourced by launchers/*_branch.sh, which explain how to use it.
#
#   copd_job DEFAULT_CONFIG [CONFIG.yaml] [key=value ...]
#
# In a SLURM job it checks the configuration against the nodes, assigns ranks to nodes, starts one task per rank
# with srun, restarts them after a failure, saves before the time limit and puts the job back into the queue.
# Outside SLURM it starts a local torchrun. In both cases the run continues from its newest valid checkpoint.
#
#   COPD_ROOT             the project folder, if it is not found automatically
#   COPD_BEFORE           a file to source first (module load ..., NCCL settings)
#   COPD_RANKS_PER_NODE   ranks (GPUs) per node; default --ntasks-per-node, else the node's GPUs
#   COPD_CPUS_PER_RANK    default: the node's CPUs, shared evenly
#   COPD_MAX_RESTARTS     restarts after a failure within one allocation; default 3
#   COPD_MAX_REQUEUES     how often the job puts itself back into the queue; default 100
#   COPD_WAIT_SECONDS     how long the other ranks may go on after the first one has ended; default 60
#   COPD_SWEEP            for sbatch --array: a file of overrides; array element 1 uses its first line, and so on
#                         (# starts a comment). Without this file, the element's index becomes run.seed
#   COPD_PRINT            1: print the command that would run (in a job, srun's) and start nothing
# Without a container, the environment of launchers/setup.sh is used (COPD_VENV, COPD_REQUIREMENTS; by default gpu
# on nodes with GPUs, else cpu). With a container:
#   COPD_CONTAINER          image: a registry reference or .sqsh file for Pyxis, a .sif file for Apptainer
#   COPD_CONTAINER_ENGINE   pyxis or apptainer; default: pyxis if srun supports it
#   COPD_CONTAINER_MOUNTS   further folders to mount, separated by commas, besides the project and working folders
# The verifiers "code" and "proof" need bubblewrap in the image (the Dockerfile installs it) and user namespaces on the
# nodes; "copd doctor" in the container says whether the sandbox works.

_copd_job_say() { printf 'copd %s: %s\n' "${SLURM_JOB_ID:+job $SLURM_JOB_ID}" "$*" >&2; }

_copd_job_field() { # prints field $1 of scontrol's record of this job
    scontrol --oneliner show job "$SLURM_JOB_ID" 2>/dev/null | tr ' ' '\n' | sed -n "s/^$1=//p" | head -n 1
}

# Sets two arrays: in_env, the prefix that makes a command run in the Python environment, and srun_container.
_copd_job_environment() {
    local engine=${COPD_CONTAINER_ENGINE-} mounts folder
    in_env=() srun_container=()
    if [[ -z ${COPD_CONTAINER-} ]]; then
        local requirements=cpu
        if [[ -n ${SLURM_GPUS_ON_NODE-}${SLURM_JOB_GPUS-} ]]; then requirements=gpu; fi
        copd_setup "${COPD_REQUIREMENTS:-$requirements}" || return 1
        return 0
    fi
    if [[ -z $engine ]]; then
        if srun --help 2>/dev/null | grep -q -e --container-image; then engine=pyxis; else engine=apptainer; fi
    fi
    mounts="$COPD_ROOT,$PWD${COPD_CONTAINER_MOUNTS:+,$COPD_CONTAINER_MOUNTS}"
    case $engine in
        pyxis)
            local pairs=()
            while IFS= read -r folder; do
                case $folder in *:*) pairs+=("$folder") ;; *) pairs+=("$folder:$folder") ;; esac
            done < <(tr ',' '\n' <<<"$mounts" | sort -u)
            srun_container=("--container-image=$COPD_CONTAINER" "--container-workdir=$PWD"
                "--container-mounts=$(IFS=,; echo "${pairs[*]}")")
            in_env=(env "PYTHONPATH=$COPD_ROOT")
            ;;
        apptainer)
            local binary
            binary=$(command -v apptainer || command -v singularity) || {
                _copd_job_say "COPD_CONTAINER is set, but this node has neither Pyxis (srun --container-image) nor apptainer"
                return 1
            }
            in_env=("$binary" exec --bind "$mounts" --pwd "$PWD" --env "PYTHONPATH=$COPD_ROOT")
            if [[ -n ${SLURM_GPUS_ON_NODE-}${SLURM_JOB_GPUS-} ]]; then in_env+=(--nv); fi
            in_env+=("$COPD_CONTAINER")
            ;;
        *)
            _copd_job_say "COPD_CONTAINER_ENGINE=$engine is not supported; use pyxis or apptainer"
            return 1
            ;;
    esac
}

# Adds to the array overrides what this element of a job array changes, and a run name or folder of its own.
_copd_job_sweep() {
    local index=${SLURM_ARRAY_TASK_ID-} line="" i named=""
    if [[ -z $index ]]; then return 0; fi
    for i in "${!overrides[@]}"; do
        case ${overrides[i]} in
            run.name=*) overrides[i]+=_$index named=1 ;;
            run.dir=*) overrides[i]+=/$index named=1 ;;
        esac
    done
    if [[ -z $named ]]; then overrides+=("run.name=${SLURM_JOB_NAME:-sweep}_$index"); fi
    if [[ -z ${COPD_SWEEP-} ]]; then
        overrides+=("run.seed=$index")
        return 0
    fi
    if [[ ! -r $COPD_SWEEP ]]; then
        _copd_job_say "COPD_SWEEP=$COPD_SWEEP cannot be read (from folder $PWD)"
        return 1
    fi
    line=$(sed -e 's/#.*//' -e '/^[[:space:]]*$/d' "$COPD_SWEEP" | sed -n "${index}p")
    if [[ -z $line ]]; then
        _copd_job_say "$COPD_SWEEP has no line $index: submit with --array=1-$(sed \
            -e 's/#.*//' -e '/^[[:space:]]*$/d' "$COPD_SWEEP" | wc -l)"
        return 1
    fi
    local words
    read -r -a words <<<"$line"
    overrides+=("${words[@]}")
}

# Starts all ranks, waits for them and sets status. The traps record signals that arrive meanwhile.
_copd_job_step() {
    srun "${srun_options[@]}" "${train[@]}" &
    step_pid=$!
    while :; do
        interrupted="" status=0
        wait "$step_pid" || status=$?
        # a trap interrupts the wait, not the step
        if [[ -z $interrupted ]]; then break; fi
    done
    step_pid=""
}

_copd_job_time_is_up() {
    interrupted=1 time_is_up=1
    _copd_job_say "the time limit is near: asking the ranks to save and stop"
    if [[ -n $step_pid ]]; then kill -USR1 "$step_pid"; fi
}

# scancel, preemption, or the time limit itself: SLURM has signalled the ranks and decides what happens to the job.
_copd_job_ended() { interrupted=1 ended=1; }

_copd_job_requeue() { # $1 why
    local count=${SLURM_RESTART_COUNT:-0}
    if ((count >= ${COPD_MAX_REQUEUES:-100})); then
        _copd_job_say "$1; requeued $count times already (COPD_MAX_REQUEUES): submit it again to continue"
    elif [[ $(_copd_job_field BatchFlag) != 1 ]] || ! scontrol requeue "$SLURM_JOB_ID"; then
        _copd_job_say "$1; this job cannot be requeued: submit it again to continue"
    else
        _copd_job_say "$1; back into the queue"
    fi
    exit 75
}

copd_job() {
    local config=$1 step_pid="" interrupted="" time_is_up="" ended="" status=0 restarts=0
    local overrides in_env srun_container srun_options train hosts tasks per_node end most
    shift
    # shellcheck source=/dev/null
    if [[ -n ${COPD_BEFORE-} ]]; then . "$COPD_BEFORE" || return 1; fi
    case ${1-} in
        *.yaml | *.yml)
            config=$1
            if [[ ! -e $config && -e $COPD_ROOT/$config ]]; then config=$COPD_ROOT/$config; fi
            shift
            ;;
        *) config=$COPD_ROOT/$config ;;
    esac
    overrides=("$@")
    export VLLM_NO_USAGE_STATS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
    if [[ -z ${SLURM_JOB_ID-} ]]; then
        if [[ ${COPD_PRINT-} == 1 ]]; then
            printf '%q ' copd train "$config" "${overrides[@]}"
            echo
            return 0
        fi
        local requirements=cpu
        if [[ -e /dev/nvidiactl ]]; then requirements=gpu; fi
        copd_setup "${COPD_REQUIREMENTS:-$requirements}" || return 1
        exec copd train "$config" "${overrides[@]}"
    fi
    trap _copd_job_time_is_up USR1
    trap _copd_job_ended TERM
    _copd_job_sweep || exit 2
    _copd_job_environment || exit 1

    per_node=${COPD_RANKS_PER_NODE:-${SLURM_NTASKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}}
    if [[ -z $per_node ]]; then
        _copd_job_say "the number of ranks per node is unknown: submit with --ntasks-per-node, or set COPD_RANKS_PER_NODE"
        exit 2
    fi
    hosts=$(mktemp "${TMPDIR:-/tmp}/copd-hosts-$SLURM_JOB_ID-XXXXXX")
    # expanded now, since the trap outlives this function's variables
    # shellcheck disable=SC2064
    trap "rm -f '$hosts'" EXIT
    if ! _copd_job_check >"$hosts"; then
        _copd_job_say "nothing was started"
        exit 2
    fi
    tasks=$(wc -l <"$hosts")
    most=$(sort "$hosts" | uniq -c | sort -rn | awk 'NR == 1 { print $1 }')
    srun_options=(--ntasks="$tasks" --distribution=arbitrary --kill-on-bad-exit=0
        --wait="${COPD_WAIT_SECONDS:-60}" --unbuffered
        --cpus-per-task="${COPD_CPUS_PER_RANK:-$((SLURM_CPUS_ON_NODE / most))}"
        --job-name=train "${srun_container[@]}")
    train=("${in_env[@]}" python3 -P -m copd_megatron.cli train "$config" "${overrides[@]}")
    export SLURM_HOSTFILE=$hosts COPD_LAUNCHER=srun
    # The ranks listen on the interface of this address alone. On several nodes it is the address of rank 0's node,
    # because the other nodes may be unable to resolve its name.
    MASTER_ADDR=127.0.0.1
    if (($(sort -u "$hosts" | wc -l) > 1)); then
        MASTER_ADDR=$(scontrol --oneliner show node "$(head -n 1 "$hosts")" |
            sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
    fi
    export MASTER_ADDR
    # By when the trainer must have saved. Newer versions of SLURM set this themselves.
    if [[ -z ${SLURM_JOB_END_TIME-} ]] && end=$(date -d "$(_copd_job_field EndTime)" +%s 2>/dev/null); then
        export SLURM_JOB_END_TIME=$end
    fi
    if [[ ${COPD_PRINT-} == 1 ]]; then
        printf '%q ' srun "${srun_options[@]}" "${train[@]}"
        echo
        exit 0
    fi
    unset SLURM_NTASKS_PER_NODE # srun would read it as a limit
    while :; do
        export COPD_RESTART_COUNT=$restarts
        _copd_job_step
        if [[ $status == 0 ]]; then exit 0; fi
        if [[ -n $ended ]]; then
            _copd_job_say "ended by SLURM; the ranks exited with status $status"
            exit "$status"
        fi
        if [[ $status == 75 ]]; then _copd_job_requeue "the ranks have saved"; fi
        if [[ -n $time_is_up && $restarts -gt 0 ]]; then
            _copd_job_requeue "the time limit came while the ranks were restarting"
        elif [[ -n $time_is_up ]]; then
            _copd_job_say "the time limit came before the ranks had finished a step (exit status $status): give the" \
                "job more time (--time), or reserve less of it for saving (--signal=B:USR1@SECONDS)"
            exit "$status"
        fi
        if [[ $status == 78 ]]; then
            _copd_job_say "the run failed in a way that no restart can mend. The cause: copd logs RUN_DIR --level ERROR"
            exit "$status"
        fi
        if ((restarts >= ${COPD_MAX_RESTARTS:-3})); then
            _copd_job_say "the ranks exited with status $status after $restarts restarts: giving up. The cause:" \
                "copd logs RUN_DIR --level ERROR"
            exit "$status"
        fi
        restarts=$((restarts + 1))
        _copd_job_say "the ranks exited with status $status; restart $restarts of ${COPD_MAX_RESTARTS:-3}"
    done
}

# Prints the host of every rank. If the run could not start, prints why and returns 2.
_copd_job_check() {
    local names command
    names=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd, -)
    command=("${in_env[@]}" python3 -P -m copd_megatron.launch.slurm "$config" "${overrides[@]}"
        --hosts "$names" --ranks-per-node "$per_node"
        --topology "$(scontrol --oneliner show topology 2>/dev/null | grep -e Level= || true)")
    if [[ ${#srun_container[@]} -gt 0 && ${COPD_PRINT-} != 1 ]]; then
        command=(srun --nodes=1 --ntasks=1 --overlap "${srun_container[@]}" "${command[@]}")
    elif [[ ${#srun_container[@]} -gt 0 ]]; then
        command=(env "PYTHONPATH=$COPD_ROOT" "${command[@]:2}")
    fi
    # keep only host names: containers may print other lines as they start
    "${command[@]}" | grep -Fx -f <(tr ',' '\n' <<<"$names")
}
