"""vllm_generate.py with the operation that vLLM uses on a CUDA device. fla's kernel runs in Triton's interpreter."""

import runpy

from interpreter import on_cuda
from vllm_environment import SCRIPT

from modeling_attnres import vllm as plugin
from modeling_attnres.depth_attention import fla_depth_attention


def with_kernel(*arguments):
    print("The kernel runs.")
    with on_cuda():
        return fla_depth_attention(*arguments)


if __name__ == "__main__":
    plugin.auto_depth_attention = with_kernel
    plugin.depth_attention_without_kernel = plugin.depth_attention_with_kernel
    runpy.run_path(str(SCRIPT), run_name="__main__")
