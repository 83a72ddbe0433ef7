#!/usr/bin/env bash
# Slurm on this one machine, controller and node both, to try and test sweeps on a cluster without having one.
#
#   apt-get install --no-install-recommends slurm-wlm munge
#   scripts/slurm_on_one_machine.sh start     as root; does nothing where it runs already
#   scripts/slurm_on_one_machine.sh status
#   scripts/slurm_on_one_machine.sh stop      ends what `start` began, jobs included
#
# Everything it writes lies below $SLURM_HERE, by default /var/lib/deltaexp-slurm, except for the configuration that Slurm's
# commands look for, /etc/slurm/slurm.conf: one that is there and is not ours is left alone, and nothing is started.
set -euo pipefail

here=${SLURM_HERE:-/var/lib/deltaexp-slurm}
conf=/etc/slurm/slurm.conf
mark="# Written by deltaexp's slurm_on_one_machine.sh."

refuse() {
    echo "slurm_on_one_machine: $*" >&2
    exit 2
}

runs() { # NAME: whether the daemon whose number is in NAME.pid is alive, and not only waits to be buried
    local pid
    pid=$(cat "$here/run/$1.pid" 2>/dev/null) && [ -n "$pid" ] &&
        [ "$(awk '/^Name:/ {name = $2} /^State:/ {print name, $2 != "Z"; exit}' "/proc/$pid/status" 2>/dev/null)" = "$1 1" ]
}

answers() { # whether the node is up and free to take jobs
    [[ $(timeout 5 sinfo --noheader --format=%T 2>/dev/null) =~ ^(idle|mixed|allocated)$ ]]
}

wait_for() { # WHAT COMMAND...: until it succeeds, for half a minute
    local what=$1
    shift
    for _ in $(seq 150); do
        "$@" && return
        sleep 0.2
    done
    tail -n 5 "$here"/log/*.log >&2 || true
    refuse "$what within 30 seconds; the logs are in $here/log."
}

configure() {
    local cpus memory
    cpus=$(getconf _NPROCESSORS_ONLN)
    memory=$(awk '/^MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo)
    # Jobs of one user share the node by cores and memory. A job that is preempted, or whose node fails, goes back into the
    # queue, and may begin again at once: no power saving, no grace between states.
    cat <<END
$mark
ClusterName=one
SlurmctldHost=localhost
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$here/munge/socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=$((memory / cpus))
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait=1
MinJobAge=600
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
StateSaveLocation=$here/state
SlurmdSpoolDir=$here/spool
SlurmctldPidFile=$here/run/slurmctld.pid
SlurmdPidFile=$here/run/slurmd.pid
SlurmctldLogFile=$here/log/slurmctld.log
SlurmdLogFile=$here/log/slurmd.log
NodeName=localhost NodeHostname=$(hostname) CPUs=$cpus RealMemory=$memory State=UNKNOWN
PartitionName=main Nodes=localhost Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=localhost MaxTime=INFINITE State=UP PriorityTier=2
END
}

start() {
    [ "$(id -u)" = 0 ] || refuse "Starting Slurm's daemons takes root."
    for program in munged slurmctld slurmd sbatch; do
        command -v "$program" >/dev/null || refuse "There is no $program: apt-get install --no-install-recommends slurm-wlm munge."
    done
    [ ! -e "$conf" ] || grep -qF "$mark" "$conf" || refuse "$conf is another cluster's; it is left as it is."
    if runs munged && runs slurmctld && runs slurmd && answers; then
        echo "Slurm runs already."
        return
    fi
    mkdir -p "$here"/{state,spool,log,run} "$(dirname "$conf")"
    configure >"$conf"
    if ! runs munged; then
        install -d -o munge -g munge -m 755 "$here/munge"
        (umask 077 && head -c 128 /dev/urandom >"$here/munge/key" && chown munge: "$here/munge/key")
        local own=("--key-file=$here/munge/key" "--seed-file=$here/munge/seed" "--log-file=$here/munge/log")
        runuser -u munge -- munged "${own[@]}" "--socket=$here/munge/socket" "--pid-file=$here/munge/munged.pid"
        ln -sf "$here/munge/munged.pid" "$here/run/munged.pid"
    fi
    runs slurmctld || slurmctld
    runs slurmd || slurmd -N localhost
    # A node that went down with the machine comes back by itself; one that was drained does not.
    wait_for "Slurm's controller did not answer" answers
    echo "Slurm runs: $(sinfo --noheader --format='%D node, %c CPUs, %m MiB' --partition=main)."
}

stop() {
    [ "$(id -u)" = 0 ] || refuse "Stopping Slurm's daemons takes root."
    runs slurmctld && timeout 10 scancel --full --quiet --user=root 2>/dev/null || true
    for daemon in slurmd slurmctld munged; do
        if runs "$daemon"; then
            kill "$(cat "$here/run/$daemon.pid")"
            for _ in $(seq 100); do runs "$daemon" || break; sleep 0.1; done
        fi
    done
    if [ -e "$conf" ] && grep -qF "$mark" "$conf"; then rm "$conf"; fi
    rm -rf "$here"
    echo "Slurm is stopped."
}

status() {
    for daemon in munged slurmctld slurmd; do
        runs "$daemon" && echo "$daemon runs." || echo "$daemon does not run."
    done
    answers && sinfo || { echo "No node takes jobs."; return 1; }
}

case ${1:-} in
    start | stop | status) "$1" ;;
    *) refuse "Say start, stop or status." ;;
esac
