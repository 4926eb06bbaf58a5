# syntax=docker/dockerfile:1
#   docker build --target cpu  -t slipstream:cpu .
#   docker build --target cuda -t slipstream:cuda .
# For a small CPU image, name PyTorch's index of CPU wheels (its install page has the address):
#   docker build --target cpu --build-arg TORCH_INDEX=https://… -t slipstream:cpu .
# The root file system may be read-only: only /cache (models, compiled kernels) and /tmp are written.

FROM python:3.11-slim AS source
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CACHE_DIR=/var/cache/pip PATH=/venv/bin:$PATH
RUN python -m venv /venv
WORKDIR /src
COPY pyproject.toml requirements.lock README.md LICENSE ./
COPY app app
COPY batching batching
COPY config config
COPY loadtest loadtest

FROM source AS build-cpu
ARG TORCH_INDEX=
# hadolint ignore=DL3042
RUN --mount=type=cache,target=/var/cache/pip \
    pip install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} --constraint requirements.lock '.[otel]'

FROM source AS build-cuda
# hadolint ignore=DL3042
RUN --mount=type=cache,target=/var/cache/pip \
    pip install --constraint requirements.lock '.[otel]'

FROM python:3.11-slim AS runtime
# The compiler is used at run time, for CPU kernels and for Triton's launchers.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --no-create-home --home-dir /cache slipstream \
    && install --directory --owner=slipstream /cache
ENV PATH=/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/cache \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    TORCH_EXTENSIONS_DIR=/cache/torch_extensions \
    TRITON_CACHE_DIR=/cache/triton \
    SLIPSTREAM_HOST=0.0.0.0 \
    SLIPSTREAM_PORT=8000
WORKDIR /cache
VOLUME /cache
EXPOSE 8000
USER 10001
# The start period covers the download of a large model.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --retries=3 \
    CMD ["python", "-c", "import os, ssl, urllib.request as r; e = os.environ; r.urlopen(f\"http{'s' if e.get('SLIPSTREAM_TLS_CERT') else ''}://127.0.0.1:{e['SLIPSTREAM_PORT']}/health\", timeout=4, context=ssl._create_unverified_context())"]
ENTRYPOINT ["slipstream"]
CMD ["serve"]

FROM runtime AS cuda
COPY --from=build-cuda /venv /venv
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

# Last, so that it is what a build without --target makes.
FROM runtime AS cpu
COPY --from=build-cpu /venv /venv
