"""Digits upright or turned, anywhere on a canvas: which of GCONV and CONV does evidence keep?"""

from __future__ import annotations

import json

import pytest

from experiments.choosing_groups import EXPERIMENT, choose, group_shares, summary_table
from experiments.records import RESULTS

STORED = [
    json.loads(path.read_text(encoding="utf-8"))
    for path in sorted((RESULTS / EXPERIMENT).glob("*.json"))
]
SHORTFALL = 0.02  # nats per datum


def check(record):
    kept = record["log_evidence_per_datum"]
    assert kept >= max(record["starts"].values()) - 1e-9
    assert kept >= record["starts"]["only:gconv"] - SHORTFALL
    assert kept >= record["starts"]["only:conv"] - SHORTFALL
    if record["pose"] == "turned":
        assert min(group_shares(record)) >= 0.9


def test_a_short_run_keeps_the_best_start():
    record = choose("turned", seed=0, epochs=2, restarts="symmetric")
    assert record["kept"] == "symmetric"
    assert len(group_shares(record)) == 3


@pytest.mark.parametrize("record", STORED, ids=lambda r: f"{r['pose']}-{r['seed']}")
def test_stored_runs(record):
    check(record)


def test_every_stored_run_has_a_row():
    assert STORED
    rows = summary_table(STORED).splitlines()
    assert len(rows) == 2 + len(STORED) + len({r["pose"] for r in STORED})


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("pose", ["upright", "turned"])
def test_the_group_is_kept_where_the_data_have_it(pose, seed):
    check(choose(pose, seed))
