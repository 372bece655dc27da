"""Asking for a slice, waiting, losing it, giving it back: each against a cloud that refuses, preempts and forgets."""

import signal

import pytest

QUEUED = ("l7", "--tpu", "v5p-16", "--zone", "us-east5-a", "--poll", "0.01")
SPOT = (*QUEUED, "--spot")
COMPUTE = ("l7", "--backend", "compute", "--tpu", "v6e-16", "--zone", "us-east5-a", "--project", "p", "--poll", "0.01")
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
COMES = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
PAID = "is there and paid for until it is deleted"


def created(cloud) -> int:
    return sum("create" in call for call in cloud.calls())


def test_create_asks_once_and_says_what_it_will_cost(cloud):
    cloud.fates([COMES])
    first, second = cloud("create", *SPOT), cloud("create", *SPOT)
    assert (first.code, second.code, created(cloud)) == (0, 0, 1)
    assert "is asked for; wait follows it" in first.err and "paid for from the moment it comes" in first.err
    assert "exists already (WAITING_FOR_RESOURCES); nothing to do" in second.err


def test_wait_follows_it_until_it_is_there(cloud):
    cloud.fates([COMES])
    cloud("create", *QUEUED)
    result = cloud("wait", *QUEUED)
    assert result.code == 0
    at = [result.err.index(word) for word in (*COMES, PAID)]
    assert at == sorted(at)


@pytest.mark.parametrize("lost", ["SUSPENDED", "FAILED", "SUSPENDING"])
def test_a_spot_slice_that_is_lost_is_deleted_and_asked_for_again(cloud, lost):
    cloud.fates([["WAITING_FOR_RESOURCES", lost], ["PROVISIONING", lost], COMES])
    cloud("create", *SPOT)
    result = cloud("wait", *SPOT)
    verbs = [call[4] for call in cloud.calls() if call[4] != "describe"]
    assert (result.code, verbs) == (0, ["create", "delete", "create", "delete", "create"])
    assert all("--force" in call and "--quiet" in call for call in cloud.calls() if call[4] == "delete")


def test_a_slice_that_is_not_on_spot_is_not_asked_for_again(cloud):
    cloud.fates([["WAITING_FOR_RESOURCES", "SUSPENDED"]])
    cloud("create", *QUEUED)
    result = cloud("wait", *QUEUED)
    assert (result.code, created(cloud)) == (2, 1) and "not on spot, and not asked for again" in result.err


def test_no_capacity_is_asked_again_but_a_quota_is_not(cloud):
    full = {"refuse": 'There is no more capacity in the zone "us-east5-a"; you can try in another zone'}
    cloud.fates([["SUSPENDED"], [full], [full], COMES])
    cloud("create", *SPOT)
    result = cloud("wait", *SPOT)
    assert result.code == 0 and result.err.count("no more capacity") == 2
    cloud("delete", *SPOT)
    quota = "Quota limit 'TPUV5PPreemptiblePerProjectPerZone' has been exceeded. Limit: 0"
    cloud.fates([[{"state": "FAILED", "message": quota}]])
    asked = created(cloud)
    cloud("create", *SPOT)
    result = cloud("wait", *SPOT)
    assert (result.code, created(cloud)) == (2, asked + 1)
    assert quota in result.err and "ask for quota" in result.err


@pytest.mark.parametrize(
    ("refusal", "remedy"),
    [
        ("RESOURCE_EXHAUSTED: Quota limit 'X' has been exceeded", "ask for quota"),
        ("There is no more capacity in the zone", "gcloud compute tpus locations list"),
        ("INVALID_ARGUMENT: Accelerator type 'v5p-16' not found in zone", "accelerator-types list"),
        ("Cloud TPU API has not been used in project 1 before or it is disabled", "gcloud services enable"),
        ("You do not currently have an active account selected", "gcloud auth login"),
        ("PERMISSION_DENIED: Required 'tpu.nodes.create' permission", "roles/tpu.admin"),
        ("something new", "run it by hand"),
    ],
)
def test_a_refusal_is_shown_with_its_remedy_and_is_no_success(cloud, refusal, remedy):
    cloud.fates([[{"refuse": refusal}]])
    result = cloud("create", *QUEUED)
    assert result.code == 2 and refusal in result.err and remedy in result.err
    assert "paid" not in result.err, "nothing is there"


def test_a_zone_that_does_not_exist_does_not_pass_for_a_slice_that_does_not(cloud):
    for verb in ("create", "wait", "delete", "status"):
        result = cloud(verb, "l7", "--tpu", "v5p-16", "--zone", "mars-a")
        assert result.code == 2 and "give another --zone" in result.err, verb
    assert created(cloud) == 0


def test_delete_gives_back_once_and_is_content_with_nothing(cloud):
    cloud("create", *QUEUED)
    first, second = cloud("delete", *QUEUED), cloud("delete", *QUEUED)
    assert (first.code, second.code, cloud.things()) == (0, 0, set())
    assert "is gone; nothing of it is paid for" in first.err and "is gone already" in second.err


def test_wait_gives_up_in_time_and_says_that_the_request_stands(cloud):
    cloud.fates([["WAITING_FOR_RESOURCES"]])
    cloud("create", *QUEUED)
    result = cloud("wait", *QUEUED, "--timeout", "0.0001")
    assert result.code == 2 and "the request stands" in result.err and "delete takes the request back" in result.err
    assert cloud.things()


def test_a_network_that_is_away_for_a_while_does_not_end_the_wait_nor_pass_for_a_loss(cloud):
    cloud.fates([COMES])
    cloud("create", *SPOT)
    (cloud.folder / "flaky").write_text("5")
    result = cloud("wait", *SPOT)
    assert (result.code, created(cloud)) == (0, 1) and result.err.count("503") == 5
    (cloud.folder / "flaky").write_text("50")
    for verb in ("wait", "create", "delete"):
        result = cloud(verb, *SPOT)
        assert result.code == 2 and "503" in result.err and cloud.things() == {"queued-resources l7"}


def test_wait_for_what_was_never_asked_for_is_refused(cloud):
    result = cloud("wait", *QUEUED)
    assert result.code == 2 and "does not exist; create asks for it" in result.err


def test_ctrl_c_leaves_with_a_word_about_money(cloud):
    cloud.fates([["PROVISIONING"]])
    cloud("create", *QUEUED)
    process = cloud.command("wait", *QUEUED, "--poll", "60")
    first = process.stderr.readline()
    assert "PROVISIONING" in first
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130 and PAID in rest and "interrupted" in rest.splitlines()


def test_another_slice_of_the_same_name_is_not_taken_for_this_one(cloud):
    cloud("create", *QUEUED)
    result = cloud("create", "l7", "--tpu", "v5p-32", "--zone", "us-east5-a")
    assert result.code == 2 and "exists as v5p-16, not v5p-32; delete it, or use another name" in result.err


def test_the_flags_of_the_slice_reach_the_cloud(cloud):
    more = (
        "--slices",
        "2",
        "--service-account",
        "me@p",
        "--network",
        "n",
        "--subnetwork",
        "s",
        "--internal-ip",
        "--valid-until",
        "6h",
    )
    assert cloud("create", *SPOT, "--project", "p", *more).code == 0
    (call,) = [call for call in cloud.calls() if "create" in call]
    assert set(call) >= {
        *(
            "--project=p",
            "--zone=us-east5-a",
            "--accelerator-type=v5p-16",
            "--runtime-version=v2-alpha-tpuv5",
            "--spot",
        ),
        *("--node-count=2", "--node-prefix=l7", "--service-account=me@p", "--network=n", "--subnetwork=s"),
        *("--internal-ips", "--valid-until-duration=6h"),
    }


def test_compute_engine_makes_the_group_with_all_it_needs_and_takes_all_away(cloud):
    cloud.fates([["PENDING", "STAGING,RUNNING", "RUNNING"]])
    assert cloud("create", *COMPUTE, "--spot").code == 0
    assert cloud.things() == {"resource-policies l7", "instance-templates l7", "managed l7"}
    result = cloud("wait", *COMPUTE, "--spot")
    assert result.code == 0 and "2 RUNNING, 2 STAGING" in result.err and "4 RUNNING" in result.err
    assert cloud("delete", *COMPUTE).code == 0 and cloud.things() == set()


def test_compute_engine_takes_a_preempted_group_again_even_if_one_instance_is_left(cloud):
    cloud.fates([["RUNNING", "TERMINATED,RUNNING"], ["RUNNING"]])
    cloud("create", *COMPUTE, "--spot")
    cloud("status", *COMPUTE, "--spot")
    left = cloud("status", *COMPUTE, "--spot")
    assert "2 RUNNING, 2 TERMINATED" in left.out and "a part of l7" in left.err and PAID in left.err
    assert cloud("wait", *COMPUTE, "--spot").code == 0
    assert sum(call[3:5] == ["managed", "create"] for call in cloud.calls()) == 2


def test_compute_engine_without_quota_does_not_ask_for_ever(cloud):
    cloud.fates([[{"state": "PENDING", "message": "Quota 'TPUS' exceeded. Limit: 0"}]])
    cloud("create", *COMPUTE, "--spot")
    result = cloud("wait", *COMPUTE, "--spot")
    assert result.code == 2 and "QUOTA_EXCEEDED" in result.err and "ask for quota" in result.err


def test_gke_makes_a_pool_for_each_slice(cloud):
    cloud.fates([["PROVISIONING", "RUNNING"]])
    assert cloud("create", *GKE, "--slices", "2", "--spot").code == 0
    assert cloud.things() == {"node-pools l7-0", "node-pools l7-1"}
    (call, _) = [call for call in cloud.calls() if call[3] == "create"]
    assert {
        "--tpu-topology=4x4",
        "--placement-type=COMPACT",
        "--num-nodes=4",
        "--machine-type=ct5lp-hightpu-4t",
        "--spot",
    } <= set(call)
    assert cloud("wait", *GKE, "--slices", "2").code == 0
    assert cloud("delete", *GKE, "--slices", "2").code == 0 and cloud.things() == set()


def test_a_pool_that_came_before_the_second_was_refused_is_not_forgotten(cloud):
    cloud.fates(
        [["RUNNING"], [{"refuse": "ResponseError: code=403, message=Insufficient regional quota"}], ["RUNNING"]]
    )
    first = cloud("create", *GKE, "--slices", "2")
    assert first.code == 2 and "a part of l7" in first.err and PAID in first.err
    assert cloud("create", *GKE, "--slices", "2").code == 0, "what is there stays, what is missing is asked for"
    assert cloud.things() == {"node-pools l7-0", "node-pools l7-1"}


def test_v7x_is_placed_by_a_policy_and_never_queued(cloud):
    result = cloud("create", "l7", "--tpu", "tpu7x-128", "--zone", "us-central1-c")
    assert result.code == 2 and "do not offer v7x; use --backend gke or compute" in result.err and not cloud.calls()
    flags = ("--backend", "gke", "--tpu", "tpu7x-128", "--zone", "us-central1-c", "--project", "p", "--cluster", "c")
    assert cloud("create", "l7", *flags).code == 0
    policy, pool = [call for call in cloud.calls() if "create" in call]
    assert "--accelerator-topology=4x4x4" in policy and "--placement-policy=l7" in pool
    assert not any(word.startswith(("--tpu-topology", "--placement-type")) for word in pool)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("create", "l7"), "needs --tpu, such as v5e-16"),
        (("create", "l7", "--tpu", "v5e-16"), "--zone ZONE"),
        (("create", "l7", "--tpu", "v5p:4x4x12", "--zone", "z-a"), "queued resources know the topologies"),
        (("create", "L7", "--tpu", "v5e-16"), "small letters"),
        (("create", "l7", "--tpu", "v5e-16", "--slices", "0"), "1 or more"),
        (("create", "l7", "--tpu", "v5e-16", "--backend", "compute"), "--project PROJECT"),
        (
            ("create", "l7", "--tpu", "v5e-16", "--backend", "compute", "--zone", "z-a", "--project", "p"),
            "--backend queued or gke",
        ),
        (("create", "l7", "--tpu", "v5e-16", "--backend", "gke"), "--project, --zone, --cluster"),
        (("create", "l7", "--backend", "ssh", "--hosts", "a"), "rents nothing"),
        (("create", "l7", "--backend", "slurm", "--nodes", "2"), "rents nothing"),
        (("run", "l7", "--backend", "slurm", "--", "true"), "--nodes N"),
        (("run", "l7", "--backend", "ssh", "--", "true"), "--hosts HOST"),
        (("run", "l7", "--backend", "ssh", "--hosts", "a"), "needs a command behind --"),
        (("stop", "l7", "--backend", "ssh", "--hosts", "a", "--", "true"), "stop takes no command"),
        (("run", "l7", "--backend", "ssh", "--hosts", "a", "--restart-on", "0,42", "--", "true"), "mean a failure"),
        (("run", "l7", "--backend", "ssh", "--hosts", "a", "--env", "=1", "--", "true"), "NAME=VALUE"),
        (("run", "l7", "--backend", "ssh", "--hosts", "a", "--bucket", "b", "--", "true"), "gs://NAME"),
        (("cost", "l7", "--tpu", "v5e-16", "--zone", "z-a"), "needs --price"),
        (("fly", "l7"), "invalid choice"),
        (("create", "l7", "--tpv", "v5e-16"), "unrecognized arguments"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_touched(cloud, words, message):
    result = cloud(*words)
    assert result.code == 2 and message in result.err and "Traceback" not in result.err
    assert not cloud.calls()


def test_a_missing_command_is_named_with_where_to_get_it(cloud):
    cloud.outside = True
    result = cloud("status", *QUEUED, PATH="/nowhere")
    assert result.code == 2 and "gcloud is not on this machine" in result.err and "https://" in result.err


def test_the_flags_of_a_slice_may_stand_in_a_file(cloud, tmp_path):
    file = tmp_path / "l7.slice"
    file.write_text("l7 --tpu v5p-16  # sixteen cores\n--zone 'us-east5-a' --spot\n\n# no more\n")
    assert cloud("create", f"@{file}").code == 0
    assert "--spot" in next(call for call in cloud.calls() if "create" in call)
    missing = cloud("create", "@nowhere.slice")
    assert missing.code == 2 and "nowhere.slice" in missing.err


def test_cost_is_the_users_price_times_what_is_there(cloud):
    flags = (*QUEUED, "--slices", "2", "--price", "2.5", "--hours", "10")
    result = cloud("cost", *flags)
    assert result.code == 0 and "16 chips" in result.out and "40.00 an hour, 960.00 a day" in result.out
    assert "10 hours: 400.00" in result.out and "now: absent; not paid for" in result.out
    cloud("create", *QUEUED, "--slices", "2")
    result = cloud("cost", *flags)
    assert "there since 2026-01-02T03:04:05" in result.out and PAID in result.err
