"""Energy and carbon: the paper's own numbers, and that what is assumed says so."""

import pytest

from llama_jax.planning.carbon import footprint
from llama_jax.planning.hardware import V4, V5P


def test_the_papers_carbon():
    """Table 2: 1,720,320 A100 hours of the 70B at 400 W are 291.42 t."""
    run = footprint(V5P, 1_720_320, watts=400)
    assert run.tonnes == pytest.approx(291.42, rel=1e-3)
    assert run.kwh == pytest.approx(1_720_320 * 0.4 * 1.1)
    assert run.cost is None and footprint(V5P, 1000, price=4.2).cost == pytest.approx(4200)


def test_a_power_that_is_assumed_says_so():
    assert "assumed: none is published for v5p" in footprint(V5P, 1).watts_from
    assert (footprint(V4, 1).watts, footprint(V4, 1).watts_from) == (192, "published, the most that was measured")
