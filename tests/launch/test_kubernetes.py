"""`launch/kubernetes.yaml`: a RayJob as KubeRay knows it, with the nodes and GPUs that the plan uses."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from asyncrl.cli.launch import _parse
from asyncrl.plan.load import load
from asyncrl.plan.resources import assign

MANIFEST = Path(__file__).parents[2] / "launch" / "kubernetes.yaml"
QUANTITY = re.compile(r"\d+(Ki|Mi|Gi|Ti|m)?")
FIELDS = {
    "": {"apiVersion", "kind", "metadata", "spec"},
    "spec": {
        *("activeDeadlineSeconds", "backoffLimit", "clusterSelector", "deletionStrategy", "entrypoint"),
        *("entrypointNumCpus", "entrypointNumGpus", "entrypointResources", "jobId", "managedBy", "metadata"),
        *("preRunningDeadlineSeconds", "rayClusterSpec", "runtimeEnvYAML", "shutdownAfterJobFinishes"),
        *("submissionMode", "submitterConfig", "submitterPodTemplate", "suspend", "ttlSecondsAfterFinished"),
    },
    "rayClusterSpec": {"rayVersion", "headGroupSpec", "workerGroupSpecs", "suspend", "autoscalerOptions"},
    "headGroupSpec": {"rayStartParams", "template", "serviceType", "resources", "labels"},
    "workerGroupSpecs": {
        *("groupName", "replicas", "minReplicas", "maxReplicas", "numOfHosts", "rayStartParams", "template"),
        *("resources", "labels"),
    },
}
"""Of a RayJob, v1, by where they are (KubeRay 1.7.0)."""


@pytest.fixture(scope="module")
def job():
    return yaml.safe_load(MANIFEST.read_text())


def test_it_has_the_fields_of_a_ray_job_and_no_others(job):
    cluster = job["spec"]["rayClusterSpec"]
    head, workers = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    places = {"": job, "spec": job["spec"], "rayClusterSpec": cluster, "headGroupSpec": head}
    for where, found in [*places.items(), *(("workerGroupSpecs", group) for group in workers)]:
        assert found.keys() <= FIELDS[where], where
    for group in (head, *workers):
        assert group.keys() >= {"template", "rayStartParams"}
        pod = group["template"]["spec"]
        [container] = pod["containers"]
        assert re.fullmatch(r"[\w.-]+(/[\w.-]+)+:[\w.-]+", container["image"])
        assert all(QUANTITY.fullmatch(str(n)) for n in container["resources"]["limits"].values())
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounted.keys() == {volume["name"] for volume in pod["volumes"]}
        [memory] = [v for v in pod["volumes"] if "emptyDir" in v]
        assert mounted[memory["name"]] == "/dev/shm"
        assert QUANTITY.fullmatch(memory["emptyDir"]["sizeLimit"])


def test_its_pods_have_what_the_plan_uses(job):
    command, *words = shlex.split(job["spec"]["entrypoint"])
    assert command == "asyncrl-launch"
    asked = _parse(words)
    cluster = job["spec"]["rayClusterSpec"]
    [workers] = cluster["workerGroupSpecs"]
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"] == asked.nodes - 1
    pods = [cluster["headGroupSpec"], *[workers] * workers["replicas"]]
    limits = [pod["template"]["spec"]["containers"][0]["resources"]["limits"] for pod in pods]
    gpus = [limit["nvidia.com/gpu"] for limit in limits]
    assert sum(gpus) == asked.gpus
    config = load(asked.config, asked.overrides)
    placement = assign(config, asked.gpus, sum(gpus), nodes=asked.nodes)
    assert placement.idle_gpus == 0
    for node, has in enumerate(gpus):
        used = {gpu for p in placement.places if p.node == node for gpu in placement.gpus_on_node(p)}
        assert used == set(range(has))
    [mount] = {m["mountPath"] for pod in pods for m in _mounts(pod) if m["name"] == "shared"}
    assert config.run.dir.startswith(f"{mount}/")
    assert config.run.resume == "auto"  # or a new cluster would begin anew


def _mounts(pod):
    return pod["template"]["spec"]["containers"][0]["volumeMounts"]
