"""Runs that a cluster restarts by itself: the JobSet of GKE and the job of Slurm."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GKE = (
    "l7",
    "--backend",
    "gke",
    "--tpu",
    "v5e-16",
    "--zone",
    "us-west4-a",
    "--project",
    "p",
    "--cluster",
    "c",
    "--poll",
    "0.01",
)
IMAGE = ("--image", "img:1")
SLURM = ("l7", "--backend", "slurm", "--nodes", "2")


def parsed(text: str):
    """What the rendered YAML says: blocks by indentation, lists of blocks, and scalars that are JSON or plain words."""
    rows = [row for row in text.splitlines() if row.strip() and not row.lstrip().startswith("#")]

    def scalar(word: str):
        try:
            return json.loads(word)
        except json.JSONDecodeError:
            assert not set(word) & set("\"'[]{}&*#|>%@`"), f"{word} is no plain word"
            return word

    def block(indent: int):
        found = None
        while rows and len(rows[0]) - len(rows[0].lstrip()) == indent:
            word = rows[0].strip()
            if word.startswith("- "):
                rows[0] = " " * (indent + 2) + word[2:]
                found = [
                    *(found or []),
                    block(indent + 2) if ": " in word or word.endswith(":") else scalar(rows.pop(0).strip()),
                ]
                continue
            key, _, value = rows.pop(0).strip().partition(":")
            deeper = len(rows[0]) - len(rows[0].lstrip()) if rows else 0
            inside = deeper > indent or (rows and deeper == indent and rows[0].lstrip().startswith("- "))
            assert key not in (found or {}), f"{key} twice"
            found = {
                **(found or {}),
                key: scalar(value.strip()) if value.strip() else block(deeper) if inside else None,
            }
        return found

    tree = block(0)
    assert not rows, rows
    return tree


def rendered(cloud, *flags: str, command=("llama-jax", "pretrain")) -> dict:
    out = cloud("run", *GKE, *IMAGE, *flags, "--dry-run", "--", *command).out
    return parsed(out.partition("<<'EOF'\n")[2].partition("\nEOF\n")[0])


def test_the_jobset_is_what_a_run_needs(cloud):
    flags = ("--slices", "2", "--libtpu-args=--a=1", "--max-restarts", "7", "--restart-on", "42,143", "--grace", "90")
    jobset = rendered(cloud, *flags, "--bucket", "gs://ours", "--kubernetes-account", "reader")
    assert (jobset["apiVersion"], jobset["kind"], jobset["metadata"]["name"]) == (
        "jobset.x-k8s.io/v1alpha2",
        "JobSet",
        "l7",
    )
    exclusive = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    assert jobset["metadata"]["annotations"] == exclusive
    fails = {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    assert jobset["spec"]["failurePolicy"] == {"maxRestarts": 7, "rules": [fails]}
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert (job["replicas"], spec["parallelism"], spec["completions"], spec["backoffLimit"]) == (2, 4, 4, 0)
    count, fail = spec["podFailurePolicy"]["rules"]
    assert count == {"action": "Count", "onPodConditions": [{"type": "DisruptionTarget"}]}
    assert fail == {
        "action": "FailJob",
        "onExitCodes": {"containerName": "main", "operator": "NotIn", "values": [42, 143]},
    }
    pod = spec["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    assert (pod["restartPolicy"], pod["terminationGracePeriodSeconds"], pod["hostNetwork"]) == ("Never", 90, True)
    assert (pod["dnsPolicy"], pod["serviceAccountName"]) == ("ClusterFirstWithHostNet", "reader")
    (container,) = pod["containers"]
    assert (container["image"], container["command"]) == ("img:1", ["llama-jax", "pretrain"])
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    environment = {one["name"]: one["value"] for one in container["env"]}
    assert environment == {"LIBTPU_INIT_ARGS": "--a=1", "JAX_COMPILATION_CACHE_DIR": "/mnt/bucket/jax-cache"}
    assert {one["mountPath"]: one["name"] for one in container["volumeMounts"]} == {
        "/dev/shm": "shm",
        "/mnt/bucket": "bucket",
    }
    shm, bucket = pod["volumes"]
    assert shm == {"name": "shm", "emptyDir": {"medium": "Memory"}}
    assert (
        bucket["csi"]["driver"] == "gcsfuse.csi.storage.gke.io"
        and bucket["csi"]["volumeAttributes"]["bucketName"] == "ours"
    )
    assert spec["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}


def test_words_arrive_unchanged_in_a_pod(cloud):
    """Kubernetes itself puts variables in for $(NAME), and takes $$ for $."""
    words = ["it's", 'a "b": c', "$(HOME) $HOME $$", "# no comment", "{}", "é\nline"]
    container = rendered(cloud, "--env", "X=$(Y)", command=words)["spec"]["replicatedJobs"][0]["template"]["spec"][
        "template"
    ]
    (container,) = container["spec"]["containers"]
    assert [word.replace("$$", "$") for word in container["command"]] == words
    assert container["command"][2] == "$$(HOME) $$HOME $$$$"
    assert {"name": "X", "value": "$$(Y)"} in container["env"]


def test_without_a_bucket_the_folder_is_there_for_the_pod_alone(cloud):
    pod = rendered(cloud)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    assert pod["spec"]["volumes"][1] == {"name": "bucket", "emptyDir": {}}
    assert pod["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "false"}


def test_this_reader_of_yaml_agrees_with_a_whole_one(cloud):
    yaml = pytest.importorskip("yaml")
    out = cloud("run", *GKE, *IMAGE, "--bucket", "gs://b", "--dry-run", "--", "a", "b: c").out
    text = out.partition("<<'EOF'\n")[2].partition("\nEOF\n")[0]
    assert parsed(text) == yaml.safe_load(text)


def test_the_command_of_xpk_says_the_same(cloud):
    out = cloud("run", *GKE, *IMAGE, "--libtpu-args", "", "--dry-run", "--", "llama-jax", "it's").out
    words = shlex.split(out.partition("# the same with XPK: ")[2].splitlines()[0])
    assert words[:3] == ["xpk", "workload", "create"]
    flags = {
        "--tpu-type=v5litepod-16",
        "--num-slices=1",
        "--max-restarts=50",
        "--restart-on-exit-codes=42,134",
        "--docker-image=img:1",
    }
    assert flags <= set(words)
    (command,) = [word.removeprefix("--command=") for word in words if word.startswith("--command=")]
    assert shlex.split(command) == ["env", "llama-jax", "it's"]


def test_a_run_on_gke_from_start_to_end(cloud):
    cloud.fates([["RUNNING"], ["Running", "Running", "Completed"]])
    cloud("create", *GKE)
    assert cloud("bootstrap", *GKE).code == 0
    credentials, controller = cloud.calls()[-2:]
    assert credentials[:4] == ["gcloud", "container", "clusters", "get-credentials"] and "--server-side" in controller
    result = cloud("run", *GKE, *IMAGE, "--watch", "--", "llama-jax")
    assert result.code == 0 and "l7: running, 1 restarts" in result.err and "l7: Completed" in result.err
    assert "l7-slice-0-1 on node-1: Succeeded with 0" in result.err and "is there and paid for" in result.err
    assert all("--context=gke_p_us-west4_c" in call for call in cloud.calls() if call[0] == "kubectl")
    assert "a line of the log" in cloud("logs", *GKE).out
    assert cloud("stop", *GKE).code == 0 and "jobset l7" not in cloud.things()
    gone = cloud("status", *GKE)
    assert gone.code == 2 and "there is no run l7 in the cluster" in gone.err


def test_a_failed_run_on_gke_ends_with_its_own_code(cloud):
    cloud.fates([["RUNNING"], ["Failed"]])
    cloud("create", *GKE)
    (cloud.folder / "pod_code").write_text("3")
    result = cloud("run", *GKE, *IMAGE, "--watch", "--", "llama-jax")
    assert result.code == 3 and "l7-slice-0-1 on node-1: Failed with 3" in result.err


def test_the_doctor_on_gke_leaves_nothing_behind_and_fails_as_its_check_does(cloud):
    for state, code in {"Completed": 0, "Failed": 2}.items():
        cloud.fates([["Running", state]])
        (cloud.folder / "world.json").unlink(missing_ok=True)
        (cloud.folder / "pod_code").write_text(str(code))
        result = cloud("doctor", *GKE, *IMAGE)
        assert result.code == code and cloud.things() == set()


def test_gke_needs_an_image(cloud):
    cloud.fates([["RUNNING"]])
    cloud("create", *GKE)
    result = cloud("run", *GKE, "--", "llama-jax")
    assert result.code == 2 and "--image IMAGE" in result.err


def test_slurm_gets_the_words_unchanged_and_one_job_at_a_time(cloud):
    words = ["it's", "two words", "$HOME"]
    assert cloud("run", *SLURM, "--sbatch=--time=8:00:00", "--env", "A=b c", "--", *words).code == 0
    (call,) = [call for call in cloud.calls() if call[0] == "sbatch"]
    assert call[-6:] == ["42,134", "env", "A=b c", *words] and call[-7] == "50"
    assert {
        "--nodes=2",
        "--ntasks-per-node=1",
        "--gpus-per-node=8",
        "--requeue",
        "--signal=TERM@300",
        "--time=8:00:00",
    } <= set(call)
    (cloud.folder / "squeue").write_text("17 RUNNING\n")
    again = cloud("run", *SLURM, "--", *words)
    assert again.code == 2 and "l7 is job 17, RUNNING; stop it first" in again.err
    assert cloud("status", *SLURM).out == "l7 is job 17, RUNNING\n"
    assert cloud("stop", *SLURM).code == 0 and cloud.calls()[-1] == ["scancel", "--batch", "--signal=USR1", "17"]
    (cloud.folder / "squeue").write_text("17 PENDING\n")
    cloud("stop", *SLURM)
    assert cloud.calls()[-1] == ["scancel", "17"]


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"), [(42, 0, True), (42, 3, False), (2, 0, False), (0, 0, False), (143, 0, True)]
)
def test_the_job_goes_back_into_the_queue_after_42_and_after_nothing_else(tmp_path, code, restarts, requeued):
    for name, text in {"srun": f'shift 3; echo "$@"; exit {code}', "scontrol": 'echo "scontrol $*"'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    environment["SLURM_RESTART_COUNT"] = str(restarts)
    words = ["bash", str(ROOT / "tpu_setup" / "job.sbatch"), "3", "42,143", "two words"]
    result = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert result.returncode == code and "two words" in result.stdout
    assert ("scontrol requeue 17" in result.stdout) is requeued


def test_a_job_that_is_stopped_saves_and_stays_out_of_the_queue(tmp_path):
    saves = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(42)); print('on', flush=True); time.sleep(60)"
    stubs = {
        "srun": f'echo $$ > {tmp_path}/pid; exec {sys.executable} -S -c "{saves}"',
        "scancel": f'[ "$*" = "--signal=TERM 17" ] && kill -TERM $(cat {tmp_path}/pid)',
        "scontrol": 'echo "scontrol $*"',
    }
    for name, text in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    words = ["bash", str(ROOT / "tpu_setup" / "job.sbatch"), "50", "42", "x"]
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout.readline() == "on\n"
        job.send_signal(10)  # SIGUSR1
        out = job.stdout.read()
    assert job.returncode == 42 and "scontrol" not in out
