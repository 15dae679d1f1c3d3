# Sourced by the other scripts: finds Python >= 3.12, makes .venv beside the repository's files, installs
# the package with the extras named in $1. Nothing is done when that has happened already.
# DSPLUGINS_VENV names another folder for the environment.

fits() { # whether $@ runs a Python that the package accepts and that can make environments
    "$@" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

find_python() { # prints the first interpreter that fits
    local candidate
    for candidate in python3.13 python3.12 python3 python; do
        if command -v "$candidate" >/dev/null 2>&1 && fits "$candidate"; then
            "$candidate" -c 'import sys; print(sys.executable)'
            return 0
        fi
    done
    for candidate in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python; do
        if [ -x "$candidate" ] && fits "$candidate"; then echo "$candidate"; return 0; fi
    done
    if command -v pyenv >/dev/null 2>&1; then
        for candidate in "$(pyenv root)"/versions/3.1[2-9]*/bin/python; do
            if [ -x "$candidate" ] && fits "$candidate"; then echo "$candidate"; return 0; fi
        done
    fi
    if command -v uv >/dev/null 2>&1; then
        candidate=$(uv python find '>=3.12' 2>/dev/null || true)
        if [ -n "$candidate" ] && fits "$candidate"; then echo "$candidate"; return 0; fi
    fi
    return 1
}

ensure_environment() { # $1: extras, such as plot or test
    local extras=$1 python wanted stamp began=$SECONDS
    VENV=${DSPLUGINS_VENV:-$ROOT/.venv}
    wanted="$extras $(cksum < "$ROOT/pyproject.toml")"
    stamp=$VENV/.dsplugins-$extras
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then return 0; fi
    if [ ! -x "$VENV/bin/python" ]; then
        if ! python=$(find_python); then
            echo "No Python >= 3.12 with venv was found (looked for python3.13, python3.12, python3, pyenv's, uv's)." >&2
            echo "Install one: 'apt install python3.12-venv', 'brew install python@3.12', 'pyenv install 3.12' or 'uv python install 3.12'." >&2
            return 4
        fi
        echo "making $VENV with $python"
        "$python" -m venv "$VENV"
    fi
    echo "installing dsplugins[$extras]: a minute or two, torch is large"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -e "$ROOT[$extras]"
    echo "$wanted" > "$stamp"
    echo "installed after $((SECONDS - began)) s"
}
