# What the scripts of this folder share: Debian's packages, and tools that build for the board. Sourced.

target=aarch64-unknown-linux-gnu
# The oldest system is JetPack 5.1, with Ubuntu 20.04's C library.
glibc=2.31

# Installs what is missing of the named packages, or fails and names them.
need() {
    local why=$1 package missing=()
    shift
    for package in "$@"; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q '^install ok installed' || missing+=("$package")
    done
    ((${#missing[@]})) || return 0
    echo "installing for $why: ${missing[*]}" >&2
    if ! { dpkg --add-architecture arm64 && apt-get update -qq \
        && DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends "${missing[@]}"; } \
        </dev/null >&2; then
        echo "$why needs Debian's packages ${missing[*]}: install them, or run this as root" >&2
        return 1
    fi
}

# A compiler for the target, in target_rustc: the toolchain's own where it has the standard library or rustup brings
# it, Debian's otherwise. And cargo-zigbuild in PATH, to link with the symbols of any glibc.
need_target() {
    local tools=target/cross/tools
    target_rustc=${RUSTC:-rustc}
    if ! compgen -G "$("$target_rustc" --print sysroot)/lib/rustlib/$target/lib/libstd-*.rlib" >/dev/null \
        && ! { [[ $target_rustc == rustc ]] && rustup target add "$target" >/dev/null 2>&1; }; then
        need "the target's standard library" rustc-web libstd-rust-web-dev:arm64
        target_rustc=/usr/bin/rustc
    fi
    if ! { [[ -x $tools/bin/cargo-zigbuild ]] && "$tools/bin/python3" -m ziglang version >/dev/null 2>&1; }; then
        python3 -m venv "$tools" && "$tools/bin/pip" install --quiet ziglang cargo-zigbuild >&2
    fi
    PATH=$PWD/$tools/bin:$PATH
}

# Runs one of cargo-zigbuild's commands (zigbuild, test) for the target.
for_target() {
    RUSTC=$target_rustc cargo-zigbuild "$1" --locked --target "$target.$glibc" --target-dir target/cross "${@:2}"
}

# What the program is built with, in features: the GPU's kernels, where a compiler for them is at hand.
with_gpu() {
    features=()
    if ! kernels/find-clang >/dev/null; then
        echo "without the GPU: its kernels need clang 16 or newer (apt-get install clang-16)" >&2
        return
    fi
    features=(--features cuda)
    # Where kernels/check has brought the assembler, the driver need not compile the kernels on the board.
    local ptxas
    ptxas=$(compgen -G "target/kernels/cuda-11.8/lib/python3*/site-packages/nvidia/cuda_nvcc/bin/ptxas" || true)
    [[ -n ${PTXAS:-} || -z $ptxas ]] || export PTXAS=$ptxas
}
