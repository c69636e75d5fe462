# An image for the nodes of a GPU cluster, head and workers alike. The wheels bring CUDA 13.0; the node needs a driver of version 580 or newer.
#   docker build -t selma_ray .
FROM python:3.12-slim-bookworm

# A compiler for Triton's and DeepSpeed's kernels; wget for KubeRay's probes; rsync and ssh for Ray's cluster launcher.
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential openssh-client procps rsync wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 ray
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility PATH=/home/ray/venv/bin:$PATH

USER ray
WORKDIR /home/ray/selma_ray
COPY --chown=ray requirements/gpu.txt requirements/gpu.txt
RUN python -m venv /home/ray/venv && pip install --no-cache-dir --no-deps -r requirements/gpu.txt
COPY --chown=ray . .
RUN pip install --no-cache-dir --no-deps .
