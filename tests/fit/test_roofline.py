"""The arithmetic of the roofline."""

import pytest

from opd_jax.fit.collectives import Collective
from opd_jax.fit.hardware import CARDS, TPUS
from opd_jax.fit.roofline import step_time


def test_each_resource_takes_its_work_over_what_it_reaches():
    sent = [Collective("all-gather", "fsdp", 3, 9e10)]
    found = step_time(TPUS["v5e"], 197e12 * 0.6 * 2, 8.19e11 * 0.8, sent)
    assert found.compute == pytest.approx(2.0)
    assert found.memory == pytest.approx(1.0)
    assert found.links == pytest.approx(1 / 0.8)
    assert found.seconds == found.compute
    assert found.bound == "compute"


def test_between_nodes_the_network_counts():
    device = CARDS["h100"].device
    inside = Collective("all-gather", "tensor", 1, 4.5e11 * 0.8)
    between = Collective("all-reduce", "data", 1, 4.5e11 * 0.8 + 5e10 * 0.8, 5e10 * 0.8)
    assert step_time(device, 0, 0, [inside]).links == pytest.approx(1.0)
    found = step_time(device, 1e12, 1e12, [inside, between])
    assert found.links == pytest.approx(3.0)
    assert found.bound == "links"


def test_between_slices_the_hosts_network_counts():
    between = Collective("all-reduce", "data", 1, 3.125e9 * 0.8, 3.125e9 * 0.8)
    assert step_time(TPUS["v5e"], 0, 0, [between]).links == pytest.approx(1.0)


def test_transfers_from_the_host_come_on_top():
    found = step_time(CARDS["h100"].device, 989e12 * 0.6, 0, [], 6.4e10 * 0.8 * 2)
    assert found.host == pytest.approx(2.0)
    assert found.seconds == pytest.approx(3.0)
    assert found.bound == "host"
