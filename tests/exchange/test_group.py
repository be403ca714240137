import pytest

from loader.errors import ConfigError
from loader.exchange.group import device_index


@pytest.mark.parametrize(("local_rank", "count", "index"), [(0, 8, 0), (7, 8, 7), (0, 1, 0), (5, 1, 0)])
def test_each_rank_has_a_cuda_device(local_rank, count, index):
    assert device_index(local_rank, count) == index


def test_no_two_ranks_share_one_of_several():
    with pytest.raises(ConfigError, match=r"local rank 2 has no CUDA device of its own: there are 2 here"):
        device_index(2, 2)
