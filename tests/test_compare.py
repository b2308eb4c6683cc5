"""Tables across studies: rows by what differs, a shared trial counted once, and what cannot be compared said so."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from fake_study import FakeStudy
from typer.testing import CliRunner

from ppc.artifacts import Storage, write_json
from ppc.cli import app
from ppc.compare import as_csv, best_table, compare, differing, table


def study(root: Path, name: str, rows: dict[str, dict[str, Any]], *, later_ms: int = 0, **changes: Any) -> FakeStudy:
    """A study of two seeds whose variants are {K: fields of their config}; trials of the same K share their keys."""
    fake = FakeStudy(root, name=name, ks=tuple(int(k) for k in rows))
    for entry in fake.study["trials"]:
        k = entry["variant"].partition("=")[2]
        entry |= {"key": f"k{k}-s{entry['seed']}", "variant_key": f"k{k}"}
        entry["config"]["contrast"]["prototype_top_k"] = int(k)
        for path, value in rows[k].items():
            section, _, field = path.partition(".")
            entry["config"][section][field] = value
        entry["stages"] = [{"name": s["name"], "key": f"{s['name']}-{entry['key']}"} for s in entry["stages"]]
    fake.study |= {"created_ms": fake.study["created_ms"] + later_ms, **changes}
    write_json(fake.storage.study(name).path / "study.json", fake.study)
    return fake


@pytest.fixture
def two(tmp_path: Path) -> Storage:
    """Study a of K = 0, 4; study b, launched later, of K = 4, whose trials a has finished, and 32 at another root."""
    a = study(tmp_path, "a", {"0": {}, "4": {}})
    for index, miou in enumerate((0.40, 0.42, 0.50, 0.53)):
        a.finish(index, miou)
    b = study(tmp_path, "b", {"4": {"data.root": "/moved"}, "32": {"train.crop_px": 64}}, later_ms=3_600_000)
    b.finish(2, 0.61)
    b.start(3)
    b.fail(3)
    return a.storage


def test_a_row_for_each_config_with_what_differs(two: Storage) -> None:
    found = compare(two, ["a", "b"])
    assert set(found.fields) == {"train.crop_px", "contrast.prototype_top_k"}, "not the seed, not the data's place"
    rows = {row.fields["contrast.prototype_top_k"]: row for row in found.rows}
    assert list(rows) == [0, 4, 32]
    assert rows[0].mean == pytest.approx(0.41) and rows[0].values == {0: 0.40, 1: 0.42}
    assert rows[4].studies == {"a": "prototype_top_k=4", "b": "prototype_top_k=4"} and rows[4].reused == {"b": 2}
    assert len(rows[4].values) == 2 and rows[4].mean == pytest.approx(0.515), "a trial of two studies counts once"
    assert (rows[32].mean, rows[32].std, rows[32].states) == (0.61, None, {"FINISHED": 1, "FAILED": 1})
    heads, *lines = table(found)
    line = dict(zip(heads, lines[1], strict=True))
    assert line["mask_miou_train"] == "51.50 ± 2.12" and line["n"] == "2" and line["protocol"] == "best_on_train"
    assert line["studies"] == "a: prototype_top_k=4, b: prototype_top_k=4 (2 reused)"
    assert line["images of train"] == "240 (generated)"
    assert "1 trial(s) have no result and are in no figure." in found.remarks


def test_csv_has_fractions_and_each_seed(two: Storage) -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv(compare(two, ["a", "b"])))))
    assert [row["contrast.prototype_top_k"] for row in rows] == ["0", "4", "32"]
    assert (rows[0]["seed_0"], rows[0]["seed_1"], rows[2]["seed_1"]) == ("0.4", "0.42", "")
    assert (rows[1]["split"], rows[1]["count"], rows[1]["reused"], rows[1]["generated"]) == (
        "train",
        "240",
        "2",
        "True",
    )


def test_what_cannot_be_ranked_says_so(tmp_path: Path) -> None:
    a = study(tmp_path, "a", {"0": {}})
    b = study(tmp_path, "b", {"4": {"seeds.protocol": "fixed"}}, metric="seed_miou_train")
    a.finish(0, 0.4)
    b.finish(0, 0.5)
    path = b.storage.trial(b.entry(0)["key"]).path / "result.json"
    write_json(path, {**json.loads(path.read_text()), "counts": {"train": 7}})
    remarks = compare(a.storage, ["a", "b"]).remarks
    assert "These figures are not of the same images (240, 7): do not rank them." in remarks
    assert "These figures are not of the same protocols (best_on_train, fixed): do not rank them." in remarks
    assert "Compared by mask_miou_train; decided by another metric: b by seed_miou_train." in remarks
    assert compare(a.storage, ["a", "b"], "seed_miou_train").rows[0].mean == pytest.approx(0.35)
    with pytest.raises(ValueError, match="metric iou: no trial of a has it; they have bg_score, mask_miou_train"):
        compare(a.storage, ["a"], "iou")
    with pytest.raises(ValueError, match="study a is named twice"):
        compare(a.storage, ["a", "b", "a"])
    with pytest.raises(ValueError, match="nope"):
        compare(a.storage, ["a", "nope"])


def test_where_no_field_tells_rows_apart_their_keys_do() -> None:
    same = {"x": 1, "data": "ab"}
    assert differing({"k": {**same, "key": "k"}, "l": {**same, "key": "l"}}) == ["key"]
    assert differing({"k": {**same, "key": "k"}, "l": {"x": 1, "data": "cd", "key": "l"}}) == ["data"]
    assert differing({"k": {**same, "key": "k"}}) == []


def test_the_best_of_every_study(two: Storage) -> None:
    study(Path(two.root), "empty", {"8": {}})
    (two.root / "studies" / "torn").mkdir()
    (two.root / "studies" / "torn" / "study.json").write_text("{")
    heads, *rows = best_table(two)
    found = {row[0]: dict(zip(heads, row, strict=True)) for row in rows}
    assert list(found) == ["a", "b", "empty", "torn"]
    assert "study.json is damaged" in found["torn"]["best variant"] and found["torn"]["mean"] == "-"
    assert found["a"]["best variant"] == "prototype_top_k=4" and found["a"]["vs baseline"] == "+10.50 ± 0.71"
    assert (found["a"]["n"], found["a"]["protocol"], found["a"]["p (Holm)"]) == ("2", "best_on_train", "-")
    assert (found["b"]["mean"], found["b"]["images"], found["b"]["no result"]) == (
        "61.00",
        "240 of train (generated)",
        "1",
    )
    assert (found["empty"]["mean"], found["empty"]["no result"]) == ("-", "2")


def call(*words: str) -> Any:
    return CliRunner().invoke(app, list(words))


def test_the_command_line(two: Storage) -> None:
    place = ["--storage", str(two.root)]
    assert "51.50 ± 2.12" in call("compare", "a", "b", *place).output
    assert "| 51.50 ± 2.12 | 2 |" in call("compare", "a", "b", "--format", "md", *place).output
    assert call("compare", "a", "--format", "csv", *place).output.startswith("contrast.prototype_top_k,metric,mean")
    assert "prototype_top_k=4" in call("report", "--best", *place).output
    assert call("report", "--best", "--format", "md", *place).output.startswith("| study | best variant |")
    folder = two.study("a").path / "report"
    printed = call("report", "a", *place).output
    assert f"report: {folder / 'report.md'}" in printed and f"report: {folder / 'report.html'}" in printed
    assert sorted(path.suffix for path in folder.iterdir()) == [".csv", ".html", ".json", ".md", ".tex"]
    for kind, ending in (("md", "md"), ("latex", "tex"), ("csv", "csv")):
        assert call("report", "a", "--format", kind, *place).output == (folder / f"report.{ending}").read_text()
    both = call("report", "a", "--format", "html", "--format", "csv", *place).output
    assert both.startswith(f"{folder / 'report.html'}\nvariant,")
    for words, said in (
        (["report"], "name a study, or say --best"),
        (["report", "a", "--best"], "not both"),
        (["report", "a", "--format", "pdf"], "--format pdf: there are md, latex, csv, html"),
        (["report", "--best", "--format", "csv"], "--format csv: there are md"),
        (["compare", "a", "--format", "html"], "there are md, csv"),
    ):
        assert said in str(call(*words, *place).exception)
