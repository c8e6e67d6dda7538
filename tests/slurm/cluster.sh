#!/bin/bash
# A throw-away Slurm cluster of two nodes on this machine, without systemd: munged, slurmctld and
# two slurmd. Needs root and Debian's slurm-wlm, which is installed where it is missing.
#
#   tests/slurm/cluster.sh up DIR PORT     slurmctld at PORT, the nodes at the two ports after it
#   export SLURM_CONF=DIR/slurm.conf       then sbatch, squeue and scontrol are this cluster's
#   tests/slurm/cluster.sh node DIR n2     start the slurmd of a node that was killed
#   tests/slurm/cluster.sh down DIR        end all jobs and daemons, delete DIR
#
# Exit status 77: cannot be had on this machine, and why.
set -euo pipefail

dir=$(realpath -m "$2")
export SLURM_CONF=$dir/slurm.conf
export PATH=$PATH:/usr/sbin:/sbin # where the daemons are, and which not everybody has there

cannot() {
  echo "$*" >&2
  exit 77
}

# proctrack/cgroup is what clusters have: a signal reaches there what it reaches here. linuxproc is
# for where cgroups cannot be written.
configure() {
  local port=$1 proctrack=linuxproc host
  host=$(hostname -s)
  if [ -w /sys/fs/cgroup/freezer ]; then proctrack=cgroup; fi
  cat >"$dir/slurm.conf" <<EOF
ClusterName=test
# Two clusters on one machine share its cgroups, which are named after jobs.
FirstJobId=$((port * 100))
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire: a requeued job waits until its old credentials have expired.
AuthInfo=socket=$dir/munge/socket,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool.%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmctldLogFile=$dir/log/slurmctld
SlurmdLogFile=$dir/log/slurmd.%n
ProctrackType=proctrack/$proctrack
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
EnforcePartLimits=ALL
KillWait=20
MinJobAge=3600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=1,sched_interval=1
GresTypes=gpu
NodeName=DEFAULT CPUs=8 RealMemory=2000 Gres=gpu:2
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1))
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 2))
PartitionName=main Nodes=n[1-2] Default=YES GraceTime=60
PartitionName=paid Nodes=n[1-2] AllowAccounts=team
PartitionName=urgent Nodes=n[1-2] PriorityTier=2
EOF
  echo CgroupPlugin=cgroup/v1 >"$dir/cgroup.conf"
  printf 'Name=gpu File=%s\n' /dev/null /dev/zero >"$dir/gres.conf" # GPUs in name only
  { cat /etc/hosts && echo 127.0.0.1 n1 n2; } >"$dir/hosts"
}

# Its jobs see a file of hosts in which the nodes' names are those of this machine.
node() {
  mkdir -p "$dir/spool.$1"
  # shellcheck disable=SC2016
  unshare --mount bash -c 'mount --bind "$1/hosts" /etc/hosts && exec slurmd -N "$2"' \
    slurmd "$dir" "$1"
}

up() {
  [ "$(id -u)" = 0 ] || cannot "a cluster needs root"
  unshare --mount true 2>/dev/null || cannot "a cluster needs mount namespaces (CAP_SYS_ADMIN)"
  mkdir -p "$dir"/{state,log,munge}
  chmod 755 "$dir"
  "$(dirname "$0")/../support/debian_packages.sh" "slurmctld slurmd munged" slurm-wlm munge
  configure "$1"
  (umask 077 && head -c 128 /dev/urandom >"$dir/munge/key")
  munged --force --key-file="$dir/munge/key" --socket="$dir/munge/socket" \
    --pid-file="$dir/munged.pid" --log-file="$dir/log/munged" --seed-file="$dir/munge/seed"
  slurmctld
  node n1
  node n2
  for _ in $(seq 200); do
    if [ "$(sinfo --noheader --Node --partition=main --format=%t)" = $'idle\nidle' ]; then return; fi
    sleep 0.1
  done
  sinfo --Node --long
  return 1
}

down() {
  scancel --user=root 2>/dev/null || true
  for _ in $(seq 300); do
    if ! squeue --noheader --format=%t 2>/dev/null | grep -qE 'R|CG'; then break; fi
    sleep 0.1
  done
  local pids
  mapfile -t pids < <(cat "$dir"/slurmd.*.pid "$dir"/{slurmctld,munged}.pid 2>/dev/null)
  kill "${pids[@]}" 2>/dev/null || true
  for _ in $(seq 100); do
    if ! kill -0 "${pids[@]}" 2>/dev/null; then break; fi
    sleep 0.1
  done
  rm -rf "$dir"
}

case $1 in
  up) up "$3" ;;
  node) node "$3" ;;
  down) down ;;
esac
