# An image that runs every recipe, on NVIDIA's NeMo container: its torch, TransformerEngine and Megatron stay as they
# are, only what is missing beside them is added.
#
#   docker build -t nemo-cosmos .
#   docker run --rm --gpus all --ipc host -v "$PWD/runs:/opt/nemo_cosmos/runs" nemo-cosmos nemo-cosmos doctor
ARG BASE=nvcr.io/nvidia/nemo:25.09
FROM ${BASE}

WORKDIR /opt/nemo_cosmos

# The environment first, so that a change of our code does not install it anew.
COPY setup.py LICENSE ./
COPY requirements requirements
COPY nemo_cosmos/__init__.py nemo_cosmos/__init__.py
COPY conf conf
RUN versions() { python -c "import importlib.metadata as m; print({d.metadata['Name']: d.version for d in m.distributions() \
        if d.metadata['Name'] in ('torch', 'transformer_engine', 'transformer-engine', 'megatron-core', 'nemo-toolkit', 'numpy')})"; } \
    && before="$(versions)" \
    && python requirements/install.py --here \
    && test "$before" = "$(versions)" \
    && rm -rf /root/.cache/pip /var/lib/apt/lists/*

COPY . .
RUN python requirements/install.py --here && nemo-cosmos doctor

ENV MUJOCO_GL=egl \
    TOKENIZERS_PARALLELISM=false
CMD ["nemo-cosmos", "--help"]
