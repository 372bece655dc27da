"""The table of sizes by slice: which rows are asked for, and what a line says of a plan that is kept or is not."""

from dataclasses import replace

import pytest

from experiments import plan_table
from llama_jax.errors import UserError
from llama_jax.parallel.mesh import mesh_sizes_of
from llama_jax.planning import cache, planner
from llama_jax.planning.compiling import Refused
from llama_jax.planning.plan import Memory
from llama_jax.planning.roofline import Roofline
from llama_jax.planning.topology import parse_topology
from tests.planning.test_plan_verb import PLAN


@pytest.fixture
def rows(monkeypatch, capsys):
    """The cells of the lines that are printed, with plans that are made up."""

    def call(make, **arguments):
        monkeypatch.setattr(plan_table, "prepare_environment", lambda chip: None)
        monkeypatch.setattr(plan_table, "load_quietly", lambda: None)
        monkeypatch.setattr(planner, "kept_or_made", lambda job, topology, fresh: make(job))
        plan_table.main(**arguments)
        return [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]

    return call


def made_up(job):
    memory = Memory(2e9, 4e9, 0.0, 0.0, 8e9, 1e9, beside=1e9)
    return replace(PLAN, stage=job.stage, memory=memory, seconds=Roofline(40.0, 20.0, 0.5, 0.0))


def test_every_row_suits_its_slice_and_each_size_has_every_generation_and_kind_of_work():
    """Nothing is compiled: a mesh that does not divide, or a batch, would be refused here."""
    for work, size, name, slices, own in plan_table.ROWS:
        topology = parse_topology(name, slices)
        config = plan_table.recipe_of(work, size, own)
        jobs = planner.jobs_of(config, plan_table.MODELS[size], mesh_sizes_of(config.mesh, topology.chips, slices), 512)
        assert len(jobs) == (4 if work == "ppo" else 1)
    pretrained = {(size, name.split(":")[0]) for work, size, name, *_ in plan_table.ROWS if work == "pretrain"}
    assert pretrained >= {(size, chip) for size in plan_table.MODELS for chip in ("v4", "v5e", "v5p", "v6e", "h100")}
    for work in ("sft", "generate"):
        assert {size for kind, size, *_ in plan_table.ROWS if kind == work} == set(plan_table.MODELS)


def test_a_line_says_what_takes_the_most_and_what_binds(rows):
    (line,) = rows(made_up, only="pretrain 7b v5p")
    assert line == [
        *(
            "pretrain",
            "7B",
            "v5p:4x4x4",
            "fsdp=16, 2 x 512 rows, full",
            "16.0 of 16.0 GB",
            "temporary 8.0 GB",
            "40 (compute)",
        ),
        *("75%", "60 s, 2.0 GB"),
    ]
    assert len(rows(made_up, only="ppo 7b v5p")) == 4


def test_what_does_not_fit_says_by_how_much(rows):
    refused = Refused(20e9, 16e9, "")
    (line,) = rows(lambda job: replace(PLAN, refused=refused, memory=None, seconds=None), only="sft 7b v5e")
    assert "4.00 GB too much" in line[4]


def test_what_is_not_planned_is_left_out_where_nothing_may_be_compiled(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "cache_folder", lambda: tmp_path)
    assert rows(None, only="generate 7b v", cached=True) == []


def test_no_such_row_is_refused_with_those_that_there_are():
    with pytest.raises(UserError, match="matches none of pretrain 7b v4:4x4x4, "):
        plan_table.main(only="8b")
