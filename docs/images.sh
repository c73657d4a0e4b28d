#!/usr/bin/env bash
# Takes the pictures of docs/images again: starts nodes here, asks them something, and looks at `shoal serve`'s page with
# Chromium and at `shoal top` with tmux. Both must be installed: apt install chromium tmux
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../testnet/setup.sh"
cd "$root"
build
export SHOAL_PICTURES=docs/images SHOAL_BROWSER=1
cargo test --release --locked --workspace --test dashboard --test top picture
if command -v oxipng >/dev/null; then oxipng --quiet -o max --strip safe docs/images/*.png; fi
for picture in docs/images/*.png; do
  bytes=$(wc -c < "$picture")
  [ "$bytes" -lt 300000 ] || { echo "$picture has $bytes bytes, the limit is 300000" >&2; exit 1; }
done
ls -l docs/images
