# The same environment as `make install`, for processors; g++ compiles our kernels at first use. PyTorch's wheel for x86 Linux brings CUDA
# along unless pip is pointed at an index with the smaller CPU build:
#   docker build --build-arg PIP_EXTRA_INDEX_URL=... -t specinfer .
#   docker run --rm -it specinfer make demo
FROM python:3.11-slim
ARG PIP_EXTRA_INDEX_URL=
RUN apt-get update && apt-get install -y --no-install-recommends g++ make \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /specinfer
# First what the environment is made from, so that a change of code does not install it again
COPY pyproject.toml constraints.txt Makefile README.md LICENSE ./
COPY specinfer/__init__.py specinfer/
COPY specinfer/zoo/LICENSE specinfer/zoo/
RUN make install
COPY . .
RUN touch .venv/.installed
ENV PATH=/specinfer/.venv/bin:$PATH
CMD ["specinfer", "--help"]
