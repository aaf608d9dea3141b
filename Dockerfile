# The environment of constraints.txt in a container.
#   docker build -t get_nb .
#   docker run --gpus all -v $PWD/runs:/get_nb/runs get_nb get-nb reproduce --profile gpu
# Apptainer: apptainer build get_nb.sif docker-daemon://get_nb:latest
FROM python:3.12-slim

# a C++ compiler for torch.compile, and the clothes of profile gpu
RUN apt-get update && apt-get install -y --no-install-recommends g++ dataset-fashion-mnist && rm -rf /var/lib/apt/lists/*

WORKDIR /get_nb
ENV PIP_CONSTRAINT=/get_nb/constraints.txt PIP_NO_CACHE_DIR=1 GET_NB_ROOT=/get_nb
COPY constraints.txt settings.ini pyproject.toml README.md ./
COPY get_nb get_nb
RUN pip install -e '.[dev]'
COPY . .
CMD ["get-nb", "--help"]
