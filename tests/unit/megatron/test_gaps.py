"""What a process on CUDA finds of Megatron-Core where no package of CUDA kernels is installed."""

import subprocess
import sys

from without_engine import without_engine

PROGRAM = """
import torch
here = torch.cuda.current_device
from millrace.megatron.gaps import fill_gaps
fill_gaps()
from megatron.core import optimizer
from megatron.core.optimizer import distrib_optimizer
from megatron.core.ssm import mamba_mixer
from megatron.core.transformer.moe import moe_layer, moe_utils
print(optimizer.Adam.__name__, optimizer.USING_PYTORCH_OPTIMIZER, distrib_optimizer.HAVE_APEX_OR_TE)
print(moe_utils.te_general_gemm, moe_layer.TELinear.__name__)
print(mamba_mixer.HAVE_MAMBA_SSM, mamba_mixer.mamba_split_conv1d_scan_combined.__module__)
print(torch.cuda.current_device is here)
"""


@without_engine
def test_gaps_are_filled_and_cuda_itself_is_left_alone() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "GroupAdam False True",
        "None DuplicatedLinear",
        "True millrace.megatron.state_space",
        "True",
    ]
