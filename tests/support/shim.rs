//! The CUDA kernels as a library of this machine, compiled when first asked for.

use std::ffi::{CStr, CString, c_char, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, OnceLock};
use std::time::SystemTime;

/// `shim_launch` of `kernels/host/shim.cpp`.
type Launch =
    unsafe extern "C" fn(*const c_char, *const u32, u32, *const *mut c_void, u64) -> *const c_char;

/// Set in the process that runs under the sanitizers.
pub const SANITIZED: &str = "AIRSTREAM_TEST_SANITIZED";

/// Launches kernels, as many at a time as it has copies of the library, each of which has its own threads and memory.
pub struct Shim {
    launches: Vec<Mutex<Launch>>,
}

/// Copies of the library.
const COPIES: usize = 4;

impl Shim {
    /// The library; none where there is no C++ compiler. With CI set there has to be one.
    pub fn get() -> Option<&'static Shim> {
        static SHIM: OnceLock<Option<Shim>> = OnceLock::new();
        SHIM.get_or_init(|| {
            let sanitized = std::env::var_os(SANITIZED).is_some();
            let library = build(sanitized)?;
            let mut launches = vec![Mutex::new(load(&library))];
            // The sanitizers take a second copy's variables for a second definition.
            while !sanitized && launches.len() < COPIES {
                launches.push(Mutex::new(load_copy(&library)));
            }
            Some(Shim { launches })
        })
        .as_ref()
    }

    /// Runs a kernel in blocks of `threads`; `params` point to its arguments.
    ///
    /// # Safety
    /// The arguments are the kernel's, and what they point to is valid for what it reads and writes.
    pub unsafe fn launch(
        &self,
        name: &str,
        grid: [u32; 3],
        threads: u32,
        params: &[*mut c_void],
        order: u64,
    ) {
        let c_name = CString::new(name).expect("no zeros");
        let free = self
            .launches
            .iter()
            .find_map(|launch| launch.try_lock().ok());
        let launch = free.unwrap_or_else(|| {
            let first = self.launches[0].lock();
            first.expect("no launch has panicked")
        });
        // SAFETY: the caller vouches for the arguments.
        let failure = unsafe {
            launch(
                c_name.as_ptr(),
                grid.as_ptr(),
                threads,
                params.as_ptr(),
                order,
            )
        };
        if !failure.is_null() {
            // SAFETY: the library's message is a string and lives until the next launch.
            let failure = unsafe { CStr::from_ptr(failure) }
                .to_string_lossy()
                .into_owned();
            drop(launch);
            panic!("{name} in a grid of {grid:?} x {threads}: {failure}");
        }
    }
}

/// The C++ compiler; none where there is none. With CI set there has to be one.
pub fn compiler() -> Option<String> {
    let named = std::env::var("CXX").ok();
    let candidates = named
        .as_deref()
        .into_iter()
        .chain(["c++", "g++", "clang++", "clang++-19"]);
    for candidate in candidates {
        if Command::new(candidate)
            .arg("--version")
            .output()
            .is_ok_and(|o| o.status.success())
        {
            return Some(candidate.to_string());
        }
    }
    assert!(
        std::env::var_os("CI").is_none(),
        "the kernels' tests need a C++ compiler: install g++ or clang"
    );
    eprintln!("skipped: the kernels' tests need a C++ compiler: install g++ or clang");
    None
}

/// When any of the kernels' sources was last changed.
fn newest_source(folder: &Path) -> SystemTime {
    let entries = std::fs::read_dir(folder).expect("the sources are there");
    let times = entries.map(|entry| {
        let entry = entry.expect("a readable folder");
        match entry.file_type().expect("a known type").is_dir() {
            true => newest_source(&entry.path()),
            false => entry
                .metadata()
                .and_then(|m| m.modified())
                .expect("files have times"),
        }
    });
    times.max().expect("there are sources")
}

/// Compiles the library, unless it is there and newer than its sources.
pub fn build(sanitized: bool) -> Option<PathBuf> {
    let compiler = compiler()?;
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let name = if sanitized {
        "kernels-sanitized.so"
    } else {
        "kernels.so"
    };
    let library = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let built = library.metadata().and_then(|m| m.modified());
    if built.is_ok_and(|built| built > newest_source(&sources)) {
        return Some(library);
    }
    let unfinished = library.with_extension(format!("{}.so", std::process::id()));
    let mut command = Command::new(&compiler);
    command
        .args([
            "-x",
            "c++",
            "-std=c++20",
            // The sanitizers' copy takes longer to compile than it runs.
            if sanitized { "-O1" } else { "-O2" },
            "-g1",
            "-fPIC",
            "-shared",
            "-DAIRSTREAM_HOST",
            // What each copy that is loaded keeps to itself.
            "-fvisibility=hidden",
        ])
        // As on the GPU, nothing is fused that the source does not fuse.
        .args(["-ffp-contract=off", "-fno-strict-aliasing"])
        .arg("-o")
        .arg(&unfinished)
        .arg(sources.join("host/shim.cpp"));
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("fma") {
        command.arg("-mfma");
    }
    if sanitized {
        command.args(["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]);
    }
    let output = command.output().expect("the compiler starts");
    assert!(
        output.status.success(),
        "{compiler}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    std::fs::rename(&unfinished, &library).expect("the library has its name");
    Some(library)
}

/// Loads the library once more, which takes another file.
fn load_copy(library: &Path) -> Launch {
    let folder = library.parent().expect("it is in a folder");
    let copy = tempfile::NamedTempFile::new_in(folder).expect("the folder can be written");
    std::fs::copy(library, copy.path()).expect("the library can be copied");
    load(copy.path())
}

fn load(library: &Path) -> Launch {
    let path = CString::new(library.to_str().expect("a UTF-8 path")).expect("no zeros");
    // SAFETY: a library of ours; nothing happens when it is loaded.
    let symbol = unsafe {
        let handle = libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL);
        assert!(
            !handle.is_null(),
            "{}",
            CStr::from_ptr(libc::dlerror()).to_string_lossy()
        );
        libc::dlsym(handle, c"shim_launch".as_ptr())
    };
    assert!(!symbol.is_null(), "the library has its function");
    // SAFETY: the function has this type.
    unsafe { std::mem::transmute::<*mut c_void, Launch>(symbol) }
}
