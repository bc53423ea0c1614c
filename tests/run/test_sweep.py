"""`fastpref sweep`: several objectives and betas on one encoding and one reference cache."""

import json

import pytest
import yaml
from commands import arguments, options, write_pairs
from safetensors.torch import load_file

from fastpref.cli import main
from fastpref.run.config import Config
from fastpref.run.train import train

ARTIFACT = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs", count=6)


def flags(media, folder, **changes) -> list[str]:
    values = options(media, folder, max_train_steps=2, **changes)
    del values["beta"]
    return arguments(values)


def test_every_objective_at_every_beta_pays_the_reference_once(media, tmp_path, capsys):
    folder = tmp_path / "sweep"
    cached = {"reference": "cached", "draws_per_pair": 2, "importance_steps": 5}
    command = ["sweep", "--objectives", "dpo,sdpo", "--betas", "300,1000"]
    assert main([*command, *flags(media, folder, **cached)]) == 0
    said = capsys.readouterr().out
    runs = [f"{name}-beta{beta}" for name in ("dpo", "sdpo") for beta in (300, 1000)]
    assert [path.name for path in sorted(folder.glob("*-beta*"))] == sorted(runs)
    table = [line.split() for line in said.splitlines()[-4:]]
    assert [row[:2] for row in table] == [name.split("-beta") for name in runs]
    records = {name: yaml.safe_load((folder / name / "config.yaml").read_text()) for name in runs}
    steps = {name: record["importance_steps"] for name, record in records.items()}
    assert steps == dict(zip(runs, (None, None, 5, 5), strict=True))
    caches = list((folder / "encoded").glob("reference/errors-*.safetensors"))
    assert [len(load_file(file)["pair_id"]) for file in caches] == [4]  # two steps' pairs
    for name, known in zip(runs, (0, 1, 1, 1), strict=True):
        lines = (folder / name / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["perf/reference_cached"] for line in lines] == [known, known]
    written = [file.stat().st_mtime_ns for file in caches]

    # A run alone on the same data is the sweep's; a second sweep computes nothing again.
    alone = options(folder / "encoded", tmp_path / "alone", beta=300.0, max_train_steps=2)
    train(Config(**alone | {"reference": "cached", "draws_per_pair": 2}))
    mine, its = (load_file(p / ARTIFACT) for p in (tmp_path / "alone", folder / "dpo-beta300"))
    assert all((mine[name] == its[name]).all() for name in mine)
    assert main([*command, *flags(media, folder, **cached)]) == 0
    said = capsys.readouterr().out
    assert said.count("already trained to step 2") == 4
    assert [file.stat().st_mtime_ns for file in caches] == written
    assert json.loads((folder / "dpo-beta300" / "result.json").read_text())["global_step"] == 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--objectives", "dpo,best"], "--objectives: expected some of dpo,ipo"),
        (["--betas", "1,nan"], "--betas: expected finite numbers above 0, got nan"),
        (["--betas", "much"], "--betas: expected numbers with commas, got 'much'"),
        (["--beta", "3"], "--beta has no effect in a sweep: remove it"),
        (["--objective", "hinge"], "--objective has no effect in a sweep: remove it"),
        (["--objective", "dpo"], "--objective has no effect in a sweep: remove it"),
        (["--clip", "0.1"], "clip has no effect with objectives dmpo: remove it"),
        (["--importance_steps", "5"], "importance_steps has no effect with objectives dmpo"),
        (["--alpha", "0.7"], "alpha must be finite and > 0 and < 0.5, got 0.7"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_written(change, says, media, tmp_path, capsys):
    given = {"--objectives": "dmpo", "--betas": "1"} | dict([change])
    folder = tmp_path / "sweep"
    command = [word for pair in given.items() for word in pair]
    assert main(["sweep", *command, *flags(media, folder)]) == 1
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1 and not folder.exists()
