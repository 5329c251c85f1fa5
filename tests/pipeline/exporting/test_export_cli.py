"""`curate export` and `curate manifest …` from the command line."""

import json

import pyarrow.parquet as pq


def test_export_and_resume(run, make_selection, tmp_path):
    path, out = make_selection("loss").path, tmp_path / "out"
    for _ in range(2):
        code, said, _ = run(
            "export", path, "--to", "parquet", "--columns", "x,text", "-o", out, "--json"
        )
        assert code == 0 and json.loads(said)["rows"] == 300
    assert pq.read_table(out).column_names == ["x", "text", "weight"]
    for arguments, text in (
        ((path, "-o", out), "--to is missing"),
        ((path, "--to", "csv", "-o", out), "unknown format 'csv'"),
        ((path, "--to", "mds", "-o", out), "an export of other settings"),
        ((tmp_path, "--to", "mds", "-o", out), "holds no manifest"),
    ):
        code, _, said = run("export", *arguments)
        assert code == 2 and text in said and "Traceback" not in said
        assert len(said.strip().splitlines()) == 1


def test_verify_and_inspect_know_an_export(run, make_selection, tmp_path):
    path, out = make_selection("loss").path, tmp_path / "out"
    assert run("export", path, "--to", "parquet", "-o", out, "--unit-rows", 150)[0] == 0
    code, said, _ = run("verify", out, "--json")
    assert code == 0, said
    assert json.loads(said)["holds"] == "export"
    assert len(json.loads(said)["checked"]) == len(list(out.glob("*.parquet")))
    code, said, _ = run("inspect", out, "--json")
    assert code == 0 and json.loads(said)["rows"] == 300 and json.loads(said)["to"] == "parquet"
    victim = sorted(out.glob("*.parquet"))[0]
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    code, said, _ = run("verify", out)
    assert code == 1 and victim.name in said
    (out / "_SUCCESS").unlink()
    code, _, said = run("verify", out)
    assert code == 2 and "run `curate export` again" in said


def test_manifest_commands(run, make_selection, tmp_path):
    a, b = make_selection(kept=100, name="a").path, make_selection(kept=90, name="b", seed=3).path
    far = make_selection(kept=40, name="far", data="other", offset=9000).path
    sizes = {}
    for name in ("union", "intersect", "subtract"):
        code, said, _ = run("manifest", name, a, b, "-o", tmp_path / name, "--json")
        assert code == 0
        sizes[name] = json.loads(said)["selection"]["selected"]
    assert sizes["union"] == 190 - sizes["intersect"]
    assert sizes["subtract"] == 100 - sizes["intersect"]
    assert run("manifest", "sample", a, "--budget", "50%", "-o", tmp_path / "s")[1].startswith(
        "50 "
    )
    assert run("manifest", "sample", a, b, "-o", tmp_path / "t")[1].startswith("90 rows")
    mixed = run("manifest", "mix", a, far, "--proportions", "2,1", "-o", tmp_path / "m")
    assert mixed[1].startswith("140 rows")
    scheduled = run(
        "manifest", "schedule", a, "--rule", "rs2", "--param", "fraction=0.2", "-o", tmp_path / "r"
    )
    assert scheduled[0] == 0
    for arguments, text in (
        (("union", a, far, "-o", tmp_path / "x"), "not the same data"),
        (("union", a, b), "--out is missing"),
        (("mix", a, far, "--proportions", "2;1", "-o", tmp_path / "x"), "not a list such as"),
    ):
        code, _, said = run("manifest", *arguments)
        assert code == 2 and text in said
