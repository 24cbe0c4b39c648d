#!/usr/bin/env bash
# GKE with XPK, TPU slices: bash scripts/launch/xpk.sh [more options of `xpk workload create`]
# The image is made with scripts/launch/Dockerfile; the storage was attached with `xpk storage attach`
# with the mount point /shared.
CLUSTER=my-cluster PROJECT=my-project ZONE=us-east5-b
TPU=v6e-16
IMAGE=us-docker.pkg.dev/my-project/my-repository/opd_jax:tpu
STORAGE=shared
CONFIG=configs/qwen3_8b.yaml
RUN_DIR=/shared/runs/qwen3_8b
set -euo pipefail

# XPK restarts after the exit codes 42 and 127 to 255, and after those given here; not after 2, which
# means that there is something to repair. It runs the command in a subshell and sends SIGTERM to that:
# `exec` makes it Python.
xpk workload create \
  --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE" \
  --workload=opd-jax --tpu-type="$TPU" --docker-image="$IMAGE" --storage="$STORAGE" \
  --max-restarts=50 --restart-on-exit-codes=1,4 --termination-grace-period-seconds=300 \
  --command="exec python -m opd_jax.main --config $CONFIG --distributed run_dir=$RUN_DIR compile_cache=/shared/compiled" \
  "$@"
