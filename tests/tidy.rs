//! The layout and the habits of this repository, held by a test so that they cannot rot:
//! which layer may use which, file sizes, documented `unsafe`, no panicking shortcuts, no host names.

#[path = "tidy/samples.rs"]
mod samples;
#[path = "tidy/source.rs"]
mod source;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use source::{Source, after_each, word_starts_at};

/// What the code of each layer may use, apart from itself. A whole layer, or only some of its files:
/// `layer < file, file`.
const EDGES: &[(&str, &[&str])] = &[
    ("error", &[]),
    ("trace", &[]),
    ("units", &[]),
    ("arena", &["error"]),
    ("io", &["error", "arena"]),
    ("format", &["error", "arena"]),
    ("residency", &["error", "format"]),
    (
        "store",
        &["error", "trace", "arena", "io", "format", "residency"],
    ),
    (
        "device",
        &[
            "error",
            "arena",
            "format",
            "store < device/cuda/mod.rs, device/cuda/copies.rs, device/cuda/driver.rs",
        ],
    ),
    (
        "model",
        &[
            "error",
            "trace",
            "arena",
            "format",
            "device",
            "store < model/forward.rs, model/forward/layers.rs, model/kv.rs",
        ],
    ),
    ("text", &["error", "format"]),
    (
        "engine",
        &[
            "error",
            "board",
            "trace",
            "arena",
            "io",
            "format",
            "residency",
            "store",
            "device",
            "model",
            "text",
        ],
    ),
    ("board", &["error"]),
    ("serve", &["error", "units", "text", "engine", "board"]),
    (
        "cli",
        &[
            "error",
            "trace",
            "units",
            "arena",
            "io",
            "format",
            "residency",
            "store",
            "device",
            "model",
            "text",
            "engine",
            "serve",
            "board",
        ],
    ),
];

/// Layers whose answers must follow from their arguments alone, and what would break that.
const PURE: &[&str] = &["residency", "board/governor"];
const IMPURE: &[&str] = &[
    "std::time",
    "std::fs",
    "std::io",
    "std::net",
    "std::thread",
    "std::env",
    "Instant",
];

/// Lines in one file of code, at most.
const LINES_MAX: usize = 600;

/// The top level of the repository: the design's folders, and what tools look for there.
const TOP: &[&str] = &[
    "Cargo.toml",
    "Cargo.lock",
    "README.md",
    "src",
    "kernels",
    "board-configs",
    "cross",
    "tests",
    "benches",
    "fuzz",
    "build.rs",
    ".ci",
    ".gitignore",
    ".cargo",
    "rustfmt.toml",
    "LICENSE",
    "LICENSE-APACHE",
    "LICENSE-MIT",
];

/// The layer of a file under `src/` (`io/uring.rs` is in `io`), and how many modules deep it is.
fn layer(path: &str) -> (&str, usize) {
    let module = path.strip_suffix(".rs").unwrap_or(path);
    let module = module.strip_suffix("/mod").unwrap_or(module);
    (
        module.split('/').next().unwrap_or(module),
        module.split('/').count(),
    )
}

/// Edges between layers that `EDGES` does not have. `path` is relative to `src/`.
fn check_edges(path: &str, source: &Source) -> Vec<String> {
    let (own, depth) = layer(path);
    if own == "lib" || own == "main" {
        return Vec::new();
    }
    let Some((_, allowed)) = EDGES.iter().find(|(name, _)| *name == own) else {
        return vec![format!("src/{path}: layer {own} is not in tests/tidy.rs")];
    };
    let may = |used: &str| {
        allowed.iter().any(|edge| match edge.split_once(" < ") {
            Some((name, files)) => name == used && files.split(", ").any(|file| file == path),
            None => *edge == used,
        })
    };
    let mut found = Vec::new();
    for (line, used) in source.crate_paths(depth) {
        // The crate's root re-exports the error types.
        let used = if used == "Error" || used == "Result" {
            "error"
        } else {
            &used
        };
        if used != own && !may(used) {
            found.push(format!("src/{path}:{line}: {own} may not use {used}"));
        }
    }
    found
}

/// Clocks, files and threads in the layers that are pure.
fn check_purity(path: &str, source: &Source) -> Vec<String> {
    let module = path.strip_suffix(".rs").unwrap_or(path);
    if !PURE
        .iter()
        .any(|pure| module == *pure || module.starts_with(&format!("{pure}/")))
    {
        return Vec::new();
    }
    let uses = |word: &&&str| source.code.contains(**word);
    IMPURE
        .iter()
        .filter(uses)
        .map(|word| format!("src/{path}: {word} in a pure layer"))
        .collect()
}

/// Words of code that stop a program, hide dead code or leave work for later.
fn check_words(path: &str, source: &Source) -> Vec<String> {
    let mut found = Vec::new();
    // Split in two, so that this file does not find itself.
    for (word, why) in [
        (
            concat!(".unw", "rap()"),
            "use ? or expect(\"why it cannot fail\")",
        ),
        (concat!("to", "do!("), "finish it"),
        (concat!("unimple", "mented!("), "finish it"),
        (concat!("db", "g!("), "remove it"),
        (concat!("allow(dead", "_code)"), "delete what has no caller"),
        (
            concat!("expect(dead", "_code)"),
            "delete what has no caller",
        ),
    ] {
        for line in source.lines_with(&source.code, word) {
            found.push(format!("{path}:{line}: {word}: {why}"));
        }
    }
    for word in [
        concat!("TO", "DO"),
        concat!("FIX", "ME"),
        concat!("XX", "X"),
    ] {
        for line in source.lines_with(&source.comments, word) {
            found.push(format!("{path}:{line}: {word}: open an issue instead"));
        }
    }
    found
}

/// `unsafe` without a `SAFETY:` comment above it (or, for a function, `# Safety` in its docs).
fn check_unsafe(path: &str, source: &Source) -> Vec<String> {
    let undocumented = |line: &usize| !source.is_documented_unsafe(*line);
    let lines = source.unsafe_lines();
    lines
        .into_iter()
        .filter(undocumented)
        .map(|line| format!("{path}:{line}: unsafe without SAFETY"))
        .collect()
}

/// Files that are too long, or do not begin by saying what they are.
fn check_shape(path: &str, text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let lines = text.lines().count();
    if lines > LINES_MAX {
        found.push(format!(
            "{path}: {lines} lines, at most {LINES_MAX}: split it by idea"
        ));
    }
    if path.ends_with(".rs") && !text.starts_with("//! ") {
        found.push(format!(
            "{path}: begin with a //! line that says what the file is"
        ));
    }
    found
}

/// Host names and paths of somebody's machine. Nothing here may know where packages come from.
fn check_places(path: &str, text: &str) -> Vec<String> {
    // License texts carry the address of their source, and Cargo writes the lock file.
    if path.starts_with("LICENSE") || path == "Cargo.lock" {
        return Vec::new();
    }
    let mut found = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let mut tell = |what: &str| found.push(format!("{path}:{}: {what}", index + 1));
        for scheme in [
            concat!("http", "://"),
            concat!("https", "://"),
            concat!("ssh", "://"),
        ] {
            if after_each(line, scheme).any(|rest| !is_document(rest)) {
                tell("a network address");
            }
        }
        for domain in ["org", "com", "net", "ai", "dev"] {
            let dotted = format!(".{domain}");
            let named = after_each(line, &dotted).any(|rest| {
                let before = &line[..line.len() - rest.len() - dotted.len()];
                let host = before
                    .rsplit(|c: char| !c.is_ascii_alphanumeric() && !"-.".contains(c))
                    .next();
                let follows = rest.chars().next();
                // Not `self.net`, `x.com(`: a host name ends or goes on with a path or a port.
                let ends = follows.is_none_or(|c| "/:\"'`) ,".contains(c)) && follows != Some('(');
                host.is_some_and(|h| h.len() > 1 && h != "self")
                    && ends
                    && !is_document(&host_of(before, rest, domain))
            });
            if named {
                tell("a host name");
            }
        }
        for home in [
            concat!("/ho", "me/"),
            concat!("/ro", "ot/"),
            concat!("/Us", "ers/"),
            concat!("/wo", "rk/"),
        ] {
            if line
                .match_indices(home)
                .any(|(at, _)| at == 0 || word_starts_at(line, at))
            {
                tell("an absolute path of one machine");
            }
        }
    }
    found
}

fn host_of(before: &str, rest: &str, domain: &str) -> String {
    let host = before
        .rsplit(|c: char| !c.is_ascii_alphanumeric() && !"-.".contains(c))
        .next()
        .unwrap_or("");
    format!("{host}.{domain}{rest}")
}

/// Papers and licenses that a comment may point to, and the names that are reserved for examples
/// (RFC 2606). None of them serves packages or models.
fn is_document(address: &str) -> bool {
    [
        "arxiv.org/abs/",
        "doi.org/",
        "www.apache.org/licenses/",
        "opensource.org/license",
        // The name of a kind of XML, not a place.
        "www.w3.org/2000/svg",
        // Whatever machine this is.
        "127.0.0.1",
        "localhost",
        "example.org",
        "example.com",
    ]
    .iter()
    .any(|document| address.starts_with(document))
}

/// Entries of the top level that the design does not have.
fn check_top(tracked: &[String]) -> Vec<String> {
    let mut entries: Vec<&str> = tracked
        .iter()
        .filter_map(|path| path.split('/').next())
        .collect();
    entries.dedup();
    entries.retain(|entry| !TOP.contains(entry));
    entries
        .into_iter()
        .map(|entry| format!("{entry}: not a top-level entry of the design"))
        .collect()
}

/// The files git tracks, or, in an unpacked archive, all that are there.
fn tracked() -> Vec<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let listed = Command::new("git")
        .args(["ls-files", "-z"])
        .current_dir(root)
        .output();
    if let Ok(listed) = listed.as_ref()
        && listed.status.success()
        && !listed.stdout.is_empty()
    {
        let names = String::from_utf8(listed.stdout.clone()).expect("file names are UTF-8");
        let names = names
            .split_terminator('\0')
            .filter(|name| root.join(name).exists());
        return names.map(str::to_string).collect();
    }
    let mut found = Vec::new();
    walk(root, &mut found);
    let relative = |path: PathBuf| {
        path.strip_prefix(root)
            .ok()
            .map(|p| p.to_string_lossy().into_owned())
    };
    found.into_iter().filter_map(relative).collect()
}

fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap()) {
        let name = entry.file_name();
        if entry.file_type().unwrap().is_file() {
            found.push(entry.path());
        } else if ![".git", "target", "__pycache__"]
            .iter()
            .any(|skip| name == *skip)
        {
            walk(&entry.path(), found);
        }
    }
}

/// Everything wrong with one file.
fn check_file(path: &str, text: &str) -> Vec<String> {
    let mut found = check_places(path, text);
    let in_src = path.strip_prefix("src/");
    if in_src.is_some() || path.starts_with("kernels/") {
        found.extend(check_shape(path, text));
    }
    if path.ends_with(".rs") {
        let whole = Source::new(text);
        found.extend(check_unsafe(path, &whole));
        if let Some(inside) = in_src {
            // Tests may stop where they stand.
            let shipped = if path.ends_with("tests.rs") {
                Source::new("")
            } else {
                whole.without_tests()
            };
            found.extend(check_words(path, &shipped));
            found.extend(check_edges(inside, &shipped));
            found.extend(check_purity(inside, &shipped));
        }
    }
    found
}

#[test]
fn the_repository_is_tidy() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let tracked = tracked();
    assert!(
        tracked.iter().any(|path| path == "src/lib.rs"),
        "no files found under {}",
        root.display()
    );
    let mut found = check_top(&tracked);
    for path in &tracked {
        // Fixtures need not be text.
        if let Ok(text) = fs::read_to_string(root.join(path)) {
            found.extend(check_file(path, &text));
        }
    }
    assert!(found.is_empty(), "\n{}\n", found.join("\n"));
}
