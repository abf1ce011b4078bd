# coalm_nemo over what the base image has. A base with torch is a cluster's: its packages stay as they are, and
# `coalm doctor --expect-cluster` checks them. Any other with Python 3.11 or 3.12 and pip gets torch from constraints.txt
# first: `--build-arg BASE=python:3.12-slim`. docs/container.md says more.
ARG BASE=nvcr.io/nvidia/nemo:26.02
FROM ${BASE}

USER 0:0
WORKDIR /opt/coalm_nemo

# What the project needs and the base lacks: a layer of its own, built again only when these files change. A private
# index goes in as the secret `pip.conf`, which no layer keeps.
COPY pyproject.toml constraints.txt ./
COPY container/install.py container/
RUN --mount=type=secret,id=pip.conf python3 container/install.py packages

COPY . .
RUN --mount=type=secret,id=pip.conf python3 container/install.py project

# Any user id can run it, also one without an entry in /etc/passwd: it has a home to write in (caches follow HOME) and a
# name, without which torch and W&B fail.
ENV HOME=/home/coalm LOGNAME=coalm
RUN mkdir -p /home/coalm /workspace && chmod 1777 /home/coalm /workspace
WORKDIR /workspace
USER 1000:1000

# Last, so that a new commit alone builds no layer again.
ARG BASE
ARG REVISION=unknown
ARG CREATED=unknown
LABEL org.opencontainers.image.title="coalm_nemo" \
      org.opencontainers.image.description="Fine-tune Llama into CoALM, from a laptop to 16 H100 nodes and more" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.base.name="${BASE}"

CMD ["coalm", "doctor"]
