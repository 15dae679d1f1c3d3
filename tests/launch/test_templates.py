"""The templates, filled: shell that parses, YAML in the published shapes, every value whole."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from dsplugins.launching.job import LONGEST_NAME, Cluster, Job, job_name
from dsplugins.launching.templates import SIGNALS, fill, template_folder
from dsplugins.wishes import STOPS

NASTY = """a 'b' "c" $HOME `id` \\ {d} #e: f"""
SHELL = ["slurm_torchrun.sbatch", "slurm_srun.sbatch", "torchrun.txt"]
# Fields that are in https://github.com/kubeflow/trainer, pkg/apis/trainer/v1alpha1/trainjob_types.go
# (0015772c) and trainingruntime_types.go, and in https://github.com/kubernetes-sigs/jobset,
# api/jobset/v1alpha2/jobset_types.go (0336a8fd); Job and Pod: the parts of batch/v1 and v1 that we use.
# "*": each of a list; "?": any fields below.
POD = {
    "restartPolicy": None,
    "terminationGracePeriodSeconds": None,
    "containers": {
        "*": {
            **dict.fromkeys(["name", "image", "workingDir", "command", "args"]),
            "env": {"*": {"name": None, "value": None, "valueFrom": {"fieldRef": {"fieldPath": None}}}},
            "resources": {"limits": "?", "requests": "?"},
            "volumeMounts": {"*": {"name": None, "mountPath": None}},
        }
    },
    "volumes": {
        "*": {"name": None, "persistentVolumeClaim": {"claimName": None}, "emptyDir": {"medium": None}}
    },
}
RULE = {
    "action": None,
    "onExitCodes": {"containerName": None, "operator": None, "values": None},
    "onPodConditions": {"*": {"type": None, "status": None}},
}
JOB = {
    **dict.fromkeys(["completionMode", "completions", "parallelism", "backoffLimit"]),
    "podFailurePolicy": {"rules": {"*": RULE}},
    "template": {"metadata": "?", "spec": POD},
}
JOBSET_SPEC = {
    "network": dict.fromkeys(["enableDNSHostnames", "subdomain", "publishNotReadyAddresses"]),
    "failurePolicy": {
        "maxRestarts": None,
        "restartStrategy": None,
        "rules": {
            "*": dict.fromkeys(
                [
                    *("name", "action", "onJobFailureReasons", "onJobFailureMessagePatterns"),
                    "targetReplicatedJobs",
                ]
            )
        },
    },
    "replicatedJobs": {
        "*": {
            **dict.fromkeys(["name", "groupName", "replicas"]),
            "template": {"metadata": "?", "spec": JOB},
        }
    },
}
TOP = {"apiVersion": None, "kind": None, "metadata": {"name": None, "namespace": None, "labels": "?"}}
SHAPES = {
    "JobSet": {**TOP, "spec": JOBSET_SPEC},
    "TrainingRuntime": {
        **TOP,
        "spec": {
            "mlPolicy": {"numNodes": None, "torch": {}},
            "template": {"metadata": "?", "spec": JOBSET_SPEC},
        },
    },
    "TrainJob": {
        **TOP,
        "spec": {
            "runtimeRef": dict.fromkeys(["name", "apiGroup", "kind"]),
            "trainer": dict.fromkeys(
                ["image", "command", "args", "env", "numNodes", "resourcesPerNode", "numProcPerNode"]
            ),
        },
    },
}


def job(**rest):
    cluster = Cluster(nodes=2, image="registry/image:1", shared="/data", claim="my-claim", namespace="ns")
    return Job(
        name="a-run",
        cluster=cluster,
        processes=8,
        gpus=8,
        python="python",
        folder=NASTY,
        run_directory=NASTY,
        train=("-m", "dsplugins", "train", "a.yaml", NASTY),
        environment={"NEEDED": NASTY},
        **rest,
    )


def unknown(given, shape, path=""):
    """Paths of the fields that the shape doesn't have."""
    if shape == "?" or shape is None:
        return []
    if isinstance(given, list):
        return [bad for i, each in enumerate(given) for bad in unknown(each, shape["*"], f"{path}[{i}]")]
    bad = [f"{path}.{key}" for key in given if key not in shape]
    return bad + [
        b for key in given if key in shape for b in unknown(given[key], shape[key], f"{path}.{key}")
    ]


def documents(template):
    return {each["kind"]: each for each in yaml.safe_load_all(fill(template, job()))}


def jobset_spec(template):
    found = documents(template)
    if "JobSet" in found:
        return found["JobSet"]["spec"]
    return found["TrainingRuntime"]["spec"]["template"]["spec"]


def test_every_template_is_looked_at_here():
    included = {"slurm.sbatch", "slurm_asked.sbatch", "slurm_ended.sbatch", "jobset_spec.yaml"}
    files = {file.name for file in template_folder().iterdir() if file.suffix != ".sh"}
    assert files == {*SHELL, "trainjob.yaml", "jobset.yaml"} | included


@pytest.mark.parametrize("template", SHELL)
def test_shell_parses(template, tmp_path):
    file = tmp_path / template
    file.write_text(fill(template, job()))
    subprocess.run(["bash", "-n", file], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--shell=bash", "--exclude=SC2164", file], check=True)


def test_torchrun_gets_every_word_whole(tmp_path):
    """The lines are run with a torchrun that only tells its arguments."""
    folder = tmp_path / "it's here"
    folder.mkdir()
    program = tmp_path / "python"
    program.write_text('#!/bin/bash\nprintf "%s\\n" "$@" "NEEDED=$NEEDED"\n')
    program.chmod(0o755)
    text = fill("torchrun.txt", job()).replace(f"cd {shlex.quote(NASTY)}", f"cd {shlex.quote(str(folder))}")
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "MASTER_ADDR": "first"}
    done = subprocess.run(["bash", "-euc", text], env=environment, capture_output=True, text=True, check=True)
    first, second = (part.splitlines() for part in done.stdout.split("-m\ntorch.distributed.run\n")[1:])
    options = [
        "--nnodes=2",
        "--nproc-per-node=8",
        "--node-rank=1",
        "--master-addr=first",
        "--master-port=29500",
    ]
    assert second == [*options, "-m", "dsplugins", "train", "a.yaml", NASTY, f"NEEDED={NASTY}"]
    assert first[2] == "--node-rank=0"


def test_torchrun_asks_for_the_first_node():
    done = subprocess.run(["bash", "-c", fill("torchrun.txt", job())], capture_output=True, text=True)
    assert done.returncode and "MASTER_ADDR: name or address of node 0" in done.stderr


@pytest.mark.parametrize(("template", "kinds"), [("trainjob.yaml", 2), ("jobset.yaml", 1)])
def test_kubernetes_shapes(template, kinds):
    found = documents(template)
    assert len(found) == kinds
    for kind, document in found.items():
        assert not unknown(document, SHAPES[kind])
        assert document["metadata"]["name"] == "a-run" and document["metadata"]["namespace"] == "ns"


# A Service's name in https://github.com/kubernetes/apimachinery, pkg/util/validation (IsDNS1035Label); JobSet
# asks it of its own name, which the host names of the pods begin with.
LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        ("tiny", "tiny"),
        ("V3_671B", "v3-671b"),
        ("671b", "run-671b"),
        ("123", "run-123"),
        ("1e3", "run-1e3"),
        ("true", "true"),
        ("null", "null"),
        ("_a..b_", "a-b"),
        ("\u4e00", "run"),
        ("a" * (LONGEST_NAME - 1) + "_b", "a" * (LONGEST_NAME - 1)),
    ],
)
def test_names_are_labels_and_text(recipe, name):
    assert job_name(recipe) == name and LABEL.fullmatch(name)
    named = replace(job(), name=job_name(recipe), cluster=replace(job().cluster, namespace="123"))
    for template in ("trainjob.yaml", "jobset.yaml"):
        for each in yaml.safe_load_all(fill(template, named)):
            assert (each["metadata"]["name"], each["metadata"]["namespace"]) == (name, "123")
            assert each["spec"].get("runtimeRef", {}).get("name", name) == name


def test_a_field_that_is_not_published_is_found():
    wrong = {"spec": {"failurePolicy": {"rules": [{"onExitCodes": []}]}}}
    assert unknown(wrong, SHAPES["JobSet"]) == [".spec.failurePolicy.rules[0].onExitCodes"]


@pytest.mark.parametrize("template", ["trainjob.yaml", "jobset.yaml"])
def test_pods(template):
    spec = jobset_spec(template)
    (replicated,) = spec["replicatedJobs"]
    work, pod = replicated["template"]["spec"], replicated["template"]["spec"]["template"]["spec"]
    assert (work["completions"], work["parallelism"], work["completionMode"]) == (2, 2, "Indexed")
    # A pod failure policy is refused with any other restart policy.
    assert work["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    (container,) = pod["containers"]
    assert spec["network"] == {"enableDNSHostnames": True}
    nasty = NASTY.replace("$", "$$")  # Kubernetes would take $(HOME) for a variable, and $$ for a dollar
    assert container["command"][2:4] == ["dsplugins.launching.pod", nasty]
    assert container["args"] == ["-m", "dsplugins", "train", "a.yaml", nasty]
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert environment["NEEDED"] == nasty
    assert int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"shared": "/data", "shm": "/dev/shm"}
    shared, shm = pod["volumes"]
    assert shared == {"name": "shared", "persistentVolumeClaim": {"claimName": "my-claim"}}
    assert shm == {"name": "shm", "emptyDir": {"medium": "Memory"}}


@pytest.mark.parametrize("template", ["trainjob.yaml", "jobset.yaml"])
def test_which_pods_are_started_again(template):
    """As often as it takes after 75 and an eviction, never after 2, 3 and 4, else up to maxRestarts."""
    spec = jobset_spec(template)
    (replicated,) = spec["replicatedJobs"]
    name = replicated["template"]["spec"]["template"]["spec"]["containers"][0]["name"]
    container = f"Container {name} for pod ns/a-run-node-0-1-x failed with exit code"
    evicted = {"type": "DisruptionTarget", "status": "True"}
    policy = spec["failurePolicy"]
    assert policy["maxRestarts"] == 3
    for code, condition, message, action in [
        (75, None, f"{container} 75 matching FailJob rule at index 0", "RestartJobSetAndIgnoreMaxRestarts"),
        (1, evicted, EVICTED, "RestartJobSetAndIgnoreMaxRestarts"),
        (2, None, f"{container} 2 matching FailJob rule at index 2", "FailJobSet"),
        (3, None, f"{container} 3 matching FailJob rule at index 2", "FailJobSet"),
        (4, None, f"{container} 4 matching FailJob rule at index 2", "FailJobSet"),
        (1, None, None, "RestartJobSet"),
        (137, None, None, "RestartJobSet"),
    ]:
        said = failure(replicated["template"]["spec"], name, code, condition)
        assert said == message
        assert decided(policy, said) == action


EVICTED = "Pod ns/a-run-node-0-1-x has condition DisruptionTarget matching FailJob rule at index 1"


def failure(work, name, code, condition):
    """What the Job's condition says; None where no rule of the pod's matches, only the limit of backoffs.

    The texts: https://github.com/kubernetes/kubernetes, pkg/controller/job/pod_failure_policy.go.
    """
    for index, rule in enumerate(work["podFailurePolicy"]["rules"]):
        exits = rule.get("onExitCodes")
        assert rule["action"] == "FailJob"
        if exits and exits["containerName"] == name and exits["operator"] == "In" and code in exits["values"]:
            said = f"Container {name} for pod ns/a-run-node-0-1-x failed with exit code {code}"
        elif condition in rule.get("onPodConditions", []):
            said = f"Pod ns/a-run-node-0-1-x has condition {condition['type']}"
        else:
            continue
        return f"{said} matching FailJob rule at index {index}"
    return None


def decided(policy, message):
    """The action of the first rule that matches, else what JobSet does without one.

    As https://github.com/kubernetes-sigs/jobset, pkg/controllers/failure_policy.go, has it.
    """
    reason = "PodFailurePolicy" if message else "BackoffLimitExceeded"
    for rule in policy["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(p, message or "") for p in patterns):
            return rule["action"]
    return "RestartJobSet"


def test_trainjob_refers_to_its_runtime():
    """Kubeflow finds what to fill in by a label and the name `node`, and sets its PET_ variables itself."""
    found = documents("trainjob.yaml")
    spec = found["TrainJob"]["spec"]
    assert found["TrainingRuntime"]["metadata"]["labels"] == {"trainer.kubeflow.org/framework": "torch"}
    assert found["TrainingRuntime"]["spec"]["mlPolicy"] == {"numNodes": 2, "torch": {}}
    assert spec["runtimeRef"] == {
        "apiGroup": "trainer.kubeflow.org",
        "kind": "TrainingRuntime",
        "name": found["TrainingRuntime"]["metadata"]["name"],
    }
    assert spec["trainer"] == {"numNodes": 2, "numProcPerNode": 8}
    (replicated,) = found["TrainingRuntime"]["spec"]["template"]["spec"]["replicatedJobs"]
    assert replicated["name"] == "node"
    assert replicated["template"]["metadata"]["labels"] == {
        "trainer.kubeflow.org/trainjob-ancestor-step": "trainer"
    }
    (container,) = replicated["template"]["spec"]["template"]["spec"]["containers"]
    assert container["name"] == "node"
    ours = [entry["name"] for entry in container["env"] if entry["name"].startswith("PET_")]
    assert ours == ["PET_SIGNALS_TO_HANDLE"]


def test_jobset_gives_static_ranks():
    (replicated,) = documents("jobset.yaml")["JobSet"]["spec"]["replicatedJobs"]
    (container,) = replicated["template"]["spec"]["template"]["spec"]["containers"]
    told = {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container["env"]}
    # <JobSet>-<replicated job>-<job>-<pod>.<subdomain, which is the JobSet's name>
    assert told["PET_MASTER_ADDR"] == "a-run-node-0-0.a-run"
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert told["PET_NODE_RANK"] == {"fieldRef": {"fieldPath": index}}
    assert (told["PET_NNODES"], told["PET_NPROC_PER_NODE"]) == ("2", "8")


def test_torchrun_knows_those_variables(monkeypatch):
    from torch.distributed.run import get_args_parser

    told = {
        "SIGNALS_TO_HANDLE": SIGNALS,
        "NNODES": "2",
        "NPROC_PER_NODE": "8",
        "NODE_RANK": "1",
        "MASTER_ADDR": "first",
        "MASTER_PORT": "7",
    }
    for name, value in told.items():
        monkeypatch.setenv(f"PET_{name}", value)
    found = get_args_parser().parse_args(["-m", "dsplugins", "train"])
    assert (found.nnodes, found.nproc_per_node, found.node_rank) == ("2", "8", 1)
    assert (found.master_addr, found.master_port, found.rdzv_backend) == ("first", 7, "static")
    assert found.signals_to_handle == SIGNALS


def test_torchrun_hands_on_every_signal_that_asks_a_run_to_save():
    names = SIGNALS.split(",")
    assert {number.name for number in STOPS} <= set(names)
    environment = fill("slurm_torchrun.sbatch", job()), fill("torchrun.txt", job())
    assert all(f" PET_SIGNALS_TO_HANDLE={SIGNALS}\n" in text for text in environment)


def test_templates_are_short():
    for file in Path(template_folder()).iterdir():
        if file.suffix != ".sh":
            assert len(file.read_text().splitlines()) <= 80, file
