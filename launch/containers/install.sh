#!/bin/sh
# install.sh VENV: installs dist-adv, from the checkout that this file lies in, into a new virtual
# environment of an image that has torch. Versions are those of requirements.lock; torch, and what
# belongs to it, stay those of the image, and pip fails where that cannot be.
#
# Not into the image's own Python: Ubuntu's refuses (PEP 668), and pip cannot replace its packages.
set -eu
cd "$(dirname "$0")/../.."
python -m venv --without-pip --system-site-packages "$1"
constraints=$1/constraints.txt
# As pip knows them: torch.__version__ may name a CUDA that the version of the package does not.
python -c 'from importlib.metadata import version
for name in ("torch", "torchvision"): print(f"{name}=={version(name)}")' >"$constraints"
grep -vE '^(torch|torchvision|triton|nvidia-[a-z0-9-]+|cuda-[a-z]+)==' requirements.lock \
  >>"$constraints"
"$1/bin/python" -m pip install --no-cache-dir --constraint "$constraints" '.[hf,tensorboard,timm]'
