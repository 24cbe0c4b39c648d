#!/usr/bin/env bash
# A TPU slice of VMs, in the checkout: bash scripts/launch/tpu_vm.sh [start|stop|logs] [key=value ...]
# The slice exists (gcloud compute tpus queued-resources create ..., or tpu-vm create), and so does a file
# system that its hosts can mount: the NFS export of a Filestore instance, for example.
TPU=my-slice ZONE=us-east5-b
SHARED=10.0.0.2:/share  # mounted as /shared on every host
CONFIG=configs/qwen3_8b.yaml
RUN_DIR=/shared/runs/qwen3_8b
set -euo pipefail

everywhere() {
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"
}

copy() {
  scratch=$(mktemp -d)  # in $TMPDIR, which may lie in the checkout: an archive that reads itself fails
  trap 'rm -r "$scratch"' EXIT
  tar --exclude=.git --exclude=.venv --exclude=./runs --exclude="${scratch##*/}" \
    -czf "$scratch/opd_jax.tgz" .
  gcloud compute tpus tpu-vm scp "$scratch/opd_jax.tgz" "$TPU:" --zone="$ZONE" --worker=all
}

# The images of TPU VMs have an older Python than 3.11: uv brings one.
install='set -e
mkdir -p opd_jax && tar -xzf opd_jax.tgz -C opd_jax && cd opd_jax
[ -x ~/.local/bin/uv ] || curl -LsSf https://astral.sh/uv/install.sh | sh
~/.local/bin/uv venv --quiet --allow-existing --python 3.12 .venv
~/.local/bin/uv pip install --quiet --python .venv/bin/python -e ".[tpu]"
command -v mount.nfs >/dev/null || sudo apt-get install -qy nfs-common
mountpoint -q /shared || { sudo mkdir -p /shared && sudo mount -t nfs '$SHARED' /shared; }'

stop='sudo systemctl stop opd_jax 2>/dev/null; sudo systemctl reset-failed opd_jax 2>/dev/null; true'

# A service of systemd outlives this connection, gets SIGTERM when the host goes down, and starts again
# after a crash; not after exit code 2, which means that there is something to repair.
start="sudo systemd-run --unit=opd_jax --uid=\$USER --working-directory=\$HOME/opd_jax \
  --setenv=PYTHONUNBUFFERED=1 --property=Restart=on-failure --property=RestartPreventExitStatus=2 \
  --property=RestartSec=10 --property=StartLimitIntervalSec=1d --property=StartLimitBurst=20 \
  --property=TimeoutStopSec=300 --property=LimitNOFILE=65536 \
  \$HOME/opd_jax/.venv/bin/python -m opd_jax.main --config $CONFIG --distributed run_dir=$RUN_DIR"

action=${1:-start}
shift || true
case $action in
  start)
    copy
    everywhere "$install"
    everywhere "$stop"
    for word in "$@"; do start+=$(printf ' %q' "$word"); done
    everywhere "$start"
    ;;
  stop) everywhere "$stop" ;;
  logs) gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=0 \
    --command="sudo journalctl --unit=opd_jax --output=cat --lines=100 --follow" ;;
  *) echo "tpu_vm.sh: '$action': give start, stop or logs" >&2 && exit 2 ;;
esac
