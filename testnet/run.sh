#!/usr/bin/env bash
# A swarm on this machine: sets up what is missing, builds, starts many nodes on a small model, asks them something,
# reports, cleans up. Options: ./testnet/run.sh --help
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
build
# exec: a signal reaches the program that has the nodes to end.
exec "$bin/shoal-testnet" "$@"
