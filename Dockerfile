# One image for every role of Snowskin: `docker build -t snowskin .`; the commands in docker-compose.yml say which role runs.
#
#   --build-arg TORCH=cpu       PyTorch's own CPU wheel (0.2 GB; the default)
#   --build-arg TORCH=default   the package index's build, with CUDA on x86-64 (3 GB)
#
# Runs as user 10001 without rights, writes to /tmp and /run/snowskin only, and stops on SIGTERM with a drain.

FROM python:3.11.13-slim-bookworm AS build
ARG TORCH=cpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/snowskin
WORKDIR /src
# Dependencies first: a change of our own code leaves this layer as it is.
COPY constraints.txt ./
RUN if [ "$TORCH" = cpu ]; then \
      /opt/snowskin/bin/pip install --no-deps --index-url https://download.pytorch.org/whl/cpu -c constraints.txt torch; \
    fi
COPY pyproject.toml setup.py README.md LICENSE ./
COPY proto ./proto
COPY transport ./transport
COPY kvstore ./kvstore
COPY engines ./engines
COPY tools ./tools
RUN /opt/snowskin/bin/pip install -c constraints.txt .

FROM python:3.11.13-slim-bookworm
# The mount points belong to the user, so that fresh volumes do too.
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin snowskin \
    && install -d -o snowskin -g snowskin -m 0700 /run/snowskin \
    && install -d -o snowskin -g snowskin -m 0755 /models
COPY --from=build /opt/snowskin /opt/snowskin
ENV PATH=/opt/snowskin/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1
USER 10001:10001
STOPSIGNAL SIGTERM
# As docker-compose.yml has them: gRPC of conductor, node and engines, the node's data plane, and HTTP of all.
EXPOSE 7000 7100 7110 7200 8080
# Every role answers /healthz on its HTTP port, 8080 in a container.
HEALTHCHECK --interval=5s --timeout=3s --start-period=120s --start-interval=1s --retries=3 \
    CMD ["python", "-m", "snowskin.tools.healthy", "http://127.0.0.1:8080/healthz"]
ENTRYPOINT ["snowskin"]
CMD ["--help"]
