#!/usr/bin/env bash
# A SLURM cluster of this one machine, to try `make reproduce CLUSTER=slurm`. For Debian and its relatives, as root:
#   scripts/slurm_single_node.sh start    install what is missing, write slurm.conf, start munge, controller and node
#   scripts/slurm_single_node.sh stop     end its jobs and the three daemons, remove what start wrote; the packages stay
# It keeps no accounts, so Snakemake has to be told to ask squeue (README, "On a cluster").
set -euo pipefail

readonly CONF=/etc/slurm/slurm.conf  # the place where jobs look too: they do not inherit SLURM_CONF
readonly STATE=/var/spool/catto-slurm
readonly MARK="# written by catto, scripts/slurm_single_node.sh"

refuse() { echo "slurm_single_node: $*" >&2; exit 1; }

install_packages() {
    command -v slurmctld slurmd sbatch munged > /dev/null && return
    local apt=(apt-get -qq -o Acquire::Retries=1 -o Acquire::http::Timeout=20)
    export DEBIAN_FRONTEND=noninteractive
    { "${apt[@]}" update && "${apt[@]}" install -y --no-install-recommends slurmctld slurmd slurm-client munge; } > "$STATE/apt.log" 2>&1 ||
        refuse "apt-get could not install slurmctld, slurmd, slurm-client and munge: $(tail -n 3 "$STATE/apt.log")"
}

start_munge() {
    munge -n > /dev/null 2>&1 && return  # there is one, and it is not ours to stop
    [ -s /etc/munge/munge.key ] || (umask 077 && head -c 1024 /dev/urandom > /etc/munge/munge.key)
    chown munge: /etc/munge/munge.key
    install -d -o munge -g munge -m 755 /run/munge
    runuser -u munge -- "$(command -v munged)"
    touch "$STATE/munge-is-ours"
}

write_conf() {
    local name hardware
    name=$(hostname -s)
    hardware=$(slurmd -C | grep -oE "(CPUs|RealMemory)=[0-9]+" | paste -sd " ")
    cat > "$CONF" << END
$MARK
ClusterName=catto
SlurmctldHost=$name(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
StateSaveLocation=$STATE/controller
SlurmdSpoolDir=$STATE/node
SlurmctldPidFile=$STATE/slurmctld.pid
SlurmdPidFile=$STATE/slurmd.pid
SlurmctldLogFile=$STATE/slurmctld.log
SlurmdLogFile=$STATE/slurmd.log
NodeName=$name NodeAddr=127.0.0.1 $hardware
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
}

ours() { [ "$(head -n 1 "$CONF" 2> /dev/null)" = "$MARK" ]; }

runs() { grep -qs "^State:[[:space:]]*[^Z]" "/proc/$1/status"; }  # a process that has ended may stay as a zombie

end_daemon() {  # file with its process id
    local pid
    pid=$(cat "$1" 2> /dev/null) && kill "$pid" 2> /dev/null || return 0
    for _ in $(seq 100); do runs "$pid" || return 0; sleep 0.1; done
    kill -9 "$pid"
}

start() {
    [ ! -e "$CONF" ] || ours || refuse "$CONF is there and not from here: this machine belongs to a cluster, and nothing was changed"
    mkdir -p "$STATE"
    install_packages
    stop > /dev/null
    mkdir -p "$STATE/controller" "$STATE/node" "$(dirname "$CONF")"
    start_munge
    write_conf
    slurmctld
    slurmd
    for _ in $(seq 30); do
        [ "$(sinfo --noheader --format=%T 2> /dev/null)" = idle ] && { echo "one SLURM node, idle"; return; }
        sleep 1
    done
    refuse "the node is not idle after 30 s; the logs are in $STATE"
}

stop() {
    ours || { echo "no cluster of ours"; return; }
    if squeue --noheader > /dev/null 2>&1; then
        scancel --user=root
        for _ in $(seq 40); do [ -z "$(squeue --noheader)" ] && break; sleep 1; done
    fi
    end_daemon "$STATE/slurmd.pid"
    end_daemon "$STATE/slurmctld.pid"
    [ ! -e "$STATE/munge-is-ours" ] || end_daemon /run/munge/munged.pid
    rm -rf "$CONF" "$STATE"
    echo "stopped"
}

[ "$(id -u)" = 0 ] || refuse "only root can set up SLURM"
command -v apt-get > /dev/null || refuse "needs apt-get, of Debian and its relatives"
case "${1:-}" in
    start | stop) "$1" ;;
    *) refuse "start or stop is accepted, not '${1:-}'" ;;
esac
