# What both entry points do first (testnet/run.sh and tests/run.sh source this file): see what the machine lacks,
# install it where that is possible, build the programs. Says nothing when there is nothing to do.
#
# Sets: root (the repository), bin (the folder of the programs). Works with bash 3.2, which macOS has.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bin="${CARGO_TARGET_DIR:-$root/target}/release"

say() { printf '%s\n' "$*" >&2; }
die() { printf 'error: %s\n' "$1" >&2; shift; for line in "$@"; do printf '  %s\n' "$line" >&2; done; exit 1; }
has() { command -v "$1" >/dev/null 2>&1; }

# --- Rust -----------------------------------------------------------------------------------------------------

check_rust() {
  # rustup writes this file; a shell that was open before does not know its folder yet.
  if ! has cargo && [ -f "${CARGO_HOME:-$HOME/.cargo}/env" ]; then . "${CARGO_HOME:-$HOME/.cargo}/env"; fi
  if ! has cargo || ! has rustc; then
    die "no Rust toolchain here" \
      "get one from https://rustup.rs:" \
      "curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh" \
      "then open a new shell and run this again"
  fi
  local wanted found
  wanted="$(sed -n 's/^rust-version = "1\.\([0-9]*\).*/\1/p' "$root/Cargo.toml")"
  found="$(cd "$root" && rustc --version | sed -n 's/^rustc 1\.\([0-9]*\)\..*/\1/p')"
  if [ -z "$found" ]; then die "rustc does not run here" "$(cd "$root" && rustc --version 2>&1 | head -n 3)"; fi
  if [ "$found" -lt "$wanted" ]; then
    die "rustc 1.$found is too old, 1.$wanted or newer is needed" "rustup update stable"
  fi
}

# --- What llama.cpp's build needs: clang (why: docs/decisions/0001), libclang for bindgen, cmake, make, a linker ----

has_libclang() {
  if [ -n "${LIBCLANG_PATH:-}" ]; then return 0; fi
  local file
  for file in /usr/lib/llvm-*/lib/libclang*.so* /usr/lib/*/libclang*.so* /usr/lib64/libclang*.so* /usr/lib/libclang*.so*; do
    if [ -e "$file" ]; then return 0; fi
  done
  return 1
}

install_on_debian() {
  local packages=""
  has clang && has clang++ || packages="$packages clang"
  has_libclang || packages="$packages libclang-dev"
  has cmake || packages="$packages cmake"
  has make || packages="$packages make"
  has cc || packages="$packages gcc"
  has pkg-config || packages="$packages pkg-config"
  if [ -z "$packages" ]; then return; fi

  local as_root=""
  if [ "$(id -u)" -ne 0 ]; then
    # Without a terminal sudo cannot ask for a password: then it must not need one.
    if has sudo && { [ -t 0 ] || sudo -n true 2>/dev/null; }; then
      as_root="sudo"
    else
      die "missing:$packages" "as root: apt-get install$packages"
    fi
  fi
  say "installing$packages"
  $as_root apt-get -qq update || die "apt-get update failed" "missing:$packages"
  # shellcheck disable=SC2086  # a list of words on purpose
  $as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends install $packages >/dev/null \
    || die "apt-get could not install:$packages"
}

install_on_macos() {
  if ! xcode-select -p >/dev/null 2>&1; then
    die "no compiler here" "xcode-select --install" "then run this again"
  fi
  if has cmake; then return; fi
  has brew || die "missing: cmake" "brew install cmake (Homebrew: https://brew.sh), or https://cmake.org/download"
  say "installing cmake"
  brew install --quiet cmake || die "brew could not install cmake"
}

check_elsewhere() {
  local missing=""
  local tool
  for tool in clang clang++ cmake make cc; do has "$tool" || missing="$missing $tool"; done
  has_libclang || missing="$missing libclang"
  if [ -z "$missing" ]; then return; fi
  local hint="install them with the package manager of this system"
  if has dnf; then hint="dnf install clang clang-devel cmake make gcc pkgconf"; fi
  if has pacman; then hint="pacman -S clang cmake make gcc pkgconf"; fi
  if has zypper; then hint="zypper install clang clang-devel cmake make gcc pkgconf"; fi
  if has apk; then hint="apk add clang clang-dev cmake make g++ pkgconf"; fi
  die "missing:$missing" "$hint"
}

install_missing() {
  case "$(uname -s)" in
    Darwin) install_on_macos ;;
    *) if has apt-get; then install_on_debian; else check_elsewhere; fi ;;
  esac
}

# --- The programs ------------------------------------------------------------------------------------------------

# Whether the programs are newer than everything that they are made of. Asked without cargo, so that a machine that
# has them needs neither a toolchain nor a network nor a home to run them.
is_built() {
  local program
  for program in shoal shoal-node shoal-testnet; do [ -x "$bin/$program" ] || return 1; done
  [ -f "$bin/.shoal-built" ] || return 1
  local newer
  newer="$(cd "$root" && find Cargo.toml Cargo.lock .cargo models/demo.gguf \
    gguf swarm-proto shard-registry engine node api download cli testnet/src testnet/Cargo.toml \
    -newer "$bin/.shoal-built" ! -name '*.md' -print 2>/dev/null | head -n 1)"
  [ -z "$newer" ]
}

build() {
  if is_built; then return; fi
  check_rust
  install_missing
  if [ ! -x "$bin/shoal" ]; then say "building; the first time takes about ten minutes on two cores"; fi
  mkdir -p "$bin"
  # The mark is as old as the start of the build: what is edited meanwhile is built next time.
  touch "$bin/.shoal-building"
  # The whole workspace, because the tests build it too: other features would compile llama.cpp twice.
  (cd "$root" && cargo build --release --locked) || die "the build failed; its last messages are above"
  mv "$bin/.shoal-building" "$bin/.shoal-built"
}
