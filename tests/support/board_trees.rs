//! The files that boards show under `/proc`, `/sys` and `/etc`, made from `tests/fixtures/board/*.tree`.
//!
//! A line of such a file is `path = content`; `\0` and `\n` in the content are what they look like.

use std::path::Path;

/// Writes the tree of that name under a temporary root.
pub fn root(name: &str) -> tempfile::TempDir {
    let root = tempfile::tempdir().expect("a temporary folder");
    plant(name, root.path());
    root
}

/// Writes the tree of that name under `root`.
pub fn plant(name: &str, root: &Path) {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/board");
    let tree = std::fs::read_to_string(fixtures.join(name).with_extension("tree")).expect(name);
    for line in tree.lines() {
        if line.starts_with('#') || line.trim().is_empty() {
            continue;
        }
        let (path, content) = line.split_once(" = ").expect(line);
        match path {
            // The rest is what another tree has, too.
            "include" => plant(content, root),
            _ => write(&root.join(path), content),
        }
    }
}

/// Writes one file of a tree.
pub fn write(path: &Path, content: &str) {
    std::fs::create_dir_all(path.parent().expect("a folder")).expect("made");
    let content = content.replace("\\0", "\0").replace("\\n", "\n");
    let ending = if content.ends_with(['\0', '\n']) {
        ""
    } else {
        "\n"
    };
    std::fs::write(path, content + ending).expect("written");
}
