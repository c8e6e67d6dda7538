#!/bin/bash
# sbatch with the account, partition, time, GPUs and CPUs of launch/slurm/site.sh.
#
#   launch/slurm/submit.sh launch/slurm/train.sbatch configs/cifar10/fast.yaml
#   launch/slurm/submit.sh --nodes=4 launch/slurm/multinode.sbatch configs/cifar10/free.yaml
#   RANKS=2 launch/slurm/submit.sh launch/slurm/train.sbatch configs/cifar10/fast.yaml
#   launch/slurm/submit.sh --dry-run launch/slurm/train.sbatch configs/cifar10/fast.yaml
#
# Options before the script's name are sbatch's own and win over the site's. RANKS: so many GPUs
# (processes, where GPUS_PER_NODE is 0) a node instead of all. --dry-run, as the first option,
# prints the command.
set -u
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
ranks=${RANKS:-$((GPUS_PER_NODE > 0 ? GPUS_PER_NODE : RANKS_PER_NODE))}
command=(sbatch ${ACCOUNT:+--account="$ACCOUNT"} ${PARTITION:+--partition="$PARTITION"}
  ${TIME:+--time="$TIME"} --cpus-per-task=$((ranks * CPUS_PER_RANK)))
if [ "$GPUS_PER_NODE" != 0 ]; then command+=(--gpus-per-node="$ranks"); fi
command+=("${OPTIONS[@]}")
export DIST_ADV_SLURM=$here

if [ "${1:-}" = --dry-run ]; then
  shift
  command+=("$@")
  printf '%q ' "DIST_ADV_SLURM=$here" ${RANKS:+"RANKS=$RANKS"} "${command[@]}"
  echo
  exit
fi
command -v sbatch >/dev/null || die "no sbatch on this machine; run this on a node of the cluster"
said=$("${command[@]}" "$@" 2>&1) || die "${said//$'\n'/; } (options: $site)"
echo "$said"
