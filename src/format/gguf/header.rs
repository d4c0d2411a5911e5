//! One file's header: magic, version, metadata entries, tensor table.

use std::ops::Range;
use std::path::Path;

use super::cursor::{Cursor, damaged};
use super::tensors::TensorInfo;
use super::value::{self, Value, ValueType};
use crate::error::{Error, Kind, Result};

/// More than any model has (an unmerged mixture of experts reaches about 50,000 tensors).
const ENTRIES_MAX: u64 = 1 << 16;

/// The specification's limit on the bytes of a key.
const KEY_BYTES_MAX: usize = (1 << 16) - 1;

/// The specification's limit on the bytes of a tensor name.
const TENSOR_NAME_BYTES_MAX: usize = 64;

/// Where tensor data is aligned if the file does not say.
const ALIGNMENT_DEFAULT: u32 = 32;

/// What one file says before its tensor data.
pub(super) struct Header {
    pub version: u32,
    pub entries: Entries,
    pub tensors: Vec<TensorInfo>,
}

/// One metadata entry: where its key and its value are in the file.
struct Entry {
    key: Range<usize>,
    value_type: ValueType,
    value_at: usize,
}

/// The metadata entries of a file, whose bytes live elsewhere.
pub(super) struct Entries {
    in_file_order: Vec<Entry>,
    /// Indices into `in_file_order`, sorted by key.
    by_key: Vec<u32>,
}

impl Header {
    /// Parses and checks the header of a file, from its start; `file_index` goes into the tensors.
    pub fn parse(cursor: &mut Cursor<'_>, file_index: usize) -> Result<Self> {
        let file = cursor.file();
        let version = read_version(cursor, file)?;
        let tensor_count = cursor.u64("the number of tensors")?;
        let entry_count = cursor.u64("the number of metadata entries")?;
        for (count, what) in [(tensor_count, "tensors"), (entry_count, "metadata entries")] {
            if count > ENTRIES_MAX {
                return Err(cursor.damaged(format_args!(
                    "the header claims {count} {what}; the most that makes sense is {ENTRIES_MAX}"
                )));
            }
        }
        let entries = Entries::parse(cursor, entry_count)?;
        let alignment = entries.alignment(cursor.bytes(), file)?;
        let mut tensors = Vec::new();
        for i in 0..tensor_count {
            tensors.push(read_tensor(cursor, i, file, file_index)?);
        }
        let data_start = (cursor.at() as u64).next_multiple_of(u64::from(alignment));
        super::tensors::place(
            &mut tensors,
            file,
            data_start,
            alignment,
            cursor.file_bytes(),
        )?;
        Ok(Header {
            version,
            entries,
            tensors,
        })
    }
}

/// Reads magic and version, which say whether this is a file for us at all.
fn read_version(cursor: &mut Cursor<'_>, file: &Path) -> Result<u32> {
    let unsupported = |what: String, remedy: &str| {
        Err(Error::new(
            Kind::Unsupported,
            format!("{}: {what}", file.display()),
            remedy,
        ))
    };
    let magic = cursor.take(4, "the magic number")?;
    if magic != b"GGUF" {
        return Err(Error::new(
            Kind::Format,
            format!(
                "{}: not a GGUF file, it starts with \"{}\"",
                file.display(),
                magic.escape_ascii()
            ),
            "give a model file in GGUF format",
        ));
    }
    match cursor.u32("the version")? {
        version @ (2 | 3) => Ok(version),
        // Versions are small numbers, so a version with its value in the high half is byte-swapped.
        swapped if swapped & 0xffff == 0 && swapped != 0 => unsupported(
            format!("big-endian GGUF (version {})", swapped.swap_bytes()),
            "use the little-endian file of this model",
        ),
        version => unsupported(
            format!("GGUF version {version}; versions 2 and 3 are supported"),
            "convert the model again with a current converter",
        ),
    }
}

impl Entries {
    fn parse(cursor: &mut Cursor<'_>, count: u64) -> Result<Self> {
        let mut in_file_order = Vec::new();
        let mut keys: Vec<&str> = Vec::new();
        for i in 0..count {
            let key = cursor.string(format_args!("the key of metadata entry {i}"))?;
            if key.is_empty() || key.len() > KEY_BYTES_MAX {
                return Err(cursor.damaged(format_args!(
                    "the key of metadata entry {i} has {} bytes, allowed are 1 to {KEY_BYTES_MAX}",
                    key.len()
                )));
            }
            let key_range = cursor.at() - key.len()..cursor.at();
            let Ok(key) = std::str::from_utf8(key) else {
                return Err(
                    cursor.damaged(format_args!("the key of metadata entry {i} is not UTF-8"))
                );
            };
            if key.contains(char::is_control) {
                return Err(cursor.damaged(format_args!("the key {key:?} has control characters")));
            }
            let value_type = ValueType::read(cursor, format_args!("{key:?}"))?;
            let value_at = cursor.at();
            value::check(cursor, value_type, key)?;
            in_file_order.push(Entry {
                key: key_range,
                value_type,
                value_at,
            });
            keys.push(key);
        }
        let mut by_key: Vec<u32> = (0..in_file_order.len() as u32).collect();
        by_key.sort_unstable_by_key(|&i| keys[i as usize]);
        if let Some(twice) = by_key
            .windows(2)
            .find(|w| keys[w[0] as usize] == keys[w[1] as usize])
        {
            return Err(cursor.damaged(format_args!(
                "the key {:?} occurs twice",
                keys[twice[0] as usize]
            )));
        }
        Ok(Entries {
            in_file_order,
            by_key,
        })
    }

    /// The value of `key`, with its type; `bytes` are those that were parsed.
    pub fn get<'a>(
        &'a self,
        bytes: &'a [u8],
        file: &'a Path,
        key: &str,
    ) -> Option<(ValueType, Value<'a>)> {
        let found = self
            .by_key
            .binary_search_by(|&i| {
                bytes[self.in_file_order[i as usize].key.clone()].cmp(key.as_bytes())
            })
            .ok()?;
        let entry = &self.in_file_order[self.by_key[found] as usize];
        Some((entry.value_type, entry.value(bytes, file)))
    }

    /// All keys and values, in the file's order.
    pub fn iter<'a>(
        &'a self,
        bytes: &'a [u8],
        file: &'a Path,
    ) -> impl Iterator<Item = (&'a str, Value<'a>)> {
        self.in_file_order
            .iter()
            .map(move |e| (e.key(bytes), e.value(bytes, file)))
    }

    fn alignment(&self, bytes: &[u8], file: &Path) -> Result<u32> {
        let Some((value_type, value)) = self.get(bytes, file, "general.alignment") else {
            return Ok(ALIGNMENT_DEFAULT);
        };
        let Some(alignment) = value.to_u32() else {
            let found = format!("{value_type} {value}");
            return Err(value::wrong_type(
                file,
                "general.alignment",
                "uint32",
                &found,
            ));
        };
        if !alignment.is_power_of_two() {
            return Err(damaged(
                file,
                format_args!("general.alignment is {alignment}, which is not a power of two"),
            ));
        }
        Ok(alignment)
    }
}

impl Entry {
    fn key<'a>(&self, bytes: &'a [u8]) -> &'a str {
        std::str::from_utf8(&bytes[self.key.clone()])
            .expect("the key was UTF-8 when the file was opened")
    }

    fn value<'a>(&self, bytes: &'a [u8], file: &'a Path) -> Value<'a> {
        value::decode(
            &bytes[self.value_at..],
            self.value_type,
            file,
            self.key(bytes),
        )
    }
}

/// Reads entry `index` of the tensor table. The offset stays relative to the data for now.
fn read_tensor(
    cursor: &mut Cursor<'_>,
    index: u64,
    file: &Path,
    file_index: usize,
) -> Result<TensorInfo> {
    let name = cursor.string(format_args!("the name of tensor {index}"))?;
    if name.is_empty() || name.len() > TENSOR_NAME_BYTES_MAX {
        return Err(cursor.damaged(format_args!(
            "the name of tensor {index} has {} bytes, allowed are 1 to {TENSOR_NAME_BYTES_MAX}",
            name.len()
        )));
    }
    let Ok(name) = std::str::from_utf8(name) else {
        return Err(cursor.damaged(format_args!("the name of tensor {index} is not UTF-8")));
    };
    // Names are printed, and a terminal obeys such characters.
    if name.contains(char::is_control) {
        return Err(cursor.damaged(format_args!(
            "the name of tensor {index}, {name:?}, has control characters"
        )));
    }
    let dims_count = cursor.u32(format_args!("the number of dimensions of {name}"))?;
    if !(1..=4).contains(&dims_count) {
        return Err(cursor.damaged(format_args!(
            "tensor {name} has {dims_count} dimensions, allowed are 1 to 4"
        )));
    }
    let mut dims = [1; 4];
    for dim in &mut dims[..dims_count as usize] {
        *dim = cursor.u64(format_args!("the dimensions of {name}"))?;
    }
    let ggml_type = cursor.u32(format_args!("the type of {name}"))?;
    let offset = cursor.u64(format_args!("the offset of {name}"))?;
    TensorInfo::new(name, dims, ggml_type, offset, file, file_index)
}
