//! Fetching from tiny wheels in a folder, through the real pip.

use super::*;
use tempfile::TempDir;

const PIP: &[&str] = &["python3", "-m", "pip"];
const NO_PIP: &[&str] = &["airstream-test-no-such-program"];
const WHOLE: &[u8] = b"the first half, the second half";

/// Two wheels with half of `WHOLE` each, and the package they make.
static HALVES: Package = Package {
    parts: &[
        Part {
            wheel: ("airstream-test-a", "1.0.0"),
            member: "airstream_test_a/data.part00",
        },
        Part {
            wheel: ("airstream-test-b", "1.0.0"),
            member: "airstream_test_b/data.part01",
        },
    ],
    file_name: "whole.bin",
    bytes: WHOLE.len() as u64,
    sha256: "25eac2b666bfae74c4b0aeac9f80b73b45cd9426610a192c4ab906826c839e6f",
};

/// A folder of wheels and an empty cache folder.
struct Shop {
    wheels: TempDir,
    cache: TempDir,
}

impl Shop {
    fn new() -> Shop {
        let shop = Shop {
            wheels: tempfile::tempdir().unwrap(),
            cache: tempfile::tempdir().unwrap(),
        };
        shop.stock("airstream_test_a", "data.part00", &WHOLE[..16]);
        shop.stock("airstream_test_b", "data.part01", &WHOLE[16..]);
        shop
    }

    fn stock(&self, name: &str, member: &str, content: &[u8]) {
        let path = self
            .wheels
            .path()
            .join(format!("{name}-1.0.0-py3-none-any.whl"));
        let mut zip = zip::ZipWriter::new(File::create(path).unwrap());
        let mut add = |path: &str, content: &[u8]| {
            zip.start_file(path, zip::write::SimpleFileOptions::default())
                .unwrap();
            zip.write_all(content).unwrap();
        };
        let info = format!("{name}-1.0.0.dist-info");
        add(&format!("{name}/{member}"), content);
        add(
            &format!("{info}/METADATA"),
            format!("Metadata-Version: 2.1\nName: {name}\nVersion: 1.0.0\n").as_bytes(),
        );
        add(
            &format!("{info}/WHEEL"),
            b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        );
        add(&format!("{info}/RECORD"), b"");
        zip.finish().unwrap();
    }

    fn fetch_with(&self, pip: &[&str], package: &Package) -> Result<PathBuf> {
        let options = [
            "--no-index",
            "--find-links",
            self.wheels.path().to_str().unwrap(),
        ];
        Fetcher {
            folder: self.cache.path().join("airstream"),
            pip,
            options: &options,
        }
        .fetch(package)
    }

    /// Names in the cache folder, sorted.
    fn left(&self) -> Vec<String> {
        let entries = fs::read_dir(self.cache.path().join("airstream")).unwrap();
        let mut names: Vec<_> = entries
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

#[test]
fn parts_are_joined_checked_and_kept() {
    let shop = Shop::new();
    let file = shop.fetch_with(PIP, &HALVES).unwrap();
    assert_eq!(fs::read(&file).unwrap(), WHOLE);
    assert_eq!(
        shop.left(),
        [".whole.bin.lock", "whole.bin", "whole.bin.sha256"]
    );
    // From now on neither pip nor a writable folder is needed.
    assert_eq!(shop.fetch_with(NO_PIP, &HALVES).unwrap(), file);
}

#[test]
fn what_a_killed_run_left_is_not_trusted() {
    let shop = Shop::new();
    let folder = shop.cache.path().join("airstream");
    fs::create_dir_all(folder.join(".whole.bin.fetching-1/0")).unwrap();
    fs::write(folder.join(".whole.bin.fetching-1/partial"), &WHOLE[..16]).unwrap();
    // Right size, no marker, wrong content: as after a crash before the data reached the disk.
    fs::write(folder.join("whole.bin"), vec![0; WHOLE.len()]).unwrap();
    assert_eq!(
        fs::read(shop.fetch_with(PIP, &HALVES).unwrap()).unwrap(),
        WHOLE
    );
    // A truncated file with a marker is not trusted either.
    fs::write(folder.join("whole.bin"), &WHOLE[..7]).unwrap();
    assert_eq!(
        fs::read(shop.fetch_with(PIP, &HALVES).unwrap()).unwrap(),
        WHOLE
    );
    assert_eq!(
        shop.left(),
        [".whole.bin.lock", "whole.bin", "whole.bin.sha256"]
    );
}

#[test]
fn the_right_file_without_a_marker_is_adopted() {
    let shop = Shop::new();
    let folder = shop.cache.path().join("airstream");
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("whole.bin"), WHOLE).unwrap();
    shop.fetch_with(NO_PIP, &HALVES).unwrap();
    assert!(folder.join("whole.bin.sha256").exists());
}

#[test]
fn a_wrong_or_endless_file_is_refused_and_deleted() {
    for content in [b"the second hole".to_vec(), vec![7; 9 << 20]] {
        let shop = Shop::new();
        shop.stock("airstream_test_b", "data.part01", &content);
        let error = shop.fetch_with(PIP, &HALVES).unwrap_err();
        assert_eq!(error.kind(), Kind::Format);
        assert!(
            error.to_string().contains("not the published file"),
            "{error}"
        );
        assert_eq!(shop.left(), [".whole.bin.lock"]);
    }
}

#[test]
fn a_wheel_without_the_member_is_a_clear_error() {
    let shop = Shop::new();
    shop.stock("airstream_test_b", "other", b"");
    let error = shop.fetch_with(PIP, &HALVES).unwrap_err().to_string();
    assert!(
        error.contains("airstream-test-b==1.0.0") && error.contains("data.part01"),
        "{error}"
    );
    assert_eq!(shop.left(), [".whole.bin.lock"]);
}

#[test]
fn each_failure_names_its_remedy() {
    let shop = Shop::new();
    let error = shop.fetch_with(NO_PIP, &HALVES).unwrap_err();
    assert!(error.to_string().contains("is not installed"), "{error}");
    assert!(error.remedy().contains("install python3"), "{error}");

    let missing = Package {
        parts: &[Part {
            wheel: ("airstream-test-c", "1.0.0"),
            member: "x",
        }],
        ..HALVES
    };
    let error = shop.fetch_with(PIP, &missing).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("pip cannot download airstream-test-c==1.0.0"),
        "{error}"
    );
    assert!(error.remedy().contains("on another machine"), "{error}");

    for (said, remedy) in [
        ("python3: No module named pip", "install pip"),
        ("OSError: [Errno 28] No space left on device", "free space"),
        (
            "NewConnectionError: Failed to establish",
            "check the network",
        ),
    ] {
        let script = format!("echo \"{said}\" >&2; exit 1");
        let error = shop
            .fetch_with(&["sh", "-c", &script], &HALVES)
            .unwrap_err();
        assert!(error.remedy().starts_with(remedy), "{error}");
    }

    let vast = Package {
        bytes: 1 << 60,
        ..HALVES
    };
    let error = shop.fetch_with(PIP, &vast).unwrap_err();
    assert!(error.to_string().contains("MiB are free"), "{error}");

    let occupied = shop.cache.path().join("file");
    fs::write(&occupied, b"").unwrap();
    let error = Fetcher {
        folder: occupied.join("airstream"),
        pip: PIP,
        options: &[],
    }
    .fetch(&HALVES)
    .unwrap_err();
    assert!(error.remedy().contains("XDG_CACHE_HOME"), "{error}");
}

#[test]
fn of_many_at_once_one_fetches() {
    let shop = Shop::new();
    let count = shop.wheels.path().join("count");
    let counted = format!("echo >> {}; exec python3 -m pip \"$@\"", count.display());
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                shop.fetch_with(&["sh", "-c", &counted, "pip"], &HALVES)
                    .unwrap()
            });
        }
    });
    assert_eq!(fs::read_to_string(count).unwrap().len(), HALVES.parts.len());
}
