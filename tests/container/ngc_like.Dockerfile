# A base that is laid out and versioned like NVIDIA's NeMo images: a pre-release torch for CUDA, megatron-core,
# Transformer Engine and Apex for the system's Python, a virtual environment without pip over it that comes first on PATH,
# and constraints of its own that contradict what is installed. Made of this project's CPU image: torch, megatron-core and
# the rest are real packages under other version numbers; Transformer Engine and Apex are empty; nothing sees a GPU.
ARG BASE
FROM ${BASE}
# hadolint ignore=DL3002
USER 0:0
ARG WITHOUT=nothing
COPY ngc_like.py /
RUN python3 /ngc_like.py ${WITHOUT} && rm -r /ngc_like.py /opt/coalm_nemo /workspace /home/coalm
RUN python3 -m venv --without-pip --system-site-packages /opt/venv
ENV PATH=/opt/venv/bin:$PATH HOME=/root PIP_CONSTRAINT=/etc/pip/constraint.txt
WORKDIR /
