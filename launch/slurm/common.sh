# shellcheck shell=bash
# What the scripts beside this one share; it is sourced, not run. It reads the site's file.

die() {
  echo "dist-adv: $*" >&2
  exit 2
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
site=${DIST_ADV_SITE:-$here/site.sh}
[ -f "$site" ] || die "$site: no such site file; copy $here/site.sh, or unset DIST_ADV_SITE"
CONTAINER= # site files of earlier versions do not name it
# shellcheck source=site.sh
source "$site"
for key in ACCOUNT PARTITION TIME GPUS_PER_NODE RANKS_PER_NODE CPUS_PER_RANK OPTIONS environment; do
  declare -p "$key" &>/dev/null || declare -F "$key" >/dev/null ||
    die "$site: $key is missing; see $here/site.sh"
done
[ -z "$CONTAINER" ] || [ -e "$CONTAINER" ] || die "$site: CONTAINER: $CONTAINER: no such image;" \
  "build it (see $(dirname "$here")/containers/dist-adv.def), or leave it empty"

# From here on: for batch scripts.

# Makes the environment ready, for launch/run.sh too.
prepare() {
  if [ "$GPUS_PER_NODE" = 0 ]; then
    NPROC=${RANKS:-$RANKS_PER_NODE}
  else
    NPROC=${SLURM_GPUS_ON_NODE:-0}
    [ "$NPROC" != 0 ] || die "this job has no GPU; submit it with launch/slurm/submit.sh, or give" \
      "sbatch --gpus-per-node=N, or set GPUS_PER_NODE=0 in $site"
  fi
  environment
  contain
  local threads=$((SLURM_CPUS_ON_NODE / NPROC))
  export NPROC OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
  # One task of an array: its job id may stand for the whole array.
  job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
  job=${job:-$SLURM_JOB_ID}
  say "start $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST, $NPROC process(es) a node"
}

# Sets `inside`, what comes before a command that runs in the image: nothing where there is none.
# Python and all packages are the image's own, variables those of the job. Of the node it sees what
# Apptainer shows by itself (the home folder, /tmp), the job's folder, these scripts, the images, and
# what environment() lists in APPTAINER_BIND.
contain() {
  inside=()
  [ -n "$CONTAINER" ] || return 0
  command -v apptainer >/dev/null || die "$site: CONTAINER: no apptainer on $(hostname);" \
    "load its module in environment()"
  inside=(apptainer exec)
  if [ "$GPUS_PER_NODE" != 0 ]; then inside+=(--nv); fi
  inside+=(-B "$PWD" -B "${here%/*}")
  if [[ ${DIST_ADV_DATA:-} == /* ]]; then
    mkdir -p "$DIST_ADV_DATA" || exit
    inside+=(-B "$DIST_ADV_DATA")
  fi
  inside+=("$CONTAINER")
  # Neither an interpreter of the node's nor packages in the home folder, for another Python.
  export PYTHON=python PYTHONNOUSERSITE=1
}

say() {
  echo "$(date +%FT%T) job $job: $*"
}

# The folder that `dist-adv train ARGUMENTS` writes to.
run_dir_of() {
  local config='' folder=''
  while [ $# -gt 0 ]; do
    case $1 in
      --run-dir) folder=${2:-} && shift ;;
      --run-dir=*) folder=${1#*=} ;;
      *.yaml | *.yml) config=$1 ;;
    esac
    shift
  done
  # What comes with dist-adv is found from any folder.
  if [[ $config == configs/* && ! -f $config && -f $here/../../$config ]]; then
    config=$here/../../$config
  fi
  [ -f "$config" ] || die "${config:-no configuration}: name one, such as configs/cifar10/fast.yaml"
  local name
  name=$(basename "$(dirname "$(realpath "$config")")")-$(basename "${config%.*}")
  folder=${folder/#\~\//$HOME/}  # as dist-adv reads it; bash leaves it alone behind a `=`
  echo "${folder:-runs/$name}"
}

# A port made of the job's number, or the first free one after it.
free_port() {
  local first=$((20000 + SLURM_JOB_ID % 10000)) port
  for port in $(seq $first $((first + 20))); do
    if ! (: <"/dev/tcp/localhost/$port") 2>/dev/null; then
      echo "$port"
      return
    fi
  done
  die "ports $first to $port of $(hostname) are in use; submit the job again"
}

# supervise RUN_DIR COMMAND...: runs a launcher and leaves with its exit status; where the run was
# asked to stop, the job goes back to the queue. Slurm itself sends it there when a node is lost.
supervise() {
  run_dir=$1
  local before launcher status=0
  shift
  rm -f "$run_dir/STOP" # asked of a start that had stopped already
  before=$(cat "$run_dir/status.json" 2>/dev/null)
  trap 'ask_to_stop USR1' USR1
  trap 'ask_to_stop TERM' TERM
  "$@" &
  launcher=$!
  while kill -0 "$launcher" 2>/dev/null; do wait "$launcher"; done # a signal ends `wait` too
  wait "$launcher" || status=$?
  trap '' USR1 TERM
  if [ "$status" != 0 ] && preempted_since "$before" && running; then requeue "stopped"; fi
  exit "$status"
}

# USR1 before the time limit, TERM before a job is killed. All ranks stop after the same batch.
ask_to_stop() {
  say "asked to stop ($1)"
  if [ -f "$run_dir/config.yaml" ]; then
    touch "$run_dir/STOP"
  elif running; then
    requeue "nothing to save yet"
  fi
}

# A job that was cancelled or sent back to the queue by others is not, for Slurm.
running() {
  scontrol show job "$job" | grep -q JobState=RUNNING
}

# preempted_since TEXT: does status.json say so, and was TEXT what it said before?
preempted_since() {
  local now
  now=$(cat "$run_dir/status.json" 2>/dev/null)
  [[ $now == *'"state": "preempted"'* && $now != "$1" ]]
}

requeue() {
  say "$1; back to the queue"
  if [ -f "$run_dir/config.yaml" ]; then echo "$job" >"$run_dir/slurm_job"; fi # for dist-adv status
  scontrol requeue "$job" && exit 0
  say "it is not taken; submit the same command again to go on"
  exit 1
}
