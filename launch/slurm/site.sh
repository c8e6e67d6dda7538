# shellcheck shell=bash disable=SC2034,SC1091
# What a cluster has: edit once. Or keep a copy elsewhere and name it in the variable DIST_ADV_SITE.
# As it is, it does where there is a default partition with at least one GPU a node.

ACCOUNT=           # who pays; empty where the cluster does not ask
PARTITION=         # empty: the cluster's default
TIME=1-00:00:00    # after which a job is sent back to the queue, and goes on from there
GPUS_PER_NODE=1    # 0: no GPUs; gradients travel over gloo then
RANKS_PER_NODE=2   # processes a node where GPUS_PER_NODE is 0; with GPUs it is one for each
CPUS_PER_RANK=4
CONTAINER=         # an Apptainer image (.sif) that jobs run in; empty: in the environment below
OPTIONS=()         # more of sbatch, such as (--qos=long --mem=64G --constraint=a100)

# Called in the job, in the folder that it was submitted from, before anything else.
environment() {
  # module load cuda
  # export DIST_ADV_DATA=/scratch/$USER/data
  if [ -f .venv/bin/activate ]; then source .venv/bin/activate; fi
}
