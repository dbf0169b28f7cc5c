# CUDA's compiler is in the image, because DeepSpeed and flash-attn-4 compile kernels when they are first used. Its
# version is that of PyPI's torch. docs/installation.md shows how to build and run the image.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04

# RDMA libraries for NCCL, libaio for offloading to NVMe, ssh and pdsh for DeepSpeed's launcher on several machines.
# Ubuntu removes superseded versions from its archive, so pinned ones would break the build.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends \
      g++ ibverbs-providers libaio-dev libibverbs1 librdmacm1 make ninja-build openssh-client pdsh \
      python3 python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*

# Ubuntu's image has a user with the id 1000, which is that of most people who build for themselves.
ARG UID=10001
RUN if id ubuntu; then userdel --remove ubuntu; fi \
 && useradd --create-home --uid "$UID" trainer \
 && install --directory --owner "$UID" /opt/ulysses-offload /opt/venv /work
USER $UID

ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    DS_BUILD_OPS=0 \
    FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1

WORKDIR /opt/ulysses-offload
COPY --chown=$UID . .
RUN python3 -m venv /opt/venv \
 && pip install --no-cache-dir --editable '.[data,flash-attn-4,hf,plots,qlora,tensorboard,tiktoken,wandb]'

# Data and runs are mounted here.
WORKDIR /work
CMD ["ulysses-pretrain", "--help"]
