#!/usr/bin/env bash
# The init step{% if train %}, then the training command,{% endif %} on this machine. Made by launch/make.py; yours to keep and change.
# Start it with your Python environment active, in the directory that holds the modules which cfg.yaml names.
set -eu

# torchrun takes its options from here{% if train %}, in both steps alike: rank r of the one is rank r of the other{% endif %}.
export PET_STANDALONE=1
export PET_NPROC_PER_NODE={{ ranks }}

# Bash would die of a signal and leave the step running: it passes it on, waits, and ends with the step's exit code.
step() {
    local code=0
    "$@" &
    trap 'kill -TERM $! || true' TERM INT
    wait $! && return
    code=$? # of the signal, where the step still runs
    wait $! || code=$?
    exit "$code"
}

step torchrun -m loader.init_from_hf --config {{ [config_path] | shell }}{{ " " if overrides }}{{ overrides | shell }}
{% if in_memory %}

# What the training command did not take over would stay in memory.
clean() { python -m loader.leftovers {{ [in_memory] | shell }} || true; }
trap clean EXIT
{% endif %}
{% if train %}
step {{ train | shell }}
{% endif %}
