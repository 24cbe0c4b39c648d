"""The role in gke_gpu.yaml allows what JAX asks of Kubernetes, and nothing else."""

import json

import launchers
from processes import run_python

ASK = """
import json, os, socket, sys, types
from types import SimpleNamespace as Some
calls = []
labels = {"job-name": "opd-jax-hosts-0"}
owner = Some(controller=True, kind="Job")
about = Some(labels=labels, owner_references=[owner], name="p")
pod = Some(metadata=about, spec=Some(subdomain="x"))
job = Some(
    metadata=Some(name="opd-jax-hosts-0", labels={"jobset.sigs.k8s.io/jobset-name": "opd-jax"}),
    spec=Some(parallelism=2),
)

class Api:
    def __getattr__(self, name):
        def call(*arguments, **options):
            calls.append(name)
            return {"list_namespaced_pod": Some(items=[pod]), "read_namespaced_job": job}[name]
        return call

client = Some(CoreV1Api=Api, BatchV1Api=Api, exceptions=Some(ApiException=OSError))
sys.modules["kubernetes"] = module = types.ModuleType("kubernetes")
module.client, module.config = client, Some(load_incluster_config=lambda: None)
os.environ.update(
    KUBERNETES_SERVICE_HOST="here", HOSTNAME="localhost", JOB_COMPLETION_INDEX="1"
)
from jax._src.clusters.k8s_cluster import K8sCluster
K8sCluster._namespace = classmethod(lambda cls: "default")
assert K8sCluster.is_env_present()
found = K8sCluster.get_coordinator_address(None, None), K8sCluster.get_process_count()
print(json.dumps([found, K8sCluster.get_process_id(), sorted({*calls})]))
"""
MEANS = {
    "list_namespaced_pod": ("", "pods", "list"),
    "read_namespaced_job": ("batch", "jobs", "get"),
}


def test_the_role_allows_what_jax_asks():
    [address, processes], rank, calls = json.loads(run_python(ASK))
    assert (address, processes, rank) == ("opd-jax-hosts-0-0.opd-jax:55527", 2, 1)
    jobset, account, role, binding = launchers.documents("gke_gpu.yaml")
    allowed = {
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert allowed == {MEANS[call] for call in calls}
    name = launchers.job_spec("gke_gpu.yaml")["template"]["spec"]["serviceAccountName"]
    assert name == account["metadata"]["name"] == binding["subjects"][0]["name"]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    # The address is made of these names.
    assert jobset["metadata"]["name"] == "opd-jax"
    assert jobset["spec"]["replicatedJobs"][0]["name"] == "hosts"
