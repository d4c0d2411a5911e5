//! File systems that only one child process sees. Root only; elsewhere mounting is an error that the caller skips for.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString};
use std::io::{Error, Result};
use std::path::{Path, PathBuf};

fn checked(rc: libc::c_int) -> Result<()> {
    if rc == 0 {
        Ok(())
    } else {
        Err(Error::last_os_error())
    }
}

fn c_string(path: &Path) -> CString {
    CString::new(path.as_os_str().as_encoded_bytes()).expect("no zero byte")
}

/// From here on nobody else sees what this process mounts.
fn unshare_mounts() -> Result<()> {
    // SAFETY: the strings end with a zero and outlive the calls.
    unsafe {
        checked(libc::unshare(libc::CLONE_NEWNS))?;
        let private = libc::MS_REC | libc::MS_PRIVATE;
        let none = std::ptr::null();
        checked(libc::mount(
            c"none".as_ptr(),
            c"/".as_ptr(),
            none,
            private,
            none.cast(),
        ))
    }
}

fn mount(kind: &CStr, at: &CStr, options: &CStr) -> Result<()> {
    // SAFETY: as above.
    checked(unsafe {
        libc::mount(
            kind.as_ptr(),
            at.as_ptr(),
            kind.as_ptr(),
            0,
            options.as_ptr().cast(),
        )
    })
}

/// Mounts a file system of one page without room for a single file. Makes system calls only, as a forked child may.
pub fn full_file_system(at: &CStr) -> Result<()> {
    unshare_mounts()?;
    mount(c"tmpfs", at, c"size=4k,nr_inodes=2")
}

/// Puts a copy of the file `model` on an overlay over a file system without direct reads, below `folder`; its path.
pub fn overlay_without_direct_reads(model: &Path, folder: &Path) -> Result<PathBuf> {
    unshare_mounts()?;
    std::fs::create_dir_all(folder)?;
    mount(c"ramfs", &c_string(folder), c"")?;
    let place = |name: &str| {
        let path = folder.join(name);
        std::fs::create_dir(&path).map(|()| path)
    };
    let (lower, upper, work, merged) = (
        place("lower")?,
        place("upper")?,
        place("work")?,
        place("merged")?,
    );
    std::fs::copy(model, lower.join("model.gguf"))?;
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        lower.display(),
        upper.display(),
        work.display()
    );
    let options = CString::new(options).expect("no zero byte");
    // An upper layer needs what a ramfs does not have; reading needs none.
    mount(c"overlay", &c_string(&merged), &options).or_else(|_| {
        let options = format!("lowerdir={}:{}", lower.display(), upper.display());
        let options = CString::new(options).expect("no zero byte");
        mount(c"overlay", &c_string(&merged), &options)
    })?;
    Ok(merged.join("model.gguf"))
}
