# ParaBlock with the extra for real sites, on the CPU build of torch, as a user without rights:
#
#   docker build -t parablock .
#   docker run --rm -v "$PWD:/data" parablock run config.yaml --output-dir runs/mine
#
# For CUDA: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126, and --gpus all when it runs.
# The base image is pinned by its digest (linux/amd64 and arm64); `make base` writes the one that the tag has now.
ARG BASE=python:3.11-slim-bookworm@sha256:b18992999dbe963a45a8a4da40ac2b1975be1a776d939d098c647482bcad5cba

FROM ${BASE} AS build
WORKDIR /source
RUN pip install --no-cache-dir build==1.6.1
COPY pyproject.toml README.md LICENSE CHANGELOG.md ./
COPY src src
RUN python -m build --wheel --outdir /wheels

FROM ${BASE}
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" torch==2.13.0
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir "$(ls /wheels/*.whl)[deploy]" \
    && useradd --create-home --uid 1000 parablock \
    && install --directory --owner parablock /data
USER 1000
WORKDIR /data
ENTRYPOINT ["parablock"]
CMD ["--help"]
