# Sourced by scripts/demo and scripts/test: creates .venv and installs lowvram with the right torch.
# An NVIDIA driver is present: torch's default build, which carries CUDA. None: the CPU build, pinned.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${LOWVRAM_VENV:-$root/.venv}"
extra="${extra:-}" # of pyproject.toml, set by the script; not "$1", which would be what the user gave it

python="${PYTHON:-}"
if [ -z "$python" ]; then
  for candidate in python3 python3.11 python3.12 python3.13 python3.10 python; do
    if command -v "$candidate" >/dev/null && "$candidate" -c \
      'import sys; raise SystemExit(not ((3, 10) <= sys.version_info[:2] <= (3, 13)))' 2>/dev/null; then
      python="$candidate"
      break
    fi
  done
fi
[ -n "$python" ] || { echo "lowvram needs Python 3.10 to 3.13; none was found. Install one, or set PYTHON=..." >&2; exit 2; }

if [ ! -x "$venv/bin/python" ]; then
  echo "Creating $venv with $("$python" --version)"
  "$python" -m venv "$venv"
fi

# A terminal sees pip's progress bars; a log gets errors only.
install() { if [ -t 1 ]; then "$venv/bin/python" -m pip install "$@"; else "$venv/bin/python" -m pip install -qq "$@"; fi; }

stamp="$venv/.lowvram-installed"
wanted="$(cat "$root/pyproject.toml" "$root/scripts/environment.sh" | cksum) $extra"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
    if [ -e /proc/driver/nvidia/version ] || command -v nvidia-smi >/dev/null || [ -e /dev/dxg ]; then
      echo "An NVIDIA driver is present: installing torch with CUDA (several GB)"
      install torch
    elif [ "$(uname -s)" = Darwin ]; then
      echo "Installing torch for macOS"
      install torch
    else
      echo "No NVIDIA driver: installing the CPU build of torch (200 MB)"
      # The CPU build has a name of its own, so that pip can never take gigabytes of CUDA instead. It lies on
      # PyTorch's own index, or where this machine's pip looks; there the first, silent try finds it.
      "$venv/bin/python" -m pip install -qq "torch==2.13.0+cpu" 2>/dev/null ||
        install "torch==2.13.0+cpu" --index-url https://download.pytorch.org/whl/cpu
    fi
  fi
  echo "Installing lowvram${extra:+ with [$extra]}: a minute or two"
  install --editable "$root${extra:+[$extra]}"
  echo "$wanted" >"$stamp"
fi
