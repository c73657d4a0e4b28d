#!/usr/bin/env bash
# Sets up what is missing, builds, then runs every test of the workspace.
#   ./tests/run.sh          everything a change must pass
#   ./tests/run.sh --full   the same with more random cases and faults, and testnets of 24 and 36 nodes and with faults
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../testnet/setup.sh"

full=""
case "${1:-}" in
  "") ;;
  --full) full=yes ;;
  *) sed -n '2,4s/^# //p' "${BASH_SOURCE[0]}"; [ "$1" = --help ] && exit 0; exit 2 ;;
esac
cd "$root"
build
check_rust

began=$SECONDS
if [ -n "$full" ]; then
  export PROPTEST_CASES="${PROPTEST_CASES:-4096}" SHOAL_FAULTS="${SHOAL_FAULTS:-200,200,50}"
fi
if ! cargo test --release --locked --workspace --no-fail-fast; then
  die "tests failed after $((SECONDS - began)) s; the failures are listed above"
fi
if [ -n "$full" ]; then
  for nodes in 24 36; do "$bin/shoal-testnet" --nodes "$nodes"; done
  "$bin/shoal-testnet" --chaos all
fi
say "every test passed in $((SECONDS - began)) s"
