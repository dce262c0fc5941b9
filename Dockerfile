# Two images. Both contain the project in /opt/copd-megatron. A job started with COPD_CONTAINER (launchers/slurm.sh)
# uses the checkout that it was submitted from instead, so rebuild the image only when packages change.
#
#   docker build --target gpu -t copd-megatron:gpu .    H100, H200 and newer: NVIDIA's PyTorch container
#   docker build --target cpu -t copd-megatron:cpu .    tests and tiny models, without a GPU
#   docker run --gpus all --shm-size=8g copd-megatron:gpu copd doctor
#   docker run --gpus all --shm-size=8g --user "$(id -u):$(id -g)" --volume "$PWD:/workspace" copd-megatron:gpu \
#       copd train my.yaml
#   enroot import -o copd.sqsh dockerd://copd-megatron:gpu       for Pyxis: COPD_CONTAINER=$PWD/copd.sqsh
#   apptainer build copd.sif docker-daemon://copd-megatron:gpu   for Apptainer: COPD_CONTAINER=$PWD/copd.sif
#
# The processes in a container are not root's: Docker runs them as the user copd, or as --user says; Pyxis and
# Apptainer run them as you.
#
# A tag can be moved to another image, a digest cannot: the base images are the ones of these digests, and Docker
# refuses anything else. The digests are those of the indexes, so they hold for amd64 and arm64. To build from another
# base image, ask the registry for its digest:
#   docker buildx imagetools inspect python:3.12.12-slim-bookworm --format '{{.Manifest.Digest}}'
#   docker build --target cpu --build-arg CPU_BASE=python:3.12.12-slim-bookworm@sha256:... -t copd-megatron:cpu .
# and the same with GPU_BASE for the other image.
ARG CPU_BASE=python:3.12.12-slim-bookworm@sha256:593bd06efe90efa80dc4eee3948be7c0fde4134606dd40d8dd8dbcade98e669c
# A pre-release of PyTorch 2.13, CUDA 13.3, Python 3.12, NCCL, Transformer Engine and Apex, built to fit together
ARG GPU_BASE=nvcr.io/nvidia/pytorch:26.07-py3@sha256:2140e699b3beaf7f96a0081fd9c9406bc3832b435cdb60dfa2d261f7d2f34a1c

FROM ${CPU_BASE} AS cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PYTHONUNBUFFERED=1
# g++: some packages are compiled here, and torch.compile needs it (rollout.enforce_eager=false). libnuma1: vLLM's
# CPU kernels are linked against it. bubblewrap: the sandbox of the verifiers "code" and "proof", which needs user
# namespaces. For the verifier "proof", add coq (0.5 GB) here, or mount Lean 4 and set COPD_LEAN:
#   docker run --security-opt seccomp=unconfined --security-opt apparmor=unconfined ...
# Apptainer and Pyxis allow them where the host does; "copd doctor" in the container says whether it works.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++=4:12.2.0-3 libnuma1=2.0.16-1 \
        bubblewrap=0.8.0-2+deb12u1 \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/copd-megatron
COPY requirements-cpu.txt ./
RUN python -m pip install --no-deps -r requirements-cpu.txt
COPY . .
RUN python -m pip install --no-deps --no-build-isolation --editable . \
    && python -c "import megatron.core, vllm, copd_megatron.train" \
    && copd doctor
RUN useradd --create-home --uid 10001 copd && install --directory --owner=10001 /workspace
USER 10001
WORKDIR /workspace
CMD ["copd", "doctor"]

FROM ${GPU_BASE} AS gpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PYTHONUNBUFFERED=1
# The base image constrains packages to versions other than those that requirements-gpu.txt pins.
ENV PIP_CONSTRAINT=""
# Only DeepGEMM in vLLM's wheel needs exactly the torch that it was compiled against; vLLM has other FP8 kernels.
ENV VLLM_USE_DEEP_GEMM=0
# An environment on top of the base image's packages. Ours hide theirs where versions differ; pip could not remove
# those that Ubuntu installed.
ENV PATH=/opt/env/bin:${PATH}
RUN python3 -m venv --system-site-packages --without-pip /opt/env
# The sandbox of the verifiers "code" and "proof"; see the other image. Ubuntu keeps only the newest version of a package.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends bubblewrap \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/copd-megatron
COPY requirements-gpu.txt ./
# Everything except what the base image provides and what is compiled for a different torch or CUDA.
RUN grep -vE '^(#|torch|triton==|nvidia-(cublas|cuda-|cudnn-cu|cuf|cur|cusolver|cusparse|nccl|nv)|cuda-toolkit|transformer-engine)' \
        requirements-gpu.txt >/tmp/requirements.txt \
    && python3 -m pip install --no-deps -r /tmp/requirements.txt \
    && rm /tmp/requirements.txt
# vLLM's wheel uses torch's stable interface (2.11 and later). Check that this torch has every symbol it needs.
RUN vllm=$(python3 -c "import importlib.util; print(*importlib.util.find_spec('vllm').submodule_search_locations)") \
    && torch=$(python3 -c "import torch; print(*torch.__path__)") \
    && find "${vllm}" -name '*.so' -not -path '*/deep_gemm/*' -exec \
        env "LD_LIBRARY_PATH=${torch}/lib:${LD_LIBRARY_PATH-}" ldd -r {} + >/tmp/links.txt 2>&1 \
    && grep -q 'libtorch_cuda.so => /' /tmp/links.txt \
    && ! grep -E 'undefined symbol: (torch_|aoti_)|(torch|c10).* => not found' /tmp/links.txt \
    && rm /tmp/links.txt
COPY . .
# amp_C: checks for Apex with CUDA extensions, not the unrelated package of that name
RUN python3 -m pip install --no-deps --no-build-isolation --editable . \
    && python3 -c "import torch; assert torch.__version__.startswith('2.13.'), torch.__version__; torch.ones(1).numpy()" \
    && python3 -c "import amp_C, apex.optimizers, transformer_engine.pytorch, megatron.core, vllm" \
    && python3 -c "import copd_megatron.train"
RUN useradd --create-home --uid 10001 copd && install --directory --owner=10001 /workspace
USER 10001
WORKDIR /workspace
CMD ["copd", "doctor"]
