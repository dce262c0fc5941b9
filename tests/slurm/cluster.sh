#!/usr/bin/env bash
# A real SLURM on this machine, for tests: munged, slurmctld and one slurmd per virtual node, all of them
# private to a folder, with ports of their own; the system's own SLURM, if there is one, is left alone.
#
#   tests/slurm/cluster.sh up FOLDER [NODES [CPUS_PER_NODE]]    default 3 nodes, named n1, n2 ...; 2 CPUs each
#   tests/slurm/cluster.sh down FOLDER                          ends it, by the process ids that it recorded
#
# After `up`, `export SLURM_CONF=FOLDER/slurm.conf` and use sbatch, srun, squeue, scontrol as ever.
# Needs root (the daemons start jobs) and Debian's packages: apt-get install slurm-wlm munge
set -euo pipefail

usage() { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[[ $# -ge 2 ]] || usage
command=$1 folder=$2

free_ports() { # $1 ports that nobody listens on
    python3 - "$1" <<'PY'
import socket, sys
held = [socket.socket() for _ in range(int(sys.argv[1]))]
for s in held:
    s.bind(("127.0.0.1", 0))
print(*(s.getsockname()[1] for s in held))
PY
}

up() {
    local nodes=${1:-3} cpus=${2:-2} tool ports memory host
    for tool in munged mungekey slurmctld slurmd; do
        if ! PATH=$PATH:/usr/sbin command -v "$tool" >/dev/null; then
            echo "cluster.sh: $tool not found: apt-get install slurm-wlm munge" >&2
            exit 3
        fi
    done
    PATH=$PATH:/usr/sbin
    if [[ $(id -u) != 0 ]]; then echo "cluster.sh: needs root, slurmd starts jobs" >&2; exit 3; fi
    if [[ -e $folder/pids ]]; then echo "cluster.sh: $folder has a cluster already" >&2; exit 1; fi
    # munged refuses a socket below a folder that others may write to
    mkdir -p "$folder"/{munge,state,log}
    chmod 755 "$folder" && chmod 700 "$folder/munge"
    folder=$(cd "$folder" && pwd -P)
    socket=$(mktemp -u "/run/copd-munge-XXXXXX.sock")
    echo "$socket" >"$folder/munge/socket"
    read -r -a ports <<<"$(free_ports $((nodes + 1)))"
    memory=$(awk '/MemTotal/ { print int($2 / 1024) - 256 }' /proc/meminfo)
    host=$(hostname -s)
    {
        cat <<CONF
ClusterName=copd_test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# a requeued job waits until its credentials have expired
AuthInfo=socket=$socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=5,bf_interval=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool.%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.%n.log
SlurmctldDebug=info
SlurmdDebug=info
JobRequeue=1
# a node that was taken down stays down until it is resumed
ReturnToService=1
# a cancelled job gets this long to save
KillWait=30
OverTimeLimit=0
MinJobAge=3600
SlurmdTimeout=30
SlurmdParameters=config_overrides
MailProg=/bin/true
TopologyPlugin=topology/tree
PlugStackConfig=$folder/plugstack.conf
CONF
        for ((i = 1; i <= nodes; i++)); do
            echo "NodeName=n$i NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[i]} CPUs=$cpus RealMemory=$memory"
        done
        echo "PartitionName=test Nodes=n[1-$nodes] Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO"
    } >"$folder/slurm.conf"
    : >"$folder/plugstack.conf"
    # the nodes hang on two switches in turn
    local odd even
    odd=$(seq -s, -f 'n%g' 1 2 "$nodes") even=$(seq -s, -f 'n%g' 2 2 "$nodes")
    {
        echo "SwitchName=s1 Nodes=$odd"
        if [[ -n $even ]]; then echo "SwitchName=s2 Nodes=$even"; fi
        echo "SwitchName=spine Switches=s1${even:+,s2}"
    } >"$folder/topology.conf"
    export SLURM_CONF=$folder/slurm.conf
    : >"$folder/pids"
    mungekey --create --keyfile "$folder/munge/key"
    start munged munged --foreground --force --socket "$socket" --key-file "$folder/munge/key" \
        --pid-file "$folder/munge/pid" --log-file "$folder/log/munged.log" --seed-file "$folder/munge/seed"
    start slurmctld slurmctld -D -c
    for ((i = 1; i <= nodes; i++)); do
        mkdir -p "$folder/spool.n$i"
        start "slurmd.n$i" slurmd -D -N "n$i"
    done
    for ((i = 0; i < 150; i++)); do
        if [[ $(sinfo -h -t idle -o '%D' 2>/dev/null) == "$nodes" ]]; then
            echo "cluster.sh: $nodes nodes idle; export SLURM_CONF=$SLURM_CONF"
            return 0
        fi
        sleep 0.2
    done
    echo "cluster.sh: the nodes did not come up within 30 s" >&2
    sinfo -N -o '%N %T %E' >&2 || true
    tail -n 20 -- "$folder"/log/* >&2 || true
    down
    exit 1
}

start() { # $1 name, the rest its command; keeps pid and start time, so that `down` ends nobody else
    local name=$1
    shift
    setsid "$@" >"$folder/log/$name.out" 2>&1 </dev/null &
    echo "$! $(started "$!") $name" >>"$folder/pids"
}

started() { # when process $1 started, in clock ticks since boot; nothing if it is gone
    sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20
}

down() {
    local pid since name waited
    export SLURM_CONF=$folder/slurm.conf
    if [[ ! -e $folder/pids ]]; then echo "cluster.sh: no cluster in $folder" >&2; exit 1; fi
    # jobs first: their processes belong to slurmstepd, which outlives slurmd
    timeout 20 scancel --state=PENDING --user=root >/dev/null 2>&1 || true
    timeout 20 scancel --user=root >/dev/null 2>&1 || true
    for ((waited = 0; waited < 200; waited++)); do
        [[ -z $(timeout 20 squeue -h -o %A 2>/dev/null) ]] && break
        sleep 0.2
    done
    while read -r pid since name; do
        if [[ $(started "$pid") == "$since" ]]; then kill -TERM "$pid" 2>/dev/null || true; fi
    done < <(tac "$folder/pids")
    while read -r pid since name; do
        for ((waited = 0; waited < 50; waited++)); do
            [[ $(started "$pid") == "$since" ]] || break
            sleep 0.1
        done
        if [[ $(started "$pid") == "$since" ]]; then
            echo "cluster.sh: $name does not end by SIGTERM" >&2
            kill -KILL "$pid" 2>/dev/null || true
        fi
    done <"$folder/pids"
    rm -f "$folder/pids" "$(cat "$folder/munge/socket")"{,.lock}
}

case $command in
    up) shift 2; up "$@" ;;
    down) down ;;
    *) usage ;;
esac
