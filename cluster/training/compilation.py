"""Whether ``torch.compile`` can work on this machine, and the compilation of a model's blocks."""

import logging
import os
import shutil
import sysconfig
from pathlib import Path

from torch import nn

from cluster.training.config import ComputeDtype
from moe_bitnet.model import MoETransformer

logger = logging.getLogger(__name__)


def compile_obstacle(device_type: str, compute_dtype: ComputeDtype = "bfloat16") -> str | None:
    """Return why ``torch.compile`` cannot work here, or ``None``.

    On a CPU it writes C++ that includes ``Python.h``; on a GPU it needs Triton, which needs a C compiler.
    The experts' grouped product compiles in bfloat16 alone (torch 2.13).
    """
    if compute_dtype != "bfloat16":
        return f"experts in {compute_dtype} cannot be compiled; use compute_dtype bfloat16"
    if device_type == "cpu":
        compilers = (os.environ.get("CXX"), "g++", "c++", "clang++")
    else:
        compilers = (os.environ.get("CC"), "gcc", "cc", "clang")
    if not any(shutil.which(compiler) for compiler in compilers if compiler):
        return f"no {'C++' if device_type == 'cpu' else 'C'} compiler was found; install g++"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        return f"{header} is missing; install the development package of Python"
    return None


def compile_blocks(model: MoETransformer, compute_dtype: ComputeDtype, zero_stage: int = 0) -> bool:
    """Compile each block in place, if that is possible here.

    All blocks share one graph, so that the first step compiles it once. The compiler runs in that step.

    Returns:
        whether the blocks will be compiled; if not, the reason is logged as a warning.
    """
    obstacle = compile_obstacle(model.embedding.weight.device.type, compute_dtype)
    if zero_stage == 3:
        obstacle = "ZeRO 3 fetches parameters between the operations of a block; use zero_stage 0, 1 or 2"
    if obstacle is not None:
        logger.warning("training runs without torch.compile, about half as fast: %s", obstacle)
        return False
    for block in model.blocks:
        assert isinstance(block, nn.Module)
        block.compile()
    return True
