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
# g++: some packages come as source, and torch.compile needs it (rollout.enforce_eager=false). libnuma1: vLLM's CPU
# kernels are linked against it.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++=4:12.2.0-3 libnuma1=2.0.16-1 \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/copd-megatron
COPY requirements-cpu.txt ./
RUN python -m pip install --no-deps -r requirements-cpu.txt
COPY . .
RUN python -m pip install --no-deps --no-build-isolation --editable . \
    && python -c "import megatron.core, vllm, copd_megatron.train" \
    && copd doctor
CMD ["copd", "doctor"]

# PyTorch 2.13 (a pre-release of it), CUDA 13.3, Python 3.12, NCCL, Transformer Engine and Apex, built for each other
FROM nvcr.io/nvidia/pytorch:26.07-py3 AS gpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PYTHONUNBUFFERED=1
# the container's own constraints pin what requirements-gpu.txt pins otherwise
ENV PIP_CONSTRAINT=""
# The wheel's DeepGEMM alone needs the very torch that it was compiled against; vLLM has other FP8 kernels.
ENV VLLM_USE_DEEP_GEMM=0
# An environment over the container's packages: they are hidden where ours differ, not removed, which pip cannot do to
# those that came from Ubuntu.
ENV PATH=/opt/env/bin:${PATH}
RUN python3 -m venv --system-site-packages --without-pip /opt/env
WORKDIR /opt/copd-megatron
COPY requirements-gpu.txt ./
# All but what the container has of its own, and what is compiled for another torch or CUDA than the container's.
RUN grep -vE '^(#|torch|triton==|nvidia-(cublas|cuda-|cudnn-cu|cuf|cur|cusolver|cusparse|nccl|nv)|cuda-toolkit|transformer-engine)' \
        requirements-gpu.txt >/tmp/requirements.txt \
    && python3 -m pip install --no-deps -r /tmp/requirements.txt \
    && rm /tmp/requirements.txt
# vLLM's wheel uses torch through its stable interface, of 2.11 and later: this torch has to have all that it wants
RUN vllm=$(python3 -c "import importlib.util; print(*importlib.util.find_spec('vllm').submodule_search_locations)") \
    && torch=$(python3 -c "import torch; print(*torch.__path__)") \
    && find "${vllm}" -name '*.so' -not -path '*/deep_gemm/*' -exec \
        env "LD_LIBRARY_PATH=${torch}/lib:${LD_LIBRARY_PATH-}" ldd -r {} + >/tmp/links.txt 2>&1 \
    && grep -q 'libtorch_cuda.so => /' /tmp/links.txt \
    && ! grep -E 'undefined symbol: (torch_|aoti_)|(torch|c10).* => not found' /tmp/links.txt \
    && rm /tmp/links.txt
COPY . .
# amp_C: Apex with its CUDA extensions, not its namesake on the package registry
RUN python3 -m pip install --no-deps --no-build-isolation --editable . \
    && python3 -c "import torch; assert torch.__version__.startswith('2.13.'), torch.__version__; torch.ones(1).numpy()" \
    && python3 -c "import amp_C, apex.optimizers, transformer_engine.pytorch, megatron.core, vllm" \
    && python3 -c "import copd_megatron.train"
CMD ["copd", "doctor"]
