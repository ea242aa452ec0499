"""If this fails, a server under good, bad, slow and aborted clients at once leaves good ones
unanswered or loses memory. SOAK_MINUTES=60 makes the long form longer.
"""

import os

import pytest
from support.api_soak import api_in_soak
from support.page_soak import page_in_soak
from support.soak import MAX_GROWTH, Soak

# Each is (assets, folder) -> a context of a process id and behaviours.
SITES = [api_in_soak, page_in_soak]
WARM_ACTS = 80
LONG_WARM_ACTS = 1600
NUM_READINGS = 5  # a peak passes between them, a leak does not
MINUTES = float(os.environ.get("SOAK_MINUTES", 30))


@pytest.mark.slow
@pytest.mark.parametrize("site", SITES, ids=lambda site: site.__name__)
def test_short_soak_leaves_the_memory_as_it_was(assets, tmp_path, site):
    with site(assets, tmp_path) as (pid, behaviours):
        check(Soak(pid, behaviours), warm={"num_acts": WARM_ACTS}, long={"num_acts": 120})


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("site", SITES, ids=lambda site: site.__name__)
def test_long_soak_leaves_the_memory_as_it_was(assets, tmp_path, site):
    with site(assets, tmp_path) as (pid, behaviours):
        warm = {"num_acts": LONG_WARM_ACTS}
        check(Soak(pid, behaviours), warm=warm, long={"seconds": 60 * MINUTES})


def check(soak: Soak, *, warm: dict, long: dict) -> None:
    """Run twice; between the two the memory may not grow. Every good request is checked in both."""
    soak.run(**warm)
    before = soak.memory_mib()
    soak.run(**long)
    for _ in range(NUM_READINGS):
        if (after := soak.memory_mib()) <= before * (1 + MAX_GROWTH):
            break
        soak.run(num_acts=WARM_ACTS)
    print(f"{before:.0f} MiB before, {after:.0f} MiB after; {dict(soak.counts)}")
    assert set(soak.counts) == {behaviour.name for behaviour in soak.behaviours}
    assert after <= before * (1 + MAX_GROWTH)
