//! With `--features cuda`: compiles the kernels to PTX, and assembles them where there is a ptxas.

use std::path::{Path, PathBuf};
use std::process::Command;

/// The PTX is for the first GPUs that have all instructions of the kernels, and runs on every later one.
const ARCHITECTURE: &str = "sm_80";
/// Orin's GPU, which the kernels are assembled for.
const BOARD_ARCHITECTURE: &str = "sm_87";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if std::env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    println!("cargo::rerun-if-changed=kernels");
    for variable in ["CUDACXX", "PTXAS"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets it"));
    let ptx = out.join("kernels.ptx");
    compile(&ptx);
    assemble(&ptx, &out.join("kernels.cubin"));
    let text = std::fs::read_to_string(&ptx).expect("the compiler wrote it");
    // nvcc writes the PTX of its own release, which older drivers do not know.
    match driver_of(&text) {
        Some(version) => println!("cargo::rustc-env=AIRSTREAM_DRIVER_MIN={version}"),
        None => fail("the kernels came as PTX of an unknown version"),
    }
    // The driver wants a string that ends with a zero.
    let mut text = text.into_bytes();
    text.push(0);
    std::fs::write(&ptx, text).expect("the build's folder can be written");
}

/// The first CUDA driver that knows the version of this PTX, as drivers tell theirs.
fn driver_of(ptx: &str) -> Option<u32> {
    let version = ptx
        .lines()
        .find_map(|line| line.strip_prefix(".version "))?;
    let (major, minor) = version.trim().split_once('.')?;
    let (major, minor): (u32, u32) = (major.parse().ok()?, minor.parse().ok()?);
    // As PTX's release notes have it: both went up together but for CUDA 12.6, which brought nothing new.
    let minor = minor + u32::from(major == 8 && minor > 5);
    (major >= 7).then_some((major + 4) * 1000 + minor * 10)
}

/// The major version of a clang; none if it is not there or something else.
fn clang_version(command: &str) -> Option<u32> {
    let output = Command::new(command).arg("--version").output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let version = text.split("clang version ").nth(1)?;
    version.split('.').next()?.parse().ok()
}

fn is_nvcc(command: &str) -> bool {
    let output = Command::new(command).arg("--version").output();
    output.is_ok_and(|o| String::from_utf8_lossy(&o.stdout).contains("Cuda compiler"))
}

/// Compiles all kernels as one module. What rounds is left as it is written: nothing is fused.
fn compile(ptx: &Path) {
    let chosen = std::env::var("CUDACXX").ok();
    let numbered = (16..=22).rev().map(|version| format!("clang++-{version}"));
    let candidates = chosen.into_iter().chain(["clang++".to_string()]);
    for compiler in candidates.chain(numbered).chain(["nvcc".to_string()]) {
        let mut command = Command::new(&compiler);
        if clang_version(&compiler).is_some_and(|version| version >= 16) {
            command
                .args([
                    "-x",
                    "cuda",
                    "--cuda-device-only",
                    // A CUDA toolkit that clang finds would choose another PTX ISA.
                    "--cuda-path=/nowhere",
                    "-nocudainc",
                    "-nocudalib",
                    "-S",
                ])
                .arg(format!("--cuda-gpu-arch={ARCHITECTURE}"))
                .args(["-Xclang", "-target-feature", "-Xclang", "+ptx74"])
                .arg("-ffp-contract=off");
        } else if is_nvcc(&compiler) {
            command
                .args(["-ptx", "-fmad=false"])
                .arg(format!("-arch={ARCHITECTURE}"));
        } else {
            continue;
        }
        command
            .args(["-std=c++17", "-O3", "-o"])
            .arg(ptx)
            .arg("kernels/all.cu");
        let output = command.output().expect("it has just told its version");
        if output.status.success() {
            return;
        }
        fail(&format!(
            "{compiler} does not compile the kernels:\n{}",
            String::from_utf8_lossy(&output.stderr)
        ));
    }
    fail(
        "--features cuda needs a compiler for the kernels: install clang 16 or newer (Debian, Ubuntu: apt-get install clang-16) or CUDA's nvcc, or name one in CUDACXX",
    );
}

/// The kernels for the board's GPU itself, so that the driver need not compile them; empty without a ptxas.
fn assemble(ptx: &Path, cubin: &Path) {
    let ptxas = std::env::var("PTXAS").unwrap_or_else(|_| "ptxas".to_string());
    let assembled = Command::new(&ptxas)
        .arg(format!("-arch={BOARD_ARCHITECTURE}"))
        .arg(ptx)
        .arg("-o")
        .arg(cubin)
        .output();
    match assembled {
        Ok(output) if output.status.success() => return,
        Ok(output) => println!(
            "cargo::warning={ptxas}: {}",
            String::from_utf8_lossy(&output.stderr).replace('\n', " ")
        ),
        Err(_) => {}
    }
    std::fs::write(cubin, []).expect("the build's folder can be written");
}

fn fail(message: &str) -> ! {
    eprintln!("{message}");
    std::process::exit(1);
}
