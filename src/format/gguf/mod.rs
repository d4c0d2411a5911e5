//! GGUF model files: parsed once, checked completely, then trusted.
//!
//! A GGUF file is a header (magic, version, metadata entries, tensor table) and then the tensors'
//! bytes, aligned. [`Gguf::open`] reads the header, never the weights, and checks every length,
//! count and place in it against the size of the file before it relies on it. What remains are
//! views into what was read. Source of the format: the GGUF specification (`docs/gguf.md` in the
//! ggml repository). Versions 2 and 3 are read, little-endian.
//!
//! A big model may be split over files named `NAME-00001-of-00003.gguf`. They are opened together,
//! whichever part is named; metadata comes from the first part.

mod cursor;
mod header;
mod metadata;
mod split;
mod tensors;
mod value;

use std::fs::{File, Metadata};
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::error::Result;
use header::{Entries, Header};
pub use tensors::TensorInfo;
pub use value::{Array, Value, ValueType};

/// A model: the metadata and the tensor table of one GGUF file or of all parts of a split one.
pub struct Gguf {
    files: Vec<PathBuf>,
    /// The same, open.
    opened: Vec<Opened>,
    version: u32,
    /// The metadata of the first file.
    bytes: Mmap,
    entries: Entries,
    tensors: Vec<TensorInfo>,
    /// Indices into `tensors`, sorted by name.
    by_name: Vec<u32>,
}

/// A file of a model as it was when its metadata was read.
pub struct Opened {
    /// Open for reading.
    pub file: File,
    /// Whatever is at its path now, what is read of it must be of a file like this.
    pub metadata: Metadata,
}

/// One file of a model, parsed.
struct Part {
    path: PathBuf,
    opened: Opened,
    header: Header,
    /// The metadata, and few bytes beyond.
    bytes: Mmap,
}

impl Part {
    fn open(path: &Path, file_index: usize) -> Result<Part> {
        let (file, metadata) = metadata::open(path)?;
        let file_bytes = metadata.len();
        if file_bytes == 0 {
            return Err(cursor::damaged(path, "the file is empty"));
        }
        let (header, bytes) = metadata::read(&file, path, file_bytes, file_index)?;
        Ok(Part {
            path: path.to_owned(),
            opened: Opened { file, metadata },
            header,
            bytes,
        })
    }

    fn u32(&self, key: &str) -> Result<Option<u32>> {
        lookup(
            &self.header.entries,
            &self.bytes,
            &self.path,
            key,
            "uint32",
            Value::to_u32,
        )
    }
}

impl Gguf {
    /// Opens a model, with all its parts if it is split.
    pub fn open(path: &Path) -> Result<Gguf> {
        let mut parts = split::open(path)?;
        let mut tensors = Vec::new();
        for part in &mut parts {
            tensors.append(&mut part.header.tensors);
        }
        let mut by_name: Vec<u32> = (0..tensors.len() as u32).collect();
        by_name.sort_unstable_by_key(|&i| tensors[i as usize].name.as_str());
        for pair in by_name.windows(2) {
            let [a, b] = [pair[0], pair[1]].map(|i| &tensors[i as usize]);
            if a.name == b.name {
                let second = &parts[a.file.max(b.file)].path;
                return Err(cursor::damaged(
                    second,
                    format_args!("the tensor name {} occurs twice", a.name),
                ));
            }
        }
        let files = parts.iter().map(|p| p.path.clone()).collect();
        let mut parts = parts.into_iter();
        let first = parts.next().expect("a model has a file");
        let others = parts.map(|part| part.opened);
        Ok(Gguf {
            files,
            opened: std::iter::once(first.opened).chain(others).collect(),
            version: first.header.version,
            bytes: first.bytes,
            entries: first.header.entries,
            tensors,
            by_name,
        })
    }

    /// The model's files, in the order of their parts.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// The same files as they were opened.
    pub fn opened(&self) -> &[Opened] {
        &self.opened
    }

    /// The GGUF version, 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// The value of `key`, an integer of any type that fits.
    pub fn u32(&self, key: &str) -> Result<Option<u32>> {
        self.lookup(key, "uint32", Value::to_u32)
    }

    /// The value of `key`, a float (float64 is rounded).
    pub fn f32(&self, key: &str) -> Result<Option<f32>> {
        self.lookup(key, "float32", Value::to_f32)
    }

    /// The value of `key`, a bool.
    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.lookup(key, "bool", |value| match value {
            Value::Bool(v) => Some(v),
            _ => None,
        })
    }

    /// The value of `key`, a string.
    pub fn str(&self, key: &str) -> Result<Option<&str>> {
        let bytes = self.lookup(key, "string", |value| match value {
            Value::Str(v) => Some(v),
            _ => None,
        })?;
        let Some(bytes) = bytes else { return Ok(None) };
        std::str::from_utf8(bytes).map(Some).map_err(|_| {
            cursor::damaged(self.path(), format_args!("the string {key:?} is not UTF-8"))
        })
    }

    /// The value of `key`, an array.
    pub fn array(&self, key: &str) -> Result<Option<Array<'_>>> {
        self.lookup(key, "array", |value| match value {
            Value::Array(v) => Some(v),
            _ => None,
        })
    }

    /// Every key and value, in the file's order.
    pub fn keys(&self) -> impl Iterator<Item = (&str, Value<'_>)> {
        self.entries.iter(&self.bytes, self.path())
    }

    /// All tensors, in the order of the files.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        let name_of = |&i: &u32| self.tensors[i as usize].name.as_str();
        let found = self
            .by_name
            .binary_search_by(|i| name_of(i).cmp(name))
            .ok()?;
        Some(&self.tensors[self.by_name[found] as usize])
    }

    /// The file that has the metadata.
    fn path(&self) -> &Path {
        &self.files[0]
    }

    fn lookup<'a, T>(
        &'a self,
        key: &str,
        wanted: &str,
        convert: impl FnOnce(Value<'a>) -> Option<T>,
    ) -> Result<Option<T>> {
        lookup(
            &self.entries,
            &self.bytes,
            self.path(),
            key,
            wanted,
            convert,
        )
    }
}

/// The value of `key` as `convert` reads it; an error if it is there and of another type.
fn lookup<'a, T>(
    entries: &'a Entries,
    bytes: &'a [u8],
    file: &'a Path,
    key: &str,
    wanted: &str,
    convert: impl FnOnce(Value<'a>) -> Option<T>,
) -> Result<Option<T>> {
    let Some((value_type, value)) = entries.get(bytes, file, key) else {
        return Ok(None);
    };
    match convert(value) {
        Some(converted) => Ok(Some(converted)),
        None => Err(value::wrong_type(
            file,
            key,
            wanted,
            &format!("{value_type} with value {value}"),
        )),
    }
}
