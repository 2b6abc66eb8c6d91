"""The examples for clusters, checked as far as possible without one: their syntax, their fields, what they start."""

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import jsonschema
import pytest
import yaml

from llm.commands import flags, train
from llm.commands.check import rehearse
from llm.commands.flags import config_from
from llm.commands.planning import plan
from llm.config import TrainConfig

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
PAGE = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
GPUS, NODES = 8, 2


class Parsed(Exception):
    """Carries the settings of a command; raised instead of running it."""


@pytest.fixture
def parsed(monkeypatch):
    """Return parsed(main, words) -> the settings, by the command's own parser. Raises UserError as the command does."""
    read = flags.Parser.read

    def stop(parser, argv):
        raise Parsed(config_from(read(parser, argv)))

    monkeypatch.setattr(flags.Parser, "read", stop)

    def settings(main, words) -> TrainConfig:
        with pytest.raises(Parsed) as caught:
            main(words)
        return caught.value.args[0]

    return settings


def torchrun(words: list[str]):
    """Return torchrun's flags, by torch's own parser, and the words after `-m llm train`."""
    from torch.distributed.run import get_args_parser

    args = get_args_parser().parse_args(words)
    assert (args.module, args.training_script, args.training_script_args[0]) == (True, "llm", "train")
    return args, args.training_script_args[1:]


@pytest.fixture
def cluster(tmp_path):
    """Return a folder with a PATH of fake programs.

    torchrun writes its arguments to a file, and runs until SIGTERM if there is a file `wait`; srun starts one; scontrol
    and scancel do what the Slurm example needs.
    """
    path = tmp_path / "path"
    path.mkdir()
    stand_ins = {
        "torchrun": 'printf "%s\\n" "$@" > words; echo $$ > pid; trap "touch saved; exit 1" TERM\n'
        "while [ -e wait ]; do sleep 0.02; done",
        "srun": 'while [[ "$1" == --* ]]; do shift; done; exec "$@"',
        "scontrol": 'if [ "$1" = show ]; then printf "first\\nsecond\\n"; else echo "$@" > requeued; fi',
        "scancel": '[ "$*" = "--signal=TERM 7" ] && kill -TERM "$(cat pid)"',
    }
    for name, code in stand_ins.items():
        (path / name).write_text(f"#!/bin/bash\n{code}\n", encoding="utf-8")
        (path / name).chmod(0o755)
    for folder in (".venv", "losscurve"):  # what the examples activate
        (tmp_path / folder / "bin").mkdir(parents=True)
        (tmp_path / folder / "bin" / "activate").touch()
    return tmp_path


def started(folder: Path, script: str, **variables: str) -> subprocess.Popen:
    environment = {"PATH": f"{folder / 'path'}:{os.environ['PATH']}", "HOME": str(folder)} | variables
    return subprocess.Popen(["bash", "-c", script], cwd=folder, env=environment)


def words_of(folder: Path, script: str, **variables: str) -> list[str]:
    """Return the arguments that a script gives to torchrun."""
    process = started(folder, script, **variables)
    assert process.wait(20) == 0
    return (folder / "words").read_text(encoding="utf-8").splitlines()


SLURM = (EXAMPLES / "slurm.sh").read_text(encoding="utf-8")
NODE = {
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_NNODES": str(NODES),
    "SLURM_GPUS_ON_NODE": str(GPUS),
    "SLURM_JOB_ID": "7",
}
POD = yaml.safe_load((EXAMPLES / "pytorchjob.yaml").read_text(encoding="utf-8"))
SKY = yaml.safe_load((EXAMPLES / "skypilot.yaml").read_text(encoding="utf-8"))
SKY_NODE = {
    **{"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": str(NODES), "SKYPILOT_TASK_ID": "sky-1"},
    "SKYPILOT_NUM_GPUS_PER_NODE": str(GPUS),
}


def script_of(name: str, folder: Path) -> tuple[str, dict[str, str], Path]:
    """Return an example's commands, the variables that its cluster sets, and the folder of its run."""
    if name == "slurm":
        return SLURM, NODE, folder / "runs" / "gpt2"
    if name == "pytorchjob":
        container = POD["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]
        assert container["command"] == ["/bin/bash", "-c"]
        return container["args"][0], {}, folder / "runs" / "gpt2"
    return SKY["run"], SKY_NODE | {"RUN": str(folder / "run")}, folder / "run"


@pytest.mark.parametrize("name", ["slurm", "pytorchjob", "skypilot"])
def test_an_example_starts_a_run_and_resumes_one(cluster, parsed, name):
    script, variables, run = script_of(name, cluster)
    args, words = torchrun(words_of(cluster, script, **variables))
    if name != "pytorchjob":  # there the operator configures torchrun by PET_ variables
        assert (args.nnodes, args.nproc_per_node, args.max_restarts) == (str(NODES), str(GPUS), 3)
        head = {"slurm": "first", "skypilot": "10.0.0.1"}[name]
        assert (args.rdzv_backend, args.rdzv_endpoint) == ("c10d", f"{head}:29500")
        assert args.rdzv_id == variables.get("SLURM_JOB_ID", "sky-1")
    config = parsed(train.main, words)
    assert config.windows_per_step % (NODES * GPUS) == 0
    assert config.max_steps == 600_000  # GPT-2's preset
    assert (cluster / config.out_dir).resolve() == run.resolve()
    (run / "step-000500").mkdir(parents=True)
    words = torchrun(words_of(cluster, script, **variables))[1]
    assert "--resume" in words
    assert "--preset" not in words
    assert parsed(train.main, words).out_dir == config.out_dir


def test_slurm_saves_and_requeues_before_the_time_limit(cluster):
    (cluster / "wait").touch()
    job = started(cluster, SLURM, **NODE)
    deadline = time.monotonic() + 10
    while not (cluster / "pid").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    assert job.wait(10) == 0
    assert (cluster / "saved").exists()
    assert (cluster / "requeued").read_text(encoding="utf-8") == "requeue 7\n"


def test_slurm_does_not_requeue_a_failed_run(cluster):
    (cluster / "path" / "torchrun").write_text("#!/bin/bash\nexit 2\n", encoding="utf-8")
    assert started(cluster, SLURM, **NODE).wait(10) == 2
    assert not (cluster / "requeued").exists()


SBATCH = {  # the options of the sbatch manual that are used, and the pattern of their values
    **{"job-name": r"\w+", "nodes": r"\d+", "gpus-per-node": r"\d+", "cpus-per-task": r"\d+", "time": r"\d+:\d\d:\d\d"},
    **{"output": r"[\w.%-]+", "ntasks-per-node": "1", "requeue": "", "open-mode": "append", "signal": r"B:TERM@\d+"},
}


def test_slurm_has_valid_options():
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", SLURM, re.M))
    assert options.keys() == SBATCH.keys()
    assert all(re.fullmatch(SBATCH[name], value) for name, value in options.items())
    body = SLURM.splitlines()
    first = next(number for number, line in enumerate(body) if line and not line.startswith("#"))
    assert all(not line.startswith("#SBATCH") for line in body[first:])  # sbatch reads none after the first command


def record(required, **properties):
    """Return a JSON schema of an object with these fields and no others."""
    return {"type": "object", "properties": properties, "required": required.split(), "additionalProperties": False}


TEXT, COUNT = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 1}
QUANTITY = {"anyOf": [COUNT, {"type": "string", "pattern": r"^\d+([KMGT]i)?$"}]}
CONTAINER = record(
    "name image command args resources",
    name={"const": "pytorch"},
    image=TEXT,
    workingDir=TEXT,
    command={"type": "array", "items": TEXT},
    args={"type": "array", "items": TEXT},
    resources=record(
        "limits", limits={"type": "object", "additionalProperties": QUANTITY, "required": ["nvidia.com/gpu"]}
    ),
    volumeMounts={"type": "array", "items": record("name mountPath", name=TEXT, mountPath=TEXT)},
)
VOLUME = record(
    "name",
    name=TEXT,
    persistentVolumeClaim=record("claimName", claimName=TEXT),
    emptyDir=record("medium", medium={"const": "Memory"}, sizeLimit=QUANTITY),
)
PODS = record(
    "containers",
    terminationGracePeriodSeconds={"type": "integer", "minimum": 31},
    containers={"type": "array", "items": CONTAINER, "minItems": 1, "maxItems": 1},
    volumes={"type": "array", "items": VOLUME},
)
REPLICAS = record(
    "replicas template",
    replicas=COUNT,
    restartPolicy={"enum": ["Always", "OnFailure", "Never", "ExitCode"]},
    template=record("spec", spec=PODS),
)
PYTORCHJOB = record(  # of kubeflow.org_pytorchjobs.yaml and pytorch_types.go, release 1.9
    "apiVersion kind metadata spec",
    apiVersion={"const": "kubeflow.org/v1"},
    kind={"const": "PyTorchJob"},
    metadata=record("name", name={"type": "string", "pattern": "^[a-z0-9-]+$"}),
    spec=record(
        "pytorchReplicaSpecs",
        nprocPerNode={"type": "string", "pattern": r"^(auto|cpu|gpu|\d+)$"},
        elasticPolicy=record(
            "rdzvBackend",
            rdzvBackend={"enum": ["c10d", "etcd", "etcd-v2"]},
            minReplicas=COUNT,
            maxReplicas=COUNT,
            maxRestarts=COUNT,
        ),
        runPolicy=record("cleanPodPolicy", cleanPodPolicy={"enum": ["All", "Running", "None"]}),
        pytorchReplicaSpecs=record("Worker", Worker=REPLICAS),
    ),
)
SKYPILOT = record(  # of sky/utils/schemas.py
    "resources num_nodes run",
    name=TEXT,
    resources=record(
        "accelerators",
        accelerators={"type": "string", "pattern": r"^[A-Z0-9-]+:\d+$"},
        use_spot={"type": "boolean"},
        job_recovery=record("max_restarts_on_errors", max_restarts_on_errors={"type": "integer", "minimum": 0}),
    ),
    num_nodes=COUNT,
    workdir=TEXT,
    envs={"type": "object", "additionalProperties": {"type": "string"}},
    file_mounts={
        "type": "object",
        "additionalProperties": record("name mode", name=TEXT, mode={"enum": ["MOUNT", "COPY", "MOUNT_CACHED"]}),
    },
    setup=TEXT,
    run=TEXT,
)


@pytest.mark.parametrize(("found", "schema"), [(POD, PYTORCHJOB), (SKY, SKYPILOT)])
def test_the_fields_are_those_of_the_schema(found, schema):
    jsonschema.validate(found, schema)
    jsonschema.Draft202012Validator.check_schema(schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(found | {"num_node": 2}, schema)


def test_numbers_that_occur_twice_agree():
    job = POD["spec"]
    worker, elastic = job["pytorchReplicaSpecs"]["Worker"], job["elasticPolicy"]
    pod = worker["template"]["spec"]
    assert worker["replicas"] == elastic["minReplicas"] == elastic["maxReplicas"] == NODES
    assert int(job["nprocPerNode"]) == pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == GPUS
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    assert SKY["num_nodes"] == NODES
    assert SKY["resources"]["accelerators"].endswith(f":{GPUS}")
    assert SKY["envs"]["RUN"].startswith(tuple(SKY["file_mounts"]))
    assert re.search(rf"--nodes={NODES}\n", SLURM)
    assert re.search(rf"--gpus-per-node={GPUS}\n", SLURM)


COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", PAGE, re.S)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip()
]


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_of_the_page_is_valid(parsed, line):
    words = [word for word in shlex.split(line, comments=True) if not re.fullmatch(r"[A-Z_]+=\S+", word)]
    if words[0] == "torchrun":
        parsed(train.main, torchrun(words[1:])[1])
    elif words[0] == "losscurve":
        parsed({"train": train.main, "plan": plan.main, "rehearse": rehearse.main}[words[1]], words[2:])
    else:
        assert words[0] in ("sbatch", "kubectl", "sky")
        assert (ROOT / words[-1]).is_file()


def test_the_page_links_every_example():
    assert len(COMMANDS) > 5
    for path in EXAMPLES.iterdir():
        assert f"(../examples/{path.name})" in PAGE
