"""Which kernels compute attention."""

import pytest
import torch

from deltaexp.lab import kernels


@pytest.mark.parametrize(("device", "cudnn"), [("cuda", False), ("cpu", True)])
def test_lengths_that_come_once_are_not_prepared_for(device: str, cudnn: bool) -> None:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    assert before
    with kernels.of_any_length(torch.device(device)):
        assert torch.backends.cuda.cudnn_sdp_enabled() == cudnn
        assert torch.backends.cuda.flash_sdp_enabled()
        assert torch.backends.cuda.mem_efficient_sdp_enabled()
        assert torch.backends.cuda.math_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
