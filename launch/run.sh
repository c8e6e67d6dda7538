#!/usr/bin/env bash
# dist-adv on the machine this is: launch/run.sh --help
set -euo pipefail

usage() {
  cat <<'HELP'
Usage: launch/run.sh COMMAND [ARGUMENT]...

dist-adv COMMAND with as many processes as this machine is good for: one for each GPU, under
torchrun; else a single one with all CPU cores, which is as fast as several. Only `train`, `eval`
and `sweep --only` are work for many: every other command runs as one process.

  launch/run.sh train configs/digits/fast.yaml                  this machine
  NPROC=2 launch/run.sh train configs/digits/fast.yaml          two processes
  CUDA_VISIBLE_DEVICES=0,1 launch/run.sh train configs/cifar10/free.yaml
  launch/run.sh eval runs/cifar10-free --attacks pgd-50-10
  launch/run.sh doctor                                          what there is, what is missing

Two machines (the same code, and the run folder on a disk that both see):

  node-0:  NNODES=2 NODE_RANK=0 MASTER_ADDR=node-0 launch/run.sh train configs/cifar10/free.yaml
  node-1:  NNODES=2 NODE_RANK=1 MASTER_ADDR=node-0 launch/run.sh train configs/cifar10/free.yaml

Variables:
  NPROC            processes on this machine    [the number of GPUs, or 1]
  NNODES           machines                     [1]
  NODE_RANK        the number of this one; 0 has rank 0, which writes
  MASTER_ADDR      machine 0 as the others see it
  MASTER_PORT      a free port of machine 0     [29500]; keep below 32768
  OMP_NUM_THREADS  CPU threads a process        [the cores of this machine / NPROC]
  PYTHON           the interpreter              [of the active environment, else of .venv]

SIGTERM, SIGUSR1, Ctrl-C and a terminal that closes (SIGHUP) reach every rank: all stop after the
same batch, with a checkpoint, and the same command goes on. They have PET_SHUTDOWN_TIMEOUT seconds
for it [300]. Under nohup a terminal that closes changes nothing.
HELP
}

fail() {
  echo "run.sh: $*" >&2
  exit 2
}

is_count() { [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "$1: '$2' is no number of $3; write 1 or more"; }

case ${1-} in
  -h | --help) usage && exit ;;
  '') usage >&2 && exit 2 ;;
esac

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -z ${PYTHON-} ]]; then
  PYTHON=python
  if [[ -z ${VIRTUAL_ENV-}${CONDA_PREFIX-} && -x $root/.venv/bin/python ]]; then
    PYTHON=$root/.venv/bin/python
  fi
fi
command -v "$PYTHON" >/dev/null || fail "$PYTHON: no such interpreter; 'make setup', or set PYTHON"

# torch counts: it knows CUDA_VISIBLE_DEVICES, and whether the driver will do. It takes seconds.
gpus() {
  command -v nvidia-smi >/dev/null || { echo 0; return; }
  "$PYTHON" -c 'import torch; print(torch.cuda.device_count())'
}

nnodes=${NNODES:-1} nproc=1
is_count NNODES "$nnodes" machines
case " $* " in
  " train "* | " eval "* | " sweep "*"--only"*)
    found=${NPROC:-$(gpus)}
    [[ -z ${NPROC-} && $found == 0 ]] || nproc=$found
    ;;
  *) ((nnodes == 1)) || fail "NNODES: '$1' is no work for several machines; run it without" ;;
esac
is_count NPROC "$nproc" processes

cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > nproc ? cores / nproc : 1))}
# torchrun's agent kills its ranks 30 s after SIGTERM, and dies of SIGUSR1 unless told otherwise. It
# would end at SIGHUP under nohup, too, which has it ignored.
export PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-300}
hangup=SIGHUP,
[[ $(trap -p HUP) != "trap -- '' "* ]] || hangup=
export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,${hangup}SIGQUIT,SIGUSR1}

if ((nnodes == 1 && nproc == 1)); then
  exec "$PYTHON" -m dist_adv "$@"
fi
if ((nnodes == 1)); then
  meeting=(--standalone --local-addr localhost)  # the host may not know its own name
else
  rank=${NODE_RANK-} address=${MASTER_ADDR-} port=${MASTER_PORT:-29500}
  if ! [[ $rank =~ ^[0-9]+$ ]] || ((rank >= nnodes)); then
    fail "NODE_RANK: '$rank' is no number of a machine; write 0 to $((nnodes - 1))"
  fi
  [[ $address ]] || fail "MASTER_ADDR: not set; write the name of machine 0"
  getent ahosts "$address" >/dev/null ||
    fail "MASTER_ADDR: '$address' is not known to this machine; write a name or address that it is"
  is_count MASTER_PORT "$port" 'a port'
  ((port < 65536)) || fail "MASTER_PORT: $port is no port; write one below 32768"
  if ((rank == 0)) && (: <"/dev/tcp/$address/$port") 2>/dev/null; then
    fail "MASTER_PORT: $port is in use on $address; set another one, the same on every machine"
  fi
  meeting=(--nnodes "$nnodes" --node-rank "$rank" --master-addr "$address" --master-port "$port")
fi
exec "$PYTHON" -m torch.distributed.run "${meeting[@]}" --nproc-per-node "$nproc" -m dist_adv "$@"
