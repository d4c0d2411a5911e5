//! Small bad files, to see that the tidy test finds what is wrong with each, and good ones beside them.

use super::{LINES_MAX, check_file, check_top};

/// The number of findings in a file with this text.
fn findings(path: &str, text: &str) -> usize {
    let found = check_file(path, &format!("//! A file.\n{text}"));
    println!("{path}: {found:?}");
    found.len()
}

#[test]
fn wrong_edges_are_found() {
    assert_eq!(
        findings(
            "src/io/uring.rs",
            "use crate::error::Error;\nuse crate::Result;"
        ),
        0
    );
    assert_eq!(findings("src/io/uring.rs", "use crate::store::Store;"), 1);
    assert_eq!(
        findings(
            "src/io/uring.rs",
            "use crate::{error::Error, store::{A, B}, model};"
        ),
        2
    );
    assert_eq!(
        findings("src/io/uring.rs", "fn f(x: crate::store::Slot) {}"),
        1
    );
    assert_eq!(
        findings("src/io/uring.rs", "use super::super::store::Slot;"),
        1
    );
    assert_eq!(findings("src/io/mod.rs", "use super::store::Slot;"), 1);
    assert_eq!(
        findings("src/io/uring.rs", "use super::Io;\nuse crate::io::Read;"),
        0
    );
    assert_eq!(
        findings(
            "src/io/uring.rs",
            "// crate::store has the callers\nconst X: &str = \"crate::store\";"
        ),
        0
    );
    assert_eq!(
        findings(
            "src/io/uring.rs",
            "#[cfg(test)]\nmod tests {\n    use crate::store::Slot;\n}"
        ),
        0
    );
    assert_eq!(
        findings(
            "src/io/uring.rs",
            "#[cfg(test)]\nmod tests {}\nuse crate::store::Slot;"
        ),
        1
    );
    assert_eq!(
        findings("src/model/forward.rs", "use crate::store::Store;"),
        0
    );
    assert_eq!(findings("src/model/rope.rs", "use crate::store::Store;"), 1);
    assert_eq!(findings("src/unheard_of.rs", ""), 1);
}

#[test]
fn clocks_in_pure_layers_are_found() {
    assert_eq!(findings("src/residency.rs", "use std::time::Duration;"), 1);
    assert_eq!(findings("src/residency/plan.rs", "use std::fs;"), 1);
    assert_eq!(findings("src/residency.rs", "use crate::io::Io;"), 1);
    assert_eq!(findings("src/store.rs", "use std::time::Duration;"), 0);
}

#[test]
fn panicking_shortcuts_and_loose_ends_are_found() {
    let bad = concat!("fn f() { g().unw", "rap(); to", "do!() }");
    assert_eq!(findings("src/store.rs", bad), 2);
    assert_eq!(
        findings(
            "src/store.rs",
            &format!("#[cfg(test)]\nmod tests {{ {bad} }}")
        ),
        0
    );
    assert_eq!(findings("src/store/tests.rs", bad), 0);
    assert_eq!(
        findings(
            "src/store.rs",
            concat!("#[allow(dead", "_code)]\nfn f() {}")
        ),
        1
    );
    assert_eq!(findings("src/store.rs", concat!("// TO", "DO: later")), 1);
    assert_eq!(
        findings(
            "src/store.rs",
            "let text = r#\"a \" .unwrap() \"#; let c = '\"'; // .unwrap()"
        ),
        0
    );
}

#[test]
fn undocumented_unsafe_is_found() {
    assert_eq!(
        findings("src/arena.rs", "fn f() {\n    unsafe { g() }\n}"),
        1
    );
    assert_eq!(
        findings(
            "src/arena.rs",
            "fn f() {\n    // SAFETY: g is fine.\n    unsafe { g() }\n}"
        ),
        0
    );
    assert_eq!(
        findings(
            "src/arena.rs",
            "// SAFETY: g is fine.\nlet x = h(\n    1,\n    unsafe { g() },\n);"
        ),
        0
    );
    assert_eq!(
        findings(
            "src/arena.rs",
            "// SAFETY: g is fine.\nlet y = 1;\nlet x = unsafe { g() };"
        ),
        1
    );
    assert_eq!(findings("src/arena.rs", "unsafe impl Send for A {}"), 1);
    assert_eq!(findings("src/arena.rs", "/// Does.\nunsafe fn f() {}"), 1);
    assert_eq!(
        findings(
            "src/arena.rs",
            "/// # Safety\n/// Never.\n#[inline]\npub unsafe fn f() {}"
        ),
        0
    );
    assert_eq!(
        findings("src/arena.rs", "impl A for B {\n    unsafe fn f() {}\n}"),
        0
    );
    assert_eq!(
        findings("src/arena.rs", "impl B {\n    unsafe fn f() {}\n}"),
        1
    );
    assert_eq!(
        findings(
            "src/arena.rs",
            "type F = unsafe fn(u32);\nconst A: &str = \"unsafe {\";"
        ),
        0
    );
    assert_eq!(findings("tests/a.rs", "fn f() { unsafe { g() } }"), 1);
}

#[test]
fn long_and_nameless_files_are_found() {
    assert_eq!(findings("src/store.rs", &"\n".repeat(LINES_MAX - 1)), 0);
    assert_eq!(findings("src/store.rs", &"\n".repeat(LINES_MAX)), 1);
    assert_eq!(check_file("src/store.rs", "fn f() {}").len(), 1);
}

#[test]
fn places_on_the_network_and_on_one_machine_are_found() {
    assert_eq!(
        findings(".ci/run", concat!("curl https", "://example.test/x")),
        1
    );
    assert_eq!(
        findings(
            "README.md",
            concat!("get it from files.example", ".org/simple")
        ),
        1
    );
    assert_eq!(
        findings(
            "src/arena.rs",
            concat!("// see http", "s://arxiv.org/abs/2312.11514")
        ),
        0
    );
    assert_eq!(
        findings("tests/x.py", concat!("open('/ho", "me/me/model.gguf')")),
        1
    );
    assert_eq!(
        findings("tests/x.py", concat!("open('a/wo", "rk/model.gguf')")),
        0
    );
}

#[test]
fn strange_top_level_entries_are_found() {
    let list = |names: &[&str]| {
        names
            .iter()
            .map(|name| name.to_string())
            .collect::<Vec<_>>()
    };
    assert_eq!(
        check_top(&list(&["src/lib.rs", "tests/tidy.rs", ".ci/run"])).len(),
        0
    );
    assert_eq!(
        check_top(&list(&[
            "docs/a.md",
            "docs/b.md",
            "src/lib.rs",
            "notes.txt"
        ]))
        .len(),
        2
    );
}
