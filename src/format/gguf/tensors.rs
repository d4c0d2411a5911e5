//! The tensor table: sizes, places in the file, and what must hold for them.

use std::path::Path;

use super::cursor::{COPY_AGAIN, damaged};
use crate::error::{Error, Kind, Result};
use crate::format::quant::QuantType;

/// One tensor of a model: its shape, its type and where its bytes are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Unique in the model.
    pub name: String,
    /// How the values are stored.
    pub qtype: QuantType,
    /// Values in a row: `dims[0]`, a multiple of the type's quant block.
    pub cols: usize,
    /// Number of rows: the product of the other dimensions.
    pub rows: usize,
    /// GGUF's dimensions, innermost first, filled up with ones.
    pub dims: [u64; 4],
    /// Index into [`super::Gguf::files`].
    pub file: usize,
    /// Where the first row starts, in bytes from the start of that file.
    pub offset: u64,
    /// Size in that file. Rows follow each other without gaps.
    pub bytes: u64,
}

impl TensorInfo {
    /// Checks shape and type. `offset` is relative to the data until [`place`] has run.
    pub(super) fn new(
        name: &str,
        dims: [u64; 4],
        ggml_type: u32,
        offset: u64,
        file: &Path,
        file_index: usize,
    ) -> Result<Self> {
        let Some(qtype) = QuantType::from_ggml(ggml_type) else {
            return Err(unsupported_type(name, ggml_type, file));
        };
        let damaged = |what: String| damaged(file, format_args!("tensor {name} {what}"));
        if dims.contains(&0) {
            return Err(damaged(format!("has a dimension of zero: {dims:?}")));
        }
        let block = qtype.block_values();
        if !dims[0].is_multiple_of(block as u64) {
            return Err(damaged(format!(
                "has rows of {} values, not a multiple of the {block} in a {} block",
                dims[0],
                qtype.name()
            )));
        }
        let too_big = || damaged(format!("is too big to be true: {dims:?}"));
        let cols = usize::try_from(dims[0]).map_err(|_| too_big())?;
        let rows = dims[1..]
            .iter()
            .try_fold(1u64, |n, &d| n.checked_mul(d))
            .ok_or_else(too_big)?;
        let bytes = (dims[0] / block as u64)
            .checked_mul(qtype.block_bytes() as u64)
            .and_then(|row_bytes| row_bytes.checked_mul(rows))
            .ok_or_else(too_big)?;
        let rows = usize::try_from(rows).map_err(|_| too_big())?;
        let name = name.to_owned();
        Ok(TensorInfo {
            name,
            qtype,
            cols,
            rows,
            dims,
            file: file_index,
            offset,
            bytes,
        })
    }

    /// Bytes of one row.
    pub fn row_bytes(&self) -> usize {
        self.qtype.row_bytes(self.cols)
    }
}

/// Makes the offsets of one file's tensors absolute, and checks that each tensor is aligned, lies
/// inside the file and shares no byte with another.
pub(super) fn place(
    tensors: &mut [TensorInfo],
    file: &Path,
    data_start: u64,
    alignment: u32,
    file_bytes: u64,
) -> Result<()> {
    for tensor in tensors.iter_mut() {
        let TensorInfo { name, offset, .. } = tensor;
        if !offset.is_multiple_of(u64::from(alignment)) {
            return Err(damaged(
                file,
                format_args!("tensor {name} is at {offset}, not aligned to {alignment} bytes"),
            ));
        }
        *offset = data_start.checked_add(*offset).ok_or_else(|| {
            damaged(
                file,
                format_args!("tensor {name} has the impossible offset {offset}"),
            )
        })?;
    }
    let mut by_offset: Vec<&TensorInfo> = tensors.iter().collect();
    by_offset.sort_unstable_by_key(|t| t.offset);
    for (i, tensor) in by_offset.iter().enumerate() {
        let room_end = by_offset.get(i + 1).map_or(u64::MAX, |next| next.offset);
        if tensor.bytes > file_bytes.saturating_sub(tensor.offset) {
            return Err(cut_off(tensor, file, file_bytes));
        }
        if tensor.bytes > room_end - tensor.offset {
            let next = &by_offset[i + 1].name;
            return Err(damaged(
                file,
                format_args!("the tensors {} and {next} overlap", tensor.name),
            ));
        }
    }
    Ok(())
}

/// The error for a file that ends before `tensor` does.
fn cut_off(tensor: &TensorInfo, file: &Path, file_bytes: u64) -> Error {
    let present = file_bytes.saturating_sub(tensor.offset);
    Error::new(
        Kind::Format,
        format!(
            "{}: the file is truncated: {} of the {} bytes of tensor {} are missing \
             (it starts at offset {}, the file has {file_bytes} bytes)",
            file.display(),
            tensor.bytes - present,
            tensor.bytes,
            tensor.name,
            tensor.offset,
        ),
        COPY_AGAIN,
    )
}

fn unsupported_type(name: &str, ggml_type: u32, file: &Path) -> Error {
    let known = match ggml_type {
        4 | 5 | 31..=33 | 36..=38 => " (retired from GGUF)",
        9 => " (Q8_1)",
        15 => " (Q8_K)",
        16 => " (IQ2_XXS)",
        17 => " (IQ2_XS)",
        18 => " (IQ3_XXS)",
        19 => " (IQ1_S)",
        20 => " (IQ4_NL)",
        21 => " (IQ3_S)",
        22 => " (IQ2_S)",
        23 => " (IQ4_XS)",
        24..=27 => " (integers)",
        28 => " (F64)",
        29 => " (IQ1_M)",
        34 => " (TQ1_0)",
        35 => " (TQ2_0)",
        39 => " (MXFP4)",
        40 => " (NVFP4)",
        _ => "",
    };
    let supported = QuantType::ALL.map(QuantType::name).join(", ");
    Error::new(
        Kind::Unsupported,
        format!(
            "{}: tensor {name} has type {ggml_type}{known}; supported are {supported}",
            file.display()
        ),
        "use a file of this model quantized to a supported type, for example Q4_K_M",
    )
}
