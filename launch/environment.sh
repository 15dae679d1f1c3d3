#!/usr/bin/env bash
# Sourced by the other scripts. `ensure_environment EXTRAS` finds a Python that pyproject.toml accepts, makes
# .venv in the repository's root and installs dsplugins[EXTRAS] there; it sets VENV to that folder.
# Nothing is done where that has happened already and pyproject.toml is the same.
# DSPLUGINS_VENV names another folder for the environment. Exit code 4: this machine lacks something.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

minimum() { # the lowest Python that pyproject.toml accepts, such as 3.12
    sed -n 's/^requires-python *= *">=\([0-9.]*\).*/\1/p' "$ROOT/pyproject.toml"
}

new_enough() { # whether $1 runs and is a Python that pyproject.toml accepts
    "$1" -c 'import sys; sys.exit(sys.version_info < tuple(map(int, sys.argv[1].split("."))))' \
        "$(minimum)" >/dev/null 2>&1
}

fits() { # whether $1 also has what environments are made with: Debian keeps that in a package of its own
    new_enough "$1" && "$1" -c 'import venv, ensurepip' >/dev/null 2>&1
}

candidates() { # prints every interpreter worth a try, one a line, the best first
    local name root
    for name in python3.13 python3.12 python3 python; do
        command -v "$name" || true
    done
    for root in "${PYENV_ROOT:-}" "${HOME:-}/.pyenv" "$(pyenv root 2>/dev/null || true)"; do
        if [ -n "$root" ]; then
            printf '%s\n' "$root"/versions/3.1[2-9]*/bin/python
        fi
    done
    uv python find ">=$(minimum)" 2>/dev/null || true
}

make_venv() { # makes $VENV with the first candidate that really can
    local python
    while IFS= read -r python; do
        if fits "$python"; then
            echo "making $VENV with $("$python" --version) ($python)"
            if "$python" -m venv "$VENV"; then
                return 0
            fi
            echo "$python can't make environments; trying the next one" >&2
            rm -rf "$VENV"
        fi
    done < <(candidates)
    {
        echo "No Python >= $(minimum) that can make environments was found."
        echo "Looked at: python3.13, python3.12, python3, python on PATH; pyenv's versions; uv's."
        echo "Install one, then run this again:"
        echo "  Debian, Ubuntu   apt install python3.12 python3.12-venv"
        echo "  macOS            brew install python@3.12"
        echo "  anywhere         uv python install 3.12, or pyenv install 3.12"
    } >&2
    return 4
}

check_venv() { # makes sure that $VENV is an environment that fits; makes it where there is none
    if [ -x "$VENV/bin/python" ]; then
        if ! new_enough "$VENV/bin/python"; then
            echo "$VENV holds $("$VENV/bin/python" --version 2>&1), but Python >= $(minimum) is needed:" >&2
            echo "remove that folder, or name another one with DSPLUGINS_VENV=FOLDER." >&2
            return 4
        fi
    elif [ -e "$VENV" ] && [ -n "$(ls -A "$VENV")" ]; then
        echo "$VENV is there, but is no working Python environment: remove it, or set DSPLUGINS_VENV." >&2
        return 4
    else
        make_venv
    fi
}

install() { # installs dsplugins[$1] into $VENV
    local began=$SECONDS
    if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then # made by uv, or --without-pip
        "$VENV/bin/python" -m ensurepip >/dev/null
    fi
    echo "installing dsplugins[$1] into $VENV: some minutes and gigabytes the first time, for torch"
    trap 'echo "stopped while installing: the same command goes on." >&2; exit 130' INT TERM
    if ! "$VENV/bin/python" -m pip install --disable-pip-version-check -e "${ROOT}[$1]"; then
        echo "pip failed after $((SECONDS - began)) s, see above; run this again when that is mended." >&2
        return 4
    fi
    trap - INT TERM
    echo "installed after $((SECONDS - began)) s"
}

ensure_environment() { # $1: extras, such as plot or test
    local stamp wanted
    VENV=${DSPLUGINS_VENV:-$ROOT/.venv}
    case $VENV in /*) ;; *) VENV=$PWD/$VENV ;; esac
    stamp=$VENV/.dsplugins-$1
    wanted="$ROOT $1 $(cksum <"$ROOT/pyproject.toml")"
    # `|| return`: a caller that tests this function's result switches `set -e` off in here.
    check_venv || return
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
        return 0
    fi
    install "$1" || return
    printf '%s\n' "$wanted" >"$stamp"
}
