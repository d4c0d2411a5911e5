//! Metadata values: their types, and views of them in what was read.

use std::fmt;
use std::path::Path;

use super::cursor::Cursor;
use crate::error::{Error, Kind, Result};

/// Arrays of arrays may nest this deep. No known model nests at all.
const ARRAY_DEPTH_MAX: usize = 4;

/// The type of a metadata value (`gguf_metadata_value_type` of the GGUF specification).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)] // The names say it all.
pub enum ValueType {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

impl ValueType {
    /// In the order of their numbers in the file.
    const ALL: [ValueType; 13] = [
        ValueType::U8,
        ValueType::I8,
        ValueType::U16,
        ValueType::I16,
        ValueType::U32,
        ValueType::I32,
        ValueType::F32,
        ValueType::Bool,
        ValueType::String,
        ValueType::Array,
        ValueType::U64,
        ValueType::I64,
        ValueType::F64,
    ];

    /// The type's name as the GGUF specification spells it.
    pub const fn name(self) -> &'static str {
        match self {
            ValueType::U8 => "uint8",
            ValueType::I8 => "int8",
            ValueType::U16 => "uint16",
            ValueType::I16 => "int16",
            ValueType::U32 => "uint32",
            ValueType::I32 => "int32",
            ValueType::F32 => "float32",
            ValueType::Bool => "bool",
            ValueType::String => "string",
            ValueType::Array => "array",
            ValueType::U64 => "uint64",
            ValueType::I64 => "int64",
            ValueType::F64 => "float64",
        }
    }

    /// Bytes of one value; `None` where each value has its own length.
    const fn fixed_bytes(self) -> Option<usize> {
        match self {
            ValueType::U8 | ValueType::I8 | ValueType::Bool => Some(1),
            ValueType::U16 | ValueType::I16 => Some(2),
            ValueType::U32 | ValueType::I32 | ValueType::F32 => Some(4),
            ValueType::U64 | ValueType::I64 | ValueType::F64 => Some(8),
            ValueType::String | ValueType::Array => None,
        }
    }

    /// Reads the number of a type; `of` says whose type it is.
    pub(super) fn read(cursor: &mut Cursor<'_>, of: impl fmt::Display) -> Result<Self> {
        let number = cursor.u32(format_args!("the type of {of}"))?;
        Self::ALL.get(number as usize).copied().ok_or_else(|| {
            cursor.damaged(format_args!(
                "{of} has value type {number}, which GGUF does not define"
            ))
        })
    }
}

impl fmt::Display for ValueType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// One metadata value. Strings and arrays are views into what was read.
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs)] // The names say it all.
pub enum Value<'a> {
    Unsigned(u64),
    Signed(i64),
    F32(f32),
    F64(f64),
    Bool(bool),
    /// Not checked to be UTF-8.
    Str(&'a [u8]),
    Array(Array<'a>),
}

impl Value<'_> {
    /// The value as u32, if it is an integer that fits.
    pub(super) fn to_u32(self) -> Option<u32> {
        match self {
            Value::Unsigned(v) => v.try_into().ok(),
            Value::Signed(v) => v.try_into().ok(),
            _ => None,
        }
    }

    /// The value as f32, if it is a float (float64 is rounded).
    pub(super) fn to_f32(self) -> Option<f32> {
        match self {
            Value::F32(v) => Some(v),
            Value::F64(v) => Some(v as f32),
            _ => None,
        }
    }
}

/// Scalars as numbers, strings quoted and cut to a line, arrays as type and length.
impl fmt::Display for Value<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN_CHARS_MAX: usize = 72;
        match self {
            Value::Unsigned(v) => write!(f, "{v}"),
            Value::Signed(v) => write!(f, "{v}"),
            Value::F32(v) => write!(f, "{v:?}"),
            Value::F64(v) => write!(f, "{v:?}"),
            Value::Bool(v) => write!(f, "{v}"),
            Value::Str(bytes) => {
                // A character takes at most four bytes, so this prefix holds enough of them.
                let head = &bytes[..bytes.len().min(4 * SHOWN_CHARS_MAX + 4)];
                let text = String::from_utf8_lossy(head);
                let shown: String = text.chars().take(SHOWN_CHARS_MAX).collect();
                let dots = if shown.len() < bytes.len() { "..." } else { "" };
                write!(f, "{shown:?}{dots}")
            }
            Value::Array(a) => write!(f, "[{}; {}]", a.element, a.len),
        }
    }
}

/// Steps over a value of type `value_type`, checking everything that later reads rely on.
pub(super) fn check(cursor: &mut Cursor<'_>, value_type: ValueType, key: &str) -> Result<()> {
    check_run(cursor, value_type, 1, 0, key)
}

/// Steps over `count` values of one type, inside `depth` arrays.
fn check_run(
    cursor: &mut Cursor<'_>,
    value_type: ValueType,
    count: u64,
    depth: usize,
    key: &str,
) -> Result<()> {
    if let Some(size) = value_type.fixed_bytes() {
        let bytes = cursor.skip(count, size as u64, format_args!("the value of {key:?}"))?;
        if value_type == ValueType::Bool && bytes.iter().any(|&b| b > 1) {
            return Err(cursor.damaged(format_args!("{key:?} has a bool that is neither 0 nor 1")));
        }
        return Ok(());
    }
    // Every string takes at least 8 bytes and every array 12, so the loops below end with the file;
    // the test up front only gives the better message.
    if count > cursor.left() / 8 {
        return Err(cursor.damaged(format_args!(
            "{key:?} claims {count} values, more than the rest of the file can hold"
        )));
    }
    if value_type == ValueType::String {
        for i in 0..count {
            cursor.string(format_args!("string {i} of {key:?}"))?;
        }
        return Ok(());
    }
    if depth == ARRAY_DEPTH_MAX {
        return Err(cursor.damaged(format_args!(
            "{key:?} nests arrays more than {ARRAY_DEPTH_MAX} deep"
        )));
    }
    for _ in 0..count {
        let element = ValueType::read(cursor, format_args!("the elements of {key:?}"))?;
        let len = cursor.u64(format_args!("the length of {key:?}"))?;
        check_run(cursor, element, len, depth + 1, key)?;
    }
    Ok(())
}

/// The checked value of type `value_type` that starts `bytes`.
pub(super) fn decode<'a>(
    bytes: &'a [u8],
    value_type: ValueType,
    file: &'a Path,
    key: &'a str,
) -> Value<'a> {
    match value_type {
        ValueType::Bool => Value::Bool(bytes[0] != 0),
        ValueType::F32 => Value::F32(f32::from_le_bytes(first(bytes))),
        ValueType::F64 => Value::F64(f64::from_le_bytes(first(bytes))),
        ValueType::String => Value::Str(split_string(bytes).0),
        ValueType::Array => {
            let number = u32::from_le_bytes(first(bytes)) as usize;
            Value::Array(Array {
                element: ValueType::ALL[number],
                len: u64::from_le_bytes(first(&bytes[4..])) as usize,
                bytes: &bytes[12..],
                file,
                key,
            })
        }
        ValueType::I8 | ValueType::I16 | ValueType::I32 | ValueType::I64 => {
            Value::Signed(integer(bytes, value_type) as i64)
        }
        _ => Value::Unsigned(integer(bytes, value_type) as u64),
    }
}

/// The first `N` bytes.
fn first<const N: usize>(bytes: &[u8]) -> [u8; N] {
    *bytes
        .first_chunk()
        .expect("the length was checked when the file was opened")
}

/// The integer of type `value_type` that starts `bytes`. i128 holds every one of them.
fn integer(bytes: &[u8], value_type: ValueType) -> i128 {
    match value_type {
        ValueType::U8 => i128::from(bytes[0]),
        ValueType::I8 => i128::from(bytes[0] as i8),
        ValueType::U16 => i128::from(u16::from_le_bytes(first(bytes))),
        ValueType::I16 => i128::from(i16::from_le_bytes(first(bytes))),
        ValueType::U32 => i128::from(u32::from_le_bytes(first(bytes))),
        ValueType::I32 => i128::from(i32::from_le_bytes(first(bytes))),
        ValueType::U64 => i128::from(u64::from_le_bytes(first(bytes))),
        ValueType::I64 => i128::from(i64::from_le_bytes(first(bytes))),
        other => unreachable!("{other} is not an integer type"),
    }
}

/// The string that starts `bytes`, and what follows it.
fn split_string(bytes: &[u8]) -> (&[u8], &[u8]) {
    let len = u64::from_le_bytes(first(bytes)) as usize;
    bytes[8..].split_at(len)
}

/// An array of metadata, as a view into what was read: nothing is copied.
#[derive(Clone, Copy)]
pub struct Array<'a> {
    element: ValueType,
    len: usize,
    /// From the first element on, to the end of what was read.
    bytes: &'a [u8],
    file: &'a Path,
    key: &'a str,
}

impl<'a> Array<'a> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The strings, as bytes: vocabularies hold pieces that are not whole UTF-8.
    pub fn strings(&self) -> Result<impl ExactSizeIterator<Item = &'a [u8]> + Clone + use<'a>> {
        self.expect("string", self.element == ValueType::String)?;
        Ok(Strings {
            left: self.len,
            bytes: self.bytes,
        })
    }

    /// The integers, of whatever integer type, if all of them fit in u32.
    pub fn u32s(&self) -> Result<impl ExactSizeIterator<Item = u32> + Clone + use<'a>> {
        let is_integer = !matches!(
            self.element,
            ValueType::F32
                | ValueType::F64
                | ValueType::Bool
                | ValueType::String
                | ValueType::Array
        );
        self.expect("integer", is_integer)?;
        let element = self.element;
        let values = self.fixed().map(move |b| integer(b, element));
        if let Some(wrong) = values.clone().find(|&v| u32::try_from(v).is_err()) {
            return Err(Error::new(
                Kind::Format,
                format!(
                    "{}: {:?} holds {wrong}, not a uint32",
                    self.file.display(),
                    self.key
                ),
                super::cursor::COPY_AGAIN,
            ));
        }
        Ok(values.map(|v| v as u32))
    }

    /// The floats, float64 rounded to float32.
    pub fn f32s(&self) -> Result<impl ExactSizeIterator<Item = f32> + Clone + use<'a>> {
        self.expect(
            "float",
            matches!(self.element, ValueType::F32 | ValueType::F64),
        )?;
        let wide = self.element == ValueType::F64;
        Ok(self.fixed().map(move |b| {
            if wide {
                f64::from_le_bytes(first(b)) as f32
            } else {
                f32::from_le_bytes(first(b))
            }
        }))
    }

    /// The bools.
    pub fn bools(&self) -> Result<impl ExactSizeIterator<Item = bool> + Clone + use<'a>> {
        self.expect("bool", self.element == ValueType::Bool)?;
        Ok(self.fixed().map(|b| b[0] != 0))
    }

    /// The bytes of each element of a type of fixed size.
    fn fixed(&self) -> std::slice::ChunksExact<'a, u8> {
        let size = self
            .element
            .fixed_bytes()
            .expect("the caller has checked the element type");
        self.bytes[..self.len * size].chunks_exact(size)
    }

    fn expect(&self, wanted: &str, is_so: bool) -> Result<()> {
        if is_so {
            return Ok(());
        }
        let found = format_args!("array of {}", self.element).to_string();
        Err(wrong_type(
            self.file,
            self.key,
            &format!("array of {wanted}"),
            &found,
        ))
    }
}

impl fmt::Debug for Array<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}; {}]", self.element, self.len)
    }
}

/// Walks the strings of an array.
#[derive(Debug, Clone)]
struct Strings<'a> {
    left: usize,
    bytes: &'a [u8],
}

impl<'a> Iterator for Strings<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        self.left = self.left.checked_sub(1)?;
        let (string, rest) = split_string(self.bytes);
        self.bytes = rest;
        Some(string)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl ExactSizeIterator for Strings<'_> {}

/// The error for a value of another type than the reader needs.
pub(super) fn wrong_type(file: &Path, key: &str, wanted: &str, found: &str) -> Error {
    Error::new(
        Kind::Format,
        format!(
            "{}: {key:?} should be of type {wanted}, it is {found}",
            file.display()
        ),
        "convert the model again with a current converter",
    )
}
