# rlprompt in a container, for CPUs or for NVIDIA GPUs.
#
#   docker build -t rlprompt .                                   # CPU
#   docker build -t rlprompt:cuda --build-arg DEVICE=cuda .      # NVIDIA GPUs
#   docker run --rm -it -v "$PWD:/work" -v rlprompt-cache:/cache rlprompt init first
#   docker run --rm -it -v "$PWD:/work" -v rlprompt-cache:/cache rlprompt train first/recipe.yaml
#   docker run --rm -p 8000:8000 -v "$PWD:/work" -v rlprompt-cache:/cache rlprompt \
#       serve concise=runs/concise/artifact --host 0.0.0.0 --keys keys.json
#   docker run --rm -it --gpus all ... rlprompt:cuda doctor      # needs NVIDIA's container toolkit
#
# DEVICE   cpu or cuda: which build of torch. The CUDA build brings its own CUDA libraries.
# EXTRAS   extras of pyproject.toml with commas, such as wandb,rules.
# UID      the user that commands run as; the folder mounted at /work must be writable to it.
# PYTHON   the version of Python. The tests run on 3.11, the versions of constraints.txt are theirs.

ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS wheel
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /dist .

FROM python:${PYTHON}-slim
ARG DEVICE=cpu
ARG EXTRAS=""
ARG UID=1000

# The kernels (C++ for CPUs, Triton's launchers for GPUs) are compiled where they run, once.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ libc6-dev \
 && rm -rf /var/lib/apt/lists/*

COPY constraints.txt /tmp/constraints.txt
RUN case "$DEVICE" in \
      cpu) index=https://download.pytorch.org/whl/cpu ;; \
      cuda) index=https://pypi.org/simple ;; \
      *) echo "DEVICE is '$DEVICE'; write cpu or cuda" >&2; exit 2 ;; \
    esac \
 && pip install --no-cache-dir --constraint /tmp/constraints.txt \
      --index-url "$index" --extra-index-url https://pypi.org/simple torch

COPY --from=wheel /dist/ /tmp/dist/
RUN wheel="$(echo /tmp/dist/*.whl)" \
 && pip install --no-cache-dir --constraint /tmp/constraints.txt "$wheel${EXTRAS:+[$EXTRAS]}" \
 && rm -rf /tmp/dist /tmp/constraints.txt

# Nothing runs as root: rewards are code of users.
RUN useradd --create-home --uid "$UID" rlprompt \
 && mkdir --parents /work /cache \
 && chown rlprompt:rlprompt /work /cache
USER rlprompt
ENV RLPROMPT_CACHE=/cache
WORKDIR /work
# Where `rlprompt serve` listens, with --host 0.0.0.0. `docker stop` sends SIGTERM, on which it answers
# what is in progress and ends; give it the time: docker stop --time 40.
EXPOSE 8000
ENTRYPOINT ["rlprompt"]
CMD ["--help"]
