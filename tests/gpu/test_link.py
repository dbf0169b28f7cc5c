"""The link between the GPU and its host has rates of the order of PCIe's."""

import pytest
import torch
import torch.distributed as dist

from megatron.launch.link import measure_link

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_the_link_is_measured_in_both_directions():
    link = measure_link(torch.device("cuda", 0))
    assert all(1 < rate < 1000 for rate in (link.to_gpu, link.to_host, link.both_ways))
    assert link.both_ways < 1.05 * (link.to_gpu + link.to_host)
