# syntax=docker/dockerfile:1
# Two images. Both hold the project in /opt/copd-megatron; launchers/slurm.sh puts the checkout that a job was
# submitted from in front of it (COPD_CONTAINER), so that the image is built anew only when packages change.
#
#   docker build --target gpu -t copd-megatron:gpu .    H100, H200 and newer: NVIDIA's PyTorch container
#   docker build --target cpu -t copd-megatron:cpu .    tests and tiny models, without a GPU
#   docker run --gpus all --shm-size=8g copd-megatron:gpu copd doctor
#   enroot import -o copd.sqsh dockerd://copd-megatron:gpu       for Pyxis: COPD_CONTAINER=$PWD/copd.sqsh
#   apptainer build copd.sif docker-daemon://copd-megatron:gpu   for Apptainer: COPD_CONTAINER=$PWD/copd.sif

FROM python:3.12.12-slim-bookworm AS cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PYTHONUNBUFFERED=1
# vLLM's CPU kernels are linked against it
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libnuma1=2.0.16-1 \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/copd-megatron
COPY requirements-cpu.txt ./
RUN python -m pip install --no-deps -r requirements-cpu.txt
COPY . .
RUN python -m pip install --no-deps --no-build-isolation --editable . \
    && python -c "import megatron.core, vllm, copd_megatron.train" \
    && copd doctor
CMD ["copd", "doctor"]

# PyTorch 2.13, CUDA 13.3, Python 3.12, NCCL, Transformer Engine and Apex, built for each other
FROM nvcr.io/nvidia/pytorch:26.07-py3 AS gpu
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PYTHONUNBUFFERED=1
# the container's own constraints pin what requirements-gpu.txt pins otherwise
ENV PIP_CONSTRAINT=""
# compute capabilities that vLLM is compiled for, and how many compilers run at once
ARG TORCH_CUDA_ARCH_LIST="9.0 10.0"
ARG MAX_JOBS=16
WORKDIR /opt/copd-megatron
COPY requirements-gpu.txt ./
# All but what the container has of its own, and what was compiled against another torch than the container's;
# vLLM is compiled against the container's.
RUN grep -vE '^(#|torch|triton==|nvidia-(cublas|cuda-|cudnn-cu|cuf|cur|cusolver|cusparse|nccl|nv)|cuda-toolkit|transformer-engine|vllm==)' \
        requirements-gpu.txt >/tmp/requirements.txt \
    && python3 -m pip install --no-deps -r /tmp/requirements.txt \
    && rm /tmp/requirements.txt \
    && grep '^vllm==' requirements-gpu.txt >/tmp/vllm.txt \
    && MAX_JOBS="${MAX_JOBS}" TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST}" \
        python3 -m pip install --no-deps --no-build-isolation --no-binary vllm -r /tmp/vllm.txt \
    && rm /tmp/vllm.txt
COPY . .
# amp_C: Apex with its CUDA extensions, not its namesake on the package registry
RUN python3 -m pip install --no-deps --no-build-isolation --editable . \
    && python3 -c "import torch; assert torch.__version__.startswith('2.13.'), torch.__version__" \
    && python3 -c "import amp_C, apex.optimizers, transformer_engine.pytorch, megatron.core, vllm" \
    && python3 -c "import copd_megatron.train"
CMD ["copd", "doctor"]
