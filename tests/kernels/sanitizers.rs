//! The kernels' tests once more, with sanitizers in the kernels.

use std::process::Command;

use super::shim::{SANITIZED, build, compiler};

#[test]
fn the_kernels_are_clean_under_sanitizers() {
    again("sanitizers::the_kernels_are_clean_under_sanitizers");
}

/// Runs all other tests of this binary once more, with a library that has the sanitizers in it.
fn again(this_test: &str) {
    if std::env::var_os(SANITIZED).is_some() {
        return;
    }
    let Some(compiler) = compiler() else {
        return;
    };
    build(true);
    // The sanitizer has to be there before anything is allocated.
    let name = match Command::new(&compiler).arg("--version").output() {
        Ok(out) if String::from_utf8_lossy(&out.stdout).contains("clang") => {
            format!("libclang_rt.asan-{}.so", std::env::consts::ARCH)
        }
        _ => "libasan.so".to_string(),
    };
    let found = Command::new(&compiler)
        .arg(format!("-print-file-name={name}"))
        .output();
    let runtime = String::from_utf8(found.expect("the compiler starts").stdout).expect("a path");
    let test = std::env::current_exe().expect("a program has a path");
    let output = Command::new(test)
        .args(["--skip", this_test, "--test-threads", "1"])
        .env(SANITIZED, "1")
        .env("LD_PRELOAD", runtime.trim())
        // The test harness leaks a little.
        .env("ASAN_OPTIONS", "detect_leaks=0")
        .env("UBSAN_OPTIONS", "print_stacktrace=1")
        .output()
        .expect("this program starts once more");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success() && text(&output.stdout).contains("test result: ok"),
        "{}\n{}",
        text(&output.stdout),
        text(&output.stderr)
    );
}
