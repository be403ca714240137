"""The manifest that launch/make.py writes: held against Kubernetes' and JobSet's own schemas, and its commands run.

No cluster runs here. The Job and the ConfigMap are held against Kubernetes' schemas (kubernetes-validate, strict: an
unknown field is an error), JobSet's own fields against the models that Kubeflow generates from JobSet's Go types. What
a kubelet would do with the pods' commands and environment is done here by hand.
"""

import copy
import subprocess

import kubernetes_validate
import pytest
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet
from pydantic import ValidationError
from ruamel.yaml import YAML

from launch.local_s3 import free_ports
from tests.processes import ROOT, kill_tree

VERSIONS = ("1.31", "1.37")  # podFailurePolicy is stable from 1.31 on
POD = ("kubernetes", "--ranks-per-node=8", "--image=loader@sha256:0", "--memory-gib=512")
BUCKETS = ("source.uri=s3://models/llama", "output.checkpoint=s3://models/llama-dcp")
SITUATIONS = {
    "an init step, then training": ("--nodes=2", "--train=torchrun train.py --say 'a: b'", *BUCKETS),
    "training in the init step": ("--nodes=4", BUCKETS[0], "output.entrypoint=train:main"),
    "shards in memory": ("--nodes=2", "--train=torchrun train.py", BUCKETS[0], "output.local=/dev/shm/init"),
    "one node, no GPU": ("--train=torchrun train.py", "--gpus-per-node=0", *BUCKETS),
    "everything that can be given": (
        *("--nodes=2", "--train=torchrun train.py", "--gpus-per-node=4", "--name=llama-8b", "--train-image=trainer:1"),
        *("--shm-gib=100", "--cpus=64", "--service-account=loader", "--secret=bucket-keys", *BUCKETS),
    ),
}


@pytest.fixture
def manifest(make):
    def manifest(*arguments):
        (path,) = make(*POD, *arguments)
        return list(YAML(typ="safe", pure=True).load_all(path))

    return manifest


@pytest.fixture(params=SITUATIONS)
def situation(request, manifest):
    return manifest(*SITUATIONS[request.param])


def check(jobset):
    """Raise ValidationError, pydantic's for JobSet's own fields or Kubernetes' for those of the job in it."""
    parsed = JobsetV1alpha2JobSet.from_dict(jobset)
    for replicated in jobset["spec"]["replicatedJobs"]:
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "a"}, **replicated["template"]}
        for version in VERSIONS:
            kubernetes_validate.validate(job, version, strict=True)
    assert known(jobset) == known(parsed.to_dict())


def known(jobset):
    """JobSet's own fields: from_dict leaves out what it does not know."""
    own = copy.deepcopy(jobset)
    for replicated in own["spec"]["replicatedJobs"]:
        del replicated["template"]
    return own


def pod_of(jobset):
    (replicated,) = jobset["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]["template"]["spec"]


def test_the_schemas_accept_it(situation):
    config, jobset = situation
    for version in VERSIONS:
        kubernetes_validate.validate(config, version, strict=True)
    check(jobset)


def misspell(jobset, *path):
    *parents, name = path
    for key in parents:
        jobset = jobset[key]
    jobset[f"{name}s"] = jobset.pop(name)


JOB = ("spec", "replicatedJobs", 0, "template", "spec")


@pytest.mark.parametrize(
    "path",
    [
        ("spec", "network", "publishNotReadyAddresses"),
        ("spec", "failurePolicy", "rules", 0, "action"),
        ("spec", "replicatedJobs", 0, "replicas"),
        (*JOB, "completionMode"),
        (*JOB, "template", "spec", "volumes", 1, "emptyDir", "sizeLimit"),
        (*JOB, "template", "spec", "initContainers", 0, "env", 2, "valueFrom", "fieldRef"),
    ],
)
def test_the_schemas_see_a_field_that_is_misspelt(path, manifest):
    _, jobset = manifest(*SITUATIONS["everything that can be given"])
    misspell(jobset, *path)
    with pytest.raises((ValidationError, kubernetes_validate.ValidationError, AssertionError)):
        check(jobset)


def test_the_config_is_in_it_letter_by_letter(situation, config):
    assert situation[0]["data"] == {"cfg.yaml": config.read_text()}


def test_the_parts_fit_each_other(situation):
    config, jobset = situation
    pod, name = pod_of(jobset), jobset["metadata"]["name"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["config"]["configMap"]["name"] == config["metadata"]["name"]
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
    first, *others = [*pod.get("initContainers", []), *pod["containers"]]
    mounts = {mount["name"]: mount["mountPath"] for mount in first["volumeMounts"]}
    assert mounts.keys() == volumes.keys()
    assert mounts["shm"] == "/dev/shm"
    assert f"{mounts['config']}/cfg.yaml" in first["command"]
    replicated = jobset["spec"]["replicatedJobs"][0]["name"]
    assert environ_of(first, 0)["PET_MASTER_ADDR"] == f"{name}-{replicated}-0-0.{name}"  # JobSet's naming
    for other in others:
        for alike in ("env", "envFrom", "resources", "volumeMounts", "securityContext"):
            assert other.get(alike) == first.get(alike)


def test_what_was_given_is_where_it_belongs(manifest):
    _, jobset = manifest(*SITUATIONS["everything that can be given"])
    pod = pod_of(jobset)
    (init,), (train,) = pod["initContainers"], pod["containers"]
    assert (init["image"], train["image"]) == ("loader@sha256:0", "trainer:1")
    assert pod["serviceAccountName"] == "loader"
    assert init["envFrom"] == [{"secretRef": {"name": "bucket-keys"}}]
    assert init["resources"]["limits"] == {"nvidia.com/gpu": 4, "memory": "512Gi"}
    assert init["resources"]["requests"] == {"cpu": 64, "memory": "512Gi"}
    assert pod["volumes"][1]["emptyDir"]["sizeLimit"] == "100Gi"


def test_a_training_command_keeps_its_words(manifest):
    _, jobset = manifest(*SITUATIONS["an init step, then training"])
    assert pod_of(jobset)["containers"][0]["command"] == ["torchrun", "train.py", "--say", "a: b"]


def environ_of(container, index):
    """What the pod of that index has in its environment."""
    annotations = {"metadata.annotations['batch.kubernetes.io/job-completion-index']": str(index)}
    return {
        each["name"]: each["value"] if "value" in each else annotations[each["valueFrom"]["fieldRef"]["fieldPath"]]
        for each in container["env"]
    }


def test_the_containers_hand_the_shards_over_rank_for_rank(manifest, checkpoint, environ, s3, in_memory, tmp_path):
    """Each pod's containers one after the other, as a kubelet starts them; the config where they look for it.

    Both pods are this machine, and share a directory, which holds a file for each rank.
    """
    config, jobset = manifest(
        *("--config", str(ROOT / "configs/llama-local.yaml"), "--nodes=2", "--ranks-per-node=2"),
        *(f"source.uri={s3.put(checkpoint)}", f"output.local={in_memory}", "read.memory_budget=64MiB"),
        *("--train", f"torchrun {ROOT}/configs/train_local.py {in_memory}"),
    )
    (tmp_path / "cfg.yaml").write_text(config["data"]["cfg.yaml"])
    pod = pod_of(jobset)
    for container in [*pod["initContainers"], *pod["containers"]]:
        start_and_wait(container, tmp_path, environ)
        told = (tmp_path / f"{container['name']}-0").read_text()
    assert "step 2 loss" in told  # after it had compared the fingerprint
    assert not in_memory.exists()


def start_and_wait(container, directory, environ):
    """Start `container` of both pods, where the config lies in `directory`, as does what they print; both end well."""
    here = {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(free_ports(1)[0])}
    command = [str(directory / "cfg.yaml") if word == "/etc/loader/cfg.yaml" else word for word in container["command"]]
    logs = [directory / f"{container['name']}-{index}" for index in range(2)]
    pods = [
        subprocess.Popen(
            command,
            cwd=directory,
            env={**environ, **environ_of(container, index), **here},
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        )
        for index, log in enumerate(logs)
    ]
    try:
        assert [process.wait(140) for process in pods] == [0, 0], "".join(log.read_text() for log in logs)
    finally:
        for process in pods:
            kill_tree(process.pid)
